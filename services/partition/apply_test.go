package partition

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"

	"github.com/topgun-sync/topgun/core/msgval"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
	"github.com/topgun-sync/topgun/services/internal/bus"
	"github.com/topgun-sync/topgun/services/internal/commitlog"
)

var _ Events = bus.Publisher(nil)

// one applies one op and returns its outcome, and its winner as value@millis:node.
func (n *node) one(op *partitionv1.Op) string {
	n.world.t.Helper()
	r := n.apply(op)[0]
	got := outcomeWords([]*partitionv1.Receipt{r})
	if w := r.GetWinner(); w != nil {
		got += " " + describeRecord(w)
	}
	if r.GetReason() != "" {
		got += " " + r.GetReason()
	}
	return got
}

func describeRecord(r *typesv1.Record) string {
	value := "-"
	if len(r.GetValue()) > 0 {
		value = string(r.GetValue()[1:])
	}
	return fmt.Sprintf("%s@%d:%s", value, r.GetTimestamp().GetMillis(), r.GetTimestamp().GetNodeId())
}

func TestACK06_MergesAndRepetitions(t *testing.T) {
	n := newWorld(t).start()
	for i, step := range []struct {
		op   *partitionv1.Op
		want string
	}{
		{put("k", "v1", 10, "a"), "APPLIED"},
		{put("k", "v1", 10, "a"), "DUPLICATE"},
		{put("k", "v2", 10, "a"), "REJECTED " + reasonReused},
		{put("k", "v3", 9, "a"), "SUPERSEDED v1@10:a"},
		{put("k", "v4", 10, "b"), "APPLIED"},
		{put("k", "", 11, "a"), "APPLIED"},
		{put("k", "v5", 10, "z"), "SUPERSEDED -@11:a"},
		{put("k", "", 11, "a"), "DUPLICATE"},
	} {
		if got := n.one(step.op); got != step.want {
			t.Errorf("step %d: %s, want %s", i, got, step.want)
		}
	}
	all := n.everything("m", 0)
	if len(all) != 1 || describeRecord(all[0].GetRecord()) != "-@11:a" {
		t.Errorf("the map holds %v", all)
	}
}

// A stamp far in the future is replaced once, however often and whenever the op comes.
func TestCLK02_AFutureStampIsReplacedOnce(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	now := w.millis()
	future := put("k", "future", now+3_600_000, "liar")
	r := n.apply(future)[0]
	if r.GetOutcome() != partitionv1.Outcome_OUTCOME_RESTAMPED {
		t.Fatalf("outcome %s", r.GetOutcome())
	}
	stamp := r.GetWinner().GetTimestamp()
	if stamp.GetMillis() < now || stamp.GetMillis() > w.millis() || !strings.HasPrefix(stamp.GetNodeId(), "topgun-") {
		t.Errorf("the stamp is %v at %d", stamp, now)
	}
	first := describeRecord(r.GetWinner())
	if got := n.one(future); got != "RESTAMPED "+first {
		t.Errorf("the op again: %s, want %s", got, first)
	}
	if got := n.one(put("k", "later", w.millis()+1000, "honest")); got != "APPLIED" {
		t.Errorf("an honest write: %s", got)
	}
	// The op comes again, also after a restart, and when its stamp has come true.
	for range 2 {
		if got := n.one(future); !strings.HasPrefix(got, "RESTAMPED later@") {
			t.Errorf("the op again: %s", got)
		}
		n.stop()
		w.wall.set(2 * time.Hour)
		n = w.start()
	}
	if got := describeRecord(n.everything("m", 0)[0].GetRecord()); !strings.HasPrefix(got, "later@") {
		t.Errorf("the old write came back: %s", got)
	}
	// Another node's stamps are judged by themselves.
	if got := n.one(put("k", "last", w.millis(), "honest")); got != "APPLIED" {
		t.Errorf("after the repetitions: %s", got)
	}
}

// A future op that loses is remembered as well: it must not win once its time comes.
func TestCLK02_AFutureStampThatLosesIsRemembered(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	ahead := w.millis() + 50_000 // within the drift, above every stamp of the shard
	n.apply(put("k", "winner", ahead, "a"))
	future := put("k", "future", w.millis()+3_600_000, "liar")
	want := fmt.Sprintf("RESTAMPED winner@%d:a", ahead)
	if got := n.one(future); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	w.wall.set(2 * time.Hour)
	if got := n.one(future); got != want {
		t.Errorf("when its time has come: %s, want %s", got, want)
	}
}

