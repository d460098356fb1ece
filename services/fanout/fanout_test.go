package fanout_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect/v2"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1/fanoutv1connect"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
	"github.com/topgun-sync/topgun/services/fanout"
	"github.com/topgun-sync/topgun/services/internal/bus/membus"
	"github.com/topgun-sync/topgun/services/internal/rpc"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// room is a running service on a membus, called in process. Use it in a synctest
// bubble.
type room struct {
	t       *testing.T
	bus     *membus.Bus
	service *fanout.Service
	client  fanoutv1connect.FanoutServiceClient
	// stop ends Run and returns what it returned.
	stop func() error
}

func open(t *testing.T, config fanout.Config, deps fanout.Deps) *room {
	t.Helper()
	return openPlanned(t, config, deps, func(*fanout.Service) {})
}

// openPlanned is open with a change before Run.
func openPlanned(t *testing.T, config fanout.Config, deps fanout.Deps, plan func(*fanout.Service)) *room {
	t.Helper()
	b := membus.New()
	deps.Bus = b
	service, err := fanout.New(config, deps)
	if err != nil {
		t.Fatal(err)
	}
	plan(service)
	server := rpc.NewServer(rpc.Deps{})
	service.Register(server)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- service.Run(ctx) }()
	stopped := false
	r := &room{t: t, bus: b, service: service, client: fanoutv1connect.NewFanoutServiceClient(rpc.InProcess(server, rpc.Deps{}))}
	r.stop = func() error {
		stopped = true
		cancel()
		return <-done
	}
	t.Cleanup(func() {
		if !stopped {
			if err := r.stop(); err != nil {
				t.Errorf("Run: %v", err)
			}
		}
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	synctest.Wait()
	return r
}

// gateway is one stream and all that came on it.
type gateway struct {
	t      *testing.T
	client fanoutv1connect.FanoutServiceClient
	stream fanoutv1connect.FanoutServiceSubscribeClientStream
	id     string
	close  func()

	mu sync.Mutex
	// got holds the messages as text: "map/shard/sequence" or "gap map".
	got []string
	// err is how the stream ended.
	err    error
	events []*fanoutv1.Event
}

// subscribe opens a stream and reads only its first message.
func (r *room) subscribe(name string) *gateway {
	r.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	stream, err := r.client.Subscribe(ctx, &fanoutv1.SubscribeRequest{GatewayId: name})
	if err != nil {
		r.t.Fatal(err)
	}
	message, err := stream.Receive()
	if err != nil {
		r.t.Fatal(err)
	}
	g := &gateway{t: r.t, client: r.client, stream: stream, id: message.GetReady().GetStreamId()}
	if g.id == "" {
		r.t.Fatalf("the first message is %v, want Ready", message)
	}
	g.close = func() {
		cancel()
		_ = stream.Close()
	}
	r.t.Cleanup(g.close)
	return g
}

// read reads everything from now on. Look at got after synctest.Wait.
func (g *gateway) read() *gateway {
	go func() {
		for {
			message, err := g.stream.Receive()
			g.mu.Lock()
			if err != nil {
				g.err = err
				g.mu.Unlock()
				return
			}
			g.got = append(g.got, text(message))
			if e := message.GetEvent(); e != nil {
				g.events = append(g.events, e)
			}
			g.mu.Unlock()
		}
	}()
	return g
}

// take waits until nothing moves and returns what came since the last take.
func (g *gateway) take() []string {
	synctest.Wait()
	g.mu.Lock()
	defer g.mu.Unlock()
	got := g.got
	g.got = nil
	return got
}

// ended waits until nothing moves and returns how the stream ended.
func (g *gateway) ended() error {
	synctest.Wait()
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.err
}

func text(message *fanoutv1.SubscribeResponse) string {
	switch m := message.GetMessage().(type) {
	case *fanoutv1.SubscribeResponse_Event:
		return fmt.Sprintf("%s/%d/%d", m.Event.GetMap(), m.Event.GetShard(), m.Event.GetSequence())
	case *fanoutv1.SubscribeResponse_Gap:
		return "gap " + m.Gap.GetMap()
	case *fanoutv1.SubscribeResponse_TopicMessage:
		return fmt.Sprintf("topic %s %d %s %s", m.TopicMessage.GetTopic(), m.TopicMessage.GetMillis(), m.TopicMessage.GetPublisherId(), m.TopicMessage.GetOrigin())
	}
	return fmt.Sprintf("%T", message.GetMessage())
}

func (g *gateway) watch(names ...string) {
	g.t.Helper()
	if err := g.change(names, nil); err != nil {
		g.t.Fatal(err)
	}
}

func (g *gateway) unwatch(names ...string) {
	g.t.Helper()
	if err := g.change(nil, names); err != nil {
		g.t.Fatal(err)
	}
}

func (g *gateway) change(add, remove []string) error {
	_, err := g.client.Watch(context.Background(), &fanoutv1.WatchRequest{StreamId: g.id, Add: add, Remove: remove})
	return err
}

// want compares what came since the last take.
func (g *gateway) want(messages ...string) {
	g.t.Helper()
	if got := g.take(); !slices.Equal(got, messages) {
		g.t.Errorf("got %v, want %v", got, messages)
	}
}

func (r *room) publish(mapName string, shard uint32, lane string, sequence uint64) {
	r.t.Helper()
	if err := r.bus.PublishEvent(context.Background(), &fanoutv1.Event{Map: mapName, Shard: shard, Lane: lane, Sequence: sequence, Changes: []*typesv1.Change{{Map: mapName}}}); err != nil {
		r.t.Fatal(err)
	}
}

// heartbeat publishes a heartbeat; sequences are for maps m1, m2, …
func (r *room) heartbeat(shard uint32, lane string, sequences map[string]uint64) {
	r.t.Helper()
	h := &fanoutv1.Heartbeat{Shard: shard, Lane: lane}
	for _, name := range slices.Sorted(maps.Keys(sequences)) {
		h.Maps = append(h.Maps, &fanoutv1.MapSequence{Map: name, Sequence: sequences[name]})
	}
	if err := r.bus.PublishHeartbeat(context.Background(), h); err != nil {
		r.t.Fatal(err)
	}
	synctest.Wait()
}

// drop makes the bus lose the events of map m with these sequences.
func (r *room) drop(sequences ...uint64) {
	r.bus.DropIf(func(m proto.Message) bool {
		e, ok := m.(*fanoutv1.Event)
		return ok && slices.Contains(sequences, e.GetSequence())
	})
}

func (r *room) describe() (streams, maps uint32) {
	r.t.Helper()
	response, err := r.client.Describe(context.Background(), &fanoutv1.DescribeRequest{})
	if err != nil {
		r.t.Fatal(err)
	}
	return response.GetStreams(), response.GetMaps()
}

func inBubble(t *testing.T, test func(*testing.T, *room)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		test(t, open(t, fanout.DefaultConfig(), fanout.Deps{}))
	})
}

