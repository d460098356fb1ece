package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

// server is one running topgun.
type server struct {
	cmd      *exec.Cmd
	started  time.Time
	url      string // ws://…
	operator string // http://…
	output   *tail
}

// start runs the server on dir and returns as soon as it has said where it
// listens, which is not when it is ready.
func (b *bench) start(ctx context.Context, dir, store string) (*server, error) {
	args := []string{"--listen", "127.0.0.1:0", "--operator-listen", "127.0.0.1:0", "--data", dir, "--store", store}
	if store == "sqlite" {
		args = append(args, "--log-sync", "always")
	}
	s := &server{cmd: exec.CommandContext(ctx, b.binary, args...), output: &tail{}}
	s.cmd.Stderr = s.output
	stdout, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("start the server: %w", err)
	}
	s.started = time.Now()
	if err := s.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the server: %w", err)
	}
	addresses := make(chan string)
	go func() { // ends with the server's output
		defer close(addresses)
		lines := bufio.NewScanner(io.TeeReader(stdout, s.output))
		for lines.Scan() {
			if what, address, ok := strings.Cut(lines.Text(), " on http://"); ok {
				addresses <- what + " " + address
			}
		}
	}()
	for s.url == "" || s.operator == "" {
		line, ok := <-addresses
		if !ok {
			return nil, errors.Join(errors.New("the server ended before it listened:\n"+s.output.String()), s.cmd.Wait())
		}
		what, address, _ := strings.Cut(line, " ")
		if strings.HasPrefix(what, "operator") {
			s.operator = "http://" + address
		} else {
			s.url = "ws://" + address + "/ws"
		}
	}
	go func() {
		for range addresses { // nothing blocks what the server prints later
		}
	}()
	return s, nil
}

// fresh starts a server on an empty folder and waits until it serves.
func (b *bench) fresh(ctx context.Context, store string) (*server, error) {
	dir, err := os.MkdirTemp(b.tmp, store+"-")
	if err != nil {
		return nil, fmt.Errorf("make a folder for the data: %w", err)
	}
	s, err := b.start(ctx, dir, store)
	if err != nil {
		return nil, err
	}
	if err := s.ready(ctx); err != nil {
		return nil, errors.Join(err, s.kill())
	}
	return s, nil
}

// ready waits until the server says that it can do its work.
func (s *server) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	for {
		body, err := get(ctx, s.operator+readyPath)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the server is not ready: %w %s\n%s", err, body, s.output.String())
		case <-time.After(2 * time.Millisecond):
		}
	}
}

const readyPath = "/health/ready"

// kill ends the server at once, as a crash does.
func (s *server) kill() error {
	if err := s.cmd.Process.Kill(); err != nil {
		return fmt.Errorf("kill the server: %w", err)
	}
	_ = s.cmd.Wait() // "signal: killed" is what was asked for
	return nil
}

// cpu returns the processor time that the server has used, user and system.
func (s *server) cpu() (time.Duration, error) {
	stat, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(s.cmd.Process.Pid), "stat"))
	if err != nil {
		return 0, fmt.Errorf("read the server's CPU time: %w", err)
	}
	// The name in parentheses may hold spaces; utime and stime are the 12th and 13th
	// fields behind it, in clock ticks of 10 ms.
	_, rest, _ := bytes.Cut(stat, []byte(") "))
	fields := strings.Fields(string(rest))
	if len(fields) < 13 {
		return 0, errors.New("read the server's CPU time: /proc/<pid>/stat is too short")
	}
	user, err1 := strconv.Atoi(fields[11])
	system, err2 := strconv.Atoi(fields[12])
	if err := errors.Join(err1, err2); err != nil {
		return 0, fmt.Errorf("read the server's CPU time: %w", err)
	}
	return time.Duration(user+system) * 10 * time.Millisecond, nil
}

// memory is what a server holds.
type memory struct {
	resident float64 // bytes in RAM, as the kernel counts
	heap     float64 // bytes of live objects and of stacks, after a collection
}

// memory forces a collection and measures. It takes two to empty the pools.
func (s *server) memory(ctx context.Context) (memory, error) {
	var profile string
	for range 2 {
		var err error
		if profile, err = get(ctx, s.operator+"/debug/pprof/heap?gc=1&debug=1"); err != nil {
			return memory{}, fmt.Errorf("collect the server's garbage: %w", err)
		}
	}
	var m memory
	for line := range strings.Lines(profile) {
		name, value, ok := strings.Cut(strings.TrimPrefix(line, "# "), " = ")
		if !ok || name != "HeapAlloc" && name != "Stack" {
			continue
		}
		value, _, _ = strings.Cut(strings.TrimSpace(value), " ") // Stack = in use / system
		bytes, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return memory{}, fmt.Errorf("read the server's heap: %w", err)
		}
		m.heap += bytes
	}
	status, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(s.cmd.Process.Pid), "status"))
	if err != nil {
		return memory{}, fmt.Errorf("read the server's memory: %w", err)
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kib, err := strconv.ParseFloat(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 64)
			if err != nil {
				return memory{}, fmt.Errorf("read the server's memory: %w", err)
			}
			m.resident = kib * 1024
		}
	}
	if m.heap == 0 || m.resident == 0 {
		return memory{}, errors.New("the server's memory cannot be read")
	}
	return m, nil
}

// get returns the body of a 200, or an error.
func get(ctx context.Context, url string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return string(body), fmt.Errorf("GET %s: %s", req.URL.Path, resp.Status)
	}
	return string(body), nil
}

// tail keeps the last of what a server prints, to be shown when it fails.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

const tailBytes = 4 << 10

// Write implements io.Writer; it is called by several goroutines.
func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	if len(t.buf) > tailBytes {
		t.buf = append([]byte(nil), t.buf[len(t.buf)-tailBytes:]...)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.buf)
}
