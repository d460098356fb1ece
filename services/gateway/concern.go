package gateway

import (
	"container/heap"
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/topgun-sync/topgun/core/wire"
	persistencev1 "github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1/persistencev1connect"
)

const (
	// defaultConcern and maxConcern are how long an op waits for the store when its
	// client does not say, and at most (PROTOCOL 10.7).
	defaultConcern = 5 * time.Second
	maxConcern     = time.Minute
	// followIdle is how long the stream of watermarks stays open after the last wait: a
	// client that asks for PERSISTED asks for it with every op.
	followIdle = 5 * time.Second
	// memoryStore is the store that keeps nothing beyond its process.
	memoryStore = "memory"
)

const (
	levelApplied    = "APPLIED"
	levelReplicated = "REPLICATED"
	levelPersisted  = "PERSISTED"
)

// levelUnavailable refuses an op that asks for more replicas than the log has. It is
// refused before it is applied: its writer said that less is not enough.
var levelUnavailable = &wire.Error{
	Name: "LEVEL_UNAVAILABLE", Code: 501,
	Text: "the log has fewer replicas than REPLICATED promises; ask for PERSISTED, or for APPLIED",
}

// concernTimeout is how long ops wait for the store when their batch says millis.
func concernTimeout(millis uint64) time.Duration {
	if millis == 0 {
		return defaultConcern
	}
	return min(time.Duration(min(millis, uint64(maxConcern.Milliseconds())))*time.Millisecond, maxConcern)
}

// refuseLevels rejects the pending ops that ask for a level that the log can never give,
// and returns the others. PERSISTED is not such a level: the store gives it. While the
// log's level is not known, ops that ask for REPLICATED stay opUnavailable.
func (r *router) refuseLevels(ctx context.Context, ops []wire.Op, pending []int, results []opResult) []int {
	if !slices.ContainsFunc(pending, func(i int) bool { return ops[i].WriteConcern == levelReplicated }) {
		return pending
	}
	table, err := r.owners(ctx)
	if err == nil && levelRank(table.level) >= levelRank(levelReplicated) {
		return pending
	}
	return slices.DeleteFunc(pending, func(i int) bool {
		refused := ops[i].WriteConcern == levelReplicated
		if refused && err == nil {
			results[i] = opResult{status: opRejected, code: levelUnavailable.Code, reason: levelUnavailable.Error()}
		}
		return refused
	})
}

// concerns waits for the store to have what ops with a write concern of PERSISTED
// changed (PROTOCOL 10.7). All waits share one stream of watermarks, which is open only
// while somebody waits, and followIdle longer. Its methods may be called concurrently.
//
// The number of waits is bounded by the batches that are being answered.
type concerns struct {
	persistence persistencev1connect.PersistenceServiceClient
	history     func() string // of the log, as the owners name it
	log         *slog.Logger
	kick        chan struct{}

	mu       sync.Mutex
	open     bool                                // a stream is
	marks    map[string]*persistencev1.Watermark // by lane, as of the last stream; they only rise
	volatile bool                                // the store keeps nothing
	waits    map[string]*laneWaits
	waiting  int
	idle     *time.Timer // ends the open stream when nobody has waited for followIdle
}

// wait is one batch that waits for one lane.
type wait struct {
	lane     string
	sequence uint64
	done     chan struct{} // closed when the store has it, or never will
	at       int           // in its laneWaits; -1 when it has left
}

// laneWaits holds the waits of a lane, the one with the least sequence first.
type laneWaits []*wait

func (w laneWaits) Len() int           { return len(w) }
func (w laneWaits) Less(i, j int) bool { return w[i].sequence < w[j].sequence }
func (w laneWaits) Swap(i, j int) {
	w[i], w[j] = w[j], w[i]
	w[i].at, w[j].at = i, j
}

func (w *laneWaits) Push(x any) {
	one := x.(*wait)
	one.at = len(*w)
	*w = append(*w, one)
}

func (w *laneWaits) Pop() any {
	last := len(*w) - 1
	one := (*w)[last]
	(*w)[last] = nil
	*w = (*w)[:last]
	one.at = -1
	return one
}

func newConcerns(client persistencev1connect.PersistenceServiceClient, history func() string, log *slog.Logger) *concerns {
	return &concerns{
		persistence: client,
		history:     history,
		log:         log,
		kick:        make(chan struct{}, 1),
		waits:       make(map[string]*laneWaits),
	}
}

// persistConcern reports whether an op was done and asks for more than the log gives.
func persistConcern(op *wire.Op, r *opResult) bool {
	return op.WriteConcern == levelPersisted && r.status != opRejected && r.status != opUnavailable &&
		levelRank(r.level) < levelRank(levelPersisted)
}

