package gateway

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/topgun-sync/topgun/core/wire"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
)

func persisted(ops ...wire.Op) *wire.OpBatch {
	return &wire.OpBatch{Ops: ops, WriteConcern: levelPersisted}
}

// PERSISTED is answered when the store has what the op changed, and not before; acks of a
// session keep their order.
func TestPersistedWaitsForTheStore(t *testing.T) {
	b := setup(t, nil, nil)
	p, other := b.hello(t), b.hello(t)
	p.send(persisted(putOp("1", "m", "k", "v", stamp(1))))
	eventually(t, func() bool { return b.persistence.streams("FollowWatermarks") == 1 })
	p.send(&wire.OpBatch{Ops: []wire.Op{putOp("2", "m", "l", "v", stamp(1))}})
	eventually(t, func() bool { return b.partition.called("Apply") == 2 })
	p.ping() // and no ack
	b.persistence.storedTo("lane-2", 100)
	p.ping()
	other.send(&wire.OpBatch{Ops: []wire.Op{putOp("1", "m", "o", "v", stamp(1))}})
	expect[*wire.OpAck](other) // others do not wait
	b.persistence.storedTo("lane-1", 1)
	for _, want := range []wire.OpAck{{LastID: "1", AchievedLevel: "PERSISTED"}, {LastID: "2", AchievedLevel: "APPLIED"}} {
		for {
			m, ok := p.recv().(*wire.OpAck)
			if !ok {
				continue // the root that the first op brings
			}
			if m.LastID != want.LastID || m.AchievedLevel != want.AchievedLevel || len(m.Results) > 0 && !m.Results[0].Success {
				t.Errorf("ack %+v, want %+v", m, want)
			}
			break
		}
	}
	// The stream is open still, and what the store has needs no wait.
	b.persistence.storedTo("lane-1", 50)
	p.send(persisted(putOp("3", "m", "n", "v", stamp(1))))
	for {
		if m, ok := p.recv().(*wire.OpAck); ok {
			if m.AchievedLevel != "PERSISTED" {
				t.Errorf("%+v", m)
			}
			break
		}
	}
	if n := b.persistence.streams("FollowWatermarks"); n != 1 {
		t.Errorf("%d streams", n)
	}
}

// ACK-03, ACK-05: what is applied and not stored in time is covered, and not called a
// success.
func TestPersistedNotInTime(t *testing.T) {
	b := setup(t, nil, nil)
	p := b.hello(t)
	p.synced("m", 0)
	batch := persisted(putOp("1", "m", "k", "v", stamp(1)))
	second := putOp("2", "m", "l", "v", stamp(1))
	second.WriteConcern = "APPLIED"
	batch.Ops = append(batch.Ops, second)
	batch.TimeoutMillis = 30
	p.send(batch)
	m := expect[*wire.OpAck](p)
	if m.LastID != "2" || m.AchievedLevel != "APPLIED" || len(m.Results) != 2 || m.Results[0].Success || m.Results[0].AchievedLevel != "APPLIED" ||
		!m.Results[1].Success {
		t.Errorf("%+v", m)
	}
	if b.partition.record("m", "k") == nil {
		t.Error("the op was not applied")
	}
}