// CLK-03: the wall clock jumps ahead for a moment; stamps made afterwards are of the
// present, so honest writes still win.
func TestCLK03_KeysStayWritableAfterTheClockReturned(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	w.wall.set(time.Hour)
	n.apply(put("other", "v", 1, "a")) // takes the arrival clock along
	w.wall.set(0)
	n.apply(put("k", "future", w.millis()+120_000, "liar"))
	if got := n.one(put("k", "honest", w.millis()+10, "a")); got != "APPLIED" {
		t.Errorf("a write after the clock returned: %s", got)
	}
}

func TestBadOpsAreRejectedOneByOne(t *testing.T) {
	n := newWorld(t).start()
	change := func(f func(*partitionv1.Op)) *partitionv1.Op {
		op := put("k", "v", 1, "a")
		f(op)
		return op
	}
	for name, op := range map[string]*partitionv1.Op{
		"BAD_MAP_NAME":    change(func(o *partitionv1.Op) { o.Map = "1m" }),
		"BAD_MAP_NAME 2":  change(func(o *partitionv1.Op) { o.Map = strings.Repeat("m", 129) }),
		"BAD_KEY":         change(func(o *partitionv1.Op) { o.Key = []byte("a\x00b") }),
		"BAD_KEY 2":       change(func(o *partitionv1.Op) { o.Key = []byte("\xff") }),
		"BAD_KEY 3":       change(func(o *partitionv1.Op) { o.Key = nil }),
		"BAD_TIMESTAMP":   change(func(o *partitionv1.Op) { o.Record.Timestamp = nil }),
		"BAD_TIMESTAMP 2": change(func(o *partitionv1.Op) { o.Record.Timestamp.NodeId = "a:b" }),
		"BAD_TIMESTAMP 3": change(func(o *partitionv1.Op) { o.Record.Timestamp.Millis = 1<<53 + 1 }),
		"BAD_TIMESTAMP 4": change(func(o *partitionv1.Op) { o.Record.Timestamp.NodeId = "" }),
		"VALUE_TOO_LARGE": change(func(o *partitionv1.Op) { o.Record.Value = make([]byte, maxValue+1) }),
		"BAD_MESSAGE":     change(func(o *partitionv1.Op) { o.Record.Value = []byte{0xc1} }),
		"BAD_MESSAGE 2":   change(func(o *partitionv1.Op) { o.Record.Value = []byte{1, 2} }),
		"BAD_MESSAGE 3":   change(func(o *partitionv1.Op) { o.Record = nil }),
	} {
		good := put("good", "v", 1, "a")
		req := &partitionv1.ApplyRequest{Shards: []*partitionv1.ShardOps{{Shard: shardFor(good.GetKey()), Ops: []*partitionv1.Op{op, good}}}}
		resp, err := n.Apply(t.Context(), req)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		receipts := resp.GetShards()[0].GetReceipts()
		word, _, _ := strings.Cut(name, " ")
		if receipts[0].GetOutcome() != partitionv1.Outcome_OUTCOME_REJECTED || !strings.HasPrefix(receipts[0].GetReason(), word+": ") {
			t.Errorf("%s: %v", name, receipts[0])
		}
		if o := receipts[1].GetOutcome(); o != partitionv1.Outcome_OUTCOME_APPLIED && o != partitionv1.Outcome_OUTCOME_DUPLICATE {
			t.Errorf("%s: its neighbour got %s", name, o)
		}
	}
}

