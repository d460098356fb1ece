package partition

import (
	"bytes"
	"cmp"
	"container/heap"
	"slices"
	"sort"
	"strings"
	"unique"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/merkle"
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

// entry is the record of one key. Its size is a size class of the allocator, 112
// bytes: a field more costs every record 16.
type entry struct {
	key             string
	value           []byte // never changed, only replaced: readers keep it
	millis, counter uint64
	ttl             uint64
	arrival         arrival
	node            unique.Handle[string] // many records share few node ids
	restamped       *[]hlc.Timestamp      // never changed, only replaced
	nextInLeaf      *entry
	hash            uint32 // of the key
	expiry          int32  // position in the expiry heap plus one; 0: not in it
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
	table     string
	key       string
	record    lwwmap.Record
	arrival   arrival
	restamped []hlc.Timestamp
	origin    string // session not to be told; only towards events
}

// slot is one arrival. It is stale once its entry arrived again.
type slot struct {
	at    arrival
	entry *entry
}

// table holds the records of one map in one shard. Only its shard's goroutine
// touches it.
type table struct {
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
}

func newTable(name string) *table {
	return &table{name: strings.Clone(name), records: make(map[string]*entry)}
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

// hash adds the entry to the leaf sums, or takes it away.
func (t *table) hash(e *entry, sign int) {
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

// link adds a new entry to its leaf's list. Entries are never taken out.
func (t *table) link(e *entry) {
	if t.leaves == nil {
		if len(t.records) <= smallTable {
			return
		}
		t.leaves = make([]*entry, merkle.LeafCount)
		for _, other := range t.records {
			t.push(other)
		}
		return
	}
	t.push(e)
}

func (t *table) push(e *entry) {
	head := &t.leaves[merkle.Leaf(e.hash)]
	e.nextInLeaf, *head = *head, e
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

// sortLog makes the arrival log anew, after records were loaded in any order.
func (t *table) sortLog() {
	t.log, t.stale = make([]slot, 0, len(t.records)), 0
	for _, e := range t.records {
		t.log = append(t.log, slot{at: e.arrival, entry: e})
	}
	slices.SortFunc(t.log, func(a, b slot) int { return a.at.compare(b.at) })
}

// leafSums returns the leaf sums under a combine rule. They belong to the table.
func (t *table) leafSums(c merkle.Combine) *merkle.Leaves {
	if c == merkle.Mixed {
		return &t.mixed
	}
	if t.plain == nil {
		t.plain = new(merkle.Leaves)
		for _, e := range t.records {
			t.plain.Add(merkle.Leaf(e.hash), e.itemHash(), merkle.Plain)
		}
	}
	return t.plain
}

func (t *table) change(e *entry) change {
	return change{table: t.name, key: e.key, record: e.record(), arrival: e.arrival, restamped: e.originals()}
}

// inLeaves returns the records of a range of leaves, in no order.
func (t *table) inLeaves(first, last int) []change {
	var changes []change
	if t.leaves == nil {
		for _, e := range t.records {
			if leaf := merkle.Leaf(e.hash); first <= leaf && leaf <= last {
				changes = append(changes, t.change(e))
			}
		}
		return changes
	}
	for _, e := range t.leaves[first : last+1] {
		for ; e != nil; e = e.nextInLeaf {
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

// row is one result of a query.
type row struct {
	key   string
	value []byte
}

// query returns the first rows by key, at most limit, that are visible, lie above a
// key, and match.
func (t *table) query(after string, limit int, now uint64, match func([]byte) bool) []row {
	var rows []row
	byKey := func(a, b row) int { return cmp.Compare(a.key, b.key) }
	for _, e := range t.records {
		if e.key <= after || !e.record().VisibleAt(now) || !match(e.value) {
			continue
		}
		rows = append(rows, row{key: e.key, value: e.value})
		// Holding twice the limit bounds the memory and makes sorting rare.
		if len(rows) >= 2*limit {
			slices.SortFunc(rows, byKey)
			rows = rows[:limit]
		}
	}
	slices.SortFunc(rows, byKey)
	return rows[:min(limit, len(rows))]
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
