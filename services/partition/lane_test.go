package partition

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	metricnoop "go.opentelemetry.io/otel/metric/noop"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
	"golang.org/x/sync/semaphore"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/merkle"
	logv1 "github.com/topgun-sync/topgun/gen/go/topgun/log/v1"
	"github.com/topgun-sync/topgun/services/internal/commitlog"
)

// fakeWriter is a lane in memory whose appends take a millisecond.
type fakeWriter struct {
	mu      sync.Mutex
	commits []*logv1.Commit
	fail    func() error
	busy    bool
}

func (*fakeWriter) Name() string { return "lane" }

func (f *fakeWriter) Check(context.Context) error { return f.failure() }

func (f *fakeWriter) failure() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail == nil {
		return nil
	}
	return f.fail()
}

func (f *fakeWriter) Append(ctx context.Context, c *logv1.Commit) (uint64, error) {
	f.mu.Lock()
	if f.busy {
		panic("two appends in flight")
	}
	f.busy = true
	f.mu.Unlock()
	defer func() { f.mu.Lock(); f.busy = false; f.mu.Unlock() }()
	select {
	case <-time.After(time.Millisecond):
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	if err := f.failure(); err != nil {
		return 0, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.commits = append(f.commits, c)
	return uint64(len(f.commits)), nil
}

// bench is a shard with its lane, in a bubble.
type bench struct {
	writer *fakeWriter
	events *fakeEvents
	lane   *lane
	shard  *shard
	wall   *wallClock
	ended  chan error
	stop   func()
}

func newBench(t *testing.T) *bench {
	t.Helper()
	stats, err := newStats(metricnoop.NewMeterProvider().Meter(""))
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{writer: &fakeWriter{}, events: &fakeEvents{}, wall: &wallClock{}, ended: make(chan error, 1)}
	clock := new(arrivalClock)
	logger := slog.New(slog.DiscardHandler)
	b.lane = newLane(b.writer, 1, b.wall.now, tracenoop.NewTracerProvider().Tracer(""), semaphore.NewWeighted(1<<20), stats, logger)
	b.shard = newShard(0, clock, b.wall.now, stats)
	b.shard.lane = b.lane
	stop := make(chan struct{})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { b.shard.run(stop) })
	p := newPublisher(b.events, "lane", 1, b.wall.now, logger)
	wg.Go(func() { p.run(ctx, b.lane.published) })
	wg.Go(func() { b.ended <- b.lane.run(ctx) })
	b.stop = func() {
		close(stop)
		<-b.shard.exited
		b.lane.close()
		wg.Wait()
		cancel()
	}
	return b
}

// apply merges one record and returns the group, which may not be logged yet.
func (b *bench) apply(t *testing.T, key string, r lwwmap.Record) *group {
	t.Helper()
	g := &group{held: 1, ops: []op{{table: "m", key: []byte(key), hash: merkle.Hash(key), record: r}}}
	if !b.lane.room.TryAcquire(1) {
		t.Fatal("no room")
	}
	done, err := b.shard.submit(t.Context(), func() { b.shard.apply(g) })
	if err == nil {
		err = b.shard.await(t.Context(), done)
	}
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func record(value string, millis, ttl uint64) lwwmap.Record {
	return lwwmap.Record{Value: append([]byte{0xa0 | byte(len(value))}, value...), Timestamp: hlc.Timestamp{Millis: millis, NodeID: "a"}, TTLMillis: ttl}
}

func TestCRDT05_RecordsExpireInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		defer b.stop()
		start := wallMillis(time.Now())
		b.apply(t, "short", record("v", start, 1000))
		b.apply(t, "long", record("v", start, 120_000))
		b.apply(t, "renewed", record("v", start, 1000))
		b.apply(t, "renewed", record("w", start+1, 60_000))
		b.apply(t, "for ever", record("v", start, 0))
		b.apply(t, "deleted", record("v", start, 1000))
		b.apply(t, "deleted", lwwmap.Record{Timestamp: hlc.Timestamp{Millis: start + 1, NodeID: "a"}})
		tombstones := func() string {
			var got []string
			b.events.mu.Lock()
			defer b.events.mu.Unlock()
			for _, e := range b.events.events {
				for _, c := range e.GetChanges() {
					if c.GetRecord().GetTimestamp().GetNodeId() == "a-ttl" {
						got = append(got, fmt.Sprintf("%s@%d", c.GetKey(), c.GetArrival().GetMillis()-start))
					}
				}
			}
			return fmt.Sprint(got)
		}
		for _, step := range []struct {
			sleep time.Duration
			want  string
		}{
			{time.Second, "[]"}, // its last visible millisecond
			{5 * time.Millisecond, "[short@1001]"},
			{60 * time.Second, "[short@1001 renewed@60002]"},
			{60 * time.Second, "[short@1001 renewed@60002 long@120001]"},
		} {
			time.Sleep(step.sleep)
			synctest.Wait()
			if got := tombstones(); got != step.want {
				t.Errorf("after %v: %s, want %s", time.Since(time.UnixMilli(int64(start))), got, step.want)
			}
		}
	})
}

func TestGroupCommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		first := b.apply(t, "k0", record("v", 1, 0))
		synctest.Wait() // its append is in flight
		var waiting []*group
		for i := range 50 {
			waiting = append(waiting, b.apply(t, fmt.Sprint("k", i+1), record("v", 1, 0)))
		}
		if err := first.batch.wait(t.Context()); err != nil {
			t.Error(err)
		}
		for _, g := range waiting {
			if err := g.batch.wait(t.Context()); err != nil {
				t.Error(err)
			}
		}
		if n := len(b.writer.commits); n != 2 {
			t.Errorf("51 ops took %d commits, want 2", n)
		}
		b.stop()
		if !b.lane.room.TryAcquire(1 << 20) {
			t.Error("the room was not given back")
		}
	})
}

func TestLOG02_AFullLogKeepsTheBatchAndRefusesTheRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		full := true
		b.writer.fail = func() error {
			if full {
				return commitlog.ErrFull
			}
			return nil
		}
		stuck := b.apply(t, "k", record("v", 1, 0))
		time.Sleep(10 * time.Second)
		if refused := b.apply(t, "l", record("v", 1, 0)); !refused.overloaded || len(b.shard.tables[lww]["m"].records) != 1 {
			t.Error("an op was merged while the log was full")
		}
		b.writer.mu.Lock()
		full = false
		b.writer.mu.Unlock()
		if err := stuck.batch.wait(t.Context()); err != nil {
			t.Error(err)
		}
		taken := b.apply(t, "l", record("v", 1, 0))
		if err := taken.batch.wait(t.Context()); err != nil || taken.overloaded {
			t.Errorf("after the log had space: %v", err)
		}
		b.stop()
		if !b.lane.room.TryAcquire(1 << 20) {
			t.Error("the room was not given back")
		}
	})
}

func TestLOG01_AFencedLaneFailsEverybody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.writer.fail = func() error { return commitlog.ErrSealed }
		waiting := b.apply(t, "k", record("v", 1, 0))
		if err := waiting.batch.wait(t.Context()); !errors.Is(err, ErrFenced) {
			t.Errorf("the op in flight: %v", err)
		}
		late := b.apply(t, "l", record("v", 1, 0))
		if err := late.batch.wait(t.Context()); !errors.Is(err, ErrFenced) {
			t.Errorf("an op afterwards: %v", err)
		}
		if err := <-b.ended; !errors.Is(err, ErrFenced) {
			t.Errorf("the lane ended with %v", err)
		}
		b.ended <- nil
		b.stop()
		synctest.Wait()
		if len(b.events.events) != 0 {
			t.Error("an event of a commit that was refused")
		}
		if !b.lane.room.TryAcquire(1 << 20) {
			t.Error("the room was not given back")
		}
	})
}

func TestFAN01_HeartbeatsNameWhatChangedWithinAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		defer b.stop()
		// last is what the newest heartbeat says.
		last := func() string {
			b.events.mu.Lock()
			defer b.events.mu.Unlock()
			beat := b.events.beats[len(b.events.beats)-1]
			said := beat.GetLane()
			for _, at := range beat.GetMaps() {
				said += fmt.Sprint(" ", at.GetMap(), at.GetSequence())
			}
			return said
		}
		expect := func(when, want string) {
			t.Helper()
			if got := last(); got != want {
				t.Errorf("%s: the last heartbeat is %q, want %q", when, got, want)
			}
		}
		lane := b.writer.Name()
		time.Sleep(5 * time.Second)
		expect("at rest", lane)
		b.apply(t, "k", record("v", 1, 0))
		time.Sleep(time.Second)
		b.apply(t, "k", record("v", 2, 0))
		time.Sleep(1500 * time.Millisecond)
		expect("after two changes", lane+" m2")
		time.Sleep(55 * time.Second)
		expect("within the minute", lane+" m2")
		time.Sleep(5 * time.Second)
		expect("after the minute", lane)
	})
}

// The ceiling never goes back, and lies at or above what the commit holds.
func TestCLK01_CeilingsCoverTheirCommits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		for i, offset := range []time.Duration{0, time.Hour, -time.Hour, 0, 2 * time.Hour} {
			b.wall.set(offset)
			if err := b.apply(t, "k", record("v", uint64(i+1), 0)).batch.wait(t.Context()); err != nil {
				t.Error(err)
			}
		}
		b.stop()
		var before arrival
		for _, c := range b.writer.commits {
			ceiling := arrivalFromProto(c.GetClockCeiling())
			if ceiling.compare(before) < 0 {
				t.Errorf("the ceiling went from %v to %v", before, ceiling)
			}
			before = ceiling
			for _, s := range c.GetChanges().GetShards() {
				for _, change := range s.GetChanges() {
					if at := arrivalFromProto(change.GetArrival()); at.compare(ceiling) > 0 {
						t.Errorf("the arrival %v is above the ceiling %v of its commit", at, ceiling)
					}
				}
			}
		}
	})
}

func TestWaitingForRoomEndsWithTheContext(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	if !n.room.TryAcquire(n.config.MaxPendingBytes) {
		t.Fatal("the room is in use")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := n.tryApply(ctx, put("k", "v", 1, "a")); err == nil || err.Error() != "refused: REFUSAL_OVERLOADED" {
		t.Errorf("apply without room: %v", err)
	}
	n.room.Release(n.config.MaxPendingBytes)
	n.apply(put("k", "v", 1, "a"))
}
