package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/keyspace"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/wire"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/partition/v1/partitionv1connect"
)

// errUnavailable says that an owner could not be reached, or did not serve its
// shards, until the caller's context ended. The same read may work later.
var errUnavailable = errors.New("owner unavailable")

// opStatus says what became of one op.
type opStatus uint8

const (
	// opUnavailable: nobody took the op before the context ended, or nobody knows.
	// The client must send it again; sending it again is harmless (ACK-06).
	opUnavailable opStatus = iota
	// opApplied: the op won and is stored as sent.
	opApplied
	// opDuplicate: the same record was there already.
	opDuplicate
	// opSuperseded: a record with a greater stamp stays; it is the winner.
	opSuperseded
	// opRestamped: the stamp was too far in the future; the winner is what is stored.
	opRestamped
	// opRejected: the op can never be applied.
	opRejected
)

// opResult is the answer to one op.
type opResult struct {
	status opStatus
	// winner is the record that the key holds, with opSuperseded and opRestamped.
	winner lwwmap.Record
	// code and reason say why, with opRejected and opUnavailable; reason is a fixed
	// text of the form "NAME: text".
	code   int
	reason string
	// retryAfter is the owner's hint, with opUnavailable; often zero.
	retryAfter time.Duration
	// level is how far an applied op got: MEMORY, APPLIED, REPLICATED or PERSISTED.
	level string
	// arrival covers the change of an applied op; its NodeID is empty.
	arrival hlc.Timestamp
	// lane and sequence say which commit the store must have for the op to be
	// PERSISTED; empty when the owner found it in the log.
	lane     string
	sequence uint64
}

// mapState is the Merkle state of one map over all its owners.
type mapState struct {
	leaves  merkle.Leaves
	records uint64
	// covered: every change up to this arrival is in the leaves. NodeID is empty.
	covered hlc.Timestamp
	// nowMillis is the owners' clock, at least covered.Millis.
	nowMillis uint64
}

// page is one piece of what arrived in a map after a position.
type page struct {
	// records in arrival order, tombstones included.
	records []keyed
	// covered is the position to go on from. NodeID is empty.
	covered hlc.Timestamp
	// more says that records above covered exist.
	more bool
}

const (
	// maxCallOps and maxCallBytes bound one Apply call; the first is the owner's
	// bound, the second keeps the call well below the read limit of the transport.
	maxCallOps   = 10_000
	maxCallBytes = 8 << 20
	firstBackoff = 10 * time.Millisecond
	maxBackoff   = time.Second
)

// router knows who owns which shard and carries ops and reads there. It keeps no
// other state about shards. Its methods may be called concurrently.
//
// Ops of all sessions travel together: while CallsPerOwner calls to an owner are in
// flight, what arrives meanwhile joins the next one, so the size of a call follows
// the load and an op on an idle gateway leaves at once.
type router struct {
	peers  []*peer
	limits routerLimits
	jitter func() float64 // in [0, 1)
	log    *slog.Logger

	ops   *semaphore.Weighted // ops waiting or in flight
	bytes *semaphore.Weighted // and the bytes of their keys and values

	base   context.Context // ends with close; calls outlive the caller that began them
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex
	table   *ownerTable // nil until learned, and when it is known to be stale
	last    *ownerTable // the newest learned, stale or not
	current *lesson     // being learned
	next    *lesson     // to be learned after current
}

type routerLimits struct {
	callsPerOwner int
	queueOps      int64
	queueBytes    int64
	callTimeout   time.Duration
}

// ownerTable says which peer serves which shard, as one round of Describe told.
type ownerTable struct {
	peers   []*peer    // by shard; nil where nobody serves it
	shards  [][]uint32 // by index of router.peers
	whole   bool       // every shard is served
	history string
	version uint64
	level   string
	kept    retention
}

// retention is how long tombstones are kept (PROTOCOL 22.5).
type retention struct {
	// period is the least over the owners; 0 means for ever.
	period time.Duration
	// pruned: tombstones from before this time, in Unix ms, are gone from every owner;
	// 0 when none were looked for.
	pruned uint64
}

