package run_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/topgun-sync/topgun/services/internal/run"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// journal is what happened, in order.
type journal struct {
	mu    sync.Mutex
	lines []string
}

func (j *journal) add(line string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = append(j.lines, line)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return strings.Join(j.lines, " ")
}

// actor runs until it is stopped, gets ready after a second, and takes a second to
// stop.
func actor(j *journal, name string) run.Actor {
	var begun atomic.Pointer[time.Time]
	return run.Actor{
		Name: name,
		Run: func(ctx context.Context) error {
			j.add("+" + name)
			now := time.Now()
			begun.Store(&now)
			<-ctx.Done()
			time.Sleep(time.Second)
			j.add("-" + name)
			return nil
		},
		Ready: func() error {
			if since := begun.Load(); since == nil || time.Since(*since) < time.Second {
				return errors.New("starting")
			}
			return nil
		},
	}
}

func TestOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := &journal{}
		g := &run.Group{StopTimeout: 20 * time.Second}
		for _, name := range []string{"a", "b", "c"} {
			g.Add(actor(j, name))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		begun := time.Now()
		if err := g.Run(ctx); err != nil {
			t.Error(err)
		}
		if got := j.String(); got != "+a +b +c -c -b -a" {
			t.Errorf("got %s", got)
		}
		if took := time.Since(begun); took != time.Hour+3*time.Second {
			t.Errorf("took %s: not one after the other", took)
		}
	})
}

func TestFirstErrorWins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := &journal{}
		g := &run.Group{StopTimeout: 20 * time.Second}
		first := errors.New("disk on fire")
		g.Add(actor(j, "a"))
		g.Add(run.Actor{Name: "b", Run: func(ctx context.Context) error {
			<-ctx.Done()
			return errors.New("and then this")
		}})
		g.Add(run.Actor{Name: "c", Run: func(context.Context) error {
			time.Sleep(time.Minute)
			return first
		}})
		err := g.Run(t.Context())
		if !errors.Is(err, first) || err.Error() != "c: disk on fire" {
			t.Errorf("got %v", err)
		}
		if got := j.String(); got != "+a -a" {
			t.Errorf("got %s", got)
		}
	})
}

func TestActorThatReturnsEndsTheGroup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := &journal{}
		g := &run.Group{StopTimeout: 20 * time.Second}
		g.Add(actor(j, "a"))
		g.Add(run.Actor{Name: "b", Run: func(context.Context) error { return nil }})
		if err := g.Run(t.Context()); err != nil {
			t.Error(err)
		}
		if got := j.String(); got != "+a -a" {
			t.Errorf("got %s", got)
		}
	})
}

// An actor that fails while it starts: those after it never start.
func TestFailingStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := &journal{}
		g := &run.Group{StopTimeout: 20 * time.Second}
		g.Add(actor(j, "a"))
		g.Add(run.Actor{
			Name:  "b",
			Run:   func(context.Context) error { return errors.New("port taken") },
			Ready: func() error { return errors.New("not listening") },
		})
		g.Add(actor(j, "c"))
		if err := g.Run(t.Context()); err == nil || err.Error() != "b: port taken" {
			t.Errorf("got %v", err)
		}
		if got := j.String(); got != "+a -a" {
			t.Errorf("got %s", got)
		}
	})
}

func TestStopWhileStarting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := &journal{}
		g := &run.Group{StopTimeout: 20 * time.Second}
		g.Add(actor(j, "a"))
		g.Add(actor(j, "b"))
		ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
		defer cancel()
		if err := g.Run(ctx); err != nil {
			t.Error(err)
		}
		if got := j.String(); got != "+a +b -b -a" {
			t.Errorf("got %s", got)
		}
	})
}

// UPG-01: stopping is bounded. The actors that are left are told to stop all the
// same, and named.
func TestStopTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := &journal{}
		release := make(chan struct{})
		g := &run.Group{StopTimeout: 20 * time.Second}
		g.Add(actor(j, "a"))
		g.Add(run.Actor{Name: "stuck", Run: func(context.Context) error {
			<-release
			return nil
		}})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		begun := time.Now()
		err := g.Run(ctx)
		if took := time.Since(begun); took != time.Minute+20*time.Second {
			t.Errorf("took %s", took)
		}
		if err == nil || !strings.Contains(err.Error(), "did not stop within 20s: stuck, a") {
			t.Errorf("got %v", err)
		}
		close(release)
		time.Sleep(time.Minute)
		if got := j.String(); got != "+a -a" {
			t.Errorf("got %s: the actor below the stuck one was not stopped", got)
		}
	})
}
