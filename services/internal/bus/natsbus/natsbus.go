// Package natsbus is the bus on core NATS: one subject for the heartbeats, one for
// each map, topgun.events.<base64url of the map's name>, and one for each topic,
// topgun.topics.<base64url of its name>, so that no name can reach into another's
// subject (SEC-01). The body of a message is the protobuf encoding of fanoutv1.Event,
// Heartbeat or TopicMessage; the header traceparent carries the trace.
//
// A bus owns one goroutine, which calls all handlers, so that a heartbeat is never
// handled before the events that its publisher sent earlier.
package natsbus

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/otel/propagation"
	"google.golang.org/protobuf/proto"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	"github.com/topgun-sync/topgun/services/internal/bus"
)

const (
	eventSubject     = "topgun.events."
	topicSubject     = "topgun.topics."
	heartbeatSubject = "topgun.heartbeats"

	// queueMessages bounds what waits for the dispatching goroutine. When it is full
	// the client library drops messages and reports a slow consumer, which is
	// handled as a loss. Handlers do not block, so it fills only when the process
	// gets no CPU.
	queueMessages = 8192

	// flushTimeout bounds the wait for the broker to know the subscriptions again
	// after a reconnect.
	flushTimeout = 5 * time.Second
)

var propagator = propagation.TraceContext{}

// Bus publishes and subscribes over one connection.
type Bus struct {
	nc     *nats.Conn
	logger *slog.Logger

	queue  chan *nats.Msg
	status chan nats.Status
	losses chan struct{}
	stop   chan struct{}
	wg     sync.WaitGroup

	mu       sync.Mutex
	handlers map[*nats.Subscription]func(*nats.Msg)
	lost     func()
	closed   bool
}

var (
	_ bus.Publisher  = (*Bus)(nil)
	_ bus.Subscriber = (*Bus)(nil)
)

// New returns a bus over nc, which stays the caller's and must outlive the bus. It
// takes over the connection's error handler, and calls the one it found. The caller
// must Close the bus.
func New(nc *nats.Conn, logger *slog.Logger) *Bus {
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	b := &Bus{
		nc:       nc,
		logger:   logger,
		queue:    make(chan *nats.Msg, queueMessages),
		status:   nc.StatusChanged(nats.CONNECTED),
		losses:   make(chan struct{}, 1),
		stop:     make(chan struct{}),
		handlers: make(map[*nats.Subscription]func(*nats.Msg)),
	}
	previous := nc.ErrorHandler()
	nc.SetErrorHandler(func(nc *nats.Conn, sub *nats.Subscription, err error) {
		if errors.Is(err, nats.ErrSlowConsumer) {
			b.noteLoss()
		}
		if previous != nil {
			previous(nc, sub, err)
		}
	})
	b.wg.Go(b.dispatch)
	b.wg.Go(b.watch)
	return b
}

// Close ends all subscriptions and waits for the handlers. The connection stays
// open.
func (b *Bus) Close() error {
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		return nil
	}
	b.closed = true
	subs := b.handlers
	b.handlers = nil
	b.mu.Unlock()

	var errs []error
	for sub := range subs {
		if err := sub.Unsubscribe(); err != nil && !gone(err) {
			errs = append(errs, err)
		}
	}
	b.nc.RemoveStatusListener(b.status)
	close(b.stop)
	b.wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close the bus: %w", err)
	}
	return nil
}

// gone says that there is nothing left to unsubscribe.
func gone(err error) bool {
	return errors.Is(err, nats.ErrConnectionClosed) || errors.Is(err, nats.ErrBadSubscription)
}

// PublishEvent implements bus.Publisher.
func (b *Bus) PublishEvent(ctx context.Context, event *fanoutv1.Event) error {
	return b.publish(ctx, subjectOf(eventSubject, event.GetMap()), event)
}

// PublishHeartbeat implements bus.Publisher.
func (b *Bus) PublishHeartbeat(ctx context.Context, heartbeat *fanoutv1.Heartbeat) error {
	return b.publish(ctx, heartbeatSubject, heartbeat)
}

// PublishTopic implements bus.Publisher.
func (b *Bus) PublishTopic(ctx context.Context, message *fanoutv1.TopicMessage) error {
	return b.publish(ctx, subjectOf(topicSubject, message.GetTopic()), message)
}

func (b *Bus) publish(ctx context.Context, subject string, message proto.Message) error {
	body, err := proto.Marshal(message)
	if err != nil {
		return fmt.Errorf("publish to the bus: %w", err)
	}
	msg := &nats.Msg{Subject: subject, Data: body}
	carrier := headerCarrier{msg}
	propagator.Inject(ctx, carrier)
	if err := b.nc.PublishMsg(msg); err != nil {
		if errors.Is(err, nats.ErrMaxPayload) {
			err = bus.ErrTooLarge
		}
		return fmt.Errorf("publish to the bus: %w", err)
	}
	return nil
}

// headerCarrier writes trace context under the very names that it reads: NATS
// headers are case-sensitive, net/http's carrier is not. It makes a header only
// where there is a trace.
type headerCarrier struct{ msg *nats.Msg }

func (c headerCarrier) Get(key string) string { return c.msg.Header.Get(key) }

func (c headerCarrier) Set(key, value string) {
	if c.msg.Header == nil {
		c.msg.Header = nats.Header{}
	}
	c.msg.Header.Set(key, value)
}

