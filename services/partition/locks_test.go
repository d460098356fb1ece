package partition

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/topgun-sync/topgun/core/msgval"
)

// lockWorld drives a lock table without a service: its clocks, its log, its callers,
// and what the sessions believe.
type lockWorld struct {
	rt       rapid.TB
	now      time.Duration
	wall     uint64
	arrivals *arrivalClock
	table    *lockTable

	log     []lockChange
	pending []lockStepped // not in the log yet

	asked   int
	order   map[*lockWaiter]int // of requests that wait, in the order they came
	granted []*lockWaiter       // in the log, not settled
	tokens  map[string]uint64   // the newest logged of each name
	newest  map[string]uint64   // the newest given
	heard   map[string]time.Duration
	gone    func() bool         // whether a caller went away at the very last moment
	beliefs map[string][]belief // by lock
}

// lockStepped is what one step left behind.
type lockStepped struct {
	changes []lockChange
	granted []*lockWaiter
}

// belief is what a session was told, and may rely on while it is being kept.
type belief struct {
	session string
	token   uint64
	until   time.Duration
}

func newLockWorld(rt rapid.TB) *lockWorld {
	w := &lockWorld{
		rt: rt, wall: 1 << 40, arrivals: new(arrivalClock), order: make(map[*lockWaiter]int),
		tokens: make(map[string]uint64), heard: make(map[string]time.Duration), beliefs: make(map[string][]belief),
	}
	w.restart()
	return w
}

func (w *lockWorld) arrive() arrival { return w.arrivals.next(w.wall) }

// restart is a crash: what is not in the log is gone, and so are those who wait.
func (w *lockWorld) restart() {
	w.arrivals = new(arrivalClock)
	w.table = newLockTable(w.arrive)
	w.pending, w.granted = nil, nil
	w.newest = maps.Clone(w.tokens)
	clear(w.order)
	for _, c := range w.log {
		w.arrivals.raise(c.arrival)
		w.load(w.table, c)
	}
	w.table.start(w.now)
}

func (w *lockWorld) load(t *lockTable, c lockChange) {
	if c.value == nil {
		t.loadPruned(c.name, c.arrival)
		return
	}
	r, err := parseLock(c.value)
	if err != nil {
		w.rt.Fatal(err)
	}
	t.load(c.name, r, c.arrival)
}

// step does what a shard does around one step, but for the log.
func (w *lockWorld) step(do func(t *lockTable)) {
	do(w.table)
	s := lockStepped{changes: slices.Clone(w.table.changes)}
	var first *lockWaiter
	for _, a := range w.table.answered {
		place, waited := w.order[a]
		delete(w.order, a)
		if a.token == 0 {
			continue
		}
		s.granted = append(s.granted, a)
		if first == nil || first.name != a.name {
			first = a
			if again := a.token == w.newest[a.name]; !waited && again {
				continue // the holder asked again
			}
			for other, at := range w.order {
				if other.name == a.name && (!waited || at < place) && w.table.alive(other.owner, w.now) {
					w.rt.Fatalf("request %d for %q was granted before request %d", place, a.name, at)
				}
			}
			w.newest[a.name] = a.token
		} else if a.session != first.session || a.token != first.token {
			w.rt.Fatal("one step granted a lock to two sessions")
		}
	}
	w.table.changes, w.table.answered = nil, nil
	if len(s.changes) > 0 || len(s.granted) > 0 {
		w.pending = append(w.pending, s)
	}
	free := 0
	for name, l := range w.table.names {
		if l.holder == nil {
			free++
		}
		if l.holder == nil && l.queue.Len() > 0 {
			w.rt.Fatalf("the lock %q is free and %d wait for it", name, l.queue.Len())
		}
	}
	if free != w.table.free.Len() {
		w.rt.Fatalf("%d locks are free, %d are listed", free, w.table.free.Len())
	}
}

// logged puts the oldest n steps into the log.
func (w *lockWorld) logged(n int) {
	for _, s := range w.pending[:n] {
		for _, c := range s.changes {
			w.log = append(w.log, c)
			if c.value == nil {
				continue
			}
			r, err := parseLock(c.value)
			if err != nil {
				w.rt.Fatal(err)
			}
			if before := w.tokens[c.name]; r.token < before || r.token > maxNumber {
				w.rt.Fatalf("token %d of %q after %d", r.token, c.name, before)
			}
			w.tokens[c.name] = r.token
		}
		w.granted = append(w.granted, s.granted...)
	}
	w.pending = w.pending[n:]
}

