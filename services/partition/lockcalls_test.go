package partition

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect/v2"

	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
	"github.com/topgun-sync/topgun/services/internal/commitlog"
)

// acquire asks for a lock for an hour. It returns 0 if it was not granted.
func (n *node) acquire(ctx context.Context, name, session string, wait time.Duration) (token uint64, err error) {
	resp, err := n.AcquireLock(ctx, &partitionv1.AcquireLockRequest{
		Name: name, Session: session, TtlMillis: 3_600_000, WaitMillis: uint64(wait.Milliseconds()),
	})
	if resp.GetGranted() != (resp.GetFencingToken() != 0) {
		n.world.t.Errorf("granted %t with token %d", resp.GetGranted(), resp.GetFencingToken())
	}
	return resp.GetFencingToken(), err
}

func (n *node) mustAcquire(name, session string, wait time.Duration) uint64 {
	n.world.t.Helper()
	token, err := n.acquire(n.world.t.Context(), name, session, wait)
	if err != nil {
		n.world.t.Fatal(err)
	}
	return token
}

func (n *node) mustRelease(name string, token uint64) bool {
	n.world.t.Helper()
	resp, err := n.ReleaseLock(n.world.t.Context(), &partitionv1.ReleaseLockRequest{Name: name, FencingToken: token})
	if err != nil {
		n.world.t.Fatal(err)
	}
	return resp.GetReleased()
}

// waiting returns once as many wait for a lock.
func (n *node) waiting(name string, want int) {
	n.world.t.Helper()
	_, shard, err := n.lockShard(name)
	if err != nil {
		n.world.t.Fatal(err)
	}
	for got, began := -1, time.Now(); got != want; {
		if time.Since(began) > 20*time.Second {
			n.world.t.Fatalf("%d wait, want %d", got, want)
		}
		done, err := shard.submit(n.world.t.Context(), func() {
			if l := shard.locks.names[name]; l != nil {
				got = l.queue.Len()
			}
		})
		if err != nil || shard.await(n.world.t.Context(), done) != nil {
			n.world.t.Fatalf("%d wait, want %d", got, want)
		}
	}
}

func TestLocks_FirstComeFirstServed(t *testing.T) {
	n := newWorld(t).start()
	token := n.mustAcquire("jobs/1", "holder", 0)
	if again := n.mustAcquire("jobs/1", "holder", 0); again != token {
		t.Errorf("the holder asks again and gets token %d, want %d", again, token)
	}
	if other := n.mustAcquire("jobs/1", "other", 0); other != 0 {
		t.Errorf("another session got the lock with token %d", other)
	}
	if n.mustRelease("jobs/1", token+1) || n.mustRelease("jobs/2", token) {
		t.Error("released with a token that is not the holder's")
	}
	type grant struct {
		session int
		token   uint64
	}
	grants := make(chan grant)
	for i := range 5 {
		go func() { grants <- grant{i, n.mustAcquire("jobs/1", fmt.Sprint("s", i), time.Minute)} }()
		n.waiting("jobs/1", i+1)
	}
	for i := range 5 {
		if !n.mustRelease("jobs/1", token) {
			t.Fatal("the holder could not release")
		}
		next := <-grants
		if next.session != i || next.token <= token {
			t.Fatalf("grant %d went to session %d with token %d after %d", i, next.session, next.token, token)
		}
		token = next.token
	}
	if !n.mustRelease("jobs/1", token) || n.mustRelease("jobs/1", token) {
		t.Error("a lock must be released once")
	}
	if events := n.events.all(); len(events) > 0 {
		t.Errorf("locks were published: %v", events)
	}
}

