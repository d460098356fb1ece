// Command bench measures a topgun server from outside: it starts a fresh one for
// every measurement, plays the clients over the wire, checks that what was written
// is there, and prints medians with their range.
//
// A measurement whose data is not there complete fails the run, however fast it
// was. Repetitions of all scenarios are interleaved, so that a slow minute of the
// machine hits all of them. Clients and server share the machine: compare ratios
// and CPU per operation of one run.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"time"
)

// settings are the flags.
type settings struct {
	binary      string
	only        *regexp.Regexp
	reps        int
	duration    time.Duration
	pause       time.Duration
	connections int
	records     int
	idle        int
	json        bool
}

// scenario is one thing that is measured, once per repetition.
type scenario struct {
	name string
	run  func(ctx context.Context, b *bench) error
}

// bench is one run of the program.
type bench struct {
	settings
	binary  string // of the server, built
	tmp     string
	results results
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Args[1:], os.Stdout)
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, out io.Writer) (err error) {
	b, err := parse(args)
	if err != nil {
		return err
	}
	if b.tmp, err = os.MkdirTemp("", "topgun-bench-"); err != nil {
		return fmt.Errorf("make a folder for the data: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.tmp)) }()
	if err := b.build(ctx); err != nil {
		return err
	}
	began := time.Now()
	fsync, err := fsyncMicros(b.tmp)
	if err != nil {
		return err
	}
	for rep := range b.reps {
		for _, s := range scenarios() {
			if !b.only.MatchString(s.name) {
				continue
			}
			fmt.Fprintf(os.Stderr, "%3.0fs  repetition %d of %d: %s\n", time.Since(began).Seconds(), rep+1, b.reps, s.name)
			if err := s.run(ctx, b); err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
		}
	}
	if b.json {
		return writeJSON(out, b.results.rows, fsync)
	}
	fmt.Fprintf(out, "%d CPUs, %s, fsync of 64 KiB %.0f µs, %d repetitions: median [least – most]\n\n",
		runtime.NumCPU(), runtime.Version(), fsync, b.reps)
	return b.results.write(out)
}

// scenarios lists what is measured, in the order of the table.
func scenarios() []scenario {
	var list []scenario
	for _, store := range []string{"memory", "sqlite"} {
		for _, size := range []int{1, 10, 100} {
			list = append(list, writeScenario(store, size))
		}
	}
	return append(list,
		scenario{"fan-out, memory", fanoutScenario},
		scenario{"sync, sqlite", syncScenario},
		scenario{"idle connections, memory", idleScenario},
		scenario{"restart, sqlite", restartScenario},
		distinctQueries(1),
		distinctQueries(1000),
		distinctQueries(100_000),
		equalQueries(1000),
		counterScenario("memory"),
		counterScenario("sqlite"),
		lockScenario("memory", false),
		lockScenario("sqlite", false),
		lockScenario("memory", true),
	)
}

func parse(args []string) (*bench, error) {
	b := &bench{}
	var only string
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.StringVar(&b.settings.binary, "server", "", "path of a topgun binary; built from this tree if empty")
	flags.StringVar(&only, "only", "", "regular expression of the scenarios to run: write, fan-out, sync, idle, restart, queries, subscribers, counter, lock")
	flags.IntVar(&b.reps, "reps", 3, "repetitions")
	flags.DurationVar(&b.duration, "duration", 2*time.Second, "length of one write measurement")
	flags.DurationVar(&b.pause, "pause", 2*time.Second, "how long the server is left alone between loading, the first sync and the re-sync")
	flags.IntVar(&b.connections, "connections", 50, "connections that write")
	flags.IntVar(&b.records, "records", 100_000, "records of the sync and restart scenarios")
	flags.IntVar(&b.idle, "idle", 1000, "idle connections")
	flags.BoolVar(&b.json, "json", false, "print JSON")
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	if b.reps < 1 || b.connections < 1 || b.records < resyncRecords || b.idle < 1 {
		return nil, fmt.Errorf("want at least 1 repetition, 1 connection, 1 idle connection and %d records", resyncRecords)
	}
	var err error
	if b.only, err = regexp.Compile(only); err != nil {
		return nil, fmt.Errorf("-only: %w", err)
	}
	return b, nil
}

// build makes the server's binary where none was given.
func (b *bench) build(ctx context.Context) error {
	if b.settings.binary != "" {
		b.binary = b.settings.binary
		return nil
	}
	b.binary = filepath.Join(b.tmp, "topgun")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", b.binary, "github.com/topgun-sync/topgun/services/cmd/topgun")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build topgun: %w\n%s", err, out)
	}
	return nil
}

// fsyncMicros measures what one durable write of 64 KiB costs in dir: the floor of
// a durable acknowledgement on this machine.
func fsyncMicros(dir string) (micros float64, err error) {
	f, err := os.CreateTemp(dir, "fsync-")
	if err != nil {
		return 0, fmt.Errorf("measure fsync: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	block := make([]byte, 64<<10)
	var took []float64
	for range 100 {
		start := time.Now()
		if _, err := f.Write(block); err != nil {
			return 0, fmt.Errorf("measure fsync: %w", err)
		}
		if err := f.Sync(); err != nil {
			return 0, fmt.Errorf("measure fsync: %w", err)
		}
		took = append(took, float64(time.Since(start).Microseconds()))
	}
	return quantile(took, 0.5), nil
}

func writeJSON(out io.Writer, rows []row, fsync float64) error {
	enc := json.NewEncoder(out)
	enc.SetIndent("", "  ")
	return enc.Encode(struct {
		Go          string  `json:"go"`
		CPUs        int     `json:"cpus"`
		FsyncMicros float64 `json:"fsync64KiBMicros"`
		Results     []row   `json:"results"`
	}{runtime.Version(), runtime.NumCPU(), fsync, rows})
}
