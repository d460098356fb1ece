package persistence

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"go.opentelemetry.io/otel/metric"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
)

var (
	// errHalted means that the drain met something that it must not pass over. It
	// stays halted until the process is started again.
	errHalted = errors.New("the drain has halted")
	// errLog means that the log cannot be read at present.
	errLog = errors.New("the log is unavailable")
	// errWentBack means that the store or the log shows an older state than before.
	errWentBack = errors.New("the store or the log went back to an older state")
	// errStopping means that Run has ended or is about to.
	errStopping = errors.New("the service is stopping")
	// errStarting is the reason for not being ready before the first reading.
	errStarting = errors.New("the store and the log have not been read yet")
)

// Deps are the collaborators of a Service.
type Deps struct {
	// Store keeps the records. Whoever opened it closes it, after Run has returned.
	Store Store
	// Log is the write-behind log.
	Log Log
	// Logger takes one line per event.
	Logger *slog.Logger
	// Meter and Tracer may be nil.
	Meter  metric.Meter
	Tracer trace.Tracer
	// Now is the clock by which commits age before they are trimmed; nil means
	// time.Now.
	Now func() time.Time
}

// Service drains the log into the store and answers the RPCs of
// PersistenceService. Its methods may run at the same time; Run runs once.
type Service struct {
	config  Config
	store   Store
	log     Log
	logger  *slog.Logger
	tracer  trace.Tracer
	metrics *metrics
	now     func() time.Time

	// hurry wakes a drain that waits for more commits, since a Flush waits for it.
	hurry chan struct{}
	// wentBack tells the drain that the store or the log is behind what the drain
	// believes.
	wentBack chan struct{}
	// stopping is closed when Run is to end: whoever follows ends as well.
	stopping chan struct{}
	journal  *journal

	mu sync.Mutex
	// marks are the stored positions of the log's lanes, as the drain knows them; nil
	// until they have been read. The map is never changed, only replaced.
	marks map[string]Position
	// stored is the highest sequence up to which everything is stored.
	stored uint64
	// flushTo is the highest sequence that a Flush waits for.
	flushTo uint64
	// trouble is why the service is not ready, nil when it is.
	trouble error
	// changed is closed and replaced when stored or trouble change.
	changed chan struct{}
	// end is the last sequence of the log, as last seen.
	end uint64
}

// New checks the settings and returns a service that Run starts.
func New(config Config, deps Deps) (*Service, error) {
	if err := config.Validate(); err != nil {
		return nil, fmt.Errorf("settings of persistence: %w", err)
	}
	if deps.Store == nil || deps.Log == nil || deps.Logger == nil {
		return nil, errors.New("persistence needs a store, a log and a logger")
	}
	if deps.Meter == nil {
		deps.Meter = metricnoop.Meter{}
	}
	if deps.Tracer == nil {
		deps.Tracer = tracenoop.Tracer{}
	}
	if deps.Now == nil {
		deps.Now = time.Now
	}
	s := &Service{
		config:   config,
		store:    deps.Store,
		log:      deps.Log,
		logger:   deps.Logger,
		tracer:   deps.Tracer,
		now:      deps.Now,
		hurry:    make(chan struct{}, 1),
		wentBack: make(chan struct{}, 1),
		stopping: make(chan struct{}),
		journal:  newJournal(deps.Log),
		trouble:  errStarting,
		changed:  make(chan struct{}),
	}
	var err error
	if s.metrics, err = newMetrics(deps.Meter, s); err != nil {
		return nil, fmt.Errorf("metrics of persistence: %w", err)
	}
	return s, nil
}

// Run drains the log until ctx ends and returns nil when all has ended. It
// survives a store or a log that is away, also at the start: Ready tells.
func (s *Service) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	wg.Go(func() { s.drain(ctx) })
	wg.Go(func() { s.watch(ctx) })
	wg.Go(func() { s.journal.run(ctx) })
	wg.Go(func() {
		<-ctx.Done()
		close(s.stopping)
	})
	wg.Wait()
	return s.metrics.close()
}

// Ready returns nil while the service stores what the log holds, and else why it
// does not.
func (s *Service) Ready() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.trouble
}

// setTrouble notes why the service is not ready, nil for ready, and logs when
// that changes.
func (s *Service) setTrouble(ctx context.Context, trouble error) {
	s.mu.Lock()
	before := s.trouble
	s.trouble = trouble
	if trouble != nil || before != nil {
		s.wake()
	}
	s.mu.Unlock()
	switch {
	case errors.Is(trouble, errHalted):
		s.logger.ErrorContext(ctx, "the drain has halted; nothing more is stored until an operator has looked", "error", trouble)
	case trouble != nil && (before == nil || errors.Is(before, errStarting)):
		s.logger.WarnContext(ctx, "the log is not being stored", "error", trouble)
	case trouble == nil && before != nil && !errors.Is(before, errStarting):
		s.logger.InfoContext(ctx, "the log is being stored", "sequence", s.storedSequence())
	}
}

// wake tells those who wait for a change; the caller holds the lock.
func (s *Service) wake() {
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *Service) storedSequence() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stored
}

// flush waits until everything that the log held when it was called is stored,
// and returns how far the store is then.
func (s *Service) flush(ctx context.Context) (uint64, error) {
	end, err := s.log.LastSequence(ctx)
	if err != nil {
		return 0, fmt.Errorf("flush: %w: %w", errLog, err)
	}
	for {
		s.mu.Lock()
		s.flushTo = max(s.flushTo, end)
		stored, trouble, changed := s.stored, s.trouble, s.changed
		s.mu.Unlock()
		switch {
		case stored >= end:
			return stored, nil
		case errors.Is(trouble, errHalted):
			return 0, fmt.Errorf("flush: %w", trouble)
		}
		select {
		case s.hurry <- struct{}{}:
		default: // it has been told already
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return 0, fmt.Errorf("flush: %w", ctx.Err())
		}
	}
}

type description struct {
	Stats
	stored, lag uint64
}

func (s *Service) describe(ctx context.Context) (description, error) {
	stats, err := s.store.Stats(ctx)
	if err != nil {
		return description{}, err
	}
	end, err := s.log.LastSequence(ctx)
	if err != nil {
		return description{}, fmt.Errorf("describe: %w: %w", errLog, err)
	}
	stored := s.storedSequence()
	// Above the stored sequence nothing has been trimmed, so a difference of
	// sequences counts commits.
	return description{Stats: stats, stored: stored, lag: end - min(end, stored)}, nil
}