// A level above what the log gives is refused before anything is applied, for the op that
// asks for it alone.
func TestReplicatedRefused(t *testing.T) {
	for _, c := range []struct {
		level   partitionv1.Level
		refused bool
	}{
		{partitionv1.Level_LEVEL_MEMORY, true},
		{partitionv1.Level_LEVEL_APPLIED, true},
		{partitionv1.Level_LEVEL_REPLICATED, false},
	} {
		b := setup(t, nil, func(b *bench) { b.partition.level = c.level })
		p := b.hello(t)
		p.synced("m", 0)
		asks := putOp("2", "m", "asks", "v", stamp(1))
		asks.WriteConcern = "REPLICATED"
		p.send(&wire.OpBatch{Ops: []wire.Op{putOp("1", "m", "plain", "v", stamp(1)), asks}})
		if c.refused {
			if m := expect[*wire.OpRejected](p); m.OpID != "2" || m.Code != 501 || m.Reason != levelUnavailable.Error() {
				t.Errorf("%v: %+v", c.level, m)
			}
		}
		m := expect[*wire.OpAck](p)
		if m.LastID != "2" || m.AchievedLevel != levelName(c.level) || len(m.Results) != 2 || !m.Results[0].Success || m.Results[1].Success == c.refused {
			t.Errorf("%v: %+v", c.level, m)
		}
		if stored := b.partition.record("m", "asks") != nil; stored == c.refused {
			t.Errorf("%v: applied %v", c.level, stored)
		}
		if b.partition.record("m", "plain") == nil {
			t.Errorf("%v: the other op was not applied", c.level)
		}
	}
}

// A store that keeps nothing makes nothing PERSISTED, and nobody waits for it.
func TestMemoryStoreIsHonest(t *testing.T) {
	b := setup(t, nil, func(b *bench) {
		b.persistence.store = memoryStore
		b.persistence.stored["lane-1"] = 1000
		b.partition.level = partitionv1.Level_LEVEL_MEMORY
	})
	p := b.hello(t)
	p.synced("m", 0)
	for i := range 3 {
		begin := time.Now()
		p.send(persisted(putOp(fmt.Sprint(i+1), "m", fmt.Sprint("k", i), "v", stamp(1))))
		if m := expect[*wire.OpAck](p); m.AchievedLevel != "MEMORY" || len(m.Results) != 1 || m.Results[0].Success {
			t.Errorf("%+v", m)
		}
		if took := time.Since(begin); took > defaultConcern/2 {
			t.Errorf("after %v", took)
		}
	}
}

// What the owner found in the log when it started has no place there that it knows; the
// store is asked to take everything.
func TestPersistedOfAnOldDuplicate(t *testing.T) {
	b := setup(t, nil, func(b *bench) { b.partition.lane = "" })
	p := b.hello(t)
	p.synced("m", 0)
	p.send(persisted(putOp("1", "m", "k", "v", stamp(1))))
	if m := expect[*wire.OpAck](p); m.AchievedLevel != "PERSISTED" {
		t.Errorf("%+v", m)
	}
	if b.persistence.flushes != 1 {
		t.Errorf("%d flushes", b.persistence.flushes)
	}
}

// A session whose line is full does not wait for the store, or its PINGs would.
func TestFullLineHurriesTheStore(t *testing.T) {
	b := setup(t, func(c *Config) { c.MaxInFlight = 1; c.MaxMessageBytes = 8 << 10 }, nil)
	p := b.hello(t)
	p.synced("m", 0)
	const batches = 4
	for i := range batches {
		batch := persisted(putOp(fmt.Sprint(i+1), "m", fmt.Sprint("k", i), string(make([]byte, 5000)), stamp(1)))
		batch.TimeoutMillis = 1 << 40 // clamped to a minute
		p.send(batch)
	}
	for i := range batches - 1 {
		if m := expect[*wire.OpAck](p); m.LastID != fmt.Sprint(i+1) || m.Results[0].Success {
			t.Errorf("%+v", m)
		}
	}
	b.persistence.storedTo("lane-1", batches)
	if m := expect[*wire.OpAck](p); m.LastID != fmt.Sprint(batches) || m.AchievedLevel != "PERSISTED" {
		t.Errorf("%+v", m)
	}
}

// UPG-01: a gateway that stops does not wait for the store.
func TestStopHurriesTheStore(t *testing.T) {
	b := setup(t, func(c *Config) { c.DrainTimeout = patience }, nil)
	p := b.hello(t)
	p.synced("m", 0)
	p.send(persisted(putOp("1", "m", "k", "v", stamp(1))))
	eventually(t, func() bool { return b.persistence.streams("FollowWatermarks") == 1 })
	go b.stop()
	if m := expect[*wire.OpAck](p); m.LastID != "1" || m.Results[0].Success {
		t.Errorf("%+v", m)
	}
}

