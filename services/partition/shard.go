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
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
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

// op is one op and, once its shard merged it, the answer.
type op struct {
	kind   typesv1.Kind
	table  string
	key    []byte // with a tag see joinTag
	hash   uint32 // of the key alone
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

	tables [tableKinds]map[string]*table // by kind and name
	expiry expiryHeap
	pruner pruner
	// fence is the stamp below which an op of the group being merged is too old for a
	// key or tag that holds nothing.
	fence uint64

	locks        *lockTable
	lockSessions atomic.Int64         // of locks, for those who would ask for nothing
	squeezed     *batch               // the last of locks that the lane had no room for
	elapsed      func() time.Duration // a monotonic clock

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
		tables:   [tableKinds]map[string]*table{lww: {}, or: {}, counter: {}},
		lastNode: intern(""),
		locks:    newLockTable(func() arrival { return clock.next(wallMillis(now())) }),
		elapsed:  monotonic(),
	}
}

// run does tasks, and what is due by the time alone, until stop is closed and the inbox empty.
func (s *shard) run(stop <-chan struct{}) {
	defer close(s.exited)
	timer := time.NewTimer(0)
	defer timer.Stop()
	s.locks.start(s.elapsed())
	s.lockSessions.Store(int64(len(s.locks.sessions)))
	for {
		select {
		case task := <-s.inbox:
			task()
		case <-timer.C:
			if !s.housekeep() {
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
		timer.Reset(s.nextHousekeeping())
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
	if keep := s.pruner.keep; keep > 0 {
		s.fence = keep.fence(s.clock.read(wall).millis)
	}
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
		s.store(t, []byte(e.key), e.hash, e.record().Expire(), hlc.Timestamp{}, wall, "")
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
	t := s.table(c.kind, c.table)
	t.loading = true
	before := t.records[c.key]
	if before != nil && c.arrival.compare(before.arrival) <= 0 {
		return
	}
	switch {
	case c.pruned && before == nil:
		return
	case c.pruned:
		t.forget(before)
		s.records.Add(-1)
		return
	case before == nil:
		s.records.Add(1)
	}
	c.record.Value = keepValue(c.record.Value)
	e := t.put([]byte(c.key), hash, c.record, intern(c.record.Timestamp.NodeID), c.arrival, c.restamped)
	s.expiry.schedule(t, e)
}

// ready puts what was loaded in order.
func (s *shard) ready() {
	for _, tables := range s.tables {
		for name, t := range tables {
			if t.ready(); len(t.records) == 0 { // all was forgotten
				delete(tables, name)
			}
		}
	}
	s.buryAll()
}