// lesson is one round of Describe that several callers wait for.
type lesson struct {
	done  chan struct{}
	table *ownerTable
	err   error
}

func newRouter(clients []partitionv1connect.PartitionServiceClient, limits routerLimits, jitter func() float64, log *slog.Logger) *router {
	base, cancel := context.WithCancel(context.Background())
	r := &router{
		limits: limits,
		jitter: jitter,
		log:    log,
		ops:    semaphore.NewWeighted(limits.queueOps),
		bytes:  semaphore.NewWeighted(limits.queueBytes),
		base:   base,
		cancel: cancel,
	}
	for i, client := range clients {
		r.peers = append(r.peers, &peer{router: r, index: i, client: client, busy: make(map[line]bool)})
	}
	return r
}

// close ends the calls in flight and waits for their goroutines. What was not
// answered is opUnavailable.
func (r *router) close() {
	r.mu.Lock()
	r.cancel() // under the lock, so that nothing is started while it waits
	r.mu.Unlock()
	r.wg.Wait()
}

// Apply has the owners merge ops and waits for their receipts; result i belongs to
// op i. An op with Err set is rejected without travelling. Ops that nobody took before
// ctx ended are opUnavailable: whether they were applied is not known, and the client
// must send them again.
//
// origin names the session and is at most 128 bytes; traceParent is a W3C
// traceparent or empty. The ops of one origin to one shard are merged in their order,
// also those of a call that was made while an earlier one was waiting; only ops that
// must be sent again may come behind later ones, which merging makes harmless. The
// bytes of ops must never change after the call: a call that is abandoned may
// still be carrying them.
func (r *router) Apply(ctx context.Context, origin, traceParent string, ops []wire.Op) []opResult {
	results := make([]opResult, len(ops))
	pending := make([]int, 0, len(ops))
	for i := range ops {
		if reject := ops[i].Err; reject != nil {
			results[i] = opResult{status: opRejected, code: reject.Code, reason: reject.Error()}
			continue
		}
		results[i] = opResult{code: 503, reason: reasonUnavailable}
		pending = append(pending, i)
	}
	if pending = r.refuseLevels(ctx, ops, pending, results); len(pending) == 0 {
		return results
	}
	r.carry(ctx, origin, traceParent, opsToProto(ops), pending, results)
	return results
}

// carry sends the pending ones of protos until each has its result, or ctx ends.
func (r *router) carry(ctx context.Context, origin, traceParent string,
	protos []*partitionv1.Op, pending []int, results []opResult,
) {
	table, err := r.owners(ctx)
	for attempt := 0; ; attempt++ {
		var hint time.Duration
		if err == nil {
			pending, hint = r.round(ctx, table, origin, traceParent, protos, pending, results)
			if len(pending) == 0 {
				return
			}
		}
		if !r.pause(ctx, attempt, hint) {
			return
		}
		// Whatever the refusal was, who owns the shard may have changed with it.
		table, err = r.learn(ctx)
	}
}

const (
	reasonUnavailable = "UNAVAILABLE: the owner of the key cannot be reached; send the op again"
	reasonOverloaded  = "OVERLOADED: the queue or the log is full; send the op again later"
)