// settle waits until the store has what the ops that ask for it changed, until ctx ends,
// or until hurry is closed. It raises the level of the results that got there; the
// others keep theirs (ACK-03).
func (c *concerns) settle(ctx context.Context, hurry <-chan struct{}, ops []wire.Op, results []opResult) {
	needed := make(map[string]uint64)
	flush := false
	for i := range ops {
		if r := &results[i]; persistConcern(&ops[i], r) {
			needed[r.lane] = max(needed[r.lane], r.sequence)
			flush = flush || r.lane == ""
		}
	}
	if len(needed) == 0 {
		return
	}
	if !c.await(ctx, hurry, needed) {
		flush = false // out of time, or the store keeps nothing
	}
	flushed := flush && c.flush(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range ops {
		r := &results[i]
		if !persistConcern(&ops[i], r) {
			continue
		}
		if r.lane == "" && flushed || r.lane != "" && c.storedLocked(r.lane, r.sequence) {
			r.level = levelPersisted
		}
	}
}

// storedLocked reports whether the store is known to have a commit; c.mu is held. A
// watermark of another log counts other commits.
func (c *concerns) storedLocked(lane string, sequence uint64) bool {
	mark := c.marks[lane]
	return mark != nil && !c.volatile && mark.GetSequence() >= sequence && mark.GetHistory() == c.history()
}

// await waits for lanes, "" excepted. It returns false when the store keeps nothing, or
// the wait ended early.
func (c *concerns) await(ctx context.Context, hurry <-chan struct{}, needed map[string]uint64) bool {
	var mine []*wait
	c.mu.Lock()
	if c.open && c.volatile {
		c.mu.Unlock()
		return false
	}
	for lane, sequence := range needed {
		if lane == "" && c.open || lane != "" && c.storedLocked(lane, sequence) {
			continue
		}
		if c.waits[lane] == nil {
			c.waits[lane] = new(laneWaits)
		}
		w := &wait{lane: lane, sequence: sequence, done: make(chan struct{})}
		heap.Push(c.waits[lane], w) // lane "" waits for a stream
		mine = append(mine, w)
	}
	if len(mine) == 0 {
		c.mu.Unlock()
		return true
	}
	c.waiting++
	c.mu.Unlock()
	notify(c.kick)
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, w := range mine {
			c.dropLocked(w)
		}
		c.waiting--
		if c.waiting == 0 && c.idle != nil {
			c.idle.Reset(followIdle)
		}
	}()
	for _, w := range mine {
		select {
		case <-w.done:
		case <-hurry:
			return false
		case <-ctx.Done():
			return false
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.volatile
}

// dropLocked removes a wait that is over before its lane got there; c.mu is held.
func (c *concerns) dropLocked(w *wait) {
	if w.at < 0 {
		return
	}
	waits := c.waits[w.lane]
	heap.Remove(waits, w.at)
	if len(*waits) == 0 {
		delete(c.waits, w.lane)
	}
}

// flush waits until the store has everything that is in the log: for an op that the
// owner found there when it started, so that it does not know where.
func (c *concerns) flush(ctx context.Context) bool {
	_, err := c.persistence.Flush(ctx, &persistencev1.FlushRequest{})
	return err == nil
}

// run follows the watermarks whenever somebody waits, until ctx ends.
func (c *concerns) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.kick:
		}
		for retry := firstRetry; ctx.Err() == nil && c.wanted(); retry = min(2*retry, maxRetry) {
			opened, err := c.follow(ctx)
			if err == nil || ctx.Err() != nil {
				break
			}
			if opened {
				retry = firstRetry
			}
			c.log.Warn("watermarks of the store do not arrive", "error", err, "retry", retry)
			if !pause(ctx, retry) {
				return
			}
		}
	}
}

func (c *concerns) wanted() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.waiting > 0
}

var errConcernIdle = errors.New("nobody waits for the store")

// follow opens the stream and hands on what it brings. It returns nil when nobody has
// waited for a while.
func (c *concerns) follow(ctx context.Context) (opened bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	call, done := context.WithTimeout(ctx, watchTimeout)
	about, err := c.persistence.Describe(call, &persistencev1.DescribeRequest{})
	done()
	if err != nil {
		return false, err
	}
	stream, err := c.persistence.FollowWatermarks(ctx, &persistencev1.FollowWatermarksRequest{})
	if err != nil {
		return false, err
	}
	defer func() { _ = stream.Close() }() // it has ended, or its context has
	defer c.closed()
	for {
		message, err := stream.Receive()
		if err != nil {
			if errors.Is(context.Cause(ctx), errConcernIdle) {
				return opened, nil
			}
			return opened, err
		}
		c.mu.Lock()
		if !opened {
			opened = true
			c.openedLocked(about.GetStore() == memoryStore, func() { cancel(errConcernIdle) })
		}
		for _, mark := range message.GetWatermarks() {
			c.markLocked(mark)
		}
		c.mu.Unlock()
	}
}

// openedLocked notes that the stream is open; c.mu is held.
func (c *concerns) openedLocked(volatile bool, end func()) {
	c.open, c.marks, c.volatile = true, make(map[string]*persistencev1.Watermark), volatile
	c.idle = time.AfterFunc(followIdle, func() {
		if !c.wanted() {
			end()
		}
	})
	for lane, waits := range c.waits {
		if volatile || lane == "" {
			c.releaseLocked(lane, waits, ^uint64(0))
		}
	}
}

// closed notes that the stream has ended: who waits goes on waiting for the next one.
func (c *concerns) closed() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.idle != nil {
		c.idle.Stop()
	}
	c.open, c.idle = false, nil
}

func (c *concerns) markLocked(mark *persistencev1.Watermark) {
	c.marks[mark.GetLane()] = mark
	if waits := c.waits[mark.GetLane()]; waits != nil && mark.GetHistory() == c.history() {
		c.releaseLocked(mark.GetLane(), waits, mark.GetSequence())
	}
}

// releaseLocked ends the waits of a lane up to a sequence; c.mu is held.
func (c *concerns) releaseLocked(lane string, waits *laneWaits, sequence uint64) {
	for len(*waits) > 0 && (*waits)[0].sequence <= sequence {
		close(heap.Pop(waits).(*wait).done)
	}
	if len(*waits) == 0 {
		delete(c.waits, lane)
	}
}
