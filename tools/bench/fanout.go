package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/topgun-sync/topgun/core/wire"
)

const (
	subscribers  = 100
	fanoutBatch  = 10
	fanoutFlight = 4 // batches that are on their way to subscribers at once
)

// subscriber is a client that has a map open and merges what it is told.
type subscriber struct {
	conn *conn
	seen *replica
	got  atomic.Int64 // events so far
}

// fanoutScenario measures a write's way to everybody who has the map open. The
// writer goes on only when all have what was written a few batches ago, so that it
// measures delivery and not the shedding of load.
func fanoutScenario(ctx context.Context, b *bench) (err error) {
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
	subs := make([]*subscriber, subscribers)
	for i := range subs {
		c, err := dial(ctx, s.url)
		if err != nil {
			return err
		}
		defer c.Close()
		subs[i] = &subscriber{conn: c, seen: newReplica(recordsMap)}
		if _, err := subs[i].seen.sync(c); err != nil {
			return err
		}
	}

	var (
		failures = make([]error, len(subs))
		progress = make(chan struct{}, 1)
		total    atomic.Int64 // events that each subscriber waits for; 0: not known yet
	)
	for i, sub := range subs {
		wg.Go(func() {
			failures[i] = sub.listen(&total, func() {
				select {
				case progress <- struct{}{}:
				default: // the writer has been told already
				}
			})
		})
	}

	// least is how many events the subscriber has that has fewest.
	least := func() int {
		n := subs[0].got.Load()
		for _, sub := range subs[1:] {
			n = min(n, sub.got.Load())
		}
		return int(n)
	}
	before, err := s.cpu()
	if err != nil {
		return err
	}
	start := time.Now()
	var (
		latencies []float64
		sent      []time.Time // by batch
		done      int         // batches that everybody has
	)
	for time.Since(start) < b.duration || done < len(sent) {
		if time.Since(start) < b.duration && len(sent)-done < fanoutFlight {
			sent = append(sent, time.Now())
			last, err := w.send(fanoutBatch)
			if err != nil {
				return err
			}
			if err := w.await(last); err != nil {
				return err
			}
			continue
		}
		select {
		case <-progress:
		case <-time.After(answerTimeout):
			return fmt.Errorf("a subscriber got %d events of %d", least(), len(sent)*fanoutBatch)
		}
		now, have := time.Now(), least()
		for ; done < len(sent) && have >= (done+1)*fanoutBatch; done++ {
			latencies = append(latencies, now.Sub(sent[done]).Seconds()*1000)
		}
	}
	took := time.Since(start)
	after, err := s.cpu()
	if err != nil {
		return err
	}
	events := float64(len(sent) * fanoutBatch * subscribers)
	// One more op, so that every subscriber wakes up and ends.
	total.Store(int64(len(sent)*fanoutBatch) + 1)
	last, err := w.send(1)
	if err != nil {
		return err
	}
	if err := w.await(last); err != nil {
		return err
	}
	wg.Wait()
	if err := errors.Join(failures...); err != nil {
		return err
	}
	for _, sub := range subs {
		if err := sub.seen.check(w.acked); err != nil {
			return err
		}
	}
	name := fmt.Sprintf("fan-out to %d, memory, batches of %d", subscribers, fanoutBatch)
	b.results.add(name, "delivered", "events/s", events/took.Seconds())
	b.results.add(name, "batch to the last subscriber, p50", "ms", quantile(latencies, 0.50))
	b.results.add(name, "batch to the last subscriber, p99", "ms", quantile(latencies, 0.99))
	b.results.add(name, "server CPU", "µs/event", float64((after-before).Microseconds())/events)
	return nil
}

// listen merges events until there were total of them, and calls arrived after each
// frame.
func (s *subscriber) listen(total *atomic.Int64, arrived func()) error {
	for {
		if want := total.Load(); want > 0 && s.got.Load() >= want {
			return nil
		}
		m, err := s.conn.receive()
		if err != nil {
			return err
		}
		var events []wire.Event
		switch m := m.(type) {
		case *wire.ServerEvent:
			events = []wire.Event{m.Event}
		case *wire.ServerBatchEvent:
			events = m.Events
		case *wire.SyncRespRoot:
			return errors.New("a subscriber was told to compare roots: it lost events, or was too slow")
		default:
			continue
		}
		for _, e := range events {
			s.seen.merge(e.Key, e.Record.Timestamp, e.Record.Value)
		}
		s.got.Add(int64(len(events)))
		arrived()
	}
}
