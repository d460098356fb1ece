package gateway

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/wire"
)

// fill stores n records and returns their stamps.
func (b *bench) fill(mapName string, n int, value string) map[string]hlc.Timestamp {
	stamps := make(map[string]hlc.Timestamp, n)
	for i := range n {
		key, ts := fmt.Sprintf("key-%d", i), stamp(uint64(1000+i))
		b.partition.put(mapName, key, packed(value), ts)
		stamps[key] = ts
	}
	return stamps
}

// A client that comes back gets what arrived meanwhile, then the root, in one round
// trip; with equal data no record moves.
func TestComingBack(t *testing.T) {
	b := setup(t, nil, nil)
	stamps := b.fill("m", 300, "v")
	p := b.hello(t)
	records, root := p.synced("m", 0)
	if len(records) != 300 || root.RootHash != rootOf(stamps, merkle.Mixed) {
		t.Fatalf("first sync: %d records, root %d", len(records), root.RootHash)
	}
	last := root.Timestamp.Millis
	q := b.hello(t)
	if records, again := q.synced("m", last); len(records) != 0 || again.RootHash != root.RootHash {
		t.Errorf("equal data: %d records, root %d", len(records), again.RootHash)
	}
	// An old stamp that arrives late is delivered: arrival counts (SYN-01).
	// Arrivals are in milliseconds.
	eventually(t, func() bool { return uint64(time.Now().UnixMilli()) > last })
	b.partition.put("m", "late", packed("v"), stamp(1))
	expect[*wire.ServerEvent](q) // else it may reach r too, amid its sync
	r := b.hello(t)
	if records, _ := r.synced("m", last); len(records) != 1 || records[0].Key != "late" {
		t.Errorf("after one change: %+v", records)
	}
	// A clock that is ahead of the server's gets the root alone.
	ahead := uint64(time.Now().Add(time.Hour).UnixMilli())
	if records, _ := r.synced("m", ahead); len(records) != 0 {
		t.Errorf("from the future: %d records", len(records))
	}
}

// A large map comes in frames of about pushBytes; a PONG goes ahead of what waits.
func TestPushInFrames(t *testing.T) {
	b := setup(t, nil, nil)
	value := string(make([]byte, 1000))
	stamps := b.fill("m", 2000, value) // 2 MB
	p := b.hello(t)
	p.send(&wire.SyncInit{MapName: "m"})
	got, frames := 0, 0
	for {
		m := p.recv()
		if root, ok := m.(*wire.SyncRespRoot); ok {
			if root.RootHash != rootOf(stamps, merkle.Mixed) {
				t.Errorf("root %d", root.RootHash)
			}
			break
		}
		leaf := m.(*wire.SyncRespLeaf)
		if size := len(leaf.AppendTo(nil)); size > 2*pushBytes {
			t.Errorf("a frame of %d bytes", size)
		}
		got += len(leaf.Records)
		frames++
	}
	if got != len(stamps) || frames < 2_000_000/(2*pushBytes) {
		t.Errorf("%d records in %d frames", got, frames)
	}
}

// walk fetches a map as a client with these records does, and returns how many
// requests it took.
func (p *wsClient) walk(mapName string, have map[string]hlc.Timestamp, combine merkle.Combine) (requests int) {
	p.t.Helper()
	own := func(path string) uint32 {
		var leaves merkle.Leaves
		for key, ts := range have {
			leaves.Add(merkle.Leaf(merkle.Hash(key)), merkle.ItemHash(key, ts), combine)
		}
		return merkle.NewTree(&leaves, combine).Hash(path)
	}
	p.send(&wire.MerkleReqBucket{MapName: mapName})
	open := 1
	got := make(map[string]hlc.Timestamp)
	for requests = 1; open > 0; {
		open--
		switch m := p.recv().(type) {
		case *wire.SyncRespBuckets:
			for _, bucket := range m.Buckets {
				path := m.Path + string(rune(bucket.Digit))
				if len(have) > 0 && own(path) == bucket.Hash {
					continue
				}
				p.send(&wire.MerkleReqBucket{MapName: mapName, Path: path})
				requests++
				open++
			}
		case *wire.SyncRespLeaf:
			for _, r := range m.Records {
				got[r.Key] = r.Record.Timestamp
			}
		default:
			p.t.Fatalf("got %T %+v during a walk", m, m)
		}
	}
	for key, ts := range got {
		have[key] = ts
	}
	return requests
}

