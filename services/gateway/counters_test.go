package gateway

import (
	"fmt"
	"testing"

	"github.com/topgun-sync/topgun/core/wire"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

func counterState(nodes ...wire.CounterNode) wire.CounterState {
	return wire.CounterState{Nodes: nodes}
}

func sums(s wire.CounterState) string {
	text := ""
	for _, n := range s.Nodes {
		text += fmt.Sprintf("%s+%d-%d ", n.NodeID, n.Positive, n.Negative)
	}
	return text
}

// count stores what a node counted as another gateway would have it.
func (p *fakePartition) count(counter, node string, positive, negative uint64) {
	p.applyAs("", &partitionv1.Op{
		Map: "+" + counter, Key: []byte(counter), Kind: typesv1.Kind_KIND_COUNTER, Tag: node,
		Record: &typesv1.Record{Value: counterValue(wire.CounterNode{Positive: positive, Negative: negative})},
	})
}

// PROTOCOL 14.2: a request subscribes, a sync reaches all subscribers and its sender.
func TestCounters(t *testing.T) {
	b := setup(t, nil, nil)
	p, q, silent := b.hello(t), b.hello(t), b.hello(t)
	p.send(&wire.CounterRequest{Name: "likes"})
	if m := expect[*wire.CounterResponse](p); m.Name != "likes" || len(m.State.Nodes) != 0 {
		t.Errorf("a counter that is unknown: %+v", m)
	}
	b.partition.count("likes", "n0", 3, 1)
	if m := expect[*wire.CounterUpdate](p); sums(m.State) != "n0+3-1 " {
		t.Errorf("somebody's change: %+v", m)
	}
	q.send(&wire.CounterSync{Name: "likes", State: counterState(wire.CounterNode{NodeID: "n0", Positive: 2}, wire.CounterNode{NodeID: "n1", Positive: 5})})
	if m := expect[*wire.CounterUpdate](q); sums(m.State) != "n0+3-1 n1+5-0 " {
		t.Errorf("the sender got %q", sums(m.State))
	}
	if m := expect[*wire.CounterUpdate](p); sums(m.State) != "n1+5-0 " {
		t.Errorf("the other subscriber got %q", sums(m.State))
	}
	// A sync subscribes too, and one without news is answered all the same.
	b.partition.count("likes", "n2", 0, 7)
	for _, c := range []*wsClient{p, q} {
		if m := expect[*wire.CounterUpdate](c); sums(m.State) != "n2+0-7 " {
			t.Errorf("got %q", sums(m.State))
		}
	}
	applied := b.partition.called("Apply")
	q.send(&wire.CounterSync{Name: "likes", State: counterState(wire.CounterNode{NodeID: "n1", Positive: 5})})
	if m := expect[*wire.CounterUpdate](q); sums(m.State) != "n0+3-1 n1+5-0 n2+0-7 " {
		t.Errorf("got %q", sums(m.State))
	}
	if n := b.partition.called("Apply") - applied; n != 0 {
		t.Errorf("%d calls without news", n)
	}
	p.ping()
	silent.ping()
}

// A counter and a map of one name have nothing to do with each other.
func TestCounterIsNoMap(t *testing.T) {
	b := setup(t, nil, nil)
	p := b.hello(t)
	p.synced("likes", 0)
	b.partition.count("likes", "n", 1, 0)
	p.ping()
	p.send(&wire.SyncInit{MapName: "+likes"})
	if e := expect[*wire.ErrorMessage](p); e.Code != 400 {
		t.Errorf("%+v", e)
	}
}

func TestCounterGap(t *testing.T) {
	b := setup(t, nil, nil)
	p := b.hello(t)
	p.send(&wire.CounterRequest{Name: "c"})
	expect[*wire.CounterResponse](p)
	fanout := b.partition.fanout
	b.partition.fanout = nil
	b.partition.count("c", "n", 9, 0)
	b.partition.fanout = fanout
	b.fanout.gap("+c")
	if m := expect[*wire.CounterUpdate](p); sums(m.State) != "n+9-0 " {
		t.Errorf("got %q", sums(m.State))
	}
}

func TestCounterRefusals(t *testing.T) {
	b := setup(t, nil, func(b *bench) {
		b.partition.reject = func(op *partitionv1.Op) string {
			if op.GetTag() == "huge" {
				return "COUNTER_TOO_LARGE: a counter counts to 2^53"
			}
			return ""
		}
	})
	p := b.hello(t)
	p.send(&wire.CounterSync{Name: "c", State: counterState(wire.CounterNode{NodeID: "huge", Positive: 1 << 53})})
	if e := expect[*wire.ErrorMessage](p); e.Code != 400 || e.Message != "COUNTER_TOO_LARGE: a counter counts to 2^53" {
		t.Errorf("%+v", e)
	}
	for i := range maxCounters - 1 {
		p.send(&wire.CounterRequest{Name: fmt.Sprint("c", i)})
		expect[*wire.CounterResponse](p)
	}
	for range 2 * maxErrors { // the surplus is no bad message
		p.send(&wire.CounterRequest{Name: "one-more"})
		if e := expect[*wire.ErrorMessage](p); e.Code != 429 {
			t.Errorf("%+v", e)
		}
	}
	p.send(&wire.CounterRequest{Name: "c1"})
	expect[*wire.CounterResponse](p)
}

func TestMergeCounter(t *testing.T) {
	node := func(id string, p, n uint64) wire.CounterNode {
		return wire.CounterNode{NodeID: id, Positive: p, Negative: n}
	}
	for name, c := range map[string]struct {
		local, remote wire.CounterState
		merged, news  string
	}{
		"nothing":     {counterState(), counterState(), "", ""},
		"new node":    {counterState(node("a", 1, 0)), counterState(node("b", 2, 3)), "a+1-0 b+2-3 ", "b+2-3 "},
		"one side up": {counterState(node("a", 5, 5)), counterState(node("a", 4, 6)), "a+5-6 ", "a+5-6 "},
		"older":       {counterState(node("a", 5, 5)), counterState(node("a", 4, 5)), "a+5-5 ", ""},
	} {
		merged, news := mergeCounter(c.local, c.remote)
		if sums(merged) != c.merged || sums(wire.CounterState{Nodes: news}) != c.news {
			t.Errorf("%s: merged %q, news %q", name, sums(merged), sums(wire.CounterState{Nodes: news}))
		}
	}
}

func TestCounterValue(t *testing.T) {
	for _, want := range []wire.CounterNode{{NodeID: "n"}, {NodeID: "n", Positive: 1 << 53, Negative: 7}} {
		if got, ok := counterNode("n", counterValue(want)); !ok || got != want {
			t.Errorf("%+v became %+v, %t", want, got, ok)
		}
	}
	for _, bad := range [][]byte{nil, {0xc0}, {0x91, 1}, {0x92, 1}, {0x92, 1, 0xff}, {0x93, 1, 2, 3}} {
		if got, ok := counterNode("n", bad); ok {
			t.Errorf("% x became %+v", bad, got)
		}
	}
}
