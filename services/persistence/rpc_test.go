package persistence_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	connect "connectrpc.com/connect/v2"
	"go.opentelemetry.io/otel/propagation"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"google.golang.org/protobuf/proto"

	"github.com/topgun-sync/topgun/core/keyspace"
	logv1 "github.com/topgun-sync/topgun/gen/go/topgun/log/v1"
	persistencev1 "github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1/persistencev1connect"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
	"github.com/topgun-sync/topgun/services/internal/commitlog"
	"github.com/topgun-sync/topgun/services/internal/rpc"
	"github.com/topgun-sync/topgun/services/persistence"
)

// dial returns a client of the service, in process.
func dial(service *persistence.Service) persistencev1connect.PersistenceServiceClient {
	server := rpc.NewServer(rpc.Deps{})
	service.Register(server)
	return persistencev1connect.NewPersistenceServiceClient(rpc.InProcess(server, rpc.Deps{}))
}

func everything() *persistencev1.LoadRequest {
	req := &persistencev1.LoadRequest{}
	for partition := range uint32(keyspace.PartitionCount) {
		req.Partitions = append(req.Partitions, partition)
	}
	return req
}

// receive reads a Load to its end.
func receive(ctx context.Context, client persistencev1connect.PersistenceServiceClient, req *persistencev1.LoadRequest) (responses []*persistencev1.LoadResponse, err error) {
	stream, err := client.Load(ctx, req)
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	for {
		response, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			return responses, nil
		}
		if err != nil {
			return responses, err
		}
		responses = append(responses, response)
	}
}

func TestLoadReturnsWhatTheLogSaid(t *testing.T) {
	log, store := newFakeLog(), newFakeStore()
	service, _ := start(t, config(), persistence.Deps{Store: store, Log: log})
	client := dial(service)
	want := change("key", "value", 5)
	want.Record.TtlMillis = 1000
	want.Arrival.Counter = 3
	want.Restamped = []*typesv1.Timestamp{{Millis: 1<<64 - 1, Counter: 2, NodeId: "liar"}}
	tombstone := change("\xff\x00", "", 6)
	log.append("a", want, tombstone)
	if _, err := client.Flush(t.Context(), &persistencev1.FlushRequest{}); err != nil {
		t.Fatalf("flush: %v", err)
	}
	responses, err := receive(t.Context(), client, everything())
	if err != nil || len(responses) != 2 {
		t.Fatalf("load: %d responses, %v", len(responses), err)
	}
	if marks := responses[0].GetWatermarks(); len(marks) != 1 || len(responses[0].GetChanges()) != 0 ||
		!proto.Equal(marks[0], &persistencev1.Watermark{History: "history", Lane: "a", Sequence: 1, Number: 1}) {
		t.Errorf("the first response is %v", responses[0])
	}
	got := responses[1].GetChanges()
	slices.SortFunc(got, func(a, b *typesv1.Change) int { return bytes.Compare(a.GetKey(), b.GetKey()) })
	if len(got) != 2 || !proto.Equal(got[0], want) || !proto.Equal(got[1], tombstone) {
		t.Errorf("loaded %v", got)
	}
	marks, err := client.Watermarks(t.Context(), &persistencev1.WatermarksRequest{})
	if err != nil || len(marks.GetWatermarks()) != 1 || marks.GetWatermarks()[0].GetSequence() != 1 {
		t.Errorf("watermarks: %v, %v", marks, err)
	}
	describe, err := client.Describe(t.Context(), &persistencev1.DescribeRequest{})
	if err != nil || !proto.Equal(describe, &persistencev1.DescribeResponse{Store: "memory", Records: 2, Tombstones: 1, Sequence: 1}) {
		t.Errorf("describe: %v, %v", describe, err)
	}
	// An empty store, or partitions without records, still show the watermarks.
	responses, err = receive(t.Context(), client, &persistencev1.LoadRequest{Partitions: []uint32{uint32(keyspace.Partition("key")+1) % 271}})
	if err != nil || len(responses) < 1 || len(responses[0].GetWatermarks()) != 1 {
		t.Errorf("partitions without records load as %v, %v", responses, err)
	}
}

