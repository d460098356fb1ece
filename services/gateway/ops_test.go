package gateway

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/wire"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
)

// gate holds Apply calls until it is opened.
type gate struct {
	entered chan struct{}
	open    chan struct{}
	once    sync.Once
}

func newGate() *gate { return &gate{entered: make(chan struct{}, 1000), open: make(chan struct{})} }

func (g *gate) before(ctx context.Context, method string) error {
	if method != "Apply" {
		return nil
	}
	g.entered <- struct{}{}
	select {
	case <-g.open:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (g *gate) release() { g.once.Do(func() { close(g.open) }) }

// A bad op in a batch is rejected alone, and the ack covers it (PROTOCOL 10.5).
func TestRejectedOps(t *testing.T) {
	b := setup(t, nil, func(b *bench) {
		b.partition.reject = func(op *partitionv1.Op) string {
			if string(op.Key) == "no" {
				return "STAMP_REUSED: another value has this stamp"
			}
			return ""
		}
	})
	p := b.hello(t)
	orAdd := putOp("4", "m", "k", "v", stamp(4))
	orAdd.Kind, orAdd.Tag = wire.OpORAdd, "tag"
	p.send(&wire.OpBatch{Ops: []wire.Op{
		putOp("1", "m", "good", "v", stamp(1)),
		putOp("2", "m", "no", "v", stamp(2)),
		putOp("3", "m", "", "v", stamp(3)),
		orAdd,
		putOp("5", "m", "last", "v", stamp(5)),
	}})
	for _, want := range []struct {
		id   string
		code int
		name string
	}{{"2", 400, "STAMP_REUSED: "}, {"3", 400, "BAD_KEY: "}} {
		r := expect[*wire.OpRejected](p)
		if r.OpID != want.id || r.Code != want.code || !strings.HasPrefix(r.Reason, want.name) {
			t.Errorf("got %+v, want %+v", r, want)
		}
	}
	if ack := expect[*wire.OpAck](p); ack.LastID != "5" || ack.AchievedLevel != "APPLIED" || ack.Results != nil {
		t.Errorf("ack %+v", ack)
	}
	for key, there := range map[string]bool{"good": true, "no": false, "last": true} {
		if (b.partition.record("m", key) != nil) != there {
			t.Errorf("key %q: stored = %v, want %v", key, !there, there)
		}
	}
}

// A batch of rejected ops only is acked too.
func TestOnlyRejected(t *testing.T) {
	b := setup(t, nil, nil)
	p := b.hello(t)
	p.send(&wire.OpBatch{Ops: []wire.Op{putOp("7", "m", "", "v", stamp(3))}})
	expect[*wire.OpRejected](p)
	if ack := expect[*wire.OpAck](p); ack.LastID != "7" || ack.AchievedLevel != "" {
		t.Errorf("ack %+v", ack)
	}
}

// The writer of an op that lost, or whose stamp was replaced, learns the winner before
// the ack (PROTOCOL 22.4).
func TestWinnersReachTheWriter(t *testing.T) {
	b := setup(t, nil, nil)
	b.partition.put("m", "k", packed("newer"), hlc.Timestamp{Millis: 100, NodeID: "other"})
	b.partition.put("m", "gone", nil, hlc.Timestamp{Millis: 100, NodeID: "other"})
	p := b.hello(t)
	future := stamp(uint64(time.Now().Add(time.Hour).UnixMilli()))
	batch := &wire.OpBatch{Ops: []wire.Op{
		putOp("1", "m", "k", "older", stamp(50)),
		putOp("2", "m", "gone", "older", stamp(50)),
		putOp("3", "m", "future", "v", future),
	}}
	p.send(batch)
	if e := expect[*wire.ServerEvent](p); e.Key != "k" || string(e.Record.Value) != string(packed("newer")) {
		t.Errorf("event %+v", e)
	}
	if e := expect[*wire.ServerEvent](p); e.Key != "gone" || e.EventType != wire.OpRemove || !e.Record.Deleted() {
		t.Errorf("event %+v", e)
	}
	stored := expect[*wire.ServerEvent](p)
	if stored.Key != "future" || stored.Record.Timestamp.Millis >= future.Millis {
		t.Errorf("event %+v, want a stamp of the server's", stored)
	}
	if ack := expect[*wire.OpAck](p); ack.LastID != "3" {
		t.Errorf("ack %+v", ack)
	}
	// The same op again gets the same record again.
	p.send(&wire.OpBatch{Ops: batch.Ops[2:]})
	for {
		m := p.recv()
		if _, ok := m.(*wire.SyncRespRoot); ok {
			continue // unasked, for a map without SYNC_INIT
		}
		if e, ok := m.(*wire.ServerEvent); !ok || e.Record.Timestamp != stored.Record.Timestamp {
			t.Errorf("again: %+v, want the record of before", m)
		}
		break
	}
}

// Batches are pipelined, acks leave in their order, and a PING overtakes them.
func TestPipelining(t *testing.T) {
	g := newGate()
	b := setup(t, nil, func(b *bench) { b.partition.before = g.before })
	defer g.release()
	p := b.hello(t)
	const batches = 100 // more than MaxInFlight
	for i := range batches {
		p.send(&wire.OpBatch{Ops: []wire.Op{putOp(strconv.Itoa(i+1), "m", fmt.Sprint("k", i), "v", stamp(uint64(i+1)))}})
	}
	<-g.entered
	p.ping()
	g.release()
	for i := 0; i < batches; {
		switch m := p.recv().(type) {
		case *wire.OpAck:
			i++
			if m.LastID != strconv.Itoa(i) {
				t.Fatalf("ack %s, want %d", m.LastID, i)
			}
		case *wire.SyncRespRoot: // unasked, for a map without SYNC_INIT
		default:
			t.Fatalf("got %T", m)
		}
	}
}

// The bytes of the ops in flight are bounded; what is above the bound waits in the
// socket, and all of it is acked in the end.
func TestInFlightBound(t *testing.T) {
	g := newGate()
	b := setup(t, func(c *Config) { c.MaxMessageBytes = 20_000; c.MaxInFlight = 2 }, func(b *bench) { b.partition.before = g.before })
	defer g.release()
	p := b.hello(t)
	value := strings.Repeat("x", 9000)
	const batches = 8
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		for i := range batches {
			_, _ = p.conn.Write(masked(0x2, true, (&wire.OpBatch{Ops: []wire.Op{
				putOp(strconv.Itoa(i+1), "m", "k", value, stamp(uint64(i+1))),
			}}).AppendTo(nil)))
		}
	}()
	<-sent // into the socket's buffers
	<-g.entered
	k := b.service.sockets
	s := k.snapshot()[0]
	s.mu.Lock()
	if s.ops.bytes > 20_000 {
		t.Errorf("%d bytes of ops in flight, want at most 20000", s.ops.bytes)
	}
	s.mu.Unlock()
	g.release()
	for last := ""; last != strconv.Itoa(batches); {
		if ack, ok := p.recv().(*wire.OpAck); ok {
			last = ack.LastID
		}
	}
}

// What could not be applied is never covered: the done prefix is acked, then the client
// is told to come again (ACK-05).
func TestUnavailable(t *testing.T) {
	t.Parallel()
	var keys [4]string // one of each shard
	for i := 0; keys[0] == "" || keys[1] == "" || keys[2] == "" || keys[3] == ""; i++ {
		key := fmt.Sprint("key", i)
		keys[shardOf(key)] = key
	}
	for _, c := range []struct {
		name    string
		refusal partitionv1.Refusal
		ids     [3]string
		acked   string // lastId of the ack, or empty for none
		code    int
	}{
		{"unavailable", partitionv1.Refusal_REFUSAL_UNAVAILABLE, [3]string{"5", "6", "7"}, "5", 503},
		{"overloaded", partitionv1.Refusal_REFUSAL_OVERLOADED, [3]string{"5", "6", "7"}, "5", 429},
		{"ids do not rise", partitionv1.Refusal_REFUSAL_UNAVAILABLE, [3]string{"9", "6", "7"}, "", 503},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel() // each waits for ApplyTimeout
			b := setup(t, func(c *Config) { c.ApplyTimeout = 2 * time.Second }, func(b *bench) {
				b.partition.refuse = func(shard uint32) (partitionv1.Refusal, uint32) {
					if shard == 1 {
						return c.refusal, 10
					}
					return 0, 0
				}
			})
			p := b.hello(t)
			p.send(&wire.OpBatch{Ops: []wire.Op{
				putOp(c.ids[0], "m", keys[0], "v", stamp(1)),
				putOp(c.ids[1], "m", keys[1], "v", stamp(2)),
				putOp(c.ids[2], "m", keys[2], "v", stamp(3)),
			}})
			// What comes after it could be applied, but an ack of it would cover it.
			p.send(&wire.OpBatch{Ops: []wire.Op{putOp("8", "m", keys[3], "v", stamp(4))}})
			code, before := p.closed()
			if code != 1013 {
				t.Errorf("closed with %d, want 1013", code)
			}
			acked, status := "", 0
			for _, m := range before {
				switch m := m.(type) {
				case *wire.OpAck:
					acked += m.LastID
				case *wire.ErrorMessage:
					status = m.Code
				}
			}
			if acked != c.acked || status != c.code {
				t.Errorf("acked %q, error %d; want %q, %d", acked, status, c.acked, c.code)
			}
		})
	}
}

