package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectinprocess"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/keyspace"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/wire"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/partition/v1/partitionv1connect"
)

// owner is a fake partition that serves some of the shards.
type owner struct {
	*fakePartition
	served func() []uint32 // nil: all
	answer func(*partitionv1.ApplyRequest, *partitionv1.ApplyResponse)

	mu       sync.Mutex
	requests []*partitionv1.ApplyRequest
}

func newOwner(served func() []uint32) *owner {
	o := &owner{fakePartition: newFakePartition(nil), served: served}
	o.refuse = func(shard uint32) (partitionv1.Refusal, uint32) {
		if served != nil && !slices.Contains(served(), shard) {
			return partitionv1.Refusal_REFUSAL_NOT_OWNER, 0
		}
		return partitionv1.Refusal_REFUSAL_UNSPECIFIED, 0
	}
	return o
}

func (o *owner) Describe(ctx context.Context, request *partitionv1.DescribeRequest) (*partitionv1.DescribeResponse, error) {
	response, err := o.fakePartition.Describe(ctx, request)
	if err == nil && o.served != nil {
		response.Shards = o.served()
	}
	return response, err
}

func (o *owner) Apply(ctx context.Context, request *partitionv1.ApplyRequest) (*partitionv1.ApplyResponse, error) {
	o.mu.Lock()
	o.requests = append(o.requests, request)
	o.mu.Unlock()
	response, err := o.fakePartition.Apply(ctx, request)
	if err == nil && o.answer != nil {
		o.answer(request, response)
	}
	return response, err
}

func (o *owner) applied() []*partitionv1.ApplyRequest {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Clone(o.requests)
}

func (o *owner) connect() partitionv1connect.PartitionServiceClient {
	server := connect.NewServer()
	partitionv1connect.RegisterPartitionServiceHandler(server, o)
	return partitionv1connect.NewPartitionServiceClient(connect.NewClient(connectinprocess.New(server)))
}

func newTestRouter(t *testing.T, change func(*routerLimits), owners ...*owner) *router {
	t.Helper()
	limits := routerLimits{callsPerOwner: 2, queueOps: 1000, queueBytes: 1 << 20, callTimeout: patience}
	if change != nil {
		change(&limits)
	}
	var clients []partitionv1connect.PartitionServiceClient
	for _, o := range owners {
		clients = append(clients, o.connect())
	}
	r := newRouter(clients, limits, func() float64 { return 0.5 }, slog.New(slog.DiscardHandler))
	t.Cleanup(r.close)
	return r
}

// text is a msgpack string of less than 32 bytes.
func text(s string) []byte { return append([]byte{0xa0 | byte(len(s))}, s...) }

func put(id, mapName, key, value string, millis uint64) wire.Op {
	return wire.Op{ID: id, MapName: mapName, Key: key, Kind: wire.OpPut, Record: lwwmap.Record{
		Value: text(value), Timestamp: hlc.Timestamp{Millis: millis, NodeID: "client"},
	}}
}

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func statuses(results []opResult) (list []opStatus) {
	for _, r := range results {
		list = append(list, r.status)
	}
	return list
}

