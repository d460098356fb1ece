package e2e

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// A process is one child process of the test that can be killed and started again
// with the same arguments. Its output is kept and shown only if the test fails.
type process struct {
	name string
	path string
	args []string
	env  []string
	// wants are the prefixes of the lines it prints when it listens; the rest of
	// such a line is the URL.
	wants []string

	cmd    *exec.Cmd
	exited chan struct{} // closed when the process has ended
	err    error         // how it ended; valid after exited
	log    *logBuffer

	mu   sync.Mutex
	urls map[string]string
}

// spawn starts children on one thread that never ends, because Pdeathsig is
// delivered when the thread that forked the child dies, not the process.
var spawn = sync.OnceValue(func() func(*exec.Cmd) error {
	type job struct {
		cmd  *exec.Cmd
		done chan error
	}
	jobs := make(chan job)
	go func() {
		runtime.LockOSThread()
		for j := range jobs {
			j.done <- j.cmd.Start()
		}
	}()
	return func(cmd *exec.Cmd) error {
		j := job{cmd, make(chan error)}
		jobs <- j
		return <-j.done
	}
})

// launch runs the process without waiting for it.
func (p *process) launch(t testing.TB) {
	t.Helper()
	if p.log == nil {
		p.log = newLogBuffer(t, p.name)
	}
	p.mu.Lock()
	p.urls = make(map[string]string)
	p.mu.Unlock()
	cmd := exec.Command(p.path, p.args...)
	cmd.Env = append(os.Environ(), p.env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stderr = p.log
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(p.log, "--- start %s %s\n", p.path, strings.Join(p.args, " "))
	if err := spawn()(cmd); err != nil {
		t.Fatalf("start %s: %v", p.name, err)
	}
	exited := make(chan struct{})
	p.cmd, p.exited = cmd, exited
	go func() {
		p.scan(out)
		p.err = cmd.Wait()
		fmt.Fprintf(p.log, "--- ended: %v\n", p.err)
		close(exited)
	}()
}

// scan keeps the output and picks the URLs out of it.
func (p *process) scan(out io.Reader) {
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		line := lines.Text()
		fmt.Fprintln(p.log, line)
		for _, want := range p.wants {
			if rest, ok := strings.CutPrefix(strings.TrimSpace(line), want+" "); ok {
				url, _, _ := strings.Cut(rest, " ")
				p.mu.Lock()
				p.urls[want] = url
				p.mu.Unlock()
			}
		}
	}
}

func (p *process) url(want string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.urls[want]
}

func (p *process) waitListening(t testing.TB) {
	t.Helper()
	eventually(t, startDeadline, func() error {
		select {
		case <-p.exited:
			t.Fatalf("%s ended while starting: %v", p.name, p.err)
		default:
		}
		for _, want := range p.wants {
			if p.url(want) == "" {
				return fmt.Errorf("%s has not printed %q", p.name, want)
			}
		}
		return nil
	})
}

// kill ends the process with SIGKILL and waits until it is gone.
func (p *process) kill() {
	if p.cmd == nil {
		return
	}
	p.cmd.Process.Kill() // an error means that it is gone already
	<-p.exited
}

// terminate asks the process to end, and returns how long it took and whether it
// ended with exit code 0.
func (p *process) terminate(t testing.TB, sig os.Signal) time.Duration {
	t.Helper()
	began := time.Now()
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Fatalf("signal %s: %v", p.name, err)
	}
	select {
	case <-p.exited:
	case <-time.After(startDeadline):
		p.cmd.Process.Signal(syscall.SIGQUIT) // its goroutines go into the log
		<-p.exited
		t.Fatalf("%s did not end after %v", p.name, sig)
	}
	if p.err != nil {
		t.Errorf("%s ended with %v after %v; want exit code 0", p.name, p.err, sig)
	}
	return time.Since(began)
}

// logBuffer keeps the end of what a process prints.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

const keepLog = 256 << 10

func newLogBuffer(t testing.TB, name string) *logBuffer {
	t.Helper()
	l := new(logBuffer)
	t.Cleanup(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if t.Failed() {
			t.Logf("output of %s:\n%s", name, l.buf.Bytes())
		}
		if i := bytes.Index(l.buf.Bytes(), []byte("WARNING: DATA RACE")); i >= 0 {
			t.Errorf("%s has a data race:\n%s", name, l.buf.Bytes()[i:])
		}
	})
	return l
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.buf.Write(p)
	if over := l.buf.Len() - keepLog; over > 0 {
		l.buf.Next(over)
	}
	return len(p), nil
}

// freeAddress returns an address of this host that nothing listens on. Services
// get fixed ones, because they must be found again after a restart. The system gives
// connections and listeners without a port one above 32767, also while a service is
// down; so ours is below.
func freeAddress(t testing.TB) string {
	t.Helper()
	var err error
	for range 100 {
		var l net.Listener
		if l, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 10_000+rand.IntN(20_000))); err == nil {
			defer l.Close()
			return l.Addr().String()
		}
	}
	t.Fatal(err)
	return ""
}

const (
	// Both are generous: binaries with the race detector, on a loaded machine.
	startDeadline = 2 * time.Minute
	deadline      = time.Minute
)

// eventually looks again and again until ok returns nil, and fails the test with
// its last error when the time is over.
func eventually(t testing.TB, within time.Duration, ok func() error) {
	t.Helper()
	end := time.Now().Add(within)
	for {
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("not within %v: %v", within, err)
		}
		time.Sleep(2 * time.Millisecond) // between two looks, not for anything to happen
	}
}