func TestIDsAndLevels(t *testing.T) {
	b := setup(t, nil, func(b *bench) { b.partition.level = partitionv1.Level_LEVEL_MEMORY })
	p := b.hello(t)
	p.synced("m", 0)
	for i, c := range []struct {
		ids     []string
		concern string
		lastID  string
		success []bool // of results, or nil for none
	}{
		{[]string{"1", "2"}, "", "2", nil},
		{[]string{"1", "2"}, "FIRE_AND_FORGET", "2", nil},
		{[]string{"1", "2"}, "MEMORY", "2", nil},
		{[]string{"1", "2"}, "PERSISTED", "2", []bool{false, false}},
		{[]string{"a", "2"}, "", "0", []bool{true, true}},
		{[]string{"12abc"}, "", "0", []bool{true}},
		{[]string{"-1"}, "", "0", []bool{true}},
		{[]string{"12345678901234567"}, "", "0", []bool{true}},
	} {
		batch := &wire.OpBatch{WriteConcern: c.concern, TimeoutMillis: 20} // nothing gets stored
		for j, id := range c.ids {
			batch.Ops = append(batch.Ops, putOp(id, "m", fmt.Sprintf("k%d-%d", i, j), "v", stamp(uint64(i+1))))
		}
		p.send(batch)
		ack := expect[*wire.OpAck](p)
		if ack.LastID != c.lastID || ack.AchievedLevel != "MEMORY" || len(ack.Results) != len(c.success) {
			t.Errorf("%q %s: ack %+v", c.ids, c.concern, ack)
			continue
		}
		for j, r := range ack.Results {
			if r.OpID != c.ids[j] || r.Success != c.success[j] || r.AchievedLevel != "MEMORY" {
				t.Errorf("%q %s: result %+v", c.ids, c.concern, r)
			}
		}
	}
	p.send(&wire.OpBatch{WriteConcern: "ALWAYS", Ops: []wire.Op{putOp("1", "m", "never", "v", stamp(1))}})
	if e := expect[*wire.ErrorMessage](p); e.Code != 400 {
		t.Errorf("unknown level: %+v", e)
	}
	if b.partition.record("m", "never") != nil {
		t.Error("an op of a bad batch was applied")
	}
}

