package gateway

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/topgun-sync/topgun/core/keyspace"
	"github.com/topgun-sync/topgun/core/wire"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/partition/v1/partitionv1connect"
)

const (
	// maxLocks bounds the locks that one session holds or waits for, and its releases
	// under way. They do not count as requests in flight: a lock may be waited for long.
	maxLocks = 256
	// clientGrace and lockMargin: a client gives up a request after max(ttl+5 s, 5 s), and
	// ignores a grant from then on (PROTOCOL 14.3). The wait ends a second earlier.
	clientGrace = 5 * time.Second
	lockMargin  = time.Second
	// maxLockWait is the most that the owner of a lock takes.
	maxLockWait = 24 * time.Hour
	// releaseTimeout bounds a release, which a client waits 5 s for.
	releaseTimeout = 4 * time.Second
	// keepEvery is how often owners of locks are told which sessions are alive. One that
	// was not named for 5 s loses its locks.
	keepEvery = time.Second
	// maxKept is the most sessions that one call names.
	maxKept = 100_000
)

// locks are the locks of a session. The session's mu guards them.
type locks struct {
	waiting map[string]int           // requests under way, by lock
	held    map[string]grant         // by lock
	frees   map[string]chan struct{} // the last release under way; closed when it is over
	pending int                      // requests and releases under way
}

// grant is a lock that was granted.
type grant struct {
	token   uint64
	expires time.Time // as far as the gateway knows, a little late
}

var tooManyLocks = &wire.Error{
	Name: "TOO_MANY_LOCKS", Code: 429, Text: "this connection holds and waits for as many locks as it may; release some or use another one",
}

// forgetLocked drops the grants that have expired.
func (l *locks) forgetLocked(now time.Time) {
	for name, g := range l.held {
		if now.After(g.expires) {
			delete(l.held, name)
		}
	}
}

func (l *locks) idleLocked() bool { return len(l.waiting) == 0 && len(l.held) == 0 }

// names returns the locks that the session holds or waits for.
func (l *locks) namesLocked() []string {
	names := make([]string, 0, len(l.waiting)+len(l.held))
	for name := range l.waiting {
		names = append(names, name)
	}
	for name := range l.held {
		if l.waiting[name] == 0 {
			names = append(names, name)
		}
	}
	return names
}

// lockRequested takes a LOCK_REQUEST. It is answered with LOCK_GRANTED or, if it can
// never be, with ERROR; when the wait is over nothing is sent, for the protocol has no
// message that says so. LOCK_RELEASED is no answer: a client takes it for a grant.
func (s *session) lockRequested(m *wire.LockRequest) error {
	if m.Err != nil {
		return s.decline(m.Err)
	}
	s.mu.Lock()
	s.locks.forgetLocked(s.k.now())
	if s.locks.pending+len(s.locks.held) >= maxLocks {
		s.mu.Unlock()
		return s.decline(tooManyLocks)
	}
	after := s.locks.frees[m.Name]
	ok := s.closing == nil && s.spawnLocked(func() { s.awaitLock(m, after) })
	if ok {
		if s.locks.waiting == nil {
			s.locks.waiting = make(map[string]int)
		}
		s.locks.waiting[m.Name]++
		s.locks.pending++
	}
	s.mu.Unlock()
	if ok {
		s.k.keeper.add(s)
	}
	return nil
}

// awaitLock waits for a lock. The wait begins when a release of it that came before is
// over, or the release would end the lock that is granted here.
func (s *session) awaitLock(m *wire.LockRequest, after <-chan struct{}) {
	ttl := time.Duration(m.TTLMillis) * time.Millisecond
	ctx, cancel := context.WithTimeout(s.ctx, ttl+clientGrace-lockMargin)
	defer cancel()
	var token uint64
	granted, err := false, error(nil)
	if s.waitFor(after) {
		token, granted, err = s.k.router.AcquireLock(ctx, m.Name, s.origin, ttl)
	}
	s.mu.Lock()
	s.locks.pending--
	if s.locks.waiting[m.Name]--; s.locks.waiting[m.Name] == 0 {
		delete(s.locks.waiting, m.Name)
	}
	gone := s.closing != nil
	if granted && !gone {
		if s.locks.held == nil {
			s.locks.held = make(map[string]grant)
		}
		s.locks.held[strings.Clone(m.Name)] = grant{token: token, expires: s.k.now().Add(ttl)}
	}
	s.mu.Unlock()
	switch {
	case granted && gone:
		s.k.keeper.free(m.Name, token)
	case granted:
		s.sendReply(&wire.LockGranted{RequestID: m.RequestID, Name: m.Name, FencingToken: token})
	case err != nil && s.ctx.Err() == nil:
		s.send(urgent, &wire.ErrorMessage{Code: 503, Message: "UNAVAILABLE: the owner of the lock cannot be reached; ask for the lock again"})
	}
}

