package partition

import (
	"cmp"
	"container/heap"
	"container/list"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/topgun-sync/topgun/core/msgval"
)

// Bounds of locks (PROTOCOL 14.3, partition.proto).
const (
	// lockMap is the map that the changes of locks name.
	lockMap = "!locks"
	// lockGrace is how long a session keeps its locks without being named alive.
	lockGrace = 5 * time.Second
	// lockTick is how often sessions are looked at while there are any. A table that
	// was not touched for stallTicks of it was not running, so that its sessions could
	// not be heard either: they get the grace anew.
	lockTick   = time.Second
	stallTicks = 2
	// maxWaiters bounds those who wait for one lock, maxShardWaiters those of a shard;
	// who comes then is refused.
	maxWaiters      = 1000
	maxShardWaiters = 100_000
	// maxLockMillis is the longest a lock is granted for, and waited for.
	maxLockMillis = 86_400_000
	// maxLocks bounds the names of a shard; a request for another is refused.
	// maxFreeLocks of them may be free: then those that are free for longest are
	// forgotten, before their time.
	maxLocks     = 100_000
	maxFreeLocks = 50_000
	// freeLockMillis is how long a lock that nobody holds is remembered.
	freeLockMillis = 24 * 60 * 60 * 1000
	// tokenBits is how many tokens a millisecond has; maxTokenMillis keeps tokens to
	// 2^53, for some centuries.
	tokenBits      = 10
	maxTokenMillis = maxNumber>>tokenBits - 1
)

var (
	errManyWaiters = errors.New("too many wait for the lock, or for the locks of its shard: try again later")
	errManyLocks   = errors.New("there are too many locks: try again later")
	errNoTokens    = errors.New("the lock has no tokens left")
	errBadLock     = errors.New("a lock's value must be a msgpack map with a token of at most 2^53 and, if held, a session and a ttl")
)

// lock is one name. Its whole life, within its shard's goroutine:
//
//	             a request                    in the log, its caller there: told
//	unknown ─────────────────▶ granting ──────────────────────────────────▶ held ──┐ request of its session:
//	   ▲                        ▲  ▲  │                                      │ ▲    │ the same token, not shorter
//	   │ free for 24 h          │  │  │ caller gone                          │ └────┘
//	   │        a request       │  │  ▼                                      │
//	  free ─────────────────────┘  │ ended ◀─────────────────────────────────┘ released, ttl over,
//	   ▲                           │  │ │                                       session silent
//	   │                           └──┘ │
//	   │    somebody waits: next token  │
//	   └───────── nobody waits ─────────┘
//
// A free lock has no waiters. Every change of state but "told" is in the log before
// anybody hears of it.
//
// The holder's time is counted from when it is told, not from the grant: what a slow
// log takes is not the holder's loss. So a lock does not end while an answer is
// pending, and a restarted owner, which cannot know when the holder was told nor
// trust a wall clock about it, gives it the whole ttl again: never less than promised.
type lock struct {
	name    string
	token   uint64 // the highest there ever was; the holder's while there is one
	holder  *lockSession
	ttl     time.Duration // the longest promise: what a restarted owner grants anew
	until   time.Duration // when the promises given end
	pending int           // grants and extensions whose callers are not told yet
	told    int           // callers who were
	arrival arrival       // of the last change
	queue   list.List     // of *lockWaiter, first come first served

	place *list.Element // in the list of free locks
	index int           // in the heap plus one; 0: not in it
}

// over reports whether the holder's time is over.
func (l *lock) over(now time.Duration) bool {
	return l.holder != nil && l.pending == 0 && l.until <= now
}

// lockSession is a session that holds locks or waits for some.
type lockSession struct {
	name    string
	seen    time.Duration // when it last was named, or asked
	locks   map[*lock]struct{}
	waiters map[*lockWaiter]struct{}
	place   *list.Element // in the list of sessions
}