// round sends the pending ops once and fills in their results. It returns the ops
// that must be sent again, in order, and how long their owners asked to wait.
func (r *router) round(ctx context.Context, table *ownerTable, origin, traceParent string,
	protos []*partitionv1.Op, pending []int, results []opResult,
) (again []int, hint time.Duration) {
	units := make(map[int]*unit)
	answers := make(chan *unit, len(table.peers)) // one per shard at most, so nobody waits to answer
	var bytes int64
	// A shard's even share and half as much again: its lists seldom grow.
	share := 3*len(pending)/(2*len(table.peers)) + 1
	for _, i := range pending {
		shard := keyspace.ShardOf(string(protos[i].Key), len(table.peers))
		if table.peers[shard] == nil {
			again = append(again, i)
			continue
		}
		u := units[shard]
		if u == nil {
			u = &unit{ctx: ctx, answers: answers, indexes: make([]int, 0, share), ops: &partitionv1.ShardOps{
				Shard: uint32(shard), Origin: origin, TraceParent: traceParent,
				Ops: make([]*partitionv1.Op, 0, share),
			}}
			units[shard] = u
		}
		u.ops.Ops = append(u.ops.Ops, protos[i])
		u.indexes = append(u.indexes, i)
		size := opSize(protos[i])
		u.bytes += size
		bytes += size
	}
	count := len(pending) - len(again)
	if count == 0 {
		return again, 0
	}
	grant, err := r.admit(ctx, int64(count), bytes, len(units))
	if err != nil {
		for _, i := range pending {
			results[i].code, results[i].reason = 429, reasonOverloaded
		}
		return pending, 0
	}
	for shard, u := range units {
		u.grant = grant
		table.peers[shard].add(u)
	}
	for range len(units) {
		select {
		case u := <-answers:
			refused, wait := u.fill(results)
			again = append(again, refused...)
			hint = max(hint, wait)
			delete(units, int(u.ops.Shard))
		case <-ctx.Done():
			for _, u := range units {
				again = append(again, u.indexes...)
			}
			slices.Sort(again)
			return again, 0
		}
	}
	slices.Sort(again)
	return again, hint
}

// admission is room in the queue, given back when the last of its units is answered.
type admission struct {
	router     *router
	ops, bytes int64
	units      atomic.Int64
}

// admit waits for room for ops on their way, first come first served, until ctx ends.
func (r *router) admit(ctx context.Context, ops, bytes int64, units int) (*admission, error) {
	a := &admission{router: r, ops: min(ops, r.limits.queueOps), bytes: min(bytes, r.limits.queueBytes)}
	a.units.Store(int64(units))
	if err := r.ops.Acquire(ctx, a.ops); err != nil {
		return nil, err
	}
	if err := r.bytes.Acquire(ctx, a.bytes); err != nil {
		r.ops.Release(a.ops)
		return nil, err
	}
	return a, nil
}

func (a *admission) done() {
	if a.units.Add(-1) == 0 {
		a.router.ops.Release(a.ops)
		a.router.bytes.Release(a.bytes)
	}
}

// pause waits before attempt+1 and reports whether there is to be one.
func (r *router) pause(ctx context.Context, attempt int, hint time.Duration) bool {
	delay := min(firstBackoff<<min(attempt, 10), maxBackoff)
	delay = max(hint, delay/2) + time.Duration(r.jitter()*float64(delay))
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
	case <-r.base.Done():
	}
	return false
}

// start runs f in a goroutine that close waits for, or reports that close has begun.
func (r *router) start(f func()) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.base.Err() != nil {
		return false
	}
	r.wg.Go(f)
	return true
}

// owners returns the owner table, asking for it if it is not known.
func (r *router) owners(ctx context.Context) (*ownerTable, error) {
	r.mu.Lock()
	table := r.table
	r.mu.Unlock()
	if table != nil {
		return table, nil
	}
	return r.learn(ctx)
}

// learn returns an owner table that was asked for after the call began. Callers
// that come while one is being asked for share the next one, so that a thousand
// sessions with a refused op cost two rounds of Describe.
func (r *router) learn(ctx context.Context) (*ownerTable, error) {
	r.mu.Lock()
	var l *lesson
	switch {
	case r.base.Err() != nil:
		r.mu.Unlock()
		return nil, errUnavailable
	case r.current == nil:
		l = &lesson{done: make(chan struct{})}
		r.current = l
		r.wg.Go(func() { r.teach(l) })
	case r.next == nil:
		l = &lesson{done: make(chan struct{})}
		r.next = l
	default:
		l = r.next
	}
	r.mu.Unlock()
	select {
	case <-l.done:
		return l.table, l.err
	case <-ctx.Done():
		return nil, errUnavailable
	}
}

// teach runs lessons until nobody waits for another.
func (r *router) teach(l *lesson) {
	for l != nil {
		l.table, l.err = r.describe()
		r.mu.Lock()
		if l.err == nil {
			r.table, r.last = l.table, l.table
		} else {
			r.table = nil
		}
		r.current, r.next = r.next, nil
		following := r.current
		r.mu.Unlock()
		close(l.done)
		l = following
	}
}