func TestBadRequestsAreRefused(t *testing.T) {
	n := newWorld(t).start()
	op := put("k", "v", 1, "a")
	for name, req := range map[string]*partitionv1.ApplyRequest{
		"no ops":      {Shards: []*partitionv1.ShardOps{{Shard: shardFor(op.GetKey())}}},
		"wrong shard": {Shards: []*partitionv1.ShardOps{{Shard: (shardFor(op.GetKey()) + 1) % shardCount, Ops: []*partitionv1.Op{op}}}},
		"origin":      {Shards: []*partitionv1.ShardOps{{Shard: shardFor(op.GetKey()), Origin: strings.Repeat("o", 129), Ops: []*partitionv1.Op{op}}}},
		"too many":    {Shards: []*partitionv1.ShardOps{{Shard: shardFor(op.GetKey()), Ops: make([]*partitionv1.Op, maxOps+1)}}},
	} {
		if _, err := n.Apply(t.Context(), req); connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	resp, err := n.Apply(t.Context(), &partitionv1.ApplyRequest{Shards: []*partitionv1.ShardOps{
		{Shard: shardCount, Ops: []*partitionv1.Op{op}}, {Shard: shardFor(op.GetKey()), Ops: []*partitionv1.Op{op}},
	}})
	if err != nil || resp.GetShards()[0].GetRefusal() != partitionv1.Refusal_REFUSAL_NOT_OWNER || len(resp.GetShards()[1].GetReceipts()) != 1 {
		t.Errorf("an unknown shard beside a known one: %v, %v", resp, err)
	}
}

// Receipts do not come before the log has the changes, and neither do reads.
func TestACK01_NothingIsAnsweredBeforeItIsLogged(t *testing.T) {
	n := newWorld(t).start()
	n.apply(put("k", "v", 1, "a"))
	n.writer.mu.Lock() // the log does not answer
	locked := true
	defer func() {
		if locked {
			n.writer.mu.Unlock()
		}
	}()
	// The caller gives up when its op is merged.
	ctx, cancel := context.WithCancel(t.Context())
	before := n.stats.ops[applied].Load()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() {
		for n.stats.ops[applied].Load() == before && ctx.Err() == nil {
			time.Sleep(time.Millisecond) // between two looks
		}
		cancel()
	})
	if _, err := n.tryApply(ctx, put("k", "w", 2, "a")); connect.CodeOf(err) != connect.CodeUnavailable {
		t.Fatalf("an op was answered before it was logged: %v", err)
	}
	for name, read := range map[string]func(context.Context) error{
		"Apply of the same op": func(ctx context.Context) error {
			_, err := n.tryApply(ctx, put("k", "w", 2, "a"))
			return err
		},
		"Since": func(ctx context.Context) error {
			_, err := n.Since(ctx, &partitionv1.SinceRequest{Map: "m"})
			return err
		},
		"Leaves": func(ctx context.Context) error {
			_, err := n.Leaves(ctx, &partitionv1.LeavesRequest{Map: "m"})
			return err
		},
		"Records": func(ctx context.Context) error {
			_, err := n.Records(ctx, &partitionv1.RecordsRequest{Map: "m", LastLeaf: 4095})
			return err
		},
		"Query": func(ctx context.Context) error {
			_, err := n.Query(ctx, &partitionv1.QueryRequest{Map: "m"})
			return err
		},
		"ListMaps": func(ctx context.Context) error { _, err := n.ListMaps(ctx, nil); return err },
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		if err := read(ctx); err == nil {
			t.Errorf("%s answered with what is not logged", name)
		}
		cancel()
	}
	if got := len(n.events.all()); got > 1 {
		t.Errorf("%d events were published", got)
	}
	locked = false
	n.writer.mu.Unlock()
	if got := describeRecord(n.everything("m", 0)[0].GetRecord()); got != "w@2:a" {
		t.Errorf("after the log answered: %s", got)
	}
}

func TestEventsCarrySequenceAndOrigin(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	n.apply(put("k", "1", 1, "a"))
	n.apply(put("k", "2", 2, "a"))
	n.apply(put("k", "1", 1, "a")) // changes nothing
	n.apply(put("k", "3", w.millis()+3_600_000, "a"))
	n.stop() // publishes what is logged
	events := n.events.all()
	if len(events) != 3 {
		t.Fatalf("%d events, want 3", len(events))
	}
	for i, want := range []string{"1 session 1@1:a", "2 session 2@2:a", "3  3@"} {
		e := events[i]
		c := e.GetChanges()[0]
		got := fmt.Sprintf("%d %s %s", e.GetSequence(), c.GetOrigin(), describeRecord(c.GetRecord()))
		if !strings.HasPrefix(got, want) || e.GetMap() != "m" || e.GetLane() != n.writer.Name() || e.GetShard() != shardFor([]byte("k")) {
			t.Errorf("event %d is %s of %s, want %s", i, got, e.GetMap(), want)
		}
	}
	for entry, err := range w.log.Read(t.Context(), 1, false) {
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range entry.Commit.GetChanges().GetShards() {
			if s.GetChanges()[0].GetOrigin() != "" {
				t.Error("the log holds an origin")
			}
		}
	}
}