func TestEventsReachThoseWhoWatch(t *testing.T) {
	inBubble(t, func(_ *testing.T, r *room) {
		a, b, idle := r.subscribe("a").read(), r.subscribe("b").read(), r.subscribe("idle").read()
		a.watch("m", "n")
		b.watch("m")
		r.publish("m", 0, "l", 1)
		r.publish("n", 0, "l", 1)
		r.publish("m", 1, "l", 1)
		r.publish("m", 0, "l", 2)
		r.publish("unwatched", 0, "l", 1)
		a.want("m/0/1", "n/0/1", "m/1/1", "m/0/2")
		b.want("m/0/1", "m/1/1", "m/0/2")
		idle.want()
		if &a.events[0].GetChanges()[0] != &b.events[0].GetChanges()[0] {
			t.Error("the event was built once for each stream")
		}

		a.unwatch("m")
		r.publish("m", 0, "l", 3)
		r.publish("n", 0, "l", 2)
		a.want("n/0/2")
		b.want("m/0/3")
	})
}

// FAN-01: an event lost in the middle is noticed by the next one.
func TestFAN01DroppedMiddleEvent(t *testing.T) {
	inBubble(t, func(_ *testing.T, r *room) {
		g, other := r.subscribe("g").read(), r.subscribe("other").read()
		g.watch("m")
		other.watch("n")
		r.drop(2)
		r.publish("m", 0, "l", 1)
		r.publish("m", 0, "l", 2)
		r.publish("m", 0, "l", 3)
		r.publish("m", 0, "l", 4)
		g.want("m/0/1", "gap m", "m/0/3", "m/0/4")
		other.want()
	})
}

