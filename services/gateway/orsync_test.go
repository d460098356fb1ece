package gateway

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/ormap"
	"github.com/topgun-sync/topgun/core/wire"
)

// orClient holds an OR-map as the original client does, and answers as it does
// (PROTOCOL 9.2, 9.3).
type orClient struct {
	*wsClient
	name string
	m    ormap.Map
	// What it saw.
	requests, pushes, resyncs, diffs, events int

	open, inits int // requests that are not answered, and those of a root among them
	root        *wire.ORMapSyncRespRoot
}

func (b *bench) orHello(t testing.TB, name string) *orClient {
	t.Helper()
	return &orClient{wsClient: b.hello(t), name: name}
}

func orRecord(tag, value string, ts hlc.Timestamp) ormap.Record {
	return ormap.Record{Tag: tag, Record: lwwmap.Record{Value: packed(value), Timestamp: ts}}
}

func addOp(id, mapName, key, tag, value string, ts hlc.Timestamp) wire.Op {
	return wire.Op{ID: id, MapName: mapName, Key: key, Kind: wire.OpORAdd, Tag: tag, Record: orRecord(tag, value, ts).Record}
}

func dropOp(id, mapName, key, tag string, ts hlc.Timestamp) wire.Op {
	return wire.Op{ID: id, MapName: mapName, Key: key, Kind: wire.OpORRemove, Tag: tag, Record: lwwmap.Record{Timestamp: ts}}
}

func (c *orClient) tree() *merkle.Tree { return merkle.NewTree(c.m.Leaves(merkle.Mixed), merkle.Mixed) }

// init says ORMAP_SYNC_INIT.
func (c *orClient) init(since uint64) {
	c.t.Helper()
	tree := c.tree()
	digits, hashes, _ := tree.Buckets("")
	buckets := map[string]uint32{}
	for i := range digits {
		buckets[string(rune(digits[i]))] = hashes[i]
	}
	c.open++
	c.inits++
	c.send(&wire.ORMapSyncInit{
		MapName: c.name, RootHash: tree.Root(), BucketHashes: buckets, LastSyncTimestamp: since, HasClaimedEpoch: true,
	})
}

// settle handles messages until everything that the client asked for is answered, and
// what came before the PONG to a PING sent then.
func (c *orClient) settle() {
	c.t.Helper()
	c.send(wire.PingAt(1))
	for pong := false; !pong || c.open > 0; {
		m := c.recv()
		switch m.(type) {
		case *wire.Pong:
			pong = true
			continue
		case *wire.ORMapSyncRespBuckets, *wire.ORMapSyncRespLeaf:
			c.open--
		case *wire.ORMapSyncRespRoot:
			if c.inits > 0 { // else it came unasked
				c.inits--
				c.open--
			}
		}
		c.handle(m)
	}
}

func (c *orClient) handle(m wire.Message) {
	c.t.Helper()
	switch m := m.(type) {
	case *wire.ORMapSyncRespRoot:
		c.root = m
		if m.FullResync {
			c.resyncs++
			c.m = ormap.Map{}
			c.ask("")
		} else if m.RootHash != c.tree().Root() {
			c.ask("")
		}
	case *wire.ORMapSyncRespBuckets:
		tree := c.tree()
		theirs := map[byte]uint32{}
		for _, b := range m.Buckets {
			theirs[b.Digit] = b.Hash
			if tree.Hash(m.Path+string(rune(b.Digit))) != b.Hash {
				c.ask(m.Path + string(rune(b.Digit)))
			}
		}
		digits, hashes, _ := tree.Buckets(m.Path)
		for i, digit := range digits {
			path := m.Path + string(rune(digit))
			if _, there := theirs[digit]; !there && hashes[i] != 0 && len(path) == merkle.Depth {
				c.push(slices.DeleteFunc(c.m.Keys(), func(key string) bool {
					first, _, _ := merkle.LeafRange(path)
					return merkle.Leaf(merkle.Hash(key)) != first
				}))
			}
		}
	case *wire.ORMapSyncRespLeaf:
		c.push(c.merge(m.Entries))
	case *wire.ORMapDiffResponse:
		c.diffs++
		c.merge(m.Entries)
	case *wire.ServerEvent:
		c.event(m.Event)
	case *wire.ServerBatchEvent:
		for _, e := range m.Events {
			c.event(e)
		}
	default:
		c.t.Fatalf("got %T %+v", m, m)
	}
}

