package merkle

import (
	"iter"
	"maps"
	"slices"
)

// maxSparse is the number of non-zero leaves up to which Leaves is a map. A
// dense table costs 16 KiB, too much for each of very many small maps.
const maxSparse = 256

// Leaves holds the hashes of the leaves of one map, or of one shard's part of
// it. A leaf's hash is a sum over its items, so it is kept up to date by adding
// and removing items, and the sums of several shards add up to those of the
// whole map (PROTOCOL 7.6). The zero value is empty and ready. Leaves is not
// safe for concurrent use. A leaf number must be in 0..LeafCount-1.
type Leaves struct {
	sparse map[int]uint32 // non-zero sums; nil once dense is there
	dense  *[LeafCount]uint32
}

// Add adds a record's item hash to a leaf.
func (l *Leaves) Add(leaf int, itemHash uint32, c Combine) { l.AddSum(leaf, c.term(itemHash)) }

// Remove takes away what Add added.
func (l *Leaves) Remove(leaf int, itemHash uint32, c Combine) { l.AddSum(leaf, -c.term(itemHash)) }

// Merge adds every sum of o to l. Both must have been made with one Combine.
func (l *Leaves) Merge(o *Leaves) {
	if o.dense != nil {
		for leaf, sum := range o.dense {
			l.AddSum(leaf, sum)
		}
		return
	}
	for leaf, sum := range o.sparse {
		l.AddSum(leaf, sum)
	}
}

// AddSum adds a raw sum to a leaf: how sums that another process computed are
// taken in.
func (l *Leaves) AddSum(leaf int, sum uint32) {
	if sum == 0 {
		return
	}
	if l.dense != nil {
		l.dense[leaf] += sum
		return
	}
	s := l.sparse[leaf] + sum
	switch {
	case s == 0:
		delete(l.sparse, leaf)
	case l.sparse == nil:
		l.sparse = map[int]uint32{leaf: s}
	default:
		l.sparse[leaf] = s
		if len(l.sparse) > maxSparse {
			l.densify()
		}
	}
}

func (l *Leaves) densify() {
	l.dense = new([LeafCount]uint32)
	for leaf, sum := range l.sparse {
		l.dense[leaf] = sum
	}
	l.sparse = nil
}

// At returns the hash of a leaf, 0 if it is empty.
func (l *Leaves) At(leaf int) uint32 {
	if l.dense != nil {
		return l.dense[leaf]
	}
	return l.sparse[leaf]
}

// All yields the leaves with a non-zero hash in ascending order.
func (l *Leaves) All() iter.Seq2[int, uint32] {
	return func(yield func(int, uint32) bool) {
		if l.dense != nil {
			for leaf, sum := range l.dense {
				if sum != 0 && !yield(leaf, sum) {
					return
				}
			}
			return
		}
		for _, leaf := range slices.Sorted(maps.Keys(l.sparse)) {
			if !yield(leaf, l.sparse[leaf]) {
				return
			}
		}
	}
}

// Clone returns a copy that shares nothing with l.
func (l *Leaves) Clone() *Leaves {
	c := &Leaves{sparse: maps.Clone(l.sparse)}
	if l.dense != nil {
		d := *l.dense
		c.dense = &d
	}
	return c
}