// FAN-01: the loss of a last event is noticed by the heartbeat, within 5 s.
func TestFAN01DroppedLastEvent(t *testing.T) {
	inBubble(t, func(t *testing.T, r *room) {
		g := r.subscribe("g").read()
		g.watch("m")
		r.drop(2)
		r.publish("m", 0, "l", 1)
		r.publish("m", 0, "l", 2)
		g.want("m/0/1")
		lost := time.Now()
		var got []string
		for len(got) == 0 && time.Since(lost) < time.Minute {
			time.Sleep(time.Second)
			r.heartbeat(0, "l", map[string]uint64{"m": 2})
			got = g.take()
		}
		if took := time.Since(lost); took > 5*time.Second || !slices.Equal(got, []string{"gap m"}) {
			t.Errorf("noticed after %s: %v", took, got)
		}
		// Once is enough, and the sequence goes on.
		time.Sleep(5 * time.Second)
		r.heartbeat(0, "l", map[string]uint64{"m": 2})
		time.Sleep(5 * time.Second)
		r.publish("m", 0, "l", 3)
		g.want("m/0/3")
	})
}

// An event that a heartbeat overtook is no loss.
func TestHeartbeatAheadOfItsEvent(t *testing.T) {
	inBubble(t, func(_ *testing.T, r *room) {
		g := r.subscribe("g").read()
		g.watch("m")
		r.heartbeat(0, "l", map[string]uint64{"m": 1})
		time.Sleep(900 * time.Millisecond)
		r.publish("m", 0, "l", 1)
		time.Sleep(10 * time.Second)
		g.want("m/0/1")
		// One that comes later than that is covered by the gap.
		r.heartbeat(0, "l", map[string]uint64{"m": 2})
		time.Sleep(2 * time.Second)
		g.want("gap m")
		r.publish("m", 0, "l", 2)
		r.publish("m", 0, "l", 3)
		g.want("m/0/3")
	})
}

// What was logged before anybody watched is nobody's gap.
func TestWatchStartsAtTheHeartbeat(t *testing.T) {
	inBubble(t, func(_ *testing.T, r *room) {
		r.heartbeat(0, "l", map[string]uint64{"m": 41})
		g := r.subscribe("g").read()
		g.watch("m")
		r.heartbeat(0, "l", map[string]uint64{"m": 41})
		time.Sleep(5 * time.Second)
		r.publish("m", 0, "l", 42)
		g.want("m/0/42")
		// Not watched for a while: heartbeats carry the position on.
		g.unwatch("m")
		r.publish("m", 0, "l", 43)
		r.heartbeat(0, "l", map[string]uint64{"m": 43})
		g.watch("m")
		r.publish("m", 0, "l", 44)
		g.want("m/0/44")
	})
}

// A service that does not know whether an event came before Watch says Gap.
func TestUnknownStartIsAGap(t *testing.T) {
	inBubble(t, func(_ *testing.T, r *room) {
		g := r.subscribe("g").read()
		g.watch("m")
		r.publish("m", 0, "l", 7)
		r.publish("m", 0, "l", 8)
		g.want("gap m", "m/0/7", "m/0/8")
	})
}

func TestBusLossIsAGapInEveryMap(t *testing.T) {
	inBubble(t, func(_ *testing.T, r *room) {
		a, b := r.subscribe("a").read(), r.subscribe("b").read()
		a.watch("m")
		b.watch("n")
		r.bus.Lose()
		a.want("gap m")
		b.want("gap n")
	})
}

