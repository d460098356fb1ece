package allinone

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1/fanoutv1connect"
	"github.com/topgun-sync/topgun/gen/go/topgun/gateway/v1/gatewayv1connect"
	"github.com/topgun-sync/topgun/gen/go/topgun/partition/v1/partitionv1connect"
	"github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1/persistencev1connect"
	"github.com/topgun-sync/topgun/services/fanout"
	"github.com/topgun-sync/topgun/services/gateway"
	"github.com/topgun-sync/topgun/services/internal/obs"
	"github.com/topgun-sync/topgun/services/internal/rpc"
	"github.com/topgun-sync/topgun/services/internal/run"
	"github.com/topgun-sync/topgun/services/partition"
	"github.com/topgun-sync/topgun/services/persistence"
)

// serveGrace is how long requests in flight may take once the ports close. The
// gateway has answered its own by then.
const serveGrace = 500 * time.Millisecond

// services are the four of them.
type services struct {
	fanout      *fanout.Service
	persistence *persistence.Service
	partition   *partition.Service
	gateway     *gateway.Service
}

// construct makes the services on one RPC server and connects them through it.
func (p *parts) construct(config Config, t *obs.Telemetry) (*services, http.Handler, error) {
	deps := rpc.Deps{Logger: t.Logger, Meter: t.Meter, Tracer: t.Tracer}
	server := rpc.NewServer(deps)
	inProcess := rpc.InProcess(server, deps)
	named := func(name string) *obs.Telemetry {
		named := *t
		named.Logger = t.Logger.With("service", name)
		return &named
	}

	var s services
	var err error
	of := named("fanout")
	if s.fanout, err = fanout.New(config.Fanout, fanout.Deps{
		Bus:        p.bus,
		Partitions: []partitionv1connect.PartitionServiceClient{partitionv1connect.NewPartitionServiceClient(inProcess)},
		Logger:     of.Logger, Meter: of.Meter, Tracer: of.Tracer,
	}); err != nil {
		return nil, nil, err
	}
	of = named("persistence")
	if s.persistence, err = persistence.New(config.Persistence, persistence.Deps{
		Store: p.store, Log: p.log, Logger: of.Logger, Meter: of.Meter, Tracer: of.Tracer,
	}); err != nil {
		return nil, nil, err
	}
	of = named("partition")
	if s.partition, err = partition.New(config.Partition, partition.Deps{
		Log: p.log, Events: p.bus, Persistence: persistencev1connect.NewPersistenceServiceClient(inProcess),
		Logger: of.Logger, Meter: of.Meter, Tracer: of.Tracer,
	}); err != nil {
		return nil, nil, err
	}
	of = named("gateway")
	if s.gateway, err = gateway.New(config.Gateway, gateway.Deps{
		Partition:   partitionv1connect.NewPartitionServiceClient(inProcess),
		Fanout:      fanoutv1connect.NewFanoutServiceClient(inProcess),
		Persistence: persistencev1connect.NewPersistenceServiceClient(inProcess),
		Logger:      of.Logger, Meter: of.Meter, Tracer: of.Tracer,
	}); err != nil {
		return nil, nil, err
	}

	s.fanout.Register(server)
	s.persistence.Register(server)
	s.partition.Register(server)
	s.gateway.Register(server)
	checks := rpc.Checks{
		fanoutv1connect.FanoutServiceName:           s.fanout.Ready,
		persistencev1connect.PersistenceServiceName: s.persistence.Ready,
		partitionv1connect.PartitionServiceName:     s.partition.Ready,
		gatewayv1connect.GatewayServiceName:         s.gateway.Ready,
	}
	mux := http.NewServeMux()
	rpc.Mount(mux, server, checks)
	rpc.MountOperator(mux, checks, t.MetricsHandler)
	return &s, mux, nil
}

// assemble puts the services and the two ports into the order of starting.
func (p *parts) assemble(config Config, listeners Listeners, t *obs.Telemetry, ready func()) (*run.Group, error) {
	s, operator, err := p.construct(config, t)
	if err != nil {
		return nil, fmt.Errorf("set up the services: %w", err)
	}
	group := &run.Group{Logger: t.Logger, StopTimeout: config.StopTimeout}
	// The operator port comes first and goes last: it tells why a start or a stop
	// takes its time.
	group.Add(run.Actor{Name: "operator port", Run: func(ctx context.Context) error {
		return rpc.Serve(ctx, rpc.HTTPServer(operator, t.Logger), listeners.Operator, serveGrace)
	}})
	group.Add(run.Actor{Name: "fanout", Run: s.fanout.Run, Ready: s.fanout.Ready})
	// Not awaited: without its Postgres the server still takes writes once the
	// shards are loaded, and the partition waits for that by itself.
	group.Add(run.Actor{Name: "persistence", Run: s.persistence.Run})
	group.Add(run.Actor{Name: "partition", Run: s.partition.Run, Ready: s.partition.Ready})
	group.Add(run.Actor{Name: "gateway", Run: s.gateway.Run, Ready: s.gateway.Ready})
	group.Add(run.Actor{Name: "client port", Run: func(ctx context.Context) error {
		ready()
		return rpc.Serve(ctx, rpc.HTTPServer(s.gateway.Handler(), t.Logger), listeners.Client, serveGrace)
	}})
	return group, nil
}
