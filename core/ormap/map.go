package ormap

import (
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"iter"
	"maps"
	"slices"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/msgval"
)

// Map is a multi-value map as clients hold it: records by key and tag, and one set of
// tombstones for the whole map (PROTOCOL 6.1). The zero value is empty and ready. It
// keeps the values that it is given; neither side may change them. It is not safe
// for concurrent use.
type Map struct {
	keys       map[string]*bag
	tombstones map[string]struct{}
}

// bag is what one key holds, in the order in which the tags came.
type bag struct {
	records []Record
	at      map[string]int // position of each tag
}

// Add writes a value under a tag of its own, the text of the clock's next stamp,
// visible for ttlMillis, or for ever if that is 0. It returns the record.
func (m *Map) Add(clock *hlc.Clock, key string, value []byte, ttlMillis uint64) Record {
	stamp := clock.Now()
	r := Record{Tag: stamp.String(), Record: lwwmap.Record{Value: value, Timestamp: stamp, TTLMillis: ttlMillis}}
	m.put(key, r)
	return r
}

// Remove drops the records of a key whose value is equal, leaves tombstones of their
// tags, and returns the tags, each of which is to be removed by an op.
func (m *Map) Remove(key string, value []byte) (tags []string) {
	for r := range m.Records(key) {
		if msgval.Equal(r.Value, value) {
			tags = append(tags, r.Tag)
		}
	}
	for _, tag := range tags {
		m.bury(tag)
		m.drop(key, tag)
	}
	return tags
}

// Apply takes in an add that another replica made, without comparing stamps: what an
// OR_ADD event says (PROTOCOL 6.2). It returns false if the tag is removed already.
func (m *Map) Apply(key string, r Record) bool {
	if m.Removed(r.Tag) {
		return false
	}
	m.put(key, r)
	return true
}

// ApplyTombstone takes in that a tag was removed, whatever key it belongs to, and
// returns that key if it is known.
func (m *Map) ApplyTombstone(tag string) (key string, ok bool) {
	m.bury(tag)
	for key, b := range m.keys {
		if _, ok := b.at[tag]; ok {
			m.drop(key, tag)
			return key, true
		}
	}
	return "", false
}

// MergeKey takes in all that another replica knows of a key (mergeKey of PROTOCOL
// 6.2) and says how many records were added and replaced. The caller feeds the
// stamps of the records to its clock.
func (m *Map) MergeKey(key string, records []Record, tombstones []string) (added, updated int) {
	for _, tag := range tombstones {
		m.bury(tag)
	}
	for _, r := range slices.Collect(m.Records(key)) {
		if m.Removed(r.Tag) {
			m.drop(key, r.Tag)
		}
	}
	for _, r := range records {
		local := m.find(key, r.Tag)
		if Decide(local, m.Removed(r.Tag), r) != lwwmap.Applied {
			continue
		}
		if local == nil {
			added++
		} else {
			updated++
		}
		m.put(key, r)
	}
	return added, updated
}

// Merge takes in one add or removal, as a server does, and says what became of it.
func (m *Map) Merge(key string, r Record) lwwmap.Outcome {
	o := Decide(m.find(key, r.Tag), m.Removed(r.Tag), r)
	switch {
	case o != lwwmap.Applied:
	case r.Deleted():
		m.bury(r.Tag)
		m.drop(key, r.Tag)
	default:
		m.put(key, r)
	}
	return o
}

// Get returns the values of a key that readers see at a wall clock time, in the order
// in which they came.
func (m *Map) Get(key string, nowMillis uint64) (values [][]byte) {
	for r := range m.Records(key) {
		if !m.Removed(r.Tag) && r.VisibleAt(nowMillis) {
			values = append(values, r.Value)
		}
	}
	return values
}

// Records yields the records of a key in the order in which they came, expired ones
// included. The map must not be changed meanwhile.
func (m *Map) Records(key string) iter.Seq[Record] {
	b := m.keys[key]
	if b == nil {
		return func(func(Record) bool) {}
	}
	return slices.Values(b.records)
}

// Keys returns the keys that hold records, in the order of their bytes.
func (m *Map) Keys() []string { return slices.Sorted(maps.Keys(m.keys)) }