// The end of an old owner's lane may never have been broadcast.
func TestLaneChange(t *testing.T) {
	inBubble(t, func(t *testing.T, r *room) {
		g := r.subscribe("g").read()
		g.watch("m", "n")
		r.publish("m", 0, "l1", 1)
		r.publish("m", 1, "l1", 1)
		g.want("m/0/1", "m/1/1")

		// By an event: at once, and the event follows its gap.
		r.publish("m", 0, "l2", 3)
		got := g.take()
		slices.Sort(got[:2])
		if !slices.Equal(got, []string{"gap m", "gap n", "m/0/3"}) {
			t.Errorf("got %v", got)
		}
		r.publish("m", 1, "l1", 2)
		r.publish("m", 0, "l2", 4)
		g.want("m/1/2", "m/0/4")

		// By heartbeats: once the old lane is silent.
		r.heartbeat(1, "l2", map[string]uint64{"m": 9})
		g.want()
		time.Sleep(2 * time.Second)
		r.heartbeat(1, "l2", map[string]uint64{"m": 9})
		if got := slices.Sorted(slices.Values(g.take())); !slices.Equal(got, []string{"gap m", "gap n"}) {
			t.Errorf("got %v", got)
		}
		time.Sleep(5 * time.Second)
		r.publish("m", 1, "l2", 10)
		g.want("m/1/10")
	})
}

// A process that lost a shard and does not know it yet goes on sending heartbeats.
func TestStaleOwnerDoesNotFlap(t *testing.T) {
	inBubble(t, func(_ *testing.T, r *room) {
		g := r.subscribe("g").read()
		g.watch("m")
		r.publish("m", 0, "l1", 1)
		r.publish("m", 0, "l2", 1)
		g.want("m/0/1", "gap m", "m/0/1")
		for range 30 {
			time.Sleep(time.Second)
			r.heartbeat(0, "l2", map[string]uint64{"m": 1})
			r.heartbeat(0, "l1", map[string]uint64{"m": 1})
		}
		g.want()
	})
}

// FAN-02: a gateway that does not read gets one Gap for what it missed, and the
// others notice nothing.
func TestFAN02SlowGateway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := fanout.DefaultConfig()
		config.QueueEvents = 10
		r := open(t, config, fanout.Deps{})
		slow, fast := r.subscribe("slow"), r.subscribe("fast").read()
		slow.watch("m", "n")
		fast.watch("m", "n")
		r.publish("n", 0, "l", 1)
		var all []string
		for n := range uint64(1000) {
			r.publish("m", 0, "l", n+1)
			all = append(all, fmt.Sprintf("m/0/%d", n+1))
			synctest.Wait()
		}
		fast.want(append([]string{"n/0/1"}, all...)...)
		slow.read()
		slow.want("n/0/1", "gap m")
		r.publish("m", 0, "l", 1001)
		slow.want("m/0/1001")
		fast.want("m/0/1001")
	})
}

// FAN-02: where not even the gaps fit the stream ends, and its interest with it.
func TestFAN02TooSlowEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := fanout.DefaultConfig()
		config.QueueEvents = 3
		r := open(t, config, fanout.Deps{})
		slow := r.subscribe("slow")
		slow.watch("a", "b", "c", "d", "e", "f")
		for _, name := range []string{"a", "b", "c", "d", "e", "f"} {
			r.publish(name, 0, "l", 1)
			synctest.Wait()
		}
		if streams, maps := r.describe(); streams != 0 || maps != 0 || r.bus.Maps() != 0 {
			t.Errorf("%d streams, %d maps, %d subscriptions are left", streams, maps, r.bus.Maps())
		}
		slow.read()
		if err := slow.ended(); connect.CodeOf(err) != connect.CodeResourceExhausted {
			t.Errorf("the stream ended with %v, want resource_exhausted", err)
		}
	})
}

func TestQueueBytes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := fanout.DefaultConfig()
		config.QueueBytes = 1000
		r := open(t, config, fanout.Deps{})
		slow := r.subscribe("slow")
		slow.watch("m", "n")
		large := func(name string, sequence uint64) {
			if err := r.bus.PublishEvent(context.Background(), &fanoutv1.Event{Map: name, Lane: strings.Repeat("l", 600), Sequence: sequence}); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		large("n", 1) // taken by the sender
		large("n", 2) // waits
		large("m", 1) // does not fit
		slow.read()
		slow.want("n/0/1", "n/0/2", "gap m")
	})
}