func TestApplyAnswersEachOp(t *testing.T) {
	o := newOwner(nil)
	o.reject = func(op *partitionv1.Op) string {
		if string(op.Key) == "refused" {
			return "STAMP_REUSED: another value has this stamp"
		}
		return ""
	}
	r := newTestRouter(t, nil, o)
	later := uint64(time.Now().Add(time.Hour).UnixMilli())
	broken := put("4", "m", "", "x", 1)
	broken.Err = &wire.Error{Name: "BAD_KEY", Code: 400, Text: "empty"}
	orAdd := put("5", "m", "k", "x", 1)
	orAdd.Kind, orAdd.Tag = wire.OpORAdd, "tag"
	results := r.Apply(within(t, patience), "s1", "", []wire.Op{
		put("1", "m", "a", "1", 10),
		put("2", "m", "a", "1", 10),
		put("3", "m", "a", "0", 9),
		broken,
		orAdd,
		put("6", "m", "future", "x", later),
		put("7", "m", "refused", "x", 1),
	})
	want := []opStatus{opApplied, opDuplicate, opSuperseded, opRejected, opApplied, opRestamped, opRejected}
	if got := statuses(results); !slices.Equal(got, want) {
		t.Fatalf("statuses %v, want %v", got, want)
	}
	if results[0].level != "APPLIED" || results[0].arrival.IsZero() || results[0].arrival.NodeID != "" {
		t.Errorf("applied: %+v", results[0])
	}
	if w := results[2].winner; w.Timestamp.Millis != 10 || string(w.Value) != string(text("1")) {
		t.Errorf("the winner is %+v", w)
	}
	if results[3].code != 400 || results[3].reason != "BAD_KEY: empty" {
		t.Errorf("rejection: %+v", results[3])
	}
	if w := results[5].winner; w.Timestamp.Millis == later || w.Timestamp.NodeID == "client" {
		t.Errorf("restamped to %+v", w.Timestamp)
	}
	if results[6].reason != "STAMP_REUSED: another value has this stamp" {
		t.Errorf("rejected: %+v", results[6])
	}
	for _, request := range o.applied() {
		for _, shard := range request.Shards {
			if shard.Origin != "s1" {
				t.Errorf("origin %q", shard.Origin)
			}
		}
	}
}

// TestApplyKeepsOrderWithinShard: the ops of one caller to one shard arrive in order.
func TestApplyKeepsOrderWithinShard(t *testing.T) {
	o := newOwner(nil)
	refused := atomic.Bool{}
	o.refuse = func(shard uint32) (partitionv1.Refusal, uint32) {
		if shard == 1 && !refused.Swap(true) {
			return partitionv1.Refusal_REFUSAL_UNAVAILABLE, 0
		}
		return 0, 0
	}
	r := newTestRouter(t, nil, o)
	var ops []wire.Op
	for i := range 200 {
		ops = append(ops, put(fmt.Sprint(i), "m", fmt.Sprintf("key-%d", i), "x", uint64(i+1)))
	}
	for i, result := range r.Apply(within(t, patience), "s", "", ops) {
		if result.status != opApplied {
			t.Fatalf("op %d: %+v", i, result)
		}
	}
	last := map[uint32]uint64{}
	skipped := false
	for _, request := range o.applied() {
		for _, shard := range request.Shards {
			if shard.Shard == 1 && !skipped {
				skipped = true // the refused one
				continue
			}
			for _, op := range shard.Ops {
				if op.Record.Timestamp.Millis <= last[shard.Shard] {
					t.Fatalf("shard %d: op %d after op %d", shard.Shard, op.Record.Timestamp.Millis, last[shard.Shard])
				}
				last[shard.Shard] = op.Record.Timestamp.Millis
			}
		}
	}
}

// TestApplyKeepsOrderOfPipelinedCalls: a session's batches that wait together do not
// overtake each other, and do not hold up those of others.
func TestApplyKeepsOrderOfPipelinedCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOwner(nil)
		open := make(chan struct{})
		o.before = func(_ context.Context, method string) error {
			if method == "Apply" {
				<-open
			}
			return nil
		}
		r := newTestRouter(t, nil, o)
		if _, err := r.learn(t.Context()); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for i := range 5 {
			wg.Go(func() { r.Apply(t.Context(), "s", "", []wire.Op{put("1", "m", "k", "v", uint64(i+1))}) })
			synctest.Wait() // so that they are queued in this order
		}
		if n := len(o.applied()); n != 1 {
			t.Errorf("%d calls carry ops of one line at once", n)
		}
		wg.Go(func() { r.Apply(t.Context(), "other", "", []wire.Op{put("1", "m", "k2", "v", 1)}) })
		synctest.Wait()
		if n := len(o.applied()); n != 2 {
			t.Errorf("another session waits for the line: %d calls", n)
		}
		close(open)
		wg.Wait()
		r.close() // so that the pumps have ended
		last := uint64(0)
		for _, request := range o.applied() {
			for _, shard := range request.Shards {
				for _, op := range shard.Ops {
					if shard.Origin == "s" {
						if op.Record.Timestamp.Millis != last+1 {
							t.Errorf("op %d after op %d", op.Record.Timestamp.Millis, last)
						}
						last = op.Record.Timestamp.Millis
					}
				}
			}
		}
		if last != 5 || len(r.peers[0].busy) != 0 || r.peers[0].calls != 0 {
			t.Errorf("last op %d, %d busy lines, %d calls", last, len(r.peers[0].busy), r.peers[0].calls)
		}
	})
}

