package partition

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	metricnoop "go.opentelemetry.io/otel/metric/noop"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
	"golang.org/x/sync/semaphore"

	logv1 "github.com/topgun-sync/topgun/gen/go/topgun/log/v1"
	"github.com/topgun-sync/topgun/services/internal/commitlog"
)

const (
	// retryBackoff and maxRetryBackoff are the pauses while the log or persistence
	// cannot be reached at the start.
	retryBackoff    = 50 * time.Millisecond
	maxRetryBackoff = 2 * time.Second
)

var (
	errLoading  = errors.New("the shards are being loaded")
	errStopping = errors.New("the service is stopping")
	errFull     = errors.New("the log is full: the store must drain it")
)

// phase is what the service is doing; exactly one field is set.
type phase struct {
	serving *active
	reason  error // why it does not serve
}

// active is what serves: the claimed and loaded shards and their lane.
type active struct {
	shards []*shard
	clock  *arrivalClock
	lane   *lane
	// version is the version of the shard map: the highest epoch of the claim.
	version uint64
}

// Service is the partition service. Its methods may be called concurrently; Run is
// called once.
type Service struct {
	config Config
	deps   Deps
	stats  *stats
	room   *semaphore.Weighted
	// queries bounds the queries under way.
	queries *semaphore.Weighted
	turns   *turns
	phase   atomic.Pointer[phase]
	// openLane opens the lane for writing. It is a field so that tests kill it.
	openLane func(name string) (appender, error)
}

// New checks the configuration and makes the service, which does nothing before Run.
func New(config Config, deps Deps) (*Service, error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	if deps.Log == nil || deps.Persistence == nil || deps.Events == nil {
		return nil, errors.New("partition: Log, Persistence and Events are required")
	}
	if deps.Logger == nil {
		deps.Logger = slog.New(slog.DiscardHandler)
	}
	if deps.Meter == nil {
		deps.Meter = metricnoop.NewMeterProvider().Meter("")
	}
	if deps.Tracer == nil {
		deps.Tracer = tracenoop.NewTracerProvider().Tracer("")
	}
	if deps.Now == nil {
		deps.Now = time.Now
	}
	if deps.Elapsed == nil {
		deps.Elapsed = monotonic()
	}
	if deps.Random == nil {
		deps.Random = rand.Reader
	}
	stats, err := newStats(deps.Meter)
	if err != nil {
		return nil, fmt.Errorf("partition: %w", err)
	}
	s := &Service{
		config: config, deps: deps, stats: stats,
		room: semaphore.NewWeighted(config.MaxPendingBytes), queries: semaphore.NewWeighted(maxQueries),
		turns: newTurns(deps.Elapsed),
	}
	s.openLane = func(name string) (appender, error) { return deps.Log.OpenLane(name) }
	s.phase.Store(&phase{reason: errLoading})
	return s, nil
}

// Ready is nil while the service can apply ops and answer reads, else the reason.
func (s *Service) Ready() error {
	p := s.phase.Load()
	if p.reason != nil {
		return p.reason
	}
	if p.serving.lane.full() {
		return errFull
	}
	return nil
}

// Run claims the shards, loads them, and serves until ctx ends; it then logs what
// was merged, gives the shards back and returns nil. It returns ErrFenced when
// another process took the shards over, ErrLogReplaced, ErrLogWentBack or
// ErrStoreBehind when log and store do not belong together, and other errors when
// the log cannot be read or not be closed in time. The service cannot run again.
func (s *Service) Run(ctx context.Context) error {
	a, err := s.start(ctx)
	if err == nil {
		err = s.serve(ctx, a)
	}
	switch {
	case err == nil || ctx.Err() != nil && errors.Is(err, ctx.Err()):
		s.phase.Store(&phase{reason: errStopping})
		return nil
	case errors.Is(err, ErrFenced):
		s.deps.Logger.Error("fenced: another process took the shards over")
	}
	s.phase.Store(&phase{reason: err})
	return err
}

