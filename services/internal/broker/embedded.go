package broker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

const (
	// maxPayload is one size up from the largest commit and event, with room for
	// headers.
	maxPayload = 8 << 20
	// startTimeout bounds the start of the server, which replays its streams.
	startTimeout = 30 * time.Second
)

// EmbeddedConfig says how the server in this process keeps its data.
type EmbeddedConfig struct {
	// Dir is the folder of the streams. Ignored with Memory.
	Dir string
	// Memory keeps nothing after Shutdown. Streams should use memory storage then.
	Memory bool
	// SyncAlways acknowledges an append after the fsync. Without it the operating
	// system has up to two minutes of acknowledged appends in its cache, which a
	// power cut loses; a killed process loses nothing either way.
	SyncAlways bool
	// Listen is host:port of a listener for other processes; port 0 chooses a free
	// one. Empty means none: only connections from within the process.
	Listen string
	// MaxStoreBytes bounds the disk space of all streams; 0 lets the server take up
	// to three quarters of what is free.
	MaxStoreBytes int64
	// Logger gets the state of the connections made by Connect, and the server's
	// warnings. Nil logs nothing.
	Logger *slog.Logger
}

// Validate says what is wrong with the configuration.
func (c EmbeddedConfig) Validate() error {
	if !c.Memory && c.Dir == "" {
		return errors.New("embedded broker: Dir is empty: name a folder or choose Memory")
	}
	if c.MaxStoreBytes < 0 {
		return errors.New("embedded broker: MaxStoreBytes is negative")
	}
	if c.Listen != "" {
		if _, _, err := listenAddress(c.Listen); err != nil {
			return err
		}
	}
	return nil
}

func listenAddress(listen string) (host string, port int, err error) {
	host, text, err := net.SplitHostPort(listen)
	if err == nil {
		port, err = strconv.Atoi(text)
	}
	if err != nil || port < 0 || port > 65535 {
		return "", 0, errors.New("embedded broker: Listen must be host:port with a port of 0 to 65535")
	}
	if port == 0 {
		port = server.RANDOM_PORT
	}
	return host, port, nil
}

// Embedded is a NATS server with JetStream in this process. Its methods may be
// called concurrently.
type Embedded struct {
	server *server.Server
	logger *slog.Logger
	listen bool
	// scratch is removed at Shutdown; empty unless Memory.
	scratch string

	mu    sync.Mutex
	conns []*nats.Conn
	down  bool
}

// StartEmbedded starts a server and waits until it serves.
func StartEmbedded(config EmbeddedConfig) (*Embedded, error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	e := &Embedded{logger: config.Logger, listen: config.Listen != ""}
	if e.logger == nil {
		e.logger = slog.New(slog.DiscardHandler)
	}
	opts := &server.Options{
		ServerName: "topgun",
		DontListen: true,
		JetStream:  true,
		StoreDir:   config.Dir,
		SyncAlways: config.SyncAlways,
		MaxPayload: maxPayload,
		// One message must fit beside what waits already.
		MaxPending:        8 * maxPayload,
		JetStreamMaxStore: config.MaxStoreBytes,
		// Signals are main's.
		NoSigs: true,
	}
	if config.Memory {
		scratch, err := os.MkdirTemp("", "topgun-broker-")
		if err != nil {
			return nil, fmt.Errorf("make the embedded broker's folder: %w", err)
		}
		e.scratch, opts.StoreDir = scratch, scratch
	}
	if e.listen {
		host, port, err := listenAddress(config.Listen)
		if err != nil {
			return nil, errors.Join(err, e.removeScratch())
		}
		opts.DontListen, opts.Host, opts.Port = false, host, port
	}
	s, err := server.NewServer(opts)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make the embedded broker: %w", err), e.removeScratch())
	}
	e.server = s
	log := &serverLog{logger: e.logger}
	s.SetLoggerV2(log, false, false, false)
	// Start recovers the streams before it returns, and says nothing when it could
	// not.
	s.Start()
	if reason := log.fatalReason(); reason != "" {
		return nil, errors.Join(fmt.Errorf("start the embedded broker: %s", reason), e.Shutdown())
	}
	if !s.ReadyForConnections(startTimeout) {
		err := fmt.Errorf("start the embedded broker: not serving after %s", startTimeout)
		return nil, errors.Join(err, e.Shutdown())
	}
	return e, nil
}

// Connect opens a connection from within the process, with no socket between.
// Shutdown closes those that are still open.
func (e *Embedded) Connect(name string) (*nats.Conn, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.down {
		return nil, errors.New("connect to the embedded broker: it is shut down")
	}
	opts := append(options(name, "embedded", e.logger), nats.InProcessServer(e.server))
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	nc, err := connect(ctx, "", "embedded", e.logger, opts)
	if err != nil {
		return nil, err
	}
	e.conns = append(e.conns, nc)
	return nc, nil
}

// ClientURL is the address of the listener, empty without one.
func (e *Embedded) ClientURL() string {
	if !e.listen {
		return ""
	}
	return e.server.ClientURL()
}

// Shutdown closes the connections made by Connect, stops the server, and returns
// when all its goroutines ended. It may be called again.
func (e *Embedded) Shutdown() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.down {
		return nil
	}
	e.down = true
	for _, nc := range e.conns {
		nc.Close()
	}
	e.conns = nil
	e.server.Shutdown()
	e.server.WaitForShutdown()
	return e.removeScratch()
}

func (e *Embedded) removeScratch() error {
	if e.scratch == "" {
		return nil
	}
	if err := os.RemoveAll(e.scratch); err != nil {
		return fmt.Errorf("remove the embedded broker's folder: %w", err)
	}
	return nil
}

// serverLog passes on the server's warnings and errors. Its notices describe a
// start that ours describes already.
type serverLog struct {
	logger *slog.Logger

	mu    sync.Mutex
	fatal string
}

func (*serverLog) Noticef(string, ...any) {}
func (*serverLog) Debugf(string, ...any)  {}
func (*serverLog) Tracef(string, ...any)  {}

func (l *serverLog) Warnf(format string, args ...any) {
	l.logger.Warn("embedded broker", "message", fmt.Sprintf(format, args...))
}

func (l *serverLog) Errorf(format string, args ...any) {
	l.logger.Error("embedded broker", "message", fmt.Sprintf(format, args...))
}

// Fatalf is meant to end the process, which only main may do. The server gave up
// starting; StartEmbedded returns the reason.
func (l *serverLog) Fatalf(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fatal = fmt.Sprintf(format, args...)
	l.logger.Error("embedded broker", "message", l.fatal)
}

func (l *serverLog) fatalReason() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.fatal
}