// TestLoadReturnsAllKinds stores what is about one key in every way, and forgets one.
func TestLoadReturnsAllKinds(t *testing.T) {
	log := newFakeLog()
	service, _ := start(t, config(), persistence.Deps{Store: newFakeStore(), Log: log})
	client := dial(service)
	of := func(kind typesv1.Kind, mapName, tag, value string, at uint64) *typesv1.Change {
		c := change("key", value, at)
		c.Kind, c.Map, c.Tag = kind, mapName, tag
		return c
	}
	const or, counter, lock = typesv1.Kind_KIND_OR, typesv1.Kind_KIND_COUNTER, typesv1.Kind_KIND_LOCK
	want := []*typesv1.Change{
		of(lock, "!locks", "", "held", 5),
		of(counter, "+"+strings.Repeat("c", 256), "node-a", "sums", 6),
		of(0, "todos", "", "value", 1),
		of(or, "todos", "1:0:a", "", 3),
		of(or, "todos", "2:0:a", "two", 4),
	}
	log.append("a", want...)
	explicit := of(typesv1.Kind_KIND_LWW, "$devices", "", "cursors", 7)
	forgotten := of(or, "todos", "3:0:a", "", 8)
	log.append("a", explicit, forgotten)
	pruned := of(or, "todos", "3:0:a", "", 9)
	pruned.Record, pruned.Pruned = nil, true
	again := of(or, "todos", "2:0:a", "", 2) // does not go: it came before
	again.Record, again.Pruned = nil, true
	log.append("b", pruned, again)
	if _, err := client.Flush(t.Context(), &persistencev1.FlushRequest{}); err != nil {
		t.Fatalf("flush: %v", err)
	}
	responses, err := receive(t.Context(), client, everything())
	if err != nil || len(responses) != 2 {
		t.Fatalf("load: %d responses, %v", len(responses), err)
	}
	got := responses[1].GetChanges()
	slices.SortFunc(got, func(a, b *typesv1.Change) int {
		return strings.Compare(a.GetMap()+" "+a.GetTag(), b.GetMap()+" "+b.GetTag())
	})
	explicit.Kind = 0 // as writers leave it out
	want = slices.Insert(want, 1, explicit)
	if !slices.EqualFunc(got, want, func(a, b *typesv1.Change) bool { return proto.Equal(a, b) }) {
		t.Errorf("loaded %v\nwant %v", got, want)
	}
}

func TestLoadChunksAreBounded(t *testing.T) {
	log, store := newFakeLog(), newFakeStore()
	service, _ := start(t, config(), persistence.Deps{Store: store, Log: log})
	client := dial(service)
	for i := range uint64(40) {
		c := change(fmt.Sprint("big", i), "x", i+1)
		c.Record.Value = make([]byte, 100<<10+i)
		small := change(fmt.Sprint("small", i), "x", i+1)
		log.append("a", c, small)
	}
	if _, err := client.Flush(t.Context(), &persistencev1.FlushRequest{}); err != nil {
		t.Fatalf("flush: %v", err)
	}
	responses, err := receive(t.Context(), client, everything())
	if err != nil {
		t.Fatalf("load: %v", err)
	}
	records := 0
	for i, response := range responses {
		records += len(response.GetChanges())
		if size := proto.Size(response); size > 1<<20 {
			t.Errorf("response %d has %d bytes", i, size)
		}
	}
	if records != 80 || len(responses) > 6 {
		t.Errorf("%d records came in %d responses", records, len(responses))
	}
}