func (c *orClient) event(e wire.Event) {
	c.t.Helper()
	c.events++
	switch e.EventType {
	case wire.OpORAdd:
		c.m.Apply(e.Key, ormap.Record{Tag: e.Tag, Record: e.Record})
	case wire.OpORRemove:
		c.m.ApplyTombstone(e.Tag)
	default:
		c.t.Errorf("event %+v", e)
	}
}

func (c *orClient) ask(path string) {
	c.t.Helper()
	c.requests++
	c.open++
	c.send(&wire.ORMapMerkleReqBucket{MapName: c.name, Path: path})
}

func (c *orClient) merge(entries []wire.OREntry) (keys []string) {
	for _, e := range entries {
		var records []ormap.Record
		for _, r := range e.Records {
			records = append(records, ormap.Record{Tag: r.Tag, Record: r.Record})
		}
		c.m.MergeKey(e.Key, records, e.Tombstones)
		keys = append(keys, e.Key)
	}
	return keys
}

// push sends what it holds of keys, with all its tombstones.
func (c *orClient) push(keys []string) {
	c.t.Helper()
	diff := &wire.ORMapPushDiff{MapName: c.name}
	for _, key := range keys {
		e := wire.OREntry{Key: key, Tombstones: c.m.Tombstones()}
		for r := range c.m.Records(key) {
			e.Records = append(e.Records, wire.ORRecord{Tag: r.Tag, Record: r.Record})
		}
		if len(e.Records) > 0 {
			diff.Entries = append(diff.Entries, e)
		}
	}
	if len(diff.Entries) > 0 {
		c.pushes++
		c.send(diff)
	}
}

func (c *orClient) values(key string) (values []string) {
	for r := range c.m.Records(key) {
		values = append(values, string(r.Value[1:]))
	}
	slices.Sort(values)
	return values
}

// Ops of OR-maps reach the owner with kind, tag, stamp and value, and other sessions as
// events; an LWW-map of the same name is another map.
func TestOROps(t *testing.T) {
	b := setup(t, nil, nil)
	other := b.orHello(t, "m")
	other.init(0)
	other.settle()
	lww := b.hello(t)
	lww.synced("m", 0)
	p := b.hello(t)
	p.send(&wire.OpBatch{Ops: []wire.Op{
		addOp("1", "m", "k", "t1", "a", stamp(5)), addOp("2", "m", "k", "t2", "b", stamp(6)), dropOp("3", "m", "k", "t1", stamp(7)),
	}})
	if ack := expect[*wire.OpAck](p); ack.LastID != "3" || len(ack.Results) != 0 {
		t.Errorf("ack %+v", ack)
	}
	if root := expect[*wire.ORMapSyncRespRoot](p); root.RootHash == 0 || root.FullResync {
		t.Errorf("the root of a map opened late: %+v", root)
	}
	eventually(t, func() bool { other.settle(); return other.events == 3 })
	if got := other.values("k"); !slices.Equal(got, []string{"b"}) || !other.m.Removed("t1") {
		t.Errorf("the other client has %v", got)
	}
	lww.ping() // it was told nothing
	if r := b.partition.tag("m", "k", "t1"); r == nil || len(r.GetValue()) != 0 || r.GetTimestamp().GetMillis() != 7 {
		t.Errorf("tombstone %v", r)
	}
	if b.partition.record("m", "k") != nil {
		t.Error("an op of the OR-map reached the LWW-map")
	}
	p.send(&wire.OpBatch{Ops: []wire.Op{putOp("4", "m", "k", "v", stamp(8))}})
	expect[*wire.OpAck](p)
	expect[*wire.SyncRespRoot](p)
	if e := expect[*wire.ServerEvent](lww); e.EventType != wire.OpPut || e.Key != "k" {
		t.Errorf("event %+v", e)
	}
	other.ping()
}