// TestApplyBatchesAcrossCallers: what arrives while calls are in flight shares the
// next one.
func TestApplyBatchesAcrossCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOwner(nil)
		open := make(chan struct{})
		o.before = func(ctx context.Context, method string) error {
			if method == "Apply" {
				<-open
			}
			return nil
		}
		r := newTestRouter(t, nil, o)
		const callers = 100
		var wg sync.WaitGroup
		for i := range callers {
			wg.Go(func() {
				results := r.Apply(t.Context(), fmt.Sprintf("s%d", i), "", []wire.Op{put("1", "m", fmt.Sprintf("k%d", i), "v", 1)})
				if results[0].status != opApplied {
					t.Errorf("caller %d: %+v", i, results[0])
				}
			})
		}
		synctest.Wait() // two calls wait at the owner, all other callers in the queue
		close(open)
		wg.Wait()
		if calls := o.called("Apply"); calls > 4 {
			t.Errorf("%d callers caused %d calls, want at most 4", callers, calls)
		}
	})
}

func TestApplyRetries(t *testing.T) {
	for name, c := range map[string]struct {
		refusal partitionv1.Refusal
		hint    uint32
		err     error
		least   time.Duration
	}{
		"not owner":   {refusal: partitionv1.Refusal_REFUSAL_NOT_OWNER},
		"unavailable": {refusal: partitionv1.Refusal_REFUSAL_UNAVAILABLE},
		"overloaded":  {refusal: partitionv1.Refusal_REFUSAL_OVERLOADED, hint: 700, least: 700 * time.Millisecond},
		"lost answer": {err: connect.NewError(connect.CodeUnavailable, "connection lost")},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := newOwner(nil)
				tries := 0
				o.refuse = func(uint32) (partitionv1.Refusal, uint32) {
					if tries++; tries <= 1 {
						return c.refusal, c.hint
					}
					return 0, 0
				}
				failed := atomic.Bool{}
				o.before = func(_ context.Context, method string) error {
					if method == "Apply" && c.err != nil && !failed.Swap(true) {
						return c.err
					}
					return nil
				}
				r := newTestRouter(t, nil, o)
				begin := time.Now()
				result := r.Apply(within(t, 5*time.Second), "s", "", []wire.Op{put("1", "m", "k", "v", 1)})[0]
				if result.status != opApplied || o.called("Apply") != 2 {
					t.Errorf("%+v after %d calls", result, o.called("Apply"))
				}
				if took := time.Since(begin); took < c.least || took > c.least+time.Second {
					t.Errorf("took %v", took)
				}
				if o.called("Describe") < 2 {
					t.Error("the owners were not asked again")
				}
			})
		})
	}
}

// TestApplyLostAnswerHasOneEffect: the op was merged but its answer was lost; sent
// again it is a duplicate (ACK-06).
func TestApplyLostAnswerHasOneEffect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOwner(nil)
		lost := atomic.Bool{}
		o.answer = func(_ *partitionv1.ApplyRequest, response *partitionv1.ApplyResponse) {
			if !lost.Swap(true) {
				response.Shards = nil // as good as lost: it answers nothing
			}
		}
		r := newTestRouter(t, nil, o)
		result := r.Apply(within(t, 5*time.Second), "s", "", []wire.Op{put("1", "m", "k", "v", 1)})[0]
		if result.status != opDuplicate {
			t.Errorf("%+v", result)
		}
	})
}