// settle answers the callers of logged grants.
func (w *lockWorld) settle(there func() bool) {
	for _, g := range w.granted {
		here := there()
		w.step(func(t *lockTable) {
			if !t.settle(w.now, g, here) {
				return
			}
			if w.gone != nil && w.gone() {
				t.retract(w.now, g)
			} else {
				w.beliefs[g.name] = append(w.beliefs[g.name], belief{g.session, g.token, w.now + g.ttl})
			}
		})
	}
	w.granted = nil
	w.check()
}

// valid is what a session may rely on at present.
func (w *lockWorld) valid(name string) []belief {
	return slices.DeleteFunc(slices.Clone(w.beliefs[name]), func(b belief) bool {
		return b.until <= w.now || w.now-w.heard[b.session] >= lockGrace
	})
}

// hear notes that the sessions are named alive. Those that were not for the grace
// time rely on nothing from before.
func (w *lockWorld) hear(sessions ...string) {
	for name := range w.beliefs {
		w.beliefs[name] = w.valid(name)
	}
	for _, s := range sessions {
		w.heard[s] = w.now
	}
}

// check checks that no two sessions may rely on the same lock, and that the table
// agrees with those who rely on it.
func (w *lockWorld) check() {
	for name := range w.beliefs {
		for _, b := range w.valid(name) {
			l := w.table.names[name]
			if l == nil || l.holder == nil || l.holder.name != b.session || l.token != b.token {
				w.rt.Fatalf("%s relies on %q with token %d until %s, and does not hold it at %s", b.session, name, b.token, b.until, w.now)
			}
		}
	}
}

// pass lets time pass as a shard does: it looks at the table when it asked to be.
func (w *lockWorld) pass(d time.Duration) {
	end := w.now + d
	for {
		next := w.table.wake(w.now, w.wall, time.Minute)
		if w.now+next > end {
			w.wall += uint64((end - w.now).Milliseconds())
			w.now = end
			break
		}
		w.wall += uint64(next.Milliseconds())
		w.now += next
		w.check()
		if w.table.due(w.now, w.wall) {
			w.step(func(t *lockTable) { t.sweep(w.now, w.wall, 3) })
		}
	}
	for _, l := range w.table.names {
		if l.over(w.now - 1) {
			w.rt.Fatalf("the lock %q was over at %s, and is held at %s", l.name, l.until, w.now)
		}
	}
	for _, s := range w.table.sessions {
		if !w.table.alive(s, w.now-lockTick-1) {
			w.rt.Fatalf("session %s was heard of at %s, and is there at %s", s.name, s.seen, w.now)
		}
	}
	w.check()
}

func (w *lockWorld) ask(name, session string, ttl time.Duration, queues bool) *lockWaiter {
	a := &lockWaiter{name: name, session: session, ttl: ttl, queues: queues}
	w.hear(session)
	w.step(func(t *lockTable) { t.acquire(w.now, a) })
	if w.asked++; a.place != nil {
		w.order[a] = w.asked
	}
	return a
}

var (
	lockNames    = []string{"x", "y", "z/1"}
	lockSessions = []string{"s1", "s2", "s3", "s4"}
)