// lockWaiter is one request for a lock. The answer is set before answered is closed.
type lockWaiter struct {
	name, session string
	ttl           time.Duration
	queues        bool // whether it waits when the lock is held

	answered chan struct{}
	token    uint64 // of the grant; 0: not granted
	err      error  // why it was refused
	batch    *batch // the grant is in the log once it is

	// Of the table.
	lock  *lock
	owner *lockSession
	place *list.Element // in the lock's queue; nil when it does not wait
}

// lockChange is the state of one lock after a step, as it is logged.
type lockChange struct {
	name    string
	value   []byte // nil: pruned
	arrival arrival
}

// lockTable holds the locks of one shard. Only its shard's goroutine touches it. The
// methods are given the time of a monotonic clock and leave what they brought about
// in changes and answered, for the shard to log and to answer after.
type lockTable struct {
	// arrive gives the arrival of the next change.
	arrive func() arrival

	names    map[string]*lock
	sessions map[string]*lockSession
	bySeen   list.List // of *lockSession, the one not seen for longest first
	free     list.List // of *lock, the one free for longest first
	ending   lockHeap  // held locks of which nothing is pending, by until
	waiting  int

	touched time.Duration // when a method ran last
	awake   time.Duration // since when the table runs without a stall
	looked  time.Duration // when due ran last
	blocked bool          // sweep could not forget a free lock yet

	changes  []lockChange
	answered []*lockWaiter
}

func newLockTable(arrive func() arrival) *lockTable {
	return &lockTable{arrive: arrive, names: make(map[string]*lock), sessions: make(map[string]*lockSession)}
}

// load takes in a state that was logged before; an older one than what is there
// changes nothing. Call it before start.
func (t *lockTable) load(name string, r lockRecord, at arrival) {
	l := t.names[name]
	if l == nil {
		l = &lock{name: strings.Clone(name)}
		t.names[l.name] = l
	} else if at.compare(l.arrival) <= 0 {
		return
	}
	l.arrival, l.token, l.holder, l.ttl = at, r.token, nil, 0
	if r.session != "" {
		l.holder, l.ttl = &lockSession{name: strings.Clone(r.session)}, time.Duration(r.ttl)*time.Millisecond
	}
}

// loadPruned takes in that a lock was forgotten at an arrival.
func (t *lockTable) loadPruned(name string, at arrival) {
	if l := t.names[name]; l != nil && l.arrival.compare(at) < 0 {
		delete(t.names, name)
	}
}

// start ends the loading: holders get their whole ttl, and the grace, from now on.
func (t *lockTable) start(now time.Duration) {
	t.touched, t.awake, t.looked = now, now, now
	var free []*lock
	for _, l := range t.names {
		if l.holder == nil {
			free = append(free, l)
			continue
		}
		l.holder = t.session(l.holder.name, now)
		l.holder.locks[l] = struct{}{}
		l.until, l.told = now+l.ttl, 1
		heap.Push(&t.ending, l)
	}
	slices.SortFunc(free, func(a, b *lock) int { return a.arrival.compare(b.arrival) })
	for _, l := range free {
		l.place = t.free.PushBack(l)
	}
}

// touch notes that the table runs.
func (t *lockTable) touch(now time.Duration) {
	if now-t.touched > stallTicks*lockTick {
		t.awake = now
	}
	t.touched = now
}

// acquire answers a request, or lets it wait.
func (t *lockTable) acquire(now time.Duration, w *lockWaiter) {
	t.touch(now)
	l := t.names[w.name]
	if l != nil && l.over(now) {
		t.end(now, l)
	}
	if l == nil {
		if len(t.names) >= maxLocks {
			t.refuse(w, errManyLocks)
			return
		}
		l = &lock{name: strings.Clone(w.name)}
		t.names[l.name] = l
	}
	w.lock, w.owner = l, t.session(w.session, now)
	switch {
	case l.holder == nil:
		if !t.grant(now, l, w) {
			t.refuse(w, errNoTokens)
		}
	case l.holder == w.owner:
		if l.pending == 0 {
			l.ttl = l.until - now
			heap.Remove(&t.ending, l.index-1)
		}
		t.promise(l, w)
		t.record(l, t.arrive())
	case !w.queues:
		t.refuse(w, nil)
	case l.queue.Len() >= maxWaiters || t.waiting >= maxShardWaiters:
		t.refuse(w, errManyWaiters)
	default:
		w.place = l.queue.PushBack(w)
		w.owner.waiters[w] = struct{}{}
		t.waiting++
	}
}

