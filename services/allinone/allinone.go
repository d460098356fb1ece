// Package allinone joins the four services in one process: with a NATS server and a
// SQLite file of its own, nothing else has to be installed. It calls the
// constructors that the services' own programs call, and connects them with the
// generated clients over the in-process transport.
//
//	           client port                         operator port
//	                │                                    │
//	┌───────────────▼────────────────────────────────────▼──────────┐
//	│ gateway ──▶ partition ──▶ commit log ──▶ persistence ──▶ store │
//	│    ▲            └──▶ bus ──▶ fanout                            │
//	│    └───────────────────────────┘                               │
//	└────────────────────────────────────────────────────────────────┘
//
// It starts fanout, persistence, partition and gateway in this order, and stops
// them in reverse: no new ops, then the shards settle, then the log is drained.
package allinone

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/topgun-sync/topgun/services/fanout"
	"github.com/topgun-sync/topgun/services/gateway"
	"github.com/topgun-sync/topgun/services/internal/broker"
	"github.com/topgun-sync/topgun/services/internal/bus/natsbus"
	"github.com/topgun-sync/topgun/services/internal/commitlog"
	"github.com/topgun-sync/topgun/services/internal/obs"
	"github.com/topgun-sync/topgun/services/partition"
	"github.com/topgun-sync/topgun/services/persistence"
	"github.com/topgun-sync/topgun/services/persistence/stores"
)

// Config holds the settings of the process; the services' own configurations nest
// in it.
type Config struct {
	// DataDir is the folder of everything that is kept. It is made if need be and
	// locked while the process runs. Unused with a memory store.
	DataDir string
	// NATSURL names a NATS server to use instead of one in the process.
	NATSURL string
	// SyncAlways makes the NATS server in the process answer an append only after
	// the fsync.
	SyncAlways bool
	// StopTimeout bounds an orderly stop.
	StopTimeout time.Duration

	Gateway     gateway.Config
	Partition   partition.Config
	Persistence persistence.Config
	Fanout      fanout.Config
	Log         commitlog.Config
}

// DefaultConfig returns the settings of a laptop: four shards, one log of at most
// 1 GiB with an fsync per commit, data in dir.
func DefaultConfig(dir string) Config {
	c := Config{
		DataDir:     dir,
		SyncAlways:  true,
		StopTimeout: 4500 * time.Millisecond,
		Gateway:     gateway.DefaultConfig(),
		Partition:   partition.DefaultConfig(),
		Persistence: persistence.DefaultConfig(),
		Fanout:      fanout.DefaultConfig(),
		Log:         commitlog.Config{Stream: commitlog.StreamName, MaxBytes: 1 << 30, Replicas: 1, Shards: 4},
	}
	c.Gateway.DrainTimeout = 2 * time.Second
	c.Partition.NodeID, c.Partition.StopTimeout = "topgun", 2*time.Second
	c.Persistence.Store = persistence.StoreSQLite
	c.Persistence.SQLitePath = filepath.Join(dir, "topgun.db")
	return c
}

// memory reports whether nothing is kept beyond the process.
func (c Config) memory() bool { return c.Persistence.Store == persistence.StoreMemory }

// Validate says what is wrong with the settings as a whole; the services check
// their own.
func (c Config) Validate() error {
	if c.memory() && c.NATSURL != "" {
		return errors.New("the memory store cannot empty the log of an external NATS server: " +
			"choose --store postgres or sqlite, or leave out --nats")
	}
	if !c.memory() && c.DataDir == "" {
		return errors.New("the data folder is empty: name one with --data")
	}
	return nil
}

// Listeners are the two ports of the process. Run closes them.
type Listeners struct {
	Client, Operator net.Listener
}

// close is for ways out of Run before the servers own the listeners.
func (l Listeners) close() { _ = errors.Join(l.Client.Close(), l.Operator.Close()) }

// Run starts everything, calls ready once clients are served, and works until ctx
// ends or a part fails. It returns after everything stopped; the error names the
// part that failed.
func Run(ctx context.Context, config Config, listeners Listeners, t *obs.Telemetry, ready func()) (err error) {
	if err := config.Validate(); err != nil {
		listeners.close()
		return err
	}
	p, err := open(ctx, config, t)
	if err != nil {
		listeners.close()
		return err
	}
	defer func() { err = errors.Join(err, p.close()) }()
	group, err := p.assemble(config, listeners, t, ready)
	if err != nil {
		listeners.close()
		return err
	}
	return group.Run(ctx)
}

// parts are what the services stand on.
type parts struct {
	bus   *natsbus.Bus
	log   *commitlog.Log
	store persistence.Store
	// closers undo what was opened, in its order.
	closers []func() error
}

// open opens the folder, the broker, the log and the store, in this order.
func open(ctx context.Context, config Config, t *obs.Telemetry) (_ *parts, err error) {
	p := &parts{}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.close())
		}
	}()
	if !config.memory() {
		if err := os.MkdirAll(config.DataDir, 0o700); err != nil {
			return nil, fmt.Errorf("make the data folder: %w", err)
		}
		unlock, err := lock(filepath.Join(config.DataDir, "lock"))
		if err != nil {
			return nil, err
		}
		p.closers = append(p.closers, unlock)
	}
	if err := p.openLog(ctx, config, t); err != nil {
		return nil, err
	}
	if p.store, err = stores.Open(ctx, config.Persistence, t.Logger); err != nil {
		return nil, fmt.Errorf("open the store: %w", err)
	}
	p.closers = append(p.closers, p.store.Close)
	return p, nil
}

// openLog connects to the broker, or starts one, and opens the log and the bus on it.
func (p *parts) openLog(ctx context.Context, config Config, t *obs.Telemetry) error {
	connect := func() (*broker.Conn, error) { return broker.Connect(ctx, config.NATSURL, "topgun", t.Logger) }
	if config.NATSURL == "" {
		embedded, err := broker.StartEmbedded(broker.EmbeddedConfig{
			Dir:        filepath.Join(config.DataDir, "nats"),
			Memory:     config.memory(),
			SyncAlways: config.SyncAlways,
			Logger:     t.Logger,
		})
		if err != nil {
			return err
		}
		p.closers = append(p.closers, embedded.Shutdown)
		connect = func() (*broker.Conn, error) { return embedded.Connect("topgun") }
	}
	conn, err := connect()
	if err != nil {
		return err
	}
	p.closers = append(p.closers, func() error { conn.Close(); return nil })
	config.Log.Memory = config.memory()
	if p.log, err = commitlog.Open(ctx, conn, config.Log); err != nil {
		return err
	}
	p.bus = natsbus.New(conn, t.Logger)
	p.closers = append(p.closers, p.bus.Close)
	return nil
}

// close closes what is open, in reverse.
func (p *parts) close() error {
	var errs []error
	for _, undo := range slices.Backward(p.closers) {
		errs = append(errs, undo())
	}
	return errors.Join(errs...)
}