// Any history of requests, releases, time, silence, crashes and clocks that step
// back: whoever relies on a lock holds it, nobody else does, tokens only rise, first
// come is first served, and nobody waits for a free lock.
func TestLocks_AnyHistoryKeepsThemExclusive(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		w := newLockWorld(rt)
		w.gone = func() bool { return rapid.IntRange(0, 4).Draw(rt, "gone") == 0 }
		for range rapid.IntRange(1, 60).Draw(rt, "steps") {
			name := rapid.SampledFrom(lockNames).Draw(rt, "lock")
			session := rapid.SampledFrom(lockSessions).Draw(rt, "session")
			switch rapid.IntRange(0, 11).Draw(rt, "step") {
			case 0, 1, 2:
				ttl := time.Duration(rapid.IntRange(1, 20_000).Draw(rt, "ttl")) * time.Millisecond
				w.ask(name, session, ttl, rapid.IntRange(0, 3).Draw(rt, "queues") > 0)
			case 3: // somebody leaves
				for _, a := range slices.SortedFunc(maps.Keys(w.order), func(a, b *lockWaiter) int { return w.order[a] - w.order[b] }) {
					if a.session == session {
						w.step(func(t *lockTable) { t.leave(w.now, a) })
						break
					}
				}
			case 4, 5: // who relies on a lock gives it back, and then relies on it no longer
				for _, b := range w.valid(name) {
					w.beliefs[name] = slices.DeleteFunc(w.beliefs[name], func(other belief) bool { return other.token == b.token })
					w.step(func(t *lockTable) {
						if !t.release(w.now, name, b.token) {
							rt.Fatal("a holder could not give its lock back")
						}
					})
					break
				}
			case 6:
				w.step(func(t *lockTable) {
					if t.release(w.now, name, w.newest[name]+1) {
						rt.Fatal("a lock was released with a token that nobody has")
					}
				})
			case 7:
				w.logged(rapid.IntRange(0, len(w.pending)).Draw(rt, "logged"))
			case 8:
				w.settle(func() bool { return rapid.IntRange(0, 3).Draw(rt, "there") > 0 })
			case 9:
				kept := lockSessions[rapid.IntRange(0, 3).Draw(rt, "kept"):]
				w.hear(kept...)
				w.step(func(t *lockTable) { t.keep(w.now, kept) })
			case 10:
				w.pass(time.Duration(rapid.IntRange(1, 7000).Draw(rt, "pass")) * time.Millisecond)
			case 11:
				switch rapid.IntRange(0, 3).Draw(rt, "what") {
				case 0:
					w.restart()
				case 1:
					w.wall -= 3_600_000
				case 2:
					w.wall += 3_600_000
				case 3: // the process stands still, and hears nobody
					d := time.Duration(rapid.IntRange(1, 60_000).Draw(rt, "stalled")) * time.Millisecond
					w.now += d
					w.wall += uint64(d.Milliseconds())
				}
				w.check()
			}
		}
		// A table made from the log alone is the same.
		w.logged(len(w.pending))
		other := newLockTable(w.arrive)
		for _, c := range w.log {
			w.load(other, c)
		}
		if got, want := lockDump(other), lockDump(w.table); got != want {
			rt.Fatalf("the log says\n%s\nthe table is\n%s", got, want)
		}
		// Whoever waits gets it in the end.
		w.gone = nil
		for range 200 {
			if w.logged(len(w.pending)); len(w.order) == 0 {
				break
			}
			w.settle(func() bool { return true })
			w.hear(lockSessions...)
			w.step(func(t *lockTable) { t.keep(w.now, lockSessions) })
			w.pass(2 * time.Second)
		}
		if len(w.order) > 0 {
			rt.Fatalf("%d wait for ever", len(w.order))
		}
	})
}

