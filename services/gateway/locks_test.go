package gateway

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/topgun-sync/topgun/core/wire"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
)

func (p *wsClient) lock(id, name string, ttl uint64) {
	p.t.Helper()
	p.send(&wire.LockRequest{RequestID: id, Name: name, TTLMillis: ttl})
}

// PROTOCOL 14.3: first come, first served; a release is answered, a wait is not.
func TestLocks(t *testing.T) {
	b := setup(t, nil, nil)
	p, q := b.hello(t), b.hello(t)
	p.lock("1", "l", 10_000)
	first := expect[*wire.LockGranted](p)
	if first.RequestID != "1" || first.Name != "l" || first.FencingToken == 0 {
		t.Errorf("%+v", first)
	}
	p.lock("2", "l", 10_000) // held by the session: the same token
	if m := expect[*wire.LockGranted](p); m.RequestID != "2" || m.FencingToken != first.FencingToken {
		t.Errorf("%+v", m)
	}
	q.lock("3", "l", 10_000)
	eventually(t, func() bool { return b.partition.called("AcquireLock") == 3 })
	q.ping() // waits, and other requests of the session go on
	q.send(&wire.LockRelease{RequestID: "4", Name: "l", FencingToken: first.FencingToken + 1})
	if m := expect[*wire.LockReleased](q); m.RequestID != "4" || m.Success {
		t.Errorf("a release with another token: %+v", m)
	}
	p.send(&wire.LockRelease{RequestID: "5", Name: "l", FencingToken: first.FencingToken})
	if m := expect[*wire.LockReleased](p); m.RequestID != "5" || m.Name != "l" || !m.Success {
		t.Errorf("%+v", m)
	}
	if m := expect[*wire.LockGranted](q); m.RequestID != "3" || m.FencingToken <= first.FencingToken {
		t.Errorf("%+v", m)
	}
	// The owner waits less long than the client.
	b.partition.mu.Lock()
	defer b.partition.mu.Unlock()
	for _, wait := range b.partition.locks.waits {
		if wait > 14_000 || wait < 12_000 {
			t.Errorf("a lock of 10 s is waited for %d ms, and by its client 15 s", wait)
		}
	}
}

// A release and a request behind it keep their order, or the release would end what the
// request got.
func TestReleaseThenRequest(t *testing.T) {
	b := setup(t, nil, nil)
	p := b.hello(t)
	p.lock("1", "l", 10_000)
	token := expect[*wire.LockGranted](p).FencingToken
	for i := range 50 {
		p.send(&wire.LockRelease{RequestID: fmt.Sprint("r", i), Name: "l", FencingToken: token})
		p.lock(fmt.Sprint("q", i), "l", 10_000)
		if m := expect[*wire.LockReleased](p); !m.Success {
			t.Fatalf("%+v", m)
		}
		m := expect[*wire.LockGranted](p)
		if m.FencingToken <= token {
			t.Fatalf("token %d after %d", m.FencingToken, token)
		}
		token = m.FencingToken
	}
}

// When a session ends its requests lose their place, and what it holds stays with it
// until its owner's grace time is over.
func TestLocksOfAnEndedSession(t *testing.T) {
	b := setup(t, nil, nil)
	p, gone, q := b.hello(t), b.hello(t), b.hello(t)
	p.lock("1", "l", 60_000)
	token := expect[*wire.LockGranted](p).FencingToken
	gone.lock("2", "l", 60_000)
	eventually(t, func() bool { return b.partition.called("AcquireLock") == 2 })
	q.lock("3", "l", 60_000)
	eventually(t, func() bool { return b.partition.called("AcquireLock") == 3 })
	_ = gone.conn.Close()
	eventually(t, func() bool { n, _ := b.service.sockets.count(); return n == 2 })
	_ = p.conn.Close()
	eventually(t, func() bool { n, _ := b.service.sockets.count(); return n == 1 })
	q.ping()
	if n := b.partition.called("ReleaseLock"); n != 0 {
		t.Errorf("the lock was given back at once, by %d calls", n)
	}
	// As the owner does when a session is silent.
	if _, err := b.partition.ReleaseLock(t.Context(), &partitionv1.ReleaseLockRequest{Name: "l", FencingToken: token}); err != nil {
		t.Fatal(err)
	}
	if m := expect[*wire.LockGranted](q); m.RequestID != "3" {
		t.Errorf("%+v", m)
	}
}