// TestApplyNeverAcksWhatWasNotAnswered: ACK-01.
func TestApplyNeverAcksWhatWasNotAnswered(t *testing.T) {
	for name, spoil := range map[string]func(*partitionv1.ApplyResponse){
		"no shards":       func(r *partitionv1.ApplyResponse) { r.Shards = nil },
		"no receipts":     func(r *partitionv1.ApplyResponse) { r.Shards[0].Receipts = nil },
		"no outcome":      func(r *partitionv1.ApplyResponse) { r.Shards[0].Receipts[0].Outcome = 0 },
		"unknown outcome": func(r *partitionv1.ApplyResponse) { r.Shards[0].Receipts[0].Outcome = 99 },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := newOwner(nil)
				o.answer = func(_ *partitionv1.ApplyRequest, response *partitionv1.ApplyResponse) { spoil(response) }
				r := newTestRouter(t, nil, o)
				result := r.Apply(within(t, 2*time.Second), "s", "", []wire.Op{put("1", "m", "k", "v", 1)})[0]
				if result.status != opUnavailable || result.code != 503 {
					t.Errorf("%+v", result)
				}
			})
		})
	}
}

func TestApplyGivesUpWhenTheCallerDoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOwner(nil)
		o.refuse = func(uint32) (partitionv1.Refusal, uint32) { return partitionv1.Refusal_REFUSAL_OVERLOADED, 300 }
		r := newTestRouter(t, nil, o)
		begin := time.Now()
		result := r.Apply(within(t, time.Second), "s", "", []wire.Op{put("1", "m", "k", "v", 1)})[0]
		if result.status != opUnavailable || result.code != 429 || result.retryAfter != 300*time.Millisecond {
			t.Errorf("%+v", result)
		}
		if took := time.Since(begin); took != time.Second {
			t.Errorf("took %v", took)
		}
	})
}

// TestApplyQueueIsBounded: who finds the queue full waits and gives up in time, and
// the room in the queue comes back.
func TestApplyQueueIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOwner(nil)
		open := make(chan struct{})
		o.before = func(_ context.Context, method string) error {
			if method == "Apply" {
				<-open
			}
			return nil
		}
		r := newTestRouter(t, func(l *routerLimits) { l.queueOps, l.callTimeout = 10, time.Hour }, o)
		var wg sync.WaitGroup
		for i := range 10 {
			wg.Go(func() { r.Apply(t.Context(), "s", "", []wire.Op{put("1", "m", fmt.Sprint(i), "v", 1)}) })
		}
		synctest.Wait()
		begin := time.Now()
		result := r.Apply(within(t, time.Second), "s", "", []wire.Op{put("1", "m", "one too many", "v", 1)})[0]
		if result.status != opUnavailable || result.code != 429 || time.Since(begin) != time.Second {
			t.Errorf("%+v after %v", result, time.Since(begin))
		}
		close(open)
		wg.Wait()
		if result = r.Apply(within(t, time.Second), "s", "", []wire.Op{put("1", "m", "one too many", "v", 1)})[0]; result.status != opApplied {
			t.Errorf("after the queue emptied: %+v", result)
		}
		if !r.ops.TryAcquire(r.limits.queueOps) || !r.bytes.TryAcquire(r.limits.queueBytes) {
			t.Error("room in the queue was not given back")
		}
	})
}

// TestApplyFollowsTheOwner: a shard moves; the op lands at its new owner (OWN-09).
func TestApplyFollowsTheOwner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		moved := atomic.Bool{}
		first := newOwner(func() []uint32 {
			if moved.Load() {
				return []uint32{0, 1}
			}
			return []uint32{0, 1, 2, 3}
		})
		second := newOwner(func() []uint32 {
			if moved.Load() {
				return []uint32{2, 3}
			}
			return nil
		})
		r := newTestRouter(t, nil, first, second)
		var ops []wire.Op
		for i := range 40 {
			ops = append(ops, put(fmt.Sprint(i), "m", fmt.Sprint(i), "v", 1))
		}
		for round := range 2 {
			for i, result := range r.Apply(within(t, 5*time.Second), "s", "", ops) {
				if result.status != opApplied && result.status != opDuplicate {
					t.Fatalf("round %d, op %d: %+v", round, i, result)
				}
			}
			moved.Store(true)
		}
		for _, op := range ops {
			if keyspace.ShardOf(op.Key, 4) >= 2 && second.record("m", op.Key) == nil {
				t.Errorf("key %s is not at its new owner", op.Key)
			}
		}
	})
}

