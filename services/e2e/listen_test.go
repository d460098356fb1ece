package e2e

import (
	"context"
	"fmt"
	"sync"
	"testing"

	"github.com/topgun-sync/topgun/core/wire"
)

// listener reads everything that a connection brings, as it comes.
type listener struct {
	*conn
	mu   sync.Mutex
	seen []wire.Message
	err  error // why it ended
}

// listen hands the reading of a connection to a listener, until the test ends.
func (c *conn) listen() *listener {
	l := &listener{conn: c}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			msg, err := c.readWithin(ctx)
			l.mu.Lock()
			if err != nil {
				l.err = err
				l.mu.Unlock()
				return
			}
			l.seen = append(l.seen, msg)
			l.mu.Unlock()
		}
	}()
	c.t.Cleanup(func() {
		cancel()
		<-done
	})
	return l
}

// received returns the messages of a type so far, in order.
func received[M wire.Message](l *listener) (found []M) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, msg := range l.seen {
		if m, ok := msg.(M); ok {
			found = append(found, m)
		}
	}
	return found
}

// await waits for a message of a type that is as wanted, and returns the first.
func await[M wire.Message](t testing.TB, l *listener, wanted func(M) bool) (found M) {
	t.Helper()
	eventually(t, deadline, func() error {
		for _, m := range received[M](l) {
			if wanted(m) {
				found = m
				return nil
			}
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.err != nil {
			t.Fatalf("the connection ended while waiting for %T: %v", found, l.err)
		}
		return fmt.Errorf("no %T among %d messages is as wanted", found, len(l.seen))
	})
	return found
}
