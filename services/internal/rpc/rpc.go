package rpc

import (
	"log/slog"
	"net/http"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"connectrpc.com/connect/v2/connectinprocess"
	"connectrpc.com/grpcreflect/v2"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
)

// maxMessageBytes bounds one message in either direction. The largest legal ones
// are load and diff answers of many records; clients' bodies are bounded far below
// that at the gateway.
const maxMessageBytes = 32 << 20

// Deps are the collaborators of a server or client. A nil one does nothing.
type Deps struct {
	Logger *slog.Logger
	Meter  metric.Meter
	Tracer trace.Tracer
}

// NewServer returns a server whose calls are traced, measured and guarded by the
// error edge. Register services on it before it is mounted or called.
func NewServer(deps Deps) *connect.Server {
	return connect.NewServer(newServerEdge(deps).intercept)
}

// Mount adds the health and reflection services to s and serves all of s on mux in
// the Connect, gRPC and gRPC-Web protocols. Call it once per server, after every
// service was registered. checks feeds the health service.
func Mount(mux *http.ServeMux, s *connect.Server, checks Checks) {
	registerHealth(s, checks)
	grpcreflect.Register(s)
	connecthttp.Mount(mux, s, connecthttp.WithReadMaxBytes(maxMessageBytes), withoutResponseCompression())
}

// withoutResponseCompression answers uncompressed whatever the caller accepts:
// services talk over a fast network, values are often compressed by their writers
// already, and inflating is a way to exhaust memory.
func withoutResponseCompression() connecthttp.Option {
	return connecthttp.WithCompressors()
}

// HTTPClient returns a client that speaks HTTP/2 without TLS to http:// addresses
// and with TLS to https:// ones. It notices a dead peer within 20 seconds although
// nothing is being sent, and opens one connection per server. Call
// CloseIdleConnections when done with it.
func HTTPClient() *http.Client {
	protocols := new(http.Protocols)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(true)
	return &http.Client{Transport: &http.Transport{
		Protocols:       protocols,
		IdleConnTimeout: 90 * time.Second,
		HTTP2:           &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 5 * time.Second},
	}}
}

// Dial returns a client of the services at baseURL, for example
// "http://partition-0:7002". It connects with the first call. With a nil httpClient
// it makes one of its own, which lives as long as the process; tests and whoever
// dials addresses that come and go pass one and close it.
func Dial(baseURL string, httpClient *http.Client, deps Deps, options ...connecthttp.Option) *connect.Client {
	if httpClient == nil {
		httpClient = HTTPClient()
	}
	options = append([]connecthttp.Option{
		connecthttp.WithReadMaxBytes(maxMessageBytes),
		connecthttp.WithCompressors(),
	}, options...)
	return connect.NewClient(
		connecthttp.NewTransport(httpClient, baseURL, options...),
		newClientEdge(deps).intercept,
	)
}

// InProcess returns a client that calls s directly. Messages are shared, not
// copied: neither end may change a message after it handed it over, nor one it was
// handed.
func InProcess(s *connect.Server, deps Deps) *connect.Client {
	return connect.NewClient(
		connectinprocess.New(s, connectinprocess.WithCopyFunc(share)),
		newClientEdge(deps).intercept,
	)
}
