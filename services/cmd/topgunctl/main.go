// Command topgunctl is for the operator of a running server: it looks at its
// services and its data, and changes records, sessions and nothing else.
//
// It speaks the services' own APIs on the operator port (of the one binary) or on the
// port of each service. Output is for people, or JSON with --json, whose field names
// are stable. The exit code is 0 when all went well, 1 when something did not, and 2
// when the command line is wrong.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"

	"github.com/topgun-sync/topgun/services/cmd/topgunctl/internal/remote"
)

// Exit codes.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// Once the first signal was noticed the default action is back, so that the
	// second one kills.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// usageError is a command line that kong takes and we do not.
type usageError string

func (e usageError) Error() string { return string(e) }

// commandLine is what kong parses.
type commandLine struct {
	Server      string        `default:"http://127.0.0.1:8081" env:"TOPGUN_SERVER" placeholder:"URL" help:"Operator port of the one binary (default ${default}). Services with an address of their own need it not."`
	Partition   []string      `env:"TOPGUN_PARTITION" placeholder:"URL" help:"Where the partition service is, for example http://partition:8082; once for each node."`
	Persistence string        `env:"TOPGUN_PERSISTENCE" placeholder:"URL" help:"Where the persistence service is, for example http://persistence:8084."`
	Fanout      string        `env:"TOPGUN_FANOUT" placeholder:"URL" help:"Where the fanout service is, for example http://fanout:8083."`
	Gateway     string        `env:"TOPGUN_GATEWAY" placeholder:"URL" help:"Operator port of a gateway, for example http://gateway:8081."`
	Timeout     time.Duration `default:"10s" env:"TOPGUN_TIMEOUT" placeholder:"TIME" help:"How long to wait for one answer (default ${default})."`
	JSON        bool          `name:"json" help:"Print JSON; lists print one object on a line."`

	Status       statusCommand  `cmd:"" help:"Show the health of every service and what it holds; exit code 1 if something is not well."`
	Maps         mapsCommand    `cmd:"" help:"List the maps and how many records they have."`
	Get          getCommand     `cmd:"" help:"Show what a key holds, in the LWW-map and in the OR-map of the name."`
	Put          putCommand     `cmd:"" help:"Write a value to a key of an LWW-map."`
	Delete       deleteCommand  `cmd:"" help:"Delete a key of an LWW-map."`
	Watch        watchCommand   `cmd:"" help:"Show the changes of a map as they come, until interrupted."`
	Export       exportCommand  `cmd:"" help:"Write maps as lines of JSON."`
	Import       importCommand  `cmd:"" help:"Read lines of JSON as export writes them. Stamps are kept, so a second time changes nothing."`
	Verify       verifyCommand  `cmd:"" help:"Compare memory, store and Merkle leaves; exit code 1 if they differ."`
	Sessions     sessionCommand `cmd:"" help:"List the gateway's open sessions."`
	CloseSession closeCommand   `cmd:"" name:"close-session" help:"Close one session; its client reconnects."`
	Drain        drainCommand   `cmd:"" help:"Close the gateway's sessions over a time, and take no new ones."`
}

// terminal is what a command works with.
type terminal struct {
	ctx     context.Context
	in      io.Reader
	out     io.Writer
	err     io.Writer
	json    bool
	timeout time.Duration
	*remote.Cluster
}

// run is the program: it returns the exit code.
func run(ctx context.Context, args []string, in io.Reader, out, errOut io.Writer) int {
	line, ended := &commandLine{}, -1
	parser, err := kong.New(line, kong.Name("topgunctl"), kong.Writers(out, errOut),
		kong.Description("TopGun for operators: status, data, sessions."),
		kong.Exit(func(code int) { ended = code }))
	if err != nil {
		fmt.Fprintln(errOut, "topgunctl:", err)
		return exitUsage
	}
	if len(args) == 1 && args[0] == "--version" { // without a command
		fmt.Fprintln(out, "topgunctl", version())
		return exitOK
	}
	command, err := parser.Parse(args)
	if ended >= 0 { // --help
		return ended
	}
	if err == nil {
		err = line.check()
	}
	if err != nil {
		fmt.Fprintf(errOut, "topgunctl: %v\ntry: topgunctl --help\n", err)
		return exitUsage
	}
	cluster := remote.Dial(line.config())
	defer cluster.Close()
	t := &terminal{ctx, in, out, errOut, line.JSON, line.Timeout, cluster}
	if err = command.Run(t); err == nil {
		return exitOK
	}
	if ctx.Err() != nil {
		err = errors.New("interrupted")
	}
	fmt.Fprintln(errOut, "topgunctl:", err)
	if _, ok := errors.AsType[usageError](err); ok {
		return exitUsage
	}
	return exitFailed
}

// version is that of the module. It is not cli's, which would link the services in.
func version() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

// config says where each service is.
func (l *commandLine) config() remote.Config {
	or := func(own string) string {
		if own == "" {
			own = l.Server
		}
		return strings.TrimSuffix(own, "/")
	}
	config := remote.Config{
		Gateway: or(l.Gateway), Fanout: or(l.Fanout), Persistence: or(l.Persistence), Timeout: l.Timeout,
	}
	for _, own := range l.Partition {
		config.Partitions = append(config.Partitions, or(own))
	}
	if len(l.Partition) == 0 {
		config.Partitions = []string{or("")}
	}
	return config
}

func (l *commandLine) check() error {
	if l.Timeout <= 0 {
		return usageError("--timeout must be more than 0s")
	}
	config := l.config()
	for _, address := range append(config.Partitions, config.Gateway, config.Fanout, config.Persistence) {
		u, err := url.Parse(address)
		if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			return usageError("an address must be a URL like http://127.0.0.1:8081")
		}
	}
	return nil
}
