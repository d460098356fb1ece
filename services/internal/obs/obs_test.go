package obs_test

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"go.opentelemetry.io/otel/trace"
	"go.uber.org/goleak"

	"github.com/topgun-sync/topgun/services/internal/obs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestSetup(t *testing.T) {
	var log bytes.Buffer
	telemetry, err := obs.Setup(t.Context(), obs.Config{Service: "topgun-test", Version: "1.2.3"}, &log)
	if err != nil {
		t.Fatal(err)
	}
	counter, err := telemetry.Meter.Int64Counter("topgun.test.things")
	if err != nil {
		t.Fatal(err)
	}
	counter.Add(t.Context(), 3)
	recorder := httptest.NewRecorder()
	telemetry.MetricsHandler.ServeHTTP(recorder, httptest.NewRequestWithContext(t.Context(), "GET", "/metrics", nil))
	for _, want := range []string{"topgun_test_things_total{", "} 3\n", `service_name="topgun-test"`, "go_goroutines "} {
		if !strings.Contains(recorder.Body.String(), want) {
			t.Errorf("metrics lack %q:\n%s", want, recorder.Body)
		}
	}

	// Without an exporter no spans are made, but a caller's context is passed on.
	caller := trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}})
	ctx, span := telemetry.Tracer.Start(trace.ContextWithRemoteSpanContext(t.Context(), caller), "x")
	if got := trace.SpanContextFromContext(ctx); span.IsRecording() || got.TraceID() != caller.TraceID() || got.SpanID() != caller.SpanID() {
		t.Errorf("got %v, recording %v", got, span.IsRecording())
	}
	telemetry.Logger.InfoContext(ctx, "hello")
	if !strings.Contains(log.String(), `"trace_id":"01000000000000000000000000000000"`) {
		t.Errorf("logged %s", log.String())
	}
	for range 2 {
		if err := telemetry.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

// Spans are sent to a collector, and one that is away does not hold up the end.
func TestSetupWithCollector(t *testing.T) {
	var log bytes.Buffer
	telemetry, err := obs.Setup(t.Context(), obs.Config{Service: "topgun-test", OTLPEndpoint: "http://127.0.0.1:1"}, &log)
	if err != nil {
		t.Fatal(err)
	}
	_, span := telemetry.Tracer.Start(t.Context(), "x")
	if !span.IsRecording() {
		t.Error("no span is made")
	}
	if err := telemetry.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestBadConfig(t *testing.T) {
	for want, config := range map[string]obs.Config{
		"service name is empty": {},
		"must be a URL":         {Service: "s", OTLPEndpoint: "user:hunter2@host"},
		"must be a URL like":    {Service: "s", OTLPEndpoint: "http://user:hunter2@[::1"},
	} {
		_, err := obs.Setup(t.Context(), config, &bytes.Buffer{})
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

// SEC-05, and one line for each record.
func TestLogger(t *testing.T) {
	var log bytes.Buffer
	logger := obs.NewLogger(&log, slog.LevelInfo)
	logger.Debug("below the level")
	logger.With("deviceToken", "hunter2").WithGroup("g").Info("line one\nline two\x1b[31m",
		"Authorization", "Bearer hunter2", "password", "hunter2", "key", "a\r\nb",
		"url", &url.URL{Scheme: "nats", User: url.UserPassword("u", "hunter2"), Host: "h:1"})
	if lines := strings.Count(log.String(), "\n"); lines != 1 {
		t.Errorf("%d lines: %s", lines, log.String())
	}
	if strings.Contains(log.String(), "hunter2") || strings.Contains(log.String(), "\x1b") {
		t.Errorf("logged %s", log.String())
	}
	var record map[string]any
	if err := json.Unmarshal(log.Bytes(), &record); err != nil {
		t.Fatal(err)
	}
	group, _ := record["g"].(map[string]any)
	if record["deviceToken"] != "[redacted]" || group["key"] != "a\r\nb" || group["url"] != "nats://u:xxxxx@h:1" {
		t.Errorf("logged %s", log.String())
	}
}
