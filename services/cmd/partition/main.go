// Command partition runs the partition service alone, on an external NATS server.
package main

import (
	"context"
	"errors"
	"io"
	"os"

	"github.com/topgun-sync/topgun/gen/go/topgun/partition/v1/partitionv1connect"
	"github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1/persistencev1connect"
	"github.com/topgun-sync/topgun/services/cmd/internal/cli"
	"github.com/topgun-sync/topgun/services/internal/broker"
	"github.com/topgun-sync/topgun/services/internal/bus/natsbus"
	"github.com/topgun-sync/topgun/services/internal/commitlog"
	"github.com/topgun-sync/topgun/services/internal/obs"
	"github.com/topgun-sync/topgun/services/internal/rpc"
	"github.com/topgun-sync/topgun/services/partition"
)

func main() {
	os.Exit(cli.Main(&program{}, "TopGun partition: owns the maps, merges ops, writes the log."))
}

type program struct {
	Listen      string `default:"127.0.0.1:8082" env:"TOPGUN_LISTEN" placeholder:"HOST:PORT" help:"Address for other services and operators."`
	NATS        string `name:"nats" required:"" env:"TOPGUN_NATS" placeholder:"URL" help:"The NATS server that holds the log and carries the broadcasts."`
	Persistence string `required:"" env:"TOPGUN_PERSISTENCE" placeholder:"URL" help:"Where the persistence service is, for example http://persistence:8084."`

	NodeID string `name:"node-id" default:"partition" env:"TOPGUN_NODE_ID" placeholder:"NAME" help:"Name of this node in the log: letters, digits, - and _."`

	cli.Shards
	cli.Tombstones
	cli.Log
	cli.Telemetry
}

// Setup implements cli.Program.
func (p *program) Setup() (string, cli.Telemetry) { return "topgun-partition", p.Telemetry }

// Run implements cli.Program.
func (p *program) Run(ctx context.Context, t *obs.Telemetry, out io.Writer) (err error) {
	conn, err := broker.Connect(ctx, p.NATS, "partition", t.Logger)
	if err != nil {
		return err
	}
	defer conn.Close()
	log, err := commitlog.Open(ctx, conn, p.Log.Config())
	if err != nil {
		return err
	}
	events := natsbus.New(conn, t.Logger)
	defer func() { err = errors.Join(err, events.Close()) }()
	config := partition.DefaultConfig()
	config.NodeID, config.AcceptLogLoss = p.NodeID, p.AcceptLogLoss
	p.Apply(&config)
	service, err := partition.New(config, partition.Deps{
		Log:    log,
		Events: events,
		Persistence: persistencev1connect.NewPersistenceServiceClient(
			rpc.Dial(p.Persistence, nil, rpc.Deps{Logger: t.Logger, Meter: t.Meter, Tracer: t.Tracer})),
		Logger: t.Logger, Meter: t.Meter, Tracer: t.Tracer,
	})
	if err != nil {
		return err
	}
	return cli.Serve(ctx, "listening", p.Listen, cli.Service{
		Name:     partitionv1connect.PartitionServiceName,
		Register: service.Register,
		Run:      service.Run,
		Ready:    service.Ready,
	}, t, out)
}
