package gateway

import (
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net/http"
	"strings"
	"time"

	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"github.com/topgun-sync/topgun/core/wire"
)

// serveSync answers POST /sync (PROTOCOL 17.1, 17.2): it reads and writes HTTP and
// leaves what the answer says to syncRequest, which calls the same functions as a
// WebSocket session does.
//
// Only a request that can never succeed gets another status than 200: one failed
// poll puts the original client into DISCONNECTED for good (PROTOCOL 17.2.2-4), so
// what is transient stands in errors, and ops that were not taken are not covered
// by the ack.
func (s *Service) serveSync(w http.ResponseWriter, r *http.Request) {
	if !s.origins.handle(w, r) {
		return
	}
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", "POST, OPTIONS")
		writeHTTPError(w, http.StatusMethodNotAllowed, "METHOD: use POST")
		return
	}
	token, ok := bearer(r.Header)
	if ok {
		_, err := s.verifier.Verify(r.Context(), token)
		ok = err == nil
	}
	if !ok {
		w.Header().Set("WWW-Authenticate", "Bearer")
		writeHTTPError(w, http.StatusUnauthorized, "UNAUTHENTICATED: send one header Authorization: Bearer <token>")
		return
	}
	form, ok := bodyForm(r.Header)
	if !ok {
		writeHTTPError(w, http.StatusUnsupportedMediaType,
			"CONTENT_TYPE: send application/x-msgpack or application/json, as it is or with Content-Encoding: gzip")
		return
	}
	if r.ContentLength > int64(s.cfg.MaxBodyBytes) {
		writeHTTPError(w, http.StatusRequestEntityTooLarge, reasonBodyTooLarge)
		return
	}

	weight := int64(s.cfg.MaxBodyBytes) // of a body whose inflated size is not known yet
	if r.ContentLength >= 0 && !form.gzip {
		weight = max(r.ContentLength, 1)
	}
	if s.draining.Load() || !s.syncBytes.TryAcquire(weight) {
		w.Header().Set("Connection", "close")
		s.writeSync(w, form, s.busy())
		return
	}
	defer s.syncBytes.Release(weight)

	body, err := s.readBody(w, r, form)
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		writeHTTPError(w, http.StatusRequestEntityTooLarge, reasonBodyTooLarge)
		return
	case err != nil:
		writeHTTPError(w, http.StatusBadRequest, "BODY: it ended early, came too slowly, or is not what Content-Encoding says")
		return
	}
	request, err := s.decodeSync(body, form)
	if err != nil {
		writeSyncError(w, err)
		return
	}
	response, err := s.syncRequest(r.Context(), request)
	if err != nil {
		writeSyncError(w, err)
		return
	}
	s.writeSync(w, form, response)
}

const reasonBodyTooLarge = "BODY_TOO_LARGE: send the operations in several requests"

// busy is the answer when a request cannot be looked at now.
func (s *Service) busy() *wire.SyncResponse {
	return &wire.SyncResponse{
		ServerHLC: s.clock(),
		Errors:    []wire.SyncError{{Code: 503, Message: "BUSY: the gateway takes no more requests now; send this one again"}},
	}
}

// bearer reads the Authorization header. No header, or Bearer without a token, is an
// empty token (PROTOCOL 3.4); anything but one Bearer header with one token fails.
func bearer(header http.Header) (token string, ok bool) {
	values := header.Values("Authorization")
	if len(values) == 0 {
		return "", true
	}
	scheme, token, _ := strings.Cut(values[0], " ")
	token = strings.Trim(token, " ")
	if len(values) > 1 || !strings.EqualFold(scheme, "Bearer") || strings.ContainsAny(token, ", \t") {
		return "", false
	}
	return token, true
}

// form is how a body is written.
type form struct {
	json bool
	gzip bool
}

