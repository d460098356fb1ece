package gateway

import (
	"context"
	"time"
)

// probeAgain is how long after the first root of a probe the second one follows at the
// earliest: a client that opened its map in the meantime has read its storage by then.
const probeAgain = time.Second

// probing marks a session in hub.maps that is to hear of nothing but the fact that the
// map changed.
const probing kinds = 1 << 7

// probe is how a session with a query finds out whether its client has the map open.
//
// A client that opened a map late says nothing but the query (PROTOCOL 8.2); one that
// only shows the query's rows has no use for the map's events, which may be many. So the
// QUERY_SUB of a map does not make the session look at it. It gets the root of the map,
// unasked, and after the first change from then on one more root. A client with the map
// open finds a root that differs and asks for buckets, and from that request on it gets
// events, as it does from its first op on the map. A client that stays silent has the
// query only, and a change of the map costs it nothing any more.
type probe struct {
	rooted  time.Time // when the first root was sent; zero before
	changed bool      // the map changed since, and the second root is due
	over    bool      // both roots were sent
}

// probe notes that a query showed some interest in a map. It asks once per map.
func (s *session) probe(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing != nil || s.maps[name] != nil || s.probes[name] != nil || len(s.probes) >= s.k.cfg.MaxMaps {
		return
	}
	if s.probes == nil {
		s.probes = make(map[string]*probe)
	}
	s.probes[name] = &probe{}
	s.jobs = append(s.jobs, s.probeJob(name, s.ops.tail)) // two per map at most
	s.startWorkersLocked()
}

func (s *session) probeJob(name string, after <-chan struct{}) job {
	return job{kind: jobCall, name: name, after: after, do: func(ctx context.Context) error { return s.answerProbe(ctx, name) }}
}

// answerProbe sends the roots of a probe, the first or the second time: of the LWW-map,
// and of the OR-map of that name if there is one.
func (s *session) answerProbe(ctx context.Context, name string) error {
	s.mu.Lock()
	p := s.probes[name]
	looks := s.maps[name] != nil // meanwhile: it has had its root
	first := p.rooted.IsZero()
	s.mu.Unlock()
	if looks {
		return nil
	}
	if first {
		if err := s.k.hub.probe(ctx, s, name); err != nil {
			return err
		}
	}
	t, err := s.k.trees.fresh(ctx, kindOR, name, s.combining())
	if err == nil && t.state.records > 0 {
		err = s.sendRoot(ctx, kindOR, name)
	}
	if err == nil {
		err = s.sendRoot(ctx, kindLWW, name)
	}
	if err != nil {
		return err
	}
	if first {
		s.mu.Lock()
		p.rooted = s.k.now()
		s.mu.Unlock()
	}
	return nil
}

// checkProbesLocked queues the second roots that are due; s.mu is held.
func (s *session) checkProbesLocked(now time.Time) {
	for name, p := range s.probes {
		if !p.changed || p.over || p.rooted.IsZero() || now.Sub(p.rooted) < probeAgain {
			continue
		}
		p.over = true
		s.jobs = append(s.jobs, s.probeJob(name, s.ops.tail))
		s.startWorkersLocked()
	}
}

// probe has a session told when a map changes next. When it has returned nil, every
// change that is logged from then on is noticed.
func (h *hub) probe(ctx context.Context, s *session, name string) error {
	if err := h.join(ctx, s, name, probing); err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.probed == nil {
		h.probed = make(map[string]struct{})
	}
	h.probed[name] = struct{}{}
	return nil
}

// stirLocked tells the sessions that probe a map that it changed; h.mu is held.
func (h *hub) stirLocked(name string) {
	if _, ok := h.probed[name]; !ok {
		return
	}
	delete(h.probed, name)
	t := h.maps[name]
	if t == nil {
		return
	}
	for s, looks := range t.sessions {
		if looks&probing == 0 {
			continue
		}
		if looks &^= probing; looks == 0 {
			delete(t.sessions, s)
			h.idle = h.idle || len(t.sessions) == 0
		} else {
			t.sessions[s] = looks
		}
		s.mu.Lock()
		if p := s.probes[name]; p != nil {
			p.changed = true
		}
		s.mu.Unlock()
	}
}

// stir tells the sessions that probe a map that it may have changed.
func (h *hub) stir(name string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.stirLocked(name)
}

// stirAll does so for every map.
func (h *hub) stirAll() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for name := range h.probed {
		h.stirLocked(name)
	}
}
