// Package verify compares what a cluster holds in memory with what its store holds,
// and the Merkle leaves that its shards show with the records below them.
//
// It promises that a difference it reports is one: a record that is being written
// while it looks is looked at again, up to three times, and counted as changing if it
// never holds still. It changes nothing. It keeps two hashes of 8 bytes for each
// record in memory, and keys only of what seems to differ.
//
// It does not see a counter that the store lacks altogether, since no call lists
// counters, and no locks, which no call reads.
package verify

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"hash/maphash"
	"slices"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/topgun-sync/topgun/core/keyspace"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	persistencev1 "github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
	"github.com/topgun-sync/topgun/services/cmd/topgunctl/internal/line"
	"github.com/topgun-sync/topgun/services/cmd/topgunctl/internal/remote"
)

const (
	// maxSuspects bounds the keys that are looked at again.
	maxSuspects = 10_000
	// rounds is how often.
	rounds = 3
	// maxShown bounds the differences that are named.
	maxShown = 100
	// devicesMap is the server's own LWW-map, which ListMaps leaves out.
	devicesMap = "$devices"
)

// What differs.
const (
	NotInStore  = "not in the store"
	NotInMemory = "not in memory"
	Differs     = "memory and store differ"
	LeafDiffers = "the leaf's hash is not that of its records"
)

// State is a record on one side of a difference.
type State struct {
	Stamp     line.Stamp   `json:"stamp"`
	Arrival   line.Arrival `json:"arrival"`
	TTLMillis uint64       `json:"ttlMillis,omitempty"`
	Deleted   bool         `json:"deleted,omitempty"`
	// ValueHash is of the bytes of the value; comparable within one run only.
	ValueHash uint64 `json:"valueHash,omitempty"`
}

// Difference is one record, or one leaf, that is not the same on both sides.
type Difference struct {
	Map    string `json:"map"`
	Kind   string `json:"kind"`
	Key    string `json:"key,omitempty"`
	Tag    string `json:"tag,omitempty"`
	Leaf   *int   `json:"leaf,omitempty"`
	What   string `json:"what"`
	Memory *State `json:"memory,omitempty"`
	Store  *State `json:"store,omitempty"`
}

// Map is the result for one map.
type Map struct {
	Map         string `json:"map"`
	Kind        string `json:"kind"`
	Records     uint64 `json:"records"` // in memory, tombstones included
	Stored      uint64 `json:"stored"`
	Leaves      uint64 `json:"leaves"` // compared
	Differences uint64 `json:"differences"`
	// Changing records and leaves were being written, so they are not compared.
	Changing uint64 `json:"changing"`
}

// Report is the result.
type Report struct {
	Equal bool   `json:"equal"`
	Maps  []*Map `json:"maps"`
	// Differences are the first ones, at most 100.
	Differences []Difference `json:"differences"`
}

// mapID names a map.
type mapID struct {
	kind typesv1.Kind
	name string
}

// id names a record.
type id struct {
	mapID
	key, tag string
}

func idOf(c *typesv1.Change) id {
	kind := max(c.GetKind(), typesv1.Kind_KIND_LWW)
	return id{mapID{kind, c.GetMap()}, string(c.GetKey()), c.GetTag()}
}

// run is one verification.
type run struct {
	cluster *remote.Cluster
	tick    func(records uint64)
	seed    maphash.Seed
	report  *Report
	maps    map[mapID]*Map
	// digest holds, for each record in memory that was not met in the store yet, the
	// hash of its name and the hash of its content.
	digest   map[uint64]uint64
	suspects map[id]struct{}
	// covered is, by map, up to which arrival memory had taken everything in when the
	// reading began: the least of the nodes.
	covered map[mapID]*typesv1.Arrival
	done    uint64
}

