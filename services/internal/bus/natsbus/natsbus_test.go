package natsbus_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
	"github.com/topgun-sync/topgun/services/internal/broker"
	"github.com/topgun-sync/topgun/services/internal/bus"
	"github.com/topgun-sync/topgun/services/internal/bus/bustest"
	"github.com/topgun-sync/topgun/services/internal/bus/natsbus"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func start(t *testing.T, config broker.EmbeddedConfig) *broker.Embedded {
	t.Helper()
	config.Memory = true
	embedded, err := broker.StartEmbedded(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := embedded.Shutdown(); err != nil {
			t.Error(err)
		}
	})
	return embedded
}

func open(t *testing.T) (*natsbus.Bus, *nats.Conn) {
	t.Helper()
	nc, err := start(t, broker.EmbeddedConfig{}).Connect("bus")
	if err != nil {
		t.Fatal(err)
	}
	b := natsbus.New(nc, nil)
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	return b, nc
}

func TestConformance(t *testing.T) {
	bustest.Run(t, func(t *testing.T) bustest.Harness {
		b, nc := open(t)
		return bustest.Harness{
			Bus: b,
			Reconnect: func() {
				if err := nc.ForceReconnect(); err != nil {
					t.Fatal(err)
				}
			},
			Overrun: func(mapName string) {
				for n := range uint64(10_000) {
					if err := b.PublishEvent(context.Background(), &fanoutv1.Event{Map: mapName, Sequence: n + 2}); err != nil {
						t.Fatal(err)
					}
				}
				if err := b.Flush(t.Context()); err != nil {
					t.Fatal(err)
				}
			},
		}
	})
}

// A broker that was killed and came back on the same address: the bus finds it
// without help, and reports the loss.
func TestBrokerRestart(t *testing.T) {
	first := start(t, broker.EmbeddedConfig{Listen: "127.0.0.1:0"})
	address := strings.TrimPrefix(first.ClientURL(), "nats://")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	nc, err := broker.Connect(ctx, "nats://"+address, "bus", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	b := natsbus.New(nc, nil)
	defer b.Close()
	lost := make(chan struct{}, 16)
	b.OnLoss(func() { lost <- struct{}{} })
	events := make(chan *fanoutv1.Event, 16)
	if _, err := b.SubscribeEvents("m", func(_ context.Context, e *fanoutv1.Event) { events <- e }); err != nil {
		t.Fatal(err)
	}
	if err := b.Flush(ctx); err != nil {
		t.Fatal(err)
	}

	away := nc.StatusChanged(nats.RECONNECTING)
	defer nc.RemoveStatusListener(away)
	if err := first.Shutdown(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-away:
	case <-ctx.Done():
		t.Fatal("the end of the broker was not noticed")
	}
	if err := b.PublishEvent(ctx, &fanoutv1.Event{Map: "m", Sequence: 1}); err == nil {
		t.Error("an event was taken although there is no broker")
	}
	if err := b.Ready(); err == nil {
		t.Error("ready without a broker")
	}
	start(t, broker.EmbeddedConfig{Listen: address})
	select {
	case <-lost:
	case <-ctx.Done():
		t.Fatal("the loss was not reported")
	}
	if err := b.PublishEvent(ctx, &fanoutv1.Event{Map: "m", Sequence: 2}); err != nil {
		t.Fatal(err)
	}
	select {
	case e := <-events:
		if e.GetSequence() != 2 {
			t.Errorf("got %d: something was kept while the broker was away", e.GetSequence())
		}
	case <-ctx.Done():
		t.Fatal("nothing came after the restart")
	}
}

// Flush confirms subscriptions to publishers on other connections too.
func TestFlushConfirmsAcrossConnections(t *testing.T) {
	embedded := start(t, broker.EmbeddedConfig{})
	open := func(name string) *natsbus.Bus {
		nc, err := embedded.Connect(name)
		if err != nil {
			t.Fatal(err)
		}
		b := natsbus.New(nc, nil)
		t.Cleanup(func() {
			if err := b.Close(); err != nil {
				t.Error(err)
			}
		})
		return b
	}
	subscriber, publisher := open("subscriber"), open("publisher")
	for n := range 200 {
		name := fmt.Sprint("m", n)
		came := make(chan struct{})
		if _, err := subscriber.SubscribeEvents(name, func(context.Context, *fanoutv1.Event) { close(came) }); err != nil {
			t.Fatal(err)
		}
		if err := subscriber.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := publisher.PublishEvent(t.Context(), &fanoutv1.Event{Map: name, Sequence: 1}); err != nil {
			t.Fatal(err)
		}
		select {
		case <-came:
		case <-time.After(time.Minute):
			t.Fatalf("round %d: the event after Flush did not come", n)
		}
	}
}

func TestTooLargeEvent(t *testing.T) {
	b, _ := open(t)
	err := b.PublishEvent(t.Context(), &fanoutv1.Event{Map: "m", Changes: []*typesv1.Change{{Key: make([]byte, 9<<20)}}})
	if !errors.Is(err, bus.ErrTooLarge) {
		t.Errorf("got %v, want ErrTooLarge", err)
	}
}

func TestForeignMessageIsALoss(t *testing.T) {
	b, nc := open(t)
	lost := make(chan struct{}, 1)
	b.OnLoss(func() { lost <- struct{}{} })
	if _, err := b.SubscribeHeartbeats(func(*fanoutv1.Heartbeat) { t.Error("a heartbeat was read from garbage") }); err != nil {
		t.Fatal(err)
	}
	if err := nc.Publish("topgun.heartbeats", []byte("\xff\xff garbage")); err != nil {
		t.Fatal(err)
	}
	select {
	case <-lost:
	case <-time.After(time.Minute):
		t.Fatal("the loss was not reported")
	}
}

// The error handler that the connection had is still called.
func TestErrorHandlerIsChained(t *testing.T) {
	embedded := start(t, broker.EmbeddedConfig{})
	nc, err := embedded.Connect("bus")
	if err != nil {
		t.Fatal(err)
	}
	called := make(chan error, 1)
	nc.SetErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
		select {
		case called <- err:
		default:
		}
	})
	b := natsbus.New(nc, nil)
	defer b.Close()
	small := make(chan *nats.Msg) // nobody reads
	if _, err := nc.ChanSubscribe("x", small); err != nil {
		t.Fatal(err)
	}
	if err := nc.Publish("x", nil); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-called:
		if !errors.Is(err, nats.ErrSlowConsumer) {
			t.Errorf("got %v", err)
		}
	case <-time.After(time.Minute):
		t.Fatal("the earlier handler was not called")
	}
}
