package gateway

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1/fanoutv1connect"
)

const (
	// healEvery and healSpread pace the roots that many sessions are owed at once,
	// when the stream was lost or events of a busy map were: all get theirs within
	// healSpread, which leaves most of the 5 s of FAN-01, and their walks do not all
	// begin in the same moment. Up to healAtOnce do not wait.
	healEvery  = 50 * time.Millisecond
	healSpread = 2 * time.Second
	healAtOnce = 64
	// firstRetry and maxRetry pace the attempts to open the stream again.
	firstRetry = 50 * time.Millisecond
	maxRetry   = 5 * time.Second
	// maxWatched is how many maps, counters included, and how many topics the sessions
	// of a gateway look at. It is what fanout takes of one stream: it would refuse the
	// call with one more, and with it the stream that serves all sessions.
	maxWatched = 100_000
)

// hub knows which session looks at which map, keeps the gateway's one stream of
// changes, and hands each change to the sessions of its map.
//
// What keeps a session from missing a change (SYN-03): join returns once the map is
// watched, and only then is a root read for the session. While the stream is lost, or
// after a gap, changes are missed; so every session of the map is owed a fresh root
// once the map is watched again. A root makes the client compare and fetch what it
// lacks (PROTOCOL 8.2), whatever it missed.
//
// Lock order: hub.mu before session.mu.
type hub struct {
	gatewayID string
	fanout    fanoutv1connect.FanoutServiceClient
	log       *slog.Logger
	now       func() time.Time
	kick      chan struct{} // something is to be watched, or no more
	healing   chan struct{} // something is in heals
	queries   *queries
	topics    *topics
	most      int // of maps

	mu     sync.Mutex
	maps   map[string]*watched
	stream string // names the open stream; empty while there is none
	idle   bool   // some map has no sessions
	heals  []heal
	probed map[string]struct{} // maps that some session probes
	chunk  []byte              // scratch of deliver
}

// watched is one name that sessions look at: a map, or "+" and the name of a counter.
type watched struct {
	name     string
	sessions map[*session]kinds // and what of it each of them looks at
	// live: the stream delivers every change from here on. Else changed is closed
	// when that may have become true, or the stream is lost.
	live    bool
	changed chan struct{}
	// missed: changes may have been missed while it was not live.
	missed bool
}

// heal is a session that is owed a root.
type heal struct {
	session *session
	name    string
}

func newHub(gatewayID string, fanout fanoutv1connect.FanoutServiceClient, log *slog.Logger, now func() time.Time) *hub {
	h := &hub{
		gatewayID: gatewayID,
		fanout:    fanout,
		log:       log,
		now:       now,
		kick:      make(chan struct{}, 1),
		healing:   make(chan struct{}, 1),
		maps:      make(map[string]*watched),
		most:      maxWatched,
	}
	h.queries = newQueries(func() { notify(h.kick) })
	h.topics = newTopics(func() { notify(h.kick) })
	return h
}

// run keeps the stream and heals until ctx ends, and returns when all ended.
func (h *hub) run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { h.follow(ctx) })
	wg.Go(func() { h.heal(ctx) })
	wg.Wait()
}

var (
	errNoStream       = fixedError("changes do not arrive from fanout")
	errTooManyWatched = fixedError("the sessions look at as many maps as fanout takes")
)

func (h *hub) ready() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.stream == "" {
		return errNoStream
	}
	return nil
}

// watchedMaps returns how many maps some session looks at.
func (h *hub) watchedMaps() (n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, t := range h.maps {
		if len(t.sessions) > 0 {
			n++
		}
	}
	return n
}

// join makes a session see the changes of the given kinds of a name. When it has
// returned nil, every change that is logged from then on reaches the session, or a fresh
// root does. It fails when ctx ends, and above maxWatched.
func (h *hub) join(ctx context.Context, s *session, name string, of kinds) error {
	h.mu.Lock()
	if s.left {
		h.mu.Unlock()
		return context.Canceled
	}
	t := h.maps[name]
	if t == nil {
		if len(h.maps) >= h.most {
			h.mu.Unlock()
			return errTooManyWatched
		}
		t = &watched{name: name, sessions: make(map[*session]kinds), changed: make(chan struct{})}
		h.maps[name] = t
	}
	t.sessions[s] |= of
	for {
		if t.live {
			h.mu.Unlock()
			return nil
		}
		if h.stream == "" {
			// Not worth waiting for: the root that follows the stream's return tells
			// the session what it misses until then.
			t.missed = true
			h.mu.Unlock()
			return nil
		}
		changed := t.changed
		h.mu.Unlock()
		notify(h.kick)
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
		h.mu.Lock()
	}
}