// Run verifies the map of that name, of every kind, or all with an empty name. tick
// is called now and then with the number of records read so far.
func Run(ctx context.Context, c *remote.Cluster, name string, tick func(records uint64)) (*Report, error) {
	r := &run{
		cluster: c, tick: tick, seed: maphash.MakeSeed(), report: &Report{Differences: []Difference{}},
		maps: make(map[mapID]*Map), digest: make(map[uint64]uint64), suspects: make(map[id]struct{}),
		covered: make(map[mapID]*typesv1.Arrival),
	}
	listed, err := c.Maps(ctx)
	if err != nil {
		return nil, err
	}
	listed = append(listed, &partitionv1.MapInfo{Name: devicesMap, Kind: typesv1.Kind_KIND_LWW})
	for _, m := range listed {
		if name == "" || m.GetName() == name {
			if err := r.memory(ctx, mapID{m.GetKind(), m.GetName()}); err != nil {
				return nil, err
			}
		}
	}
	if err := r.store(ctx, name); err != nil {
		return nil, err
	}
	if err := r.leftovers(ctx); err != nil {
		return nil, err
	}
	if err := r.settle(ctx); err != nil {
		return nil, err
	}
	r.report.Equal = true
	for _, m := range r.maps {
		if m.Records+m.Stored > 0 || m.Differences > 0 {
			r.report.Maps = append(r.report.Maps, m)
		}
		r.report.Equal = r.report.Equal && m.Differences == 0
	}
	slices.SortFunc(r.report.Maps, func(a, b *Map) int {
		return cmp.Or(cmp.Compare(a.Map, b.Map), cmp.Compare(a.Kind, b.Kind))
	})
	return r.report, nil
}

func (r *run) of(m mapID) *Map {
	of := r.maps[m]
	if of == nil {
		of = &Map{Map: m.name, Kind: line.KindOf(m.kind)}
		r.maps[m] = of
	}
	return of
}

func (r *run) read() {
	r.done++
	if r.done%1000 == 0 {
		r.tick(r.done)
	}
}

// hash is of parts, each preceded by its length.
func (r *run) hash(parts ...[]byte) uint64 {
	var h maphash.Hash
	h.SetSeed(r.seed)
	var length [8]byte
	for _, part := range parts {
		binary.BigEndian.PutUint64(length[:], uint64(len(part)))
		_, _ = h.Write(length[:])
		_, _ = h.Write(part)
	}
	return h.Sum64()
}

func (r *run) nameHash(i id) uint64 {
	return r.hash([]byte{byte(i.kind)}, []byte(i.name), []byte(i.key), []byte(i.tag))
}

// contentHash is of what both sides must agree on.
func (r *run) contentHash(c *typesv1.Change) uint64 {
	record, numbers := c.GetRecord(), make([]byte, 0, 40)
	for _, n := range []uint64{
		record.GetTimestamp().GetMillis(), record.GetTimestamp().GetCounter(), record.GetTtlMillis(),
		c.GetArrival().GetMillis(), c.GetArrival().GetCounter(),
	} {
		numbers = binary.BigEndian.AppendUint64(numbers, n)
	}
	return r.hash(record.GetValue(), numbers, []byte(record.GetTimestamp().GetNodeId()))
}

func (r *run) state(c *typesv1.Change) *State {
	if c == nil {
		return nil
	}
	s := &State{
		Stamp: line.StampOf(c.GetRecord().GetTimestamp()), Arrival: line.ArrivalOf(c.GetArrival()),
		TTLMillis: c.GetRecord().GetTtlMillis(), Deleted: len(c.GetRecord().GetValue()) == 0,
	}
	if !s.Deleted {
		s.ValueHash = r.hash(c.GetRecord().GetValue())
	}
	return s
}

// suspect notes a record to be looked at again. Beyond the bound it is taken for what
// it seems: a stored record that arrived after memory was read for a changing one.
func (r *run) suspect(c *typesv1.Change) {
	i := idOf(c)
	_, noted := r.suspects[i]
	switch {
	case noted || len(r.suspects) < maxSuspects:
		r.suspects[i] = struct{}{}
	case compareArrivals(c.GetArrival(), r.covered[i.mapID]) > 0:
		r.of(i.mapID).Changing++
	default:
		r.of(i.mapID).Differences++
	}
}

