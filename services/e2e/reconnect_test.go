package e2e

import (
	"fmt"
	"testing"
	"time"

	"github.com/topgun-sync/topgun/client"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/wire"
)

// thousand makes a map of 1,000 records whose reconnects are quiet: what arrived
// long enough ago is not sent again ahead of the root.
func thousand(t *testing.T, c Cluster, name string) (*client.Client, *client.Map, *traffic) {
	t.Helper()
	tr := new(traffic)
	a := open(t, webSocket(gateway(c, 0)), name+"-a", recording(tr))
	m := a.Map(name)
	for i := range 1000 {
		must(t, m.Set(fmt.Sprintf("key-%d", i), map[string]any{"title": "something to do", "n": i}))
	}
	flush(t, a)
	eventually(t, 2*deadline, func() error {
		if got := reconnect(t, a, m, tr); len(got) != 1 {
			return fmt.Errorf("a reconnect with equal data moves %d frames of the map", len(got))
		}
		return nil
	})
	return a, m, tr
}

// reconnect takes the client offline and online and returns the frames of the map
// that this brought.
func reconnect(t *testing.T, a *client.Client, m *client.Map, tr *traffic) []frame {
	t.Helper()
	a.Offline()
	tr.reset()
	a.Online()
	must(t, m.WaitSynced(within(t, deadline)))
	roundTrip(t, a)
	return tr.about(m.Name())
}

// roundTrip writes to another map and waits for the ack, so that whatever the
// server sent before has been seen.
func roundTrip(t *testing.T, a *client.Client) {
	t.Helper()
	must(t, a.Map("round_trips").Set(a.NodeID(), 0))
	flush(t, a)
}

// A client that comes back with the same data gets the root and nothing else.
func reconnectWithEqualData(t *testing.T, c Cluster) {
	const name = "equal_data"
	a, m, tr := thousand(t, c, name)
	for range 3 {
		got := reconnect(t, a, m, tr)
		if len(got) != 1 {
			t.Fatalf("%d frames of the map; want the root alone", len(got))
		}
		root, ok := got[0].Message.(*wire.SyncRespRoot)
		if !ok || root.RootHash != m.Root() || tr.requests(name) != 0 {
			t.Errorf("got %+v and sent %d bucket requests", got[0].Message, tr.requests(name))
		}
	}
}

// When three of a thousand records differ, those three travel if the client's last
// sync explains the difference, and the buckets of those three if it does not.
func threeOfAThousandDiffer(t *testing.T, c Cluster) {
	const name = "three_differ"
	a, m, tr := thousand(t, c, name)
	a.Offline()
	before := lwwmap.Map{} // what a client holds that missed the three writes
	for key, r := range m.Records() {
		before.Merge(key, r)
	}
	b := open(t, webSocket(gateway(c, 1)), name+"-b")
	bm := b.Map(name)
	must(t, bm.WaitSynced(within(t, deadline)))
	changed := []string{"key-17", "key-500", "one more"}
	for _, key := range changed {
		must(t, bm.Set(key, map[string]any{"title": "changed meanwhile"}))
	}
	flush(t, b)
	want := bm.Digest()

	// The last sync explains it: the records, then the root as the proof.
	got := reconnect(t, a, m, tr)
	if m.Digest() != want {
		t.Fatal("content differs after the reconnect")
	}
	records, bytes := 0, 0
	for i, f := range got {
		bytes += f.size
		switch msg := f.Message.(type) {
		case *wire.SyncRespLeaf:
			records += len(msg.Records)
		case *wire.SyncRespRoot:
			if i != len(got)-1 {
				t.Error("the root comes before the records")
			}
		default:
			t.Errorf("unexpected %s", msg.Type())
		}
	}
	if records != 3 || tr.requests(name) != 0 || bytes > 1500 {
		t.Errorf("%d records in %d bytes, %d bucket requests; want 3, at most 1500, 0", records, bytes, tr.requests(name))
	}

	// A client that claims to have been in sync later gets nothing ahead of the
	// root, and finds the three with the tree.
	w := walker{t: t, conn: dial(t, c, 0).hello(), name: name, content: &before}
	w.run(uint64(time.Now().Add(time.Hour).UnixMilli()))
	if before.Digest() != want {
		t.Fatal("content differs after the walk")
	}
	// The root, up to three nodes per level, three leaves, with a record or two each.
	if w.requests > 1+3*merkle.Depth || w.records > 3*4 || w.bytes > 6000 {
		t.Errorf("the walk took %d requests, %d records, %d bytes; only three of 4,096 buckets differ", w.requests, w.records, w.bytes)
	}
}

// walker is a second, independent client of the Merkle walk of PROTOCOL 8.2, which
// asks one question at a time.
type walker struct {
	t       *testing.T
	conn    *conn
	name    string
	content *lwwmap.Map

	requests, records, bytes int
}

func (w *walker) run(lastSync uint64) {
	w.t.Helper()
	w.conn.send(&wire.SyncInit{MapName: w.name, LastSyncTimestamp: lastSync})
	root, ok := w.conn.next().(*wire.SyncRespRoot)
	if !ok {
		w.t.Fatal("something comes ahead of the root")
	}
	todo := []string{""}
	for len(todo) > 0 && root.RootHash != w.tree().Root() {
		path := todo[0]
		todo = todo[1:]
		w.requests++
		w.conn.send(&wire.MerkleReqBucket{MapName: w.name, Path: path})
		msg := w.conn.next()
		w.bytes += len(msg.AppendTo(nil))
		switch msg := msg.(type) {
		case *wire.SyncRespBuckets:
			for _, b := range msg.Buckets {
				if child := path + string(rune(b.Digit)); b.Hash != w.tree().Hash(child) {
					todo = append(todo, child)
				}
			}
		case *wire.SyncRespLeaf:
			w.records += len(msg.Records)
			for _, r := range msg.Records {
				w.content.Merge(r.Key, r.Record)
			}
		default:
			w.t.Fatalf("got %s in answer to a bucket request", msg.Type())
		}
	}
}

func (w *walker) tree() *merkle.Tree {
	return merkle.NewTree(w.content.Leaves(merkle.Mixed), merkle.Mixed)
}