// describe asks every peer what it serves.
func (r *router) describe() (*ownerTable, error) {
	ctx, cancel := context.WithTimeout(r.base, r.limits.callTimeout)
	defer cancel()
	answers := make([]*partitionv1.DescribeResponse, len(r.peers))
	group, ctx := errgroup.WithContext(ctx)
	for i, p := range r.peers {
		group.Go(func() (err error) {
			answers[i], err = p.client.Describe(ctx, &partitionv1.DescribeRequest{})
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, fmt.Errorf("ask the owners what they serve: %w: %w", errUnavailable, err)
	}
	return r.tableOf(answers)
}

func (r *router) tableOf(answers []*partitionv1.DescribeResponse) (*ownerTable, error) {
	t := &ownerTable{shards: make([][]uint32, len(answers))}
	first := true
	for i, a := range answers {
		if a.ShardCount < 1 || a.ShardCount > keyspace.PartitionCount {
			return nil, fmt.Errorf("owner describes %d shards: %w", a.ShardCount, errUnavailable)
		}
		if i == 0 {
			t.peers = make([]*peer, a.ShardCount)
			t.history = a.History
		}
		if level := levelName(a.Level); i == 0 || levelRank(level) < levelRank(t.level) {
			t.level = level // what every owner gives
		}
		if int(a.ShardCount) != len(t.peers) || a.History != t.history {
			return nil, fmt.Errorf("owners differ in shard count or history: %w", errUnavailable)
		}
		t.version = max(t.version, a.MapVersion)
		if len(a.Shards) > 0 {
			t.kept = t.kept.and(a, first)
			first = false
		}
		for _, shard := range a.Shards {
			if int(shard) >= len(t.peers) || t.peers[shard] != nil {
				continue // in a hand-off two may name a shard; the one that lost it refuses
			}
			t.peers[shard] = r.peers[i]
			t.shards[i] = append(t.shards[i], shard)
		}
	}
	t.whole = !slices.Contains(t.peers, nil)
	return t, nil
}

// and takes in what one more owner says. Retentions differ only while a changed
// setting is rolled out; then the shortest counts, as what it prunes is gone.
func (k retention) and(a *partitionv1.DescribeResponse, first bool) retention {
	period := time.Duration(min(a.TombstoneRetentionMillis, maxRetentionMillis)) * time.Millisecond
	if first {
		return retention{period: period, pruned: a.PrunedBeforeMillis}
	}
	if period > 0 && (k.period == 0 || period < k.period) {
		k.period = period
	}
	k.pruned = min(k.pruned, a.PrunedBeforeMillis)
	return k
}

// maxRetentionMillis keeps a retention within what a Duration holds, times four.
const maxRetentionMillis = uint64(math.MaxInt64 / int64(time.Millisecond) / 4)

// retention returns how long tombstones are kept, as last learned.
func (r *router) retention() retention {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.last == nil {
		return retention{}
	}
	return r.last.kept
}

// knownRetention is retention, but waits for it where nothing was learned yet: a gateway
// that has just started must not take a copy that is too old for a good one.
func (r *router) knownRetention(ctx context.Context) (retention, error) {
	r.mu.Lock()
	learned := r.last != nil
	r.mu.Unlock()
	if !learned {
		if _, err := r.learn(ctx); err != nil {
			return retention{}, err
		}
	}
	return r.retention(), nil
}

// shardCount is the number of shards, once an owner table was learned.
func (r *router) shardCount() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.last == nil {
		return 1
	}
	return len(r.last.peers)
}

// heard takes in a version of the shard map that an owner told: a newer one makes
// the table stale.
func (r *router) heard(version uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.table != nil && version > r.table.version {
		r.table = nil
	}
}

// history is the identity of the log, as last learned; empty before that.
func (r *router) history() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.last == nil {
		return ""
	}
	return r.last.history
}

// Ready is nil when every shard has an owner, as last learned.
func (r *router) Ready() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.last == nil:
		return errors.New("the owners of the shards are not known yet")
	case !r.last.whole:
		return errors.New("some shards have no owner")
	}
	return nil
}