func compareArrivals(a, b *typesv1.Arrival) int {
	return cmp.Or(cmp.Compare(a.GetMillis(), b.GetMillis()), cmp.Compare(a.GetCounter(), b.GetCounter()))
}

func (r *run) differ(d Difference) {
	if len(r.report.Differences) < maxShown {
		r.report.Differences = append(r.report.Differences, d)
	}
}

// store compares everything that is stored with the digest, and takes out of it what
// it met.
func (r *run) store(ctx context.Context, name string) error {
	// What was read from memory is in the log; after this it is in the store too.
	if err := r.flush(ctx); err != nil {
		return err
	}
	all := make([]uint32, keyspace.PartitionCount)
	for i := range all {
		all[i] = uint32(i)
	}
	var counters []*typesv1.Change
	for c, err := range r.cluster.Load(ctx, all) {
		if err != nil {
			return err
		}
		i := idOf(c)
		if i.kind == typesv1.Kind_KIND_LOCK || name != "" && i.name != name {
			continue
		}
		r.read()
		r.of(i.mapID).Stored++
		if i.kind == typesv1.Kind_KIND_COUNTER {
			if counters = append(counters, c); len(counters) == counterBatch {
				if err := r.counters(ctx, counters); err != nil {
					return err
				}
				counters = nil
			}
			continue
		}
		hash := r.nameHash(i)
		if content, ok := r.digest[hash]; !ok || content != r.contentHash(c) {
			r.suspect(c)
		}
		delete(r.digest, hash)
	}
	return r.counters(ctx, counters)
}

// counterBatch is how many counters are asked for at once.
const counterBatch = 500

// counters compares stored counters with those in memory.
func (r *run) counters(ctx context.Context, stored []*typesv1.Change) error {
	for _, c := range stored {
		r.of(idOf(c).mapID).Records++
	}
	ids := make(map[id]struct{}, len(stored))
	for _, c := range stored {
		ids[idOf(c)] = struct{}{}
	}
	inMemory, err := r.get(ctx, ids)
	if err != nil {
		return err
	}
	for _, c := range stored {
		i := idOf(c)
		if m := inMemory[i]; m == nil || r.contentHash(m) != r.contentHash(c) {
			r.suspect(c)
		}
	}
	return nil
}

// leftovers finds the names of the records that memory holds and the store does not.
func (r *run) leftovers(ctx context.Context) error {
	if len(r.digest) == 0 {
		return nil
	}
	for m := range r.maps {
		if m.kind == typesv1.Kind_KIND_COUNTER {
			continue
		}
		for c, err := range r.cluster.Since(ctx, m.kind, m.name) {
			if err != nil {
				return err
			}
			hash := r.nameHash(idOf(c))
			if _, ok := r.digest[hash]; ok {
				r.suspect(c)
				delete(r.digest, hash)
			}
		}
	}
	// Whatever is left now is in memory no longer either.
	return nil
}

func (r *run) flush(ctx context.Context) error {
	c := r.cluster
	_, err := remote.Call(ctx, c, c.AtPersistence, c.Persistence.Flush, &persistencev1.FlushRequest{})
	return err
}

// settle looks at the suspects again: in memory, then, once all of that is stored, in
// the store, then in memory once more.
func (r *run) settle(ctx context.Context) error {
	for round := 1; len(r.suspects) > 0; round++ {
		before, err := r.get(ctx, r.suspects)
		if err != nil {
			return err
		}
		if err := r.flush(ctx); err != nil {
			return err
		}
		stored, err := r.stored(ctx)
		if err != nil {
			return err
		}
		after, err := r.get(ctx, r.suspects)
		if err != nil {
			return err
		}
		for i := range r.suspects {
			switch {
			case r.equal(stored[i], before[i]) || r.equal(stored[i], after[i]):
				delete(r.suspects, i)
			case round == rounds && !r.equal(before[i], after[i]) && between(before[i], stored[i], after[i]):
				r.of(i.mapID).Changing++
				delete(r.suspects, i)
			}
		}
		if round == rounds {
			r.conclude(before, stored)
			return nil
		}
	}
	return nil
}

