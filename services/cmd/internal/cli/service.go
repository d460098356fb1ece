package cli

import (
	"context"
	"io"
	"net/http"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/topgun-sync/topgun/services/internal/obs"
	"github.com/topgun-sync/topgun/services/internal/rpc"
	"github.com/topgun-sync/topgun/services/internal/run"
)

const (
	// StopTimeout bounds an orderly stop of a service (RELIABILITY UPG-01).
	StopTimeout = 25 * time.Second
	// ServeGrace is how long calls in flight may take when a service stops.
	ServeGrace = 5 * time.Second
)

// Service is what a program serves on its one port for other services and
// operators.
type Service struct {
	// Name is the service's full protobuf name.
	Name string
	// Register adds its handlers.
	Register func(*connect.Server)
	// Run and Ready are the room's own.
	Run   func(context.Context) error
	Ready func() error
}

// Serve runs a service until ctx ends: it listens on address, which it prints as
// "<what> on", and serves the service's RPCs, health, metrics and profiles there. The
// port answers before the service is ready, so that its health can be asked.
// Further actors start after the service is ready and stop before it.
func Serve(ctx context.Context, what, address string, service Service, t *obs.Telemetry, out io.Writer, further ...run.Actor) error {
	server := rpc.NewServer(rpc.Deps{Logger: t.Logger, Meter: t.Meter, Tracer: t.Tracer})
	service.Register(server)
	checks := rpc.Checks{service.Name: service.Ready}
	mux := http.NewServeMux()
	rpc.Mount(mux, server, checks)
	rpc.MountOperator(mux, checks, t.MetricsHandler)
	listener, err := Listen(out, what, address)
	if err != nil {
		return err
	}
	group := run.Group{Logger: t.Logger, StopTimeout: StopTimeout}
	group.Add(run.Actor{Name: what, Run: func(ctx context.Context) error {
		return rpc.Serve(ctx, rpc.HTTPServer(mux, t.Logger), listener, ServeGrace)
	}})
	group.Add(run.Actor{Name: service.Name, Run: service.Run, Ready: service.Ready})
	for _, actor := range further {
		group.Add(actor)
	}
	return group.Run(ctx)
}