// leave takes a request back whose caller waits no longer. One that was answered
// stays answered.
func (t *lockTable) leave(now time.Duration, w *lockWaiter) {
	t.touch(now)
	if w.place != nil {
		t.unqueue(w)
		t.refuse(w, nil)
	}
}

// settle is called once for every grant, when it is in the log, and reports whether
// the session holds the lock by it. With there being false the caller is gone: if
// nobody else was told of the lock, it is over.
func (t *lockTable) settle(now time.Duration, w *lockWaiter, there bool) bool {
	t.touch(now)
	l := w.lock
	if l.holder == nil || l.token != w.token {
		return false // released or lost in the meantime
	}
	l.pending--
	if there {
		l.until = max(l.until, now+w.ttl)
		l.told++
	}
	if l.pending == 0 {
		heap.Push(&t.ending, l)
	}
	return there
}

// retract takes back that a caller was told of a grant, since it was gone by then. If
// nobody else was, the lock is over.
func (t *lockTable) retract(now time.Duration, w *lockWaiter) {
	t.touch(now)
	l := w.lock
	if l.holder == nil || l.token != w.token {
		return
	}
	if l.told--; l.told > 0 {
		return
	}
	if l.until = now; l.pending == 0 {
		heap.Fix(&t.ending, l.index-1)
	}
}

// release takes the lock from its holder, if the token is the holder's.
func (t *lockTable) release(now time.Duration, name string, token uint64) bool {
	t.touch(now)
	l := t.names[name]
	if l == nil || l.holder == nil || l.token != token {
		return false
	}
	t.end(now, l)
	return true
}

// keep notes that sessions are alive.
func (t *lockTable) keep(now time.Duration, sessions []string) {
	t.touch(now)
	for _, name := range sessions {
		if s := t.sessions[name]; s != nil {
			t.see(s, now)
		}
	}
}

// due reports whether sweep has something to do. It is to be asked after wake.
func (t *lockTable) due(now time.Duration, wall uint64) bool {
	t.touch(now)
	t.looked = now
	return len(t.ending) > 0 && t.ending[0].over(now) || t.lost(now) != nil || t.stale(wall) != nil
}

// sweep ends locks whose time is over or whose session is gone, and forgets free
// ones: about budget changes. wall is the wall clock's reading in milliseconds.
func (t *lockTable) sweep(now time.Duration, wall uint64, budget int) {
	t.touch(now)
	for len(t.changes) < budget && len(t.ending) > 0 && t.ending[0].over(now) {
		t.end(now, t.ending[0])
	}
	for s := t.lost(now); s != nil && len(t.changes) < budget; s = t.lost(now) {
		for w := range s.waiters {
			t.unqueue(w)
			t.refuse(w, nil)
		}
		for l := range s.locks {
			if t.end(now, l); len(t.changes) >= budget {
				break
			}
		}
	}
	t.blocked = false
	for l := t.stale(wall); l != nil && len(t.changes) < budget; l = t.stale(wall) {
		at := t.arrive()
		if min(at.millis, maxTokenMillis)<<tokenBits <= l.token {
			t.blocked = true // the name's next token, made from the clock alone, must be greater
			return
		}
		t.free.Remove(l.place)
		delete(t.names, l.name)
		t.changes = append(t.changes, lockChange{name: l.name, arrival: at})
	}
}

