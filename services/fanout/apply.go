package fanout

import (
	"iter"
	"slices"

	"github.com/topgun-sync/topgun/core/query"

	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

// A row is the visible LWW value of its key, or else the array of the visible values
// of the key in the OR-map of the map's name. An event tells one record: an LWW
// value is the row, whatever the OR-map has; the end of an LWW record, and whatever
// happens in the OR-map, leave the row to be read, unless there is no OR-map.

// asks says whether the row after a change has to be read.
func (m *liveMap) asks(change *typesv1.Change) bool {
	switch change.GetKind() {
	case typesv1.Kind_KIND_OR:
		return true
	case typesv1.Kind_KIND_UNSPECIFIED, typesv1.Kind_KIND_LWW:
		return len(change.GetRecord().GetValue()) == 0 && m.or != orEmpty
	}
	return false
}

// unknownRows are, by shard, the keys that have to be read before the events can be
// handled; several changes of a key cost one read.
func (m *liveMap) unknownRows(events []sizedEvent) map[uint32][]string {
	for change := range changesIn(events) {
		if change.GetKind() == typesv1.Kind_KIND_OR {
			m.or = orUsed
		}
	}
	var keys map[uint32][]string
	var named map[string]bool
	for change, shard := range changesIn(events) {
		if change.GetPruned() || !m.asks(change) {
			continue
		}
		key := string(change.GetKey())
		if named[key] || m.known(shard, key, change) {
			continue
		}
		if keys == nil {
			keys, named = make(map[uint32][]string), make(map[string]bool)
		}
		named[key] = true
		keys[shard] = append(keys[shard], key)
	}
	return keys
}

// changesIn yields the changes of events with their shards.
func changesIn(events []sizedEvent) iter.Seq2[*typesv1.Change, uint32] {
	return func(yield func(*typesv1.Change, uint32) bool) {
		for _, e := range events {
			for _, change := range e.event.GetChanges() {
				if !yield(change, e.event.GetShard()) {
					return
				}
			}
		}
	}
}

// known says whether a change tells nothing new.
func (m *liveMap) known(shard uint32, key string, change *typesv1.Change) bool {
	at := arrivalOf(change.GetArrival())
	if !at.after(m.seen[shard]) {
		return true
	}
	if state, ok := m.ahead[key]; ok {
		if change.GetKind() == typesv1.Kind_KIND_OR {
			return !at.after(state.or)
		}
		return !at.after(state.lww)
	}
	return false
}

// change handles one change. states are the keys that were read for it.
func (m *liveMap) change(shard uint32, change *typesv1.Change, states map[string]keyState) {
	key := string(change.GetKey())
	if m.known(shard, key, change) {
		// Of a key that was read ahead the position moves all the same.
		m.seen[shard] = later(m.seen[shard], arrivalOf(change.GetArrival()))
		return
	}
	m.seen[shard] = arrivalOf(change.GetArrival())
	if change.GetPruned() {
		return
	}
	row := rowChange{key: key, shard: shard, at: m.seen[shard]}
	switch {
	case m.asks(change):
		state, ok := states[key]
		if !ok {
			// It was not read: another worker would have asked, or the shard did not
			// answer. Either way the row is not known.
			m.lostEvents()
			return
		}
		var at arrival
		if row.value, at = state.row(); !state.lwwVisible {
			at = later(row.at, at)
		}
		row.at = at
		m.ahead[key] = state
	case change.GetKind() == typesv1.Kind_KIND_UNSPECIFIED, change.GetKind() == typesv1.Kind_KIND_LWW:
		if value := change.GetRecord().GetValue(); len(value) > 0 {
			row.value = value
		}
	default:
		return
	}
	if m.round != nil {
		m.round.note(row)
	}
	m.apply(row)
}

// apply gives a row to the evaluators that may match it and to those that hold its
// key.
func (m *liveMap) apply(row rowChange) {
	m.generation++
	held := m.holders.byKey[row.key]
	m.candidates = append(m.index.candidates(m.candidates[:0], row.value), held...)
	keep := held[:0]
	for _, e := range m.candidates {
		if e.live == nil || e.mark == m.generation {
			continue
		}
		e.mark = m.generation
		if !e.covered.has(row.shard, row.key, row.at) {
			m.offer(e, row)
		}
		if e.place.indexed() && e.live != nil && e.live.Holds(row.key) {
			keep = append(keep, e)
		}
	}
	m.holders.set(row.key, held, keep)
	clear(m.candidates)
}

// offer gives a row to one evaluator, and what changes in its window to the streams.
func (m *liveMap) offer(e *evaluator, row rowChange) {
	updates, refill := e.live.Apply(row.key, row.value)
	m.count(e)
	if reason := m.excess(e); reason != "" {
		m.fail(e, reason)
		return
	}
	m.publish(e, updates)
	if refill {
		m.want(e)
	}
}

// publish gives changes of a window to the streams that show it.
func (m *liveMap) publish(e *evaluator, updates []query.Update) {
	if len(updates) == 0 {
		return
	}
	changes, size := changesOf(updates)
	for _, q := range e.subs {
		q.stream.pushChanges(q, changes, size)
	}
}

// holders says which evaluators of the index hold a key: the row that a key has next
// does not tell who held the one before. It may name some that no longer do, because
// a row that enters pushes another one out; they are swept when they are the most.
type holders struct {
	byKey   map[string][]*evaluator
	entries int
	// rows is how many entries would be enough.
	rows int
}

// set replaces the evaluators of a key. keep may share the memory of held.
func (h *holders) set(key string, held, keep []*evaluator) {
	h.entries += len(keep) - len(held)
	if len(keep) < len(held) {
		clear(held[len(keep):])
	}
	switch {
	case len(keep) > 0:
		h.byKey[key] = keep
	case len(held) > 0:
		delete(h.byKey, key)
	}
	h.sweep()
}

// add notes that an evaluator holds a key.
func (h *holders) add(key string, e *evaluator) {
	h.byKey[key] = append(h.byKey[key], e)
	h.entries++
}

// sweep drops the entries that are no longer true, when they are the most.
func (h *holders) sweep() {
	if h.entries <= 2*h.rows+1024 {
		return
	}
	h.entries = 0
	for key, held := range h.byKey {
		held = slices.DeleteFunc(held, func(e *evaluator) bool { return e.live == nil || !e.live.Holds(key) })
		if len(held) == 0 {
			delete(h.byKey, key)
			continue
		}
		h.byKey[key] = held
		h.entries += len(held)
	}
}
