package partition

import (
	"slices"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/trace"
)

const (
	// minRetention is the least time that tombstones are kept, unless for ever.
	minRetention = time.Minute
	// A boundary moves by a tenth of the retention, at most by an hour: so whoever is
	// told of it is told seldom.
	boundarySteps   = 10
	maxBoundaryStep = time.Hour
	// maxPrunes bounds the tombstones that are forgotten in one go, maxGraves those
	// that are looked at, so that ops and reads get their turn.
	maxPrunes = 512
	maxGraves = 8192
	// announceRetry is the pause before a shard looks again whether its last prunes are
	// in the log.
	announceRetry = 100 * time.Millisecond
)

// retention is how long tombstones are kept, in milliseconds; 0 is for ever.
type retention uint64

func retentionOf(d time.Duration) retention { return retention(d.Milliseconds()) }

func (r retention) step() uint64 {
	return min(uint64(maxBoundaryStep.Milliseconds()), uint64(r)/boundarySteps)
}

// boundary is the time before which tombstones are forgotten, when the wall clock
// reads wall; 0 if there is none.
func (r retention) boundary(wall uint64) uint64 {
	if r == 0 || wall < uint64(r) {
		return 0
	}
	past := wall - uint64(r)
	return past - past%r.step()
}

// moves is when the boundary moves on from where it is.
func (r retention) moves(boundary uint64) uint64 { return boundary + r.step() + uint64(r) }

// fence is the stamp below which an op that finds nothing is rejected, when the
// arrival clock reads clock. Every boundary there was lies at or below it: the arrival
// clock never reads less than the wall clock did, whoever owned the shard and however
// that was set since. So an op that passes is younger than every tombstone that was
// forgotten, and than the add of a tag that it removed (TMB-01). Only a retention that was made longer
// leaves older boundaries above the fence.
func (r retention) fence(clock uint64) uint64 {
	if r == 0 || clock < uint64(r) {
		return 0
	}
	return clock - uint64(r)
}

// tooOld reports whether an op that finds nothing must be rejected.
func (s *shard) tooOld(o *op) bool { return o.record.Timestamp.Millis < s.fence }

// grave is where a tombstone lies. It is stale once its entry arrived again, or is
// gone.
type grave struct {
	at    arrival
	table *table
	entry *entry
}

// pruner forgets the tombstones of one shard that are older than the retention
// (PROTOCOL 22.5). Only its shard's goroutine touches it, but for announced.
//
//	         the boundary moved on           all before it looked at, prunes handed over
//	resting ───────────────────────▶ passing ───────────────────────▶ announcing
//	   ▲                                                                  │
//	   └───────────────────────── the prunes are in the log ──────────────┘
type pruner struct {
	keep retention
	// graves holds every tombstone once, at its arrival, in rising order, and stale
	// ones. So what is old enough is found at its beginning.
	graves []grave
	// compactAt is the length at which stale graves are dropped.
	compactAt int
	// young are the graves of a pass that arrived before the boundary, but are stamped,
	// or remember a stamp, behind it: seldom more than those of the last minute.
	young []grave

	boundary  uint64 // of the pass, or of the last one
	passing   bool
	announce  bool   // the last pass is not announced
	last      *batch // all that the last pass pruned is in the log once it is
	announced atomic.Uint64
}

// bury notes a tombstone that has just arrived.
func (p *pruner) bury(t *table, e *entry) {
	if p.keep == 0 {
		return
	}
	if len(p.graves) >= max(minStale, p.compactAt) {
		kept := p.graves[:0]
		for _, g := range p.graves {
			if g.entry.arrival == g.at {
				kept = append(kept, g)
			}
		}
		clear(p.graves[len(kept):])
		p.graves, p.compactAt = kept, 2*len(kept)
	}
	p.graves = append(p.graves, grave{at: e.arrival, table: t, entry: e})
}

// old reports whether a tombstone is stamped before a boundary, also by the stamps that
// it remembers: those too far in the future, since the same op sent again is recognised
// by them alone, and that of an add that it outlived, see outlived.
func (e *entry) old(boundary uint64) bool {
	originals := e.originals() // the highest first
	return e.millis < boundary && (len(originals) == 0 || originals[0].Millis < boundary)
}

