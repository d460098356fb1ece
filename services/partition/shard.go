package partition

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"
	"unique"

	"go.opentelemetry.io/otel/trace"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
)

const (
	// inboxSize bounds the tasks that wait for a shard; who brings another waits
	// until its own context ends. What the tasks hold is bounded by the lane's room.
	inboxSize = 64
	// maxExpiries bounds the records that expire in one go, so that ops and reads
	// get their turn.
	maxExpiries = 512
	// maxExpiryWait is the longest a shard sleeps before it looks at the wall clock
	// again, which may have been set.
	maxExpiryWait = 30 * time.Second
	// expiryRetry is the pause before expiries that a full log prevented.
	expiryRetry = time.Second
	// opOverhead is what an op counts in the lane's room beside its key and value.
	opOverhead = 256
)

// outcome is what a merge did with an op.
type outcome uint8

const (
	applied outcome = iota
	duplicate
	superseded
	restamped
	rejected
	outcomes // how many there are
)

// Reasons of rejections: fixed texts, a name and a sentence.
const reasonReused = "STAMP_REUSED: another value was written with the same timestamp"

// op is one op and, once its shard merged it, the answer.
type op struct {
	table  string
	key    []byte
	hash   uint32 // of the key
	record lwwmap.Record

	outcome outcome
	winner  lwwmap.Record // with superseded and restamped
	reason  string        // with rejected; set by the checks for an op that must not be merged
}

// group is the ops of one session for one shard, and the answer.
type group struct {
	ops    []op
	origin string
	held   int64 // of the lane's room
	span   trace.SpanContext

	// turn decides between the shard, which begins to merge, and a caller that gives
	// up before: whoever sets it first. A caller that lost waits; the ops' bytes are
	// its own again only when the shard is done with them.
	turn atomic.Bool

	overloaded bool    // nothing was merged
	batch      *batch  // what the answer waits for
	arrival    arrival // of the newest change, or a reading of the clock
}

// shard owns the maps of its partitions. Everything but submit and the counters
// belongs to the goroutine of run.
type shard struct {
	id     int
	nodeID string // of stamps made here
	clock  *arrivalClock
	lane   *lane
	now    func() time.Time
	stats  *stats

	inbox chan func()
	// exited is closed when run has returned; tasks that still wait never run.
	exited chan struct{}

	tables map[string]*table
	expiry expiryHeap
	// last is the newest batch with changes of this shard: once it is logged, so is
	// everything that a read can see.
	last    *batch
	changes []change // of the group being merged
	// lastNode is the most recent interned node id: an op's neighbours share it.
	lastNode unique.Handle[string]

	records atomic.Int64
}

func newShard(id int, clock *arrivalClock, now func() time.Time, stats *stats) *shard {
	return &shard{
		id: id, nodeID: fmt.Sprintf("topgun-%d", id), clock: clock, now: now, stats: stats,
		inbox:    make(chan func(), inboxSize),
		exited:   make(chan struct{}),
		tables:   make(map[string]*table),
		lastNode: intern(""),
	}
}

// run does tasks and lets records expire until stop is closed and the inbox empty.
func (s *shard) run(stop <-chan struct{}) {
	defer close(s.exited)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case task := <-s.inbox:
			task()
		case <-timer.C:
			if !s.expire() {
				timer.Reset(expiryRetry)
				continue
			}
		case <-stop:
			for {
				select {
				case task := <-s.inbox:
					task()
				default:
					return
				}
			}
		}
		timer.Reset(s.nextExpiry())
	}
}

