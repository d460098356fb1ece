// Package rpc builds both ends of the calls between services: Connect servers and
// clients, over HTTP (Connect, gRPC and gRPC-Web on one port) and within one
// process.
//
// It owns what every call has in common: trace context in the request metadata,
// one span and one measurement at each end, the error edge that keeps internal
// texts inside, and the health and reflection services. A service's own errors
// are translated by the service, in its rpc.go, into *connect.Error; what is not
// translated leaves as CodeInternal with a fixed text.
//
// It does not retry, balance or authenticate: callers know what may be repeated,
// and the internal ports belong on a network of their own.
package rpc