// prune goes on with a pass, or begins one. It returns false if the lane has no room
// for it at present.
func (s *shard) prune() bool {
	p := &s.pruner
	if p.announce && p.last.logged() {
		p.announced.Store(p.boundary)
		p.announce = false
	}
	wall := wallMillis(s.now())
	if !p.passing {
		boundary := p.keep.boundary(wall)
		if boundary <= p.boundary {
			return true
		}
		// From here on arrivals lie above this boundary, and the fence at or above it,
		// though the wall clock be set back.
		s.clock.read(wall)
		p.boundary, p.passing, p.announce = boundary, true, false
	}
	const held = maxPrunes * opOverhead
	if s.lane.full() || !s.lane.room.TryAcquire(held) {
		return false
	}
	s.changes = s.changes[:0]
	for table, tombstones := range p.next() {
		for _, e := range tombstones {
			s.changes = append(s.changes, change{kind: table.kind, table: table.name, key: e.key, arrival: s.clock.next(wall), pruned: true})
		}
		table.forget(tombstones...)
		s.records.Add(-int64(len(tombstones)))
		if len(table.records) == 0 && len(table.scans) == 0 {
			delete(s.tables[table.kind], table.name)
		}
	}
	if len(s.changes) == 0 {
		s.lane.room.Release(held)
	} else {
		s.last = s.lane.add(s.id, s.changes, held, trace.SpanContext{})
		clear(s.changes)
	}
	if len(p.graves) == 0 || p.graves[0].at.millis >= p.boundary {
		if len(p.young) > 0 {
			p.graves = append(p.young, p.graves...)
			p.young = nil
		}
		p.passing, p.announce, p.last = false, true, s.last
	}
	return true
}

// next takes the next tombstones of a pass that are old, by table.
func (p *pruner) next() map[*table][]*entry {
	old := make(map[*table][]*entry)
	found := 0
	for range maxGraves {
		if found == maxPrunes || len(p.graves) == 0 || p.graves[0].at.millis >= p.boundary {
			break
		}
		g := p.graves[0]
		p.graves[0] = grave{}
		p.graves = p.graves[1:]
		switch {
		case g.entry.arrival != g.at:
		case g.entry.old(p.boundary):
			old[g.table] = append(old[g.table], g.entry)
			found++
		default:
			p.young = append(p.young, g)
		}
	}
	return old
}

// nextPrune is how long the pruning may wait.
func (s *shard) nextPrune(wall uint64) time.Duration {
	p := &s.pruner
	switch {
	case p.passing:
		return 0
	case p.announce:
		return announceRetry
	case p.keep == 0:
		return maxExpiryWait
	}
	moves := p.keep.moves(p.boundary)
	if moves <= wall {
		return 0
	}
	return min(maxExpiryWait, time.Duration(moves-wall)*time.Millisecond)
}

// buryAll notes the tombstones of a loaded shard.
func (s *shard) buryAll() {
	if s.pruner.keep == 0 {
		return
	}
	for _, tables := range s.tables {
		for _, t := range tables {
			if t.tombstones == 0 {
				continue
			}
			for _, e := range t.records {
				if len(e.value) == 0 {
					s.pruner.graves = append(s.pruner.graves, grave{at: e.arrival, table: t, entry: e})
				}
			}
		}
	}
	slices.SortFunc(s.pruner.graves, func(a, b grave) int { return a.at.compare(b.at) })
}

// housekeep does what is due by the time alone. It returns false if the lane has no
// room for some of it at present.
func (s *shard) housekeep() bool {
	expired, swept, pruned := s.expire(), s.sweepLocks(), s.prune()
	return expired && swept && pruned
}

// nextHousekeeping is how long the shard may sleep.
func (s *shard) nextHousekeeping() time.Duration {
	wall := wallMillis(s.now())
	return min(s.nextExpiry(), s.nextPrune(wall), s.locks.wake(s.elapsed(), wall, maxExpiryWait))
}

// logged reports whether a batch is in the log by now. A nil batch is.
func (b *batch) logged() bool {
	if b == nil {
		return true
	}
	select {
	case <-b.done:
		return b.err == nil
	default:
		return false
	}
}
