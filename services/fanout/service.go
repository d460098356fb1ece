package fanout

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

	"connectrpc.com/connect/v2"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
	"google.golang.org/protobuf/proto"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1/fanoutv1connect"
	"github.com/topgun-sync/topgun/services/internal/bus"
)

// Service passes events on. Its methods may be called concurrently; Run once.
type Service struct {
	config Config
	bus    Bus
	logger *slog.Logger
	tracer trace.Tracer
	now    func() time.Time
	random io.Reader
	meters *meters

	// mu guards the interest and the tracker. The bus calls with one goroutine, so
	// what competes for it is Watch, which is rare. Locks are taken in this order:
	// mu, or a liveMap's mu; then an inbox's or a stream's. Evaluation of queries
	// happens under the second and never under the first.
	mu      sync.Mutex
	running bool
	streams map[string]*stream
	maps    map[string]*watchedMap
	topics  map[string]*watchedTopic
	// queries counts the live queries of all streams, equal ones too.
	queries int
	tracker *tracker

	partitions *partitions
	plan       readPlan
	// crew works for live queries.
	crew crew
	// evaluators counts distinct queries, queriesBytes the bytes of their rows, and
	// inboxBytes those of the events that wait for them, over all maps.
	evaluators   atomic.Int64
	queriesBytes atomic.Int64
	inboxBytes   atomic.Int64
}

// New checks the configuration and returns a service that does nothing before Run.
func New(config Config, deps Deps) (*Service, error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	if deps.Bus == nil {
		return nil, errors.New("fanout: Deps.Bus is missing")
	}
	s := &Service{
		config:  config,
		bus:     deps.Bus,
		logger:  deps.Logger,
		tracer:  deps.Tracer,
		now:     deps.Now,
		random:  deps.Random,
		streams: make(map[string]*stream),
		maps:    make(map[string]*watchedMap),
		topics:  make(map[string]*watchedTopic),
		plan:    readPlan{separateReads, pageRows},
	}
	if s.logger == nil {
		s.logger = slog.New(slog.DiscardHandler)
	}
	if s.tracer == nil {
		s.tracer = tracenoop.NewTracerProvider().Tracer("")
	}
	if s.now == nil {
		s.now = time.Now
	}
	if s.random == nil {
		s.random = rand.Reader
	}
	s.tracker = newTracker(config.HeartbeatPeriod, config.MaxPositions, func(name string) bool {
		return s.maps[name] != nil
	})
	var err error
	if s.partitions, err = newPartitions(deps.Partitions, config.MaxReads); err != nil {
		return nil, fmt.Errorf("fanout: %w", err)
	}
	if s.meters, err = newMeters(deps.Meter); err != nil {
		return nil, fmt.Errorf("fanout: %w", err)
	}
	return s, nil
}

// Register registers the service's RPC on server.
func (s *Service) Register(server *connect.Server) {
	fanoutv1connect.RegisterFanoutServiceHandler(server, rpcHandler{s})
}

// Ready is nil while events arrive, else the reason why not.
func (s *Service) Ready() error {
	s.mu.Lock()
	running := s.running
	s.mu.Unlock()
	if !running {
		return errNotRunning
	}
	return s.bus.Ready()
}

// busRetry is the pause between attempts to reach the bus at the start.
const busRetry = 250 * time.Millisecond

// Run passes events on until ctx ends. Then it ends all streams and returns when
// nothing of the service runs any more, but for RPCs, which belong to their server.
func (s *Service) Run(ctx context.Context) error {
	unobserve, err := s.meters.observe(s)
	if err != nil {
		return fmt.Errorf("run fanout: %w", err)
	}
	defer unobserve()
	s.bus.OnLoss(s.onLoss)
	heartbeats, err := s.bus.SubscribeHeartbeats(s.onHeartbeat)
	if err != nil {
		return fmt.Errorf("run fanout: %w", err)
	}
	s.crew.start(ctx, s.config.MaxReads)
	defer s.stop(heartbeats)
	for {
		err := s.bus.Flush(ctx)
		if err == nil {
			break
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(busRetry):
		}
	}
	s.mu.Lock()
	s.running = true
	s.mu.Unlock()

	ticker := time.NewTicker(s.config.HeartbeatPeriod / 2)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			s.checkClaims()
		case <-ctx.Done():
			return nil
		}
	}
}

