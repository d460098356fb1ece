// Package bus is the broadcast of what the shards logged, from the partitions that
// publish it to the fanouts that pass it on, and of the messages of topics, from one
// fanout to all that have subscribers.
//
// It promises that the messages of one publisher arrive in the order they were
// published, each at most once, and only those of subscribed maps and topics. It
// does not promise that they arrive: a broadcast is lost when the broker is away or
// a subscriber is too slow. Events are numbered and heartbeats carry the newest
// number, so that subscribers find what is missing (FAN-01); OnLoss tells them
// sooner where the bus knows. Messages of topics are not numbered: one that is lost
// is lost (PROTOCOL 14.1).
//
// Package natsbus is the one that runs, membus the one for tests within a process;
// package bustest holds what both must fulfil.
package bus

import (
	"context"
	"errors"
	"time"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
)

// HeartbeatPeriod is how often the owner of a shard publishes its heartbeat, also
// when nothing changed: subscribers learn from it which lane the shard is in, and
// conclude from another lane that the end of the old one may be missing.
const HeartbeatPeriod = time.Second

// HeartbeatMemory is how long a heartbeat goes on naming a map after its last
// change.
const HeartbeatMemory = time.Minute

var (
	// ErrTooLarge says that a message exceeds what the broker carries. Its number is
	// used up, so subscribers notice a gap.
	ErrTooLarge = errors.New("the message is larger than the bus carries")
	// ErrClosed says that the bus was closed.
	ErrClosed = errors.New("the bus is closed")
)

// Publisher sends broadcasts. Its methods may be called concurrently; messages keep
// their order when one goroutine publishes them.
type Publisher interface {
	// PublishEvent sends an event, with the trace context of ctx, to the subscribers
	// of event.Map. It does not wait for them. An error means that the event may be
	// lost: go on with the next, and do not publish it again.
	PublishEvent(ctx context.Context, event *fanoutv1.Event) error
	// PublishHeartbeat sends a heartbeat to all subscribers of heartbeats.
	PublishHeartbeat(ctx context.Context, heartbeat *fanoutv1.Heartbeat) error
	// PublishTopic sends a message, with the trace context of ctx, to the subscribers
	// of message.Topic. It does not wait for them. An error means that the message
	// may be lost.
	PublishTopic(ctx context.Context, message *fanoutv1.TopicMessage) error
	// Flush returns when the broker has everything published before it.
	Flush(ctx context.Context) error
}

// EventHandler gets the events of a map. ctx carries the trace context of the
// publisher and nothing else. The event is the handler's to keep, and shared: nobody
// may change it. Handlers are called one at a time and must not block.
type EventHandler func(ctx context.Context, event *fanoutv1.Event)

// HeartbeatHandler gets heartbeats, under the rules of EventHandler.
type HeartbeatHandler func(heartbeat *fanoutv1.Heartbeat)

// TopicHandler gets the messages of a topic, under the rules of EventHandler.
type TopicHandler func(ctx context.Context, message *fanoutv1.TopicMessage)

// Subscription is one interest.
type Subscription interface {
	// Unsubscribe ends it. A call of the handler that runs may finish afterwards,
	// none begins. It does not wait, so handlers may call it.
	Unsubscribe() error
}

// Subscriber receives broadcasts. Its methods may be called concurrently.
type Subscriber interface {
	// SubscribeEvents asks for the events of one map; any text is a legal name. The
	// interest is in force when a later Flush has returned.
	SubscribeEvents(mapName string, handle EventHandler) (Subscription, error)
	// SubscribeHeartbeats asks for the heartbeats of all shards.
	SubscribeHeartbeats(handle HeartbeatHandler) (Subscription, error)
	// SubscribeTopic asks for the messages of one topic, under the rules of
	// SubscribeEvents. A topic and a map of the same name are two things.
	SubscribeTopic(topic string, handle TopicHandler) (Subscription, error)
	// Flush returns when every subscription made before it is in force: what is
	// published from then on is delivered, or lost in one of the ways named above.
	Flush(ctx context.Context) error
	// OnLoss registers the one function that is called after messages were or may
	// have been lost, once the bus delivers again. It must not block.
	OnLoss(lost func())
	// Ready is nil while the bus is connected, else the reason.
	Ready() error
}