// Removed reports whether a tag has a tombstone.
func (m *Map) Removed(tag string) bool {
	_, ok := m.tombstones[tag]
	return ok
}

// Tombstones returns the tags that were removed, in the order of their bytes.
func (m *Map) Tombstones() []string { return slices.Sorted(maps.Keys(m.tombstones)) }

// Prune forgets the tombstones whose tag is a stamp strictly below olderThan
// (PROTOCOL 6.3) and returns how many there were.
func (m *Map) Prune(olderThan hlc.Timestamp) int {
	before := len(m.tombstones)
	maps.DeleteFunc(m.tombstones, func(tag string, _ struct{}) bool {
		stamp, err := hlc.Parse(tag)
		return err == nil && stamp.Compare(olderThan) < 0
	})
	return before - len(m.tombstones)
}

// Leaves returns the leaf sums of the map, computed from all its records.
func (m *Map) Leaves(c merkle.Combine) *merkle.Leaves {
	l := new(merkle.Leaves)
	for key, b := range m.keys {
		l.Add(merkle.Leaf(merkle.Hash(key)), ItemHash(key, slices.Values(b.sorted())), c)
	}
	return l
}

// Digest returns a hash of the content that is equal on two replicas exactly if
// they hold the same records and tombstones. It is the SHA-256 of: for each key in
// the order of the bytes, the key, the number of its records, and for each record in
// the order of CompareTags the tag, the canonical value, the stamp's millis, counter
// and node id, the ttl; then the number of tombstones and their tags in the order of
// the bytes. Strings and values are preceded by their length in bytes; lengths and
// numbers are 8 bytes, big-endian.
func (m *Map) Digest() [sha256.Size]byte {
	d := digester{h: sha256.New()}
	for _, key := range m.Keys() {
		d.bytes([]byte(key))
		records := m.keys[key].sorted()
		d.number(uint64(len(records)))
		for _, r := range records {
			d.bytes([]byte(r.Tag))
			d.value = msgval.Canonical(d.value[:0], r.Value)
			d.bytes(d.value)
			d.number(r.Timestamp.Millis)
			d.number(r.Timestamp.Counter)
			d.bytes([]byte(r.Timestamp.NodeID))
			d.number(r.TTLMillis)
		}
	}
	d.number(uint64(len(m.tombstones)))
	for _, tag := range m.Tombstones() {
		d.bytes([]byte(tag))
	}
	return [sha256.Size]byte(d.h.Sum(nil))
}

type digester struct {
	h     hash.Hash
	value []byte
}

func (d *digester) number(n uint64) {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], n)
	d.h.Write(b[:])
}

func (d *digester) bytes(b []byte) {
	d.number(uint64(len(b)))
	d.h.Write(b)
}

func (m *Map) bury(tag string) {
	if m.tombstones == nil {
		m.tombstones = make(map[string]struct{})
	}
	m.tombstones[tag] = struct{}{}
}

func (m *Map) find(key, tag string) *Record {
	b := m.keys[key]
	if b == nil {
		return nil
	}
	i, ok := b.at[tag]
	if !ok {
		return nil
	}
	return &b.records[i]
}

func (m *Map) put(key string, r Record) {
	b := m.keys[key]
	if b == nil {
		b = &bag{at: make(map[string]int)}
		if m.keys == nil {
			m.keys = make(map[string]*bag)
		}
		m.keys[key] = b
	}
	if i, ok := b.at[r.Tag]; ok {
		b.records[i] = r
		return
	}
	b.at[r.Tag] = len(b.records)
	b.records = append(b.records, r)
}

// drop takes a record out of a key.
func (m *Map) drop(key, tag string) {
	b := m.keys[key]
	if b == nil {
		return
	}
	i, ok := b.at[tag]
	if !ok {
		return
	}
	b.records = slices.Delete(b.records, i, i+1)
	delete(b.at, tag)
	for _, behind := range b.records[i:] {
		b.at[behind.Tag]--
	}
	if len(b.records) == 0 {
		delete(m.keys, key)
	}
}

// sorted returns the records in the order of CompareTags.
func (b *bag) sorted() []Record {
	return slices.SortedFunc(slices.Values(b.records), func(x, y Record) int { return CompareTags(x.Tag, y.Tag) })
}
