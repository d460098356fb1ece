package partition

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect/v2"
	"go.opentelemetry.io/otel/trace"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/merkle"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

const (
	maxLockName     = 256
	maxKeepSessions = 100_000
	// lockHeld is what one step of a lock table counts in the lane's room: two
	// changes at most.
	lockHeld = 2 * (opOverhead + maxLockName + 2*maxOrigin)
	// maxRoomWait is how long a call waits for room that is not meant to wait; it is
	// refused before a client gives up (PROTOCOL 14.3: 5 s).
	maxRoomWait = 2 * time.Second
)

var (
	errOverloaded = connect.NewError(connect.CodeResourceExhausted, "the log takes nothing at present: try again later")
	// errLockUnknown answers a call whose change may or may not be in the log.
	errLockUnknown = connect.NewError(connect.CodeUnavailable, "the outcome is unknown: ask again")
)

// lockStep runs one step of the shard's lock table, hands what it changed to the
// lane, and then answers. held was acquired of the lane's room. It returns the batch
// that everything the step speaks of is in.
func (s *shard) lockStep(held int64, step func(t *lockTable, now time.Duration)) *batch {
	step(s.locks, s.elapsed())
	if len(s.locks.changes) == 0 {
		s.lane.room.Release(held)
	} else {
		s.changes = s.changes[:0]
		for _, c := range s.locks.changes {
			s.changes = append(s.changes, s.lockChange(c))
		}
		s.last = s.lane.add(s.id, s.changes, held, trace.SpanContext{})
		clear(s.changes)
	}
	for _, w := range s.locks.answered {
		w.batch = s.last
		close(w.answered)
	}
	clear(s.locks.changes)
	clear(s.locks.answered)
	s.locks.changes, s.locks.answered = s.locks.changes[:0], s.locks.answered[:0]
	s.lockSessions.Store(int64(len(s.locks.sessions)))
	return s.last
}

func (s *shard) lockChange(c lockChange) change {
	if c.value == nil {
		return change{kind: typesv1.Kind_KIND_LOCK, table: lockMap, key: c.name, arrival: c.arrival, pruned: true}
	}
	stamp := hlc.Timestamp{Millis: c.arrival.millis, Counter: c.arrival.counter, NodeID: s.nodeID}
	return change{
		kind: typesv1.Kind_KIND_LOCK, table: lockMap, key: c.name, arrival: c.arrival,
		record: lwwmap.Record{Value: c.value, Timestamp: stamp},
	}
}

// sweepLocks ends locks and forgets free ones. It returns false if the lane takes
// nothing at present. A load that leaves no room must not keep locks from ending: so
// one batch at a time goes without.
func (s *shard) sweepLocks() bool {
	wall := wallMillis(s.now())
	if !s.locks.due(s.elapsed(), wall) {
		return true
	}
	held := int64(maxExpiries * lockHeld / 2)
	roomy := s.lane.room.TryAcquire(held)
	if !roomy {
		held = 0
	}
	if s.lane.full() || !roomy && !s.squeezed.logged() {
		s.lane.room.Release(held)
		return false
	}
	batch := s.lockStep(held, func(t *lockTable, now time.Duration) { t.sweep(now, wall, maxExpiries) })
	if !roomy {
		s.squeezed = batch
	}
	return true
}

// lockShard returns the shard of a lock.
func (s *Service) lockShard(name string) (*active, *shard, error) {
	for i := range len(name) {
		c := name[i]
		ok := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
		if !ok && c != '_' && c != '.' && c != ':' && c != '/' && c != '-' {
			name = ""
			break
		}
	}
	if name == "" || len(name) > maxLockName {
		return nil, nil, connect.NewError(connect.CodeInvalidArgument, "a lock is named by 1 to 256 of letters, digits, '_', '.', ':', '/' and '-'")
	}
	a := s.phase.Load().serving
	if a == nil {
		return nil, nil, errUnavailable
	}
	return a, a.shards[shardOf(merkle.HashBytes([]byte(name)), len(a.shards))], nil
}