func TestPersistedOverHTTP(t *testing.T) {
	g := startGateway(t, nil, nil)
	op := putOp("1", "m", "k", "v", stamp(1))
	op.WriteConcern = levelPersisted
	g.persistence.storedTo("lane-1", 1)
	if m := g.sync(&wire.SyncRequest{Operations: []wire.Op{op}}).Ack; m == nil || m.LastID != "1" || len(m.Results) != 0 {
		t.Errorf("%+v", m)
	}
	op = putOp("2", "m", "l", "v", stamp(1))
	op.WriteConcern = "REPLICATED"
	if m := g.sync(&wire.SyncRequest{Operations: []wire.Op{op}}).Ack; m == nil || m.LastID != "2" || len(m.Results) != 1 || m.Results[0].Success {
		t.Errorf("%+v", m)
	}
	if g.partition.record("m", "l") != nil {
		t.Error("a refused op was applied")
	}
}

// The stream is opened for who waits, opened again when it is lost, and ends some time
// after the last wait; a watermark of another log counts for nothing.
func TestConcernsFollowWhileSomebodyWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newFakePersistence()
		c := newConcerns(p.client(), func() string { return "history-1" }, slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { c.run(ctx) })
		defer wg.Wait()
		defer cancel()
		settle := func(timeout time.Duration, sequence uint64) (level string, took time.Duration) {
			ops := []wire.Op{{WriteConcern: levelPersisted}}
			results := []opResult{{status: opApplied, level: "APPLIED", lane: "lane", sequence: sequence}}
			ctx, cancel := context.WithTimeout(t.Context(), timeout)
			defer cancel()
			begin := time.Now()
			c.settle(ctx, nil, ops, results)
			return results[0].level, time.Since(begin)
		}
		if synctest.Wait(); p.streams("FollowWatermarks") != 0 {
			t.Error("a stream for nobody")
		}
		wg.Go(func() {
			if level, took := settle(time.Minute, 7); level != levelPersisted || took != 3*time.Second {
				t.Errorf("%s after %v", level, took)
			}
		})
		time.Sleep(time.Second)
		p.storedTo("lane", 6)
		time.Sleep(time.Second)
		p.cut()
		time.Sleep(time.Second)
		p.storedTo("lane", 7)
		synctest.Wait()
		if n := p.streams("FollowWatermarks"); n != 2 {
			t.Errorf("%d streams", n)
		}
		if level, took := settle(time.Second, 8); level != "APPLIED" || took != time.Second {
			t.Errorf("%s after %v", level, took)
		}
		p.change(func() { p.history = "history-2"; p.stored["lane"] = 100 })
		if level, _ := settle(time.Second, 8); level != "APPLIED" {
			t.Errorf("%s by another log", level)
		}
		time.Sleep(2 * followIdle)
		if synctest.Wait(); c.open {
			t.Error("the stream stays open")
		}
		if len(c.waits) != 0 || c.waiting != 0 {
			t.Errorf("%d lanes, %d waits left", len(c.waits), c.waiting)
		}
		p.before = func(context.Context, string) error { return connect.NewError(connect.CodeUnavailable, "away") }
		if level, took := settle(time.Second, 200); level != "APPLIED" || took != time.Second {
			t.Errorf("%s after %v", level, took)
		}
	})
}

func TestConcernTimeout(t *testing.T) {
	for millis, want := range map[uint64]time.Duration{
		0: 5 * time.Second, 1: time.Millisecond, 7000: 7 * time.Second, 60_001: time.Minute, 1 << 63: time.Minute,
	} {
		if got := concernTimeout(millis); got != want {
			t.Errorf("%d: %v, want %v", millis, got, want)
		}
	}
}
