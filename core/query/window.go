package query

import (
	"bytes"
	"slices"
)

// ChangeType is what an update does to a row of a window.
type ChangeType uint8

// The types of changes (PROTOCOL 12.3).
const (
	ChangeEnter  ChangeType = iota + 1 // it is in the window and was not
	ChangeUpdate                       // it was and is in the window, and changed
	ChangeLeave                        // it was in the window and is not
)

// Update is one change of a window.
type Update struct {
	Type ChangeType
	Row  Row // projected; a row that left has no value
}

// item is a row of a list.
type item struct {
	ordered
	group *group // that it is counted in; nil if the query has no groups
}

// overhead is about what an item takes beside its key, value and order.
const overhead = 200

func (it *item) bytes() int {
	return len(it.row.Key) + len(it.row.Value) + len(it.order) + overhead
}

// list is rows in order of which a window, from index lo to index hi, is shown.
type list struct {
	items  []*item
	byKey  map[string]*item
	lo, hi int
	bytes  int
}

func newList(lo, hi int) list { return list{byKey: make(map[string]*item), lo: lo, hi: hi} }

// window returns what is shown.
func (l *list) window() []*item {
	return l.items[min(l.lo, len(l.items)):min(l.hi, len(l.items))]
}

// put adds an item of a new key anywhere; sort comes afterwards.
func (l *list) put(it *item) {
	l.items = append(l.items, it)
	l.byKey[it.row.Key] = it
	l.bytes += it.bytes()
}

func (l *list) sort() {
	slices.SortFunc(l.items, func(a, b *item) int { return bytes.Compare(a.order, b.order) })
}

// find returns where an order is, or would be.
func (l *list) find(order []byte) int {
	i, _ := slices.BinarySearchFunc(l.items, order, func(it *item, order []byte) int { return bytes.Compare(it.order, order) })
	return i
}

// change replaces the row of a key, by nothing if next is nil, and returns what
// that does to the window: first what leaves, then what stays or enters. At most
// two other rows are moved over the edges of the window.
func (l *list) change(key string, next *item) []Update {
	var moves [4]move
	shifted := moves[:0]
	wasIn, isIn := false, false
	if old := l.byKey[key]; old != nil {
		i := l.find(old.order)
		wasIn = l.lo <= i && i < l.hi
		if i < l.hi && len(l.items) > l.hi {
			shifted = append(shifted, move{l.items[l.hi], 1})
		}
		if i < l.lo && len(l.items) > l.lo {
			shifted = append(shifted, move{l.items[l.lo], -1})
		}
		l.items = slices.Delete(l.items, i, i+1)
		delete(l.byKey, key)
		l.bytes -= old.bytes()
	}
	if next != nil {
		i := l.find(next.order)
		isIn = l.lo <= i && i < l.hi
		l.items = slices.Insert(l.items, i, next)
		l.byKey[key] = next
		l.bytes += next.bytes()
		if i < l.hi && len(l.items) > l.hi {
			shifted = append(shifted, move{l.items[l.hi], -1})
		}
		if i < l.lo && len(l.items) > l.lo {
			shifted = append(shifted, move{l.items[l.lo], 1})
		}
	}
	return updates(key, next, wasIn, isIn, shifted)
}

// move is a row that went over an edge of the window: 1 in, -1 out.
type move struct {
	it *item
	by int
}

func updates(key string, next *item, wasIn, isIn bool, shifted []move) (list []Update) {
	// What went out at one edge by the removal may have come back by the insertion.
	for i := range shifted {
		for j := range i {
			if shifted[j].it == shifted[i].it {
				shifted[j].by += shifted[i].by
				shifted[i].by = 0
			}
		}
	}
	for _, m := range shifted {
		if m.by < 0 {
			list = append(list, Update{Type: ChangeLeave, Row: Row{Key: m.it.row.Key}})
		}
	}
	switch {
	case wasIn && isIn:
		list = append(list, Update{Type: ChangeUpdate, Row: next.row})
	case wasIn:
		list = append(list, Update{Type: ChangeLeave, Row: Row{Key: key}})
	case isIn:
		list = append(list, Update{Type: ChangeEnter, Row: next.row})
	}
	for _, m := range shifted {
		if m.by > 0 {
			list = append(list, Update{Type: ChangeEnter, Row: m.it.row})
		}
	}
	return list
}

// dropLast forgets the last row, which is not shown.
func (l *list) dropLast() *item {
	last := l.items[len(l.items)-1]
	l.items[len(l.items)-1] = nil
	l.items = l.items[:len(l.items)-1]
	delete(l.byKey, last.row.Key)
	l.bytes -= last.bytes()
	return last
}

// squash makes one update per key of the updates of several changes, first what
// leaves.
func squash(list []Update) []Update {
	if len(list) < 2 {
		return list
	}
	type fate struct{ was, is bool }
	fates := make(map[string]fate, len(list))
	last := make(map[string]int, len(list))
	for i, u := range list {
		f, seen := fates[u.Row.Key]
		if !seen {
			f.was = u.Type != ChangeEnter
		}
		f.is = u.Type != ChangeLeave
		fates[u.Row.Key], last[u.Row.Key] = f, i
	}
	var leave, rest []Update
	for i, u := range list {
		f := fates[u.Row.Key]
		switch {
		case last[u.Row.Key] != i:
		case f.was && !f.is:
			leave = append(leave, u)
		case f.was:
			rest = append(rest, Update{Type: ChangeUpdate, Row: u.Row})
		case f.is:
			rest = append(rest, Update{Type: ChangeEnter, Row: u.Row})
		}
	}
	return append(leave, rest...)
}
