package fanout_test

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"github.com/nats-io/nats.go"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1/fanoutv1connect"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
	"github.com/topgun-sync/topgun/services/fanout"
	"github.com/topgun-sync/topgun/services/internal/broker"
	"github.com/topgun-sync/topgun/services/internal/bus/natsbus"
	"github.com/topgun-sync/topgun/services/internal/rpc"
)

// wired is a running service on a real broker, with clients in process and over a
// socket.
type wired struct {
	publisher *natsbus.Bus
	// connection is the service's own.
	connection *nats.Conn
	inProcess  *connect.Client
	socket     *connect.Client
	grpc       *connect.Client
}

func wire(tb testing.TB) *wired {
	tb.Helper()
	embedded, err := broker.StartEmbedded(broker.EmbeddedConfig{Memory: true})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { check(tb, embedded.Shutdown()) })
	open := func(name string) (*natsbus.Bus, *nats.Conn) {
		nc, err := embedded.Connect(name)
		if err != nil {
			tb.Fatal(err)
		}
		b := natsbus.New(nc, nil)
		tb.Cleanup(func() { check(tb, b.Close()) })
		return b, nc
	}
	w := &wired{}
	w.publisher, _ = open("publisher")
	subscriber, nc := open("fanout")
	w.connection = nc
	service, err := fanout.New(fanout.DefaultConfig(), fanout.Deps{Bus: subscriber})
	if err != nil {
		tb.Fatal(err)
	}
	server := rpc.NewServer(rpc.Deps{})
	service.Register(server)
	mux := http.NewServeMux()
	rpc.Mount(mux, server, rpc.Checks{fanoutv1connect.FanoutServiceName: service.Ready})
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	run := func(f func(context.Context) error) {
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- f(ctx) }()
		tb.Cleanup(func() {
			cancel()
			check(tb, <-done)
		})
	}
	run(func(ctx context.Context) error {
		return rpc.Serve(ctx, rpc.HTTPServer(mux, nil), listener, 5*time.Second)
	})
	run(service.Run)
	for service.Ready() != nil {
		time.Sleep(time.Millisecond)
	}
	httpClient := rpc.HTTPClient()
	tb.Cleanup(httpClient.CloseIdleConnections)
	url := "http://" + listener.Addr().String()
	w.inProcess = rpc.InProcess(server, rpc.Deps{})
	w.socket = rpc.Dial(url, httpClient, rpc.Deps{})
	w.grpc = rpc.Dial(url, httpClient, rpc.Deps{}, connecthttp.WithGRPC())
	return w
}

func check(tb testing.TB, err error) {
	if err != nil {
		tb.Error(err)
	}
}

// subscription is a stream that watches one map.
func subscribe(tb testing.TB, client *connect.Client, mapName string) fanoutv1connect.FanoutServiceSubscribeClientStream {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	tb.Cleanup(cancel)
	service := fanoutv1connect.NewFanoutServiceClient(client)
	stream, err := service.Subscribe(ctx, &fanoutv1.SubscribeRequest{GatewayId: "g"})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = stream.Close() })
	message, err := stream.Receive()
	if err != nil {
		tb.Fatal(err)
	}
	if _, err := service.Watch(ctx, &fanoutv1.WatchRequest{StreamId: message.GetReady().GetStreamId(), Add: []string{mapName}}); err != nil {
		tb.Fatal(err)
	}
	return stream
}

func receive(tb testing.TB, stream fanoutv1connect.FanoutServiceSubscribeClientStream) string {
	tb.Helper()
	message, err := stream.Receive()
	if err != nil {
		tb.Fatal(err)
	}
	return text(message)
}

func TestRealBrokerAndSockets(t *testing.T) {
	w := wire(t)
	streams := map[string]fanoutv1connect.FanoutServiceSubscribeClientStream{}
	for name, client := range map[string]*connect.Client{"in process": w.inProcess, "connect": w.socket, "grpc": w.grpc} {
		streams[name] = subscribe(t, client, "m")
	}
	publish := func(sequence uint64) {
		t.Helper()
		if err := w.publisher.PublishEvent(t.Context(), &fanoutv1.Event{
			Map: "m", Lane: "l", Sequence: sequence,
			Changes: []*typesv1.Change{{Map: "m", Key: []byte("k"), Record: &typesv1.Record{Value: []byte{0xc0}}}},
		}); err != nil {
			t.Fatal(err)
		}
	}
	want := func(messages ...string) {
		t.Helper()
		for name, stream := range streams {
			for _, message := range messages {
				if got := receive(t, stream); got != message {
					t.Errorf("%s: got %s, want %s", name, got, message)
				}
			}
		}
	}
	// Watch has returned, so the very next event comes.
	publish(1)
	want("m/0/1")
	publish(3)
	want("gap m", "m/0/3")

	// A reconnect: a gap as soon as the bus delivers again, then events.
	if err := w.connection.ForceReconnect(); err != nil {
		t.Fatal(err)
	}
	want("gap m")
	publish(4)
	want("m/0/4")
}

func BenchmarkDelivery(b *testing.B) {
	for _, changes := range []int{1, 64} {
		event := &fanoutv1.Event{Map: "m", Lane: "01J0000000000000000000000"}
		for n := range changes {
			event.Changes = append(event.Changes, &typesv1.Change{
				Map: "m", Key: fmt.Appendf(nil, "key-%06d", n),
				Record: &typesv1.Record{
					Value:     make([]byte, 100),
					Timestamp: &typesv1.Timestamp{Millis: 1_760_000_000_000, Counter: 3, NodeId: "client-0123456789"},
				},
				Arrival: &typesv1.Arrival{Millis: 1_760_000_000_000, Counter: uint64(n)},
			})
		}
		for _, transport := range []string{"inprocess", "socket", "grpc"} {
			b.Run(fmt.Sprintf("changes=%d/%s", changes, transport), func(b *testing.B) {
				w := wire(b)
				client := map[string]*connect.Client{"inprocess": w.inProcess, "socket": w.socket, "grpc": w.grpc}[transport]
				stream := subscribe(b, client, "m")
				// As many as fit the queue are under way, so that nothing is lost.
				const window = 1024
				credits := make(chan struct{}, window)
				done := make(chan error, 1)
				b.ResetTimer()
				go func() {
					for n := range uint64(b.N) {
						credits <- struct{}{}
						event.Sequence = n + 1
						if err := w.publisher.PublishEvent(context.Background(), event); err != nil {
							done <- err
							return
						}
					}
					done <- nil
				}()
				for n := range uint64(b.N) {
					message, err := stream.Receive()
					if err != nil {
						b.Fatal(err)
					}
					if message.GetEvent().GetSequence() != n+1 {
						b.Fatalf("got %s, want event %d", text(message), n+1)
					}
					<-credits
				}
				b.StopTimer()
				if err := <-done; err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "events/s")
			})
		}
	}
}
