package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"

	"connectrpc.com/connect/v2"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
)

// edge is what both ends of a call share: a tracer and a duration histogram, whose
// count is the number of calls.
type edge struct {
	logger   *slog.Logger
	tracer   trace.Tracer
	duration metric.Float64Histogram
	// sets holds the attribute set of each (procedure, code) seen, because building
	// one costs more than recording. It is bounded by the registered procedures.
	sets sync.Map
}

type setKey struct{ procedure, code string }

// durationBounds are in seconds: in-process calls take microseconds, a durable
// write milliseconds, a load seconds.
var durationBounds = []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}

func newEdge(deps Deps, name, description string) *edge {
	e := &edge{logger: deps.Logger, tracer: deps.Tracer}
	if e.logger == nil {
		e.logger = slog.New(slog.DiscardHandler)
	}
	if e.tracer == nil {
		e.tracer = tracenoop.NewTracerProvider().Tracer("")
	}
	meter := deps.Meter
	if meter == nil {
		meter = metricnoop.NewMeterProvider().Meter("")
	}
	var err error
	e.duration, err = meter.Float64Histogram(name, metric.WithUnit("s"), metric.WithDescription(description),
		metric.WithExplicitBucketBoundaries(durationBounds...))
	if err != nil {
		// Measurements are worth less than calls: go on without them, and say so.
		e.logger.Error("calls are not measured", "error", err)
		e.duration = metricnoop.Float64Histogram{}
	}
	return e
}

// record measures one call and ends its span.
func (e *edge) record(ctx context.Context, span trace.Span, procedure string, start time.Time, err error) {
	code := "ok"
	if err != nil {
		code = codeOf(err).String()
		span.SetStatus(codes.Error, code)
	}
	span.End()
	key := setKey{procedure, code}
	option, ok := e.sets.Load(key)
	if !ok {
		option, _ = e.sets.LoadOrStore(key, metric.WithAttributeSet(attribute.NewSet(
			attribute.String("procedure", procedure), attribute.String("code", code))))
	}
	e.duration.Record(ctx, time.Since(start).Seconds(), option.(metric.RecordOption))
}

// codeOf is connect.CodeOf, which does not know context errors.
func codeOf(err error) connect.Code {
	if ce, ok := errors.AsType[*connect.Error](err); ok {
		return ce.Code()
	}
	switch {
	case errors.Is(err, context.Canceled):
		return connect.CodeCanceled
	case errors.Is(err, context.DeadlineExceeded):
		return connect.CodeDeadlineExceeded
	}
	return connect.CodeUnknown
}

// carrier reads and writes trace context in call metadata, over HTTP and in
// process alike.
type carrier struct{ header *connect.Header }

func (c carrier) Get(key string) string { return c.header.Get(key) }
func (c carrier) Set(key, value string) { c.header.Set(key, value) }
func (c carrier) Keys() []string {
	keys := make([]string, 0, c.header.Len())
	for key := range c.header.All() {
		keys = append(keys, key)
	}
	return keys
}

var propagator = propagation.TraceContext{}

type serverEdge struct{ *edge }

func newServerEdge(deps Deps) *serverEdge {
	return &serverEdge{newEdge(deps, "topgun.rpc.server.duration", "Duration of served calls.")}
}

func (e *serverEdge) intercept(next connect.ServerFunc) connect.ServerFunc {
	return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) error {
		start := time.Now()
		if info, ok := connect.CallInfoForServerContext(ctx); ok {
			ctx = propagator.Extract(ctx, carrier{info.RequestHeader()})
		}
		ctx, span := e.tracer.Start(ctx, spanName(spec), trace.WithSpanKind(trace.SpanKindServer))
		defer failStop(spec.Procedure)
		err := e.mask(ctx, spec, next(ctx, spec, stream))
		e.record(ctx, span, spec.Procedure, start, err)
		return err
	}
}

// errInternal is all that a caller learns about an internal error.
var errInternal = connect.NewError(connect.CodeInternal, "internal error; the server's log has the cause")