// submit has the shard's goroutine do task. It returns a channel that is closed
// when the task is done, or an error if it never will be.
func (s *shard) submit(ctx context.Context, task func()) (done chan struct{}, err error) {
	done = make(chan struct{})
	select {
	case s.inbox <- func() { task(); close(done) }:
		return done, nil
	case <-s.exited:
		return nil, errStopped
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// await waits for a task. errStopped means that the task was never begun.
func (s *shard) await(ctx context.Context, done <-chan struct{}) error {
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-s.exited:
	}
	select {
	case <-done:
		return nil
	default:
		return errStopped
	}
}

// apply merges a group and hands what changed to the lane.
func (s *shard) apply(g *group) {
	if g.turn.Swap(true) {
		return // its caller gave up
	}
	if s.lane.full() {
		g.overloaded = true
		s.lane.room.Release(g.held)
		return
	}
	wall := wallMillis(s.now())
	s.changes = s.changes[:0]
	for i := range g.ops {
		o := &g.ops[i]
		if o.reason == "" {
			s.merge(o, wall, g.origin)
		}
		s.stats.ops[o.outcome].Add(1)
	}
	if n := len(s.changes); n > 0 {
		g.arrival = s.changes[n-1].arrival
		s.last = s.lane.add(s.id, s.changes, g.held, g.span)
		clear(s.changes)
	} else {
		g.arrival = s.clock.read(wall)
		s.lane.room.Release(g.held)
	}
	// An op that changed nothing speaks of a record that may not be logged yet.
	g.batch = s.last
}

// merge decides an op and stores the result (PROTOCOL 5.2, 22.4).
func (s *shard) merge(o *op, wall uint64, origin string) {
	t := s.tables[o.table]
	var e *entry
	if t != nil {
		e = t.records[string(o.key)]
	}
	var local *lwwmap.Record
	if e != nil {
		r := e.record()
		local = &r
		if repeats(e.originals(), o.record.Timestamp) {
			o.outcome, o.winner = restamped, r
			return
		}
	}
	if o.record.Timestamp.Millis > wall+uint64(hlc.MaxDrift.Milliseconds()) {
		s.restamp(o, local, wall)
		return
	}
	switch lwwmap.Decide(local, o.record) {
	case lwwmap.Applied:
		o.outcome = applied
		s.store(o.table, o.key, o.hash, o.record, hlc.Timestamp{}, wall, origin)
	case lwwmap.Duplicate:
		o.outcome = duplicate
	case lwwmap.Superseded:
		o.outcome, o.winner = superseded, *local
	case lwwmap.Conflict:
		o.outcome, o.reason = rejected, reasonReused
	}
}

// restamp takes in an op whose stamp lies too far in the future under a stamp of
// the shard's own. The stamp is the wall clock's, not the arrival's, which may be
// ahead after the wall clock was set back (CLK-02, CLK-03). Win or lose, the record
// remembers the original, so that the op sent again later does not win then.
func (s *shard) restamp(o *op, local *lwwmap.Record, wall uint64) {
	original := o.record.Timestamp
	r := o.record
	r.Timestamp = hlc.Timestamp{Millis: wall, NodeID: s.nodeID}
	if local != nil && local.Timestamp.Millis == wall && local.Timestamp.NodeID == s.nodeID && r.Timestamp.Counter <= local.Timestamp.Counter {
		r.Timestamp.Counter = local.Timestamp.Counter + 1
	}
	if local != nil && lwwmap.Decide(local, r) != lwwmap.Applied {
		r = *local
	}
	e := s.store(o.table, o.key, o.hash, r, original, wall, "")
	o.outcome, o.winner = restamped, e.record()
}

// store makes a record the state of a key under an arrival of its own, and notes
// the change for the lane.
func (s *shard) store(name string, key []byte, hash uint32, r lwwmap.Record, original hlc.Timestamp, wall uint64, origin string) *entry {
	t := s.tables[name]
	if t == nil {
		t = newTable(name)
		s.tables[t.name] = t
	}
	var known []hlc.Timestamp
	before := t.records[string(key)]
	if before != nil {
		known = before.originals()
	} else {
		s.records.Add(1)
	}
	if s.lastNode.Value() != r.Timestamp.NodeID {
		s.lastNode = intern(r.Timestamp.NodeID)
	}
	r.Value = keepValue(r.Value)
	e := t.put(key, hash, r, s.lastNode, s.clock.next(wall), remember(known, original, r.Timestamp))
	t.arrived(e, before != nil)
	s.expiry.schedule(t, e)
	c := t.change(e)
	c.origin = origin
	s.changes = append(s.changes, c)
	return e
}

// expire turns records whose time is over into tombstones (PROTOCOL 22.5, CRDT-05).
// It returns false if the lane has no room for them at present.
func (s *shard) expire() bool {
	if len(s.expiry) == 0 {
		return true
	}
	const held = maxExpiries * opOverhead
	if s.lane.full() || !s.lane.room.TryAcquire(held) {
		return false
	}
	wall := wallMillis(s.now())
	s.changes = s.changes[:0]
	for len(s.changes) < maxExpiries && len(s.expiry) > 0 && s.expiry[0].at < wall {
		t, e := s.expiry[0].table, s.expiry[0].entry
		s.store(t.name, []byte(e.key), e.hash, e.record().Expire(), hlc.Timestamp{}, wall, "")
	}
	if len(s.changes) == 0 {
		s.lane.room.Release(held)
		return true
	}
	s.last = s.lane.add(s.id, s.changes, held, trace.SpanContext{})
	clear(s.changes)
	return true
}

// nextExpiry is how long the shard may sleep.
func (s *shard) nextExpiry() time.Duration {
	if len(s.expiry) == 0 {
		return maxExpiryWait
	}
	at, wall := s.expiry[0].at, wallMillis(s.now())
	if at < wall {
		return 0
	}
	if at-wall >= uint64(maxExpiryWait.Milliseconds()) {
		return maxExpiryWait
	}
	return time.Duration(at-wall+1) * time.Millisecond
}

// load takes in a state that was logged before: from the store or from the log. An
// older one than what is there changes nothing. Call it before run, and ready after
// the last one.
func (s *shard) load(c change, hash uint32) {
	t := s.tables[c.table]
	if t == nil {
		t = newTable(c.table)
		s.tables[t.name] = t
	}
	before := t.records[c.key]
	if before != nil && c.arrival.compare(before.arrival) <= 0 {
		return
	}
	if before == nil {
		s.records.Add(1)
	}
	c.record.Value = keepValue(c.record.Value)
	e := t.put([]byte(c.key), hash, c.record, intern(c.record.Timestamp.NodeID), c.arrival, c.restamped)
	s.expiry.schedule(t, e)
}

// ready puts what was loaded in order.
func (s *shard) ready() {
	for _, t := range s.tables {
		t.sortLog()
	}
}