// lockRoom waits until the lane has room for a step of a lock table, at most as long
// as the caller would wait for the lock. A full log takes nothing, so nothing is
// granted and nothing released then.
func (s *Service) lockRoom(ctx context.Context, a *active, most time.Duration) error {
	if a.lane.full() {
		return errOverloaded
	}
	waiting, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	if s.room.Acquire(waiting, lockHeld) == nil {
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return errOverloaded
}

// AcquireLock implements the rpc. Three steps in the shard's goroutine: the request,
// which may be answered much later; once the grant is in the log, the question
// whether it still stands, from when on the holder's time runs; and, for who waits
// no longer, the leaving.
func (s *Service) AcquireLock(ctx context.Context, req *partitionv1.AcquireLockRequest) (*partitionv1.AcquireLockResponse, error) {
	switch {
	case req.GetSession() == "" || len(req.GetSession()) > maxOrigin:
		return nil, connect.NewError(connect.CodeInvalidArgument, "session must be 1 to 128 bytes")
	case req.GetTtlMillis() == 0 || req.GetTtlMillis() > maxLockMillis:
		return nil, connect.NewError(connect.CodeInvalidArgument, "ttl_millis must be 1 to 86400000")
	case req.GetWaitMillis() > maxLockMillis:
		return nil, connect.NewError(connect.CodeInvalidArgument, "wait_millis must be at most 86400000")
	}
	a, shard, err := s.lockShard(req.GetName())
	if err != nil {
		return nil, err
	}
	wait := time.Duration(req.GetWaitMillis()) * time.Millisecond
	waited := time.NewTimer(wait)
	defer waited.Stop()
	if err := s.lockRoom(ctx, a, max(wait, maxRoomWait)); err != nil {
		return nil, err
	}
	w := &lockWaiter{
		name: req.GetName(), session: req.GetSession(), ttl: time.Duration(req.GetTtlMillis()) * time.Millisecond,
		queues: wait > 0, answered: make(chan struct{}),
	}
	_, err = shard.submit(ctx, func() {
		shard.lockStep(lockHeld, func(t *lockTable, now time.Duration) {
			if a.lane.full() {
				t.refuse(w, errOverloaded)
				return
			}
			t.acquire(now, w)
		})
	})
	if err != nil {
		s.room.Release(lockHeld)
		return nil, readError(ctx, err)
	}
	if !s.lockAnswer(ctx, shard, w, waited.C) {
		return nil, readError(ctx, errStopped)
	}
	switch {
	case errors.Is(w.err, errOverloaded):
		return nil, errOverloaded
	case w.err != nil:
		return nil, connect.NewError(connect.CodeResourceExhausted, w.err.Error())
	case ctx.Err() != nil && w.token == 0:
		return nil, ctx.Err()
	case w.token == 0:
		return &partitionv1.AcquireLockResponse{}, nil
	}
	granted, err := s.lockSettle(ctx, shard, w)
	switch {
	case err != nil:
		return nil, err
	case s.phase.Load().serving != a:
		return nil, errLockUnknown
	case !granted:
		return &partitionv1.AcquireLockResponse{}, nil
	}
	return &partitionv1.AcquireLockResponse{Granted: true, FencingToken: w.token}, nil
}

// lockAnswer waits until a request is answered. When its time is over or its caller
// gone, it leaves the queue, which answers it unless it was granted just before. It
// returns false if the shard has ended.
func (s *Service) lockAnswer(ctx context.Context, shard *shard, w *lockWaiter, wait <-chan time.Time) bool {
	if !w.queues {
		wait = nil // answered at once
	}
	select {
	case <-w.answered:
		return true
	case <-shard.exited:
		return false
	case <-wait:
	case <-ctx.Done():
	}
	// The shard's inbox keeps the order: the request is in the table by then.
	left, err := shard.submit(context.WithoutCancel(ctx), func() {
		shard.lockStep(0, func(t *lockTable, now time.Duration) { t.leave(now, w) })
	})
	return err == nil && shard.await(context.WithoutCancel(ctx), left) == nil
}

// lockSettle waits until a grant is in the log and settles it.
func (s *Service) lockSettle(ctx context.Context, shard *shard, w *lockWaiter) (granted bool, err error) {
	// Settled it must be, or the lock would never end: so ctx does not end these waits
	// in the shard, which answers within moments.
	logged := w.batch.wait(ctx)
	settled, err := shard.submit(context.WithoutCancel(ctx), func() {
		there := logged == nil && ctx.Err() == nil
		shard.lockStep(0, func(t *lockTable, now time.Duration) { granted = t.settle(now, w, there) })
	})
	if err == nil {
		err = shard.await(context.WithoutCancel(ctx), settled)
	}
	switch {
	case ctx.Err() != nil:
		if granted {
			_, _ = shard.submit(context.WithoutCancel(ctx), func() {
				shard.lockStep(0, func(t *lockTable, now time.Duration) { t.retract(now, w) })
			})
		}
		return false, ctx.Err()
	case logged != nil:
		return false, errLockUnknown.WithCause(logged)
	case err != nil:
		return false, errLockUnknown.WithCause(err)
	}
	return granted, nil
}

// ReleaseLock implements the rpc.
func (s *Service) ReleaseLock(ctx context.Context, req *partitionv1.ReleaseLockRequest) (*partitionv1.ReleaseLockResponse, error) {
	a, shard, err := s.lockShard(req.GetName())
	if err != nil {
		return nil, err
	}
	if err := s.lockRoom(ctx, a, maxRoomWait); err != nil {
		return nil, err
	}
	// All of the answer is one value, so that a caller who gives up shares none of it
	// with the shard.
	type answer struct {
		released, overloaded bool
		batch                *batch
	}
	answers := make(chan answer, 1)
	_, err = shard.submit(ctx, func() {
		var got answer
		got.batch = shard.lockStep(lockHeld, func(t *lockTable, now time.Duration) {
			if got.overloaded = a.lane.full(); !got.overloaded {
				got.released = t.release(now, req.GetName(), req.GetFencingToken())
			}
		})
		answers <- got
	})
	if err != nil {
		s.room.Release(lockHeld)
		return nil, readError(ctx, err)
	}
	var got answer
	select {
	case got = <-answers:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-shard.exited:
		return nil, errLockUnknown
	}
	if got.overloaded {
		return nil, errOverloaded
	}
	// That the token is not the holder's may be known from a change that is not in the
	// log yet.
	if err := got.batch.wait(ctx); err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, errLockUnknown.WithCause(err)
	}
	return &partitionv1.ReleaseLockResponse{Released: got.released}, nil
}