// wake is how long due may wait to be asked, at most most.
func (t *lockTable) wake(now time.Duration, wall uint64, most time.Duration) time.Duration {
	switch {
	case t.stale(wall) != nil && !t.blocked:
		return 0
	case len(t.sessions) > 0 || t.blocked:
		most = min(most, t.looked+lockTick-now)
	}
	if len(t.ending) > 0 {
		most = min(most, t.ending[0].until-now)
	}
	return max(most, 0)
}

// lost returns a session that is not alive any more, or nil.
func (t *lockTable) lost(now time.Duration) *lockSession {
	if first := t.bySeen.Front(); first != nil {
		if s := first.Value.(*lockSession); !t.alive(s, now) {
			return s
		}
	}
	return nil
}

func (t *lockTable) alive(s *lockSession, now time.Duration) bool {
	return now-max(s.seen, t.awake) < lockGrace
}

// stale returns a free lock that is to be forgotten, or nil.
func (t *lockTable) stale(wall uint64) *lock {
	if first := t.free.Front(); first != nil {
		if l := first.Value.(*lock); t.free.Len() > maxFreeLocks || l.arrival.millis+freeLockMillis < wall {
			return l
		}
	}
	return nil
}

// session returns the session of a name, seen now.
func (t *lockTable) session(name string, now time.Duration) *lockSession {
	s := t.sessions[name]
	if s == nil {
		s = &lockSession{name: strings.Clone(name), locks: make(map[*lock]struct{}), waiters: make(map[*lockWaiter]struct{})}
		t.sessions[s.name] = s
		s.place = t.bySeen.PushBack(s)
	}
	t.see(s, now)
	return s
}

func (t *lockTable) see(s *lockSession, now time.Duration) {
	s.seen = now
	t.bySeen.MoveToBack(s.place)
}

// forget drops a session that neither holds nor waits.
func (t *lockTable) forget(s *lockSession) {
	if len(s.locks) == 0 && len(s.waiters) == 0 && t.sessions[s.name] == s {
		t.bySeen.Remove(s.place)
		delete(t.sessions, s.name)
	}
}

// grant gives a free lock to a request, and to others of the same session that wait
// for it. It returns false if there is no token left.
func (t *lockTable) grant(now time.Duration, l *lock, w *lockWaiter) bool {
	at := t.arrive()
	token := max(l.token+1, min(at.millis, maxTokenMillis)<<tokenBits)
	if token > maxNumber {
		return false
	}
	if l.place != nil {
		t.free.Remove(l.place)
		l.place = nil
	}
	l.token, l.holder, l.ttl, l.until, l.pending, l.told = token, w.owner, 0, now, 0, 0
	l.holder.locks[l] = struct{}{}
	t.promise(l, w)
	for other := range w.owner.waiters {
		if other.lock == l {
			t.unqueue(other)
			t.promise(l, other)
		}
	}
	t.record(l, at)
	return true
}

// promise answers a request with the holder's token.
func (t *lockTable) promise(l *lock, w *lockWaiter) {
	l.pending++
	l.ttl = max(l.ttl, w.ttl)
	w.token = l.token
	t.answered = append(t.answered, w)
}

// refuse answers a request with no grant, because of err or because its wait is over.
func (t *lockTable) refuse(w *lockWaiter, err error) {
	w.err = err
	t.answered = append(t.answered, w)
	if w.owner != nil {
		t.forget(w.owner)
	}
}

func (t *lockTable) unqueue(w *lockWaiter) {
	w.lock.queue.Remove(w.place)
	w.place = nil
	delete(w.owner.waiters, w)
	t.waiting--
}