// A writer is told what its tag holds instead: a tombstone, or another stamp.
func TestORWinners(t *testing.T) {
	b := setup(t, nil, nil)
	b.partition.add("m", "k", "gone", nil, stamp(3))
	p := b.hello(t)
	future := hlc.Timestamp{Millis: uint64(b.partition.now().UnixMilli()) + 3_600_000, NodeID: "client-a"}
	p.send(&wire.OpBatch{Ops: []wire.Op{
		addOp("1", "m", "k", "gone", "a", stamp(2)), addOp("2", "m", "k", "ahead", "b", future), dropOp("3", "m", "k", "gone", stamp(9)),
	}})
	if e := expect[*wire.ServerEvent](p); e.EventType != wire.OpORRemove || e.Tag != "gone" || e.Key != "k" || e.HasRecord {
		t.Errorf("removed: %+v", e)
	}
	if e := expect[*wire.ServerEvent](p); e.EventType != wire.OpORAdd || e.Tag != "ahead" || e.Record.Timestamp.Millis >= future.Millis ||
		string(e.Record.Value) != string(packed("b")) {
		t.Errorf("restamped: %+v", e)
	}
	expect[*wire.OpAck](p)
}

// A client that was away gets what arrived since, merges it, and finds the roots equal:
// no walk. One OR_REMOVE makes it tell its listeners of what was only removed.
func TestORShortcut(t *testing.T) {
	b := setup(t, nil, nil)
	for i := range 20 {
		b.partition.add("m", fmt.Sprint("k", i%7), fmt.Sprint("t", i), packed("v"), stamp(uint64(i+1)))
	}
	c := b.orHello(t, "m")
	c.init(0)
	c.settle()
	if c.requests != 0 || len(c.m.Keys()) != 7 || c.root.RootHash != c.tree().Root() || c.diffs == 0 {
		t.Fatalf("%d requests, %d keys", c.requests, len(c.m.Keys()))
	}
	_ = c.conn.Close()
	since := c.root.Timestamp.Millis
	b.partition.add("m", "k1", "t1", nil, hlc.Timestamp{Millis: since, NodeID: "n"})
	b.partition.add("m", "new", "t100", packed("w"), hlc.Timestamp{Millis: since, NodeID: "n"})
	again := b.orHello(t, "m")
	again.m = c.m
	again.init(since - 1)
	again.settle()
	if again.requests != 0 || again.events != 1 || !again.m.Removed("t1") || again.root.RootHash != again.tree().Root() {
		t.Errorf("%d requests, %d events", again.requests, again.events)
	}
	// Who holds nothing gets all, whatever its time: it may be of other maps.
	blank := b.orHello(t, "m")
	blank.init(c.root.Timestamp.Millis + 1)
	blank.settle()
	if blank.requests != 0 || !blank.m.Removed("t1") || blank.root.RootHash != blank.tree().Root() {
		t.Errorf("%d requests, tombstones %v", blank.requests, blank.m.Tombstones())
	}
}

// apart returns n keys below leaves of their own: of a leaf that the server has too, the
// original client pushes only the keys that the server named.
func apart(n int) (keys []string) {
	used := map[int]bool{merkle.Leaf(merkle.Hash("both")): true}
	for i := 0; len(keys) < n; i++ {
		key := fmt.Sprint("k", i)
		if leaf := merkle.Leaf(merkle.Hash(key)); !used[leaf] {
			used[leaf] = true
			keys = append(keys, key)
		}
	}
	return keys
}

// A client whose copy differs anywhere ends with the server's, whatever its
// lastSyncTimestamp said, and so does the server.
func TestORWalk(t *testing.T) {
	b := setup(t, nil, nil)
	c := b.orHello(t, "m")
	keys := apart(300)
	for i, key := range keys {
		tag, ts := fmt.Sprint("t", i), stamp(uint64(i+1))
		if i%3 != 0 {
			b.partition.add("m", key, tag, packed("v"), ts)
		}
		if i%3 != 1 {
			c.m.Merge(key, orRecord(tag, "v", ts))
		}
	}
	// Removed at the server, with nothing else below the key; and removed at the client,
	// which still holds another record of the key.
	b.partition.add("m", keys[2], "t2", nil, stamp(1000))
	b.partition.add("m", "both", "keep", packed("x"), stamp(1001))
	b.partition.add("m", "both", "drop", packed("y"), stamp(1002))
	c.m.Merge("both", orRecord("keep", "x", stamp(1001)))
	c.m.ApplyTombstone("drop")
	watcher := b.orHello(t, "m")
	watcher.init(0)
	watcher.settle()

	c.init(1 << 50) // nothing is pushed
	var root uint32
	eventually(t, func() bool {
		c.settle()
		c.init(1 << 50)
		c.settle()
		root = c.root.RootHash
		return root == c.tree().Root()
	})
	if n := len(c.m.Keys()); n != 300-1+1 {
		t.Errorf("%d keys, want all but the removed one", n)
	}
	if len(c.values(keys[2])) != 0 || !slices.Equal(c.values("both"), []string{"x"}) {
		t.Errorf("removed %v, both %v", c.values(keys[2]), c.values("both"))
	}
	if r := b.partition.tag("m", "both", "drop"); r == nil || len(r.GetValue()) != 0 || r.GetTimestamp().GetNodeId() != serverNode {
		t.Errorf("a pushed removal: %v", r)
	}
	eventually(t, func() bool { watcher.settle(); return watcher.tree().Root() == root })
}