// start claims and loads.
func (s *Service) start(ctx context.Context) (*active, error) {
	suffix := make([]byte, 8)
	if _, err := io.ReadFull(s.deps.Random, suffix); err != nil {
		return nil, fmt.Errorf("name the lane: %w", err)
	}
	writer, err := s.openLane(s.config.NodeID + "-" + hex.EncodeToString(suffix))
	if err != nil {
		return nil, fmt.Errorf("open the lane: %w", err)
	}
	count := s.deps.Log.Shards()
	all := make([]int, count)
	for i := range all {
		all[i] = i
	}
	var claimed commitlog.Claimed
	err = s.retry(ctx, "claim the shards", func(ctx context.Context) error {
		claimed, err = s.deps.Log.Claim(ctx, s.config.NodeID, writer.Name(), all)
		return err
	})
	if err != nil {
		return nil, err
	}
	a := &active{clock: new(arrivalClock)}
	for _, c := range claimed.Shards {
		a.version = max(a.version, c.GetEpoch())
	}
	floor := arrivalFromProto(claimed.Ceiling)
	a.clock.raise(floor)
	a.lane = newLane(writer, count, s.deps.Now, s.deps.Tracer, s.room, s.stats, s.deps.Logger)
	claim := &logv1.Commit{Body: &logv1.Commit_Claim{Claim: &logv1.Claim{NodeId: s.config.NodeID, Shards: claimed.Shards}}}
	if _, err := a.lane.append(ctx, claim, floor); err != nil {
		return nil, fmt.Errorf("claim the shards: %w", err)
	}
	err = s.retry(ctx, "load the shards", func(ctx context.Context) error {
		a.shards, err = s.load(ctx, a)
		return err
	})
	if err != nil {
		return nil, err
	}
	for _, shard := range a.shards {
		shard.lane = a.lane
	}
	return a, nil
}

// final are the errors that trying again does not cure.
var final = []error{
	ErrFenced, ErrLogReplaced, ErrLogWentBack, ErrStoreBehind, ErrUnreadable,
	commitlog.ErrUnreadable, commitlog.ErrSealed,
}

// retry does something until it succeeds, fails for good, or ctx ends.
func (s *Service) retry(ctx context.Context, what string, do func(context.Context) error) error {
	for backoff := retryBackoff; ; backoff = min(2*backoff, maxRetryBackoff) {
		err := do(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%s: %w", what, ctx.Err())
		}
		for _, f := range final {
			if errors.Is(err, f) {
				return fmt.Errorf("%s: %w", what, err)
			}
		}
		s.deps.Logger.Warn("starting takes another try", "step", what, "error", err)
		timer := time.NewTimer(backoff)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("%s: %w", what, ctx.Err())
		}
	}
}

// serve runs shards, lane and publisher until ctx ends or the lane does.
func (s *Service) serve(ctx context.Context, a *active) error {
	// What was merged must be logged although ctx has ended.
	work, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	stop := make(chan struct{})
	var shards, publishing sync.WaitGroup
	for _, shard := range a.shards {
		shards.Go(func() { shard.run(stop) })
	}
	publisher := newPublisher(s.deps.Events, a.lane.writer.Name(), len(a.shards), s.deps.Now, s.deps.Logger)
	publishing.Go(func() { publisher.run(work, a.lane.published) })
	ended := make(chan error, 1)
	go func() { ended <- a.lane.run(work) }()

	s.stats.active.Store(a)
	defer s.stats.active.Store(nil)
	s.phase.Store(&phase{serving: a})
	s.deps.Logger.Info("serving", "lane", a.lane.writer.Name(), "shards", len(a.shards), "history", s.deps.Log.History())

	var err error
	select {
	case err = <-ended:
		s.phase.Store(&phase{reason: err})
		defer time.AfterFunc(s.config.StopTimeout, cancel).Stop()
		close(stop)
		shards.Wait()
	case <-ctx.Done():
		s.phase.Store(&phase{reason: errStopping})
		defer time.AfterFunc(s.config.StopTimeout, cancel).Stop()
		close(stop)
		shards.Wait()
		a.lane.close()
		if err = <-ended; errors.Is(err, context.Canceled) {
			err = fmt.Errorf("stop: the lane was not closed within %s: %w", s.config.StopTimeout, errStopped)
		}
	}
	publishing.Wait()
	return err
}
