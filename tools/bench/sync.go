package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"
)

const (
	recordsMap = "records"
	// resyncRecords are the records that change while a client is away.
	resyncRecords = 10
)

// syncScenario measures a client that comes for the first time, one that comes
// back, and what a record costs in memory.
func syncScenario(ctx context.Context, b *bench) (err error) {
	s, err := b.fresh(ctx, "sqlite")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.kill()) }()
	empty, err := s.memory(ctx)
	if err != nil {
		return err
	}
	w, err := load(ctx, s.url, recordsMap, b.records)
	if err != nil {
		return fmt.Errorf("load %d records: %w", b.records, err)
	}
	defer w.conn.Close()
	// Meanwhile the log is drained into the store, which is not what is measured.
	time.Sleep(b.pause)
	full, err := s.memory(ctx)
	if err != nil {
		return err
	}
	n := float64(b.records)
	name := fmt.Sprintf("memory of %d records", b.records)
	b.results.add(name, "resident", "B/record", (full.resident-empty.resident)/n)
	b.results.add(name, "heap and stacks after a collection", "B/record", (full.heap-empty.heap)/n)

	client := newReplica(recordsMap)
	name = fmt.Sprintf("first sync of %d records", b.records)
	first, err := client.session(ctx, s)
	if err != nil {
		return err
	}
	if err := client.check(w.acked); err != nil {
		return err
	}
	b.results.add(name, "time", "s", first.took.Seconds())
	b.results.add(name, "received", "B/record", float64(first.bytes)/n)
	b.results.add(name, "requests", "frames", float64(first.requests))
	b.results.add(name, "server CPU", "µs/record", first.cpu.Seconds()*1e6/n)

	time.Sleep(b.pause)
	last, err := w.send(resyncRecords)
	if err != nil {
		return err
	}
	if err := w.await(last); err != nil {
		return err
	}
	again, err := client.session(ctx, s)
	if err != nil {
		return err
	}
	if err := client.check(w.acked); err != nil {
		return err
	}
	name = fmt.Sprintf("re-sync of %d of %d records", resyncRecords, b.records)
	b.results.add(name, "time", "ms", again.took.Seconds()*1000)
	b.results.add(name, "received", "B", float64(again.bytes))
	b.results.add(name, "requests", "frames", float64(again.requests))
	b.results.add(name, "round trips", "", float64(again.roundTrips))
	return nil
}

// sessionCost is the cost of a sync and of the server's part in it.
type sessionCost struct {
	cost
	cpu time.Duration
}

// session connects, syncs, and goes away again.
func (r *replica) session(ctx context.Context, s *server) (spent sessionCost, err error) {
	c, err := dial(ctx, s.url)
	if err != nil {
		return spent, err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	before, err := s.cpu()
	if err != nil {
		return spent, err
	}
	if spent.cost, err = r.sync(c); err != nil {
		return spent, err
	}
	after, err := s.cpu()
	spent.cpu = after - before
	return spent, err
}

// idleScenario measures what a connection costs that says hello, opens one map,
// and is silent.
func idleScenario(ctx context.Context, b *bench) (err error) {
	s, err := b.fresh(ctx, "memory")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.kill()) }()
	before, err := s.memory(ctx)
	if err != nil {
		return err
	}
	for range b.idle {
		c, err := dial(ctx, s.url)
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := newReplica(recordsMap).sync(c); err != nil {
			return err
		}
	}
	after, err := s.memory(ctx)
	if err != nil {
		return err
	}
	name := fmt.Sprintf("memory of %d idle connections", b.idle)
	b.results.add(name, "resident", "KiB/connection", (after.resident-before.resident)/float64(b.idle)/1024)
	b.results.add(name, "heap and stacks after a collection", "KiB/connection", (after.heap-before.heap)/float64(b.idle)/1024)
	return nil
}

// restartScenario kills a durable server right after the last acknowledgement and
// measures until a new one serves all that was acknowledged.
func restartScenario(ctx context.Context, b *bench) (err error) {
	dir, err := os.MkdirTemp(b.tmp, "restart-")
	if err != nil {
		return fmt.Errorf("make a folder for the data: %w", err)
	}
	s, err := b.start(ctx, dir, "sqlite")
	if err != nil {
		return err
	}
	if err := s.ready(ctx); err != nil {
		return errors.Join(err, s.kill())
	}
	began := time.Now()
	w, err := load(ctx, s.url, recordsMap, b.records)
	took := time.Since(began)
	if err := errors.Join(err, s.kill()); err != nil {
		return err
	}
	defer w.conn.Close()

	if s, err = b.start(ctx, dir, "sqlite"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.kill()) }()
	if err := s.ready(ctx); err != nil {
		return err
	}
	ready := time.Since(s.started)
	if err := verify(ctx, s.url, w.acked); err != nil {
		return err
	}
	name := fmt.Sprintf("kill -9 and restart with %d records", b.records)
	b.results.add(name, "load, acked durable", "ops/s", float64(b.records)/took.Seconds())
	b.results.add(name, "from start to ready", "s", ready.Seconds())
	b.results.add(name, "from start to all records at a client", "s", time.Since(s.started).Seconds())
	return nil
}
