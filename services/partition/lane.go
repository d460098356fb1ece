package partition

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sync/semaphore"

	logv1 "github.com/topgun-sync/topgun/gen/go/topgun/log/v1"
	"github.com/topgun-sync/topgun/services/internal/commitlog"
)

const (
	// maxCommitEstimate closes a commit, by the estimate of changeBytes. The rest up
	// to the log's bound is room for what the estimate leaves out.
	maxCommitEstimate = commitlog.MaxCommitBytes - 16<<10
	// maxLinks bounds the links of a commit's span, and so what a commit remembers
	// of its ops.
	maxLinks = 32
	// checkPeriod is how often an idle lane asks the log whether it was sealed.
	checkPeriod = time.Second
	// fullBackoff and maxFullBackoff are the pauses before a full log is tried
	// again. It is full for as long as the store is away.
	fullBackoff    = 50 * time.Millisecond
	maxFullBackoff = 2 * time.Second
)

var (
	// ErrFenced means that another process took the shards over. Nothing of this
	// one is accepted any more: the process must start again.
	ErrFenced = errors.New("another process took the shards over")
	// errStopped means that the lane ended before the changes were logged; whether
	// they are in the log is unknown.
	errStopped = errors.New("the lane has ended")
)

// appender is the writer of the lane in the log: *commitlog.Lane.
type appender interface {
	Name() string
	Append(ctx context.Context, commit *logv1.Commit) (sequence uint64, err error)
	Check(ctx context.Context) error
}

// batch is what one commit will carry. Shards fill it while the commit before it is
// on its way; then it belongs to the lane, and when done is closed it is over.
type batch struct {
	shards  []*logv1.ShardChanges // by shard, nil where nothing changed
	origins [][]string            // beside each shard's changes
	size    int
	newest  arrival
	spans   []trace.SpanContext // of the ops that wait, at most maxLinks
	held    int64               // of the lane's room

	done chan struct{}
	err  error             // set before done is closed
	span trace.SpanContext // of the append, likewise
	// sequence is that of the commit in the stream, likewise.
	sequence uint64
}

// wait returns once the batch is in the log, or with the reason why that is not
// known. A nil batch is in the log.
func (b *batch) wait(ctx context.Context) error {
	if b == nil {
		return nil
	}
	select {
	case <-b.done:
		return b.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// lane collects what the shards changed and appends it to the log, one append at a
// time: what comes while one is in flight goes into the next. add, full, ceiling
// and wait may be called concurrently; run is called once.
type lane struct {
	writer appender
	shards int
	now    func() time.Time
	tracer trace.Tracer
	stats  *stats
	logger *slog.Logger
	// room bounds the ops that were taken and are not logged: whoever brings ops
	// acquires it, the lane releases it when they are logged.
	room *semaphore.Weighted
	// published takes what is logged to the publisher, in order. Its bound is the
	// number of commits by which the events may be late; then commits wait.
	published chan *batch

	isFull   atomic.Bool
	promised atomic.Pointer[arrival]

	mu     sync.Mutex
	queue  []*batch // the last one is open; bounded by room
	closed bool
	err    error         // why nothing is logged any more
	wake   chan struct{} // holds a token when the queue or closed changed
}

func newLane(writer appender, shards int, now func() time.Time, tracer trace.Tracer, room *semaphore.Weighted, stats *stats, logger *slog.Logger) *lane {
	l := &lane{
		writer: writer, shards: shards, now: now, tracer: tracer, room: room, stats: stats, logger: logger,
		published: make(chan *batch, 64),
		wake:      make(chan struct{}, 1),
	}
	l.promised.Store(new(arrival))
	return l
}

// full reports whether the log refuses appends for lack of space. Ops must then be
// refused before they are merged (ACK-04).
func (l *lane) full() bool { return l.isFull.Load() }

// ceiling is the clock ceiling of the last logged commit: no position above it may
// be handed out, since the next owner's arrivals start right above it.
func (l *lane) ceiling() arrival { return *l.promised.Load() }

// add hands over the changes of one shard, in arrival order; calls for one shard
// come from its goroutine. held is what the caller acquired of the lane's room. It
// returns the batch that the last change is in; earlier ones are logged before.
func (l *lane) add(shard int, changes []change, held int64, span trace.SpanContext) *batch {
	blocks := newChanges(changes)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		l.room.Release(held)
		return failedBatch(l.err)
	}
	var b *batch
	for i := range changes {
		size := changeBytes(&changes[i])
		if b = l.open(size); b.shards[shard] == nil {
			b.shards[shard] = &logv1.ShardChanges{Shard: uint32(shard)}
		}
		b.shards[shard].Changes = append(b.shards[shard].Changes, &blocks[i].change)
		b.origins[shard] = append(b.origins[shard], changes[i].origin)
		b.size += size
		b.newest = latest(b.newest, changes[i].arrival)
	}
	b.held += held
	if span.IsValid() && len(b.spans) < maxLinks {
		b.spans = append(b.spans, span)
	}
	l.signal()
	return b
}

// open returns the batch that takes a change of this size.
func (l *lane) open(size int) *batch {
	if n := len(l.queue); n > 0 && l.queue[n-1].size+size <= maxCommitEstimate {
		return l.queue[n-1]
	}
	b := &batch{
		shards:  make([]*logv1.ShardChanges, l.shards),
		origins: make([][]string, l.shards),
		done:    make(chan struct{}),
	}
	l.queue = append(l.queue, b)
	return b
}

func failedBatch(err error) *batch {
	b := &batch{done: make(chan struct{}), err: err}
	close(b.done)
	return b
}

// changeBytes estimates what a change takes in a commit, never too little.
func changeBytes(c *change) int {
	size := 128 + len(c.table) + len(c.key) + len(c.record.Value) + len(c.record.Timestamp.NodeID)
	for _, r := range c.restamped {
		size += 32 + len(r.NodeID)
	}
	return size
}

func (l *lane) signal() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// close says that nothing will be added any more. run then logs what waits, gives
// the shards back and seals the lane.
func (l *lane) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	l.signal()
}