// TestPG08StoreAwayIsNotEmpty also loads before Run has reached the store.
func TestPG08StoreAwayIsNotEmpty(t *testing.T) {
	for away, text := range map[error]string{
		fmt.Errorf("dial tcp 10.1.2.3: password s3cret: %w", persistence.ErrUnavailable): "the store is unavailable",
		fmt.Errorf("relation records: %w", persistence.ErrRefused):                       "the store refuses to answer",
	} {
		log, store := newFakeLog(), newFakeStore()
		store.down = away
		service, _ := start(t, config(), persistence.Deps{Store: store, Log: log})
		client := dial(service)
		responses, err := receive(t.Context(), client, everything())
		if connect.CodeOf(err) != connect.CodeUnavailable || len(responses) != 0 || !strings.Contains(err.Error(), text) || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("load answers %d responses, %v", len(responses), err)
		}
		_, err = client.Watermarks(t.Context(), &persistencev1.WatermarksRequest{})
		if connect.CodeOf(err) != connect.CodeUnavailable {
			t.Errorf("watermarks answers %v", err)
		}
	}
}

func TestBadLoads(t *testing.T) {
	service, _ := start(t, config(), persistence.Deps{Store: newFakeStore(), Log: newFakeLog()})
	client := dial(service)
	for name, partitions := range map[string][]uint32{
		"none": nil, "271": {0, 271}, "huge": {1<<32 - 1}, "too many": make([]uint32, 272),
	} {
		if _, err := receive(t.Context(), client, &persistencev1.LoadRequest{Partitions: partitions}); connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestFlush wants an answer only once everything is stored, soon, and an end at
// the deadline and when the drain has halted.
func TestFlush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, store := newFakeLog(), newFakeStore()
		c := config()
		c.BatchDelay = time.Minute
		service, _ := start(t, c, persistence.Deps{Store: store, Log: log})
		client := dial(service)
		flush := func(ctx context.Context) (uint64, error) {
			response, err := client.Flush(ctx, &persistencev1.FlushRequest{})
			return response.GetSequence(), err
		}
		if got, err := flush(t.Context()); got != 0 || err != nil {
			t.Errorf("of an empty log flush answers %d, %v", got, err)
		}
		for i := range uint64(3) {
			log.append("a", change("k", fmt.Sprint(i), i+1))
			begin := time.Now()
			if got, err := flush(t.Context()); got != i+1 || err != nil || time.Since(begin) > time.Second {
				t.Errorf("flush answers %d, %v after %v, want %d at once", got, err, time.Since(begin), i+1)
			}
			wantContent(t, store, fmt.Sprint("k:", i), fmt.Sprint("history/a:", i+1))
		}
		store.set(func() { store.down = persistence.ErrUnavailable })
		log.append("a", change("k", "last", 9))
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := flush(ctx); connect.CodeOf(err) != connect.CodeDeadlineExceeded {
			t.Errorf("of a store that is away flush answers %v", err)
		}
		store.set(func() { store.down = nil })
		if got, err := flush(t.Context()); got != 4 || err != nil {
			t.Errorf("of a store that came back flush answers %d, %v", got, err)
		}
		log.put(&logv1.Commit{Version: 9, Lane: "a"}, nil)
		if _, err := flush(t.Context()); connect.CodeOf(err) != connect.CodeFailedPrecondition {
			t.Errorf("of a halted drain flush answers %v", err)
		}
		log.edit(func() { log.down = errors.New("no responders") })
		if _, err := flush(t.Context()); connect.CodeOf(err) != connect.CodeUnavailable {
			t.Errorf("of a log that is away flush answers %v", err)
		}
	})
}

// TestSpansContinueTheWriters wants one span per transaction that belongs to the
// trace of the first commit and links to the others.
func TestSpansContinueTheWriters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		spans := tracetest.NewSpanRecorder()
		provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans))
		log, store := newFakeLog(), newFakeStore()
		var traces []string
		for i := range uint64(3) {
			trace := fmt.Sprintf("%032x", i+1)
			traces = append(traces, trace)
			log.put(&logv1.Commit{Version: 1, Lane: "a", Body: &logv1.Commit_Claim{}}, func(e *commitlog.Entry) {
				e.Trace = propagation.MapCarrier{"traceparent": "00-" + trace + "-00000000000000aa-01"}
			})
		}
		start(t, config(), persistence.Deps{Store: store, Log: log, Tracer: provider.Tracer("test")})
		time.Sleep(time.Second)
		ended := spans.Ended()
		if len(ended) != 1 || ended[0].Name() != "persistence.store" || ended[0].SpanContext().TraceID().String() != traces[0] {
			t.Fatalf("the spans are %v", ended)
		}
		var links []string
		for _, link := range ended[0].Links() {
			links = append(links, link.SpanContext.TraceID().String())
		}
		if !slices.Equal(links, traces[1:]) {
			t.Errorf("the span links to %v, want %v", links, traces[1:])
		}
	})
}

func TestMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reader := sdkmetric.NewManualReader()
		meter := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader)).Meter("test")
		read := func() map[string]int64 {
			var all metricdata.ResourceMetrics
			if err := reader.Collect(context.Background(), &all); err != nil {
				t.Fatal(err)
			}
			values := make(map[string]int64)
			for _, m := range all.ScopeMetrics[0].Metrics {
				switch data := m.Data.(type) {
				case metricdata.Sum[int64]:
					for _, point := range data.DataPoints {
						values[m.Name] += point.Value
					}
				case metricdata.Gauge[int64]:
					values[m.Name] = data.DataPoints[0].Value
				case metricdata.Histogram[float64]:
					for _, point := range data.DataPoints {
						values[m.Name] += int64(point.Count)
					}
				}
			}
			return values
		}
		log, store := newFakeLog(), newFakeStore()
		start(t, config(), persistence.Deps{Store: store, Log: log, Meter: meter})
		log.append("a", change("x", "1", 1), change("y", "1", 1))
		time.Sleep(time.Second)
		got := read()
		for name, want := range map[string]int64{
			"topgun.persistence.rows": 2, "topgun.persistence.commits": 1, "topgun.persistence.batches": 1,
			"topgun.persistence.store.duration": 1, "topgun.persistence.lag": 0, "topgun.persistence.halted": 0,
		} {
			if got[name] != want {
				t.Errorf("%s is %d, want %d", name, got[name], want)
			}
		}
		store.set(func() { store.down = persistence.ErrUnavailable })
		for i := range uint64(5) {
			log.append("a", change("x", "2", i+2))
		}
		time.Sleep(time.Minute)
		if lag := read()["topgun.persistence.lag"]; lag != 5 {
			t.Errorf("the lag is %d, want 5", lag)
		}
		store.set(func() { store.down = nil })
		log.put(&logv1.Commit{Version: 9, Lane: "a"}, nil)
		time.Sleep(time.Minute)
		if halted := read()["topgun.persistence.halted"]; halted != 1 {
			t.Errorf("halted is %d, want 1", halted)
		}
	})
}

func TestNewChecks(t *testing.T) {
	deps := persistence.Deps{Store: newFakeStore(), Log: newFakeLog(), Logger: slog.New(slog.DiscardHandler)}
	for name, change := range map[string]func(c *persistence.Config, d *persistence.Deps){
		"unknown store":  func(c *persistence.Config, _ *persistence.Deps) { c.Store = "redis" },
		"no URL":         func(c *persistence.Config, _ *persistence.Deps) { c.Store = "postgres" },
		"no path":        func(c *persistence.Config, _ *persistence.Deps) { c.Store = "sqlite" },
		"no batch":       func(c *persistence.Config, _ *persistence.Deps) { c.BatchChanges = 0 },
		"no bytes":       func(c *persistence.Config, _ *persistence.Deps) { c.BatchBytes = 0 },
		"negative delay": func(c *persistence.Config, _ *persistence.Deps) { c.BatchDelay = -1 },
		"no timeout":     func(c *persistence.Config, _ *persistence.Deps) { c.StoreTimeout = 0 },
		"no trim age":    func(c *persistence.Config, _ *persistence.Deps) { c.TrimAge = 0 },
		"no log":         func(_ *persistence.Config, d *persistence.Deps) { d.Log = nil },
		"no store":       func(_ *persistence.Config, d *persistence.Deps) { d.Store = nil },
		"no logger":      func(_ *persistence.Config, d *persistence.Deps) { d.Logger = nil },
	} {
		c, d := config(), deps
		change(&c, &d)
		if _, err := persistence.New(c, d); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := persistence.New(config(), deps); err != nil {
		t.Errorf("good settings: %v", err)
	}
}