// A cold walk ends with the server's root, and reads the leaves of the shards a few
// times, not once for each of its requests.
func TestWalk(t *testing.T) {
	b := setup(t, nil, nil)
	stamps := b.fill("m", 1000, "v")
	p := b.hello(t)
	have := map[string]hlc.Timestamp{}
	requests := p.walk("m", have, merkle.Mixed)
	if rootOf(have, merkle.Mixed) != rootOf(stamps, merkle.Mixed) || len(have) != 1000 {
		t.Errorf("%d records, root %d", len(have), rootOf(have, merkle.Mixed))
	}
	if requests < 900 {
		t.Errorf("%d requests, want a walk of all leaves", requests)
	}
	// 4 shards on one owner: a call for each reading.
	if reads := b.partition.called("Leaves"); reads > 20 {
		t.Errorf("%d reads of the leaves for %d requests", reads, requests)
	}
	if reads := b.partition.called("Records"); reads > 700 {
		t.Errorf("%d reads of records for about 670 leaves, want leaves of one parent together", reads)
	}
	// One difference costs one path.
	delete(have, "key-7")
	if requests := p.walk("m", have, merkle.Mixed); requests > 4 || len(have) != 1000 {
		t.Errorf("one difference: %d requests, %d records", requests, len(have))
	}
}

// Every bucket request is answered, also when nothing is there.
func TestEmptyBuckets(t *testing.T) {
	b := setup(t, nil, nil)
	p := b.hello(t)
	for _, path := range []string{"", "a", "ab"} {
		p.send(&wire.MerkleReqBucket{MapName: "nothing", Path: path})
		if m := expect[*wire.SyncRespBuckets](p); m.Path != path || len(m.Buckets) != 0 {
			t.Errorf("path %q: %+v", path, m)
		}
	}
	p.send(&wire.MerkleReqBucket{MapName: "nothing", Path: "abc"})
	if m := expect[*wire.SyncRespLeaf](p); m.Path != "abc" || len(m.Records) != 0 {
		t.Errorf("leaf: %+v", m)
	}
}

// PROTOCOL 7.7.
func TestCombineIsDetected(t *testing.T) {
	b := setup(t, nil, nil)
	stamps := b.fill("m", 50, "v")
	mixed, plain := rootOf(stamps, merkle.Mixed), rootOf(stamps, merkle.Plain)
	var sumPlain, sumMixed uint32
	buckets := map[string]uint32{"1": 77, "a": 1234567}
	for _, h := range buckets {
		sumPlain += h
		sumMixed += merkle.Mix(h)
	}
	for name, c := range map[string]struct {
		say  []wire.Message
		want uint32
	}{
		"nothing said":      {nil, mixed},
		"DEVICE_HELLO":      {[]wire.Message{&wire.DeviceHello{}}, mixed},
		"plain OR-map root": {[]wire.Message{&wire.ORMapSyncInit{MapName: "o", RootHash: sumPlain, BucketHashes: buckets}}, plain},
		"mixed OR-map root": {[]wire.Message{&wire.ORMapSyncInit{MapName: "o", RootHash: sumMixed, BucketHashes: buckets}}, mixed},
		"plain but new": {[]wire.Message{
			&wire.DeviceHello{}, &wire.ORMapSyncInit{MapName: "o", RootHash: sumPlain, BucketHashes: buckets},
		}, mixed},
		"plain with an epoch": {[]wire.Message{
			&wire.ORMapSyncInit{MapName: "o", RootHash: sumPlain, BucketHashes: buckets, HasClaimedEpoch: true},
		}, mixed},
		"empty OR-map": {[]wire.Message{&wire.ORMapSyncInit{MapName: "o"}}, mixed},
	} {
		t.Run(name, func(t *testing.T) {
			p := b.dial(t)
			for _, m := range c.say {
				p.send(m)
				p.recv()
			}
			if _, root := p.synced("m", 0); root.RootHash != c.want {
				t.Errorf("root %d, want %d", root.RootHash, c.want)
			}
		})
	}
}