// Who goes away loses its place, and its grant if that comes at the same moment.
func TestLocks_WhoGoesAwayIsPassedOver(t *testing.T) {
	clock := &tickingClock{} // that stands: nobody is silent
	n := newWorld(t).start(func(d *Deps) { d.Elapsed = clock.elapsed })
	token := n.mustAcquire("x", "a", 0)
	ctx, cancel := context.WithCancel(t.Context())
	gone, next := make(chan error), make(chan uint64)
	go func() {
		_, err := n.acquire(ctx, "x", "b", time.Minute)
		gone <- err
	}()
	n.waiting("x", 1)
	go func() { next <- n.mustAcquire("x", "c", time.Minute) }()
	n.waiting("x", 2)
	cancel()
	if err := <-gone; !errors.Is(err, context.Canceled) {
		t.Errorf("a caller that went away: %v", err)
	}
	n.waiting("x", 1)
	n.mustRelease("x", token)
	token = <-next
	if over := n.mustAcquire("x", "d", time.Millisecond); over != 0 {
		t.Error("granted although it is held")
	}
	// Cancelled at about the moment of the grant.
	for i := range 50 {
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			time.AfterFunc(time.Duration(i)*10*time.Microsecond, cancel)
			token, _ := n.acquire(ctx, "x", "e", time.Minute)
			next <- token
		}()
		n.mustRelease("x", token)
		if got := <-next; got != 0 { // it was there in time
			n.mustRelease("x", got)
		}
		got := make(chan uint64, 1)
		go func() { got <- n.mustAcquire("x", "f", time.Minute) }()
		select {
		case token = <-got:
		case <-time.After(20 * time.Second):
			t.Fatal("a lock whose caller went away stays held")
		}
		cancel()
	}
}

// tickingClock is a monotonic clock that a test moves.
type tickingClock struct {
	mu  sync.Mutex
	now time.Duration
}

func (c *tickingClock) elapsed() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

// pass moves the clock in steps that no table takes for a standstill; before each
// one the sessions are named alive.
func (c *tickingClock) pass(n *node, d time.Duration, alive ...string) {
	n.world.t.Helper()
	for end := c.elapsed() + d; ; {
		// Locks of a session that nobody waits for keep every shard looking.
		if _, err := n.KeepLocks(n.world.t.Context(), &partitionv1.KeepLocksRequest{Sessions: alive}); err != nil {
			n.world.t.Fatal(err)
		}
		if c.elapsed() >= end {
			return
		}
		c.mu.Lock()
		c.now += min(lockTick, end-c.now)
		c.mu.Unlock()
	}
}

func TestLocks_ASilentSessionLosesThem(t *testing.T) {
	clock := &tickingClock{}
	n := newWorld(t).start(func(d *Deps) { d.Elapsed = clock.elapsed })
	token := n.mustAcquire("x", "silent", 0)
	next := make(chan uint64)
	go func() { next <- n.mustAcquire("x", "next", time.Minute) }()
	n.waiting("x", 1)
	clock.pass(n, lockGrace-time.Millisecond, "next")
	n.waiting("x", 1)
	clock.pass(n, time.Millisecond, "next")
	if got := <-next; got <= token {
		t.Errorf("token %d after %d", got, token)
	}
	if n.mustRelease("x", token) {
		t.Error("a token that was taken away released the lock")
	}
}

func TestLocks_SurviveTheirOwner(t *testing.T) {
	for name, end := range map[string]func(*world, *node){
		"stop":           func(_ *world, n *node) { n.stop() },
		"kill":           func(_ *world, n *node) { n.kill(0) },
		"stored,trimmed": func(w *world, n *node) { w.store.drain(t, w.log, 1000); w.store.trim(t, w.log); n.kill(0) },
		"partly stored":  func(w *world, n *node) { w.store.drain(t, w.log, 2); n.kill(0) },
	} {
		t.Run(name, func(t *testing.T) {
			w, clock := newWorld(t), &tickingClock{now: time.Hour}
			n := w.start()
			held := n.mustAcquire("held", "a", 0)
			freed := n.mustAcquire("freed", "a", 0)
			n.mustRelease("freed", freed)
			end(w, n)
			w.wall.set(-time.Hour)
			n = w.start(func(d *Deps) { d.Elapsed = clock.elapsed })
			if got := n.mustAcquire("freed", "b", 0); got <= freed {
				t.Errorf("token %d after %d", got, freed)
			}
			clock.pass(n, lockGrace-time.Millisecond)
			if got := n.mustAcquire("held", "b", 0); got != 0 {
				t.Error("the lock was given away within the grace time of the new owner")
			}
			if got := n.mustAcquire("held", "a", 0); got != held {
				t.Errorf("the holder gets token %d, want %d", got, held)
			}
			clock.pass(n, time.Hour-time.Millisecond, "a")
			if got := n.mustAcquire("held", "b", 0); got != 0 {
				t.Error("the lock was given away before its time was over")
			}
			clock.pass(n, time.Millisecond, "a")
			if got := n.mustAcquire("held", "b", 0); got <= held {
				t.Errorf("token %d after %d", got, held)
			}
		})
	}
}