func (s *Service) stop(heartbeats bus.Subscription) {
	s.bus.OnLoss(nil)
	if err := heartbeats.Unsubscribe(); err != nil {
		s.logger.Warn("unsubscribe from heartbeats", "error", err)
	}
	s.mu.Lock()
	s.running = false
	for _, st := range s.streams {
		st.close(errNotRunning)
		s.detachLocked(st)
	}
	s.mu.Unlock()
	s.crew.stop()
}

// open adds a stream.
func (s *Service) open(gateway string) (*stream, error) {
	id := make([]byte, 16)
	if _, err := io.ReadFull(s.random, id); err != nil {
		return nil, fmt.Errorf("name a stream: %w", err)
	}
	st := newStream(hex.EncodeToString(id), gateway, limits{s.config.QueueEvents, s.config.QueueBytes}, s.meters)
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.running {
		return nil, errNotRunning
	}
	if len(s.streams) >= s.config.MaxStreams {
		return nil, errTooManyStreams
	}
	s.streams[st.id] = st
	return st, nil
}

// closeStream removes a stream that its RPC serves no more.
func (s *Service) closeStream(st *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st.close(errNoStream)
	s.detachLocked(st)
}

// onEvent takes an event from the bus and queues it for the streams that watch its
// map. The message is built once and shared; nobody changes it.
func (s *Service) onEvent(ctx context.Context, event *fanoutv1.Event) {
	ctx, span := s.tracer.Start(ctx, "fanout.event", trace.WithSpanKind(trace.SpanKindConsumer))
	defer span.End()
	message := &fanoutv1.SubscribeResponse{Message: &fanoutv1.SubscribeResponse_Event{Event: event}}
	size := proto.Size(event)
	s.meters.eventsIn.Add(ctx, 1)

	s.mu.Lock()
	defer s.mu.Unlock()
	name := event.GetMap()
	w := s.maps[name]
	if w == nil {
		// It was on its way when the last stream lost interest. The tracker must
		// not see it either: positions of unwatched maps move by heartbeats.
		return
	}
	if span.IsRecording() {
		span.SetAttributes(
			attribute.Int64("shard", int64(event.GetShard())),
			attribute.Int("changes", len(event.GetChanges())),
			attribute.Int("streams", len(w.streams)))
	}
	switch s.tracker.event(event, s.now()) {
	case covered:
		return
	case missing:
		s.gapLocked(name, w, causeSequence)
	case laneChanged:
		s.gapAllLocked(causeLane)
	}
	for st := range w.streams {
		s.settleLocked(st, st.push(name, message, size))
	}
	if w.live != nil {
		w.live.event(event, size)
	}
}

func (s *Service) onHeartbeat(heartbeat *fanoutv1.Heartbeat) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.tracker.heartbeat(heartbeat, s.now()) {
		s.gapAllLocked(causeLane)
	}
}

func (s *Service) onLoss() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.topics) > 0 {
		s.meters.topicLosses.Add(context.Background(), 1)
	}
	s.gapAllLocked(causeBus)
}

// checkClaims gives up on events that heartbeats promised.
func (s *Service) checkClaims() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, name := range s.tracker.overdue(s.now()) {
		if w := s.maps[name]; w != nil {
			s.gapLocked(name, w, causeHeartbeat)
		}
	}
}

func (s *Service) gapAllLocked(cause string) {
	s.logger.Info("events may be missing in every map", "cause", cause, "maps", len(s.maps))
	for name, w := range s.maps {
		s.gapLocked(name, w, cause)
	}
}

func (s *Service) gapLocked(name string, w *watchedMap, cause string) {
	s.meters.gap(cause)
	for st := range w.streams {
		s.settleLocked(st, st.gap(name))
	}
	if w.live != nil {
		w.live.gap()
	}
}

// settleLocked deals with what became of a queued message.
func (s *Service) settleLocked(st *stream, result outcome) {
	switch result {
	case overflowed:
		s.meters.gap(causeOverflow)
	case tooSlow:
		// Its RPC may be stuck in a send; the interest must not wait for that.
		s.logger.Warn("stream ended: read too slowly", "gateway", st.gateway)
		s.detachLocked(st)
	}
}

// describe counts streams, maps, distinct queries and topics.
func (s *Service) describe() (streams, maps, queries, topics int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.streams), len(s.maps), int(s.evaluators.Load()), len(s.topics)
}

// queued sums what waits over all streams.
func (s *Service) queued() (messages, bytes int) {
	s.mu.Lock()
	streams := make([]*stream, 0, len(s.streams))
	for _, st := range s.streams {
		streams = append(streams, st)
	}
	s.mu.Unlock()
	for _, st := range streams {
		m, b := st.depth()
		messages += m
		bytes += b
	}
	return messages, bytes
}
