package rpc_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/goleak"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1/fanoutv1connect"
	"github.com/topgun-sync/topgun/services/internal/rpc"
)

// panicEnv makes the test binary play a server whose handler panics.
const panicEnv = "TOPGUN_RPC_TEST_PANIC"

func TestMain(m *testing.M) {
	if os.Getenv(panicEnv) != "" {
		panickingServer()
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// fake is the service under the edge; its fields say what calls do.
type fake struct {
	describe  func(context.Context) (*fanoutv1.DescribeResponse, error)
	subscribe func(context.Context, fanoutv1connect.FanoutServiceSubscribeServerStream) error
	watch     func(*fanoutv1.WatchRequest) (*fanoutv1.WatchResponse, error)
}

func (f fake) Describe(ctx context.Context, _ *fanoutv1.DescribeRequest) (*fanoutv1.DescribeResponse, error) {
	return f.describe(ctx)
}

func (f fake) Subscribe(ctx context.Context, _ *fanoutv1.SubscribeRequest, out fanoutv1connect.FanoutServiceSubscribeServerStream) error {
	return f.subscribe(ctx, out)
}

func (f fake) Publish(context.Context, *fanoutv1.PublishRequest) (*fanoutv1.PublishResponse, error) {
	return &fanoutv1.PublishResponse{}, nil
}

func (f fake) Watch(_ context.Context, req *fanoutv1.WatchRequest) (*fanoutv1.WatchResponse, error) {
	return f.watch(req)
}

func describeSeven(context.Context) (*fanoutv1.DescribeResponse, error) {
	return &fanoutv1.DescribeResponse{Streams: 7}, nil
}

func sendThree(_ context.Context, out fanoutv1connect.FanoutServiceSubscribeServerStream) error {
	for _, name := range []string{"a", "b", "c"} {
		gap := &fanoutv1.SubscribeResponse{Message: &fanoutv1.SubscribeResponse_Gap{Gap: &fanoutv1.Gap{Map: name}}}
		if err := out.Send(gap); err != nil {
			return err
		}
	}
	return nil
}

// serve runs a server over a real socket until the test ends.
func serve(t *testing.T, f fake, deps rpc.Deps, checks rpc.Checks) (url string) {
	t.Helper()
	server := rpc.NewServer(deps)
	fanoutv1connect.RegisterFanoutServiceHandler(server, f)
	mux := http.NewServeMux()
	rpc.Mount(mux, server, checks)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- rpc.Serve(ctx, rpc.HTTPServer(mux, nil), listener, 5*time.Second) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return "http://" + listener.Addr().String()
}

func dial(t *testing.T, url string, deps rpc.Deps, options ...connecthttp.Option) *connect.Client {
	t.Helper()
	client := rpc.HTTPClient()
	t.Cleanup(client.CloseIdleConnections)
	return rpc.Dial(url, client, deps, options...)
}

func TestEveryProtocolServesUnaryAndStream(t *testing.T) {
	url := serve(t, fake{describe: describeSeven, subscribe: sendThree}, rpc.Deps{}, nil)
	for name, options := range map[string][]connecthttp.Option{
		"connect": nil,
		"grpc":    {connecthttp.WithGRPC()},
		"grpcweb": {connecthttp.WithGRPCWeb()},
	} {
		t.Run(name, func(t *testing.T) {
			client := fanoutv1connect.NewFanoutServiceClient(dial(t, url, rpc.Deps{}, options...))
			response, err := client.Describe(t.Context(), &fanoutv1.DescribeRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if response.GetStreams() != 7 {
				t.Errorf("streams = %d, want 7", response.GetStreams())
			}
			if got := receiveAll(t, client); got != "abc" {
				t.Errorf("stream brought %q, want abc", got)
			}
		})
	}
}

func receiveAll(t *testing.T, client fanoutv1connect.FanoutServiceClient) string {
	t.Helper()
	stream, err := client.Subscribe(t.Context(), &fanoutv1.SubscribeRequest{})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	got := ""
	for {
		message, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			return got
		}
		if err != nil {
			t.Fatal(err)
		}
		got += message.GetGap().GetMap()
	}
}

func TestBufCurlNeedsNoSchema(t *testing.T) {
	buf, err := filepath.Abs("../../../.bin/buf")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(buf); err != nil {
		t.Log("buf is not installed; TestReflection covers the service it would ask")
		return
	}
	url := serve(t, fake{describe: describeSeven}, rpc.Deps{}, rpc.Checks{fanoutv1connect.FanoutServiceName: func() error { return nil }})
	for _, protocol := range []string{"connect", "grpc", "grpcweb"} {
		t.Run(protocol, func(t *testing.T) {
			for procedure, want := range map[string]string{
				"/topgun.fanout.v1.FanoutService/Describe": `"streams":7`,
				"/grpc.health.v1.Health/Check":             `"status":"SERVING"`,
			} {
				command := exec.CommandContext(t.Context(), buf, "curl", "--http2-prior-knowledge", "--protocol", protocol, "-d", "{}", url+procedure)
				command.Env = append(os.Environ(), "HOME="+t.TempDir(), "BUF_CACHE_DIR="+t.TempDir())
				output, err := command.CombinedOutput()
				if err != nil {
					t.Fatalf("%s: %v: %s", procedure, err, output)
				}
				if got := strings.ReplaceAll(string(output), " ", ""); !strings.Contains(got, want) {
					t.Errorf("%s answered %s, want %s in it", procedure, output, want)
				}
			}
		})
	}
}

func TestTraceContextCrossesBothTransports(t *testing.T) {
	spans := tracetest.NewInMemoryExporter()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSyncer(spans))
	defer provider.Shutdown(context.Background())
	deps := rpc.Deps{Tracer: provider.Tracer("test")}
	f := fake{describe: describeSeven, subscribe: sendThree}
	url := serve(t, f, deps, nil)
	local := rpc.NewServer(deps)
	fanoutv1connect.RegisterFanoutServiceHandler(local, f)

	for name, client := range map[string]*connect.Client{"http": dial(t, url, deps), "in process": rpc.InProcess(local, deps)} {
		t.Run(name, func(t *testing.T) {
			spans.Reset()
			ctx, root := provider.Tracer("test").Start(t.Context(), "root")
			if _, err := fanoutv1connect.NewFanoutServiceClient(client).Describe(ctx, &fanoutv1.DescribeRequest{}); err != nil {
				t.Fatal(err)
			}
			root.End()
			byKind := map[trace.SpanKind]tracetest.SpanStub{}
			for _, span := range spans.GetSpans() {
				byKind[span.SpanKind] = span
			}
			serverSpan, clientSpan := byKind[trace.SpanKindServer], byKind[trace.SpanKindClient]
			if serverSpan.Name != "topgun.fanout.v1.FanoutService/Describe" {
				t.Errorf("server span is %q", serverSpan.Name)
			}
			if serverSpan.Parent.SpanID() != clientSpan.SpanContext.SpanID() {
				t.Error("the server's span is not a child of the client's")
			}
			if !serverSpan.Parent.IsRemote() {
				t.Error("the server took the span from its context, not from the metadata")
			}
			if clientSpan.Parent.SpanID() != root.SpanContext().SpanID() {
				t.Error("the client's span is not a child of the caller's")
			}
		})
	}
}

func TestCallsAreMeasuredByProcedureAndCode(t *testing.T) {
	reader := metric.NewManualReader()
	provider := metric.NewMeterProvider(metric.WithReader(reader))
	defer provider.Shutdown(context.Background())
	deps := rpc.Deps{Meter: provider.Meter("test")}
	fail := false
	f := fake{
		describe: func(ctx context.Context) (*fanoutv1.DescribeResponse, error) {
			if fail {
				return nil, connect.NewError(connect.CodeUnavailable, "away")
			}
			return describeSeven(ctx)
		},
		subscribe: sendThree,
	}
	server := rpc.NewServer(deps)
	fanoutv1connect.RegisterFanoutServiceHandler(server, f)
	client := fanoutv1connect.NewFanoutServiceClient(rpc.InProcess(server, deps))
	for _, fail = range []bool{false, false, true} {
		_, _ = client.Describe(t.Context(), &fanoutv1.DescribeRequest{})
	}
	if got := receiveAll(t, client); got != "abc" {
		t.Fatalf("stream brought %q", got)
	}

	var data metricdata.ResourceMetrics
	if err := reader.Collect(t.Context(), &data); err != nil {
		t.Fatal(err)
	}
	got := map[string]uint64{}
	for _, m := range data.ScopeMetrics[0].Metrics {
		for _, point := range m.Data.(metricdata.Histogram[float64]).DataPoints {
			procedure, _ := point.Attributes.Value("procedure")
			code, _ := point.Attributes.Value("code")
			got[m.Name+" "+filepath.Base(procedure.AsString())+" "+code.AsString()] = point.Count
		}
	}
	for key, want := range map[string]uint64{
		"topgun.rpc.server.duration Describe ok":          2,
		"topgun.rpc.server.duration Describe unavailable": 1,
		"topgun.rpc.server.duration Subscribe ok":         1,
		"topgun.rpc.client.duration Describe ok":          2,
		"topgun.rpc.client.duration Describe unavailable": 1,
		"topgun.rpc.client.duration Subscribe ok":         1,
	} {
		if got[key] != want {
			t.Errorf("%s counted %d, want %d; all: %v", key, got[key], want, got)
		}
	}
}

// SEC-05: causes stay in the log.
func TestErrorEdge(t *testing.T) {
	secret := errors.New("dial postgres://user:hunter2@db: refused")
	for name, test := range map[string]struct {
		err    error
		code   connect.Code
		text   string
		logged bool
	}{
		"plain error":      {secret, connect.CodeInternal, "internal error", true},
		"authored":         {connect.NewError(connect.CodeUnavailable, "shard 3 is loading").WithCause(secret), connect.CodeUnavailable, "shard 3 is loading", false},
		"wrapped authored": {fmt.Errorf("apply: %w", connect.NewError(connect.CodeNotFound, "no such stream")), connect.CodeNotFound, "no such stream", false},
		"authored internal": {
			connect.NewError(connect.CodeInternal, "hunter2").WithCause(secret), connect.CodeInternal, "internal error", true,
		},
		"another server's": {connect.NewError(connect.CodeUnavailable, "hunter2").WithRemote(), connect.CodeInternal, "internal error", true},
	} {
		t.Run(name, func(t *testing.T) {
			var log bytes.Buffer
			deps := rpc.Deps{Logger: slog.New(slog.NewTextHandler(&log, nil))}
			f := fake{describe: func(context.Context) (*fanoutv1.DescribeResponse, error) { return nil, test.err }}
			server := rpc.NewServer(deps)
			fanoutv1connect.RegisterFanoutServiceHandler(server, f)
			for transport, client := range map[string]*connect.Client{
				"http":       dial(t, serve(t, f, rpc.Deps{}, nil), rpc.Deps{}),
				"in process": rpc.InProcess(server, rpc.Deps{}),
			} {
				_, err := fanoutv1connect.NewFanoutServiceClient(client).Describe(t.Context(), &fanoutv1.DescribeRequest{})
				if connect.CodeOf(err) != test.code || !strings.Contains(err.Error(), test.text) || strings.Contains(err.Error(), "hunter2") {
					t.Errorf("%s: got %v, want %s and %q", transport, err, test.code, test.text)
				}
			}
			if logged := log.Len() > 0; logged != test.logged {
				t.Errorf("logged = %v (%s), want %v", logged, log.String(), test.logged)
			}
		})
	}
}

func TestCanceledCallsAreNoNews(t *testing.T) {
	var log bytes.Buffer
	deps := rpc.Deps{Logger: slog.New(slog.NewTextHandler(&log, nil))}
	server := rpc.NewServer(deps)
	fanoutv1connect.RegisterFanoutServiceHandler(server, fake{describe: func(ctx context.Context) (*fanoutv1.DescribeResponse, error) {
		<-ctx.Done()
		return nil, fmt.Errorf("read shard 1: %w", ctx.Err())
	}})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	_, err := fanoutv1connect.NewFanoutServiceClient(rpc.InProcess(server, rpc.Deps{})).Describe(ctx, &fanoutv1.DescribeRequest{})
	if connect.CodeOf(err) != connect.CodeDeadlineExceeded {
		t.Errorf("got %v, want deadline_exceeded", err)
	}
	if log.Len() > 0 {
		t.Errorf("logged %s", log.String())
	}
}

func panickingServer() {
	server := rpc.NewServer(rpc.Deps{})
	fanoutv1connect.RegisterFanoutServiceHandler(server, fake{describe: func(context.Context) (*fanoutv1.DescribeResponse, error) {
		panic("half a merge")
	}})
	_, err := fanoutv1connect.NewFanoutServiceClient(rpc.InProcess(server, rpc.Deps{})).Describe(context.Background(), &fanoutv1.DescribeRequest{})
	fmt.Println("still alive:", err)
}

func TestRES05PanicEndsTheProcess(t *testing.T) {
	binary, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	command := exec.CommandContext(t.Context(), binary)
	command.Env = append(os.Environ(), panicEnv+"=1")
	output, err := command.CombinedOutput()
	if err == nil {
		t.Fatalf("the process lived on: %s", output)
	}
	for _, want := range []string{"half a merge", "panickingServer", "FanoutService/Describe"} {
		if !bytes.Contains(output, []byte(want)) {
			t.Errorf("the crash does not show %q: %s", want, output)
		}
	}
}

func TestMessageLimit(t *testing.T) {
	f := fake{watch: func(*fanoutv1.WatchRequest) (*fanoutv1.WatchResponse, error) { return &fanoutv1.WatchResponse{}, nil }}
	client := fanoutv1connect.NewFanoutServiceClient(dial(t, serve(t, f, rpc.Deps{}, nil), rpc.Deps{}))
	for size, want := range map[int]connect.Code{5 << 20: 0, 33 << 20: connect.CodeResourceExhausted} {
		_, err := client.Watch(t.Context(), &fanoutv1.WatchRequest{StreamId: strings.Repeat("x", size)})
		if (want == 0) != (err == nil) || (want != 0 && connect.CodeOf(err) != want) {
			t.Errorf("%d bytes: %v, want %v", size, err, want)
		}
	}
}

func BenchmarkInProcess(b *testing.B) {
	request := &fanoutv1.WatchRequest{StreamId: "s"}
	for n := range 64 {
		request.Add = append(request.Add, fmt.Sprintf("%0100d", n))
	}
	server := rpc.NewServer(rpc.Deps{})
	fanoutv1connect.RegisterFanoutServiceHandler(server, fake{watch: func(*fanoutv1.WatchRequest) (*fanoutv1.WatchResponse, error) {
		return &fanoutv1.WatchResponse{}, nil
	}})
	client := fanoutv1connect.NewFanoutServiceClient(rpc.InProcess(server, rpc.Deps{}))
	for b.Loop() {
		if _, err := client.Watch(b.Context(), request); err != nil {
			b.Fatal(err)
		}
	}
}

func TestInProcessSharesMessages(t *testing.T) {
	var received *fanoutv1.WatchRequest
	server := rpc.NewServer(rpc.Deps{})
	fanoutv1connect.RegisterFanoutServiceHandler(server, fake{watch: func(req *fanoutv1.WatchRequest) (*fanoutv1.WatchResponse, error) {
		received = req
		return &fanoutv1.WatchResponse{}, nil
	}})
	sent := &fanoutv1.WatchRequest{StreamId: "s", Add: []string{"a", "b"}}
	if _, err := fanoutv1connect.NewFanoutServiceClient(rpc.InProcess(server, rpc.Deps{})).Watch(t.Context(), sent); err != nil {
		t.Fatal(err)
	}
	if received.GetStreamId() != "s" || len(received.GetAdd()) != 2 {
		t.Fatalf("received %v", received)
	}
	if &received.GetAdd()[0] != &sent.GetAdd()[0] {
		t.Error("the list was copied")
	}
}

func TestHealth(t *testing.T) {
	states := make(chan error, 1)
	states <- nil
	current := func() error { // the newest of states
		err := <-states
		states <- err
		return err
	}
	checks := rpc.Checks{"topgun.a": current, "topgun.b": func() error { return nil }}
	url := serve(t, fake{}, rpc.Deps{}, checks)
	client := dial(t, url, rpc.Deps{}, connecthttp.WithGRPC())
	check := func(service string) (healthv1.HealthCheckResponse_ServingStatus, error) {
		var response healthv1.HealthCheckResponse
		err := client.CallUnary(t.Context(), healthSpec("Check", connect.StreamTypeUnary), &healthv1.HealthCheckRequest{Service: service}, &response)
		return response.GetStatus(), err
	}
	for _, service := range []string{"", "topgun.a", "topgun.b"} {
		if status, err := check(service); err != nil || status != healthv1.HealthCheckResponse_SERVING {
			t.Errorf("%q: %v, %v", service, status, err)
		}
	}
	if _, err := check("topgun.c"); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("unknown service: %v, want not_found", err)
	}

	stream, err := client.CallServerStream(t.Context(), healthSpec("Watch", connect.StreamTypeServer), &healthv1.HealthCheckRequest{Service: "topgun.a"})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	var response healthv1.HealthCheckResponse
	if err := stream.Receive(&response); err != nil || response.GetStatus() != healthv1.HealthCheckResponse_SERVING {
		t.Fatalf("first status: %v, %v", response.GetStatus(), err)
	}
	<-states
	states <- errors.New("loading")
	if err := stream.Receive(&response); err != nil || response.GetStatus() != healthv1.HealthCheckResponse_NOT_SERVING {
		t.Fatalf("second status: %v, %v", response.GetStatus(), err)
	}
	var list healthv1.HealthListResponse
	if err := client.CallUnary(t.Context(), healthSpec("List", connect.StreamTypeUnary), &healthv1.HealthListRequest{}, &list); err != nil {
		t.Fatal(err)
	}
	got := fmt.Sprint(list.GetStatuses()[""].GetStatus(), list.GetStatuses()["topgun.a"].GetStatus(), list.GetStatuses()["topgun.b"].GetStatus())
	if want := fmt.Sprint(healthv1.HealthCheckResponse_NOT_SERVING, healthv1.HealthCheckResponse_NOT_SERVING, healthv1.HealthCheckResponse_SERVING); got != want {
		t.Errorf("List: %s, want %s", got, want)
	}
}

