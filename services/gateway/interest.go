package gateway

import (
	"strings"

	"github.com/topgun-sync/topgun/core/wire"
)

// interest is what a session did to show that it looks at a map, and how far its copy
// is, for each of the two maps that may have the name.
type interest struct {
	lww, or shown
}

// shown is one map of an interest.
type shown struct {
	// looks: the session is told of changes.
	looks bool
	// synced: a SYNC_INIT or ORMAP_SYNC_INIT came, so a root was or will be sent.
	synced bool
	// rooted: an unsolicited root was sent, or is owed, for a map that was opened
	// late (PROTOCOL 8.2).
	rooted bool
	// joined: changes reach the session.
	joined bool
	// reset: the client was told to give up its copy, for an op that is too old.
	reset bool
	// copied is how far the client's copy is.
	copied progress
}

func (i *interest) of(k mapKind) *shown {
	if k == kindOR {
		return &i.or
	}
	return &i.lww
}

// kinds is the set of what the session looks at.
func (i *interest) kinds() (set kinds) {
	if i.lww.looks {
		set |= setOf(kindLWW)
	}
	if i.or.looks {
		set |= setOf(kindOR)
	}
	return set
}

var tooManyMaps = &wire.Error{
	Name: "TOO_MANY_SUBS", Code: 429, Text: "this connection looks at as many maps as it may; use another one",
}

// interestLocked returns what the session showed for a map, noting that it looks at
// it; s.mu is held. It returns false if the session looks at too many.
func (s *session) interestLocked(name string) (*interest, bool) {
	if seen := s.maps[name]; seen != nil {
		return seen, true
	}
	if len(s.maps) >= s.k.cfg.MaxMaps {
		return nil, false
	}
	if s.maps == nil {
		s.maps = make(map[string]*interest)
	}
	seen := &interest{}
	s.maps[strings.Clone(name)] = seen
	return seen, true
}

// wrote notes that an op showed interest in a map. If no SYNC_INIT came for it, the client
// opened it late and will not send one before it connects again, so it gets the root
// unasked, once (PROTOCOL 8.2). A session that looks at too many maps gets nothing.
func (s *session) wrote(name string, of mapKind) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing != nil {
		return
	}
	seen, ok := s.interestLocked(name)
	if !ok {
		return
	}
	shown := seen.of(of)
	shown.looks = true
	if shown.synced || shown.rooted {
		return
	}
	shown.rooted = true
	s.jobs = append(s.jobs, job{kind: jobRoot, of: of, name: strings.Clone(name)}) // few per map at most
	s.startWorkersLocked()
}
