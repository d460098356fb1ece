// Package remote is topgunctl's view of a running cluster: clients of its four
// services, the owners of its shards, and the calls that need more than one request
// (pages, streams, ops for several shards).
//
// Every error it returns names the service, its address and what to try. It keeps no
// data: what it reads it hands on page by page, within the services' own bounds. It
// is used by one goroutine.
package remote

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1/fanoutv1connect"
	"github.com/topgun-sync/topgun/gen/go/topgun/gateway/v1/gatewayv1connect"
	"github.com/topgun-sync/topgun/gen/go/topgun/partition/v1/partitionv1connect"
	"github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1/persistencev1connect"
	"github.com/topgun-sync/topgun/services/internal/rpc"
)

// Config says where the services are.
type Config struct {
	Gateway, Fanout, Persistence string
	// Partitions are the nodes that own the shards between them. At least one.
	Partitions []string
	// Timeout bounds one request, and the wait for the next message of a stream.
	Timeout time.Duration
}

// Endpoint is one service at one address.
type Endpoint struct {
	// Service is gateway, partition, persistence or fanout; the flag and the
	// environment variable with its address are called so as well.
	Service string
	URL     string
	// Name is the full protobuf name, by which health answers call it.
	Name string
}

// Partition is one node of the partition service.
type Partition struct {
	Endpoint
	partitionv1connect.PartitionServiceClient
}

// Cluster is a set of clients. Close it.
type Cluster struct {
	Gateway       gatewayv1connect.GatewayServiceClient
	Fanout        fanoutv1connect.FanoutServiceClient
	Persistence   persistencev1connect.PersistenceServiceClient
	Partitions    []Partition
	AtGateway     Endpoint
	AtFanout      Endpoint
	AtPersistence Endpoint
	timeout       time.Duration
	http          *http.Client
	owners        []int // by shard: index into Partitions
}

// Dial returns clients of the services. It connects with the first call.
func Dial(config Config) *Cluster {
	client := rpc.HTTPClient()
	dial := func(url string) *connect.Client { return rpc.Dial(url, client, rpc.Deps{}) }
	c := &Cluster{
		Gateway:       gatewayv1connect.NewGatewayServiceClient(dial(config.Gateway)),
		Fanout:        fanoutv1connect.NewFanoutServiceClient(dial(config.Fanout)),
		Persistence:   persistencev1connect.NewPersistenceServiceClient(dial(config.Persistence)),
		AtGateway:     Endpoint{"gateway", config.Gateway, gatewayv1connect.GatewayServiceName},
		AtFanout:      Endpoint{"fanout", config.Fanout, fanoutv1connect.FanoutServiceName},
		AtPersistence: Endpoint{"persistence", config.Persistence, persistencev1connect.PersistenceServiceName},
		timeout:       config.Timeout,
		http:          client,
	}
	for _, url := range config.Partitions {
		c.Partitions = append(c.Partitions, Partition{
			Endpoint{"partition", url, partitionv1connect.PartitionServiceName},
			partitionv1connect.NewPartitionServiceClient(dial(url)),
		})
	}
	return c
}

// Close closes the connections.
func (c *Cluster) Close() { c.http.CloseIdleConnections() }

// Endpoints returns where everything is, the gateway first.
func (c *Cluster) Endpoints() []Endpoint {
	all := []Endpoint{c.AtGateway}
	for _, p := range c.Partitions {
		all = append(all, p.Endpoint)
	}
	return append(all, c.AtPersistence, c.AtFanout)
}

// Call makes one request within the cluster's timeout.
func Call[Request, Response any](ctx context.Context, c *Cluster, at Endpoint,
	call func(context.Context, Request) (Response, error), request Request,
) (Response, error) {
	return CallFor(ctx, c, at, 0, call, request)
}

// CallFor is Call for a request that takes some time by itself.
func CallFor[Request, Response any](ctx context.Context, c *Cluster, at Endpoint, takes time.Duration,
	call func(context.Context, Request) (Response, error), request Request,
) (Response, error) {
	limited, cancel := context.WithTimeout(ctx, c.timeout+takes)
	defer cancel()
	response, err := call(limited, request)
	if err != nil {
		err = c.explain(ctx, at, err)
	}
	return response, err
}

// Error is a call that did not work: which service, and why, and what to try.
type Error struct {
	At   Endpoint
	Code connect.Code
	text string
	err  error
}

// Error implements error.
func (e *Error) Error() string { return e.At.Service + " at " + e.At.URL + ": " + e.text }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.err }

// explain turns the failure of a call into one for the person at the terminal. An
// end of ctx itself is no failure of the service.
func (c *Cluster) explain(ctx context.Context, at Endpoint, err error) error {
	if errors.Is(context.Cause(ctx), context.Canceled) {
		return ctx.Err()
	}
	e := &Error{At: at, Code: connect.CodeUnknown, text: err.Error(), err: err}
	remote := false
	if ce, ok := errors.AsType[*connect.Error](err); ok {
		e.Code, remote, e.text = ce.Code(), ce.IsRemote(), ce.Message()
	}
	where := fmt.Sprintf("--%s or --server (TOPGUN_SERVER)", at.Service)
	switch {
	case errors.Is(err, context.DeadlineExceeded) || errors.Is(err, errSilent) || e.Code == connect.CodeDeadlineExceeded ||
		errors.Is(context.Cause(ctx), errSilent):
		e.Code = connect.CodeDeadlineExceeded
		e.text = fmt.Sprintf("no answer within %s; try again, or allow more with --timeout", c.timeout)
	case e.Code == connect.CodeUnimplemented: // from the service, or a plain 404
		e.text = "something answers there, but not this service; give its address (the operator port, 8081 unless configured) with " + where
	case remote && e.Code == connect.CodeUnavailable:
		e.text += "; `topgunctl status` says what it waits for"
	case !remote && e.Code != connect.CodeResourceExhausted:
		e.text = fmt.Sprintf("cannot be reached (%s); is it running? give its address with %s", strings.TrimSpace(reason(err)), where)
	}
	return e
}

// reason is the end of the text: of a dial, what the operating system said.
func reason(err error) string {
	text := err.Error()
	return text[strings.LastIndex(text, ": ")+1:]
}

// errSilent ends a stream on which nothing came for the timeout.
var errSilent = errors.New("nothing came in time")

// patience is a context that ends when nothing was heard for the timeout.
type patience struct {
	timer  *time.Timer
	d      time.Duration
	cancel context.CancelCauseFunc
}

func (c *Cluster) patient(ctx context.Context) (context.Context, *patience) {
	ctx, cancel := context.WithCancelCause(ctx)
	p := &patience{d: c.timeout, cancel: cancel}
	p.timer = time.AfterFunc(c.timeout, func() { cancel(errSilent) })
	return ctx, p
}

// heard starts the wait anew.
func (p *patience) heard() { p.timer.Reset(p.d) }

// forever ends the waiting: the stream may be silent from now on.
func (p *patience) forever() { p.timer.Stop() }

func (p *patience) end() {
	p.timer.Stop()
	p.cancel(context.Canceled)
}