// session-ormap-repair: a server that lost everything is refilled by a client.
func TestORRepair(t *testing.T) {
	b := setup(t, nil, nil)
	c := b.orHello(t, "m")
	for i := range 50 {
		c.m.Merge(fmt.Sprint("k", i), orRecord(fmt.Sprint("t", i), "v", stamp(uint64(i+1))))
	}
	c.send(&wire.ORMapMerkleReqBucket{MapName: "m", Path: ""})
	if m := expect[*wire.ORMapSyncRespBuckets](c.wsClient); len(m.Buckets) != 16 || m.Buckets[0].Hash != 0 || m.Buckets[15].Digit != 'f' {
		t.Errorf("buckets %+v", m.Buckets)
	}
	c.send(&wire.ORMapMerkleReqBucket{MapName: "m", Path: "ab"})
	if m := expect[*wire.ORMapSyncRespBuckets](c.wsClient); len(m.Buckets) != 0 {
		t.Errorf("buckets above leaves %+v", m.Buckets)
	}
	c.init(1)
	eventually(t, func() bool {
		c.settle()
		c.init(1)
		c.settle()
		return c.root.RootHash == c.tree().Root()
	})
	if c.root.RootHash == 0 || c.m.Keys() == nil {
		t.Error("the client lost its records")
	}
}

// Only what the server lacks becomes an op.
func TestPushCostsNothingWhenKnown(t *testing.T) {
	b := setup(t, nil, nil)
	for i := range 30 {
		b.partition.add("m", fmt.Sprint("k", i), fmt.Sprint("t", i), packed("v"), stamp(uint64(i+1)))
	}
	b.partition.add("m", "k1", "t1", nil, stamp(100))
	c := b.orHello(t, "m")
	c.init(0)
	c.settle()
	c.m.ApplyTombstone("t1")
	applied := b.partition.called("Apply")
	c.push(c.m.Keys())
	c.settle()
	eventually(t, func() bool { return b.partition.called("Get") > 0 })
	c.init(0)
	c.settle()
	if n := b.partition.called("Apply") - applied; n != 0 {
		t.Errorf("%d calls for a diff without news", n)
	}
}

func TestDifference(t *testing.T) {
	live := func(key, tag string, ts uint64) keyed {
		return keyed{wire.KeyedRecord{Key: key, Record: orRecord(tag, "v", stamp(ts)).Record}, tag}
	}
	gone := func(key, tag string) keyed { return keyed{wire.KeyedRecord{Key: key}, tag} }
	pushed := func(key, tag string, ts uint64) wire.OREntry {
		return wire.OREntry{Key: key, Records: []wire.ORRecord{{Tag: tag, Record: orRecord(tag, "v", stamp(ts)).Record}}}
	}
	for name, c := range map[string]struct {
		diff  []wire.OREntry
		known []keyed
		ops   []string
		gone  int
	}{
		"unknown":         {[]wire.OREntry{pushed("k", "t", 5)}, nil, []string{"OR_ADD k t"}, 0},
		"known":           {[]wire.OREntry{pushed("k", "t", 5)}, []keyed{live("k", "t", 5)}, nil, 0},
		"older":           {[]wire.OREntry{pushed("k", "t", 4)}, []keyed{live("k", "t", 5)}, nil, 0},
		"newer":           {[]wire.OREntry{pushed("k", "t", 6)}, []keyed{live("k", "t", 5)}, []string{"OR_ADD k t"}, 0},
		"removed here":    {[]wire.OREntry{pushed("k", "t", 6)}, []keyed{gone("k", "t")}, nil, 1},
		"removed there":   {[]wire.OREntry{{Key: "k", Tombstones: []string{"x", "t"}}}, []keyed{live("k", "t", 5)}, []string{"OR_REMOVE k t"}, 0},
		"removed at both": {[]wire.OREntry{{Key: "k", Tombstones: []string{"t"}}}, []keyed{gone("k", "t")}, nil, 0},
		"removed twice": {
			[]wire.OREntry{{Key: "k", Tombstones: []string{"t"}}, {Key: "l", Tombstones: []string{"t", "u"}}},
			[]keyed{live("k", "t", 5)},
			[]string{"OR_REMOVE k t"},
			0,
		},
	} {
		ops, gone := difference(&wire.ORMapPushDiff{MapName: "m", Entries: c.diff}, c.known)
		var got []string
		for _, op := range ops {
			got = append(got, fmt.Sprint(op.Kind, " ", op.Key, " ", op.Tag))
		}
		if !slices.Equal(got, c.ops) || len(gone) != c.gone {
			t.Errorf("%s: ops %q, %d gone", name, got, len(gone))
		}
	}
}

