// Command gateway runs the gateway service alone.
package main

import (
	"context"
	"crypto/rand"
	"io"
	"net"
	"os"
	"strings"

	"github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1/fanoutv1connect"
	"github.com/topgun-sync/topgun/gen/go/topgun/gateway/v1/gatewayv1connect"
	"github.com/topgun-sync/topgun/gen/go/topgun/partition/v1/partitionv1connect"
	"github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1/persistencev1connect"
	"github.com/topgun-sync/topgun/services/cmd/internal/cli"
	"github.com/topgun-sync/topgun/services/gateway"
	"github.com/topgun-sync/topgun/services/internal/obs"
	"github.com/topgun-sync/topgun/services/internal/rpc"
	"github.com/topgun-sync/topgun/services/internal/run"
)

func main() {
	os.Exit(cli.Main(&program{}, "TopGun gateway: the WebSocket and POST /sync for clients."))
}

type program struct {
	Listen         string `default:"127.0.0.1:8080" env:"TOPGUN_LISTEN" placeholder:"HOST:PORT" help:"Address for clients."`
	OperatorListen string `name:"operator-listen" default:"127.0.0.1:8081" env:"TOPGUN_OPERATOR_LISTEN" placeholder:"HOST:PORT" help:"Address for operators: health, metrics, profiles and GatewayService."`
	Partition      string `required:"" env:"TOPGUN_PARTITION" placeholder:"URL" help:"Where the partition service is, for example http://partition:8082."`
	Fanout         string `required:"" env:"TOPGUN_FANOUT" placeholder:"URL" help:"Where the fanout service is, for example http://fanout:8083."`
	Persistence    string `required:"" env:"TOPGUN_PERSISTENCE" placeholder:"URL" help:"Where the persistence service is, for example http://persistence:8084."`
	PublicURL      string `name:"public-url" env:"TOPGUN_PUBLIC_URL" placeholder:"URL" help:"Address of the WebSocket as clients reach it, ws:// or wss://, for clients in cluster mode (default: the host that the client connected to)."`

	cli.Access
	cli.Telemetry
}

// Setup implements cli.Program.
func (p *program) Setup() (string, cli.Telemetry) { return "topgun-gateway", p.Telemetry }

// Run implements cli.Program.
func (p *program) Run(ctx context.Context, t *obs.Telemetry, out io.Writer) error {
	config := gateway.DefaultConfig()
	config.Listen = p.Listen
	// Sessions of two gateways must not share an origin.
	config.GatewayID = "gateway-" + strings.ToLower(rand.Text()[:10])
	config.PublicURL = p.PublicURL
	if err := p.Apply(&config); err != nil {
		return err
	}
	deps := rpc.Deps{Logger: t.Logger, Meter: t.Meter, Tracer: t.Tracer}
	service, err := gateway.New(config, gateway.Deps{
		Partition:   partitionv1connect.NewPartitionServiceClient(rpc.Dial(p.Partition, nil, deps)),
		Fanout:      fanoutv1connect.NewFanoutServiceClient(rpc.Dial(p.Fanout, nil, deps)),
		Persistence: persistencev1connect.NewPersistenceServiceClient(rpc.Dial(p.Persistence, nil, deps)),
		Logger:      t.Logger, Meter: t.Meter, Tracer: t.Tracer,
	})
	if err != nil {
		return err
	}
	clients, err := net.Listen("tcp", p.Listen)
	if err != nil {
		return err
	}
	return cli.Serve(ctx, "operator", p.OperatorListen, cli.Service{
		Name:     gatewayv1connect.GatewayServiceName,
		Register: service.Register,
		Run:      service.Run,
		Ready:    service.Ready,
	}, t, out, run.Actor{Name: "clients", Run: func(ctx context.Context) error {
		if err := cli.Announce(out, "listening", clients.Addr()); err != nil {
			return err
		}
		return rpc.Serve(ctx, rpc.HTTPServer(service.Handler(), t.Logger), clients, cli.ServeGrace)
	}})
}
