package fanout

import (
	"time"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
)

// tracker knows the newest position of every map in every shard and finds what is
// missing. It is not safe for concurrent use.
//
// A position moves by events where the map is watched, and by heartbeats where it is
// not. A heartbeat that is ahead of a watched map makes a claim: the events may be
// right behind, so it counts as a loss only when they have not come one heartbeat
// period later.
//
//	      event seen+1                      heartbeat > seen
//	   ┌───────────────┐                  ┌──────────────────┐
//	   ▼               │                  ▼                  │
//	(seen) ────────────┘              (claimed) ── reached ──┴─▶ (seen)
//	   │ event > seen+1: gap              │ deadline: gap, seen = claimed
//
// The lane of a shard changes when another process owns it. What the old owner
// logged at its end may never have been broadcast, in any map, so every watched map
// has a gap.
type tracker struct {
	period    time.Duration
	max       int
	watched   func(mapName string) bool
	shards    map[uint32]*shardState
	positions int
	claims    map[claimKey]claim
}

type shardState struct {
	lane string
	// heard is when the lane was last heard of. A heartbeat of another lane is not
	// believed before this one has been silent for laneSilence periods: a process
	// that lost the shard and does not know it yet goes on sending heartbeats.
	// Events are always believed, because they were logged.
	heard time.Time
	// maps holds the newest sequence seen of each map. What is not in it counts as
	// 0: the map is new in this lane, or was forgotten.
	maps map[string]uint64
}

// laneSilence is in heartbeat periods.
const laneSilence = 2

type claimKey struct {
	shard   uint32
	mapName string
}

// claim is what a heartbeat said, and until when its events may come.
type claim struct {
	sequence uint64
	deadline time.Time
}

func newTracker(period time.Duration, maxPositions int, watched func(string) bool) *tracker {
	return &tracker{
		period:  period,
		max:     maxPositions,
		watched: watched,
		shards:  make(map[uint32]*shardState),
		claims:  make(map[claimKey]claim),
	}
}

// verdict is what a message says about those before it.
type verdict uint8

const (
	// complete: deliver the event, nothing is missing.
	complete verdict = iota
	// missing: the map has a gap, then comes the event.
	missing
	// laneChanged: every watched map has a gap, then comes the event.
	laneChanged
	// covered: the event was delivered, or a gap stands for it.
	covered
)

// event takes in an event of a watched map.
func (t *tracker) event(e *fanoutv1.Event, now time.Time) verdict {
	shard, ok := t.shards[e.GetShard()]
	if !ok {
		shard = t.adopt(e.GetShard(), e.GetLane())
	}
	if shard.lane != e.GetLane() {
		shard = t.adopt(e.GetShard(), e.GetLane())
		shard.heard = now
		t.set(shard, e.GetMap(), e.GetSequence())
		return laneChanged
	}
	shard.heard = now
	seen := shard.maps[e.GetMap()]
	if e.GetSequence() <= seen {
		return covered
	}
	t.set(shard, e.GetMap(), e.GetSequence())
	if key := (claimKey{e.GetShard(), e.GetMap()}); len(t.claims) > 0 && e.GetSequence() >= t.claims[key].sequence {
		delete(t.claims, key)
	}
	if e.GetSequence() > seen+1 {
		return missing
	}
	return complete
}

// heartbeat takes in a heartbeat. It says whether the lane changed, so that every
// watched map has a gap.
func (t *tracker) heartbeat(h *fanoutv1.Heartbeat, now time.Time) bool {
	shard, ok := t.shards[h.GetShard()]
	changed := false
	switch {
	case !ok:
		shard = t.adopt(h.GetShard(), h.GetLane())
	case shard.lane != h.GetLane():
		if now.Sub(shard.heard) < laneSilence*t.period {
			return false
		}
		shard = t.adopt(h.GetShard(), h.GetLane())
		changed = true
	}
	shard.heard = now
	for _, m := range h.GetMaps() {
		if m.GetSequence() <= shard.maps[m.GetMap()] {
			continue
		}
		if changed || !t.watched(m.GetMap()) {
			// A gap stands for these events, or nobody waits for them.
			t.set(shard, m.GetMap(), m.GetSequence())
			continue
		}
		// An older claim is judged first; a later heartbeat claims the rest.
		key := claimKey{h.GetShard(), m.GetMap()}
		if _, open := t.claims[key]; !open {
			t.claims[key] = claim{m.GetSequence(), now.Add(t.period)}
		}
	}
	return changed
}

// overdue closes the claims whose time is over and returns the maps that have a gap.
func (t *tracker) overdue(now time.Time) []string {
	var gaps []string
	for key, claim := range t.claims {
		if now.Before(claim.deadline) {
			continue
		}
		delete(t.claims, key)
		shard := t.shards[key.shard]
		if shard.maps[key.mapName] >= claim.sequence {
			continue
		}
		t.set(shard, key.mapName, claim.sequence)
		if t.watched(key.mapName) {
			gaps = append(gaps, key.mapName)
		}
	}
	return gaps
}

// adopt starts a shard's state in a lane, where sequences begin at 1.
func (t *tracker) adopt(id uint32, lane string) *shardState {
	if old, ok := t.shards[id]; ok {
		t.positions -= len(old.maps)
		for key := range t.claims {
			if key.shard == id {
				delete(t.claims, key)
			}
		}
	}
	shard := &shardState{lane: lane, maps: make(map[string]uint64)}
	t.shards[id] = shard
	return shard
}

// evictTries bounds the search for a position that nobody needs.
const evictTries = 8

// set stores a position, forgetting another when there are too many.
func (t *tracker) set(shard *shardState, mapName string, seen uint64) {
	if _, ok := shard.maps[mapName]; !ok {
		if t.positions >= t.max {
			t.evict(shard)
		}
		t.positions++
	}
	shard.maps[mapName] = seen
}

// evict forgets a random position of the shard, rather one of a map that nobody
// watches: that one can only cost a needless gap later.
func (t *tracker) evict(shard *shardState) {
	victim, tries := "", 0
	for name := range shard.maps {
		victim = name
		if tries++; tries == evictTries || !t.watched(name) {
			break
		}
	}
	if tries > 0 {
		delete(shard.maps, victim)
		t.positions--
	}
}
