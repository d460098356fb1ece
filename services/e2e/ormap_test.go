package e2e

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/wire"
)

// orReplica is an OR-map at a client, and a model of its own: tags under keys, and the
// tags that were removed.
type orReplica struct {
	*listener
	name    string
	records map[string]map[string]lwwmap.Record
	removed map[string]bool
	roots   []uint32
	full    bool // a root demanded a full re-sync
	taken   int  // messages taken in
}

// openOR opens an OR-map on a connection and asks for its state.
func openOR(l *listener, name string) *orReplica {
	m := &orReplica{listener: l, name: name, records: map[string]map[string]lwwmap.Record{}, removed: map[string]bool{}}
	m.send(&wire.ORMapSyncInit{MapName: name})
	return m
}

// take merges what has come, and walks the tree where a root was announced.
func (m *orReplica) take() {
	m.mu.Lock()
	messages := slices.Clone(m.seen[m.taken:])
	m.taken = len(m.seen)
	m.mu.Unlock()
	for _, msg := range messages {
		switch msg := msg.(type) {
		case *wire.ORMapSyncRespRoot:
			if msg.MapName == m.name {
				m.roots = append(m.roots, msg.RootHash)
				m.full = m.full || msg.FullResync
				m.ask("")
			}
		case *wire.ORMapSyncRespBuckets:
			for _, b := range msg.Buckets {
				if msg.MapName == m.name && b.Hash != 0 {
					m.ask(msg.Path + string(rune(b.Digit)))
				}
			}
		case *wire.ORMapSyncRespLeaf:
			if msg.MapName == m.name {
				m.merge(msg.Entries)
			}
		case *wire.ORMapDiffResponse:
			if msg.MapName == m.name {
				m.merge(msg.Entries)
			}
		}
		for _, ev := range eventsOf(msg) {
			switch {
			case ev.MapName != m.name:
			case ev.EventType == wire.OpORAdd:
				m.add(ev.Key, ev.Tag, ev.Record)
			case ev.EventType == wire.OpORRemove:
				m.remove(ev.Tag)
			}
		}
	}
}

func (m *orReplica) ask(path string) { m.send(&wire.ORMapMerkleReqBucket{MapName: m.name, Path: path}) }

func (m *orReplica) merge(entries []wire.OREntry) {
	for _, e := range entries {
		for _, tag := range e.Tombstones {
			m.remove(tag)
		}
		for _, r := range e.Records {
			m.add(e.Key, r.Tag, r.Record)
		}
	}
}

func (m *orReplica) add(key, tag string, r lwwmap.Record) {
	if m.removed[tag] {
		return
	}
	if m.records[key] == nil {
		m.records[key] = map[string]lwwmap.Record{}
	}
	m.records[key][tag] = r
}

func (m *orReplica) remove(tag string) {
	m.removed[tag] = true
	for _, tags := range m.records {
		delete(tags, tag)
	}
}

// content is what an application sees once it has taken in what has come.
func (m *orReplica) content() map[string]string {
	m.take()
	return m.visible()
}

// visible are the values of each key, sorted.
func (m *orReplica) visible() map[string]string {
	content := map[string]string{}
	for key, tags := range m.records {
		var values []string
		for _, r := range tags {
			values = append(values, string(r.Value))
		}
		if len(values) > 0 {
			slices.Sort(values)
			content[key] = strings.Join(values, "|")
		}
	}
	return content
}

func (m *orReplica) want(want map[string]string) {
	m.t.Helper()
	eventually(m.t, deadline, func() error {
		if got := m.content(); !maps.Equal(got, want) {
			return fmt.Errorf("OR-map %s holds %q; want %q", m.name, got, want)
		}
		return nil
	})
}

// orAdd is an operation that adds a value under a tag made of its stamp.
func orAdd(mapName, key string, value any, ts hlc.Timestamp) wire.Op {
	return wire.Op{
		MapName: mapName, Key: key, Kind: wire.OpORAdd, Tag: ts.String(), Record: lwwmap.Record{Value: encode(value), Timestamp: ts},
	}
}

