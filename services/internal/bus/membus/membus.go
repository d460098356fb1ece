// Package membus is the bus within one process: for tests, which can also make it
// lose messages. Delivery runs on a goroutine of the bus, as over a network, and
// works in a synctest bubble.
package membus

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"go.opentelemetry.io/otel/trace"
	"google.golang.org/protobuf/proto"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	"github.com/topgun-sync/topgun/services/internal/bus"
)

// queueMessages bounds what waits for the handlers; what does not fit is lost, and
// reported as a loss.
const queueMessages = 8192

// Bus publishes and subscribes in memory.
type Bus struct {
	queue  chan delivery
	losses chan struct{}
	stop   chan struct{}
	wg     sync.WaitGroup

	mu         sync.Mutex
	events     map[string]map[*subscription]bus.EventHandler
	topics     map[string]map[*subscription]bus.TopicHandler
	heartbeats map[*subscription]bus.HeartbeatHandler
	drop       func(proto.Message) bool
	lost       func()
	ready      error
	closed     bool
}

// delivery is one message on its way to one subscription.
type delivery struct {
	to  *subscription
	run func()
}

var (
	_ bus.Publisher  = (*Bus)(nil)
	_ bus.Subscriber = (*Bus)(nil)
)

// New returns a running bus. The caller must Close it.
func New() *Bus {
	b := &Bus{
		queue:      make(chan delivery, queueMessages),
		losses:     make(chan struct{}, 1),
		stop:       make(chan struct{}),
		events:     make(map[string]map[*subscription]bus.EventHandler),
		topics:     make(map[string]map[*subscription]bus.TopicHandler),
		heartbeats: make(map[*subscription]bus.HeartbeatHandler),
	}
	b.wg.Go(b.dispatch)
	return b
}

// Close ends all subscriptions and waits for the handlers.
func (b *Bus) Close() error {
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		return nil
	}
	b.closed = true
	clear(b.events)
	clear(b.topics)
	clear(b.heartbeats)
	b.mu.Unlock()
	close(b.stop)
	b.wg.Wait()
	return nil
}

// DropIf makes the bus lose the messages for which drop says so, without a report;
// nil ends that.
func (b *Bus) DropIf(drop func(proto.Message) bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.drop = drop
}

// Lose reports a loss, as a reconnect does.
func (b *Bus) Lose() {
	select {
	case b.losses <- struct{}{}:
	default:
	}
}

// SetReady makes Ready return err.
func (b *Bus) SetReady(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ready = err
}

// Maps is the number of maps with a subscription.
func (b *Bus) Maps() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.events)
}

// Topics is the number of topics with a subscription.
func (b *Bus) Topics() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.topics)
}

// PublishEvent implements bus.Publisher.
func (b *Bus) PublishEvent(ctx context.Context, event *fanoutv1.Event) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return fmt.Errorf("publish to the bus: %w", bus.ErrClosed)
	}
	if b.drop != nil && b.drop(event) {
		return nil
	}
	subscribers := b.events[event.GetMap()]
	if len(subscribers) == 0 {
		return nil
	}
	// Publishers may use their message again, as they may after encoding it.
	event = proto.CloneOf(event)
	traced := tracedBy(ctx)
	for s, handle := range subscribers {
		b.enqueue(delivery{s, func() { handle(traced, event) }})
	}
	return nil
}

// tracedBy returns a context that carries the trace context of ctx alone.
func tracedBy(ctx context.Context) context.Context {
	return trace.ContextWithRemoteSpanContext(context.Background(), trace.SpanContextFromContext(ctx))
}

// PublishTopic implements bus.Publisher.
func (b *Bus) PublishTopic(ctx context.Context, message *fanoutv1.TopicMessage) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return fmt.Errorf("publish to the bus: %w", bus.ErrClosed)
	}
	if b.drop != nil && b.drop(message) {
		return nil
	}
	message = proto.CloneOf(message)
	traced := tracedBy(ctx)
	for s, handle := range b.topics[message.GetTopic()] {
		b.enqueue(delivery{s, func() { handle(traced, message) }})
	}
	return nil
}

// PublishHeartbeat implements bus.Publisher.
func (b *Bus) PublishHeartbeat(_ context.Context, heartbeat *fanoutv1.Heartbeat) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return fmt.Errorf("publish to the bus: %w", bus.ErrClosed)
	}
	if b.drop != nil && b.drop(heartbeat) {
		return nil
	}
	heartbeat = proto.CloneOf(heartbeat)
	for s, handle := range b.heartbeats {
		b.enqueue(delivery{s, func() { handle(heartbeat) }})
	}
	return nil
}

func (b *Bus) enqueue(d delivery) {
	select {
	case b.queue <- d:
	default:
		b.Lose()
	}
}

// SubscribeEvents implements bus.Subscriber.
func (b *Bus) SubscribeEvents(mapName string, handle bus.EventHandler) (bus.Subscription, error) {
	return subscribe(b, b.events, mapName, handle)
}

// SubscribeTopic implements bus.Subscriber.
func (b *Bus) SubscribeTopic(topic string, handle bus.TopicHandler) (bus.Subscription, error) {
	return subscribe(b, b.topics, topic, handle)
}

// SubscribeHeartbeats implements bus.Subscriber.
func (b *Bus) SubscribeHeartbeats(handle bus.HeartbeatHandler) (bus.Subscription, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, fmt.Errorf("subscribe on the bus: %w", bus.ErrClosed)
	}
	s := &subscription{bus: b}
	s.remove = func() { delete(b.heartbeats, s) }
	b.heartbeats[s] = handle
	return s, nil
}

// subscribe adds a handler for a name to a table of the bus.
func subscribe[H any](b *Bus, table map[string]map[*subscription]H, name string, handle H) (bus.Subscription, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, fmt.Errorf("subscribe on the bus: %w", bus.ErrClosed)
	}
	s := &subscription{bus: b}
	s.remove = func() {
		delete(table[name], s)
		if len(table[name]) == 0 {
			delete(table, name)
		}
	}
	if table[name] == nil {
		table[name] = make(map[*subscription]H)
	}
	table[name][s] = handle
	return s, nil
}

type subscription struct {
	bus *Bus
	// remove takes it out of its table; the bus's lock guards it and ended.
	remove func()
	ended  bool
}

func (s *subscription) Unsubscribe() error {
	s.bus.mu.Lock()
	defer s.bus.mu.Unlock()
	s.ended = true
	s.remove()
	return nil
}

// Flush implements bus.Publisher and bus.Subscriber. Subscriptions are in force at
// once, so there is nothing to wait for.
func (b *Bus) Flush(ctx context.Context) error {
	if err := b.Ready(); err != nil {
		return fmt.Errorf("flush the bus: %w", err)
	}
	return ctx.Err()
}

// OnLoss implements bus.Subscriber.
func (b *Bus) OnLoss(lost func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lost = lost
}

// Ready implements bus.Subscriber.
func (b *Bus) Ready() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return errors.New("the bus is closed")
	}
	return b.ready
}

func (b *Bus) dispatch() {
	for {
		select {
		case d := <-b.queue:
			b.mu.Lock()
			ended := d.to.ended || b.closed
			b.mu.Unlock()
			if !ended {
				d.run()
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