func healthSpec(method string, streamType connect.StreamType) connect.Spec {
	return connect.Spec{StreamType: streamType, Procedure: "/grpc.health.v1.Health/" + method}
}

func TestOperatorPort(t *testing.T) {
	var state error
	mux := http.NewServeMux()
	rpc.MountOperator(mux, rpc.Checks{"bus": func() error { return state }}, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, "metric 1")
	}))
	get := func(path string) (int, string) {
		recorder := httptest.NewRecorder()
		mux.ServeHTTP(recorder, httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, nil))
		return recorder.Code, strings.TrimSpace(recorder.Body.String())
	}
	for _, test := range []struct {
		path  string
		state error
		code  int
		body  string
	}{
		{"/health/live", nil, 200, "ok"},
		{"/health/live", errors.New("away"), 200, "ok"},
		{"/health/ready", nil, 200, `{"ready":true,"reasons":[]}`},
		{"/health/ready", errors.New("away"), 503, `{"ready":false,"reasons":["bus: away"]}`},
		{"/metrics", nil, 200, "metric 1"},
	} {
		state = test.state
		if code, body := get(test.path); code != test.code || body != test.body {
			t.Errorf("%s with %v: %d %s, want %d %s", test.path, test.state, code, body, test.code, test.body)
		}
	}
	if code, body := get("/debug/pprof/"); code != 200 || !strings.Contains(body, "goroutine") {
		t.Errorf("pprof: %d", code)
	}
}

