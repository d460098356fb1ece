// Package pgtest gives tests a real Postgres.
//
// It looks, in this order, for a server that TOPGUN_TEST_POSTGRES_URL names, and
// for the programs initdb and postgres in the folder PG_BIN, in Debian's versioned
// folders (the highest version), and on PATH; with those it runs a cluster of its
// own. Where none is there a test fails and says what to install: nothing is
// skipped.
//
// It owns the clusters it starts. Each lives in a folder under the system's
// temporary folder and listens on a socket there only. It is stopped and removed
// when the test process ends, however that ends: a small shell waits for the
// process's end of a pipe to close. Postgres refuses to run as root, so for root
// everything runs as the user postgres.
package pgtest

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// Option changes a cluster that Start makes.
type Option func(*Server)

// WithFsync makes the cluster durable. It is for tests about durability and for
// measurements; the others are faster without.
func WithFsync() Option {
	return func(s *Server) { s.fsync = true }
}

// Server is a Postgres server of this test process. Its methods may run at the
// same time, but for Stop and Start.
type Server struct {
	fsync bool
	// admin is the URL of the database postgres.
	admin string
	// bin is the folder of the programs, and dir the cluster's; both are empty for
	// a server that somebody else runs.
	bin, dir string
	process  *exec.Cmd
}

// databases numbers the databases of this process.
var databases atomic.Int64

// shared is the one cluster that the tests of a process share.
var shared = sync.OnceValues(func() (*Server, error) {
	if external := os.Getenv("TOPGUN_TEST_POSTGRES_URL"); external != "" {
		return &Server{admin: external}, nil
	}
	return launch(&Server{})
})

// NewDatabase returns the URL of an empty database for tb, on the server that the
// tests of this process share. The database is dropped when tb ends.
func NewDatabase(tb testing.TB) string {
	tb.Helper()
	server, err := shared()
	if err != nil {
		tb.Fatalf("start Postgres for the tests: %v", err)
	}
	return server.NewDatabase(tb)
}

// Start runs a cluster for tb alone, so that tb can stop it. It is removed when
// tb ends. It takes a second or two: a test that needs only a database calls
// NewDatabase.
func Start(tb testing.TB, options ...Option) *Server {
	tb.Helper()
	server := &Server{}
	for _, option := range options {
		option(server)
	}
	if _, err := launch(server); err != nil {
		tb.Fatalf("start Postgres: %v", err)
	}
	tb.Cleanup(func() {
		if server.process != nil {
			server.Stop(tb)
		}
	})
	return server
}

// NewDatabase creates an empty database on the server and returns its URL. The
// database is dropped when tb ends, if the server runs then.
func (s *Server) NewDatabase(tb testing.TB) string {
	tb.Helper()
	name := fmt.Sprintf("t%d_%d", os.Getpid(), databases.Add(1))
	if err := s.exec("CREATE DATABASE " + name); err != nil {
		tb.Fatalf("create a database for the test: %v", err)
	}
	tb.Cleanup(func() {
		if s.dir != "" && s.process == nil {
			return // stopped by the test; the folder goes with the cluster
		}
		if err := s.exec("DROP DATABASE IF EXISTS " + name + " WITH (FORCE)"); err != nil {
			tb.Errorf("drop the test's database: %v", err)
		}
	})
	address, err := url.Parse(s.admin)
	if err != nil {
		tb.Fatal("TOPGUN_TEST_POSTGRES_URL is not a URL")
	}
	address.Path = "/" + name
	return address.String()
}

func (s *Server) exec(statement string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	conn, err := pgx.Connect(ctx, s.admin)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	_, err = conn.Exec(ctx, statement)
	if closeErr := conn.Close(ctx); err == nil {
		err = closeErr
	}
	return err
}

// Stop ends the server at once, as a crash of its processes would: clients lose
// their connections, and what was not committed is lost.
func (s *Server) Stop(tb testing.TB) {
	tb.Helper()
	if s.process == nil {
		tb.Fatal("stop Postgres: it is not running, or not ours to stop")
	}
	// SIGQUIT is Postgres' immediate shutdown: no checkpoint, recovery at the next start.
	if err := s.process.Process.Signal(syscall.SIGQUIT); err != nil {
		tb.Fatalf("stop Postgres: %v", err)
	}
	// The exit status of an immediate shutdown says nothing.
	_ = s.process.Wait()
	s.process = nil
}

// Start runs the server again on the data that it had and waits until it answers.
func (s *Server) Start(tb testing.TB) {
	tb.Helper()
	if s.process != nil || s.dir == "" {
		tb.Fatal("start Postgres: it is running, or not ours to start")
	}
	if err := s.run(); err != nil {
		tb.Fatalf("start Postgres again: %v", err)
	}
}

