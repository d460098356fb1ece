package partition

import (
	"bytes"
	"container/heap"
	"slices"
	"sort"
	"strings"
	"unique"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/pncounter"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

const (
	// smallTable is the number of records up to which a table has no leaf lists and
	// is scanned instead: 4096 list heads cost 32 KiB, too much for a small map.
	smallTable = 256
	// minStale keeps small arrival logs from being compacted all the time.
	minStale = 64
	// maxRestamped bounds the original stamps that a record remembers.
	maxRestamped = 8
)

// The kinds of tables. An LWW-table has the kind 0, as its changes have in the log.
const (
	lww     = typesv1.Kind_KIND_UNSPECIFIED
	or      = typesv1.Kind_KIND_OR
	counter = typesv1.Kind_KIND_COUNTER

	tableKinds = counter + 1 // the size of an array by kind
)

// kindOf returns the one kind of tables that a kind of the schema stands for.
func kindOf(k typesv1.Kind) typesv1.Kind {
	if k == typesv1.Kind_KIND_LWW {
		return lww
	}
	return k
}

// entry is the record of one key, or of one tag or node of a key. Its size is a size
// class of the allocator, 112 bytes: a field more costs every record 16.
type entry struct {
	key             string // the key; with a tag see joinTag
	value           []byte // never changed, only replaced: readers keep it
	millis, counter uint64
	ttl             uint64
	arrival         arrival
	node            unique.Handle[string] // many records share few node ids
	restamped       *[]hlc.Timestamp      // never changed, only replaced
	next            *entry                // of the leaf; with a tag, of the key
	hash            uint32                // of the key alone
	expiry          int32                 // position in the expiry heap plus one; 0: not in it
}

// record is the entry as a record; its value is shared.
func (e *entry) record() lwwmap.Record {
	return lwwmap.Record{
		Value:     e.value,
		Timestamp: hlc.Timestamp{Millis: e.millis, Counter: e.counter, NodeID: e.node.Value()},
		TTLMillis: e.ttl,
	}
}

func (e *entry) itemHash() uint32 {
	return merkle.ItemHashOf(e.hash, hlc.Timestamp{Millis: e.millis, Counter: e.counter, NodeID: e.node.Value()})
}

func (e *entry) originals() []hlc.Timestamp {
	if e.restamped == nil {
		return nil
	}
	return *e.restamped
}

// change is the state of one key after a merge, as it is logged, published and
// returned to readers. What it refers to is never changed.
type change struct {
	kind      typesv1.Kind
	table     string
	key       string // with a tag see joinTag
	record    lwwmap.Record
	arrival   arrival
	restamped []hlc.Timestamp
	origin    string // session not to be told; only towards events
	replaced  bool   // a live value; only where the change is made, not in reads
	pruned    bool   // the tombstone that was there is forgotten
}

// slot is one arrival. It is stale once its entry arrived again.
type slot struct {
	at    arrival
	entry *entry
}

// table holds the records of one map in one shard. Only its shard's goroutine
// touches it.
type table struct {
	kind       typesv1.Kind
	name       string
	records    map[string]*entry
	tombstones int
	// log holds every entry once at its arrival, in rising order, and stale slots.
	log   []slot
	stale int
	// leaves holds the entries of each Merkle leaf as a list; nil while small.
	leaves []*entry
	mixed  merkle.Leaves
	plain  *merkle.Leaves // nil until somebody asks
	// loading says that lists, bags and the arrival log are made by ready.
	loading bool

	bags  *bags           // with the kind or
	total pncounter.Sides // with the kind counter: the sums over its nodes

	scans []*scan // that are under way
}

func newTable(kind typesv1.Kind, name string) *table {
	t := &table{kind: kind, name: strings.Clone(name), records: make(map[string]*entry)}
	if kind == or {
		t.bags = newBags()
	}
	return t
}

// put stores a record as the state of a key, keeps hashes and lists up to date, and
// returns the entry. It does not append to the arrival log. The value is kept.
func (t *table) put(key []byte, hash uint32, r lwwmap.Record, node unique.Handle[string], at arrival, restamped []hlc.Timestamp) *entry {
	e := t.records[string(key)]
	if e == nil {
		e = &entry{key: string(key), hash: hash}
		t.records[e.key] = e
		t.link(e)
	} else {
		if len(t.scans) > 0 {
			t.keepForScans(e)
		}
		t.hash(e, -1)
		if len(e.value) == 0 {
			t.tombstones--
		}
	}
	e.value, e.ttl, e.arrival = r.Value, r.TTLMillis, at
	e.millis, e.counter, e.node = r.Timestamp.Millis, r.Timestamp.Counter, node
	e.restamped = nil
	if len(restamped) > 0 {
		e.restamped = &restamped
	}
	if len(e.value) == 0 {
		t.tombstones++
	}
	t.hash(e, 1)
	return e
}

// hash adds the entry to what is summed up over the entries, or takes it away: the
// leaf sums, of an OR-table the bag of its key, of a counter the totals.
func (t *table) hash(e *entry, sign int) {
	switch t.kind {
	case or:
		if !t.loading {
			t.hashTag(e, sign)
		}
		return
	case counter:
		sides, _ := pncounter.ParseSides(e.value)
		t.total.Positive += uint64(sign) * sides.Positive
		t.total.Negative += uint64(sign) * sides.Negative
		return
	}
	leaf, item := merkle.Leaf(e.hash), e.itemHash()
	if sign > 0 {
		t.mixed.Add(leaf, item, merkle.Mixed)
	} else {
		t.mixed.Remove(leaf, item, merkle.Mixed)
	}
	if t.plain == nil {
		return
	}
	if sign > 0 {
		t.plain.Add(leaf, item, merkle.Plain)
	} else {
		t.plain.Remove(leaf, item, merkle.Plain)
	}
}

// link adds a new entry to its leaf's list, or to the bag of its key. Counters have
// no leaves.
func (t *table) link(e *entry) {
	switch {
	case t.loading || t.kind == counter:
	case t.kind == or:
		t.bags.link(e)
	case t.leaves != nil:
		t.push(e)
	case len(t.records) > smallTable:
		t.linkAll()
	}
}

// linkAll makes the leaf lists of an LWW-table.
func (t *table) linkAll() {
	t.leaves = make([]*entry, merkle.LeafCount)
	for _, e := range t.records {
		t.push(e)
	}
}

func (t *table) push(e *entry) {
	head := &t.leaves[merkle.Leaf(e.hash)]
	e.next, *head = *head, e
}

// forget takes tombstones out of the table, as if they had never been. Their lists
// are gone through once for all of them: a list may hold nothing but tombstones, and
// very many.
func (t *table) forget(tombstones ...*entry) {
	for _, e := range tombstones {
		t.hash(e, -1)
		t.tombstones--
		delete(t.records, e.key)
		e.arrival = arrival{} // its slot is stale
	}
	if t.loading {
		return
	}
	t.stale += len(tombstones)
	forgotten := func(e *entry) bool { return e.arrival == arrival{} }
	if t.kind == or {
		t.bags.sweep(tombstones, forgotten)
	} else if t.leaves != nil {
		swept := make(map[int]bool)
		for _, e := range tombstones {
			if leaf := merkle.Leaf(e.hash); !swept[leaf] {
				swept[leaf] = true
				t.leaves[leaf] = without(t.leaves[leaf], forgotten)
			}
		}
	}
	if t.stale > max(minStale, len(t.log)/2) {
		t.compact()
	}
}

// without takes entries out of a list and returns its new head.
func without(head *entry, out func(*entry) bool) *entry {
	for at := &head; *at != nil; {
		if out(*at) {
			*at = (*at).next
		} else {
			at = &(*at).next
		}
	}
	return head
}

// arrived appends to the arrival log. again says that the entry has an older slot.
func (t *table) arrived(e *entry, again bool) {
	if again {
		t.stale++
	}
	t.log = append(t.log, slot{at: e.arrival, entry: e})
	if t.stale > max(minStale, len(t.log)/2) {
		t.compact()
	}
}

// compact drops the stale slots; the order stays.
func (t *table) compact() {
	t.log = slices.DeleteFunc(t.log, func(s slot) bool { return s.entry.arrival != s.at })
	t.stale = 0
	if cap(t.log) > 4*len(t.log) {
		t.log = slices.Clip(slices.Clone(t.log))
	}
}

// ready makes what loading left out, after records came in any order.
func (t *table) ready() {
	t.loading = false
	switch {
	case t.kind == or:
		t.bags.build(t)
	case t.kind == lww && len(t.records) > smallTable:
		t.linkAll()
	}
	t.log, t.stale = make([]slot, 0, len(t.records)), 0
	for _, e := range t.records {
		t.log = append(t.log, slot{at: e.arrival, entry: e})
	}
	slices.SortFunc(t.log, func(a, b slot) int { return a.at.compare(b.at) })
}

// leafSums returns the leaf sums under a combine rule. They belong to the table.
func (t *table) leafSums(c merkle.Combine) *merkle.Leaves {
	if t.kind == or {
		t.hashDirty()
	}
	if c == merkle.Mixed {
		return &t.mixed
	}
	if t.plain == nil {
		t.plain = new(merkle.Leaves)
		if t.kind == or {
			for _, b := range t.bags.byKey {
				t.plain.Add(merkle.Leaf(b.hash), b.item, merkle.Plain)
			}
			return t.plain
		}
		for _, e := range t.records {
			t.plain.Add(merkle.Leaf(e.hash), e.itemHash(), merkle.Plain)
		}
	}
	return t.plain
}

func (t *table) change(e *entry) change {
	return change{kind: t.kind, table: t.name, key: e.key, record: e.record(), arrival: e.arrival, restamped: e.originals()}
}

// inLeaves returns the records of a range of leaves, in no order.
func (t *table) inLeaves(first, last int) []change {
	var changes []change
	if t.kind == or {
		for b := range t.bags.inLeaves(first, last) {
			for e := b.first; e != nil; e = e.next {
				changes = append(changes, t.change(e))
			}
		}
		return changes
	}
	if t.leaves == nil {
		for _, e := range t.records {
			if leaf := merkle.Leaf(e.hash); first <= leaf && leaf <= last {
				changes = append(changes, t.change(e))
			}
		}
		return changes
	}
	for _, e := range t.leaves[first : last+1] {
		for ; e != nil; e = e.next {
			changes = append(changes, t.change(e))
		}
	}
	return changes
}

// since returns what arrived after one position and up to another, in arrival
// order. It stops once it has limit records or maxBytes of them, and then says that
// it was cut: only what arrived up to the last one is complete.
func (t *table) since(after, upTo arrival, limit, maxBytes int) (changes []change, cut bool) {
	begin := sort.Search(len(t.log), func(i int) bool { return t.log[i].at.compare(after) > 0 })
	for _, s := range t.log[begin:] {
		if s.at.compare(upTo) > 0 {
			break
		}
		if s.entry.arrival != s.at {
			continue
		}
		if len(changes) == limit || maxBytes <= 0 {
			return changes, true
		}
		maxBytes -= len(s.entry.key) + len(s.entry.value)
		changes = append(changes, t.change(s.entry))
	}
	return changes, false
}

// of returns all that a key holds.
func (t *table) of(key string) (changes []change) {
	switch t.kind {
	case lww:
		if e := t.records[key]; e != nil {
			changes = append(changes, t.change(e))
		}
	case or:
		if b := t.bags.byKey[key]; b != nil {
			for e := b.first; e != nil; e = e.next {
				changes = append(changes, t.change(e))
			}
		}
	case counter: // has one key, its name
		for _, e := range t.records {
			if k, _ := splitTag(e.key); k == key {
				changes = append(changes, t.change(e))
			}
		}
	}
	return changes
}

// remember returns the original stamps that a record with the stamp current must
// remember once original was replaced by a stamp of ours; original may be zero. An
// original at or below current needs no memory: sent again, it loses.
func remember(known []hlc.Timestamp, original, current hlc.Timestamp) []hlc.Timestamp {
	if len(known) == 0 && original.IsZero() {
		return nil
	}
	kept := make([]hlc.Timestamp, 0, len(known)+1)
	for _, k := range known {
		if k.Compare(current) > 0 && k.NodeID != original.NodeID {
			kept = append(kept, k)
		}
	}
	if !original.IsZero() {
		kept = append(kept, original)
	}
	slices.SortFunc(kept, func(a, b hlc.Timestamp) int { return b.Compare(a) })
	return kept[:min(maxRestamped, len(kept))]
}

// repeats reports whether an op with this stamp was taken in before under a stamp of
// ours: one of its node at or below the highest remembered (PROTOCOL 22.4).
func repeats(known []hlc.Timestamp, stamp hlc.Timestamp) bool {
	return slices.ContainsFunc(known, func(k hlc.Timestamp) bool {
		return k.NodeID == stamp.NodeID && stamp.Compare(k) <= 0
	})
}

// expiring is one record that will expire.
type expiring struct {
	at    uint64 // last millisecond at which it is visible
	table *table
	entry *entry
}

// expiryHeap orders records by expiry. Each entry knows its position, so that a
// record that is written again and again has one place.
type expiryHeap []expiring

func (h expiryHeap) Len() int           { return len(h) }
func (h expiryHeap) Less(i, j int) bool { return h[i].at < h[j].at }
func (h expiryHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].entry.expiry, h[j].entry.expiry = int32(i+1), int32(j+1)
}

// Push is for package heap; use schedule.
func (h *expiryHeap) Push(x any) {
	item := x.(expiring)
	*h = append(*h, item)
	item.entry.expiry = int32(len(*h))
}

// Pop is for package heap; use schedule.
func (h *expiryHeap) Pop() any {
	last := len(*h) - 1
	item := (*h)[last]
	(*h)[last] = expiring{}
	*h = (*h)[:last]
	item.entry.expiry = 0
	return item
}

// schedule puts the entry where its present state belongs, or takes it out.
func (h *expiryHeap) schedule(t *table, e *entry) {
	at, expires := e.record().ExpiresAt()
	switch {
	case expires && e.expiry == 0:
		heap.Push(h, expiring{at: at, table: t, entry: e})
	case expires:
		(*h)[e.expiry-1].at = at
		heap.Fix(h, int(e.expiry-1))
	case e.expiry != 0:
		heap.Remove(h, int(e.expiry-1))
	}
}

// keepValue copies a value out of the request that brought it, whose buffer may be
// large and shared.
func keepValue(value []byte) []byte {
	if len(value) == 0 {
		return nil
	}
	return bytes.Clone(value)
}
