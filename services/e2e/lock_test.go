package e2e

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/topgun-sync/topgun/core/wire"
)

// acquire asks for a lock and waits for it.
func (c *conn) acquire(name, requestID string, ttl time.Duration) uint64 {
	c.t.Helper()
	c.send(&wire.LockRequest{RequestID: requestID, Name: name, TTLMillis: uint64(ttl.Milliseconds())})
	granted := expect[*wire.LockGranted](c)
	if granted.RequestID != requestID || granted.Name != name {
		c.t.Fatalf("granted %+v; want request %s of %s", granted, requestID, name)
	}
	return granted.FencingToken
}

func (c *conn) release(name string, token uint64) bool {
	c.t.Helper()
	c.send(&wire.LockRelease{RequestID: "release", Name: name, FencingToken: token})
	return expect[*wire.LockReleased](c).Success
}

// A lock has one holder at a time, at whatever gateway; tokens only rise.
func locks(t *testing.T, c Cluster) {
	const name = "locks:job/1"
	const sessions, rounds = 6, 10
	var inside atomic.Int32
	var last atomic.Uint64
	var wg sync.WaitGroup
	for i := range sessions {
		conn := dial(t, c, i).hello()
		wg.Go(func() {
			for n := range rounds {
				token := conn.acquire(name, fmt.Sprint(i, "-", n), time.Minute)
				if inside.Add(1) != 1 {
					t.Error("two hold the lock at once")
				}
				if before := last.Swap(token); token <= before {
					t.Errorf("token %d after %d", token, before)
				}
				inside.Add(-1)
				if !conn.release(name, token) {
					t.Error("the holder could not release")
				}
			}
		})
	}
	wg.Wait()

	holder, other := dial(t, c, 0).hello(), dial(t, c, 1).hello()
	token := holder.acquire(name, "a", time.Minute)
	if again := holder.acquire(name, "b", time.Minute); again != token {
		t.Errorf("the holder asked again and got token %d; want %d", again, token)
	}
	if other.release(name, token+1) || other.release(name, token-1) {
		t.Error("a lock was released with a token that is not the holder's")
	}
	// Time over: the next one gets it.
	short := holder.acquire(name+"/ttl", "c", 300*time.Millisecond)
	began := time.Now()
	if next := other.acquire(name+"/ttl", "d", time.Minute); next <= short {
		t.Errorf("token %d after %d", next, short)
	}
	if waited := time.Since(began); waited < 200*time.Millisecond {
		t.Errorf("granted %v after the first grant, before its time was over", waited)
	}
	// The holder's connection ends: the lock is free past the grace time.
	other.send(&wire.LockRequest{RequestID: "e", Name: name, TTLMillis: 60_000})
	holder.ws.CloseNow()
	if next := expect[*wire.LockGranted](other); next.FencingToken <= token {
		t.Errorf("token %d after %d", next.FencingToken, token)
	}

	for id, request := range map[string]*wire.LockRequest{
		"ttl":  {RequestID: "ttl", Name: name, TTLMillis: 0},
		"name": {RequestID: "name", Name: "a b", TTLMillis: 1000},
	} {
		conn := dial(t, c, 0).hello()
		conn.send(request)
		if m, ok := conn.next().(*wire.ErrorMessage); !ok || m.Code != 400 {
			t.Errorf("bad %s: want ERROR 400", id)
		}
	}
}