func TestTooManyOps(t *testing.T) {
	b := setup(t, nil, nil)
	p := b.hello(t)
	batch := &wire.OpBatch{}
	for i := range 1001 {
		batch.Ops = append(batch.Ops, putOp(strconv.Itoa(i+1), "m", fmt.Sprint("k", i), "v", stamp(1)))
	}
	p.send(batch)
	if e := expect[*wire.ErrorMessage](p); e.Code != 413 || !strings.HasPrefix(e.Message, "TOO_MANY_OPS") {
		t.Errorf("got %+v", e)
	}
	if b.partition.called("Apply") != 0 {
		t.Error("some were applied")
	}
	// Garbage that is no batch loses no op.
	other := b.hello(t)
	other.payload([]byte{0xc1})
	expect[*wire.ErrorMessage](other)
	other.send(&wire.OpBatch{Ops: batch.Ops[:1]})
	if ack := expect[*wire.OpAck](other); ack.LastID != "1" || ack.Results != nil {
		t.Errorf("after garbage: lastId %s, %d results", ack.LastID, len(ack.Results))
	}
	// A lastId would cover the ops that were refused (ACK-05).
	p.send(&wire.OpBatch{Ops: batch.Ops[:1000]})
	if ack := expect[*wire.OpAck](p); ack.LastID != "0" || len(ack.Results) != 1000 || !ack.Results[999].Success {
		t.Errorf("after a refused batch: lastId %s, %d results", ack.LastID, len(ack.Results))
	}
}
