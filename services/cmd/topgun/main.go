// Command topgun is the whole server in one process: it needs nothing installed and
// no configuration.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"

	"github.com/topgun-sync/topgun/services/allinone"
	"github.com/topgun-sync/topgun/services/cmd/internal/cli"
	"github.com/topgun-sync/topgun/services/internal/obs"
	"github.com/topgun-sync/topgun/services/persistence"
)

func main() {
	os.Exit(cli.Main(&topgun{}, "TopGun: local-first sync. Starts the whole server in one process."))
}

// defaultOperator is where the operator port is unless it is taken.
const defaultOperator = "127.0.0.1:8081"

type topgun struct {
	Listen         string `default:"127.0.0.1:8080" env:"TOPGUN_LISTEN" placeholder:"HOST:PORT" help:"Address for clients (default ${default}); port 0 picks one."`
	OperatorListen string `name:"operator-listen" env:"TOPGUN_OPERATOR_LISTEN" placeholder:"HOST:PORT" help:"Address for operators: health, metrics, profiles and the services' own APIs (default 127.0.0.1:8081, or a free port if that is taken)."`
	Data           string `default:"topgun-data" env:"TOPGUN_DATA" type:"path" placeholder:"DIR" help:"Folder that everything is kept in."`
	Store          string `env:"TOPGUN_STORE" enum:"sqlite,postgres,memory," default:"" placeholder:"KIND" help:"Where records are kept: sqlite, postgres or memory (default sqlite; postgres when --postgres is given)."`
	Postgres       string `env:"TOPGUN_POSTGRES,DATABASE_URL" placeholder:"URL" help:"Connection URL of a Postgres that the records are kept in. Better in the environment: arguments are visible to other users."`
	NATS           string `name:"nats" env:"TOPGUN_NATS" placeholder:"URL" help:"A NATS server with JetStream to use instead of the one inside."`
	LogSync        string `name:"log-sync" env:"TOPGUN_LOG_SYNC" enum:"always,interval" default:"always" placeholder:"WHEN" help:"When the log is written to the disk: always (before every ack) or interval (within two minutes; a power cut loses what was acked since)."`
	PublicURL      string `name:"public-url" env:"TOPGUN_PUBLIC_URL" placeholder:"URL" help:"Address of the WebSocket as clients reach it, ws:// or wss://, for clients in cluster mode (default: the host that the client connected to)."`

	cli.Access
	cli.Shards
	cli.Tombstones
	cli.Journal
	cli.Telemetry
}

// Setup implements cli.Program.
func (p *topgun) Setup() (string, cli.Telemetry) { return "topgun", p.Telemetry }

// Run implements cli.Program.
func (p *topgun) Run(ctx context.Context, t *obs.Telemetry, out io.Writer) error {
	config, err := p.config()
	if err != nil {
		return err
	}
	if err := p.checkOperator(config, t.Logger); err != nil {
		return err
	}
	client, err := net.Listen("tcp", p.Listen)
	if err != nil {
		return fmt.Errorf("listen for clients: %w", err)
	}
	operator, err := listenOperator(p.OperatorListen)
	if err != nil {
		return errors.Join(fmt.Errorf("listen for operators: %w", err), client.Close())
	}
	listeners := allinone.Listeners{Client: client, Operator: operator}
	return allinone.Run(ctx, config, listeners, t, func() {
		// Nobody reads: the server goes on all the same.
		_, _ = io.WriteString(out, p.banner(config, client.Addr().String(), operator.Addr().String()))
	})
}

// checkOperator refuses an operator port that would undo what the client port asks
// for: it has no authentication, and the partition's API behind it reads and writes
// every map.
func (p *topgun) checkOperator(config allinone.Config, log *slog.Logger) error {
	host, _, err := net.SplitHostPort(cmp.Or(p.OperatorListen, defaultOperator))
	if err != nil {
		return errors.New("operator listen address: want host:port, for example 127.0.0.1:8081")
	}
	if addr, err := netip.ParseAddr(host); host == "localhost" || err == nil && addr.Unmap().IsLoopback() {
		return nil
	}
	if !config.Gateway.Auth.Configured() && !p.NoAuth {
		return errors.New("the operator port reads and writes everything and asks for no token: " +
			"listen on 127.0.0.1, or say --no-auth to serve everybody")
	}
	log.Warn("the operator port asks for no token and reads and writes everything: keep clients away from it")
	return nil
}

// listenOperator opens the operator port. Somebody who said nothing about it should
// not be kept from starting a second server by it.
func listenOperator(address string) (net.Listener, error) {
	if address != "" {
		return net.Listen("tcp", address)
	}
	listener, err := net.Listen("tcp", defaultOperator)
	if errors.Is(err, syscall.EADDRINUSE) {
		return net.Listen("tcp", "127.0.0.1:0")
	}
	return listener, err
}

func (p *topgun) config() (allinone.Config, error) {
	config := allinone.DefaultConfig(p.Data)
	config.NATSURL = p.NATS
	config.SyncAlways = p.LogSync == "always"
	config.Gateway.Listen = p.Listen
	config.Partition.AcceptLogLoss = p.AcceptLogLoss
	p.Tombstones.Apply(&config.Partition)
	p.Journal.Apply(&config.Persistence)
	config.Gateway.PublicURL = p.PublicURL
	if err := p.Access.Apply(&config.Gateway); err != nil {
		return allinone.Config{}, err
	}
	switch {
	case p.Store != "":
		config.Persistence.Store = p.Store
	case p.Postgres != "":
		config.Persistence.Store = persistence.StorePostgres
	}
	// A DATABASE_URL that happens to be set does not contradict another store.
	if config.Persistence.Store == persistence.StorePostgres {
		if p.Postgres == "" {
			return allinone.Config{}, errors.New("--store postgres needs --postgres or DATABASE_URL")
		}
		config.Persistence.PostgresURL = p.Postgres
	}
	return config, nil
}

// banner tells the person who started the server, in under ten lines, where it is,
// what an ack is worth, who may connect, and what to try. Tools read the lines
// "listening on" and "operator on".
func (p *topgun) banner(config allinone.Config, client, operator string) string {
	kept := map[string]string{
		persistence.StoreSQLite:   "records in " + filepath.Join(p.Data, "topgun.db"),
		persistence.StorePostgres: "records in Postgres",
		persistence.StoreMemory:   "records in memory",
	}[config.Persistence.Store]
	durable := "an ack means: in the fsynced log; it survives kill -9 and a power cut"
	switch {
	case config.Persistence.Store == persistence.StoreMemory:
		durable = "NOT durable: an ack means in memory, and everything is gone when this ends"
	case p.NATS != "":
		durable = "an ack means: in the log of the NATS server; whether that is fsynced is its sync_interval"
	case p.LogSync != "always":
		durable = "an ack survives kill -9; a power cut loses up to the last two minutes of acks (--log-sync interval)"
	}
	access := "a token is required"
	if !config.Gateway.Auth.Configured() {
		access = "no authentication, so loopback only; set JWT_SECRET or --jwt-secret-file to serve others"
		if p.NoAuth {
			access = "no authentication (--no-auth): everybody who reaches the port may read and write everything"
		}
	}
	return fmt.Sprintf(`TopGun %s
listening on http://%s
operator on http://%s
kept: %s; %s
access: %s
try:  curl http://%[2]s/sync -H 'Content-Type: application/json' -d '{"syncMaps":[{"mapName":"todos"}]}'
      new TopGunClient({ serverUrl: 'ws://%[2]s/ws', storage }).getMap('todos').set('1', { text: 'hello' })
`, cli.Version(), client, operator, kept, durable, access)
}