// conclude reports the suspects that are left.
func (r *run) conclude(memory, store map[id]*typesv1.Change) {
	left := make([]id, 0, len(r.suspects))
	for i := range r.suspects {
		left = append(left, i)
	}
	slices.SortFunc(left, func(a, b id) int {
		return cmp.Or(cmp.Compare(a.name, b.name), cmp.Compare(a.kind, b.kind), cmp.Compare(a.key, b.key), cmp.Compare(a.tag, b.tag))
	})
	for _, i := range left {
		d := Difference{
			Map: i.name, Kind: line.KindOf(i.kind), Key: i.key, Tag: i.tag,
			What: Differs, Memory: r.state(memory[i]), Store: r.state(store[i]),
		}
		switch {
		case d.Store == nil:
			d.What = NotInStore
		case d.Memory == nil:
			d.What = NotInMemory
		}
		r.of(i.mapID).Differences++
		r.differ(d)
	}
}

func (r *run) equal(a, b *typesv1.Change) bool {
	if a == nil || b == nil {
		return a == b
	}
	return r.contentHash(a) == r.contentHash(b)
}

// between reports whether the store holds a state that memory went through between
// two readings.
func between(before, stored, after *typesv1.Change) bool {
	if stored == nil || after == nil {
		return false
	}
	return compareArrivals(before.GetArrival(), stored.GetArrival()) < 0 && compareArrivals(stored.GetArrival(), after.GetArrival()) < 0
}

// getBatch is how many keys are asked for at once: with the largest values they fit
// into one answer.
const getBatch = 50

// get reads records from memory.
func (r *run) get(ctx context.Context, ids map[id]struct{}) (map[id]*typesv1.Change, error) {
	keys := make(map[mapID][]string)
	for i := range ids {
		keys[i.mapID] = append(keys[i.mapID], i.key)
	}
	found := make(map[id]*typesv1.Change, len(ids))
	for m, keys := range keys {
		slices.Sort(keys)
		for batch := range slices.Chunk(slices.Compact(keys), getBatch) {
			if err := r.getInto(ctx, found, ids, m, batch); err != nil {
				return nil, err
			}
		}
	}
	return found, nil
}

func (r *run) getInto(ctx context.Context, found map[id]*typesv1.Change, ids map[id]struct{}, m mapID, keys []string) error {
	changes, err := r.cluster.Get(ctx, m.kind, m.name, keys...)
	if e, ok := errors.AsType[*remote.Error](err); ok && e.Code == connect.CodeResourceExhausted && len(keys) > 1 {
		// Keys of an OR-map may hold much.
		half := len(keys) / 2
		return cmp.Or(r.getInto(ctx, found, ids, m, keys[:half]), r.getInto(ctx, found, ids, m, keys[half:]))
	}
	if err != nil {
		return err
	}
	for _, c := range changes {
		if _, asked := ids[idOf(c)]; asked {
			found[idOf(c)] = c
		}
	}
	return nil
}

// stored reads the suspects from the store.
func (r *run) stored(ctx context.Context) (map[id]*typesv1.Change, error) {
	var partitions []uint32
	for i := range r.suspects {
		partitions = append(partitions, uint32(keyspace.Partition(i.key)))
	}
	slices.Sort(partitions)
	found := make(map[id]*typesv1.Change, len(r.suspects))
	for c, err := range r.cluster.Load(ctx, slices.Compact(partitions)) {
		if err != nil {
			return nil, err
		}
		if _, suspected := r.suspects[idOf(c)]; suspected {
			found[idOf(c)] = c
		}
	}
	return found, nil
}

// retryPause is before a moving leaf is read again.
const retryPause = 20 * time.Millisecond