// lockReleased takes a LOCK_RELEASE. It is always answered with LOCK_RELEASED.
func (s *session) lockReleased(m *wire.LockRelease) error {
	if m.Err != nil {
		s.send(urgent, &wire.LockReleased{RequestID: m.RequestID, Name: m.Name})
		return s.decline(m.Err)
	}
	done := make(chan struct{})
	s.mu.Lock()
	if s.locks.pending >= maxLocks {
		s.mu.Unlock()
		s.send(urgent, &wire.LockReleased{RequestID: m.RequestID, Name: m.Name})
		return s.decline(tooManyLocks)
	}
	if s.closing == nil && s.spawnLocked(func() { s.freeLock(m, done) }) {
		s.locks.pending++
		if s.locks.frees == nil {
			s.locks.frees = make(map[string]chan struct{})
		}
		s.locks.frees[m.Name] = done
	}
	s.mu.Unlock()
	return nil
}

func (s *session) freeLock(m *wire.LockRelease, done chan struct{}) {
	ctx, cancel := context.WithTimeout(s.k.base, releaseTimeout) // also when the session ends meanwhile
	released, err := s.k.router.ReleaseLock(ctx, m.Name, m.FencingToken)
	cancel()
	s.mu.Lock()
	s.locks.pending--
	if s.locks.held[m.Name].token == m.FencingToken && err == nil {
		delete(s.locks.held, m.Name)
	}
	s.mu.Unlock()
	s.sendReply(&wire.LockReleased{RequestID: m.RequestID, Name: m.Name, Success: released})
	// From here on the grant of a further request comes behind the answer.
	s.mu.Lock()
	if s.locks.frees[m.Name] == done {
		delete(s.locks.frees, m.Name)
	}
	s.mu.Unlock()
	close(done)
	if err != nil && s.ctx.Err() == nil {
		s.send(urgent, &wire.ErrorMessage{Code: 503, Message: "UNAVAILABLE: the owner of the lock cannot be reached; the lock lasts until its ttl is over"})
	}
}

// keeper tells the owners of locks which sessions that hold or wait for one are alive.
// Past the grace time owners free the locks of sessions that are named no more, whether
// those ended or their gateway died.
type keeper struct {
	k *sockets

	mu       sync.Mutex
	sessions map[*session]struct{} // those with locks
}

func newKeeper(k *sockets) *keeper {
	return &keeper{k: k, sessions: make(map[*session]struct{})}
}

func (p *keeper) add(s *session) {
	p.mu.Lock()
	p.sessions[s] = struct{}{}
	p.mu.Unlock()
}

// left has a session that has ended named no more. Its waiting requests end with its
// context; what it holds lasts for the grace time, in which its client may come back
// and give it back properly.
func (p *keeper) left(s *session) {
	p.mu.Lock()
	delete(p.sessions, s)
	p.mu.Unlock()
}

// free gives back a lock that nobody was told of, as far as its owner can be reached;
// without waiting.
func (p *keeper) free(name string, token uint64) {
	p.k.wg.Go(func() { // a session of k.wg calls this, so k.wg is not 0
		ctx, cancel := context.WithTimeout(p.k.base, releaseTimeout)
		defer cancel()
		// On failure: the session is named no more, so its owner frees the lock.
		_, _ = p.k.router.ReleaseLock(ctx, name, token)
	})
}

// run names the sessions with locks to the owners until ctx ends.
func (p *keeper) run(ctx context.Context) {
	ticker := time.NewTicker(keepEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if byLock := p.alive(p.k.now()); len(byLock) > 0 {
			call, cancel := context.WithTimeout(ctx, 2*keepEvery)
			p.k.router.KeepLocks(call, byLock)
			cancel()
		}
	}
}

