package query

import (
	"bytes"
	"iter"
	"maps"
	"slices"
)

// Live is the result of one query, kept up to date row by row. It keeps the first
// rows in order, more than it shows, so that one that leaves is followed by the
// next; only when those run short has the map to be read again. It is not for
// concurrent use.
//
// What a client that applied every update since Reset has is always Window, and that
// is what the query makes of the map, as long as refills are carried out.
type Live struct {
	q       *Query
	mapName string
	maxRows int
	after   []byte // position of the query's cursor
	status  CursorStatus

	kept list // the first rows in order
	more bool // others may follow after bound
	// bound is up to where, with more, every row is known.
	bound []byte
	want  int // how many rows to keep
	low   int // with more, fewer rows are too few

	groups map[string]*group // nil without groups
	shown  list              // the rows of the groups
}

// NewLive makes an empty result that keeps at most maxRows rows, at least one. A
// query without a limit, or with a large one, shows at most 7/8 of maxRows: the
// rest is for what leaves. With groups all rows count, see Overflow.
func NewLive(q *Query, mapName string, maxRows int) *Live {
	l := &Live{q: q, mapName: mapName, maxRows: max(maxRows, 1)}
	l.after, l.status = q.ResolveCursor(mapName)
	l.Reset(nil, false)
	return l
}

// Want is how many rows to ask for.
func (l *Live) Want() int {
	lo, hi := l.window()
	if l.q.Grouped() || hi == l.maxRows-l.maxRows/8 {
		return l.maxRows
	}
	return min(hi+min(max((hi-lo)/2, 16), 256), l.maxRows)
}

// window returns which rows, or groups, are shown.
func (l *Live) window() (lo, hi int) {
	most := l.maxRows - l.maxRows/8
	if l.q.Grouped() {
		most = MaxGroups
	}
	if hi = most; l.q.limit > 0 {
		hi = min(l.q.offset+l.q.limit, most)
	}
	return min(l.q.offset, hi), hi
}

// After is the position that the rows to ask for come after. With groups it is
// empty, since a cursor is a place among the groups.
func (l *Live) After() []byte {
	if l.q.Grouped() {
		return nil
	}
	return l.after
}

// Status is what became of the query's cursor.
func (l *Live) Status() CursorStatus { return l.status }

// Reset sets the result: the first rows that match and come after After, as many
// as Want or as there are, and whether others follow.
func (l *Live) Reset(rows []Row, more bool) {
	lo, hi := l.window()
	l.want, l.more, l.bound = l.Want(), more, nil
	l.low = hi + (l.want-hi)/4
	l.shown = newList(lo, hi)
	l.kept = newList(lo, hi)
	if l.q.Grouped() {
		l.groups = make(map[string]*group)
		l.kept = newList(0, 0) // the rows themselves are not shown
		l.low = l.want - l.want/4
	}
	for _, r := range rows {
		it := &item{ordered: ordered{order: l.q.Position(r), row: r}}
		if l.kept.byKey[r.Key] == nil && (l.groups != nil || l.isAfter(it.order)) {
			l.kept.put(it)
		}
	}
	l.kept.sort()
	for len(l.kept.items) > l.want {
		l.kept.dropLast()
		l.more = true
	}
	n := len(l.kept.items)
	if n > 0 {
		l.bound = l.kept.items[n-1].order
	}
	if l.more && n < l.want {
		// Who gave fewer rows than asked for has reasons, such as their size, and would
		// give no more the next time.
		l.low = min(l.low, n-n/8)
	}
	if l.groups == nil {
		return
	}
	for _, it := range l.kept.items {
		l.count(it)
	}
	for _, g := range l.groups {
		if it := l.groupItem(g); it != nil {
			l.shown.put(it)
		}
	}
	l.shown.sort()
}

// isAfter reports whether a row, or a group, comes after the query's cursor.
func (l *Live) isAfter(order []byte) bool {
	return len(l.after) == 0 || bytes.Compare(order, l.after) > 0
}

// Apply sets a row of the map or, with a nil value, removes it. It returns the
// updates of the window in the order in which they are to be applied, and none if
// the row is what it was. With refill the rows kept run short and others exist: read
// them again and call Reset. Until then every Apply says so, and the window may end
// early.
func (l *Live) Apply(key string, value []byte) (updates []Update, refill bool) {
	old := l.kept.byKey[key]
	next := l.admit(key, value)
	if old == nil && next == nil || old != nil && next != nil && bytes.Equal(old.row.Value, value) {
		return nil, l.short()
	}
	if l.groups == nil {
		updates = l.kept.change(key, next)
		l.trim()
	} else {
		updates = l.applyGrouped(key, old, next)
	}
	return l.project(updates), l.short()
}

// short reports whether too few rows are kept and others exist.
func (l *Live) short() bool { return l.more && len(l.kept.items) < l.low }

