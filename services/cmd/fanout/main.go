// Command fanout runs the fanout service alone, on an external NATS server.
package main

import (
	"context"
	"errors"
	"io"
	"os"

	"github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1/fanoutv1connect"
	"github.com/topgun-sync/topgun/gen/go/topgun/partition/v1/partitionv1connect"
	"github.com/topgun-sync/topgun/services/cmd/internal/cli"
	"github.com/topgun-sync/topgun/services/fanout"
	"github.com/topgun-sync/topgun/services/internal/broker"
	"github.com/topgun-sync/topgun/services/internal/bus/natsbus"
	"github.com/topgun-sync/topgun/services/internal/obs"
	"github.com/topgun-sync/topgun/services/internal/rpc"
)

func main() {
	os.Exit(cli.Main(&program{}, "TopGun fanout: tells gateways what changed, and keeps live queries."))
}

type program struct {
	Listen    string `default:"127.0.0.1:8083" env:"TOPGUN_LISTEN" placeholder:"HOST:PORT" help:"Address for other services and operators."`
	NATS      string `name:"nats" required:"" env:"TOPGUN_NATS" placeholder:"URL" help:"The NATS server."`
	Partition string `required:"" env:"TOPGUN_PARTITION" placeholder:"URL" help:"Where the partition service is, for example http://partition:8082."`

	cli.Telemetry
}

// Setup implements cli.Program.
func (p *program) Setup() (string, cli.Telemetry) { return "topgun-fanout", p.Telemetry }

// Run implements cli.Program.
func (p *program) Run(ctx context.Context, t *obs.Telemetry, out io.Writer) (err error) {
	conn, err := broker.Connect(ctx, p.NATS, "fanout", t.Logger)
	if err != nil {
		return err
	}
	defer conn.Close()
	events := natsbus.New(conn, t.Logger)
	defer func() { err = errors.Join(err, events.Close()) }()
	service, err := fanout.New(fanout.DefaultConfig(), fanout.Deps{
		Bus: events,
		Partitions: []partitionv1connect.PartitionServiceClient{partitionv1connect.NewPartitionServiceClient(
			rpc.Dial(p.Partition, nil, rpc.Deps{Logger: t.Logger, Meter: t.Meter, Tracer: t.Tracer}))},
		Logger: t.Logger, Meter: t.Meter, Tracer: t.Tracer,
	})
	if err != nil {
		return err
	}
	return cli.Serve(ctx, "listening", p.Listen, cli.Service{
		Name:     fanoutv1connect.FanoutServiceName,
		Register: service.Register,
		Run:      service.Run,
		Ready:    service.Ready,
	}, t, out)
}
