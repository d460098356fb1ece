// Package pncounter is the counter of PROTOCOL 14.2: of every node, what it added and
// what it took, each of which only grows. Replicas merge by taking the maximum of
// each, so order and repetition do not matter.
//
// The sums are integers of at most 2^53, which every JavaScript client reads
// exactly, and so are their totals; the number of nodes is bounded.
package pncounter

import (
	"iter"
	"maps"
	"slices"

	"github.com/topgun-sync/topgun/core/msgval"
)

const (
	// MaxSum is the largest that the sum of one node, and of all nodes together, may
	// be on either side.
	MaxSum = 1 << 53
	// MaxNodes is the largest number of nodes of one counter.
	MaxNodes = 10_000
)

// Sides is what one node added and took in all.
type Sides struct {
	Positive, Negative uint64
}

// Merge returns the maximum of each side.
func (s Sides) Merge(o Sides) Sides {
	return Sides{max(s.Positive, o.Positive), max(s.Negative, o.Negative)}
}

// Append appends the sides as the msgpack array that is stored of a node.
func (s Sides) Append(dst []byte) []byte {
	return msgval.AppendUint(msgval.AppendUint(msgval.AppendArrayHeader(dst, 2), s.Positive), s.Negative)
}

// ParseSides reads what Append wrote, or any other msgpack array of two integers
// that are not negative. It accepts any bytes.
func ParseSides(value []byte) (s Sides, ok bool) {
	h, ok := msgval.ReadHead(value)
	if !ok || h.Kind != msgval.ArrayKind || h.N != 2 {
		return Sides{}, false
	}
	value = value[h.Size:]
	for _, n := range []*uint64{&s.Positive, &s.Negative} {
		if h, ok = msgval.ReadHead(value); !ok || h.Kind != msgval.UintKind {
			return Sides{}, false
		}
		*n, value = h.Num, value[h.Size:]
	}
	return s, len(value) == 0
}

// Outcome is what became of a state that arrives.
type Outcome int

const (
	// Applied: a side of the node grew.
	Applied Outcome = iota
	// Duplicate: nothing is new.
	Duplicate
	// TooLarge: the node's sum or the total would be above MaxSum; nothing changed.
	TooLarge
	// TooManyNodes: the counter has MaxNodes nodes and this is another; nothing
	// changed.
	TooManyNodes
)

// Counter is a counter in memory. The zero value is empty and ready. It is not safe
// for concurrent use.
type Counter struct {
	nodes  map[string]Sides
	totals Sides
}

// Decide says what becomes of a node's state and what the node then has. known says
// whether the counter has the node already, with the state local; nodes and totals are
// of the whole counter.
func Decide(local Sides, known bool, nodes int, totals, remote Sides) (Sides, Outcome) {
	merged := local.Merge(remote)
	switch {
	case merged == local:
		return local, Duplicate
	case !known && nodes >= MaxNodes:
		return local, TooManyNodes
	case merged.Positive > MaxSum, merged.Negative > MaxSum,
		totals.Positive+(merged.Positive-local.Positive) > MaxSum,
		totals.Negative+(merged.Negative-local.Negative) > MaxSum:
		return local, TooLarge
	}
	return merged, Applied
}

// Merge takes in what another replica has of a node.
func (c *Counter) Merge(nodeID string, remote Sides) Outcome {
	local, known := c.nodes[nodeID]
	merged, outcome := Decide(local, known, len(c.nodes), c.totals, remote)
	if outcome != Applied {
		return outcome
	}
	if c.nodes == nil {
		c.nodes = make(map[string]Sides)
	}
	c.nodes[nodeID] = merged
	c.totals.Positive += merged.Positive - local.Positive
	c.totals.Negative += merged.Negative - local.Negative
	return Applied
}

// Add adds an amount to the node's own side, a negative one by taking it.
func (c *Counter) Add(nodeID string, amount int64) Outcome {
	s := c.nodes[nodeID]
	if amount >= 0 {
		s.Positive += uint64(amount)
	} else {
		s.Negative += -uint64(amount)
	}
	return c.Merge(nodeID, s)
}

// Value is what was added less what was taken.
func (c *Counter) Value() int64 { return int64(c.totals.Positive) - int64(c.totals.Negative) }

// Len is the number of nodes.
func (c *Counter) Len() int { return len(c.nodes) }

// Get returns what a node added and took.
func (c *Counter) Get(nodeID string) (Sides, bool) {
	s, ok := c.nodes[nodeID]
	return s, ok
}

// All yields the nodes in the order of the bytes of their ids. The counter must not
// be changed meanwhile.
func (c *Counter) All() iter.Seq2[string, Sides] {
	return func(yield func(string, Sides) bool) {
		for _, id := range slices.Sorted(maps.Keys(c.nodes)) {
			if !yield(id, c.nodes[id]) {
				return
			}
		}
	}
}