// notify wakes the one goroutine that waits on c.
func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default: // it is about to wake
	}
}

// leave forgets a session that has ended.
func (h *hub) leave(s *session) {
	s.mu.Lock()
	names := make([]string, 0, len(s.maps)+len(s.counters))
	for name := range s.maps {
		names = append(names, name)
	}
	for name := range s.counters {
		names = append(names, counterMap(name))
	}
	for name := range s.probes {
		names = append(names, name)
	}
	s.mu.Unlock()
	h.mu.Lock()
	defer h.mu.Unlock()
	s.left = true
	for _, name := range names {
		if t := h.maps[name]; t != nil {
			delete(t.sessions, s)
			h.idle = h.idle || len(t.sessions) == 0
		}
	}
}

// steady reports whether every change of a name reaches the sessions that joined.
func (h *hub) steady(name string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	t := h.maps[name]
	return t != nil && t.live && !t.missed
}

// tidy has maps that nobody looks at any more watched no longer. The sweeper calls
// it, so that a client that reconnects finds its maps still watched.
func (h *hub) tidy() {
	h.mu.Lock()
	idle := h.idle
	h.mu.Unlock()
	if idle {
		notify(h.kick)
	}
}

// opened notes a stream: no map is watched on it yet.
func (h *hub) opened(stream string) {
	h.mu.Lock()
	h.stream = stream
	h.mu.Unlock()
	notify(h.kick)
}

// lost notes that the stream ended: its maps may miss changes from here on.
func (h *hub) lost() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.stream = ""
	for name, t := range h.maps {
		if len(t.sessions) == 0 {
			delete(h.maps, name)
		}
		t.live = false
		t.missed = true
		t.wake()
	}
	h.idle = false
}

// wake wakes who waits in join; hub.mu is held.
func (t *watched) wake() {
	close(t.changed)
	t.changed = make(chan struct{})
}

// wanted returns what the stream must be told to watch, and to watch no more.
func (h *hub) wanted() (stream string, add, remove []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for name, t := range h.maps {
		switch {
		case len(t.sessions) > 0 && !t.live:
			add = append(add, name)
		case len(t.sessions) == 0:
			// Forgotten at once: a session that joins before fanout has heard of it
			// makes a new topic, which is added after this removal.
			if t.live {
				remove = append(remove, name)
			}
			delete(h.maps, name)
		}
	}
	h.idle = false
	return h.stream, add, remove
}

// watching notes that maps are watched on a stream. Their sessions are healed if they
// may have missed something before.
func (h *hub) watching(stream string, names []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.stream != stream {
		return // lost meanwhile, and added again on the next one
	}
	for _, name := range names {
		t := h.maps[name]
		if t == nil {
			continue // every session left meanwhile
		}
		t.live = true
		t.wake()
		if t.missed {
			t.missed = false
			h.healLocked(t)
		}
	}
}

// gap notes that changes of a map were lost on the way.
func (h *hub) gap(name string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if t := h.maps[name]; t != nil {
		h.healLocked(t)
	}
}

func (h *hub) healLocked(t *watched) {
	for s := range t.sessions {
		h.heals = append(h.heals, heal{s, t.name})
	}
	notify(h.healing)
}

// heal gives the sessions in heals their roots, at a pace that gets through them
// within healSpread. A session that is owed a root already is owed one only.
func (h *hub) heal(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-h.healing:
		}
		pace := healAtOnce
		for {
			h.mu.Lock()
			pace = max(pace, len(h.heals)/int(healSpread/healEvery))
			n := min(pace, len(h.heals))
			now := h.heals[:n:n]
			if h.heals = h.heals[n:]; len(h.heals) == 0 {
				h.heals = nil
			}
			left := len(h.heals)
			h.mu.Unlock()
			for _, one := range now {
				one.session.owe(one.name)
			}
			if left == 0 {
				break
			}
			if !pause(ctx, healEvery) {
				return
			}
		}
	}
}
