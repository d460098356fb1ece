package bustest

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"go.opentelemetry.io/otel/trace"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	"github.com/topgun-sync/topgun/services/internal/bus"
)

// listen subscribes to a topic and returns the channel of what comes.
func listen(t *testing.T, b Bus, topic string) (<-chan *fanoutv1.TopicMessage, bus.Subscription) {
	t.Helper()
	messages := make(chan *fanoutv1.TopicMessage, 16384)
	subscription, err := b.SubscribeTopic(topic, func(_ context.Context, m *fanoutv1.TopicMessage) { messages <- m })
	if err != nil {
		t.Fatal(err)
	}
	flush(t, b)
	return messages, subscription
}

func say(t *testing.T, b Bus, topic string, data byte) {
	t.Helper()
	if err := b.PublishTopic(t.Context(), &fanoutv1.TopicMessage{Topic: topic, Data: []byte{data}}); err != nil {
		t.Fatal(err)
	}
}

func hear(t *testing.T, messages <-chan *fanoutv1.TopicMessage) *fanoutv1.TopicMessage {
	t.Helper()
	select {
	case m := <-messages:
		return m
	case <-time.After(patience):
		t.Fatal("no message came")
		return nil
	}
}

func topicOrderPerPublisher(t *testing.T, h Harness) {
	const publishers, each = 4, 250
	messages, _ := listen(t, h.Bus, "t")
	var wg sync.WaitGroup
	for p := range publishers {
		wg.Go(func() {
			for n := range uint64(each) {
				m := &fanoutv1.TopicMessage{Topic: "t", Origin: fmt.Sprint(p), Millis: n + 1}
				if err := h.Bus.PublishTopic(context.Background(), m); err != nil {
					t.Error(err)
				}
				m.Millis = 0 // the publisher may use its object again
			}
		})
	}
	wg.Wait()
	seen := map[string]uint64{}
	for range publishers * each {
		m := hear(t, messages)
		if m.GetMillis() != seen[m.GetOrigin()]+1 {
			t.Fatalf("publisher %s: %d after %d", m.GetOrigin(), m.GetMillis(), seen[m.GetOrigin()])
		}
		seen[m.GetOrigin()] = m.GetMillis()
	}
}

// A topic gets its own messages and no others, whatever it is called; maps of the
// same name are something else.
func topicNamesAreInjective(t *testing.T, h Harness) {
	var mu sync.Mutex
	got := map[string][]byte{}
	for _, name := range oddNames {
		if _, err := h.Bus.SubscribeTopic(name, func(_ context.Context, m *fanoutv1.TopicMessage) {
			mu.Lock()
			defer mu.Unlock()
			got[name] = append(got[name], m.GetData()...)
		}); err != nil {
			t.Fatalf("%q: %v", name, err)
		}
		if _, err := h.Bus.SubscribeEvents(name, func(context.Context, *fanoutv1.Event) {
			t.Errorf("the map %q got something", name)
		}); err != nil {
			t.Fatalf("%q: %v", name, err)
		}
	}
	flush(t, h.Bus)
	for i, name := range oddNames {
		say(t, h.Bus, name, byte(i))
	}
	barrier(t, h.Bus)
	mu.Lock()
	defer mu.Unlock()
	for i, name := range oddNames {
		if want := []byte{byte(i)}; !slices.Equal(got[name], want) {
			t.Errorf("%q got the messages of %v, want %v", name, got[name], want)
		}
	}
}

func topicInterest(t *testing.T, h Harness) {
	a, _ := listen(t, h.Bus, "t")
	b, subscription := listen(t, h.Bus, "t")
	events, _ := collect(t, h.Bus, "t")
	say(t, h.Bus, "t", 1)
	hear(t, a)
	hear(t, b)
	for range 2 { // a second time does nothing
		if err := subscription.Unsubscribe(); err != nil {
			t.Fatal(err)
		}
	}
	say(t, h.Bus, "t", 2)
	say(t, h.Bus, "other", 3)
	publish(t, h.Bus, event("t", 4))
	if m := hear(t, a); m.GetData()[0] != 2 {
		t.Errorf("the other subscription's end took a message away: got %d", m.GetData())
	}
	next(t, events)
	barrier(t, h.Bus)
	if len(a)+len(b)+len(events) != 0 {
		t.Errorf("%d, %d and %d messages too many", len(a), len(b), len(events))
	}
}

func topicTraceTravels(t *testing.T, h Harness) {
	got := make(chan trace.SpanContext, 1)
	if _, err := h.Bus.SubscribeTopic("t", func(ctx context.Context, _ *fanoutv1.TopicMessage) {
		got <- trace.SpanContextFromContext(ctx)
	}); err != nil {
		t.Fatal(err)
	}
	flush(t, h.Bus)
	want := trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: trace.TraceID{1, 2, 3}, SpanID: trace.SpanID{4, 5}, TraceFlags: trace.FlagsSampled,
	})
	if err := h.Bus.PublishTopic(trace.ContextWithSpanContext(t.Context(), want), &fanoutv1.TopicMessage{Topic: "t"}); err != nil {
		t.Fatal(err)
	}
	if first := <-got; first.TraceID() != want.TraceID() || first.SpanID() != want.SpanID() || !first.IsRemote() {
		t.Errorf("got %v, want %v", first, want)
	}
}