func (c headerCarrier) Keys() []string {
	keys := make([]string, 0, len(c.msg.Header))
	for key := range c.msg.Header {
		keys = append(keys, key)
	}
	return keys
}

// subjectOf encodes the name of a map or topic into one token. The empty name needs
// a character of its own, which the encoding does not use.
func subjectOf(prefix, name string) string {
	if name == "" {
		return prefix + "="
	}
	return prefix + base64.RawURLEncoding.EncodeToString([]byte(name))
}

// SubscribeEvents implements bus.Subscriber.
func (b *Bus) SubscribeEvents(mapName string, handle bus.EventHandler) (bus.Subscription, error) {
	return b.subscribe(subjectOf(eventSubject, mapName), func(msg *nats.Msg) {
		event := new(fanoutv1.Event)
		if err := proto.Unmarshal(msg.Data, event); err != nil {
			b.unreadable(err)
			return
		}
		handle(traceOf(msg), event)
	})
}

// SubscribeTopic implements bus.Subscriber.
func (b *Bus) SubscribeTopic(topic string, handle bus.TopicHandler) (bus.Subscription, error) {
	return b.subscribe(subjectOf(topicSubject, topic), func(msg *nats.Msg) {
		message := new(fanoutv1.TopicMessage)
		if err := proto.Unmarshal(msg.Data, message); err != nil {
			b.unreadable(err)
			return
		}
		handle(traceOf(msg), message)
	})
}

// traceOf returns a context that carries the trace context of a message alone.
func traceOf(msg *nats.Msg) context.Context {
	if msg.Header == nil {
		return context.Background()
	}
	return propagator.Extract(context.Background(), headerCarrier{msg})
}

// SubscribeHeartbeats implements bus.Subscriber.
func (b *Bus) SubscribeHeartbeats(handle bus.HeartbeatHandler) (bus.Subscription, error) {
	return b.subscribe(heartbeatSubject, func(msg *nats.Msg) {
		heartbeat := new(fanoutv1.Heartbeat)
		if err := proto.Unmarshal(msg.Data, heartbeat); err != nil {
			b.unreadable(err)
			return
		}
		handle(heartbeat)
	})
}

// unreadable treats a message that is no message of ours as lost.
func (b *Bus) unreadable(err error) {
	b.logger.Error("undecodable message on the bus", "error", err)
	b.noteLoss()
}

func (b *Bus) subscribe(subject string, handle func(*nats.Msg)) (bus.Subscription, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, fmt.Errorf("subscribe on the bus: %w", bus.ErrClosed)
	}
	// A message that arrives before its handler is known waits for b.mu.
	sub, err := b.nc.ChanSubscribe(subject, b.queue)
	if err != nil {
		return nil, fmt.Errorf("subscribe on the bus: %w", err)
	}
	b.handlers[sub] = handle
	return &subscription{b, sub}, nil
}

type subscription struct {
	bus *Bus
	sub *nats.Subscription
}

func (s *subscription) Unsubscribe() error {
	s.bus.mu.Lock()
	delete(s.bus.handlers, s.sub)
	s.bus.mu.Unlock()
	if err := s.sub.Unsubscribe(); err != nil && !gone(err) {
		return fmt.Errorf("unsubscribe on the bus: %w", err)
	}
	return nil
}

// Flush implements bus.Publisher and bus.Subscriber.
func (b *Bus) Flush(ctx context.Context) error {
	// The client library insists on a deadline.
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, flushTimeout)
		defer cancel()
	}
	if err := b.nc.FlushWithContext(ctx); err != nil {
		return fmt.Errorf("flush the bus: %w", err)
	}
	return nil
}

// OnLoss implements bus.Subscriber.
func (b *Bus) OnLoss(lost func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lost = lost
}

// Ready implements bus.Subscriber.
func (b *Bus) Ready() error {
	if status := b.nc.Status(); status != nats.CONNECTED {
		return errors.New("the broker connection is " + status.String())
	}
	return nil
}

// noteLoss asks dispatch to report a loss. One report is enough for all losses
// before it.
func (b *Bus) noteLoss() {
	select {
	case b.losses <- struct{}{}:
	default:
	}
}

// dispatch calls the handlers until Close.
func (b *Bus) dispatch() {
	for {
		select {
		case msg := <-b.queue:
			b.mu.Lock()
			handle := b.handlers[msg.Sub]
			b.mu.Unlock()
			if handle != nil {
				handle(msg)
			}
		case <-b.losses:
			b.mu.Lock()
			lost := b.lost
			b.mu.Unlock()
			if lost != nil {
				lost()
			}
		case <-b.stop:
			return
		}
	}
}

// watch reports a loss for every reconnect, after the broker knows the
// subscriptions again: a loss reported earlier would not cover what is lost until
// then.
func (b *Bus) watch() {
	for {
		select {
		case _, open := <-b.status:
			if !open {
				return
			}
			ctx, cancel := context.WithTimeout(context.Background(), flushTimeout)
			err := b.Flush(ctx)
			cancel()
			if err == nil {
				b.noteLoss()
				continue
			}
			// The connection went away again, and its return comes by here; or the
			// broker is so slow that the report must not wait for it.
			b.logger.Warn("bus not confirmed after a reconnect", "error", err)
			b.noteLoss()
		case <-b.stop:
			return
		}
	}
}
