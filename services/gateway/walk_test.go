package gateway

import (
	"fmt"
	"testing"
	"time"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/wire"
)

// A device's copy counts as complete only if its walk came to an end: not if an answer was
// still owed when the connection was lost, however long ago it was asked for, and not if
// nothing was heard of the client since the last one was sent.
func TestMRK04_AWalkThatIsCutCompletesNothing(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		end  func(a *aged, p *wsClient)
		done bool
	}{
		"walked to its end": {end: func(a *aged, p *wsClient) {
			if p.walk("m", map[string]hlc.Timestamp{}, merkle.Mixed) < 3 {
				t.Error("no walk")
			}
			a.leave(p)
		}, done: true},
		"an answer is owed": {end: func(a *aged, p *wsClient) {
			a.stuck.Store(true)
			p.send(&wire.MerkleReqBucket{MapName: "m", Path: "000"})
			a.goQuiet(p)
		}},
		"the client fell silent": {end: func(a *aged, p *wsClient) {
			p.ping()
			a.pass(quietTime + time.Second)
			_ = p.conn.Close()
		}},
		"more is asked for": {end: func(a *aged, p *wsClient) {
			a.pass(quietTime + time.Second)
			p.send(&wire.MerkleReqBucket{MapName: "m"})
			expect[*wire.SyncRespBuckets](p)
			_ = p.conn.Close()
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := setupAged(t, testRetention)
			for i := range 50 {
				a.partition.put("m", fmt.Sprint("k", i), packed("v"), stamp(a.millis()))
			}
			p := a.device(t, 1)
			_, root := p.synced("m", a.millis()) // it finds another root than its own
			if root.RootHash == 0 {
				t.Fatal("the map is empty")
			}
			c.end(a, p)
			eventually(t, func() bool { n, _ := a.service.sockets.count(); return n == 0 })
			a.service.sockets.devices.flush(t.Context())
			if at := a.cursors(1)["m"]; at > 0 != c.done {
				t.Errorf("complete at %d", at)
			}
		})
	}
}

// What is written while a client walks is in the answers that follow, or comes as an event.
func TestMRK04_WritesDuringAWalkArrive(t *testing.T) {
	b := setup(t, nil, nil)
	want := b.fill("m", 200, "v")
	p := b.hello(t)
	have := map[string]hlc.Timestamp{}
	_, root := p.synced("m", uint64(time.Now().Add(time.Minute).UnixMilli())) // nothing is pushed
	if root.RootHash != rootOf(want, merkle.Mixed) {
		t.Fatal("another root")
	}
	write := func(key string) {
		want[key] = stamp(uint64(1_000_000 + len(want)))
		b.partition.put("m", key, packed("later"), want[key])
	}
	p.send(&wire.MerkleReqBucket{MapName: "m"})
	for rootOf(have, merkle.Mixed) != rootOf(want, merkle.Mixed) {
		switch m := p.recv().(type) { // fails when nothing more comes
		case *wire.SyncRespBuckets:
			write("below " + m.Path) // a leaf may have been asked for, or never will be
			for _, bucket := range m.Buckets {
				p.send(&wire.MerkleReqBucket{MapName: "m", Path: m.Path + string(rune(bucket.Digit))})
			}
		case *wire.SyncRespLeaf:
			for _, r := range m.Records {
				have[r.Key] = r.Record.Timestamp
			}
		case *wire.ServerEvent:
			have[m.Key] = m.Record.Timestamp
		case *wire.ServerBatchEvent:
			for _, e := range m.Events {
				have[e.Key] = e.Record.Timestamp
			}
		}
	}
}
