package query

import (
	"bytes"
	"container/heap"
	"slices"
)

// Top collects the first rows of a query in its order, over one scan or over
// several answers. It holds no more than it will return. It is not for concurrent
// use.
type Top struct {
	q        *Query
	after    []byte
	most     int
	maxBytes int

	rows  worstFirst
	bytes int
	more  bool
	// Rows from here on were left out for their bytes, so later ones stay out even if
	// they are small: what is returned has no holes.
	bound   []byte
	scratch []byte
}

// ordered is a row with the bytes that order it.
type ordered struct {
	order []byte
	row   Row
}

func byOrder(a, b ordered) int { return bytes.Compare(a.order, b.order) }

// NewTop collects the first rows after a position, empty for all: no more of them
// than most, and no more than have maxBytes bytes of keys and values together, but
// at least one. maxBytes 0 means any.
func NewTop(q *Query, after []byte, most, maxBytes int) *Top {
	return &Top{q: q, after: after, most: max(most, 1), maxBytes: maxBytes}
}

// Add takes a row that Match has accepted. A key must not be added twice.
func (t *Top) Add(key string, value []byte) {
	t.scratch = t.q.appendOrder(t.scratch[:0], key, value)
	if len(t.after) > 0 && bytes.Compare(t.scratch, t.after) <= 0 {
		return
	}
	if t.bound != nil && bytes.Compare(t.scratch, t.bound) >= 0 ||
		len(t.rows) == t.most && bytes.Compare(t.scratch, t.rows[0].order) > 0 {
		t.more = true
		return
	}
	heap.Push(&t.rows, ordered{order: bytes.Clone(t.scratch), row: Row{Key: key, Value: value}})
	t.bytes += len(key) + len(value)
	for len(t.rows) > t.most || t.maxBytes > 0 && t.bytes > t.maxBytes && len(t.rows) > 1 {
		full := len(t.rows) > t.most
		worst := heap.Pop(&t.rows).(ordered)
		t.bytes -= len(worst.row.Key) + len(worst.row.Value)
		t.more = true
		if !full {
			t.bound = worst.order
		}
	}
}

// Rows returns the rows in order, and whether others follow.
func (t *Top) Rows() (rows []Row, more bool) {
	slices.SortFunc(t.rows, byOrder)
	slices.Reverse(t.rows) // a heap again, the worst first
	rows = make([]Row, len(t.rows))
	for i := range t.rows {
		rows[len(rows)-1-i] = t.rows[i].row
	}
	return rows, t.more
}

// worstFirst is a heap with the last row in order on top.
type worstFirst []ordered

func (h worstFirst) Len() int           { return len(h) }
func (h worstFirst) Less(i, j int) bool { return bytes.Compare(h[i].order, h[j].order) > 0 }
func (h worstFirst) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *worstFirst) Push(x any)        { *h = append(*h, x.(ordered)) }
func (h *worstFirst) Pop() any {
	last := (*h)[len(*h)-1]
	*h = (*h)[:len(*h)-1]
	return last
}
