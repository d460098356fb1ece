package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/wire"
)

// replica is what one client knows of one map: enough to take part in a Merkle
// sync and to tell whether what arrived is right. It keeps no values, only hashes
// of them.
type replica struct {
	mapName string
	entries map[string]entry
	leaves  merkle.Leaves
	// lastSync is the server's time of the last root, in Unix milliseconds.
	lastSync uint64
}

type entry struct {
	stamp hlc.Timestamp
	value uint32 // FNV of the value's bytes
}

func newReplica(mapName string) *replica {
	return &replica{mapName: mapName, entries: make(map[string]entry)}
}

// merge takes a record that is newer than the one at key; others are ignored.
func (r *replica) merge(key string, stamp hlc.Timestamp, value []byte) {
	old, ok := r.entries[key]
	if ok && stamp.Compare(old.stamp) <= 0 {
		return
	}
	leaf := merkle.Leaf(merkle.Hash(key))
	if ok {
		r.leaves.Remove(leaf, merkle.ItemHash(key, old.stamp), merkle.Mixed)
	}
	r.leaves.Add(leaf, merkle.ItemHash(key, stamp), merkle.Mixed)
	r.entries[key] = entry{stamp, merkle.HashBytes(value)}
}

// cost is what one sync took.
type cost struct {
	took       time.Duration
	bytes      int // received
	requests   int // frames sent
	roundTrips int // requests that could not be sent before an answer came
}

// sync brings the replica up to date over a session, as PROTOCOL 8.2 has a client
// do it: it asks, merges what is pushed, compares the root, and walks the tree
// where it differs. It returns when the roots are equal.
func (r *replica) sync(c *conn) (cost, error) {
	start, before := time.Now(), c.bytesIn
	spent := cost{requests: 1, roundTrips: 1}
	if err := c.send(&wire.SyncInit{MapName: r.mapName, LastSyncTimestamp: r.lastSync}); err != nil {
		return spent, err
	}
	var (
		target *wire.SyncRespRoot
		asked  = map[string]bool{}
		depth  = 0 // of the deepest request of this walk, plus one
	)
	ask := func(tree *merkle.Tree, m *wire.SyncRespBuckets) error {
		for _, b := range m.Buckets {
			path := m.Path + string(b.Digit)
			if tree.Hash(path) == b.Hash {
				continue
			}
			if err := c.send(&wire.MerkleReqBucket{MapName: r.mapName, Path: path}); err != nil {
				return err
			}
			asked[path] = true
			spent.requests++
			depth = max(depth, len(path)+1)
		}
		return nil
	}
	for {
		m, err := c.receive()
		if err != nil {
			return spent, fmt.Errorf("sync %s: %w", r.mapName, err)
		}
		wholeTree := false
		switch m := m.(type) {
		case *wire.SyncRespLeaf:
			for _, rec := range m.Records {
				r.merge(rec.Key, rec.Record.Timestamp, rec.Record.Value)
			}
			// The answer to "" may be several frames with all records.
			wholeTree = m.Path == ""
			delete(asked, m.Path)
		case *wire.SyncRespRoot:
			target = m
		case *wire.SyncRespBuckets:
			delete(asked, m.Path)
			if err := ask(merkle.NewTree(&r.leaves, merkle.Mixed), m); err != nil {
				return spent, err
			}
		default:
			continue
		}
		if target == nil || len(asked) > 0 {
			continue
		}
		switch {
		case merkle.NewTree(&r.leaves, merkle.Mixed).Root() == target.RootHash:
			r.lastSync = target.Timestamp.Millis
			spent.roundTrips += depth
			spent.took, spent.bytes = time.Since(start), c.bytesIn-before
			return spent, nil
		case depth == 0:
			if err := c.send(&wire.MerkleReqBucket{MapName: r.mapName}); err != nil {
				return spent, err
			}
			asked[""] = true
			spent.requests++
			depth = 1
		case !wholeTree:
			return spent, fmt.Errorf("sync %s: the walk is over and the roots differ", r.mapName)
		}
	}
}

// check fails unless the replica, fetched from the server, is exactly what was
// acknowledged.
func (r *replica) check(acked *replica) error {
	if len(r.entries) != len(acked.entries) {
		return fmt.Errorf("map %s: the server has %d records, %d were acknowledged", r.mapName, len(r.entries), len(acked.entries))
	}
	for key, want := range acked.entries {
		if got := r.entries[key]; got != want {
			return fmt.Errorf("map %s: a record at the server is not the one that was acknowledged last", r.mapName)
		}
	}
	return nil
}

// verify fetches a map from the beginning and compares.
func verify(ctx context.Context, url string, acked *replica) (err error) {
	c, err := dial(ctx, url)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	fetched := newReplica(acked.mapName)
	if _, err := fetched.sync(c); err != nil {
		return err
	}
	return fetched.check(acked)
}
