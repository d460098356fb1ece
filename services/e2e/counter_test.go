package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/topgun-sync/topgun/core/wire"
)

var errNothingYet = errors.New("it has not come yet")

// count is the value of a counter as a client that merges all it gets shows it.
func (l *listener) count(name string) (total int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	positive, negative := map[string]uint64{}, map[string]uint64{}
	take := func(counter string, s wire.CounterState) {
		if counter != name {
			return
		}
		for _, n := range s.Nodes {
			positive[n.NodeID] = max(positive[n.NodeID], n.Positive)
			negative[n.NodeID] = max(negative[n.NodeID], n.Negative)
		}
	}
	for _, msg := range l.seen {
		switch m := msg.(type) {
		case *wire.CounterResponse:
			take(m.Name, m.State)
		case *wire.CounterUpdate:
			take(m.Name, m.State)
		}
	}
	for _, n := range positive {
		total += int64(n)
	}
	for _, n := range negative {
		total -= int64(n)
	}
	return total
}

func (l *listener) wantCount(name string, want int64) {
	l.t.Helper()
	eventually(l.t, deadline, func() error {
		if got := l.count(name); got != want {
			return fmt.Errorf("counter %s is %d; want %d", name, got, want)
		}
		return nil
	})
}

func countOf(node string, positive, negative uint64) wire.CounterState {
	return wire.CounterState{Nodes: []wire.CounterNode{{NodeID: node, Positive: positive, Negative: negative}}}
}

// A counter is the sum of what its nodes did, after any repetition and in any order.
func counters(t *testing.T, c Cluster) {
	const name = "likes:post/1"
	a, b := dial(t, c, 0).hello(), dial(t, c, 1).hello()
	al, bl := a.listen(), b.listen()
	a.send(&wire.CounterRequest{Name: name})
	b.send(&wire.CounterRequest{Name: name})
	await(t, al, func(m *wire.CounterResponse) bool { return m.Name == name })
	await(t, bl, func(m *wire.CounterResponse) bool { return m.Name == name })
	for i := range uint64(20) {
		a.send(&wire.CounterSync{Name: name, State: countOf("node-a", i+1, i/2)})
		b.send(&wire.CounterSync{Name: name, State: countOf("node-b", 2*(i+1), 0)})
	}
	a.send(&wire.CounterSync{Name: name, State: countOf("node-a", 3, 1)}) // an old state again
	al.wantCount(name, 20-9+40)
	bl.wantCount(name, 20-9+40)
	late := dial(t, c, 1).hello()
	ll := late.listen()
	late.send(&wire.CounterRequest{Name: name})
	ll.wantCount(name, 20-9+40)

	b.send(&wire.CounterSync{Name: name, State: countOf("node-c", 1<<53, 0)})
	await(t, bl, func(m *wire.ErrorMessage) bool { return m.Code == 400 && strings.Contains(m.Message, "2^53") })
	b.sendBytes(rawCounter(name, -1))
	await(t, bl, func(m *wire.ErrorMessage) bool { return strings.HasPrefix(m.Message, "BAD_MESSAGE") })
	fresh := dial(t, c, 0).hello()
	fl := fresh.listen()
	fresh.send(&wire.CounterRequest{Name: name})
	await(t, fl, func(m *wire.CounterResponse) bool { return m.Name == name })
	if got := fl.count(name); got != 51 {
		t.Errorf("the counter is %d after refused values; want 51", got)
	}
}

// rawCounter is a COUNTER_SYNC with any number.
func rawCounter(name string, value int) []byte {
	return encode(map[string]any{"type": "COUNTER_SYNC", "payload": map[string]any{
		"name": name, "state": map[string]any{"positive": map[string]any{"n": value}, "negative": map[string]any{}},
	}})
}
