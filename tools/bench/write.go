package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/wire"
)

const (
	valueBytes = 100
	// keysPerWriter bounds the records of a write measurement; a writer goes round
	// and round over its keys.
	keysPerWriter = 1000
	warmUp        = 300 * time.Millisecond
)

// writer is one client that writes into a map of its own, so that no write is
// also delivered to the other writers: that would measure fan-out.
type writer struct {
	conn  *conn
	clock *hlc.Clock
	acked *replica // what the server must hold once every batch is acknowledged
	keys  int
	next  uint64 // id of the next op
	level string // the weakest level that was answered
}

func newWriter(ctx context.Context, url, name string, keys int) (*writer, error) {
	c, err := dial(ctx, url)
	if err != nil {
		return nil, err
	}
	return &writer{conn: c, clock: hlc.NewClock(name, time.Now), acked: newReplica(name), keys: keys, next: 1}, nil
}

// send writes one batch and returns the id of its last op.
func (w *writer) send(size int) (last uint64, err error) {
	ops := make([]wire.Op, size)
	for i := range ops {
		id := strconv.FormatUint(w.next, 10)
		key := "record-" + strconv.FormatUint(w.next%uint64(w.keys), 10)
		record := lwwmap.Record{Value: value(key, id), Timestamp: w.clock.Now()}
		ops[i] = wire.Op{ID: id, MapName: w.acked.mapName, Key: key, Kind: wire.OpPut, Record: record}
		w.acked.merge(key, record.Timestamp, record.Value)
		w.next++
	}
	return w.next - 1, w.conn.send(&wire.OpBatch{Ops: ops})
}

// await waits for the acknowledgement of an op and all before it.
func (w *writer) await(last uint64) error {
	level, err := w.conn.awaitAck(last)
	if err != nil {
		return err
	}
	if w.level == "" || rank(level) < rank(w.level) {
		w.level = level
	}
	return nil
}

// rank orders the levels of PROTOCOL 10.7, the weakest first.
func rank(level string) int {
	switch level {
	case "MEMORY":
		return 1
	case "APPLIED":
		return 2
	case "REPLICATED":
		return 3
	case "PERSISTED":
		return 4
	}
	return 0
}

// value returns a msgpack string of valueBytes that names its key and its op.
func value(key, id string) []byte {
	v := make([]byte, 2, 2+valueBytes)
	v[0], v[1] = 0xd9, valueBytes // str 8
	v = append(append(append(v, key...), '#'), id...)
	for len(v) < cap(v) {
		v = append(v, '.')
	}
	return v
}

// writeScenario measures writes to acknowledgements: every connection has one
// batch in flight.
func writeScenario(store string, size int) scenario {
	name := fmt.Sprintf("write, %s, batches of %d", store, size)
	return scenario{name, func(ctx context.Context, b *bench) (err error) {
		s, err := b.fresh(ctx, store)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, s.kill()) }()
		writers := make([]*writer, b.connections)
		for i := range writers {
			if writers[i], err = newWriter(ctx, s.url, fmt.Sprintf("writer-%d", i), keysPerWriter); err != nil {
				return err
			}
			defer writers[i].conn.Close()
		}

		from := time.Now().Add(warmUp)
		to := from.Add(b.duration)
		latencies := make([][]float64, len(writers)) // ms of the batches within the window
		failures := make([]error, len(writers))
		var wg sync.WaitGroup
		for i, w := range writers {
			wg.Go(func() { latencies[i], failures[i] = w.loop(size, from, to) })
		}
		time.Sleep(time.Until(from))
		before, err := s.cpu()
		time.Sleep(time.Until(to))
		after, err2 := s.cpu()
		wg.Wait()
		if err := errors.Join(errors.Join(failures...), err, err2); err != nil {
			return err
		}

		var all []float64
		for i, w := range writers {
			all = append(all, latencies[i]...)
			if store == "sqlite" && rank(w.level) < rank("APPLIED") {
				return fmt.Errorf("an acknowledgement says %q; a durable server says APPLIED or more", w.level)
			}
			if err := verify(ctx, s.url, w.acked); err != nil {
				return err
			}
		}
		ops := float64(len(all) * size)
		if ops == 0 {
			return errors.New("nothing was acknowledged in time")
		}
		b.results.add(name, "acked", "ops/s", ops/b.duration.Seconds())
		b.results.add(name, "batch to ack, p50", "ms", quantile(all, 0.50))
		b.results.add(name, "batch to ack, p99", "ms", quantile(all, 0.99))
		b.results.add(name, "server CPU", "µs/op", float64((after-before).Microseconds())/ops)
		return nil
	}}
}

// loop writes until to, and returns the latencies of the batches that were sent
// after from and acknowledged before to.
func (w *writer) loop(size int, from, to time.Time) ([]float64, error) {
	var latencies []float64
	for {
		sent := time.Now()
		if sent.After(to) {
			return latencies, nil
		}
		last, err := w.send(size)
		if err != nil {
			return nil, err
		}
		if err := w.await(last); err != nil {
			return nil, err
		}
		if acked := time.Now(); sent.After(from) && acked.Before(to) {
			latencies = append(latencies, acked.Sub(sent).Seconds()*1000)
		}
	}
}

// load writes n records over one connection, a few batches in flight, and returns
// the writer, whose connection is still open.
func load(ctx context.Context, url, mapName string, n int) (*writer, error) {
	const batch, inFlight = 500, 8
	w, err := newWriter(ctx, url, mapName, n)
	if err != nil {
		return nil, err
	}
	var waiting []uint64
	for left := n; left > 0 || len(waiting) > 0; {
		if left > 0 && len(waiting) < inFlight {
			size := min(batch, left)
			last, err := w.send(size)
			if err != nil {
				return nil, errors.Join(err, w.conn.Close())
			}
			waiting = append(waiting, last)
			left -= size
			continue
		}
		if err := w.await(waiting[0]); err != nil {
			return nil, errors.Join(err, w.conn.Close())
		}
		waiting = waiting[1:]
	}
	return w, nil
}