// What overflowed no longer counts.
func TestQueueBytesAreGivenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := fanout.DefaultConfig()
		config.QueueBytes = 1000
		r := open(t, config, fanout.Deps{})
		blocked := r.subscribe("blocked")
		blocked.watch("m", "n")
		sized := func(name string, sequence uint64, bytes int) {
			if err := r.bus.PublishEvent(context.Background(), &fanoutv1.Event{Map: name, Lane: strings.Repeat("l", bytes), Sequence: sequence}); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		sized("n", 1, 400)
		sized("m", 1, 400) // waits
		sized("m", 2, 400) // waits
		sized("m", 3, 400) // overflow: one Gap for m
		sized("n", 2, 400) // fits again
		sized("n", 3, 400)
		blocked.read()
		blocked.want("n/0/1", "gap m", "n/0/2", "n/0/3")
	})
}

// RES-03: interest returns to its baseline.
func TestRES03Churn(t *testing.T) {
	inBubble(t, func(t *testing.T, r *room) {
		random := rand.New(rand.NewPCG(1, 2))
		for round := range 20 {
			var gateways []*gateway
			for n := range 5 {
				g := r.subscribe(fmt.Sprint(n)).read()
				gateways = append(gateways, g)
			}
			for range 100 {
				g := gateways[random.IntN(len(gateways))]
				name := fmt.Sprint("m", random.IntN(10))
				if random.IntN(2) == 0 {
					g.watch(name, name)
				} else {
					g.unwatch(name, name)
				}
				r.publish(name, 0, "l", uint64(round+1))
			}
			for n, g := range gateways {
				if n%2 == 0 {
					g.unwatch("m0", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "m9")
				}
				g.close()
			}
			synctest.Wait()
			if streams, maps := r.describe(); streams != 0 || maps != 0 || r.bus.Maps() != 0 {
				t.Fatalf("round %d: %d streams, %d maps, %d subscriptions are left", round, streams, maps, r.bus.Maps())
			}
		}
	})
}

// Watch must not return before the subscription is in force, nor leave interest
// behind that is not.
func TestWatchWithoutBus(t *testing.T) {
	inBubble(t, func(t *testing.T, r *room) {
		g := r.subscribe("g").read()
		r.bus.SetReady(errors.New("reconnecting"))
		if err := g.change([]string{"m"}, nil); connect.CodeOf(err) != connect.CodeUnavailable {
			t.Errorf("got %v, want unavailable", err)
		}
		if err := r.service.Ready(); err == nil {
			t.Error("ready without a bus")
		}
		if _, maps := r.describe(); maps != 0 || r.bus.Maps() != 0 {
			t.Errorf("%d maps, %d subscriptions are left", maps, r.bus.Maps())
		}
		r.bus.SetReady(nil)
		g.watch("m")
		r.publish("m", 0, "l", 1)
		g.want("m/0/1")
	})
}

func TestRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := fanout.DefaultConfig()
		config.MaxStreams, config.MaxMapsPerStream = 2, 2
		r := open(t, config, fanout.Deps{})
		first := func(id string) error {
			stream, err := r.client.Subscribe(t.Context(), &fanoutv1.SubscribeRequest{GatewayId: id})
			if err != nil {
				return err
			}
			defer stream.Close()
			_, err = stream.Receive()
			return err
		}
		g := r.subscribe("g").read()
		g.watch("a")
		for name, test := range map[string]struct {
			err  error
			code connect.Code
			text string
		}{
			"no gateway id":     {first(""), connect.CodeInvalidArgument, "gateway_id must have 1 to 128 bytes"},
			"long gateway id":   {first(strings.Repeat("g", 129)), connect.CodeInvalidArgument, "gateway_id must have 1 to 128 bytes"},
			"no map name":       {g.change([]string{""}, nil), connect.CodeInvalidArgument, "names of maps must have 1 to 128 bytes"},
			"long map name":     {g.change(nil, []string{strings.Repeat("m", 129)}), connect.CodeInvalidArgument, "names of maps must have 1 to 128 bytes"},
			"too many maps":     {g.change([]string{"b", "c"}, nil), connect.CodeResourceExhausted, "too many maps"},
			"no such stream":    {(&gateway{client: r.client, id: "x"}).change([]string{"a"}, nil), connect.CodeNotFound, "subscribe first"},
			"too many streams":  {func() error { r.subscribe("h"); return first("i") }(), connect.CodeResourceExhausted, "too many streams"},
			"remove what is no": {g.change(nil, []string{"z"}), 0, ""},
		} {
			if test.code == 0 {
				if test.err != nil {
					t.Errorf("%s: %v", name, test.err)
				}
				continue
			}
			if connect.CodeOf(test.err) != test.code || !strings.Contains(test.err.Error(), test.text) {
				t.Errorf("%s: got %v, want %s: %s", name, test.err, test.code, test.text)
			}
		}
		// What was refused had no effect.
		if _, maps := r.describe(); maps != 1 || r.bus.Maps() != 1 {
			t.Errorf("%d maps, %d subscriptions, want 1", maps, r.bus.Maps())
		}
	})
}

