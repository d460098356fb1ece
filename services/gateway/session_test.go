package gateway

import (
	"strings"
	"testing"

	"github.com/gobwas/ws"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/wire"
)

// The exchange of PROTOCOL 23: three clients, one write, one removal.
func TestMinimalExchange(t *testing.T) {
	b := setup(t, nil, nil)
	a, bb := b.hello(t), b.hello(t)
	for _, p := range []*wsClient{a, bb} {
		records, root := p.synced("users", 0)
		if len(records) != 0 || root.RootHash != 0 || root.MapName != "users" {
			t.Fatalf("empty map: %d records, root %+v", len(records), root)
		}
		if root.Timestamp.NodeID != serverNode || root.Timestamp.Millis == 0 {
			t.Fatalf("root timestamp %v", root.Timestamp)
		}
	}
	ts := stamp(1760000000414)
	a.send(&wire.OpBatch{Ops: []wire.Op{putOp("1", "users", "alice", "Alice", ts)}})
	ack := expect[*wire.OpAck](a)
	if ack.LastID != "1" || ack.AchievedLevel != "APPLIED" || ack.Results != nil || ack.Timestamp.NodeID != serverNode {
		t.Fatalf("ack %+v", ack)
	}
	event := expect[*wire.ServerEvent](bb)
	if event.MapName != "users" || event.Key != "alice" || event.EventType != wire.OpPut ||
		event.Record.Timestamp != ts || string(event.Record.Value) != string(packed("Alice")) {
		t.Fatalf("event %+v", event)
	}
	if event.Timestamp.NodeID != serverNode || event.Timestamp.Millis < root0 {
		t.Fatalf("event timestamp %v", event.Timestamp)
	}

	c := b.hello(t)
	records, root := c.synced("users", 0)
	if len(records) != 1 || records[0].Key != "alice" || records[0].Record.Timestamp != ts {
		t.Fatalf("records %+v", records)
	}
	if want := rootOf(map[string]hlc.Timestamp{"alice": ts}, merkle.Mixed); root.RootHash != want {
		t.Fatalf("root %d, want %d", root.RootHash, want)
	}

	gone := stamp(1760000000867)
	a.send(&wire.OpBatch{Ops: []wire.Op{removeOp("2", "users", "alice", gone)}})
	if ack := expect[*wire.OpAck](a); ack.LastID != "2" {
		t.Fatalf("ack %+v", ack)
	}
	for _, p := range []*wsClient{bb, c} {
		event := expect[*wire.ServerEvent](p)
		if event.EventType != wire.OpRemove || !event.HasRecord || !event.Record.Deleted() || event.Record.Timestamp != gone {
			t.Fatalf("event %+v", event)
		}
	}
	a.ping() // the writer got no event of its own
}

const root0 = 1_700_000_000_000

func TestAuthNotRequired(t *testing.T) {
	b := setup(t, nil, nil)
	p := b.dial(t)
	p.send(&wire.Auth{Token: "whatever"})
	ack := expect[*wire.AuthAck](p)
	if ack.UserID != "" {
		t.Fatalf("user %q of an unverified token", ack.UserID)
	}
	p.send(&wire.Auth{Token: "whatever"})
	expect[*wire.AuthAck](p)

	q := b.dial(t)
	q.send(&wire.DeviceHello{DeviceToken: "bad"})
	first := expect[*wire.DeviceAck](q)
	if first.DeviceToken == "bad" || !strings.HasPrefix(first.DeviceToken, first.DeviceID+".") {
		t.Fatalf("device %+v", first)
	}
	r := b.dial(t)
	r.send(&wire.DeviceHello{DeviceToken: first.DeviceToken})
	if again := expect[*wire.DeviceAck](r); *again != *first {
		t.Fatalf("device %+v, want %+v", again, first)
	}
}

// Clients before 2026-04-23 wait for AUTH_ACK for ever.
func TestSilentClientIsGreeted(t *testing.T) {
	b := setup(t, nil, nil)
	p := b.dial(t)
	expect[*wire.AuthAck](p)
	p.ping() // once
}

func TestPing(t *testing.T) {
	b := setup(t, nil, nil)
	p := b.hello(t)
	p.ping()
	p.raw(masked(ws.OpPing, true, []byte("hi")))
	h, payload, err := p.frame()
	if err != nil || h.OpCode != ws.OpPong || string(payload) != "hi" {
		t.Fatalf("got %v %q %v, want a pong", h.OpCode, payload, err)
	}
}
