package gateway

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/wire"
	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

// A commit's changes reach every session of the map but their own, in order.
func TestEventsOfOneCommit(t *testing.T) {
	b := setup(t, nil, nil)
	p, q, other := b.hello(t), b.hello(t), b.hello(t)
	p.synced("m", 0)
	q.synced("m", 0)
	other.synced("n", 0)
	origins := map[string]string{}
	for _, s := range b.service.sockets.snapshot() {
		origins[fmt.Sprint(s.id)] = s.origin
	}
	event := &fanoutv1.Event{Map: "m", Lane: "l", Sequence: 1}
	for i, origin := range []string{"1", "1", "x", "2", "x", "1"} {
		event.Changes = append(event.Changes, &typesv1.Change{
			Map: "m", Key: fmt.Append(nil, "k", i), Origin: origins[origin],
			Record: &typesv1.Record{
				Value: packed("v"), Timestamp: &typesv1.Timestamp{Millis: uint64(i + 1), NodeId: "n"},
			},
			Arrival: &typesv1.Arrival{Millis: 77, Counter: uint64(i)},
		})
	}
	b.fanout.publish(event)
	for name, c := range map[string]struct {
		p    *wsClient
		keys []string
	}{"p": {p, []string{"k2", "k3", "k4"}}, "q": {q, []string{"k0", "k1", "k2", "k4", "k5"}}} {
		for _, key := range c.keys {
			e := expect[*wire.ServerEvent](c.p)
			if e.Key != key || e.Timestamp.Millis != 77 || e.Timestamp.NodeID != serverNode {
				t.Errorf("%s: event %+v, want %s", name, e, key)
			}
		}
		c.p.ping()
	}
	other.ping()
}

// FAN-01: after a gap the sessions of the map get a fresh root.
func TestGap(t *testing.T) {
	b := setup(t, nil, nil)
	p, other := b.hello(t), b.hello(t)
	p.synced("m", 0)
	other.synced("n", 0)
	b.partition.fanout = nil // so that the change goes unnoticed
	b.partition.put("m", "k", packed("v"), stamp(5))
	b.fanout.gap("m")
	if root := expect[*wire.SyncRespRoot](p); root.RootHash != rootOf(map[string]hlc.Timestamp{"k": stamp(5)}, merkle.Mixed) {
		t.Errorf("root %d", root.RootHash)
	}
	p.ping()
	other.ping()
}

// After the stream was lost every session gets a fresh root of each of its maps, and
// changes again.
func TestStreamLost(t *testing.T) {
	b := setup(t, nil, nil)
	p := b.hello(t)
	p.synced("m", 0)
	p.synced("n", 0)
	b.fanout.setDown(true)
	b.fanout.cut()
	b.partition.put("m", "missed", packed("v"), stamp(5)) // reaches nobody
	late := b.hello(t)
	late.synced("m", 0) // does not wait for fanout
	b.fanout.setDown(false)
	roots := map[string]uint32{}
	for range 2 {
		root := expect[*wire.SyncRespRoot](p)
		roots[root.MapName] = root.RootHash
	}
	if roots["m"] != rootOf(map[string]hlc.Timestamp{"missed": stamp(5)}, merkle.Mixed) || len(roots) != 2 {
		t.Errorf("roots %v", roots)
	}
	expect[*wire.SyncRespRoot](late)
	b.partition.put("m", "then", packed("v"), stamp(6))
	for _, c := range []*wsClient{p, late} {
		if e := expect[*wire.ServerEvent](c); e.Key != "then" {
			t.Errorf("event %+v", e)
		}
	}
}

// A map that nobody looks at is watched no more, and can be again.
func TestUnwatch(t *testing.T) {
	b := setup(t, nil, nil)
	p := b.hello(t)
	p.synced("m", 0)
	b.fanout.await(t, "m", true)
	if n := b.service.sockets.hub.watchedMaps(); n != 1 {
		t.Errorf("%d maps", n)
	}
	_ = p.conn.Close()
	b.fanout.await(t, "m", false)
	q := b.hello(t)
	q.synced("m", 0)
	b.partition.put("m", "k", packed("v"), stamp(5))
	expect[*wire.ServerEvent](q)
}

// SYN-03: whatever is written while a session syncs reaches it, pushed, as an event, or
// in the root.
func TestNothingFallsBetween(t *testing.T) {
	b := setup(t, nil, nil)
	const writes = 300
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range writes {
			b.partition.put("m", fmt.Sprint("k", i), packed("v"), stamp(uint64(i+1)))
		}
	}()
	want := map[string]hlc.Timestamp{}
	for i := range writes {
		want[fmt.Sprint("k", i)] = stamp(uint64(i + 1))
	}
	for range 5 {
		p := b.hello(t)
		got := map[string]hlc.Timestamp{}
		p.send(&wire.SyncInit{MapName: "m"})
		for len(got) < writes {
			switch m := p.recv().(type) {
			case *wire.SyncRespLeaf:
				for _, r := range m.Records {
					got[r.Key] = r.Record.Timestamp
				}
			case *wire.ServerEvent:
				got[m.Key] = m.Record.Timestamp
			}
		}
		if rootOf(got, merkle.Mixed) != rootOf(want, merkle.Mixed) {
			t.Error("the client's root differs")
		}
	}
	<-done
}

// What makes the above more than luck: a map is watched before anything of it is read.
func TestWatchedBeforeRead(t *testing.T) {
	var unwatched atomic.Int32
	b := setup(t, nil, func(b *bench) {
		b.partition.before = func(_ context.Context, method string) error {
			if method != "Since" && method != "Leaves" {
				return nil
			}
			b.fanout.mu.Lock()
			defer b.fanout.mu.Unlock()
			for _, s := range b.fanout.streams {
				if !s.maps["m"] {
					unwatched.Add(1)
				}
			}
			return nil
		}
	})
	b.hello(t).synced("m", 0)
	b.hello(t).synced("m", 1<<50)
	if n := unwatched.Load(); n != 0 {
		t.Errorf("%d reads of a map that was not watched", n)
	}
}

// An event that only holds changes of the one session of its map costs nothing.
func TestConcerns(t *testing.T) {
	one, two := &session{origin: "one"}, &session{origin: "two"}
	event := func(origins ...string) *fanoutv1.Event {
		e := &fanoutv1.Event{Map: "m"}
		for _, origin := range origins {
			e.Changes = append(e.Changes, &typesv1.Change{Origin: origin})
		}
		return e
	}
	for name, c := range map[string]struct {
		sessions []*session
		event    *fanoutv1.Event
		want     bool
	}{
		"nobody":                {nil, event("one"), false},
		"the writer alone":      {[]*session{one}, event("one", "one"), false},
		"among others' changes": {[]*session{one}, event("one", "two", "one"), true},
		"a change of no client": {[]*session{one}, event("one", ""), true},
		"two sessions":          {[]*session{one, two}, event("one", "one"), true},
	} {
		h := newHub("gateway", nil, nil, nil)
		if h.concerns(c.event) {
			t.Errorf("%s: an event of a map that nobody looks at concerns somebody", name)
		}
		h.maps["m"] = &watched{name: "m", sessions: make(map[*session]kinds)}
		for _, s := range c.sessions {
			h.maps["m"].sessions[s] = setOf(kindLWW)
		}
		if got := h.concerns(c.event); got != c.want {
			t.Errorf("%s: concerns = %t", name, got)
		}
		if n := testing.AllocsPerRun(10, func() { h.concerns(c.event) }); n > 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}
