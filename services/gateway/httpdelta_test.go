package gateway

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/wire"
)

// OR-maps over POST /sync: ops, deltas from a cursor, and winners.
func TestSyncORMaps(t *testing.T) {
	g := startGateway(t, nil, nil)
	g.partition.add("m", "k", "gone", nil, stamp(3))
	response := g.sync(&wire.SyncRequest{
		Operations: []wire.Op{addOp("1", "m", "k", "t", "v", stamp(5)), addOp("2", "m", "k", "u", "w", stamp(6)), dropOp("3", "m", "k", "u", stamp(7))},
		SyncMaps:   []wire.SyncMap{{MapName: "m", OR: true}, {MapName: "m"}},
	})
	if response.Ack == nil || response.Ack.LastID != "3" || len(response.Ack.Results) != 0 {
		t.Errorf("ack %+v", response.Ack)
	}
	if len(response.ORDeltas) != 1 || len(response.Deltas) != 1 || len(response.Deltas[0].Records) != 0 || len(response.Errors) != 0 {
		t.Fatalf("%+v", response)
	}
	delta := response.ORDeltas[0]
	if delta.MapName != "m" || len(delta.Entries) != 1 || delta.HasMore || delta.ServerSyncTimestamp.NodeID != g.partition.history {
		t.Fatalf("%+v", delta)
	}
	slices.Sort(delta.Entries[0].Tombstones)
	if e := delta.Entries[0]; e.Key != "k" || len(e.Records) != 1 || e.Records[0].Tag != "t" || !slices.Equal(e.Tombstones, []string{"gone", "u"}) {
		t.Errorf("%+v", e)
	}

	// From the cursor on there is nothing, but for what an op lost against.
	response = g.sync(&wire.SyncRequest{
		Operations: []wire.Op{addOp("4", "m", "k", "gone", "v", stamp(8)), addOp("5", "n", "k", "ahead", "v", stamp(uint64(time.Now().Add(time.Hour).UnixMilli())))},
		SyncMaps:   []wire.SyncMap{{MapName: "m", OR: true, LastSync: delta.ServerSyncTimestamp}},
	})
	if len(response.ORDeltas) != 2 || len(response.Deltas) != 0 {
		t.Fatalf("%+v", response)
	}
	if e := response.ORDeltas[0].Entries; len(e) != 1 || len(e[0].Records) != 0 || !slices.Equal(e[0].Tombstones, []string{"gone"}) {
		t.Errorf("%+v", e)
	}
	if d := response.ORDeltas[1]; d.MapName != "n" || len(d.Entries) != 1 || d.Entries[0].Records[0].Tag != "ahead" || !d.ServerSyncTimestamp.IsZero() {
		t.Errorf("%+v", d)
	}
	if errs := g.sync(&wire.SyncRequest{SyncMaps: []wire.SyncMap{{MapName: "m", OR: true}, {MapName: "m", OR: true}}}).Errors; len(errs) != 1 || errs[0].Code != 400 {
		t.Errorf("a map twice: %+v", errs)
	}
}

// A cursor from before deletions were forgotten begins anew, and says so (PROTOCOL 22.5).
func TestSyncCursorTooOld(t *testing.T) {
	g := startGateway(t, nil, func(p *fakePartition) { p.retention = uint64(time.Hour.Milliseconds()) })
	now := time.Now()
	g.partition.put("m", "k", text("v"), hlc.Timestamp{Millis: uint64(now.UnixMilli()), NodeID: "n"})
	for age, anew := range map[time.Duration]bool{50 * time.Minute: false, 70 * time.Minute: true} {
		cursor := hlc.Timestamp{Millis: uint64(now.Add(-age).UnixMilli()), NodeID: g.partition.history}
		response := g.sync(&wire.SyncRequest{SyncMaps: []wire.SyncMap{{MapName: "m", LastSync: cursor}}})
		if got := len(response.Errors) == 1 && response.Errors[0].Code == 410 && response.Errors[0].Context == "m"; got != anew || len(response.Deltas[0].Records) != 1 {
			t.Errorf("%v old: %+v", age, response)
		}
	}
	old := hlc.Timestamp{Millis: uint64(now.Add(-2 * time.Hour).UnixMilli()), NodeID: "n"}
	response := g.sync(&wire.SyncRequest{Operations: []wire.Op{{ID: "1", MapName: "m", Key: "x", Kind: wire.OpPut, Record: addOp("", "", "", "", "v", old).Record}}})
	if response.Ack == nil || len(response.Ack.Results) != 1 || response.Ack.Results[0].Success || !strings.HasPrefix(response.Ack.Results[0].Error, "TOO_OLD: ") {
		t.Errorf("ack %+v", response.Ack)
	}
}