// launch makes the cluster and runs it.
func launch(s *Server) (*Server, error) {
	bin, err := findPrograms()
	if err != nil {
		return nil, err
	}
	s.bin = bin
	// Short, since a socket's path ends at 107 bytes, and not tb.TempDir, whose
	// parents the user postgres may not enter.
	if s.dir, err = os.MkdirTemp("", "pg"); err != nil {
		return nil, fmt.Errorf("make a folder for the cluster: %w", err)
	}
	who, err := unprivileged()
	if err != nil {
		return nil, err
	}
	if who != nil {
		if err := os.Chown(s.dir, int(who.Uid), int(who.Gid)); err != nil {
			return nil, fmt.Errorf("hand the cluster's folder over: %w", err)
		}
	}
	if err := s.removeAtExit(); err != nil {
		return nil, err
	}
	initdb, err := s.command("initdb", "-A", "trust", "-U", "postgres", "-N", "--locale=C", "-E", "UTF8", "-D", s.data())
	if err != nil {
		return nil, err
	}
	if output, err := initdb.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("initdb: %w: %s", err, output)
	}
	s.admin = "postgres://postgres@/postgres?host=" + url.QueryEscape(s.dir)
	if err := s.run(); err != nil {
		return nil, err
	}
	return s, nil
}

func (s *Server) data() string { return filepath.Join(s.dir, "data") }

// command prepares one of Postgres' programs to run as somebody it accepts.
func (s *Server) command(program string, args ...string) (*exec.Cmd, error) {
	who, err := unprivileged()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(filepath.Join(s.bin, program), args...)
	cmd.Dir = s.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: who}
	return cmd, nil
}

// run starts the server and waits until it answers.
func (s *Server) run() error {
	args := []string{"-D", s.data(), "-c", "listen_addresses=", "-k", s.dir, "-c", "max_connections=100"}
	if !s.fsync {
		args = append(args, "-c", "fsync=off", "-c", "full_page_writes=off")
	}
	cmd, err := s.command("postgres", args...)
	if err != nil {
		return err
	}
	logFile, err := os.OpenFile(filepath.Join(s.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("open Postgres' log: %w", err)
	}
	cmd.Stdout, cmd.Stderr = logFile, logFile
	err = cmd.Start()
	// The child has its own descriptor.
	_ = logFile.Close()
	if err != nil {
		return fmt.Errorf("start postgres: %w", err)
	}
	deadline := time.Now().Add(2 * time.Minute)
	for {
		if err = s.exec("SELECT 1"); err == nil {
			s.process = cmd
			return nil
		}
		if time.Now().After(deadline) {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			text, _ := os.ReadFile(filepath.Join(s.dir, "log"))
			return fmt.Errorf("postgres does not answer: %w; its log: %s", err, text)
		}
		time.Sleep(20 * time.Millisecond) // nothing tells when a server begins to answer
	}
}

// removeAtExit leaves a shell behind that outlives this process by a moment. It
// reads from a pipe that only this process holds open for writing, so it goes on
// when the process has ended, also by a kill: then it stops the server, if one
// runs, and removes the folder.
func (s *Server) removeAtExit() error {
	reader, writer, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("make a pipe: %w", err)
	}
	who, err := unprivileged()
	if err != nil {
		return err
	}
	const script = `cat; pid=$(head -n 1 "$1/data/postmaster.pid" 2>/dev/null) && kill -QUIT "$pid"
while [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null; do sleep 0.05; done
rm -rf "$1"`
	shell := exec.Command("/bin/sh", "-c", script, "sh", s.dir)
	shell.Stdin = reader
	shell.Dir = "/"
	// A session of its own, so that an interrupt from the terminal ends the test
	// and not the one who tidies up after it.
	shell.SysProcAttr = &syscall.SysProcAttr{Credential: who, Setsid: true}
	err = shell.Start()
	_ = reader.Close()
	if err != nil {
		return fmt.Errorf("start the shell that tidies up: %w", err)
	}
	pipes.Lock()
	pipes.open = append(pipes.open, writer)
	pipes.Unlock()
	return nil
}

// pipes keeps the write ends reachable until the process ends: a collected file
// is closed.
var pipes struct {
	sync.Mutex
	open []*os.File
}

// unprivileged is the user to run as, nil for the present one.
func unprivileged() (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	postgres, err := user.Lookup("postgres")
	if err != nil {
		return nil, fmt.Errorf("postgres refuses to run as root, and there is no user postgres: %w", err)
	}
	uid, err := strconv.ParseUint(postgres.Uid, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("read the user id of postgres: %w", err)
	}
	gid, err := strconv.ParseUint(postgres.Gid, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("read the group id of postgres: %w", err)
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
}

var version = regexp.MustCompile(`^/usr/lib/postgresql/(\d+)/bin$`)

// findPrograms returns the folder that holds initdb and postgres.
func findPrograms() (string, error) {
	var folders []string
	if folder := os.Getenv("PG_BIN"); folder != "" {
		folders = append(folders, folder)
	}
	debian, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil {
		return "", fmt.Errorf("look for Postgres: %w", err)
	}
	slices.SortFunc(debian, func(a, b string) int { return number(b) - number(a) })
	folders = append(folders, debian...)
	if path, err := exec.LookPath("initdb"); err == nil {
		folders = append(folders, filepath.Dir(path))
	}
	for _, folder := range folders {
		if executable(filepath.Join(folder, "initdb")) && executable(filepath.Join(folder, "postgres")) {
			return folder, nil
		}
	}
	return "", fmt.Errorf("found no initdb and postgres: install the package postgresql, or set PG_BIN to their folder or TOPGUN_TEST_POSTGRES_URL to a server")
}

func number(folder string) int {
	match := version.FindStringSubmatch(folder)
	if match == nil {
		return 0
	}
	n, _ := strconv.Atoi(match[1]) // too many digits count as the oldest
	return n
}

func executable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}
