// Package cli is what the five servers have in common: reading flags and
// environment, telemetry, signals, listening, and the exit code. Only main packages
// use it; it decides nothing about what a service does.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/alecthomas/kong"

	"github.com/topgun-sync/topgun/services/internal/obs"
)

// Telemetry are the flags that every program has.
type Telemetry struct {
	LogLevel     slog.Level `name:"log-level" default:"info" env:"TOPGUN_LOG_LEVEL" help:"Lowest level that is logged: debug, info, warn or error."`
	OTLPEndpoint string     `name:"otlp-endpoint" env:"TOPGUN_OTLP_ENDPOINT,OTEL_EXPORTER_OTLP_ENDPOINT" placeholder:"URL" help:"Where traces are sent to by OTLP/gRPC, for example http://collector:4317. Without it there are none."`
}

// Program is one of the five: its parsed flags.
type Program interface {
	// Setup returns the name in logs, metrics and traces, and the telemetry flags.
	Setup() (service string, flags Telemetry)
	// Run does the work until ctx ends. Lines for the person who started the program
	// go to out; everything else is logged.
	Run(ctx context.Context, t *obs.Telemetry, out io.Writer) error
}

// shutdownTimeout bounds the sending of the last spans.
const shutdownTimeout = time.Second

// Main parses the command line into program, runs it until an interrupt or
// SIGTERM, and returns the exit code: 0 after a clean stop, 1 after a failure, 2
// (by way of kong) for a wrong command line. A second signal ends the process at
// once.
func Main(program Program, description string) int {
	kong.Parse(program, kong.Description(description), kong.UsageOnError(), kong.Vars{"version": Version()})
	service, flags := program.Setup()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// Once the first signal was noticed the default action is back, so that the
	// second one kills.
	context.AfterFunc(ctx, stop)

	t, err := obs.Setup(ctx, obs.Config{
		Service:      service,
		Version:      Version(),
		Level:        flags.LogLevel,
		OTLPEndpoint: flags.OTLPEndpoint,
	}, os.Stderr)
	if err != nil {
		_, _ = fmt.Fprintln(os.Stderr, service+": "+err.Error())
		return 1
	}
	err = program.Run(ctx, t, os.Stdout)
	flush, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	if flushErr := t.Shutdown(flush); flushErr != nil {
		t.Logger.Warn("the last spans may not have been sent", "error", flushErr)
	}
	if err != nil && !errors.Is(err, context.Canceled) {
		t.Logger.Error("stopped", "error", err)
		return 1
	}
	return 0
}

// Version is the version of the module that the program was built from.
func Version() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

// Announce says on out where something listens: "<what> on http://host:port". Tools
// read that line.
func Announce(out io.Writer, what string, address net.Addr) error {
	if _, err := fmt.Fprintf(out, "%s on http://%s\n", what, address); err != nil {
		return fmt.Errorf("print the address: %w", err)
	}
	return nil
}

// Listen opens address, where port 0 picks one, and announces it.
func Listen(out io.Writer, what, address string) (net.Listener, error) {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	if err := Announce(out, what, listener.Addr()); err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	return listener, nil
}
