package persistence

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"

	"github.com/topgun-sync/topgun/services/internal/commitlog"
)

// Log is what the service needs of the write-behind log; *commitlog.Log is one.
type Log interface {
	// History is the identity of the log.
	History() string
	// LastSequence is the sequence of the log's last commit, 0 for none.
	LastSequence(ctx context.Context) (uint64, error)
	// Read yields commits in stream order from a sequence on, and waits for further
	// ones if follow is set.
	Read(ctx context.Context, from uint64, follow bool) iter.Seq2[commitlog.Entry, error]
	// Trim removes a lane's commits below a sequence.
	Trim(ctx context.Context, lane string, upTo uint64) error
	// Expired is a sequence below which commits were appended before a time or are not
	// among the last bytes of the log.
	Expired(ctx context.Context, before time.Time, keep int64) (uint64, error)
}

// queued is how many commits wait between the reader and the batch; a full queue
// makes the reader wait. A commit is at most 768 KiB, so they are at most 12 MiB.
const queued = 16

const (
	// pace is how many times as long as a transaction took the next batch gathers
	// commits. A store that is hardly used is quick, and a commit then waits a few
	// milliseconds; the more there is to store the longer transactions take, and the
	// more commits share the next.
	pace = 5
	// leastDelay is how long a batch gathers at least, so that reading a backlog is not
	// cut into many by a store that takes no time.
	leastDelay = 2 * time.Millisecond
)

// drain stores the log until ctx ends. Each round begins with the watermarks of
// the store, so that whatever went wrong, the store alone says where to go on:
//
//	┌─▶ read watermarks ─▶ check the log's end ─▶ read, batch, commit ─┐
//	│                                                                  │
//	└── wait, with growing delays ◀── conflict, store or log away ◀────┘
//	                                  hole or unknown commit ─▶ halted
func (s *Service) drain(ctx context.Context) {
	delays := newDelays()
	for {
		err := s.drainRound(ctx, delays)
		if ctx.Err() != nil {
			return
		}
		if errors.Is(err, errHalted) {
			s.setTrouble(ctx, err)
			<-ctx.Done()
			return
		}
		if errors.Is(err, ErrConflict) || errors.Is(err, errWentBack) {
			// Not a trouble by itself: the next round reads where the store is.
			s.logger.WarnContext(ctx, "starting again from the store's watermarks", "error", err)
		} else {
			s.setTrouble(ctx, err)
		}
		if !sleep(ctx, delays.NextBackOff()) {
			return
		}
	}
}

// newDelays returns the waiting times between tries: growing, so that a store that
// comes back is not pressed, and with jitter, so that drainers do not meet.
func newDelays() *backoff.ExponentialBackOff {
	delays := backoff.NewExponentialBackOff()
	delays.InitialInterval = 50 * time.Millisecond
	delays.MaxInterval = 5 * time.Second
	return delays
}