// admit returns the item of a row that belongs to the rows kept, nil if it does
// not.
func (l *Live) admit(key string, value []byte) *item {
	if value == nil || !l.q.Match(key, value) {
		return nil
	}
	var buf [128]byte
	order := l.q.appendOrder(buf[:0], key, value)
	if l.groups == nil && !l.isAfter(order) || l.more && bytes.Compare(order, l.bound) > 0 {
		return nil
	}
	return &item{ordered: ordered{order: bytes.Clone(order), row: Row{Key: key, Value: value}}}
}

// trim forgets the row that is one too many, if there is one, and returns it.
func (l *Live) trim() *item {
	if len(l.kept.items) <= l.want {
		return nil
	}
	last := l.kept.dropLast()
	l.more = true
	l.bound = l.kept.items[len(l.kept.items)-1].order
	return last
}

// applyGrouped replaces the row of a key, by nothing if next is nil, in the groups.
func (l *Live) applyGrouped(key string, old, next *item) (updates []Update) {
	var touched []*group
	l.kept.change(key, next)
	if next != nil {
		l.count(next)
		touched = append(touched, next.group)
	}
	if old != nil {
		touched = append(touched, old.group)
		l.uncount(old)
	}
	if last := l.trim(); last != nil {
		touched = append(touched, last.group)
		l.uncount(last)
	}
	for i, g := range touched {
		if slices.Contains(touched[:i], g) {
			continue
		}
		var it *item
		if g.count > 0 {
			it = l.groupItem(g)
		}
		was := l.shown.byKey[g.key]
		if was == nil && it == nil || was != nil && it != nil && bytes.Equal(was.row.Value, it.row.Value) {
			continue
		}
		updates = append(updates, l.shown.change(g.key, it)...)
	}
	return squash(updates)
}

// groupItem returns what is shown of a group, nil if it is before the cursor.
func (l *Live) groupItem(g *group) *item {
	r := g.row(l.q)
	order := l.q.Position(r)
	if !l.isAfter(order) {
		return nil
	}
	return &item{ordered: ordered{order: order, row: r}}
}

// count adds a row to its group.
func (l *Live) count(it *item) {
	if l.groups == nil {
		return
	}
	key, values := l.q.groupOf(nil, it.row.Key, it.row.Value)
	it.group = l.groups[string(key)]
	if it.group == nil {
		it.group = l.q.newGroup(string(key), values)
		l.groups[it.group.key] = it.group
	}
	it.group.add(l.q, it.row.Value)
}

// uncount takes a row that is no longer kept out of its group.
func (l *Live) uncount(it *item) {
	g := it.group
	if g == nil {
		return
	}
	if g.count--; g.count == 0 {
		delete(l.groups, g.key)
		return
	}
	for i := range l.q.measured {
		field := &l.q.measured[i]
		if g.aggs[i].remove(field.get(nil, it.row.Value)) {
			continue
		}
		// The least or the greatest is gone: look for the next.
		g.aggs[i] = aggregate{}
		for _, other := range l.kept.items {
			if other.group == g {
				g.aggs[i].add(field.get(nil, other.row.Value))
			}
		}
	}
}

// visible is the list that the window is of.
func (l *Live) visible() *list {
	if l.groups != nil {
		return &l.shown
	}
	return &l.kept
}

// project chooses the fields of rows. Groups have none to choose from.
func (l *Live) project(updates []Update) []Update {
	if l.groups != nil {
		return updates
	}
	for i := range updates {
		if r := &updates[i].Row; r.Value != nil {
			r.Value = l.q.Project(nil, r.Value)
		}
	}
	return updates
}

// Window returns the rows, or groups, that the query shows, projected; whether
// others follow; and with those the cursor of the next page.
func (l *Live) Window() (rows []Row, more bool, nextCursor string) {
	visible := l.visible()
	window := visible.window()
	for _, it := range window {
		r := it.row
		if l.groups == nil {
			r.Value = l.q.Project(nil, r.Value)
		}
		rows = append(rows, r)
	}
	more = l.more || len(visible.items) > visible.hi
	if more && len(window) > 0 {
		nextCursor = l.q.CursorAt(l.mapName, window[len(window)-1].row)
	}
	return rows, more, nextCursor
}

// Overflow reports that more rows match than are kept, or make more than MaxGroups
// groups, and the query has groups: they are not exact and must not be shown.
func (l *Live) Overflow() bool {
	return l.groups != nil && (l.more || len(l.groups) > MaxGroups)
}

// Holds reports whether the row of a key is kept, shown or not. Who keeps many
// results finds by it those that have to hear of the row's next state.
func (l *Live) Holds(key string) bool { return l.kept.byKey[key] != nil }

// Keys returns the keys of the rows that are kept, in no order.
func (l *Live) Keys() iter.Seq[string] { return maps.Keys(l.kept.byKey) }

// Len is how many rows are kept.
func (l *Live) Len() int { return len(l.kept.items) }

// Bytes is about how much memory the result takes.
func (l *Live) Bytes() int { return l.kept.bytes + l.shown.bytes }
