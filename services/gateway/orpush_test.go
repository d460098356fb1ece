package gateway

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/topgun-sync/topgun/core/wire"
)

func pushOf(mapName, key, tag string, millis uint64) *wire.ORMapPushDiff {
	r := orRecord(tag, "v", stamp(millis))
	return &wire.ORMapPushDiff{MapName: mapName, Entries: []wire.OREntry{
		{Key: key, Records: []wire.ORRecord{{Tag: tag, Record: r.Record}}},
	}}
}

// only returns the one open session.
func (b *bench) only(t testing.TB) (s *session) {
	t.Helper()
	k := b.service.sockets
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.sessions) != 1 {
		t.Fatalf("%d sessions, want 1", len(k.sessions))
	}
	for _, s = range k.sessions {
	}
	return s
}

func (s *session) waitingPushes() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.pushes.waiting)
}

// heldGets makes every Get wait until release is closed, or its caller is gone. started
// counts them, and most is the most that ran at once.
type heldGets struct {
	release             chan struct{}
	started, runs, most atomic.Int32
}

func holdGets(b *bench) *heldGets {
	h := &heldGets{release: make(chan struct{})}
	b.partition.before = func(ctx context.Context, method string) error {
		if method != "Get" {
			return nil
		}
		h.started.Add(1)
		h.most.Store(max(h.most.Load(), h.runs.Add(1)))
		defer h.runs.Add(-1)
		select {
		case <-h.release:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return h
}

// Pushed diffs are merged one after another, and those of one map that waited together
// with one read and one call.
func TestPushesAreMergedTogether(t *testing.T) {
	var gets *heldGets
	b := setup(t, nil, func(b *bench) { gets = holdGets(b) })
	p := b.hello(t)
	s := b.only(t)
	p.send(pushOf("m", "k", "first", 1))
	eventually(t, func() bool { return gets.started.Load() == 1 })
	for i := range 40 {
		p.send(pushOf("m", "k", fmt.Sprint("t", i), uint64(i+2)))
	}
	p.send(pushOf("m", "k", "t0", 2)) // once more
	p.send(pushOf("other", "k", "u", 50))
	p.send(pushOf("m", "k", "last", 60))
	eventually(t, func() bool { return s.waitingPushes() == 43 })
	applied := b.partition.called("Apply")
	close(gets.release)
	eventually(t, func() bool { return b.partition.tag("m", "k", "last") != nil })
	for i := range 40 {
		if b.partition.tag("m", "k", fmt.Sprint("t", i)) == nil {
			t.Errorf("t%d was lost", i)
		}
	}
	if b.partition.tag("m", "k", "first") == nil || b.partition.tag("other", "k", "u") == nil {
		t.Error("a diff was lost")
	}
	if reads, calls := b.partition.called("Get"), b.partition.called("Apply")-applied; reads != 4 || calls != 4 || gets.most.Load() != 1 {
		t.Errorf("%d reads, %d at once, and %d calls; want 4, 1 and 4", reads, gets.most.Load(), calls)
	}
}

// Few pushed diffs wait, and behind them the reading of the session. Those that wait when
// it ends have no effect, and nothing of them is kept.
func TestPushesAreBounded(t *testing.T) {
	var gets *heldGets
	b := setup(t, nil, func(b *bench) { gets = holdGets(b) })
	p := b.hello(t)
	s := b.only(t)
	p.send(pushOf("m", "k", "first", 1))
	eventually(t, func() bool { return gets.started.Load() == 1 })
	for i := range 2 * maxWaitingPushes {
		p.send(pushOf("m", "k", fmt.Sprint("t", i), uint64(i+2)))
	}
	p.send(wire.PingAt(1))
	eventually(t, func() bool { return s.waitingPushes() == maxWaitingPushes })
	s.beginClose(closeIdle)
	if code, before := p.closed(); code != closeIdle.code || len(before) != 0 {
		t.Errorf("closed with %d after %d messages, want no PONG before the pushes are taken", code, len(before))
	}
	_ = p.conn.Close()
	eventually(t, func() bool { // also for what was being merged
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.pushes.waiting) == 0 && s.pushes.bytes == 0
	})
	b.awaitSessions(t, 0)
	if reads, calls := gets.started.Load(), b.partition.called("Apply"); reads != 1 || calls != 0 {
		t.Errorf("%d reads and %d calls of Apply, want only the read that was under way", reads, calls)
	}
}

// The bytes of pushed diffs that wait are bounded too.
func TestPushedBytesAreBounded(t *testing.T) {
	var gets *heldGets
	b := setup(t, func(c *Config) { c.MaxMessageBytes = 20_000 }, func(b *bench) { gets = holdGets(b) })
	p := b.hello(t)
	s := b.only(t)
	for i := range 5 {
		push := pushOf("m", "k", fmt.Sprint("t", i), uint64(i+1))
		push.Entries[0].Records[0].Record.Value = packed(string(make([]byte, 9_000)))
		p.send(push)
		eventually(t, func() bool { return gets.started.Load() == 1 })
	}
	eventually(t, func() bool { return s.waitingPushes() == 1 })
	p.send(wire.PingAt(1))
	close(gets.release)
	expect[*wire.Pong](p)
	eventually(t, func() bool { return b.partition.tag("m", "k", "t4") != nil })
}

// A client pushes after every leaf, and for every leaf that the server lacks: a walk of
// many more than the flood limit is no flood.
func TestPushesOfAWalkAreNoFlood(t *testing.T) {
	b := setup(t, nil, nil)
	b.partition.add("m", "k", "t", packed("v"), stamp(1))
	p := b.hello(t)
	s := b.only(t)
	const walk = 100
	answer := func(request *wire.ORMapMerkleReqBucket, pushes int) {
		p.send(request)
		p.recv()
		for range pushes {
			p.send(pushOf("m", "k", "t", 1))
		}
	}
	p.ping()
	for i := range walk {
		answer(&wire.ORMapMerkleReqBucket{MapName: "m", Path: fmt.Sprintf("%03x", i)}, 1)
		answer(&wire.ORMapMerkleReqBucket{MapName: "m", Path: fmt.Sprintf("%02x", i)}, pushesPerBuckets)
	}
	p.ping()
	_ = p.conn.Close()
	b.awaitSessions(t, 0) // the tokens are nobody's
	if spent := floodBurst - s.tokens; spent > 10 || s.pushes.invited != 0 {
		t.Errorf("%v tokens spent for %d pushes, %d invited and not sent", spent, (1+pushesPerBuckets)*walk, s.pushes.invited)
	}
}