// mask decides what of an error leaves the process. A *connect.Error that a service
// wrote for its callers passes; a cause for people goes to the log, and the caller
// gets a fixed text (SEC-05).
func (e *serverEdge) mask(ctx context.Context, spec connect.Spec, err error) error {
	if err == nil {
		return nil
	}
	// The caller went away or its time ran out: whatever the handler made of that
	// is no news.
	if ctx.Err() != nil {
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return connect.NewError(connect.CodeDeadlineExceeded, "the deadline of the call passed").WithCause(err)
		}
		return connect.NewError(connect.CodeCanceled, "the call was canceled").WithCause(err)
	}
	if ce, ok := errors.AsType[*connect.Error](err); ok && !ce.IsRemote() {
		switch ce.Code() {
		case connect.CodeInternal, connect.CodeUnknown, connect.CodeDataLoss:
		default:
			return ce
		}
	}
	// A remote error that reaches this edge was not translated by the service: it
	// is another server's verdict, not ours.
	e.logger.ErrorContext(ctx, "call failed", "procedure", spec.Procedure, "error", describe(err))
	return errInternal.WithCause(err)
}

// describe is the text for the log: the error and, where it hides one, its cause.
func describe(err error) string {
	if ce, ok := errors.AsType[*connect.Error](err); ok {
		if cause := ce.Unwrap(); cause != nil {
			return err.Error() + ": " + cause.Error()
		}
	}
	return err.Error()
}

// failStop ends the process when a handler panics. Both transports would recover
// and serve on, over state that a half-done merge may have left (RES-05). A panic on
// a goroutine of its own cannot be recovered by anybody.
func failStop(procedure string) {
	if reason := recover(); reason != nil {
		stack := debug.Stack()
		go panic(fmt.Sprintf("%s: %v\n\n%s", procedure, reason, stack)) //nolint:forbidigo // RES-05: fail-stop
		select {}
	}
}

type clientEdge struct{ *edge }

func newClientEdge(deps Deps) *clientEdge {
	return &clientEdge{newEdge(deps, "topgun.rpc.client.duration", "Duration of calls to other services.")}
}

func (e *clientEdge) intercept(next connect.ClientFunc) connect.ClientFunc {
	return func(ctx context.Context, spec connect.Spec) (connect.ClientStream, error) {
		start := time.Now()
		ctx, span := e.tracer.Start(ctx, spanName(spec), trace.WithSpanKind(trace.SpanKindClient))
		if info, ok := connect.CallInfoForClientContext(ctx); ok {
			propagator.Inject(ctx, carrier{info.RequestHeader()})
		}
		stream, err := next(ctx, spec)
		if err != nil {
			e.record(ctx, span, spec.Procedure, start, err)
			return nil, err
		}
		return &observedStream{ClientStream: stream, end: func(err error) {
			e.record(ctx, span, spec.Procedure, start, err)
		}}, nil
	}
}

// observedStream ends the observation of a call with its first end: an error or
// the end of the stream from Receive, a failed Send, or Close. Connect allows one
// sender and one receiver at a time, and Close from anywhere, hence the once.
type observedStream struct {
	connect.ClientStream
	once sync.Once
	end  func(error)
}

func (s *observedStream) finish(err error) {
	s.once.Do(func() { s.end(err) })
}

func (s *observedStream) Receive(msg any) error {
	err := s.ClientStream.Receive(msg)
	if errors.Is(err, io.EOF) {
		s.finish(nil)
	} else if err != nil {
		s.finish(err)
	}
	return err
}

// Send leaves io.EOF alone: it says that Receive knows the reason.
func (s *observedStream) Send(msg any) error {
	err := s.ClientStream.Send(msg)
	if err != nil && !errors.Is(err, io.EOF) {
		s.finish(err)
	}
	return err
}

func (s *observedStream) Close() error {
	err := s.ClientStream.Close()
	s.finish(nil)
	return err
}

// spanName is the procedure without its leading slash, as OpenTelemetry wants it.
func spanName(spec connect.Spec) string {
	if len(spec.Procedure) > 0 && spec.Procedure[0] == '/' {
		return spec.Procedure[1:]
	}
	return spec.Procedure
}
