package e2e

import (
	"errors"
	"testing"
	"time"

	"github.com/topgun-sync/topgun/core/wire"
)

// TestTMB01_ALateDeviceResurrectsNothing: once tombstones are gone, a device that was
// away for longer than they are kept is told to start over, and what it still has to
// say about the deleted keys is refused.
func TestTMB01_ALateDeviceResurrectsNothing(t *testing.T) {
	t.Parallel()
	for topology, start := range map[string]func(testing.TB, options) Cluster{
		"one process": newOneProcess, "four processes": newFourProcesses,
	} {
		t.Run(topology, func(t *testing.T) {
			t.Parallel() // it waits for most of its time
			const retention = time.Minute
			lateDevice(t, start(t, options{retention: retention}), retention)
		})
	}
}

func lateDevice(t *testing.T, c Cluster, retention time.Duration) {
	const name = "late_device"
	base := now()
	old := dial(t, c, 0)
	old.send(&wire.DeviceHello{})
	token := expect[*wire.DeviceAck](old).DeviceToken
	old.send(&wire.SyncInit{MapName: name})
	expect[*wire.SyncRespRoot](old)

	first := put("", name, "k", "old", stamp(base, 0, name))
	gone := wire.Op{MapName: name, Key: "k", Kind: wire.OpRemove}
	gone.Record.Timestamp = stamp(base, 1, name)
	add := orAdd(name, "k", "old", stamp(base, 2, name))
	write(t, c, 0, first, gone, add, orRemove(name, "k", add.Tag, stamp(base, 3, name)))
	must(t, old.ws.Close(1000, ""))

	stays := dial(t, c, 1).hello().listen()
	var pinged time.Time
	eventually(t, 2*retention, func() error {
		if time.Since(pinged) > 10*time.Second { // silence would end the session
			pinged = time.Now()
			stays.send(wire.PingAt(now()))
		}
		for _, m := range received[*wire.GCPrune](stays) {
			if m.OlderThan.Millis > base {
				return nil
			}
		}
		return errors.New("the tombstones are not pruned yet")
	})

	late := dial(t, c, 1)
	late.send(&wire.DeviceHello{DeviceToken: token})
	expect[*wire.DeviceAck](late)
	late.send(&wire.SyncInit{MapName: name, LastSyncTimestamp: base})
	if m := expect[*wire.SyncResetRequired](late); m.MapName != name {
		t.Errorf("reset of %s", m.MapName)
	}
	late.send(&wire.ORMapSyncInit{MapName: name, RootHash: 7, LastSyncTimestamp: base}) // it holds something
	if m := expect[*wire.ORMapSyncRespRoot](late); !m.FullResync {
		t.Error("the late device was not told to fetch the OR-map anew")
	}
	// It says again what it said before the deletion.
	late.send(&wire.ORMapPushDiff{MapName: name, Entries: []wire.OREntry{
		{Key: "k", Records: []wire.ORRecord{{Tag: add.Tag, Record: add.Record}}},
	}})
	first.ID, add.ID = "1", "2"
	fresh := put("3", name, "new", "kept", stamp(now(), 4, name))
	late.send(&wire.OpBatch{Ops: []wire.Op{first, add, fresh}})
	rejected := map[string]int{}
	for acked := false; !acked; {
		switch m := late.next().(type) {
		case *wire.OpRejected:
			rejected[m.OpID] = m.Code
		case *wire.OpAck:
			acked = true
			if m.LastID != "3" {
				t.Errorf("lastId %s; want 3", m.LastID)
			}
		}
	}
	if len(rejected) != 2 || rejected["1"] != 410 || rejected["2"] != 410 {
		t.Errorf("rejected %v; want ops 1 and 2, with 410", rejected)
	}
	m := openOR(dial(t, c, 0).hello().listen(), name)
	resp := postSync(t, gateway(c, 0), &wire.SyncRequest{SyncMaps: []wire.SyncMap{{MapName: name}, {MapName: name, OR: true}}})
	if records, _ := deltas(t, resp); len(records) != 1 || records["new"].Key == "" {
		t.Errorf("the map holds %v; want what is new alone", records)
	}
	if len(resp.ORDeltas) != 1 || len(resp.ORDeltas[0].Entries) != 0 {
		t.Errorf("the OR-map holds %+v; want nothing", resp.ORDeltas)
	}
	m.want(map[string]string{})
	eventually(t, deadline, func() error {
		if rows := c.Rows(t, name); len(rows) != 1 {
			return errors.New("the database still holds the tombstone")
		}
		return nil
	})
}
