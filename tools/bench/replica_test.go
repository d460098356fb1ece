package main

import (
	"bufio"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/wire"
)

// fakeServer answers a Merkle sync over a pipe from a map, by walking only: it
// pushes nothing.
func fakeServer(t *testing.T, held *lwwmap.Map, root uint32) *conn {
	t.Helper()
	near, far := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- serve(far, held, root) }()
	t.Cleanup(func() {
		if err := errors.Join(near.Close(), <-done); err != nil {
			t.Errorf("fake server: %v", err)
		}
	})
	return &conn{Conn: near, read: bufio.NewReader(near)}
}

func serve(c net.Conn, held *lwwmap.Map, root uint32) error {
	defer c.Close()
	// The client may send several requests before it reads, so answers wait here.
	answers := make(chan wire.Message, merkle.LeafCount)
	var writer sync.WaitGroup
	writer.Go(func() {
		for m := range answers {
			_ = ws.WriteFrame(c, ws.NewBinaryFrame(m.AppendTo(nil))) // fails when the client has gone
		}
	})
	defer writer.Wait()
	defer close(answers)
	tree := merkle.NewTree(held.Leaves(merkle.Mixed), merkle.Mixed)
	for {
		header, err := ws.ReadHeader(c)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrClosedPipe) {
			return nil
		}
		if err != nil {
			return err
		}
		payload := make([]byte, header.Length)
		if _, err := io.ReadFull(c, payload); err != nil {
			return err
		}
		ws.Cipher(payload, header.Mask, 0)
		m, err := wire.DecodeClient(payload, wire.DefaultLimits())
		if err != nil {
			return err
		}
		switch m := m.(type) {
		case *wire.SyncInit:
			answers <- &wire.SyncRespRoot{
				MapName: m.MapName, RootHash: root, Timestamp: hlc.Timestamp{Millis: 77, NodeID: "server"},
			}
		case *wire.MerkleReqBucket:
			answers <- node(tree, held, m)
		default:
			return errors.New("unexpected " + m.Type())
		}
	}
}

func node(tree *merkle.Tree, held *lwwmap.Map, m *wire.MerkleReqBucket) wire.Message {
	if digits, hashes, ok := tree.Buckets(m.Path); ok {
		answer := &wire.SyncRespBuckets{MapName: m.MapName, Path: m.Path}
		for i := range digits {
			answer.Buckets = append(answer.Buckets, wire.Bucket{Digit: digits[i], Hash: hashes[i]})
		}
		return answer
	}
	first, _, _ := merkle.LeafRange(m.Path)
	answer := &wire.SyncRespLeaf{MapName: m.MapName, Path: m.Path}
	for key, record := range held.All() {
		if merkle.Leaf(merkle.Hash(key)) == first {
			answer.Records = append(answer.Records, wire.KeyedRecord{Key: key, Record: record})
		}
	}
	return answer
}

// filled returns a server's map and the replica of a client that wrote all of it.
func filled(keys ...string) (*lwwmap.Map, *replica) {
	held, acked := &lwwmap.Map{}, newReplica("m")
	clock := hlc.NewClock("writer", func() time.Time { return time.UnixMilli(1_700_000_000_000) })
	for i, key := range keys {
		record := held.Set(clock, key, value(key, strings.Repeat("1", i+1)), 0)
		acked.merge(key, record.Timestamp, record.Value)
	}
	return held, acked
}

func TestReplicaSyncWalksToEqualRoots(t *testing.T) {
	t.Parallel()
	held, acked := filled("alice", "carol", "dave")
	root := merkle.NewTree(held.Leaves(merkle.Mixed), merkle.Mixed).Root()
	client := newReplica("m")
	spent, err := client.sync(fakeServer(t, held, root))
	if err != nil {
		t.Fatal(err)
	}
	if err := client.check(acked); err != nil {
		t.Error(err)
	}
	if client.lastSync != 77 {
		t.Errorf("lastSync is %d, want the 77 of the root", client.lastSync)
	}
	// The root, then "", a digit, two digits and a leaf for each of three keys.
	if spent.requests != 2+3*3 || spent.roundTrips != 5 {
		t.Errorf("took %d requests in %d round trips, want 11 in 5", spent.requests, spent.roundTrips)
	}
	// A second sync finds nothing to do.
	if spent, err = client.sync(fakeServer(t, held, root)); err != nil || spent.requests != 1 {
		t.Errorf("the second sync took %d requests (%v), want 1", spent.requests, err)
	}
}

// The negative controls: a server that is fast because it answers wrongly.

func TestReplicaSyncFailsOnAWrongRoot(t *testing.T) {
	t.Parallel()
	held, _ := filled("alice", "bob")
	_, err := newReplica("m").sync(fakeServer(t, held, 4711))
	if err == nil || !strings.Contains(err.Error(), "roots differ") {
		t.Errorf("got %v, want that the roots differ", err)
	}
}

func TestReplicaCheckFailsOnALostOrOldRecord(t *testing.T) {
	t.Parallel()
	_, acked := filled("alice", "bob")
	_, lost := filled("alice")
	if err := lost.check(acked); err == nil {
		t.Error("a lost record was not noticed")
	}
	_, other := filled("bob", "alice")
	if err := other.check(acked); err == nil {
		t.Error("records with other stamps were not noticed")
	}
}