func TestRunEndsStreams(t *testing.T) {
	inBubble(t, func(t *testing.T, r *room) {
		if err := r.service.Ready(); err != nil {
			t.Errorf("not ready: %v", err)
		}
		g := r.subscribe("g").read()
		g.watch("m")
		if err := r.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
		if err := g.ended(); connect.CodeOf(err) != connect.CodeUnavailable {
			t.Errorf("the stream ended with %v, want unavailable", err)
		}
		if err := r.service.Ready(); err == nil {
			t.Error("ready after Run")
		}
		if r.bus.Maps() != 0 {
			t.Errorf("%d subscriptions are left", r.bus.Maps())
		}
		stream, err := r.client.Subscribe(t.Context(), &fanoutv1.SubscribeRequest{GatewayId: "late"})
		if err != nil {
			t.Fatal(err)
		}
		defer stream.Close()
		if _, err := stream.Receive(); connect.CodeOf(err) != connect.CodeUnavailable {
			t.Errorf("a late stream: %v, want unavailable", err)
		}
	})
}

func TestTraceAndMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		spans := tracetest.NewInMemoryExporter()
		tracers := sdktrace.NewTracerProvider(sdktrace.WithSyncer(spans))
		reader := sdkmetric.NewManualReader()
		meters := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))
		r := open(t, fanout.DefaultConfig(), fanout.Deps{Tracer: tracers.Tracer("t"), Meter: meters.Meter("t")})
		g, slow := r.subscribe("g").read(), r.subscribe("slow")
		g.watch("m")
		slow.watch("m")
		ctx, root := tracers.Tracer("t").Start(t.Context(), "publish")
		if err := r.bus.PublishEvent(ctx, &fanoutv1.Event{Map: "m", Lane: "l", Sequence: 2}); err != nil {
			t.Fatal(err)
		}
		g.want("gap m", "m/0/2")
		if got := spans.GetSpans(); len(got) != 1 || got[0].Name != "fanout.event" || got[0].Parent.SpanID() != root.SpanContext().SpanID() {
			t.Errorf("spans: %v", got)
		}
		var data metricdata.ResourceMetrics
		if err := reader.Collect(t.Context(), &data); err != nil {
			t.Fatal(err)
		}
		got := map[string]int64{}
		for _, m := range data.ScopeMetrics[0].Metrics {
			switch d := m.Data.(type) {
			case metricdata.Sum[int64]:
				got[m.Name] = d.DataPoints[0].Value
			case metricdata.Gauge[int64]:
				got[m.Name] = d.DataPoints[0].Value
			}
		}
		// The slow stream's sender holds one message, the other waits.
		for name, want := range map[string]int64{
			"topgun.fanout.events.received": 1, "topgun.fanout.events.sent": 2, "topgun.fanout.gaps": 1,
			"topgun.fanout.streams": 2, "topgun.fanout.maps": 1, "topgun.fanout.queue.messages": 1,
		} {
			if got[name] != want {
				t.Errorf("%s = %d, want %d", name, got[name], want)
			}
		}
	})
}
