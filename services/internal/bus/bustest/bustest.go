// Package bustest is what every implementation of the bus must fulfil.
package bustest

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.opentelemetry.io/otel/trace"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	"github.com/topgun-sync/topgun/services/internal/bus"
)

// Bus is both ends of one bus.
type Bus interface {
	bus.Publisher
	bus.Subscriber
	Close() error
}

// Harness is a fresh bus for one test and what only its implementation can do.
type Harness struct {
	Bus Bus
	// Reconnect interrupts the bus and returns when it delivers again, or will
	// without further help.
	Reconnect func()
	// Overrun publishes more events of the map than the bus holds, while a handler
	// blocks.
	Overrun func(mapName string)
}

// oddNames are names that a careless subject would mix up; base64 tells aaa and aaG
// apart by the case of one letter alone.
var oddNames = []string{
	"", " ", "a", "A", "a.b", "a.*", "a.>", ">", "*", "a b", "a\r\nb", "a\x00b", "$SYS", "_INBOX.x", "..", "ä", "日本",
	"aaa", "aaG", "YQ", "=", "topgun.heartbeats", "topgun.events.a", "x/y", "x+y", "x_y", "x-y", strings.Repeat("n", 128),
}

// Run runs the suite. open is called once for each test and registers its own
// clean-up.
func Run(t *testing.T, open func(t *testing.T) Harness) {
	for name, test := range map[string]func(*testing.T, Harness){
		"OrderPerPublisher":       orderPerPublisher,
		"NamesAreInjective":       namesAreInjective,
		"OnlySubscribedMaps":      onlySubscribedMaps,
		"EverySubscriberGetsIt":   everySubscriberGetsIt,
		"FlushPutsIntoForce":      flushPutsIntoForce,
		"UnsubscribeEnds":         unsubscribeEnds,
		"HeartbeatAfterEvents":    heartbeatAfterEvents,
		"TraceTravels":            traceTravels,
		"LossOnReconnect":         lossOnReconnect,
		"LossOnOverrun":           lossOnOverrun,
		"PublisherKeepsItsObject": publisherKeepsItsObject,
		"TopicOrderPerPublisher":  topicOrderPerPublisher,
		"TopicNamesAreInjective":  topicNamesAreInjective,
		"TopicInterest":           topicInterest,
		"TopicTraceTravels":       topicTraceTravels,
		"ClosedBusRefuses":        closedBusRefuses,
	} {
		t.Run(name, func(t *testing.T) { test(t, open(t)) })
	}
}

// patience bounds the wait for what must come.
const patience = time.Minute

func event(mapName string, sequence uint64) *fanoutv1.Event {
	return &fanoutv1.Event{Map: mapName, Shard: 1, Lane: "lane", Sequence: sequence}
}

// collect subscribes to a map and returns the channel of what comes.
func collect(t *testing.T, b Bus, mapName string) (<-chan *fanoutv1.Event, bus.Subscription) {
	t.Helper()
	events := make(chan *fanoutv1.Event, 16384)
	subscription, err := b.SubscribeEvents(mapName, func(_ context.Context, e *fanoutv1.Event) { events <- e })
	if err != nil {
		t.Fatal(err)
	}
	flush(t, b)
	return events, subscription
}

func flush(t *testing.T, b Bus) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := b.Flush(ctx); err != nil {
		t.Fatal(err)
	}
}

func publish(t *testing.T, b Bus, e *fanoutv1.Event) {
	t.Helper()
	if err := b.PublishEvent(t.Context(), e); err != nil {
		t.Fatal(err)
	}
}

func next(t *testing.T, events <-chan *fanoutv1.Event) *fanoutv1.Event {
	t.Helper()
	select {
	case e := <-events:
		return e
	case <-time.After(patience):
		t.Fatal("no event came")
		return nil
	}
}

// barrier returns when everything published before it was handled.
func barrier(t *testing.T, b Bus) {
	t.Helper()
	done := make(chan struct{})
	name := "barrier " + t.Name()
	subscription, err := b.SubscribeEvents(name, func(context.Context, *fanoutv1.Event) { close(done) })
	if err != nil {
		t.Fatal(err)
	}
	flush(t, b)
	publish(t, b, event(name, 1))
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatal("the bus stands still")
	}
	if err := subscription.Unsubscribe(); err != nil {
		t.Fatal(err)
	}
}