func TestLocks_WhatCannotBeLoggedIsNotAnswered(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	token := n.mustAcquire("x", "a", 0)
	n.writer.mu.Lock()
	n.writer.dead = true
	n.writer.mu.Unlock()
	if got, err := n.acquire(t.Context(), "y", "a", 0); err == nil {
		t.Errorf("a grant that is not logged was answered, token %d", got)
	}
	n.stop()
	n = w.start()
	n.writer.mu.Lock()
	n.writer.dead = true
	n.writer.mu.Unlock()
	if _, err := n.ReleaseLock(t.Context(), &partitionv1.ReleaseLockRequest{Name: "x", FencingToken: token}); err == nil {
		t.Error("a release that is not logged was answered")
	}
	n.stop()
	n = w.start()
	if got := n.mustAcquire("x", "b", 0); got != 0 {
		t.Error("a release that was not logged freed the lock")
	}
}

func TestOWN01_AFencedOwnerGrantsNothing(t *testing.T) {
	w := newWorld(t)
	first := w.start()
	token := first.mustAcquire("x", "a", 0)
	waits := make(chan error)
	go func() {
		_, err := first.acquire(t.Context(), "x", "b", time.Minute)
		waits <- err
	}()
	first.waiting("x", 1)
	second := w.start()
	if got, err := first.acquire(t.Context(), "y", "a", time.Minute); err == nil {
		t.Errorf("a fenced owner granted a lock with token %d", got)
	}
	if err := <-waits; connect.CodeOf(err) != connect.CodeUnavailable {
		t.Errorf("who waited at the fenced owner is told %v", err)
	}
	if _, err := first.KeepLocks(t.Context(), &partitionv1.KeepLocksRequest{}); err == nil {
		t.Error("a fenced owner keeps locks")
	}
	if got := second.mustAcquire("x", "b", 0); got != 0 {
		t.Error("the second owner gave the lock away")
	}
	if !second.mustRelease("x", token) {
		t.Error("the second owner does not know the holder's token")
	}
}

func TestLocks_AFullLogRefuses(t *testing.T) {
	w := newWorldOf(t, commitlog.Config{Stream: "TOPGUN_LOG", MaxBytes: 2 * commitlog.MaxCommitBytes, Replicas: 1, Shards: shardCount})
	n := w.start()
	token := n.mustAcquire("x", "a", 0)
	big := string(make([]byte, 200<<10))
	for stuck := uint64(1); n.Ready() == nil; stuck++ {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		_, err := n.tryApply(ctx, put("k", big, stuck, "a"))
		cancel()
		_ = err // at last it is merged, and waits for the log
	}
	if _, err := n.acquire(t.Context(), "y", "a", 0); connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("acquire with a full log: %v", err)
	}
	if _, err := n.ReleaseLock(t.Context(), &partitionv1.ReleaseLockRequest{Name: "x", FencingToken: token}); connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("release with a full log: %v", err)
	}
	w.store.drain(t, w.log, 1000)
	w.store.trim(t, w.log)
	n.everything("m", 0) // waits for the log
	if !n.mustRelease("x", token) {
		t.Error("after the drain the holder cannot release")
	}
}

// A load that leaves no room in the lane delays requests, and refuses them in the
// end, but locks end in time.
func TestLocks_EndWithoutRoom(t *testing.T) {
	n := newWorld(t).start()
	resp, err := n.AcquireLock(t.Context(), &partitionv1.AcquireLockRequest{Name: "x", Session: "a", TtlMillis: 100})
	if err != nil || !resp.GetGranted() {
		t.Fatal(err)
	}
	next := make(chan uint64)
	go func() { next <- n.mustAcquire("x", "b", time.Minute) }()
	n.waiting("x", 1)
	all := n.config.MaxPendingBytes
	if err := n.room.Acquire(t.Context(), all); err != nil {
		t.Fatal(err)
	}
	if token := <-next; token <= resp.GetFencingToken() {
		t.Errorf("token %d after %d", token, resp.GetFencingToken())
	}
	if _, err := n.acquire(t.Context(), "y", "a", 0); connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("acquire without room: %v", err)
	}
	n.room.Release(all)
	n.mustAcquire("y", "a", 0)
}

