package client

import (
	"slices"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/wire"
)

// maxInFlight bounds the bucket requests without an answer on one connection, of
// all maps together. Servers allow 32.
const maxInFlight = 16

// walk is the comparison of one map with the server's Merkle tree
// (PROTOCOL 8.2), from the root down to the leaves that differ.
//
//	idle ──root differs──▶ pass ──all answered──▶ learned something? ──no──▶ idle
//	  ▲                     ▲                             │
//	  └──root equal         └─────────────yes─────────────┘
//
// A pass that brought records is followed by another, whose first answer proves
// that the trees are equal, or shows what changed meanwhile. A pass that brought
// none ends the walk: then only this client knows more, and its operations tell
// the server.
type walk struct {
	active  bool
	todo    []string            // paths to ask for, the next one last: depth first keeps it short
	asked   map[string]struct{} // paths without an answer
	learned bool                // a record was taken since the pass began
	again   bool                // the server announced another root during the walk
	millis  uint64              // server time of the root that started the walk
}

func (w *walk) start(millis uint64) {
	*w = walk{active: true, todo: []string{""}, asked: make(map[string]struct{}), millis: millis}
}

// next takes the next path to ask for.
func (w *walk) next() (path string, ok bool) {
	if len(w.todo) == 0 {
		return "", false
	}
	path = w.todo[len(w.todo)-1]
	w.todo = w.todo[:len(w.todo)-1]
	w.asked[path] = struct{}{}
	return path, true
}

// answered reports whether the path was asked for, and settles it.
func (w *walk) answered(path string) bool {
	_, ok := w.asked[path]
	delete(w.asked, path)
	return ok
}

// sync handles the messages that carry records and hashes. The caller holds the
// client's lock.
func (s *session) sync(msg wire.Message) {
	c := s.client
	switch msg := msg.(type) {
	case *wire.SyncRespRoot:
		c.observe(msg.Timestamp)
		if m := c.maps[msg.MapName]; m != nil {
			m.compareRoot(msg.RootHash, msg.Timestamp.Millis)
		}
	case *wire.SyncRespBuckets:
		m := c.maps[msg.MapName]
		if m == nil || !m.walk.answered(msg.Path) {
			return
		}
		m.compareBuckets(msg)
		m.finishPass()
	case *wire.SyncRespLeaf:
		m := c.maps[msg.MapName]
		if m == nil {
			return
		}
		for _, r := range msg.Records {
			if m.merge(r.Key, r.Record) {
				m.walk.learned = true
			}
		}
		// Leaves also come unasked: ahead of the root, or in place of buckets.
		if m.walk.answered(msg.Path) {
			m.finishPass()
		}
	case *wire.SyncResetRequired:
		if m := c.maps[msg.MapName]; m != nil {
			m.reset()
		}
	case *wire.ServerEvent:
		s.event(msg.Event, msg.Timestamp)
	case *wire.ServerBatchEvent:
		for _, ev := range msg.Events {
			s.event(ev, msg.Timestamp)
		}
	}
}

// event takes in one event; at is the server's stamp of the message, which may be
// absent.
func (s *session) event(ev wire.Event, at hlc.Timestamp) {
	c := s.client
	c.observe(at)
	m := c.maps[ev.MapName]
	if m == nil || !ev.HasRecord {
		return // an event without a record says nothing that a sync would not prove (PROTOCOL 24.9)
	}
	m.event(ev.Key, ev.Record)
	m.stillSynced(at)
}

// compareRoot compares the map with a root hash that the server announced, asked
// or not.
func (m *Map) compareRoot(root uint32, millis uint64) {
	switch {
	case m.walk.active:
		m.walk.again = true
	case merkle.NewTree(&m.leaves, merkle.Mixed).Root() == root:
		m.syncedAt(millis)
	default:
		m.walk.start(millis)
	}
}

// compareBuckets asks for every child whose hash differs. Children that only this
// client has are nothing to ask for.
func (m *Map) compareBuckets(msg *wire.SyncRespBuckets) {
	tree := merkle.NewTree(&m.leaves, merkle.Mixed)
	for _, b := range slices.Backward(msg.Buckets) {
		if path := msg.Path + string(rune(b.Digit)); tree.Hash(path) != b.Hash {
			m.walk.todo = append(m.walk.todo, path)
		}
	}
}

// finishPass ends the pass when all its requests are answered.
func (m *Map) finishPass() {
	w := &m.walk
	if len(w.todo) > 0 || len(w.asked) > 0 {
		return
	}
	if w.learned || w.again {
		w.start(w.millis)
		return
	}
	millis := w.millis
	*w = walk{}
	m.syncedAt(millis)
}