func orRemove(mapName, key, tag string, ts hlc.Timestamp) wire.Op {
	return wire.Op{MapName: mapName, Key: key, Kind: wire.OpORRemove, Tag: tag, Record: lwwmap.Record{Timestamp: ts}}
}

func values(v ...any) string {
	var texts []string
	for _, x := range v {
		texts = append(texts, string(encode(x)))
	}
	slices.Sort(texts)
	return strings.Join(texts, "|")
}

// Adds win over removes that did not see them; what is removed stays removed, however
// often and late an old add comes again (CRDT-03).
func orMaps(t *testing.T, c Cluster) {
	const name = "or_maps"
	base := now()
	at := func(n uint64) hlc.Timestamp { return stamp(base, n, name) }
	near := openOR(dial(t, c, 0).hello().listen(), name)
	far := openOR(dial(t, c, 1).hello().listen(), name)
	await(t, near.listener, func(m *wire.ORMapSyncRespRoot) bool { return m.MapName == name })
	await(t, far.listener, func(m *wire.ORMapSyncRespRoot) bool { return m.MapName == name })

	go1, go2 := orAdd(name, "post", "go", at(1)), orAdd(name, "post", "go", at(2))
	write(t, c, 0, go1, orAdd(name, "post", "sync", at(3)), orAdd(name, "other", map[string]any{"b": 1, "a": []any{nil, 1.5}}, at(4)))
	write(t, c, 1, orRemove(name, "post", go1.Tag, at(5)))
	write(t, c, 0, go2) // at the same time as the removal, and not seen by it
	write(t, c, 1, go1) // late, and again
	want := map[string]string{"post": values("go", "sync")}
	for _, m := range []*orReplica{near, far} {
		eventually(t, deadline, func() error {
			if got := m.content(); len(got) != 2 || got["post"] != want["post"] {
				return fmt.Errorf("it holds %q", got)
			}
			return nil
		})
	}
	fresh := openOR(dial(t, c, 1).hello().listen(), name)
	fresh.want(near.content())
	if !fresh.removed[go1.Tag] {
		t.Error("a client that came later was not told what was removed")
	}

	// A client that lost its op log gives the server what it lacks, by the tree.
	var lost []wire.OREntry
	for i := range uint64(20) {
		add := orAdd(name, fmt.Sprint("lost-", i), i, at(100+i))
		lost = append(lost, wire.OREntry{Key: add.Key, Records: []wire.ORRecord{{Tag: add.Tag, Record: add.Record}}})
		want[add.Key] = values(i)
	}
	// With it comes a record that was removed: it must not rise again.
	lost = append(lost, wire.OREntry{Key: "post", Records: []wire.ORRecord{{Tag: go1.Tag, Record: go1.Record}}})
	fresh.send(&wire.ORMapPushDiff{MapName: name, Entries: lost})
	for _, m := range []*orReplica{near, far} {
		eventually(t, deadline, func() error {
			if got := m.content(); len(got) != 22 || got["post"] != want["post"] || got["lost-7"] != want["lost-7"] {
				return fmt.Errorf("it holds %d keys, post %q", len(got), got["post"])
			}
			return nil
		})
	}

	// A record with a time to live leaves a tombstone.
	short := orAdd(name, "short", "lived", stamp(now(), 0, name))
	short.Record.TTLMillis = 500
	write(t, c, 0, short)
	eventually(t, deadline, func() error {
		if far.take(); !far.removed[short.Tag] {
			return errNothingYet
		}
		return nil
	})

	// Over HTTP the original client is not told; ours asks for it.
	resp := postSync(t, gateway(c, 0), &wire.SyncRequest{SyncMaps: []wire.SyncMap{{MapName: name, OR: true}}})
	if len(resp.ORDeltas) != 1 {
		t.Fatalf("%d deltas of OR-maps; want one", len(resp.ORDeltas))
	}
	over := &orReplica{records: map[string]map[string]lwwmap.Record{}, removed: map[string]bool{}}
	over.merge(resp.ORDeltas[0].Entries)
	if got, want := over.visible(), far.content(); !maps.Equal(got, want) {
		t.Errorf("over HTTP: %q; want %q", got, want)
	}
	again := postSync(t, gateway(c, 1), &wire.SyncRequest{SyncMaps: []wire.SyncMap{{
		MapName: name, OR: true, LastSync: resp.ORDeltas[0].ServerSyncTimestamp,
	}}})
	if len(again.ORDeltas) != 1 || len(again.ORDeltas[0].Entries) != 0 {
		t.Errorf("the next poll brings %+v; nothing happened", again.ORDeltas)
	}
}

