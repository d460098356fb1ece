package obs

import (
	"context"
	"io"
	"log/slog"
	"net/url"
	"os"
	"strings"

	"go.opentelemetry.io/otel/trace"
)

// NewLogger returns a logger that writes to w: readable text if w is a terminal,
// else one JSON object a line. Records logged with a context that carries a span
// name its trace.
func NewLogger(w io.Writer, level slog.Leveler) *slog.Logger {
	options := &slog.HandlerOptions{Level: level, ReplaceAttr: redact}
	var handler slog.Handler = slog.NewJSONHandler(w, options)
	if isTerminal(w) {
		handler = slog.NewTextHandler(w, options)
	}
	return slog.New(traceHandler{handler})
}

func isTerminal(w io.Writer) bool {
	file, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := file.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// secretNames are parts of attribute names whose values are never shown.
var secretNames = []string{"password", "secret", "token", "authorization", "cookie", "apikey", "api_key", "credential"}

// redact is the last line of defence, for an attribute that should not have been
// logged. It also takes the password out of URLs that are logged as such.
func redact(_ []string, a slog.Attr) slog.Attr {
	name := strings.ToLower(a.Key)
	for _, secret := range secretNames {
		if strings.Contains(name, secret) {
			return slog.String(a.Key, "[redacted]")
		}
	}
	if u, ok := a.Value.Any().(*url.URL); ok {
		return slog.String(a.Key, u.Redacted())
	}
	return a
}

// traceHandler adds the trace id of the record's context.
type traceHandler struct{ slog.Handler }

func (h traceHandler) Handle(ctx context.Context, record slog.Record) error {
	if span := trace.SpanContextFromContext(ctx); span.IsValid() {
		record.AddAttrs(slog.String("trace_id", span.TraceID().String()))
	}
	return h.Handler.Handle(ctx, record)
}

func (h traceHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return traceHandler{h.Handler.WithAttrs(attrs)}
}

func (h traceHandler) WithGroup(name string) slog.Handler {
	return traceHandler{h.Handler.WithGroup(name)}
}
