// Package run starts the parts of a process in order and stops them in reverse.
//
// It owns the order and the bound on stopping, nothing else: a part owns its own
// goroutines and returns from its Run when they ended. Signals belong to main, which
// passes a context that ends with them.
package run

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"
)

// Actor is one part of a process.
type Actor struct {
	// Name for logs and errors.
	Name string
	// Run does the part's work until ctx ends, and returns when every goroutine of
	// the part ended. An actor that returns earlier, with or without an error, ends
	// the group.
	Run func(ctx context.Context) error
	// Ready is asked until it returns nil; then the next actor starts. Nil means
	// ready at once. It must not block.
	Ready func() error
}

// Group runs actors. Fill in the fields and Add actors before Run.
type Group struct {
	// Logger gets a line for every start and stop; nil logs nothing.
	Logger *slog.Logger
	// StopTimeout bounds the stopping of all actors together. When it is over Run
	// returns although actors are left, and names them. It must be positive.
	StopTimeout time.Duration

	actors []Actor
}

// Add appends an actor. The order of calls is the order of starting.
func (g *Group) Add(actor Actor) { g.actors = append(g.actors, actor) }

const (
	// readyPoll is how often a starting actor is asked.
	readyPoll = 5 * time.Millisecond
	// readyComplaint is how often the log says what the start is waiting for.
	readyComplaint = 10 * time.Second
)

type started struct {
	name   string
	cancel context.CancelFunc
	done   chan struct{}
}

type ended struct {
	name string
	err  error
}

// Run starts the actors, each after the one before is ready, and waits until ctx
// ends or an actor returns. Then it stops them, the last one first, each fully
// before the next. It returns the first error of an actor, nil if there was none.
func (g *Group) Run(ctx context.Context) error {
	if g.Logger == nil {
		g.Logger = slog.New(slog.DiscardHandler)
	}
	// Actors outlive ctx: they end one after another, not all at once. WithoutCancel
	// keeps the values.
	base := context.WithoutCancel(ctx)
	results := make(chan ended, len(g.actors))
	var running []started
	var first error
	note := func(e ended) {
		if e.err != nil && first == nil {
			first = fmt.Errorf("%s: %w", e.name, e.err)
		}
	}

	stop := false
	for _, actor := range g.actors {
		actorCtx, cancel := context.WithCancel(base)
		s := started{name: actor.Name, cancel: cancel, done: make(chan struct{})}
		running = append(running, s)
		go func() {
			err := actor.Run(actorCtx)
			results <- ended{actor.Name, err}
			close(s.done)
		}()
		if e, ok := g.awaitReady(ctx, actor, results); !ok {
			if e != nil {
				note(*e)
			}
			stop = true
			break
		}
		g.Logger.Debug("started", "actor", actor.Name)
	}
	if !stop {
		select {
		case <-ctx.Done():
		case e := <-results:
			g.Logger.Info("actor ended, stopping the others", "actor", e.name)
			note(e)
		}
	}

	left := g.stopAll(running)
	for len(results) > 0 {
		note(<-results)
	}
	if len(left) > 0 {
		return errors.Join(first, fmt.Errorf("did not stop within %s: %s", g.StopTimeout, strings.Join(left, ", ")))
	}
	return first
}

// awaitReady waits until the actor is ready. It says false when the group has to
// stop instead, with the actor's end if that is the reason.
func (g *Group) awaitReady(ctx context.Context, actor Actor, results <-chan ended) (*ended, bool) {
	if actor.Ready == nil {
		return nil, ctx.Err() == nil
	}
	ticker := time.NewTicker(readyPoll)
	defer ticker.Stop()
	complained := time.Now()
	for {
		reason := actor.Ready()
		if reason == nil {
			return nil, true
		}
		if time.Since(complained) >= readyComplaint {
			complained = time.Now()
			g.Logger.Warn("waiting for an actor to get ready", "actor", actor.Name, "reason", reason)
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return nil, false
		case e := <-results:
			return &e, false
		}
	}
}

// stopAll stops actors in reverse order and returns the names of those that are
// still running when the time is over.
func (g *Group) stopAll(running []started) []string {
	deadline := time.NewTimer(g.StopTimeout)
	defer deadline.Stop()
	late := false
	for _, s := range slices.Backward(running) {
		s.cancel()
		if late {
			continue
		}
		select {
		case <-s.done:
			g.Logger.Debug("stopped", "actor", s.name)
		case <-deadline.C:
			late = true
		}
	}
	var left []string
	for _, s := range slices.Backward(running) {
		select {
		case <-s.done:
		default:
			left = append(left, s.name)
		}
	}
	return left
}
