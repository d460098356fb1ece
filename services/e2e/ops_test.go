package e2e

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/topgun-sync/topgun/client"
	"github.com/topgun-sync/topgun/core/wire"
)

// An op that arrives three times, through two gateways and both transports, has
// one effect (ACK-06).
func sameOpThreeTimes(t *testing.T, c Cluster) {
	const name = "three_times"
	var tr traffic
	watcher := open(t, webSocket(gateway(c, 0)), name+"-watcher", recording(&tr))
	wm := watcher.Map(name)
	must(t, wm.WaitSynced(within(t, deadline)))
	op := put("7", name, "k", "once", stamp(now(), 0, name+"-writer"))
	batch := &wire.OpBatch{Ops: []wire.Op{op}}

	first := dial(t, c, 0).hello()
	first.send(batch)
	if ack := expect[*wire.OpAck](first); ack.LastID != "7" {
		t.Errorf("lastId %s; want 7", ack.LastID)
	}
	_, cursor := deltas(t, postSync(t, gateway(c, 0), &wire.SyncRequest{SyncMaps: []wire.SyncMap{{MapName: name}}}))

	second := dial(t, c, 1).hello()
	second.send(batch)
	if ack := expect[*wire.OpAck](second); ack.LastID != "7" {
		t.Errorf("lastId %s at the second gateway; want 7", ack.LastID)
	}
	resp := postSync(t, gateway(c, 1), &wire.SyncRequest{
		Operations: []wire.Op{op}, SyncMaps: []wire.SyncMap{{MapName: name, LastSync: cursor}},
	})
	if resp.Ack == nil || resp.Ack.LastID != "7" {
		t.Errorf("ack %+v over HTTP; want lastId 7", resp.Ack)
	}
	if records, _ := deltas(t, resp); len(records) != 0 {
		t.Errorf("the repetitions arrived as %d changes of their own", len(records))
	}

	// A later write on the same key comes after whatever the repetitions caused.
	first.send(&wire.OpBatch{Ops: []wire.Op{put("8", name, "k", "twice", stamp(now(), 0, name+"-writer"))}})
	expect[*wire.OpAck](first)
	eventually(t, deadline, func() error {
		if v, _ := wm.Get("k"); v != "twice" {
			return fmt.Errorf("the watcher holds %v", v)
		}
		return nil
	})
	if n := len(tr.events(name, "k")); n != 2 {
		t.Errorf("%d events at the watcher for two writes", n)
	}
	sameRows(t, c, name, wm.Digest())
}

// An op that is wrong for good is refused by its id and covered by the ack; the
// others of its batch are applied (PROTOCOL 10.5).
func oneBrokenOpInABatch(t *testing.T, c Cluster) {
	const name = "broken_op"
	base := now()
	broken := put("2", name, "b", 2, stamp(base, 1, name))
	broken.Record.TTLMillis = 1 << 60
	frame := &wire.OpBatch{Ops: []wire.Op{
		put("1", name, "a", 1, stamp(base, 0, name)),
		broken,
		put("3", name, "__proto__", 3, stamp(base, 2, name)),
		put("4", name, "d", 4, stamp(base, 3, name)),
	}}
	conn := dial(t, c, 0).hello()
	conn.send(frame)
	rejected := map[string]string{}
	for acked := false; !acked; {
		switch msg := conn.next().(type) {
		case *wire.OpRejected:
			rejected[msg.OpID] = msg.Reason
		case *wire.OpAck:
			acked = true
			if msg.LastID != "4" {
				t.Errorf("lastId %s; want 4", msg.LastID)
			}
		case *wire.ErrorMessage:
			t.Fatalf("the batch is refused: %+v", msg)
		}
	}
	if len(rejected) != 2 || rejected["2"] == "" || rejected["3"] == "" {
		t.Errorf("rejected %v; want 2 and 3", rejected)
	}
	other := open(t, gateway(c, 1), name+"-other")
	m := other.Map(name)
	must(t, m.WaitSynced(within(t, deadline)))
	if _, a := m.Get("a"); !a || m.Len() != 2 {
		t.Errorf("%d records; want a and d", m.Len())
	}
}

