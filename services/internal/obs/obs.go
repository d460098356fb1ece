package obs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	otelprometheus "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/metric"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
)

// Config holds the settings of a process's telemetry.
type Config struct {
	// Service is the name in traces and metrics, for example "topgun-partition".
	Service string
	// Version of the program, shown in traces and metrics.
	Version string
	// Level is the lowest level logged.
	Level slog.Level
	// OTLPEndpoint is the URL that spans are sent to by gRPC, usually the value of
	// OTEL_EXPORTER_OTLP_ENDPOINT. Empty means that no spans are made.
	OTLPEndpoint string
}

// Validate says what is wrong with the configuration.
func (c Config) Validate() error {
	if c.Service == "" {
		return errors.New("telemetry: the service name is empty")
	}
	if c.OTLPEndpoint != "" {
		// The text of url.Parse repeats its input, which may hold a password.
		if u, err := url.Parse(c.OTLPEndpoint); err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") {
			return errors.New("telemetry: the OTLP endpoint must be a URL like http://collector:4317")
		}
	}
	return nil
}

// Telemetry is what a process observes itself with. All of it may be used
// concurrently.
type Telemetry struct {
	Logger *slog.Logger
	Meter  metric.Meter
	Tracer trace.Tracer
	// MetricsHandler serves the metrics in the Prometheus format. It belongs on the
	// operator port.
	MetricsHandler http.Handler

	shutdown []func(context.Context) error
}

// Setup builds a process's telemetry. Logs go to w. Where spans are exported it
// also installs OpenTelemetry's error handler, which is one for the whole process,
// so that export errors are logged like everything else. Call Shutdown at the end.
func Setup(ctx context.Context, config Config, w io.Writer) (*Telemetry, error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	t := &Telemetry{Logger: NewLogger(w, config.Level)}
	res := resource.NewSchemaless(
		attribute.String("service.name", config.Service),
		attribute.String("service.version", config.Version),
	)

	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	exporter, err := otelprometheus.New(otelprometheus.WithRegisterer(registry))
	if err != nil {
		return nil, fmt.Errorf("set up metrics: %w", err)
	}
	meters := sdkmetric.NewMeterProvider(sdkmetric.WithReader(exporter), sdkmetric.WithResource(res))
	t.shutdown = append(t.shutdown, meters.Shutdown)
	t.Meter = meters.Meter(instrumentation)
	t.MetricsHandler = promhttp.HandlerFor(registry, promhttp.HandlerOpts{})

	if config.OTLPEndpoint == "" {
		// The no-op tracer still passes on the trace context that callers send.
		t.Tracer = tracenoop.NewTracerProvider().Tracer(instrumentation)
		return t, nil
	}
	spans, err := otlptracegrpc.New(ctx, otlptracegrpc.WithEndpointURL(config.OTLPEndpoint))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("set up tracing: %w", err), t.Shutdown(ctx))
	}
	tracers := sdktrace.NewTracerProvider(sdktrace.WithBatcher(spans), sdktrace.WithResource(res))
	t.shutdown = append(t.shutdown, tracers.Shutdown)
	t.Tracer = tracers.Tracer(instrumentation)
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) {
		t.Logger.Warn("telemetry", "error", err)
	}))
	return t, nil
}

// instrumentation names the code that measures, to OpenTelemetry.
const instrumentation = "github.com/topgun-sync/topgun"

// Shutdown sends the spans that wait and releases everything. Nothing of t may be
// used afterwards but the logger.
func (t *Telemetry) Shutdown(ctx context.Context) error {
	var errs []error
	for _, shutdown := range t.shutdown {
		errs = append(errs, shutdown(ctx))
	}
	t.shutdown = nil
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("shut down telemetry: %w", err)
	}
	return nil
}
