// Command persistence runs the persistence service alone, on an external NATS
// server and a Postgres.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1/persistencev1connect"
	"github.com/topgun-sync/topgun/services/cmd/internal/cli"
	"github.com/topgun-sync/topgun/services/internal/broker"
	"github.com/topgun-sync/topgun/services/internal/commitlog"
	"github.com/topgun-sync/topgun/services/internal/obs"
	"github.com/topgun-sync/topgun/services/persistence"
	"github.com/topgun-sync/topgun/services/persistence/stores"
)

func main() {
	os.Exit(cli.Main(&program{}, "TopGun persistence: drains the log into Postgres and loads shards from it."))
}

type program struct {
	Listen   string `default:"127.0.0.1:8084" env:"TOPGUN_LISTEN" placeholder:"HOST:PORT" help:"Address for other services and operators."`
	NATS     string `name:"nats" required:"" env:"TOPGUN_NATS" placeholder:"URL" help:"The NATS server that holds the log."`
	Postgres string `required:"" env:"TOPGUN_POSTGRES,DATABASE_URL" placeholder:"URL" help:"Connection URL of the Postgres. Better in the environment: arguments are visible to other users."`

	cli.Journal
	cli.Log
	cli.Telemetry
}

// Setup implements cli.Program.
func (p *program) Setup() (string, cli.Telemetry) { return "topgun-persistence", p.Telemetry }

// Run implements cli.Program.
func (p *program) Run(ctx context.Context, t *obs.Telemetry, out io.Writer) (err error) {
	config := persistence.DefaultConfig()
	config.Store, config.PostgresURL = persistence.StorePostgres, p.Postgres
	p.Apply(&config)

	conn, err := broker.Connect(ctx, p.NATS, "persistence", t.Logger)
	if err != nil {
		return err
	}
	defer conn.Close()
	log, err := commitlog.Open(ctx, conn, p.Log.Config())
	if err != nil {
		return err
	}
	store, err := stores.Open(ctx, config, t.Logger)
	if err != nil {
		return fmt.Errorf("open the store: %w", err)
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	service, err := persistence.New(config, persistence.Deps{
		Store: store, Log: log, Logger: t.Logger, Meter: t.Meter, Tracer: t.Tracer,
	})
	if err != nil {
		return err
	}
	return cli.Serve(ctx, "listening", p.Listen, cli.Service{
		Name:     persistencev1connect.PersistenceServiceName,
		Register: service.Register,
		Run:      service.Run,
		Ready:    service.Ready,
	}, t, out)
}