func TestApplyWithoutOwnerIsUnavailable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOwner(func() []uint32 { return []uint32{0, 1, 2} })
		r := newTestRouter(t, nil, o)
		var ops []wire.Op
		for i := range 20 {
			ops = append(ops, put(fmt.Sprint(i), "m", fmt.Sprint(i), "v", 1))
		}
		for i, result := range r.Apply(within(t, time.Second), "s", "", ops) {
			want := opApplied
			if keyspace.ShardOf(ops[i].Key, 4) == 3 {
				want = opUnavailable
			}
			if result.status != want {
				t.Errorf("op %d: %+v", i, result)
			}
		}
		if r.Ready() == nil {
			t.Error("ready although a shard has no owner")
		}
		if _, err := r.Leaves(within(t, time.Second), kindLWW, "m", merkle.Mixed); !errors.Is(err, errUnavailable) {
			t.Errorf("a read that cannot be whole: %v", err)
		}
	})
}

func TestLearnIsShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOwner(nil)
		open := make(chan struct{})
		o.before = func(context.Context, string) error { <-open; return nil }
		r := newTestRouter(t, nil, o)
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				if _, err := r.learn(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		close(open)
		wg.Wait()
		if n := o.called("Describe"); n != 2 {
			t.Errorf("100 callers caused %d rounds, want 2", n)
		}
	})
}

func TestCloseEndsCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOwner(nil)
		o.before = func(ctx context.Context, method string) error {
			if method == "Apply" {
				<-ctx.Done()
				return ctx.Err()
			}
			return nil
		}
		r := newTestRouter(t, nil, o)
		var wg sync.WaitGroup
		wg.Go(func() {
			if result := r.Apply(t.Context(), "s", "", []wire.Op{put("1", "m", "k", "v", 1)})[0]; result.status != opUnavailable {
				t.Errorf("%+v", result)
			}
		})
		synctest.Wait()
		r.close()
		wg.Wait()
		if result := r.Apply(t.Context(), "s", "", []wire.Op{put("1", "m", "k", "v", 1)})[0]; result.status != opUnavailable {
			t.Errorf("after close: %+v", result)
		}
	})
}

// TestApplyNewerMapVersionAsksAgain: an answer that tells of a newer shard map makes
// the table stale.
func TestApplyNewerMapVersionAsksAgain(t *testing.T) {
	o := newOwner(nil)
	o.answer = func(_ *partitionv1.ApplyRequest, response *partitionv1.ApplyResponse) { response.MapVersion = 2 }
	r := newTestRouter(t, nil, o)
	for i := range 2 {
		r.Apply(within(t, patience), "s", "", []wire.Op{put("1", "m", "k", "v", uint64(i+1))})
	}
	if n := o.called("Describe"); n != 2 {
		t.Errorf("%d rounds of Describe, want 2", n)
	}
}

func TestOwnersThatContradictEachOtherAreNotUsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, second := newOwner(func() []uint32 { return []uint32{0, 1} }), newOwner(func() []uint32 { return []uint32{2, 3} })
		second.history = "another"
		r := newTestRouter(t, nil, first, second)
		if _, err := r.learn(t.Context()); !errors.Is(err, errUnavailable) {
			t.Errorf("two histories: %v", err)
		}
		second.history, second.shards = first.history, 5
		if _, err := r.learn(t.Context()); !errors.Is(err, errUnavailable) {
			t.Errorf("two shard counts: %v", err)
		}
	})
}