// A record whose time is over becomes a tombstone, everywhere.
func expiryBecomesATombstone(t *testing.T, c Cluster) {
	const name = "expiry"
	a := open(t, webSocket(gateway(c, 0)), name+"-a")
	b := open(t, webSocket(gateway(c, 1)), name+"-b")
	bm := b.Map(name)
	must(t, bm.WaitSynced(within(t, deadline)))
	must(t, a.Map(name).SetTTL("k", "short", time.Second))
	must(t, a.Map(name).SetTTL("long", "long", time.Hour))
	flush(t, a)
	eventually(t, deadline, func() error {
		if r, ok := bm.Record("k"); !ok {
			return errors.New("the record has not arrived")
		} else if !r.Deleted() {
			return errors.New("the record is no tombstone")
		}
		return nil
	})
	written, _ := bm.Record("k")
	if written.Timestamp.NodeID != name+"-a-ttl" {
		t.Errorf("the tombstone's stamp is %v; want the record's, with the node id %s-a-ttl", written.Timestamp, name)
	}
	if _, ok := bm.Get("long"); !ok {
		t.Error("the other record is gone")
	}
	eventually(t, deadline, func() error {
		if a.Map(name).Digest() != bm.Digest() {
			return errors.New("the writer holds other content")
		}
		return nil
	})
	sameRows(t, c, name, bm.Digest())
}

// A write stamped an hour ahead gets a stamp of the server's. Its writer adopts
// that, later writes of others win, and the op sent again does nothing (CLK-02,
// PROTOCOL 22.4).
func aStampAnHourAhead(t *testing.T, c Cluster) {
	const name = "hour_ahead"
	fast := open(t, webSocket(gateway(c, 0)), name+"-fast", func(cfg *client.Config) {
		cfg.Now = func() time.Time { return time.Now().Add(time.Hour) }
	})
	var tr traffic
	honest := open(t, webSocket(gateway(c, 1)), name+"-honest", recording(&tr))
	fm, hm := fast.Map(name), honest.Map(name)
	must(t, fm.WaitSynced(within(t, deadline)))
	must(t, hm.WaitSynced(within(t, deadline)))

	must(t, fm.Set("k", "from the future"))
	original, _ := fm.Record("k")
	flush(t, fast)
	eventually(t, deadline, func() error {
		r, _ := fm.Record("k")
		if r.Timestamp.Millis > now()+60_000 {
			return fmt.Errorf("the writer holds the stamp %v", r.Timestamp)
		}
		if other, _ := hm.Record("k"); other.Timestamp != r.Timestamp {
			return fmt.Errorf("the writer holds %v, the other %v", r.Timestamp, other.Timestamp)
		}
		return nil
	})

	must(t, hm.Set("k", "later"))
	flush(t, honest)
	again := dial(t, c, 0).hello()
	again.send(&wire.OpBatch{Ops: []wire.Op{put("1", name, "k", "from the future", original.Timestamp)}})
	if ack := expect[*wire.OpAck](again); ack.LastID != "1" {
		t.Errorf("lastId %s; want 1", ack.LastID)
	}
	roundTrip(t, honest)
	if v, _ := hm.Get("k"); v != "later" {
		t.Errorf("the repetition overwrote the later write with %v", v)
	}
	eventually(t, deadline, func() error {
		if v, _ := fm.Get("k"); v != "later" {
			return fmt.Errorf("the fast client holds %v", v)
		}
		return nil
	})
	// The fast client's own clock still runs ahead, and every write of it is
	// treated alike.
	must(t, fm.Set("k", "future again"))
	flush(t, fast)
	eventually(t, deadline, func() error {
		if hm.Digest() != fm.Digest() {
			return errors.New("contents differ")
		}
		return nil
	})
	if v, _ := hm.Get("k"); v != "future again" {
		t.Errorf("the last write is lost: %v", v)
	}
	sameRows(t, c, name, hm.Digest())
}