// sleep waits and reports whether ctx still lives.
func sleep(ctx context.Context, delay time.Duration) bool {
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

type item struct {
	entry commitlog.Entry
	err   error
}

func (s *Service) drainRound(ctx context.Context, delays *backoff.ExponentialBackOff) error {
	// What was said before this reading is answered by it.
	select {
	case <-s.wentBack:
	default:
	}
	if err := s.readWatermarks(ctx); err != nil {
		return err
	}
	s.setTrouble(ctx, nil)

	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	items := make(chan item, queued)
	from := s.storedSequence() + 1
	wg.Go(func() {
		defer close(items)
		for entry, err := range s.log.Read(ctx, from, true) {
			select {
			case items <- item{entry, err}:
			case <-ctx.Done():
				return
			}
		}
	})

	// The first batch of a round does not wait for company.
	next, room := time.Now(), 0
	for {
		b, stop := s.collect(ctx, items, next, room)
		if b.commits > 0 {
			room = len(b.records)
			closed := time.Now()
			// What came before a commit that cannot be stored is stored first.
			if err := s.commit(ctx, b); err != nil {
				return err
			}
			next = closed.Add(min(s.config.BatchDelay, max(leastDelay, pace*time.Since(closed))))
			delays.Reset()
		}
		if stop != nil {
			return stop
		}
	}
}

// readWatermarks finds out how far the store is in this history of the log and
// checks that the log reaches as far.
func (s *Service) readWatermarks(ctx context.Context) error {
	attempt, cancel := context.WithTimeout(ctx, s.config.StoreTimeout)
	defer cancel()
	all, err := s.store.Watermarks(attempt)
	if err != nil {
		return err
	}
	marks := make(map[string]Position)
	stored, others := uint64(0), 0
	for _, mark := range all {
		if mark.History != s.log.History() {
			others++
			continue
		}
		marks[mark.Lane] = mark.Position
		stored = max(stored, mark.Sequence)
	}
	end, err := s.log.LastSequence(attempt)
	if err != nil {
		return fmt.Errorf("%w: %w", errLog, err)
	}
	if end < stored {
		return fmt.Errorf("%w: the store holds sequence %d of the log, whose last is %d: the log has lost commits (history %s)",
			errHalted, stored, end, s.log.History())
	}
	if len(marks) == 0 && others > 0 {
		// Not a fault here: what the store holds stays right. Whether the loss of the
		// old log lost commits only the shards can tell (RELIABILITY LOG-04).
		s.logger.WarnContext(ctx, "the store was filled from another log; starting at the beginning of this one",
			"history", s.log.History(), "lanes_of_others", others)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.marks, s.stored, s.end = marks, stored, end
	s.wake()
	return nil
}

// collect takes commits until the batch is full or due. A batch is due at next,
// which is at most BatchDelay after the one before it was closed: under steady
// traffic batches fill, after a quiet time the first commit is stored at once, and
// no commit waits longer than BatchDelay. A Flush that waits makes it due at once.
//
// room is how many records to expect. A non-nil error says why nothing more comes; the
// batch holds what came before.
func (s *Service) collect(ctx context.Context, items <-chan item, next time.Time, room int) (*batch, error) {
	s.mu.Lock()
	b := newBatch(s.marks, s.stored, room)
	s.mu.Unlock()

	var due <-chan time.Time // nil, which never fires, while the batch is empty
	var limit time.Time
	for {
		var it item
		var ok bool
		// What is there already is taken first, so that being due ends a batch only
		// when nothing waits, or when it has gone on long enough.
		select {
		case it, ok = <-items:
		default:
			if b.commits > 0 && (s.urgent() || !time.Now().Before(next)) {
				return b, nil
			}
			select {
			case it, ok = <-items:
			case <-due:
				return b, nil
			case <-s.hurry:
				continue
			case <-s.wentBack:
				return b, errWentBack
			case <-ctx.Done():
				return b, ctx.Err()
			}
		}
		if !ok {
			// The reader ended without an error: only its context can be the reason.
			return b, cmp.Or(ctx.Err(), errLog)
		}
		if it.err != nil {
			if errors.Is(it.err, commitlog.ErrUnreadable) {
				return b, fmt.Errorf("%w: %w", errHalted, it.err)
			}
			return b, fmt.Errorf("%w: %w", errLog, it.err)
		}
		if err := b.add(it.entry); err != nil {
			return b, err
		}
		if b.commits == 1 {
			now := time.Now()
			limit = now.Add(s.config.BatchDelay)
			timer := time.NewTimer(next.Sub(now))
			defer timer.Stop()
			due = timer.C
		}
		if b.rows() >= s.config.BatchChanges || b.bytes >= s.config.BatchBytes || !time.Now().Before(limit) {
			return b, nil
		}
	}
}

// urgent reports whether a Flush waits for more than is stored.
func (s *Service) urgent() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.flushTo > s.stored
}

// commit stores a batch, however long the store is away: the log is the queue and
// waits (RELIABILITY PG-04). It returns nil when the batch is stored, and else
// ErrConflict, errWentBack or the context's error.
func (s *Service) commit(ctx context.Context, b *batch) error {
	delays := newDelays()
	for {
		changed, err := s.try(ctx, b)
		if err == nil {
			s.metrics.stored(ctx, b, changed)
			s.advance(b)
			s.setTrouble(ctx, nil)
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if errors.Is(err, ErrConflict) {
			// Also the answer if an earlier try was stored and its outcome was lost.
			return err
		}
		s.setTrouble(ctx, err)
		if !sleep(ctx, delays.NextBackOff()) {
			return ctx.Err()
		}
	}
}

// try runs one transaction, as one span that continues the trace of the batch's
// first commit and links to the others.
func (s *Service) try(ctx context.Context, b *batch) (changed int, err error) {
	options := []trace.SpanStartOption{
		trace.WithSpanKind(trace.SpanKindConsumer),
		trace.WithAttributes(attribute.Int("topgun.commits", b.commits), attribute.Int("topgun.rows", b.rows())),
	}
	if len(b.traces) > 0 {
		ctx = trace.ContextWithRemoteSpanContext(ctx, b.traces[0])
		for _, span := range b.traces[1:] {
			options = append(options, trace.WithLinks(trace.Link{SpanContext: span}))
		}
	}
	ctx, span := s.tracer.Start(ctx, "persistence.store", options...)
	defer span.End()
	attempt, cancel := context.WithTimeout(ctx, s.config.StoreTimeout)
	defer cancel()
	start := time.Now()
	changed, err = s.store.Commit(attempt, b.batch(s.log.History()))
	s.metrics.tried(ctx, time.Since(start), err)
	if err != nil {
		span.SetStatus(codes.Error, "not stored")
	}
	return changed, err
}

// advance notes that a batch is stored.
func (s *Service) advance(b *batch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	// A new map, since the batch and the watch may hold the old one.
	marks := maps.Clone(s.marks)
	for lane, move := range b.moves {
		marks[lane] = move.To
	}
	s.marks, s.stored, s.end = marks, b.last, max(s.end, b.last)
	s.wake()
}
