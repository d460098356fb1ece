package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/topgun-sync/topgun/core/wire"
)

// exchange measures a request and its answer, over and over on every connection.
// once makes the n-th of them.
func exchange(what, store string, once func(c *conn, connection int, n uint64) error, check func(ctx context.Context, url string, rounds []uint64) error) scenario {
	name := fmt.Sprintf("%s, %s", what, store)
	return scenario{name, func(ctx context.Context, b *bench) (err error) {
		s, err := b.fresh(ctx, store)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, s.kill()) }()
		conns := make([]*conn, b.connections)
		for i := range conns {
			if conns[i], err = dial(ctx, s.url); err != nil {
				return err
			}
			defer conns[i].Close()
		}
		var wg sync.WaitGroup
		rounds := make([]uint64, len(conns))
		failures := make([]error, len(conns))
		latencies := make([][]float64, len(conns))
		before, err := s.cpu()
		if err != nil {
			return err
		}
		start := time.Now()
		for i, c := range conns {
			wg.Go(func() {
				for time.Since(start) < b.duration && failures[i] == nil {
					began := time.Now()
					rounds[i]++
					failures[i] = once(c, i, rounds[i])
					latencies[i] = append(latencies[i], time.Since(began).Seconds()*1000)
				}
			})
		}
		wg.Wait()
		took := time.Since(start)
		after, err := s.cpu()
		if err := errors.Join(errors.Join(failures...), err); err != nil {
			return err
		}
		if err := check(ctx, s.url, rounds); err != nil {
			return err
		}
		var all []float64
		for i := range latencies {
			all = append(all, latencies[i]...)
		}
		b.results.add(name, "done", "1/s", float64(len(all))/took.Seconds())
		b.results.add(name, "p50", "ms", quantile(all, 0.50))
		b.results.add(name, "p99", "ms", quantile(all, 0.99))
		b.results.add(name, "server CPU", "µs each", float64((after-before).Microseconds())/float64(len(all)))
		return nil
	}}
}

func counterName(connection int) string { return "counter-" + strconv.Itoa(connection) }

// counterScenario measures increments of a counter of each connection, from the new
// state to the update that shows it.
func counterScenario(store string) scenario {
	once := func(c *conn, connection int, n uint64) error {
		name := counterName(connection)
		state := wire.CounterState{Nodes: []wire.CounterNode{{NodeID: name, Positive: n}}}
		if err := c.send(&wire.CounterSync{Name: name, State: state}); err != nil {
			return err
		}
		for {
			m, err := c.receive()
			if err != nil {
				return err
			}
			if update, ok := m.(*wire.CounterUpdate); ok && update.Name == name && total(update.State) >= n {
				return nil
			}
		}
	}
	return exchange("counter increments", store, once, func(ctx context.Context, url string, rounds []uint64) error {
		c, err := dial(ctx, url)
		if err != nil {
			return err
		}
		defer c.Close()
		for i, want := range rounds {
			if err := c.send(&wire.CounterRequest{Name: counterName(i)}); err != nil {
				return err
			}
			for {
				m, err := c.receive()
				if err != nil {
					return err
				}
				if answer, ok := m.(*wire.CounterResponse); ok {
					if got := total(answer.State); got != want {
						return fmt.Errorf("%s is %d; want %d", answer.Name, got, want)
					}
					break
				}
			}
		}
		return nil
	})
}

func total(s wire.CounterState) (sum uint64) {
	for _, n := range s.Nodes {
		sum += n.Positive - n.Negative
	}
	return sum
}

// lockScenario measures the taking and giving back of a lock: each connection's own,
// or one for all.
func lockScenario(store string, contended bool) scenario {
	what := "lock and unlock"
	if contended {
		what += ", one lock for all"
	}
	var mu sync.Mutex
	var last map[string]uint64 // by lock; of the repetition
	once := func(c *conn, connection int, n uint64) error {
		name := "lock-" + strconv.Itoa(connection)
		if contended {
			name = "lock"
		}
		if err := c.send(&wire.LockRequest{RequestID: strconv.FormatUint(n, 10), Name: name, TTLMillis: 60_000}); err != nil {
			return err
		}
		granted, err := answerTo[*wire.LockGranted](c)
		if err != nil {
			return err
		}
		mu.Lock()
		if n == 1 && last == nil {
			last = make(map[string]uint64)
		}
		ok := granted.FencingToken > last[name]
		last[name] = granted.FencingToken
		mu.Unlock()
		if !ok {
			return errors.New("a fencing token did not rise")
		}
		if err := c.send(&wire.LockRelease{RequestID: "r", Name: name, FencingToken: granted.FencingToken}); err != nil {
			return err
		}
		released, err := answerTo[*wire.LockReleased](c)
		if err == nil && !released.Success {
			err = errors.New("the holder could not release")
		}
		return err
	}
	return exchange(what, store, once, func(context.Context, string, []uint64) error {
		last = nil
		return nil
	})
}

// answerTo reads until a message of a type comes.
func answerTo[M wire.Message](c *conn) (M, error) {
	for {
		m, err := c.receive()
		if err != nil {
			var none M
			return none, err
		}
		if answer, ok := m.(M); ok {
			return answer, nil
		}
	}
}