// TestLOG06_EveryKindSurvives: OR-maps, counters, locks and the journal are after a
// crash of every process what they were before.
func TestLOG06_EveryKindSurvives(t *testing.T) {
	stories(t, options{}, func(t *testing.T, c Cluster) {
		const name = "survives"
		base := now()
		add := orAdd(name, "k", "kept", stamp(base, 1, name))
		gone := orAdd(name, "k", "gone", stamp(base, 2, name))
		write(t, c, 0, add, gone, put("", name, "lww", 1, stamp(base, 3, name)))
		write(t, c, 1, orRemove(name, "k", gone.Tag, stamp(base, 4, name)))
		conn := dial(t, c, 0).hello()
		conn.send(&wire.CounterSync{Name: name, State: countOf("n", 40, 1)})
		for expect[*wire.CounterUpdate](conn).Name != name {
		}
		token := conn.acquire(name, "before", 10*time.Minute)
		conn.send(&wire.JournalRead{RequestID: "j", MapName: name, Limit: 100})
		before := expect[*wire.JournalReadResponse](conn)

		for round := range 2 {
			for _, role := range c.Roles() {
				c.Kill(role)
			}
			c.Restart(t, c.Roles()...)
			m := openOR(dial(t, c, round).hello().listen(), name)
			m.want(map[string]string{"k": values("kept")})
			l := dial(t, c, round+1).hello().listen()
			l.send(&wire.CounterRequest{Name: name})
			l.wantCount(name, 39)
			l.send(&wire.JournalRead{RequestID: "j", MapName: name, Limit: 100})
			after := await(t, l, func(m *wire.JournalReadResponse) bool { return m.RequestID == "j" })
			if got, want := fmt.Sprint(after.Events), fmt.Sprint(before.Events); got != want {
				t.Errorf("the journal reads %s; before the crash %s", got, want)
			}
		}
		// The holder is gone for good: the lock is free past the grace time, and the
		// tokens go on.
		if next := dial(t, c, 0).hello().acquire(name, "after", time.Minute); next <= token {
			t.Errorf("token %d after the crash; before it was %d", next, token)
		}
	})
}

// TestFAN01_LiveQueriesHeal: a live query shows the truth again after the death of
// whatever service stands between it and the data.
func TestFAN01_LiveQueriesHeal(t *testing.T) {
	t.Parallel()
	c := newFourProcesses(t, options{})
	const name = "heals"
	base := now()
	l := dial(t, c, 0).hello().listen()
	l.send(&wire.QuerySub{QueryID: "q", MapName: name, Query: encode(map[string]any{
		"sort": []any{map[string]any{"field": "n", "direction": "desc"}}, "limit": 2,
	})})
	await(t, l, func(m *wire.QueryResp) bool { return m.QueryID == "q" })
	n := uint64(0)
	next := func() (want map[string]any) {
		n++
		write(t, c, 1, put("", name, fmt.Sprint("k", n), map[string]any{"n": n}, stamp(base, n, name)))
		want = map[string]any{}
		for i := n; i > 0 && i+2 > n; i-- {
			want[fmt.Sprint("k", i)] = map[string]any{"n": i}
		}
		return want
	}
	l.wantWindow("q", next())
	for _, role := range []string{"fanout", "partition", "persistence", "fanout", "nats"} {
		c.Kill(role)
		if role == "fanout" {
			next() // nobody is there to tell
		}
		c.Restart(t, role)
		want := next()
		l.wantWindow("q", want)
	}
}