// KeepLocks implements the rpc.
func (s *Service) KeepLocks(ctx context.Context, req *partitionv1.KeepLocksRequest) (*partitionv1.KeepLocksResponse, error) {
	if len(req.GetSessions()) > maxKeepSessions {
		return nil, connect.NewError(connect.CodeInvalidArgument, "a request must name at most 100000 sessions")
	}
	a := s.phase.Load().serving
	if a == nil {
		return nil, errUnavailable
	}
	kept := make([]chan struct{}, len(a.shards))
	for i, shard := range a.shards {
		if shard.lockSessions.Load() == 0 {
			continue
		}
		var err error
		kept[i], err = shard.submit(ctx, func() { shard.locks.keep(shard.elapsed(), req.GetSessions()) })
		if err != nil {
			return nil, readError(ctx, err)
		}
	}
	for i, shard := range a.shards {
		if kept[i] == nil {
			continue
		}
		if err := shard.await(ctx, kept[i]); err != nil {
			return nil, readError(ctx, err)
		}
	}
	return &partitionv1.KeepLocksResponse{}, nil
}

// lock takes in a logged or stored state of a lock.
func (l *loader) lock(c *typesv1.Change) error {
	if c.GetMap() != lockMap || len(c.GetKey()) == 0 || c.GetArrival() == nil {
		return fmt.Errorf("%w: name or arrival of a lock is missing", ErrUnreadable)
	}
	at := arrivalFromProto(c.GetArrival())
	l.clock.raise(at)
	locks := l.shards[shardOf(merkle.HashBytes(c.GetKey()), len(l.shards))].locks
	if c.GetPruned() {
		locks.loadPruned(string(c.GetKey()), at)
		return nil
	}
	r, err := parseLock(c.GetRecord().GetValue())
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnreadable, err)
	}
	locks.load(string(c.GetKey()), r, at)
	return nil
}

// monotonic is a clock that nobody sets, from 0.
func monotonic() func() time.Duration {
	start := time.Now()
	return func() time.Duration { return time.Since(start) }
}
