package client

import (
	"slices"
	"testing"
	"time"

	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/wire"
)

func TestOpLog(t *testing.T) {
	var l opLog
	for range 10 {
		l.append(wire.Op{MapName: "m", Key: "k", Record: lwwmap.Record{Value: make([]byte, 1000)}})
	}
	ids := func(ops []wire.Op) (ids []string) {
		for _, op := range ops {
			ids = append(ids, op.ID)
		}
		return ids
	}
	ops, last := l.batch(0, 3, 1<<20)
	if got := ids(ops); !slices.Equal(got, []string{"1", "2", "3"}) || last != 3 {
		t.Errorf("bounded by number: %v, last %d", got, last)
	}
	ops, last = l.batch(3, 1000, 3000)
	if got := ids(ops); !slices.Equal(got, []string{"4", "5"}) || last != 5 {
		t.Errorf("bounded by bytes: %v, last %d", got, last)
	}
	if ops, last = l.batch(5, 1000, 1); len(ops) != 1 || last != 6 {
		t.Errorf("an op above the bound goes alone: %v, last %d", ids(ops), last)
	}
	if ops, last = l.batch(10, 1000, 1000); len(ops) != 0 || last != 10 {
		t.Errorf("nothing left: %v, last %d", ids(ops), last)
	}
	if op, ok := l.drop(5); !ok || op.ID != "5" {
		t.Errorf("drop 5: %v %v", op.ID, ok)
	}
	if _, ok := l.drop(5); ok {
		t.Error("dropped twice")
	}
	if !l.dropThrough(5) || l.first() != 6 {
		t.Errorf("first is %d after dropping through 5", l.first())
	}
	if l.dropThrough(5) {
		t.Error("dropping through 5 again drops something")
	}
	l.dropThrough(1 << 40)
	if l.first() != 0 || l.last != 10 {
		t.Errorf("first %d, last %d; ids never start over", l.first(), l.last)
	}
}

func TestRetryDelay(t *testing.T) {
	c := Config{Jitter: func() float64 { return 0.5 }}.withDefaults()
	for attempt, want := range []time.Duration{1, 2, 4, 8, 16, 30, 30} {
		if got := c.retryDelay(attempt); got != want*time.Second {
			t.Errorf("attempt %d: %v; want %v s", attempt, got, want)
		}
	}
	if got := c.retryDelay(1_000_000); got != 30*time.Second {
		t.Errorf("attempt 1,000,000: %v", got)
	}
	c.Jitter = func() float64 { return 0 }
	if got := c.retryDelay(0); got != 500*time.Millisecond {
		t.Errorf("least delay %v", got)
	}
}