func bodyForm(header http.Header) (f form, ok bool) {
	if len(header.Values("Content-Type")) != 1 || len(header.Values("Content-Encoding")) > 1 {
		return f, false
	}
	kind, _, err := mime.ParseMediaType(header.Get("Content-Type"))
	if err != nil {
		return f, false
	}
	switch kind {
	case "application/x-msgpack", "application/msgpack":
	case "application/json":
		f.json = true
	default:
		return f, false
	}
	switch strings.ToLower(header.Get("Content-Encoding")) {
	case "", "identity":
	case "gzip":
		f.gzip = true
	default:
		return f, false
	}
	return f, true
}

// readBody reads a whole body of at most MaxBodyBytes, before and after inflating,
// by the deadline that Handler has set. A larger one gives *http.MaxBytesError.
func (s *Service) readBody(w http.ResponseWriter, r *http.Request, f form) ([]byte, error) {
	limit := int64(s.cfg.MaxBodyBytes)
	limited := http.MaxBytesReader(w, r.Body, limit)
	body, err := inflate(limited, limit, f)
	if err != nil {
		return nil, err
	}
	// The deadline was for the body. Left in place it would end the request while it
	// is being answered; after an error it stays, as net/http reads on to the end of
	// the body and would wait for a client that sends none.
	_ = http.NewResponseController(w).SetReadDeadline(time.Time{})
	return body, nil
}

func inflate(body io.Reader, limit int64, f form) ([]byte, error) {
	if !f.gzip {
		return io.ReadAll(body)
	}
	unzip, err := gzip.NewReader(body)
	if errors.Is(err, io.EOF) {
		return nil, nil // empty
	}
	if err != nil {
		return nil, err
	}
	plain, err := io.ReadAll(io.LimitReader(unzip, limit+1))
	if err == nil && int64(len(plain)) > limit {
		err = &http.MaxBytesError{Limit: limit}
	}
	return plain, err
}

// decodeSync decodes a body. Exact repeats of ops are dropped after decoding, so the
// bound on ops is not the decoder's; the size of the body bounds it.
func (s *Service) decodeSync(body []byte, f form) (*wire.SyncRequest, error) {
	if len(body) == 0 {
		return &wire.SyncRequest{}, nil
	}
	limits := wire.DefaultLimits()
	limits.MaxOps = len(body)
	limits.MaxQueries = s.cfg.MaxSubscriptions
	if f.json {
		return wire.DecodeSyncRequestJSON(body, limits)
	}
	return wire.DecodeSyncRequest(body, limits)
}

// writeSync writes a response in the form of the request.
func (s *Service) writeSync(w http.ResponseWriter, f form, response *wire.SyncResponse) {
	kind, encode := "application/x-msgpack", response.AppendTo
	if f.json {
		kind, encode = "application/json", response.AppendJSON
	}
	body := encode(nil)
	w.Header().Set("Content-Type", kind)
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(s.cfg.WriteTimeout))
	_, _ = w.Write(body) // a client that is gone is no event
}

// writeSyncError answers a request that can never succeed.
func writeSyncError(w http.ResponseWriter, err error) {
	if refused, ok := errors.AsType[*wire.Error](err); ok {
		status := http.StatusBadRequest
		if refused.Code == http.StatusRequestEntityTooLarge {
			status = refused.Code
		}
		writeHTTPError(w, status, refused.Error())
		return
	}
	writeHTTPError(w, http.StatusBadRequest, "BAD_MESSAGE: the body is not a sync request")
}

// writeHTTPError answers with {code, message} in JSON (PROTOCOL 17.2). The message
// is a fixed text.
func writeHTTPError(w http.ResponseWriter, status int, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	// A number and a string have a JSON form, and a client that is gone is no event.
	_ = json.NewEncoder(w).Encode(struct {
		Code    int    `json:"code"`
		Message string `json:"message"`
	}{status, message})
}

// traceParent returns the W3C traceparent of the span of ctx, or "".
func traceParent(ctx context.Context) string {
	if !trace.SpanContextFromContext(ctx).IsValid() {
		return ""
	}
	carrier := propagation.MapCarrier{}
	propagation.TraceContext{}.Inject(ctx, carrier)
	return carrier["traceparent"]
}