func TestATraceLeadsFromTheOpThroughTheLogToTheEvent(t *testing.T) {
	recorder := tracetest.NewSpanRecorder()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(recorder))
	w := newWorld(t)
	n := w.start(func(d *Deps) { d.Tracer = provider.Tracer("test") })
	op := put("k", "v", 1, "a")
	_, err := n.Apply(t.Context(), &partitionv1.ApplyRequest{Shards: []*partitionv1.ShardOps{{
		Shard: shardFor(op.GetKey()), TraceParent: "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01", Ops: []*partitionv1.Op{op},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	n.stop()
	const want = "0123456789abcdef0123456789abcdef"
	spans := make(map[string]sdktrace.ReadOnlySpan)
	for _, s := range recorder.Ended() {
		if s.SpanContext().TraceID().String() == want {
			spans[s.Name()] = s
		}
	}
	apply, appending := spans["partition.apply"], spans["lane.append"]
	if apply == nil || appending == nil || appending.Parent().SpanID() != apply.SpanContext().SpanID() {
		t.Fatalf("the spans of the op's trace are %v", spans)
	}
	logged := ""
	for entry, err := range w.log.Read(t.Context(), 1, false) {
		if err != nil {
			t.Fatal(err)
		}
		if entry.Commit.GetChanges() != nil {
			logged = entry.Trace.Get("traceparent")
		}
	}
	if !strings.Contains(logged, want) || !strings.Contains(logged, appending.SpanContext().SpanID().String()) {
		t.Errorf("the commit carries %q", logged)
	}
	n.events.mu.Lock()
	defer n.events.mu.Unlock()
	if got := trace.SpanContextFromContext(n.events.traces[0]).TraceID().String(); got != want {
		t.Errorf("the event was published in trace %s", got)
	}
}

func TestMetrics(t *testing.T) {
	reader := sdkmetric.NewManualReader()
	provider := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))
	n := newWorld(t).start(func(d *Deps) { d.Meter = provider.Meter("test") })
	n.apply(put("k", "v", 1, "a"), put("k", "v", 1, "a"))
	var data metricdata.ResourceMetrics
	if err := reader.Collect(t.Context(), &data); err != nil {
		t.Fatal(err)
	}
	got := make(map[string]int64)
	for _, m := range data.ScopeMetrics[0].Metrics {
		switch d := m.Data.(type) {
		case metricdata.Sum[int64]:
			for _, p := range d.DataPoints {
				o, _ := p.Attributes.Value("outcome")
				got[m.Name+" "+o.AsString()] += p.Value
			}
		case metricdata.Gauge[int64]:
			for _, p := range d.DataPoints {
				got[m.Name] += p.Value
			}
		case metricdata.Histogram[int64]:
			got[m.Name] = int64(d.DataPoints[0].Count)
		case metricdata.Histogram[float64]:
			got[m.Name] = int64(d.DataPoints[0].Count)
		}
	}
	for name, want := range map[string]int64{
		"topgun.partition.ops applied": 1, "topgun.partition.ops duplicate": 1, "topgun.partition.records": 1, "topgun.partition.shard.queue": 0,
	} {
		if v, ok := got[name]; !ok || v != want {
			t.Errorf("%s is %d (there: %t), want %d", name, v, ok, want)
		}
	}
	if got["topgun.partition.commit.size"] == 0 || got["topgun.partition.append.duration"] == 0 {
		t.Errorf("commits are not measured: %v", got)
	}
}

func TestACK03_AMemoryLogIsNotCalledApplied(t *testing.T) {
	w := newWorldOf(t, commitlog.Config{Stream: "TOPGUN_LOG", MaxBytes: 16 << 20, Replicas: 1, Memory: true, Shards: shardCount})
	n := w.start()
	op := put("k", "v", 1, "a")
	resp, err := n.Apply(t.Context(), &partitionv1.ApplyRequest{Shards: []*partitionv1.ShardOps{{Shard: shardFor(op.GetKey()), Ops: []*partitionv1.Op{op}}}})
	if err != nil || resp.GetShards()[0].GetLevel() != partitionv1.Level_LEVEL_MEMORY {
		t.Errorf("%v, %v", resp, err)
	}
}

// A batch that exceeds one commit is spread over several, in order.
func TestALargeBatchBecomesSeveralCommits(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	value := msgval.AppendBin(nil, make([]byte, 200<<10))
	ops := &partitionv1.ShardOps{}
	var want []string
	for i := 0; len(ops.GetOps()) < 12; i++ {
		op := put(fmt.Sprint("k", i), "x", 1, "a")
		op.Record.Value = value
		if shardFor(op.GetKey()) == 0 {
			ops.Ops = append(ops.Ops, op)
			want = append(want, string(op.GetKey()))
		}
	}
	if _, err := n.Apply(t.Context(), &partitionv1.ApplyRequest{Shards: []*partitionv1.ShardOps{ops}}); err != nil {
		t.Fatal(err)
	}
	var got []string
	commits := 0
	for entry, err := range w.log.Read(t.Context(), 1, false) {
		if err != nil {
			t.Fatal(err)
		}
		if entry.Commit.GetChanges() != nil {
			commits++
		}
		for _, s := range entry.Commit.GetChanges().GetShards() {
			for _, c := range s.GetChanges() {
				got = append(got, string(c.GetKey()))
			}
		}
	}
	if fmt.Sprint(got) != fmt.Sprint(want) || commits < 4 {
		t.Errorf("%d commits hold %v, want %v", commits, got, want)
	}
	n.stop()
	var sequences []uint64
	for _, e := range n.events.all() {
		sequences = append(sequences, e.GetSequence())
	}
	if len(sequences) != commits || sequences[len(sequences)-1] != uint64(commits) {
		t.Errorf("the events have the sequences %v", sequences)
	}
}