func TestLocks_BadRequestsAreNamed(t *testing.T) {
	n := newWorld(t).start()
	ask := func(name, session string, ttl, wait uint64) *partitionv1.AcquireLockRequest {
		return &partitionv1.AcquireLockRequest{Name: name, Session: session, TtlMillis: ttl, WaitMillis: wait}
	}
	for name, req := range map[string]*partitionv1.AcquireLockRequest{
		"no name": ask("", "s", 1, 0), "long name": ask(strings.Repeat("x", 257), "s", 1, 0), "odd name": ask("a b", "s", 1, 0),
		"NUL": ask("a\x00", "s", 1, 0), "no session": ask("x", "", 1, 0), "long session": ask("x", strings.Repeat("s", 129), 1, 0),
		"no ttl": ask("x", "s", 0, 0), "long ttl": ask("x", "s", maxLockMillis+1, 0), "endless ttl": ask("x", "s", 1<<63, 0),
		"long wait": ask("x", "s", 1, maxLockMillis+1), "endless wait": ask("x", "s", 1, 1<<63), "empty": {},
	} {
		if _, err := n.AcquireLock(t.Context(), req); connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := n.ReleaseLock(t.Context(), &partitionv1.ReleaseLockRequest{Name: "*"}); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("release: %v", err)
	}
	for _, op := range []*partitionv1.Op{{Map: lockMap, Kind: typesv1.Kind_KIND_LOCK}, {Map: lockMap}, {Map: "m", Kind: typesv1.Kind_KIND_LOCK}} {
		op.Key, op.Record = []byte("x"), put("x", "v", 1, "a").GetRecord()
		if got := outcomeWords(n.apply(op)); got != "REJECTED" {
			t.Errorf("an op on the locks, kind %s: %s", op.GetKind(), got)
		}
	}
	if n.mustRelease("never", 0) || n.mustRelease("never", 1<<63) {
		t.Error("a lock that nobody ever had was released")
	}
	many := &partitionv1.KeepLocksRequest{Sessions: make([]string, maxKeepSessions+1)}
	if _, err := n.KeepLocks(t.Context(), many); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("keep: %v", err)
	}
	if got := n.mustAcquire(strings.Repeat("x", 256), strings.Repeat("s", 128), maxLockMillis*time.Millisecond); got == 0 || got > maxNumber {
		t.Errorf("token %d", got)
	}
}

func TestLOG07_AnUnreadableLockStopsTheStart(t *testing.T) {
	w := newWorld(t)
	w.store.records = map[string]*typesv1.Change{"x": {
		Kind: typesv1.Kind_KIND_LOCK, Map: lockMap, Key: []byte("x"), Arrival: &typesv1.Arrival{Millis: 1},
		Record: &typesv1.Record{Value: []byte{0xc0}, Timestamp: &typesv1.Timestamp{NodeId: "n"}},
	}}
	n, _ := w.begin(w.config())
	if err := n.wait(); !errors.Is(err, ErrUnreadable) {
		t.Errorf("Run: %v, want ErrUnreadable", err)
	}
}

// cluster is a service that is killed and started again, under sessions that take and
// give back locks.
type cluster struct {
	t    *testing.T
	mu   sync.RWMutex
	node *node

	believing sync.Mutex
	holders   map[string]belief
	start     time.Time
	grants    int
}

func (c *cluster) at() *node {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.node
}

func (c *cluster) now() time.Duration { return time.Since(c.start) }

// believe notes a grant: the session may rely on it until its request is as old as
// the lock's ttl, since the time cannot have begun before that.
func (c *cluster) believe(name string, b belief) {
	c.believing.Lock()
	defer c.believing.Unlock()
	c.grants++
	before := c.holders[name]
	if before.session != b.session && before.until > c.now() && b.until > c.now() {
		c.t.Errorf("%q: %s was granted token %d while %s relies on token %d", name, b.session, b.token, before.session, before.token)
	}
	if b.token < before.token || b.token == before.token && b.session != before.session {
		c.t.Errorf("%q: token %d of %s after token %d of %s", name, b.token, b.session, before.token, before.session)
	}
	if b.session == before.session && b.token == before.token {
		b.until = max(b.until, before.until)
	}
	c.holders[name] = b
}

// doubt ends a belief and reports whether it was still good.
func (c *cluster) doubt(name string, token uint64) bool {
	c.believing.Lock()
	defer c.believing.Unlock()
	b := c.holders[name]
	good := b.token == token && b.until > c.now()
	if b.token == token {
		b.until = 0
		c.holders[name] = b
	}
	return good
}