// UPG-01: stopping waits for calls in flight, cuts off those that do not end, and
// does not wait for health watchers.
func TestServeStops(t *testing.T) {
	entered, release := make(chan struct{}), make(chan struct{})
	f := fake{
		describe: func(ctx context.Context) (*fanoutv1.DescribeResponse, error) {
			close(entered)
			<-release
			return describeSeven(ctx)
		},
		subscribe: func(ctx context.Context, out fanoutv1connect.FanoutServiceSubscribeServerStream) error {
			if err := sendThree(ctx, out); err != nil {
				return err
			}
			<-ctx.Done()
			return ctx.Err()
		},
	}
	start := func(grace time.Duration) (client *connect.Client, stop func() (time.Duration, error)) {
		server := rpc.NewServer(rpc.Deps{})
		fanoutv1connect.RegisterFanoutServiceHandler(server, f)
		mux := http.NewServeMux()
		rpc.Mount(mux, server, nil)
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- rpc.Serve(ctx, rpc.HTTPServer(mux, nil), listener, grace) }()
		return dial(t, "http://"+listener.Addr().String(), rpc.Deps{}), func() (time.Duration, error) {
			begun := time.Now()
			cancel()
			err := <-done
			return time.Since(begun), err
		}
	}

	t.Run("call in flight", func(t *testing.T) {
		client, stop := start(time.Minute)
		result := make(chan error, 1)
		go func() {
			_, err := fanoutv1connect.NewFanoutServiceClient(client).Describe(context.Background(), &fanoutv1.DescribeRequest{})
			result <- err
		}()
		<-entered
		stopped := make(chan error, 1)
		go func() {
			_, err := stop()
			stopped <- err
		}()
		close(release)
		if err := <-result; err != nil {
			t.Errorf("the call in flight: %v", err)
		}
		if err := <-stopped; err != nil {
			t.Error(err)
		}
	})
	t.Run("endless stream", func(t *testing.T) {
		client, stop := start(50 * time.Millisecond)
		stream, err := fanoutv1connect.NewFanoutServiceClient(client).Subscribe(t.Context(), &fanoutv1.SubscribeRequest{})
		if err != nil {
			t.Fatal(err)
		}
		defer stream.Close()
		if _, err := stream.Receive(); err != nil {
			t.Fatal(err)
		}
		if took, err := stop(); err != nil || took > 30*time.Second {
			t.Errorf("stopped after %s: %v", took, err)
		}
	})
	t.Run("health watcher", func(t *testing.T) {
		client, stop := start(time.Minute)
		stream, err := client.CallServerStream(t.Context(), healthSpec("Watch", connect.StreamTypeServer), &healthv1.HealthCheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		defer stream.Close()
		var response healthv1.HealthCheckResponse
		if err := stream.Receive(&response); err != nil {
			t.Fatal(err)
		}
		if took, err := stop(); err != nil || took > 30*time.Second {
			t.Errorf("stopped after %s: %v", took, err)
		}
	})
}