// next takes the oldest batch, which nobody adds to from then on. It waits for one
// and returns nil when the lane is closed and empty. While it waits it looks now and
// then whether the lane is still its own: an owner without writes would serve old
// reads for ever.
func (l *lane) next(ctx context.Context) (*batch, error) {
	check := time.NewTicker(checkPeriod)
	defer check.Stop()
	for {
		l.mu.Lock()
		if len(l.queue) > 0 {
			b := l.queue[0]
			l.queue[0] = nil
			l.queue = l.queue[1:]
			l.mu.Unlock()
			return b, nil
		}
		closed := l.closed
		l.mu.Unlock()
		if closed {
			return nil, nil
		}
		select {
		case <-l.wake:
		case <-check.C:
			if errors.Is(l.writer.Check(ctx), commitlog.ErrSealed) {
				return nil, ErrFenced
			}
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// run logs batches until close was called and all are logged, and ends the lane;
// or until ctx ends or the log refuses for good, and fails everybody who waits.
func (l *lane) run(ctx context.Context) error {
	defer close(l.published)
	for {
		b, err := l.next(ctx)
		if b == nil && err == nil {
			return l.finish(ctx)
		}
		if err == nil {
			err = l.commit(ctx, b)
		}
		if err != nil {
			l.fail(b, err)
			return err
		}
	}
}

// fail ends every wait, of the batch in flight and of those behind it.
func (l *lane) fail(inFlight *batch, err error) {
	reason := errStopped
	if errors.Is(err, ErrFenced) {
		reason = ErrFenced
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.err = reason
	queue := l.queue
	l.queue = nil
	if inFlight != nil {
		queue = append([]*batch{inFlight}, queue...)
	}
	for _, b := range queue {
		b.err = reason
		l.room.Release(b.held)
		close(b.done)
	}
}

// commit appends a batch and completes it.
func (l *lane) commit(ctx context.Context, b *batch) error {
	body := &logv1.Changes{}
	for _, s := range b.shards {
		if s != nil {
			body.Shards = append(body.Shards, s)
		}
	}
	ctx, span := l.startSpan(ctx, b)
	defer span.End()
	sequence, err := l.append(ctx, &logv1.Commit{Body: &logv1.Commit_Changes{Changes: body}}, b.newest)
	if err != nil {
		span.SetStatus(codes.Error, "not logged")
		return err
	}
	b.span, b.sequence = span.SpanContext(), sequence
	l.room.Release(b.held)
	close(b.done) // the receipts
	select {
	case l.published <- b: // the events
	case <-ctx.Done(): // nobody is left to publish them; run ends by itself
	}
	return nil
}

// startSpan starts the span of an append: a child of the first waiting op's span,
// linked to the others.
func (l *lane) startSpan(ctx context.Context, b *batch) (context.Context, trace.Span) {
	if len(b.spans) == 0 {
		return l.tracer.Start(ctx, "lane.append")
	}
	links := make([]trace.Link, 0, len(b.spans)-1)
	for _, other := range b.spans[1:] {
		links = append(links, trace.Link{SpanContext: other})
	}
	return l.tracer.Start(trace.ContextWithSpanContext(ctx, b.spans[0]), "lane.append", trace.WithLinks(links...))
}

// append sets the clock ceiling and appends, for as long as the log is full again
// and again: the changes are merged, so they cannot be refused any more. newest is
// the newest arrival in the commit. It returns the commit's sequence in the stream.
func (l *lane) append(ctx context.Context, commit *logv1.Commit, newest arrival) (sequence uint64, err error) {
	ahead := arrival{millis: wallMillis(l.now().Add(ceilingLead))}
	ceiling := latest(latest(l.ceiling(), newest), ahead)
	commit.ClockCeiling = arrivalToProto(ceiling)
	start := l.now()
	for backoff := fullBackoff; ; backoff = min(2*backoff, maxFullBackoff) {
		sequence, err := l.writer.Append(ctx, commit)
		switch {
		case err == nil:
			if l.isFull.Swap(false) {
				l.logger.Info("the log takes commits again")
			}
			l.promised.Store(&ceiling)
			l.stats.appended(ctx, commit, l.now().Sub(start))
			return sequence, nil
		case errors.Is(err, commitlog.ErrSealed):
			return 0, ErrFenced
		case !errors.Is(err, commitlog.ErrFull):
			return 0, fmt.Errorf("log a commit: %w", err)
		}
		if !l.isFull.Swap(true) {
			l.logger.Error("the log is full: ops are refused until the store has drained it")
		}
		timer := time.NewTimer(backoff)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return 0, fmt.Errorf("log a commit: %w", ctx.Err())
		}
	}
}

// finish gives the shards back and closes the lane, so that the next owner need not.
func (l *lane) finish(ctx context.Context) error {
	l.mu.Lock()
	l.err = errStopped
	l.mu.Unlock()
	all := make([]uint32, l.shards)
	for i := range all {
		all[i] = uint32(i)
	}
	for _, commit := range []*logv1.Commit{
		{Body: &logv1.Commit_Release{Release: &logv1.Release{Shards: all}}},
		{Body: &logv1.Commit_Seal{Seal: &logv1.Seal{ByLane: l.writer.Name()}}},
	} {
		if _, err := l.append(ctx, commit, arrival{}); err != nil {
			return fmt.Errorf("close the lane: %w", err)
		}
	}
	return nil
}
