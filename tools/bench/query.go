package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/msgval"
	"github.com/topgun-sync/topgun/core/wire"
)

const (
	// queriesPerSession is below the server's bound of one session.
	queriesPerSession = 250
	queryBatch        = 10
	queryFlight       = 4 // batches whose updates have not all arrived
)

// owned is a record of an owner, {owner: …, n: …}, as msgpack.
func owned(owner string, n uint64) []byte {
	v := append([]byte{0x82}, msgval.AppendString(nil, "owner")...)
	v = append(v, msgval.AppendString(nil, owner)...)
	v = append(v, msgval.AppendString(nil, "n")...)
	return msgval.AppendUint(v, n)
}

// mine is the query {where: {owner: …}}, as msgpack.
func mine(owner string) []byte {
	q := append([]byte{0x81}, msgval.AppendString(nil, "where")...)
	q = append(q, 0x81)
	q = append(q, msgval.AppendString(nil, "owner")...)
	return append(q, msgval.AppendString(nil, owner)...)
}

func ownerOf(i int) string { return "owner-" + strconv.Itoa(i) }

// distinctQueries measures what a change costs while so many different queries of
// the form owner = X are watched, each by one session: one of them matches.
func distinctQueries(queries int) scenario {
	name := fmt.Sprintf("%d distinct queries, memory", queries)
	return scenario{name, func(ctx context.Context, b *bench) error {
		sessions := (queries + queriesPerSession - 1) / queriesPerSession
		return b.queries(ctx, name, sessions, func(session int) (owners []string) {
			for q := session; q < queries; q += sessions {
				owners = append(owners, ownerOf(q))
			}
			return owners
		}, queries, 1)
	}}
}

// equalQueries measures deliveries to so many sessions that watch the same query.
func equalQueries(sessions int) scenario {
	name := fmt.Sprintf("%d subscribers of one query, memory", sessions)
	return scenario{name, func(ctx context.Context, b *bench) error {
		return b.queries(ctx, name, sessions, func(int) []string { return []string{ownerOf(0)} }, 1, sessions)
	}}
}

// queries measures writes to the updates of live queries. owners says what a session
// watches; every change is delivered to so many sessions.
func (b *bench) queries(ctx context.Context, name string, sessions int, owners func(session int) []string, owning, deliveries int) (err error) {
	s, err := b.fresh(ctx, "memory")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.kill()) }()
	var wg sync.WaitGroup
	defer wg.Wait() // after an error too: the connections are closed by then
	w, err := newWriter(ctx, s.url, recordsMap, keysPerWriter)
	if err != nil {
		return err
	}
	defer w.conn.Close()

	empty, err := s.memory(ctx)
	if err != nil {
		return err
	}
	began := time.Now()
	conns := make([]*conn, sessions)
	watched := 0
	for i := range conns {
		if conns[i], err = dial(ctx, s.url); err != nil {
			return err
		}
		defer conns[i].Close()
		mineOf := owners(i)
		watched += len(mineOf)
		if err := subscribe(conns[i], mineOf); err != nil {
			return err
		}
	}
	subscribed := time.Since(began)
	full, err := s.memory(ctx)
	if err != nil {
		return err
	}

	var got atomic.Int64
	var ending atomic.Bool
	progress := make(chan struct{}, 1)
	failures := make([]error, len(conns))
	for i, c := range conns {
		wg.Go(func() { failures[i] = countUpdates(c, &got, &ending, progress) })
	}
	// Every record has one owner for ever, so that a change is one update and the
	// result of each query stays small.
	send := func(size int) error {
		ops := make([]wire.Op, size)
		for i := range ops {
			n := rand.IntN(max(owning, keysPerWriter))
			record := lwwmap.Record{Value: owned(ownerOf(n%owning), w.next), Timestamp: w.clock.Now()}
			ops[i] = wire.Op{
				ID: strconv.FormatUint(w.next, 10), MapName: recordsMap, Key: "record-" + strconv.Itoa(n), Kind: wire.OpPut, Record: record,
			}
			w.next++
		}
		if err := w.conn.send(&wire.OpBatch{Ops: ops}); err != nil {
			return err
		}
		return w.await(w.next - 1)
	}
	before, err := s.cpu()
	if err != nil {
		return err
	}
	var latencies []float64
	var sent []time.Time
	done := 0
	perBatch := queryBatch * deliveries
	start := time.Now()
	for time.Since(start) < b.duration || done < len(sent) {
		if time.Since(start) < b.duration && len(sent)-done < queryFlight {
			sent = append(sent, time.Now())
			if err := send(queryBatch); err != nil {
				return err
			}
			continue
		}
		select {
		case <-progress:
		case <-time.After(answerTimeout):
			return fmt.Errorf("%d updates came; want %d", got.Load(), len(sent)*perBatch)
		}
		now, have := time.Now(), int(got.Load())
		for ; done < len(sent) && have >= (done+1)*perBatch; done++ {
			latencies = append(latencies, now.Sub(sent[done]).Seconds()*1000)
		}
	}
	took := time.Since(start)
	after, err := s.cpu()
	if err != nil {
		return err
	}
	if want := int64(len(sent) * perBatch); got.Load() != want {
		return fmt.Errorf("%d updates came; want %d", got.Load(), want)
	}
	ending.Store(true)
	for _, c := range conns {
		if err := c.send(wire.PingAt(1)); err != nil { // its answer ends the listener
			return err
		}
	}
	wg.Wait()
	if err := errors.Join(failures...); err != nil {
		return err
	}
	changes := float64(len(sent) * queryBatch)
	b.results.add(name, "subscribed", "queries/s", float64(watched)/subscribed.Seconds())
	b.results.add(name, "heap", "bytes/subscription", (full.heap-empty.heap)/float64(watched))
	b.results.add(name, "changes", "changes/s", changes/took.Seconds())
	b.results.add(name, "delivered", "updates/s", changes*float64(deliveries)/took.Seconds())
	b.results.add(name, "batch to the last update, p50", "ms", quantile(latencies, 0.50))
	b.results.add(name, "server CPU", "µs/change", float64((after-before).Microseconds())/changes)
	return nil
}

// subscribe starts queries and waits for all their results.
func subscribe(c *conn, owners []string) error {
	for i, owner := range owners {
		if err := c.send(&wire.QuerySub{QueryID: strconv.Itoa(i), MapName: recordsMap, Query: mine(owner)}); err != nil {
			return err
		}
	}
	for range owners {
		for {
			m, err := c.receive()
			if err != nil {
				return err
			}
			if answer, ok := m.(*wire.QueryResp); ok {
				if answer.Error != "" {
					return errors.New("a query was refused: " + answer.Error)
				}
				break
			}
		}
	}
	return nil
}

// countUpdates counts the updates of live queries until it is told to end.
func countUpdates(c *conn, got *atomic.Int64, ending *atomic.Bool, progress chan<- struct{}) error {
	for {
		m, err := c.receive()
		if err != nil {
			return err
		}
		switch m.(type) {
		case *wire.QueryUpdate:
			got.Add(1)
			select {
			case progress <- struct{}{}:
			default: // the writer has been told already
			}
		case *wire.QueryResp:
			return errors.New("a result came anew: updates were lost, or the session was too slow")
		case *wire.Pong:
			if ending.Load() {
				return nil
			}
		}
	}
}