// end takes a lock from its holder and gives it to the next who waits.
func (t *lockTable) end(now time.Duration, l *lock) {
	before := l.holder
	delete(before.locks, l)
	l.holder = nil
	if l.index > 0 {
		heap.Remove(&t.ending, l.index-1)
	}
	defer t.forget(before)
	for l.queue.Len() > 0 {
		w := l.queue.Front().Value.(*lockWaiter)
		t.unqueue(w)
		switch {
		case !t.alive(w.owner, now):
			t.refuse(w, nil)
		case t.grant(now, l, w):
			return
		default:
			t.refuse(w, errNoTokens)
		}
	}
	l.place = t.free.PushBack(l)
	t.record(l, t.arrive())
}

// record notes the state of a lock for the log.
func (t *lockTable) record(l *lock, at arrival) {
	l.arrival = at
	r := lockRecord{token: l.token}
	if l.holder != nil {
		r.session = l.holder.name
		r.ttl = uint64((l.ttl + time.Millisecond - 1) / time.Millisecond)
	}
	t.changes = append(t.changes, lockChange{name: l.name, value: r.encode(), arrival: at})
}

// lockRecord is the value of a lock in log and store: a msgpack map
//
//	{"token": uint}                                    free, or
//	{"token": uint, "session": str, "ttl": uint}       held
//
// token is the highest that the name ever had, session the holder, ttl the longest
// time in milliseconds that the holder was promised from the change on. A reader
// skips fields that it does not know.
type lockRecord struct {
	token   uint64
	session string // empty: free
	ttl     uint64
}

func (r lockRecord) encode() []byte {
	n := 1
	if r.session != "" {
		n = 3
	}
	b := msgval.AppendMapHeader(make([]byte, 0, 32+len(r.session)), n)
	b = msgval.AppendUint(msgval.AppendString(b, "token"), r.token)
	if r.session != "" {
		b = msgval.AppendString(msgval.AppendString(b, "session"), r.session)
		b = msgval.AppendUint(msgval.AppendString(b, "ttl"), r.ttl)
	}
	return b
}

// parseLock reads the value of a lock; what it returns is bounded.
func parseLock(value []byte) (lockRecord, error) {
	rest, err := msgval.Check(value)
	head, ok := msgval.ReadHead(value)
	if err != nil || len(rest) > 0 || !ok || head.Kind != msgval.MapKind {
		return lockRecord{}, errBadLock
	}
	var r lockRecord
	seen := false
	value = value[head.Size:]
	for range head.N {
		name, after := takeHead(value)
		of, rest := takeHead(after)
		switch string(name.text) {
		case "token":
			r.token, seen = of.Num, of.Kind == msgval.UintKind && of.Num <= maxNumber
			if !seen {
				return lockRecord{}, errBadLock
			}
		case "session":
			r.session = string(of.text)
		case "ttl":
			r.ttl = min(of.Num, maxLockMillis)
		}
		value = rest
	}
	if !seen || len(r.session) > maxOrigin || r.session != "" && r.ttl == 0 {
		return lockRecord{}, errBadLock
	}
	return r, nil
}

// field is the head of a value and, if it is a string, its text.
type field struct {
	msgval.Head
	text []byte
}

// takeHead splits the first value off; the bytes were checked.
func takeHead(b []byte) (field, []byte) {
	head, _ := msgval.ReadHead(b)
	f := field{Head: head}
	if head.Kind == msgval.StrKind {
		f.text = b[head.Size : head.Size+int(head.N)]
	}
	return f, b[msgval.Skip(b):]
}

// lockHeap orders held locks by when they end. Each knows its place.
type lockHeap []*lock

func (h lockHeap) Len() int { return len(h) }
func (h lockHeap) Less(i, j int) bool {
	return cmp.Or(cmp.Compare(h[i].until, h[j].until), strings.Compare(h[i].name, h[j].name)) < 0
}

func (h lockHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i+1, j+1
}

// Push is for package heap.
func (h *lockHeap) Push(x any) {
	l := x.(*lock)
	*h = append(*h, l)
	l.index = len(*h)
}

// Pop is for package heap.
func (h *lockHeap) Pop() any {
	last := len(*h) - 1
	l := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	l.index = 0
	return l
}