// alive returns the sessions that hold or wait for locks, by lock.
func (p *keeper) alive(now time.Time) map[string][]string {
	p.mu.Lock()
	defer p.mu.Unlock()
	byLock := make(map[string][]string)
	for s := range p.sessions {
		s.mu.Lock()
		s.locks.forgetLocked(now)
		if s.locks.idleLocked() {
			delete(p.sessions, s)
		}
		for _, name := range s.locks.namesLocked() {
			byLock[name] = append(byLock[name], s.origin)
		}
		s.mu.Unlock()
	}
	return byLock
}

// atOwner asks the owner of a key, again while it is away or the shard has moved, until
// ctx ends.
func atOwner[T any](ctx context.Context, r *router, key string,
	call func(ctx context.Context, client partitionv1connect.PartitionServiceClient) (T, error),
) (answer T, err error) {
	table, err := r.owners(ctx)
	for attempt := 0; ; attempt++ {
		if err == nil {
			if owner := table.peers[keyspace.ShardOf(key, len(table.peers))]; owner != nil {
				if answer, err = call(ctx, owner.client); err == nil || !worthRetrying(err) {
					return answer, err
				}
			}
		}
		if !r.pause(ctx, attempt, 0) {
			return answer, errUnavailable
		}
		table, err = r.learn(ctx)
	}
}

// AcquireLock waits until a session holds a lock, or until shortly before the deadline
// that ctx needs to have.
func (r *router) AcquireLock(ctx context.Context, name, session string, ttl time.Duration) (token uint64, granted bool, err error) {
	answer, err := atOwner(ctx, r, name, func(ctx context.Context, client partitionv1connect.PartitionServiceClient) (*partitionv1.AcquireLockResponse, error) {
		deadline, _ := ctx.Deadline()
		wait := min(time.Until(deadline)-lockMargin/2, maxLockWait) // the rest is for the answer
		return client.AcquireLock(ctx, &partitionv1.AcquireLockRequest{
			Name: name, Session: session, TtlMillis: uint64(ttl.Milliseconds()), WaitMillis: uint64(max(wait, 0).Milliseconds()),
		})
	})
	if err != nil {
		return 0, false, err
	}
	return answer.FencingToken, answer.Granted, nil
}

// ReleaseLock gives a lock back, and reports whether the token was the holder's.
func (r *router) ReleaseLock(ctx context.Context, name string, token uint64) (released bool, err error) {
	answer, err := atOwner(ctx, r, name, func(ctx context.Context, client partitionv1connect.PartitionServiceClient) (*partitionv1.ReleaseLockResponse, error) {
		return client.ReleaseLock(ctx, &partitionv1.ReleaseLockRequest{Name: name, FencingToken: token})
	})
	if err != nil {
		return false, err
	}
	return answer.Released, nil
}

// KeepLocks tells each owner which sessions that hold or wait for its locks are alive. An
// owner that is away is told the next time; it gives them the grace time anew.
func (r *router) KeepLocks(ctx context.Context, byLock map[string][]string) {
	table, err := r.owners(ctx)
	if err != nil {
		return
	}
	perPeer := make([]map[string]struct{}, len(r.peers))
	for name, sessions := range byLock {
		owner := table.peers[keyspace.ShardOf(name, len(table.peers))]
		if owner == nil {
			continue
		}
		if perPeer[owner.index] == nil {
			perPeer[owner.index] = make(map[string]struct{})
		}
		for _, session := range sessions {
			perPeer[owner.index][session] = struct{}{}
		}
	}
	var wg sync.WaitGroup
	for i, alive := range perPeer {
		if len(alive) == 0 {
			continue
		}
		wg.Go(func() {
			all := make([]string, 0, len(alive))
			for session := range alive {
				all = append(all, session)
			}
			for page := range slices.Chunk(all, maxKept) {
				if _, err := r.peers[i].client.KeepLocks(ctx, &partitionv1.KeepLocksRequest{Sessions: page}); err != nil && ctx.Err() == nil {
					r.log.Warn("an owner of locks did not hear which sessions are alive", "error", err)
					return
				}
			}
		})
	}
	wg.Wait()
}