// session takes and gives back locks until it was granted as many as it wants.
func (c *cluster) session(id int, want int) {
	random := rand.New(rand.NewPCG(1, uint64(id)))
	name := fmt.Sprint("session", id)
	for granted := 0; granted < want; {
		n, lock := c.at(), fmt.Sprint("lock/", random.IntN(3))
		ttl := time.Duration(1+random.IntN(60)) * time.Millisecond
		if random.IntN(2) == 0 {
			ttl = time.Minute
		}
		wait := time.Minute // nobody may wait so long
		if random.IntN(3) == 0 {
			wait = time.Duration(random.IntN(10)) * time.Millisecond
		}
		ctx, cancel := context.WithCancel(context.Background())
		if random.IntN(5) == 0 {
			time.AfterFunc(time.Duration(random.IntN(5000))*time.Microsecond, cancel)
		}
		asked := c.now()
		resp, err := n.AcquireLock(ctx, &partitionv1.AcquireLockRequest{
			Name: lock, Session: name, TtlMillis: uint64(ttl.Milliseconds()), WaitMillis: uint64(wait.Milliseconds()),
		})
		cancel()
		if took := c.now() - asked; took > 50*time.Second {
			c.t.Errorf("a request waited %s", took)
		}
		if err != nil || !resp.GetGranted() {
			continue
		}
		granted++
		token := resp.GetFencingToken()
		c.believe(lock, belief{name, token, asked + ttl})
		if random.IntN(4) > 0 {
			time.Sleep(time.Duration(random.IntN(2000)) * time.Microsecond) // the work that the lock is for
		} else if ttl < time.Minute {
			continue // never released
		}
		good := c.doubt(lock, token)
		released, err := n.ReleaseLock(context.Background(), &partitionv1.ReleaseLockRequest{Name: lock, FencingToken: token})
		for err != nil { // the next owner must know the holder, unless the release reached the log
			released, err = c.at().ReleaseLock(context.Background(), &partitionv1.ReleaseLockRequest{Name: lock, FencingToken: token})
			good = false
		}
		if good && !released.GetReleased() {
			c.t.Errorf("%s could not release %q with token %d", name, lock, token)
		}
	}
}

// Many sessions over crashes, restarts and a wall clock that steps back: at no moment
// do two rely on the same lock, tokens only rise, and everybody who waits gets it.
func TestLocks_SessionsUnderCrashes(t *testing.T) {
	w := newWorld(t)
	c := &cluster{t: t, node: w.start(), holders: make(map[string]belief), start: time.Now()}
	const sessions = 8
	names := make([]string, sessions)
	var working, around sync.WaitGroup
	for i := range sessions {
		names[i] = fmt.Sprint("session", i)
		working.Go(func() { c.session(i, 25) })
	}
	done := make(chan struct{})
	around.Go(func() { // the gateway
		for ticker := time.NewTicker(100 * time.Millisecond); ; {
			select {
			case <-done:
				ticker.Stop()
				return
			case <-ticker.C:
				_, _ = c.at().KeepLocks(context.Background(), &partitionv1.KeepLocksRequest{Sessions: names})
			}
		}
	})
	around.Go(func() { // the faults
		for i := 0; ; i++ {
			select {
			case <-done:
				return
			case <-time.After(100 * time.Millisecond):
			}
			old := c.at()
			switch i % 4 {
			case 0:
				old.kill(1)
			case 1:
				old.stop()
			case 2:
				old.kill(0)
			case 3: // fenced by the next
			}
			w.wall.set(-time.Duration(i%2) * time.Hour)
			next := w.start()
			c.mu.Lock()
			c.node = next
			c.mu.Unlock()
			old.stop()
		}
	})
	working.Wait()
	close(done)
	around.Wait()
	if c.grants < sessions*25 {
		t.Errorf("%d grants", c.grants)
	}
	// The log tells the same: tokens of a name never fall, and change with the holder.
	last := make(map[string]lockRecord)
	for entry, err := range w.log.Read(t.Context(), 1, false) {
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range entry.Commit.GetChanges().GetShards() {
			for _, change := range s.GetChanges() {
				r, err := parseLock(change.GetRecord().GetValue())
				if err != nil {
					t.Fatal(err)
				}
				before := last[string(change.GetKey())]
				if r.token < before.token || r.session != "" && before.session != "" && r.session != before.session && r.token == before.token {
					t.Fatalf("the log has %+v after %+v", r, before)
				}
				last[string(change.GetKey())] = r
			}
		}
	}
	if len(last) != 3 {
		t.Errorf("the log knows %d locks, want 3", len(last))
	}
}