// A root holds the session's own ops that came before its SYNC_INIT, though they were
// not acked yet: else it would start a walk for nothing.
func TestRootHoldsOwnOps(t *testing.T) {
	g := newGate()
	b := setup(t, nil, func(b *bench) { b.partition.before = g.before })
	p := b.hello(t)
	p.send(&wire.OpBatch{Ops: []wire.Op{putOp("1", "m", "k", "v", stamp(5))}})
	p.send(&wire.SyncInit{MapName: "m", LastSyncTimestamp: 1})
	<-g.entered
	p.ping()
	g.release()
	expect[*wire.OpAck](p)
	for {
		m := p.recv()
		if _, ok := m.(*wire.SyncRespLeaf); ok {
			continue
		}
		root, ok := m.(*wire.SyncRespRoot)
		if !ok || root.RootHash != rootOf(map[string]hlc.Timestamp{"k": stamp(5)}, merkle.Mixed) {
			t.Errorf("got %+v, want the root with the op", m)
		}
		break
	}
	p.ping() // and no second root for the op's interest
}

// PROTOCOL 8.2: a map opened late is never SYNC_INITed by the client, so its first op
// gets it the root, once, and its changes from then on. Of queries see TestQueryProbesTheMap.
func TestUnaskedRoot(t *testing.T) {
	b := setup(t, nil, nil)
	stamps := b.fill("m", 10, "v")
	p := b.hello(t)
	p.send(&wire.OpBatch{Ops: []wire.Op{putOp("1", "m", "mine", "v", stamp(5))}})
	expect[*wire.OpAck](p)
	stamps["mine"] = stamp(5)
	if root := expect[*wire.SyncRespRoot](p); root.RootHash != rootOf(stamps, merkle.Mixed) {
		t.Errorf("root %d", root.RootHash)
	}
	b.partition.put("m", "theirs", packed("v"), stamp(9))
	if e := expect[*wire.ServerEvent](p); e.Key != "theirs" {
		t.Errorf("event %+v", e)
	}
	p.send(&wire.OpBatch{Ops: []wire.Op{putOp("2", "m", "again", "v", stamp(6))}})
	expect[*wire.OpAck](p)
	p.ping() // no second root
}

// An op on a map that was SYNC_INITed brings no root.
func TestNoUnaskedRootAfterSync(t *testing.T) {
	b := setup(t, nil, nil)
	p := b.hello(t)
	p.synced("m", 0)
	p.send(&wire.OpBatch{Ops: []wire.Op{putOp("1", "m", "k", "v", stamp(5))}})
	expect[*wire.OpAck](p)
	p.ping()
}

func TestTooManyMaps(t *testing.T) {
	b := setup(t, func(c *Config) { c.MaxMaps = 3 }, nil)
	p := b.hello(t)
	for i := range 3 {
		p.synced(fmt.Sprint("m", i), 0)
	}
	p.send(&wire.SyncInit{MapName: "m3"})
	if e := expect[*wire.ErrorMessage](p); e.Code != 429 {
		t.Errorf("got %+v", e)
	}
	for range 2 * maxErrors { // the surplus is no bad message: the maps that fit must not suffer
		p.send(&wire.SyncInit{MapName: "m3"})
		expect[*wire.ErrorMessage](p)
	}
	p.synced("m0", 0) // known ones go on
	// An op is applied all the same.
	p.send(&wire.OpBatch{Ops: []wire.Op{putOp("1", "m4", "k", "v", stamp(5))}})
	expect[*wire.OpAck](p)
	p.ping()
}

// Owners that cannot be read end the session: the client asks again when it connects.
func TestUnreadable(t *testing.T) {
	var down atomic.Bool
	b := setup(t, func(c *Config) { c.ReadTimeout = time.Second }, func(b *bench) {
		b.partition.before = func(_ context.Context, method string) error {
			if down.Load() && method != "Describe" {
				return errors.New("down")
			}
			return nil
		}
	})
	clients := map[string]*wsClient{}
	requests := map[string]wire.Message{
		"SYNC_INIT": &wire.SyncInit{MapName: "m"},
		"root only": &wire.SyncInit{MapName: "m", LastSyncTimestamp: 1 << 50},
		"bucket":    &wire.MerkleReqBucket{MapName: "n"}, // "m" may still be known
		"leaf":      &wire.MerkleReqBucket{MapName: "m", Path: "abc"},
	}
	for name := range requests {
		clients[name] = b.hello(t)
		clients[name].synced("m", 1<<50)
	}
	down.Store(true)
	for name, m := range requests {
		clients[name].send(m)
	}
	for name, p := range clients {
		code, before := p.closed()
		if code != 1013 || len(before) != 1 || before[0].(*wire.ErrorMessage).Code != 503 {
			t.Errorf("%s: closed with %d after %+v, want 1013 after 503", name, code, before)
		}
	}
}