// A lock that is granted to a session that has ended is given back.
func TestGrantComesTooLate(t *testing.T) {
	g := newGate()
	b := setup(t, nil, func(b *bench) {
		b.partition.after = func(method string) {
			if method == "AcquireLock" {
				g.entered <- struct{}{}
				<-g.open
			}
		}
	})
	p := b.hello(t)
	p.lock("1", "l", 60_000)
	<-g.entered
	_ = p.conn.Close()
	eventually(t, func() bool {
		sessions := b.service.sockets.snapshot()
		if len(sessions) == 0 {
			return true
		}
		sessions[0].mu.Lock()
		defer sessions[0].mu.Unlock()
		return sessions[0].closing != nil
	})
	g.release()
	eventually(t, func() bool { return b.partition.holder("l") == "" })
}

// Owners hear each second of the sessions that hold or wait for locks, and of no others.
func TestKeepLocks(t *testing.T) {
	b := setup(t, nil, nil)
	p, q, other := b.hello(t), b.hello(t), b.hello(t)
	other.ping()
	p.lock("1", "l", 60_000)
	token := expect[*wire.LockGranted](p).FencingToken
	q.lock("2", "l", 60_000)
	kept := func() int {
		b.partition.mu.Lock()
		defer b.partition.mu.Unlock()
		return len(slices.Compact(slices.Sorted(slices.Values(b.partition.locks.kept))))
	}
	eventually(t, func() bool { return kept() == 2 })
	p.send(&wire.LockRelease{RequestID: "3", Name: "l", FencingToken: token})
	expect[*wire.LockReleased](p)
	expect[*wire.LockGranted](q)
	eventually(t, func() bool { return kept() == 1 })
	_ = q.conn.Close()
	eventually(t, func() bool { n, _ := b.service.sockets.count(); return n == 2 })
	if alive := b.service.sockets.keeper.alive(time.Now()); len(alive) != 0 {
		t.Errorf("still named: %v", alive)
	}
}

func TestLockRefusals(t *testing.T) {
	b := setup(t, nil, nil)
	p, holder := b.hello(t), b.hello(t)
	for range 2 * maxErrors {
		p.lock("1", "a b", 1000)
		if e := expect[*wire.ErrorMessage](p); e.Code != 400 {
			t.Errorf("bad name: %+v", e)
		}
		p.lock("1", "l", 0)
		if e := expect[*wire.ErrorMessage](p); e.Code != 400 {
			t.Errorf("bad ttl: %+v", e)
		}
	}
	p.send(&wire.LockRelease{RequestID: "2", Name: "a b", FencingToken: 1})
	if m := expect[*wire.LockReleased](p); m.RequestID != "2" || m.Success {
		t.Errorf("%+v", m)
	}
	expect[*wire.ErrorMessage](p)
	for i := range maxLocks {
		holder.lock(fmt.Sprint(i), fmt.Sprint("l", i), 60_000)
		expect[*wire.LockGranted](holder)
	}
	holder.lock("more", "more", 60_000)
	if e := expect[*wire.ErrorMessage](holder); e.Code != 429 {
		t.Errorf("%+v", e)
	}
	p.ping()
}

// A wait that ends without the lock is silent (PROTOCOL 14.3), and leaves nothing.
func TestLockNotGranted(t *testing.T) {
	b := setup(t, nil, nil)
	p, q := b.hello(t), b.hello(t)
	p.lock("1", "l", 60_000)
	expect[*wire.LockGranted](p)
	b.partition.mu.Lock()
	b.partition.locks.impatient = true
	b.partition.mu.Unlock()
	q.lock("2", "l", 60_000)
	eventually(t, func() bool {
		return len(b.service.sockets.keeper.alive(time.Now())["l"]) == 1 && b.partition.called("AcquireLock") == 2
	})
	q.ping()
}
