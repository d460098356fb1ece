package gateway

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/gobwas/ws"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/wire"
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

	mu     sync.Mutex
	topics map[string]*topic
	stream string // names the open stream; empty while there is none
	idle   bool   // some topic has no sessions
	heals  []heal
	chunk  []byte // scratch of deliver
}

// topic is one map that sessions look at.
type topic struct {
	name     string
	sessions map[*session]struct{}
	// watched: the stream delivers every change from here on. Else changed is closed
	// when that may have become true, or the stream is lost.
	watched bool
	changed chan struct{}
	// missed: changes may have been missed while it was not watched.
	missed bool
}

// heal is a session that is owed a root.
type heal struct {
	session *session
	name    string
}

func newHub(gatewayID string, fanout fanoutv1connect.FanoutServiceClient, log *slog.Logger, now func() time.Time) *hub {
	return &hub{
		gatewayID: gatewayID,
		fanout:    fanout,
		log:       log,
		now:       now,
		kick:      make(chan struct{}, 1),
		healing:   make(chan struct{}, 1),
		topics:    make(map[string]*topic),
	}
}

// run keeps the stream and heals until ctx ends, and returns when all ended.
func (h *hub) run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { h.follow(ctx) })
	wg.Go(func() { h.heal(ctx) })
	wg.Wait()
}

var errNoStream = fixedError("changes do not arrive from fanout")

func (h *hub) ready() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.stream == "" {
		return errNoStream
	}
	return nil
}

// maps returns how many maps some session looks at.
func (h *hub) maps() (n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, t := range h.topics {
		if len(t.sessions) > 0 {
			n++
		}
	}
	return n
}

// join makes a session see the changes of a map. When it has returned nil, every
// change that is logged from then on reaches the session, or a fresh root does.
func (h *hub) join(ctx context.Context, s *session, name string) error {
	h.mu.Lock()
	if s.left {
		h.mu.Unlock()
		return context.Canceled
	}
	t := h.topics[name]
	if t == nil {
		t = &topic{name: name, sessions: make(map[*session]struct{}), changed: make(chan struct{})}
		h.topics[name] = t
	}
	t.sessions[s] = struct{}{}
	for {
		if t.watched {
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
	names := make([]string, 0, len(s.maps))
	for name := range s.maps {
		names = append(names, name)
	}
	s.mu.Unlock()
	h.mu.Lock()
	defer h.mu.Unlock()
	s.left = true
	for _, name := range names {
		if t := h.topics[name]; t != nil {
			delete(t.sessions, s)
			h.idle = h.idle || len(t.sessions) == 0
		}
	}
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
	for name, t := range h.topics {
		if len(t.sessions) == 0 {
			delete(h.topics, name)
		}
		t.watched = false
		t.missed = true
		t.wake()
	}
	h.idle = false
}

// wake wakes who waits in join; hub.mu is held.
func (t *topic) wake() {
	close(t.changed)
	t.changed = make(chan struct{})
}

// wanted returns what the stream must be told to watch, and to watch no more.
func (h *hub) wanted() (stream string, add, remove []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for name, t := range h.topics {
		switch {
		case len(t.sessions) > 0 && !t.watched:
			add = append(add, name)
		case len(t.sessions) == 0:
			// Forgotten at once: a session that joins before fanout has heard of it
			// makes a new topic, which is added after this removal.
			if t.watched {
				remove = append(remove, name)
			}
			delete(h.topics, name)
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
		t := h.topics[name]
		if t == nil {
			continue // every session left meanwhile
		}
		t.watched = true
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
	if t := h.topics[name]; t != nil {
		h.healLocked(t)
	}
}

func (h *hub) healLocked(t *topic) {
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

// eventOverhead is about what an event's frame takes beside the name, key and value.
const eventOverhead = 224

// change is one change of a map, as the fanout stream brings it.
type change struct {
	key     string
	record  lwwmap.Record
	arrival hlc.Timestamp
	origin  string
}

// deliver hands the changes of one commit to the sessions of their map. Each is
// encoded once, as a finished frame, and all of them lie in one piece of memory that
// the sessions share. A session does not get its own changes, so it gets the runs of
// frames between them. Nothing here waits for a session.
func (h *hub) deliver(name string, changes []change) {
	h.mu.Lock()
	defer h.mu.Unlock()
	t := h.topics[name]
	if t == nil || len(t.sessions) == 0 || len(changes) == 0 {
		return
	}
	size := 0
	for i := range changes {
		size += eventOverhead + len(name) + len(changes[i].key) + len(changes[i].record.Value)
	}
	chunk := make([]byte, 0, size)
	ends := make([]int, len(changes))
	origins := make(map[string]struct{}, 1)
	for i := range changes {
		c := &changes[i]
		event := wire.ServerEvent{
			Event:     wire.Event{MapName: name, EventType: wire.OpPut, Key: c.key, Record: c.record, HasRecord: true},
			Timestamp: c.arrival,
		}
		event.Timestamp.NodeID = serverNode
		if c.record.Deleted() {
			event.EventType = wire.OpRemove
		}
		h.chunk = event.AppendTo(h.chunk[:0])
		chunk = appendFrame(chunk, ws.OpBinary, h.chunk)
		ends[i] = len(chunk)
		if c.origin != "" {
			origins[c.origin] = struct{}{}
		}
	}
	if cap(h.chunk) > keepEncodeBuffer {
		h.chunk = nil
	}
	// Writers start after everything is queued, so that one write takes all of it.
	var woken []*session
	for s := range t.sessions {
		s.mu.Lock()
		wake := false
		if _, own := origins[s.origin]; !own {
			wake = s.deliverLocked(t, chunk)
		} else {
			for first := 0; first < len(changes); {
				if changes[first].origin == s.origin {
					first++
					continue
				}
				last := first
				for last < len(changes) && changes[last].origin != s.origin {
					last++
				}
				begin := 0
				if first > 0 {
					begin = ends[first-1]
				}
				wake = s.deliverLocked(t, chunk[begin:ends[last-1]:ends[last-1]]) || wake
				first = last
			}
		}
		s.mu.Unlock()
		if wake {
			woken = append(woken, s)
			s.k.meters.delivered(len(changes))
		}
	}
	for _, s := range woken {
		s.mu.Lock()
		s.startWriterLocked()
		s.mu.Unlock()
	}
}
