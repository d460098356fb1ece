package partition

import (
	"context"
	"maps"
	"slices"
	"sync/atomic"

	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/msgval"
)

// scanBudget is how many records and leaves a scan looks at in one go. A leaf is not
// split.
const scanBudget = 8192

// scan reads the visible values of a map, of the LWW-table and the OR-table of its
// name, as they were at one moment, while the shard goes on changing them. It goes
// from leaf to leaf. Whoever changes a record in a leaf that is still to come hands
// the scan what was there before; what arrived since is left out.
type scan struct {
	tables [2]*table // lww, or; nil where there is none
	at     arrival   // the moment
	now    uint64    // the wall clock at that moment, for the ttl
	next   int       // the first leaf that was not read
	// whole says that all of a table was read at the beginning, because it is small
	// and has no leaves.
	whole [2]bool
	// kept are the values, by leaf, that are to be shown instead of what is there.
	kept [2]map[int][]shown
	// gone is set when nobody wants the rest. The shard forgets the scan at the next
	// opportunity.
	gone atomic.Bool
}

// shown is one visible value. It is immutable and shared.
type shown struct {
	key     string
	value   []byte
	arrival arrival
}

// part is what one step of a scan read: whole leaves.
type part struct {
	values [2][]shown // lww, or
	last   bool
}

func scanned(t *table) int {
	if t.kind == or {
		return 1
	}
	return 0
}

// begin takes the moment and reads what is small. Like step it runs in the shard.
func (sc *scan) begin(s *shard, name string) {
	sc.at = s.clock.read(wallMillis(s.now()))
	sc.tables = [2]*table{s.tables[lww][name], s.tables[or][name]}
	for i, t := range sc.tables {
		if t == nil {
			continue
		}
		sc.kept[i] = make(map[int][]shown)
		if i == 0 && t.leaves == nil || i == 1 && t.bags.leaves == nil && len(t.records) <= smallTable {
			sc.whole[i] = true
			for _, e := range t.records {
				sc.keep(i, t, e)
			}
			continue
		}
		if i == 1 && t.bags.leaves == nil {
			t.bags.linkAll() // or each leaf costs a look at all keys
		}
		t.scans = append(t.scans, sc)
	}
}

// step reads whole leaves until it has looked at budget records and leaves.
func (sc *scan) step(budget int) (p part) {
	if small := func(i int) bool { return sc.tables[i] == nil || sc.whole[i] }; small(0) && small(1) {
		for i, kept := range sc.kept {
			p.values[i] = slices.Concat(slices.Collect(maps.Values(kept))...)
		}
		sc.next, p.last = merkle.LeafCount, true
		return p
	}
	for i, t := range sc.tables {
		if t != nil && !sc.whole[i] {
			p.values[i] = make([]shown, 0, min(budget, len(t.records)))
		}
	}
	for ; budget > 0 && sc.next < merkle.LeafCount; sc.next++ {
		budget--
		for i, t := range sc.tables {
			p.values[i] = append(p.values[i], sc.kept[i][sc.next]...)
			if t == nil || sc.whole[i] {
				continue
			}
			budget -= sc.leaf(i, t, &p)
		}
	}
	if p.last = sc.next == merkle.LeafCount; p.last {
		for _, t := range sc.tables {
			if t != nil {
				t.dropScans()
			}
		}
	}
	return p
}

// leaf reads the next leaf of a table and returns how many records it looked at.
func (sc *scan) leaf(i int, t *table, p *part) (looked int) {
	if i == 0 {
		for e := t.leaves[sc.next]; e != nil; e = e.next {
			looked++
			if v, ok := sc.show(e.key, e); ok {
				p.values[i] = append(p.values[i], v)
			}
		}
		return looked
	}
	for b := range t.bags.inLeaves(sc.next, sc.next) {
		looked += 1 + len(b.live)
		for _, h := range b.live {
			if v, ok := sc.show(b.key, h.entry); ok {
				p.values[i] = append(p.values[i], v)
			}
		}
	}
	return looked
}

// show returns the value of an entry if it was visible at the moment of the scan and
// has not changed since.
func (sc *scan) show(key string, e *entry) (shown, bool) {
	return shown{key, e.value, e.arrival}, e.arrival.compare(sc.at) <= 0 && e.record().VisibleAt(sc.now)
}

// keep notes what an entry held at the moment of the scan.
func (sc *scan) keep(i int, t *table, e *entry) {
	key := e.key
	if t.kind == or {
		key, _ = splitTag(key)
	}
	if v, ok := sc.show(key, e); ok {
		leaf := merkle.Leaf(e.hash)
		sc.kept[i][leaf] = append(sc.kept[i][leaf], v)
	}
}

// keepForScans shows an entry that is about to change to the scans that will come to
// it.
func (t *table) keepForScans(e *entry) {
	t.dropScans()
	for _, sc := range t.scans {
		if merkle.Leaf(e.hash) >= sc.next {
			sc.keep(scanned(t), t, e)
		}
	}
}

// dropScans forgets the scans that are over.
func (t *table) dropScans() {
	t.scans = slices.DeleteFunc(t.scans, func(sc *scan) bool { return sc.next == merkle.LeafCount || sc.gone.Load() })
}

// rows are the rows of a map (the visible value of a key in the LWW-map, or else the
// array of its values in the OR-map, in the order in which they arrived) that whole
// leaves hold.
func (p *part) rows(yield func(key string, value []byte) bool) {
	for _, v := range p.values[0] {
		if !yield(v.key, v.value) {
			return
		}
	}
	if len(p.values[1]) == 0 {
		return
	}
	single := make(map[string]bool, len(p.values[0]))
	for _, v := range p.values[0] {
		single[v.key] = true
	}
	byKey := make(map[string][]shown)
	for _, v := range p.values[1] {
		if !single[v.key] {
			byKey[v.key] = append(byKey[v.key], v)
		}
	}
	for key, values := range byKey {
		slices.SortFunc(values, func(a, b shown) int { return a.arrival.compare(b.arrival) })
		row := msgval.AppendArrayHeader(nil, len(values))
		for _, v := range values {
			row = append(row, v.value...)
		}
		if !yield(key, row) {
			return
		}
	}
}

// scan has one shard show the rows of a map as they were at one moment, in steps
// between which it does other things, and returns the arrival up to which they are
// the state of the map. The rows are handed over in turns, beside the shard. It
// returns when everything shown is in the log (ACK-02).
func (r *reading) scan(ctx context.Context, s *shard, name string, now uint64, t *turns, do func(key string, value []byte)) (arrival, error) {
	sc := &scan{now: now}
	defer sc.gone.Store(true)
	var logged *batch
	for first := true; ; first = false {
		var p part
		done, err := s.submit(ctx, func() {
			if first {
				sc.begin(s, name)
				logged = s.last
			}
			p = sc.step(scanBudget)
		})
		if err == nil {
			err = s.await(ctx, done)
		}
		if err != nil {
			return arrival{}, readError(ctx, err)
		}
		if err := t.evaluate(ctx, p.rows, do); err != nil {
			return arrival{}, readError(ctx, err)
		}
		if p.last {
			break
		}
	}
	if err := logged.wait(ctx); err != nil {
		return arrival{}, readError(ctx, err)
	}
	// What arrived up to the moment is in the log, so below the ceiling: nothing lies
	// between the two.
	return earliest(sc.at, r.active.lane.ceiling()), nil
}
