package gateway

import (
	"strings"
	"testing"

	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/topgun-sync/topgun/core/wire"
)

// One line when a session opens and one when it closes; metrics and a span that the
// owner's work belongs to.
func TestObservation(t *testing.T) {
	b := setup(t, withAuth(nil), nil)
	p := b.login(t, "alice")
	p.synced("m", 0)
	p.send(&wire.OpBatch{Ops: []wire.Op{putOp("1", "m", "key-of-a-client", "v", stamp(1))}})
	expect[*wire.OpAck](p)
	eventually(t, func() bool { return len(b.spans.Ended()) > 0 })
	span := b.spans.Ended()[0]
	b.partition.mu.Lock()
	parent := b.partition.trace
	b.partition.mu.Unlock()
	if span.Name() != "gateway.op_batch" || !strings.Contains(parent, span.SpanContext().TraceID().String()+"-"+span.SpanContext().SpanID().String()) {
		t.Errorf("span %q, the owner got %q", span.Name(), parent)
	}
	var got metricdata.ResourceMetrics
	if err := b.metrics.Collect(t.Context(), &got); err != nil {
		t.Fatal(err)
	}
	sums := map[string]int64{}
	for _, scope := range got.ScopeMetrics {
		for _, m := range scope.Metrics {
			switch data := m.Data.(type) {
			case metricdata.Sum[int64]:
				for _, point := range data.DataPoints {
					kind, _ := point.Attributes.Value("type")
					sums[m.Name+" "+kind.AsString()] += point.Value
				}
			case metricdata.Histogram[float64]:
				for _, point := range data.DataPoints {
					sums[m.Name] += int64(point.Count)
				}
			}
		}
	}
	for name, want := range map[string]int64{
		"topgun_gateway_sessions ":                1,
		"topgun_gateway_frames_in_total ops":      1,
		"topgun_gateway_frames_in_total auth":     1,
		"topgun_gateway_frames_out_total ack":     1,
		"topgun_gateway_frames_out_total root":    1,
		"topgun_gateway_ack_seconds":              1,
		"topgun_gateway_queue_drops_total ":       0,
		"topgun_gateway_frames_in_total bad":      0,
		"topgun_gateway_frames_out_total auth":    2,
		"topgun_gateway_frames_out_total event":   0,
		"topgun_gateway_frames_out_total other":   0,
		"topgun_gateway_frames_in_total ping":     0,
		"topgun_gateway_frames_out_total buckets": 0,
	} {
		if sums[name] != want {
			t.Errorf("%s = %d, want %d", name, sums[name], want)
		}
	}
	remote := p.conn.LocalAddr().String()
	_ = p.conn.Close()
	b.awaitSessions(t, 0)
	b.stop()
	lines := 0
	for line := range strings.Lines(b.log.String()) {
		if strings.Contains(line, "session ") {
			lines++
			if !strings.Contains(line, "remote="+remote) {
				t.Errorf("line %q does not name %s", line, remote)
			}
		}
		if strings.Contains(line, "key-of-a-client") || strings.Contains(line, "eyJ") {
			t.Errorf("line %q has a client's text", line)
		}
	}
	if lines != 2 || !strings.Contains(b.log.String(), "user=alice") {
		t.Errorf("log:\n%s", b.log)
	}
}