// lockDump is the state of all locks as text.
func lockDump(t *lockTable) string {
	var lines []string
	for _, l := range t.names {
		holder := "-"
		if l.holder != nil {
			holder = l.holder.name
		}
		lines = append(lines, fmt.Sprintf("%s %d %s %v", l.name, l.token, holder, l.arrival))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// answer logs and settles everything, with all callers there.
func (w *lockWorld) answer() {
	w.logged(len(w.pending))
	w.settle(func() bool { return true })
}

// A process that stood still heard nobody: sessions have the grace anew.
func TestLocks_AStandstillIsNobodysSilence(t *testing.T) {
	w := newLockWorld(t)
	a := w.ask("x", "holder", time.Hour, true)
	b := w.ask("x", "waits", time.Hour, true)
	w.answer()
	w.now += time.Minute
	w.step(func(t *lockTable) { t.keep(w.now, []string{"waits"}) })
	w.hear("waits", "holder")
	w.pass(lockGrace - time.Millisecond)
	if w.order[b] == 0 {
		t.Fatal("a session lost its lock to a standstill of the process")
	}
	w.beliefs = make(map[string][]belief)
	w.step(func(t *lockTable) { t.keep(w.now, []string{"waits"}) })
	w.pass(lockTick)
	if b.token <= a.token {
		t.Error("a silent session keeps its lock")
	}
}

// A table that is busy all the time looks after silent sessions nevertheless.
func TestLocks_ABusyTableLooksAfterTheSilent(t *testing.T) {
	w := newLockWorld(t)
	w.ask("x", "silent", time.Hour, true)
	w.ask("y", "busy", time.Hour, true)
	w.answer()
	for range 12 {
		w.now += lockTick / 10
		w.step(func(t *lockTable) { t.keep(w.now, []string{"busy"}) })
	}
	if wait := w.table.wake(w.now, w.wall, time.Minute); wait != 0 {
		t.Errorf("sessions were not looked at for longer than %s, and the table would wait for %s", lockTick, wait)
	}
}

func TestLocks_RequestsOfOneSession(t *testing.T) {
	w := newLockWorld(t)
	first := w.ask("x", "a", time.Second, true)
	w.answer()
	waits, again := w.ask("x", "b", time.Minute, true), w.ask("x", "b", time.Minute, true)
	w.beliefs = make(map[string][]belief)
	w.step(func(t *lockTable) { t.release(w.now, "x", first.token) })
	if waits.token == 0 || again.token != waits.token {
		t.Errorf("two requests of the session got the tokens %d and %d", waits.token, again.token)
	}
	// Both callers are told, and gone: nobody holds it any more.
	w.gone = func() bool { return true }
	w.answer()
	if !w.table.due(w.now, w.wall) {
		t.Error("a lock whose callers are gone is held")
	}
	// Its time is over, although the table did not look yet.
	w.gone = nil
	third := w.ask("x", "c", time.Second, false)
	w.answer()
	w.now += time.Second
	if fourth := w.ask("x", "c", time.Second, false); third.token <= again.token || fourth.token <= third.token {
		t.Errorf("the tokens are %d, %d and %d, want them to rise", again.token, third.token, fourth.token)
	}
}

func TestLocks_WaitersAreBounded(t *testing.T) {
	w := newLockWorld(t)
	w.ask("x", "holder", time.Hour, true)
	for i := range maxWaiters {
		if a := w.ask("x", fmt.Sprint("w", i), time.Hour, true); a.err != nil || a.place == nil {
			t.Fatalf("waiter %d does not wait: %v", i, a.err)
		}
	}
	if a := w.ask("x", "late", time.Hour, true); !errors.Is(a.err, errManyWaiters) || a.token != 0 {
		t.Errorf("one waiter too many: %v", a.err)
	}
	if a := w.ask("x", "holder", time.Hour, true); a.token == 0 {
		t.Error("the holder was refused")
	}
	if w.table.sessions["late"] != nil {
		t.Error("a refused session is remembered")
	}
	w.ask("y", "holder", time.Hour, true)
	w.table.waiting = maxShardWaiters
	if a := w.ask("y", "late", time.Hour, true); !errors.Is(a.err, errManyWaiters) {
		t.Errorf("one waiter too many for the shard: %v", a.err)
	}
}

func TestLocks_NamesAreBounded(t *testing.T) {
	w := newLockWorld(t)
	w.table = newLockTable(w.arrive)
	for i := range maxLocks {
		w.table.load(fmt.Sprint(i), lockRecord{token: 1}, arrival{millis: w.wall, counter: uint64(i)})
	}
	w.table.start(w.now)
	if a := w.ask("another", "s", time.Hour, true); !errors.Is(a.err, errManyLocks) {
		t.Errorf("one lock too many: %v", a.err)
	}
	if wake := w.table.wake(w.now, w.wall, time.Minute); wake != 0 || !w.table.due(w.now, w.wall) {
		t.Fatalf("too many free locks are left alone for %s", wake)
	}
	w.table.sweep(w.now, w.wall, 10)
	if w.table.names["9"] != nil || w.table.names["10"] == nil {
		t.Error("the locks that are free for longest must be forgotten first")
	}
	w.table.sweep(w.now, w.wall, maxLocks)
	if len(w.table.names) != maxFreeLocks || len(w.table.changes) != maxFreeLocks {
		t.Errorf("%d locks and %d changes, want %d", len(w.table.names), len(w.table.changes), maxFreeLocks)
	}
}

// A name that was forgotten goes on above its old tokens, also when the wall clock
// is an hour behind by then, and by way of the log.
func TestLocks_TokensRiseAfterALockWasForgotten(t *testing.T) {
	w := newLockWorld(t)
	var last uint64
	for i := range 4 {
		a := w.ask("x", "s", time.Minute, true)
		if a.token <= last {
			t.Fatalf("token %d after %d", a.token, last)
		}
		last = a.token
		w.answer()
		clear(w.beliefs)
		w.step(func(t *lockTable) { t.release(w.now, "x", last) })
		w.pass(freeLockMillis*time.Millisecond - time.Second)
		if w.table.names["x"] == nil {
			t.Fatal("forgotten too early")
		}
		w.pass(time.Hour + 2*time.Minute) // arrivals may be an hour ahead
		if len(w.table.names) != 0 {
			t.Fatal("a lock that was free for a day is there")
		}
		w.logged(len(w.pending))
		w.wall -= 3_600_000
		if i%2 == 0 {
			w.restart()
		}
		if len(w.table.names) != 0 {
			t.Fatal("a forgotten lock came back from the log")
		}
	}
}

// Tokens that ran ahead of the clock keep their lock from being forgotten.
func TestLocks_ATokenAheadOfTheClockIsRemembered(t *testing.T) {
	w := newLockWorld(t)
	ahead := (w.wall + 2*freeLockMillis) << tokenBits
	w.table = newLockTable(w.arrive)
	w.table.load("x", lockRecord{token: ahead}, arrival{millis: 1})
	w.table.start(w.now)
	w.pass(time.Second)
	if w.table.names["x"] == nil {
		t.Fatal("forgotten, although the clock would give its tokens again")
	}
	w.pass(3 * freeLockMillis * time.Millisecond)
	if w.table.names["x"] != nil {
		t.Error("the clock is past its token, and it is remembered")
	}
}

func TestLocks_TokensStayWithinTheirBound(t *testing.T) {
	w := newLockWorld(t)
	w.wall = 1 << 60
	granted := 0
	for range 3 << tokenBits {
		a := w.ask("x", "s", time.Minute, true)
		if errors.Is(a.err, errNoTokens) {
			break
		}
		if a.token > maxNumber {
			t.Fatalf("token %d", a.token)
		}
		granted++
		w.answer()
		clear(w.beliefs)
		w.step(func(t *lockTable) { t.release(w.now, "x", a.token) })
	}
	if granted != 1<<tokenBits+1 || len(w.table.sessions) != 0 {
		t.Errorf("%d grants, %d sessions remembered", granted, len(w.table.sessions))
	}
}

func TestLocks_ValuesReadBack(t *testing.T) {
	for _, r := range []lockRecord{{}, {token: 1}, {token: maxNumber, session: strings.Repeat("s", maxOrigin), ttl: maxLockMillis}} {
		if got, err := parseLock(r.encode()); err != nil || got != r {
			t.Errorf("%+v reads back as %+v, %v", r, got, err)
		}
	}
	pairs := func(n int, text string) []byte { return append(msgval.AppendMapHeader(nil, n), text...) }
	later := append(pairs(3, "\xa5color\x93\x01\x81\xa1a\x02\xc0"), "\xa5token\x07\x05\xa1x"...)
	if got, err := parseLock(later); err != nil || got != (lockRecord{token: 7}) {
		t.Errorf("a value with fields of a later version reads as %+v, %v", got, err)
	}
	for name, value := range map[string][]byte{
		"nothing": nil, "no map": {0x90}, "no token": {0x80}, "reserved": {0xc1}, "cut off": pairs(1, "\xa5token"), "huge": {0xdf, 0xff, 0xff, 0xff, 0xff},
		"text token": pairs(1, "\xa5token\xa17"), "negative": pairs(1, "\xa5token\xff"), "more behind": append(pairs(1, "\xa5token\x07"), 0),
		"token above 2^53": msgval.AppendUint(pairs(1, "\xa5token"), maxNumber+1), "no ttl": pairs(2, "\xa5token\x07\xa7session\xa1s"),
	} {
		if r, err := parseLock(value); err == nil {
			t.Errorf("%s: reads as %+v", name, r)
		}
	}
}