func orderPerPublisher(t *testing.T, h Harness) {
	const publishers, each = 4, 500
	events, _ := collect(t, h.Bus, "m")
	var wg sync.WaitGroup
	for p := range publishers {
		wg.Go(func() {
			for n := range each {
				e := event("m", uint64(n+1))
				e.Shard = uint32(p)
				if err := h.Bus.PublishEvent(context.Background(), e); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	seen := make([]uint64, publishers)
	for range publishers * each {
		e := next(t, events)
		if e.GetSequence() != seen[e.GetShard()]+1 {
			t.Fatalf("publisher %d: %d after %d", e.GetShard(), e.GetSequence(), seen[e.GetShard()])
		}
		seen[e.GetShard()] = e.GetSequence()
	}
}

func namesAreInjective(t *testing.T, h Harness) {
	var mu sync.Mutex
	got := map[string][]string{}
	for _, name := range oddNames {
		if _, err := h.Bus.SubscribeEvents(name, func(_ context.Context, e *fanoutv1.Event) {
			mu.Lock()
			defer mu.Unlock()
			got[name] = append(got[name], e.GetLane())
		}); err != nil {
			t.Fatalf("%q: %v", name, err)
		}
	}
	flush(t, h.Bus)
	for i, name := range oddNames {
		e := event(name, 1)
		e.Lane = fmt.Sprint(i)
		publish(t, h.Bus, e)
	}
	barrier(t, h.Bus)
	mu.Lock()
	defer mu.Unlock()
	for i, name := range oddNames {
		if want := []string{fmt.Sprint(i)}; !slices.Equal(got[name], want) {
			t.Errorf("%q got the events of %v, want %v", name, got[name], want)
		}
	}
}

func onlySubscribedMaps(t *testing.T, h Harness) {
	events, _ := collect(t, h.Bus, "mine")
	publish(t, h.Bus, event("other", 1))
	publish(t, h.Bus, event("mine", 2))
	publish(t, h.Bus, event("mine.other", 3))
	barrier(t, h.Bus)
	if e := next(t, events); e.GetMap() != "mine" || len(events) != 0 {
		t.Errorf("got %v and %d more", e, len(events))
	}
}

func everySubscriberGetsIt(t *testing.T, h Harness) {
	a, _ := collect(t, h.Bus, "m")
	b, subscription := collect(t, h.Bus, "m")
	publish(t, h.Bus, event("m", 1))
	next(t, a)
	next(t, b)
	if err := subscription.Unsubscribe(); err != nil {
		t.Fatal(err)
	}
	publish(t, h.Bus, event("m", 2))
	if e := next(t, a); e.GetSequence() != 2 {
		t.Errorf("the other subscription's end took an event away: got %d", e.GetSequence())
	}
}

func flushPutsIntoForce(t *testing.T, h Harness) {
	for n := range 100 {
		events, subscription := collect(t, h.Bus, "m")
		publish(t, h.Bus, event("m", uint64(n+1)))
		if e := next(t, events); e.GetSequence() != uint64(n+1) {
			t.Fatalf("round %d: got %d", n, e.GetSequence())
		}
		if err := subscription.Unsubscribe(); err != nil {
			t.Fatal(err)
		}
	}
}

func unsubscribeEnds(t *testing.T, h Harness) {
	events, subscription := collect(t, h.Bus, "m")
	publish(t, h.Bus, event("m", 1))
	next(t, events)
	for range 2 { // a second time does nothing
		if err := subscription.Unsubscribe(); err != nil {
			t.Fatal(err)
		}
	}
	publish(t, h.Bus, event("m", 2))
	barrier(t, h.Bus)
	if len(events) != 0 {
		t.Error("an event came after Unsubscribe")
	}
}

func heartbeatAfterEvents(t *testing.T, h Harness) {
	var mu sync.Mutex
	var seen uint64
	heard := make(chan uint64, 1000)
	if _, err := h.Bus.SubscribeEvents("m", func(_ context.Context, e *fanoutv1.Event) {
		mu.Lock()
		defer mu.Unlock()
		seen = e.GetSequence()
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Bus.SubscribeHeartbeats(func(b *fanoutv1.Heartbeat) {
		mu.Lock()
		defer mu.Unlock()
		if claimed := b.GetMaps()[0].GetSequence(); seen < claimed {
			t.Errorf("heartbeat of %d came before its event; seen %d", claimed, seen)
		}
		heard <- b.GetMaps()[0].GetSequence()
	}); err != nil {
		t.Fatal(err)
	}
	flush(t, h.Bus)
	for n := uint64(1); n <= 200; n++ {
		publish(t, h.Bus, event("m", n))
		if err := h.Bus.PublishHeartbeat(t.Context(), &fanoutv1.Heartbeat{Shard: 1, Lane: "lane", Maps: []*fanoutv1.MapSequence{{Map: "m", Sequence: n}}}); err != nil {
			t.Fatal(err)
		}
	}
	for range 200 {
		select {
		case <-heard:
		case <-time.After(patience):
			t.Fatal("heartbeats are missing")
		}
	}
}

func traceTravels(t *testing.T, h Harness) {
	got := make(chan trace.SpanContext, 2)
	if _, err := h.Bus.SubscribeEvents("m", func(ctx context.Context, _ *fanoutv1.Event) {
		got <- trace.SpanContextFromContext(ctx)
	}); err != nil {
		t.Fatal(err)
	}
	flush(t, h.Bus)
	want := trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: trace.TraceID{1, 2, 3}, SpanID: trace.SpanID{4, 5}, TraceFlags: trace.FlagsSampled,
	})
	if err := h.Bus.PublishEvent(trace.ContextWithSpanContext(t.Context(), want), event("m", 1)); err != nil {
		t.Fatal(err)
	}
	publish(t, h.Bus, event("m", 2))
	first, second := <-got, <-got
	if first.TraceID() != want.TraceID() || first.SpanID() != want.SpanID() || !first.IsSampled() || !first.IsRemote() {
		t.Errorf("got %v, want %v", first, want)
	}
	if second.IsValid() {
		t.Errorf("an untraced event came with %v", second)
	}
}

func lossOnReconnect(t *testing.T, h Harness) {
	lost := make(chan struct{}, 16)
	h.Bus.OnLoss(func() { lost <- struct{}{} })
	events, _ := collect(t, h.Bus, "m")
	publish(t, h.Bus, event("m", 1))
	next(t, events)
	if len(lost) > 0 {
		t.Fatal("a loss was reported before anything happened")
	}
	h.Reconnect()
	select {
	case <-lost:
	case <-time.After(patience):
		t.Fatal("the loss was not reported")
	}
	// The report says that the bus delivers again: what is published now comes.
	publish(t, h.Bus, event("m", 2))
	if e := next(t, events); e.GetSequence() != 2 {
		t.Errorf("got %d, want 2", e.GetSequence())
	}
	if err := h.Bus.Ready(); err != nil {
		t.Errorf("not ready: %v", err)
	}
}

func lossOnOverrun(t *testing.T, h Harness) {
	lost := make(chan struct{}, 1024)
	h.Bus.OnLoss(func() {
		select {
		case lost <- struct{}{}:
		default:
		}
	})
	blocked, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	if _, err := h.Bus.SubscribeEvents("m", func(context.Context, *fanoutv1.Event) {
		once.Do(func() { close(blocked) })
		<-release
	}); err != nil {
		t.Fatal(err)
	}
	flush(t, h.Bus)
	publish(t, h.Bus, event("m", 1))
	<-blocked
	h.Overrun("m")
	close(release)
	select {
	case <-lost:
	case <-time.After(patience):
		t.Fatal("the loss was not reported")
	}
}

func publisherKeepsItsObject(t *testing.T, h Harness) {
	events, _ := collect(t, h.Bus, "m")
	e := event("m", 1)
	publish(t, h.Bus, e)
	e.Sequence = 99
	if got := next(t, events); got.GetSequence() != 1 {
		t.Errorf("the publisher's later change arrived: %d", got.GetSequence())
	}
}

func closedBusRefuses(t *testing.T, h Harness) {
	for range 2 {
		if err := h.Bus.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := h.Bus.SubscribeEvents("m", func(context.Context, *fanoutv1.Event) {}); err == nil {
		t.Error("a closed bus took a subscription")
	}
	if _, err := h.Bus.SubscribeTopic("t", func(context.Context, *fanoutv1.TopicMessage) {}); err == nil {
		t.Error("a closed bus took a subscription of a topic")
	}
}
