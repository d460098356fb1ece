package partition

import (
	"iter"
	"slices"
	"strings"

	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/ormap"
)

const (
	// maxBag bounds the live records of one key of an OR-map, counted by recordBytes:
	// the hash of a key covers all of them, and a query shows them as one row.
	maxBag = 4 << 20
	// eagerBag is the size of a key up to which its hash is made anew with every
	// change. Of a larger one that is put off until somebody asks for leaves, unless
	// only the last record changed.
	eagerBag = 4 << 10
	// recordOverhead is what a record counts beside key, tag and value.
	recordOverhead = 64
)

// joinTag makes what an entry of an OR-table or a counter is found by: the key, NUL,
// which no key holds, and the tag or node.
func joinTag(key, tag []byte) []byte {
	joined := make([]byte, 0, len(key)+1+len(tag))
	return append(append(append(joined, key...), 0), tag...)
}

// splitTag takes apart what joinTag made.
func splitTag(joined string) (key, tag string) {
	key, tag, _ = strings.Cut(joined, "\x00")
	return key, tag
}

// bag is what one key of an OR-map holds.
type bag struct {
	key    string
	hash   uint32   // of the key
	item   uint32   // as it is in the leaf sums; 0 without live records
	first  *entry   // of all its entries, tombstones included, in no order
	live   []hashed // records that are not tombstones, in the order of ormap.CompareTags
	done   int      // how many of live have the right hash
	size   int      // of live, by recordBytes
	queued bool     // in bags.dirty
	next   *bag     // of the leaf
}

// hashed is a live record and the hash of the key's item up to it, with which a change
// behind it begins.
type hashed struct {
	entry *entry
	after uint32
}

// bags holds the keys of an OR-table.
type bags struct {
	byKey map[string]*bag
	// leaves holds the bags of each Merkle leaf as a list; nil while small.
	leaves []*bag
	// dirty are the bags whose item in the leaf sums is not that of their records.
	dirty []*bag
}

func newBags() *bags { return &bags{byKey: make(map[string]*bag)} }

func recordBytes(e *entry) int { return recordOverhead + len(e.key) + len(e.value) }

// link adds a new entry to the bag of its key.
func (bs *bags) link(e *entry) *bag {
	key, _ := splitTag(e.key)
	b := bs.byKey[key]
	if b == nil {
		b = &bag{key: key, hash: e.hash}
		bs.byKey[key] = b
		switch {
		case bs.leaves != nil:
			bs.push(b)
		case len(bs.byKey) > smallTable:
			bs.linkAll()
		}
	}
	e.next, b.first = b.first, e
	return b
}

// linkAll makes the leaf lists.
func (bs *bags) linkAll() {
	bs.leaves = make([]*bag, merkle.LeafCount)
	for _, b := range bs.byKey {
		bs.push(b)
	}
}

func (bs *bags) push(b *bag) {
	head := &bs.leaves[merkle.Leaf(b.hash)]
	b.next, *head = *head, b
}

// build makes the bags of a loaded table and hashes them.
func (bs *bags) build(t *table) {
	for _, e := range t.records {
		b := bs.link(e)
		if len(e.value) > 0 {
			b.live = append(b.live, hashed{entry: e})
			b.size += recordBytes(e)
		}
	}
	for _, b := range bs.byKey {
		slices.SortFunc(b.live, func(x, y hashed) int { return ormap.CompareTags(x.entry.key, y.entry.key) })
		t.hashItem(b)
	}
}

// sweep takes forgotten entries out of the lists of their keys, and keys without
// entries out of the table.
func (bs *bags) sweep(tombstones []*entry, forgotten func(*entry) bool) {
	swept := make(map[string]bool)
	for _, e := range tombstones {
		key, _ := splitTag(e.key)
		if swept[key] {
			continue
		}
		swept[key] = true
		b := bs.byKey[key]
		if b.first = without(b.first, forgotten); b.first != nil {
			continue
		}
		// Not in the leaf sums then, and in nobody's hand: a dirty one is hashed to
		// nothing.
		delete(bs.byKey, key)
		if bs.leaves == nil {
			continue
		}
		for at := &bs.leaves[merkle.Leaf(b.hash)]; *at != nil; at = &(*at).next {
			if *at == b {
				*at = b.next
				break
			}
		}
	}
}

// inLeaves yields the keys of a range of leaves.
func (bs *bags) inLeaves(first, last int) iter.Seq[*bag] {
	return func(yield func(*bag) bool) {
		if bs.leaves == nil {
			for _, b := range bs.byKey {
				if leaf := merkle.Leaf(b.hash); first <= leaf && leaf <= last && !yield(b) {
					return
				}
			}
			return
		}
		for _, b := range bs.leaves[first : last+1] {
			for ; b != nil; b = b.next {
				if !yield(b) {
					return
				}
			}
		}
	}
}

// hashTag takes a record in among the live ones of its key, or out, and sees to the
// key's item in the leaf sums.
func (t *table) hashTag(e *entry, sign int) {
	if len(e.value) == 0 {
		return
	}
	key, _ := splitTag(e.key)
	b := t.bags.byKey[key]
	at, _ := slices.BinarySearchFunc(b.live, e, func(x hashed, e *entry) int { return ormap.CompareTags(x.entry.key, e.key) })
	if sign > 0 {
		b.live = slices.Insert(b.live, at, hashed{entry: e})
		b.size += recordBytes(e)
	} else {
		b.live = slices.Delete(b.live, at, at+1)
		b.size -= recordBytes(e)
	}
	b.done = min(b.done, at)
	switch {
	case b.size <= eagerBag, b.done >= len(b.live)-1: // at most one record to read
		t.hashItem(b)
	case !b.queued:
		b.queued = true
		t.bags.dirty = append(t.bags.dirty, b)
	}
}

// hashDirty puts the leaf sums in order.
func (t *table) hashDirty() {
	for _, b := range t.bags.dirty {
		b.queued = false
		t.hashItem(b)
	}
	t.bags.dirty = nil
}

// hashItem makes the hash of a key's item, from the first record that changed, and
// puts it into the leaf sums instead of the old one.
func (t *table) hashItem(b *bag) {
	item := ormap.BeginItem(b.key)
	if b.done > 0 {
		item = b.live[b.done-1].after
	}
	for ; b.done < len(b.live); b.done++ {
		h := &b.live[b.done]
		_, tag := splitTag(h.entry.key)
		item = ormap.ExtendItem(item, ormap.Record{Tag: tag, Record: h.entry.record()})
		h.after = item
	}
	if len(b.live) == 0 {
		item = 0
	}
	if item == b.item {
		return
	}
	leaf := merkle.Leaf(b.hash)
	t.mixed.Remove(leaf, b.item, merkle.Mixed)
	t.mixed.Add(leaf, item, merkle.Mixed)
	if t.plain != nil {
		t.plain.Remove(leaf, b.item, merkle.Plain)
		t.plain.Add(leaf, item, merkle.Plain)
	}
	b.item = item
}

// tooLarge reports whether a record would make its key too large. e is what there is
// of its tag.
func (t *table) tooLarge(key []byte, e *entry, value []byte) bool {
	if t == nil {
		return false
	}
	name, _ := splitTag(string(key))
	b := t.bags.byKey[name]
	if b == nil {
		return false
	}
	size := b.size + recordOverhead + len(key) + len(value)
	if e != nil && len(e.value) > 0 {
		size -= recordBytes(e)
	}
	return size > maxBag
}