func TestDiffRequest(t *testing.T) {
	b := setup(t, nil, nil)
	b.partition.add("m", "k", "t", packed("v"), stamp(1))
	b.partition.add("m", "k", "u", nil, stamp(2))
	b.partition.add("m", "l", "w", packed("v"), stamp(3))
	p := b.hello(t)
	p.send(&wire.ORMapDiffRequest{MapName: "m", Keys: []string{"k", "none"}})
	m := expect[*wire.ORMapDiffResponse](p)
	if len(m.Entries) != 1 || m.Entries[0].Key != "k" || len(m.Entries[0].Records) != 1 || !slices.Equal(m.Entries[0].Tombstones, []string{"u"}) {
		t.Errorf("%+v", m)
	}
	p.send(&wire.ORMapDiffRequest{MapName: "m", Keys: []string{"none"}})
	if m := expect[*wire.ORMapDiffResponse](p); len(m.Entries) != 0 {
		t.Errorf("%+v", m)
	}
	p.send(&wire.ClientApplyAck{Cursor: 5})
	p.ping()
}

// After a gap a session gets the roots of the kinds that it looks at, and no others.
func TestGapPerKind(t *testing.T) {
	b := setup(t, nil, nil)
	c := b.orHello(t, "m")
	c.init(0)
	c.settle()
	both := b.hello(t)
	both.synced("m", 0)
	both.send(&wire.ORMapSyncInit{MapName: "m", HasClaimedEpoch: true})
	expect[*wire.ORMapSyncRespRoot](both)
	b.fanout.gap("m")
	expect[*wire.ORMapSyncRespRoot](c.wsClient)
	c.ping()
	expect[*wire.SyncRespRoot](both)
	expect[*wire.ORMapSyncRespRoot](both)
	both.ping()
}

// Frames of entries are bounded, and a key may go on in the next.
func TestEntriesAreCut(t *testing.T) {
	var records []keyed
	for i := range 100 {
		r := orRecord(fmt.Sprint("t", i), string(make([]byte, 10_000)), stamp(uint64(i+1)))
		records = append(records, keyed{wire.KeyedRecord{Key: fmt.Sprint("k", i/60), Record: r.Record}, r.Tag})
	}
	frames, seen := 0, 0
	for rest := records; len(rest) > 0; frames++ {
		var entries []wire.OREntry
		entries, rest = entriesOf(rest)
		size := len((&wire.ORMapDiffResponse{MapName: "m", Entries: entries}).AppendTo(nil))
		if size > pushBytes+20_000 {
			t.Errorf("a frame of %d bytes", size)
		}
		for _, e := range entries {
			seen += len(e.Records)
		}
	}
	if frames < 7 || seen != 100 {
		t.Errorf("%d frames, %d records", frames, seen)
	}
}

// A diff that cannot be merged ends the session, which makes the client push it again.
func TestPushUnavailable(t *testing.T) {
	var down atomic.Bool
	b := setup(t, func(c *Config) { c.ReadTimeout = 100_000_000 }, func(b *bench) {
		b.partition.before = func(_ context.Context, method string) error {
			if down.Load() && method != "Describe" {
				return errors.New("down")
			}
			return nil
		}
	})
	c := b.orHello(t, "m")
	c.m.Merge("k", orRecord("t", "v", stamp(1)))
	down.Store(true)
	c.push([]string{"k"})
	code, _ := c.closed()
	if code != 1013 {
		t.Errorf("closed with %d", code)
	}
}
