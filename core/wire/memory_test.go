package wire_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"runtime"
	"testing"
	"unsafe"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/msgval"
	"github.com/topgun-sync/topgun/core/wire"
)

// What the package comment says about memory.
func TestAliasing(t *testing.T) {
	frame := batch(opWith(), opWith("id", "18"))
	m, err := wire.DecodeClient(frame, wire.DefaultLimits())
	if err != nil {
		t.Fatal(err)
	}
	ops := m.(*wire.OpBatch).Ops
	within := func(p *byte) bool {
		from := uintptr(unsafe.Pointer(unsafe.SliceData(frame)))
		return from <= uintptr(unsafe.Pointer(p)) && uintptr(unsafe.Pointer(p)) < from+uintptr(len(frame))
	}
	for _, op := range ops {
		if !within(unsafe.SliceData(op.Record.Value)) || !within(unsafe.StringData(op.ID)) {
			t.Error("the value or the id is a copy")
		}
		if cap(op.Record.Value) != len(op.Record.Value) {
			t.Error("appending to a value would write into the frame")
		}
		for _, s := range []string{op.Key, op.MapName, op.Record.Timestamp.NodeID} {
			if within(unsafe.StringData(s)) {
				t.Errorf("%q is no copy", s)
			}
		}
	}
	if unsafe.StringData(ops[0].MapName) != unsafe.StringData(ops[1].MapName) ||
		unsafe.StringData(ops[0].Record.Timestamp.NodeID) != unsafe.StringData(ops[1].Record.Timestamp.NodeID) {
		t.Error("equal map names or node ids are copied twice")
	}
}

// An operation costs one allocation, its key; encoding costs none.
func TestAllocations(t *testing.T) {
	ops := make([]any, 100)
	for i := range ops {
		ops[i] = opWith()
	}
	frame := batch(ops...)
	lim := wire.DefaultLimits()
	const perFrame = 6
	if n := testing.AllocsPerRun(50, func() {
		if _, err := wire.DecodeClient(frame, lim); err != nil {
			t.Fatal(err)
		}
	}); n > 100+perFrame {
		t.Errorf("decoding 100 operations allocates %v times", n)
	}
	op := decodeOp(t, opWith())
	buf := make([]byte, 0, 1<<16)
	event := &wire.ServerEvent{Event: wire.Event{MapName: op.MapName, EventType: op.Kind, Key: op.Key, Record: op.Record, HasRecord: true}}
	ack := &wire.OpAck{LastID: "17", AchievedLevel: "APPLIED"}
	add := &wire.ServerEvent{Event: wire.Event{MapName: op.MapName, EventType: wire.OpORAdd, Key: op.Key, Record: op.Record, HasRecord: true, Tag: "t"}}
	drop := &wire.ServerEvent{Event: wire.Event{MapName: op.MapName, EventType: wire.OpORRemove, Key: op.Key, Tag: "t"}}
	orLeaf := &wire.ORMapSyncRespLeaf{MapName: "m", Entries: []wire.OREntry{{Key: "k", Records: []wire.ORRecord{{Tag: "t", Record: op.Record}}, Tombstones: []string{"u"}}}}
	counter := &wire.CounterUpdate{Name: "c", State: wire.CounterState{Nodes: []wire.CounterNode{{NodeID: "a", Positive: 1}, {NodeID: "b", Negative: 2}}}}
	topic := &wire.TopicMessage{Topic: "t", Data: op.Record.Value, PublisherID: "u", Timestamp: 5}
	journal := &wire.JournalEvent{Event: wire.JournalEntry{Sequence: 1 << 40, Type: "PUT", MapName: "m", Key: "k", Value: op.Record.Value, Tag: "t"}}
	cluster := &wire.PartitionMap{NodeID: "n", WebSocketURL: "ws://n"}
	tail := wire.AppendQueryUpdateTail(nil, "k", op.Record.Value, "ENTER")
	inner := [][]byte{event.AppendTo(nil), ack.AppendTo(nil)}
	if n := testing.AllocsPerRun(50, func() {
		for _, m := range [...]wire.Message{event, ack, add, drop, orLeaf, counter, topic, journal, cluster} {
			m.AppendTo(buf)
		}
		wire.AppendQueryUpdate(buf, "q", tail)
		wire.AppendBatch(buf, inner...)
		w := wire.BeginLeaf(buf, "users", "872")
		for range 20 {
			w.Add(op.Key, op.Record)
		}
		w.End()
	}); n != 0 {
		t.Errorf("encoding allocates %v times", n)
	}
}

// What a frame announces is not paid for before it is there, and what is there
// costs a bounded multiple of its size.
func TestBoundedMemory(t *testing.T) {
	const size = 1 << 20
	// fill returns the frame with the element as often as size allows, in place of
	// the nil at the end of what head builds.
	fill := func(frame, element []byte, values int) []byte {
		n := size / len(element)
		at := bytes.LastIndexByte(frame, 0xc0)
		return append(binary.BigEndian.AppendUint32(append(frame[:at:at], 0xdd), uint32(n*values)), bytes.Repeat(element, n)...)
	}
	array := func(typ string, fields pairs, element any) []byte {
		return fill(pack(nil, pairs{"type", typ, "payload", append(fields, nil)}), pack(nil, element), 1)
	}
	oneEntry := func(field string, element any) []byte {
		return fill(push(pairs{"key", "k", field, nil}), pack(nil, element), 1)
	}
	side := fill(pack(nil, pairs{"type", "COUNTER_SYNC", "payload", pairs{"name", "c", "state", pairs{"p", nil}}}), pack(pack(nil, "a"), 1), 1)
	side[bytes.IndexByte(side, 0xdd)] = 0xdf
	for name, frame := range map[string][]byte{
		"tombstones of a byte":       oneEntry("tombstones", "t"),
		"empty tombstones":           oneEntry("tombstones", ""),
		"tombstones that are nil":    oneEntry("tombstones", nil),
		"records that are nil":       oneEntry("records", nil),
		"empty records":              oneEntry("records", pairs{}),
		"records":                    oneEntry("records", orRecord(nil, stamp(1, 1, "a"))),
		"entries that are nil":       array("ORMAP_PUSH_DIFF", pairs{"mapName", "m", "entries"}, nil),
		"empty entries":              array("ORMAP_PUSH_DIFF", pairs{"mapName", "m", "entries"}, pairs{}),
		"entries with a bad key":     array("ORMAP_PUSH_DIFF", pairs{"mapName", "m", "entries"}, pairs{"key", ""}),
		"records that are left out":  oneEntry("records", orRecord(nil, stamp(1, 1, ""))),
		"entries":                    array("ORMAP_PUSH_DIFF", pairs{"mapName", "m", "entries"}, pairs{"key", "k"}),
		"entries of a server":        array("ORMAP_SYNC_RESP_LEAF", pairs{"mapName", "m", "entries"}, pairs{"key", "k"}),
		"keys":                       array("ORMAP_DIFF_REQUEST", pairs{"mapName", "m", "keys"}, "k"),
		"nodes of a counter":         side,
		"nodes of a partition map":   array("PARTITION_MAP", pairs{"nodes"}, pairs{}),
		"types of a subscription":    fill(flat("JOURNAL_SUBSCRIBE", "requestId", "r", "types", nil), pack(nil, "PUT"), 1),
		"events of a journal":        fill(flat("JOURNAL_READ_RESPONSE", "events", nil), pack(nil, pairs{"type", "PUT", "timestamp", stamp(1, 1, "a")}), 1),
		"events of a journal, empty": fill(flat("JOURNAL_READ_RESPONSE", "events", nil), pack(nil, pairs{}), 1),
		"data of a topic":            wrapped("TOPIC_PUB", "topic", "t", "data", make([]byte, size)),
	} {
		if _, err := msgval.Check(frame); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for _, decode := range []func([]byte) (wire.Message, error){
			func(b []byte) (wire.Message, error) { return wire.DecodeClient(b, wire.DefaultLimits()) },
			wire.DecodeServer,
		} {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			_, err := decode(frame)
			runtime.ReadMemStats(&after)
			const most = 20
			if got := int(after.TotalAlloc - before.TotalAlloc); got > most*len(frame) {
				t.Errorf("%s: %d bytes for %d (%v)", name, got, len(frame), err)
			} else {
				t.Logf("%s: %.1f times (%v)", name, float64(got)/float64(len(frame)), err)
			}
		}
	}
}

func BenchmarkDecodeOpBatch(b *testing.B) {
	for _, n := range []int{1, 100} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			ops := make([]any, n)
			for i := range ops {
				ops[i] = opWith("key", fmt.Sprint("key", i))
			}
			frame := batch(ops...)
			lim := wire.DefaultLimits()
			b.SetBytes(int64(len(frame)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := wire.DecodeClient(frame, lim); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*n), "ns/record")
		})
	}
}

// The way of a record through core: decode, hash, update the leaf, encode the
// event.
func BenchmarkRecordPath(b *testing.B) {
	const n = 100
	ops := make([]any, n)
	for i := range ops {
		ops[i] = opWith("key", fmt.Sprint("key", i))
	}
	frame := batch(ops...)
	lim := wire.DefaultLimits()
	var leaves merkle.Leaves
	for i := range merkle.LeafCount {
		leaves.AddSum(i, 1)
	}
	var event wire.ServerEvent
	buf := make([]byte, 0, 1024)
	b.ReportAllocs()
	for b.Loop() {
		m, err := wire.DecodeClient(frame, lim)
		if err != nil {
			b.Fatal(err)
		}
		for _, op := range m.(*wire.OpBatch).Ops {
			h := merkle.Hash(op.Key)
			leaves.Add(merkle.Leaf(h), merkle.ItemHashOf(h, op.Record.Timestamp), merkle.Mixed)
			event.Event = wire.Event{MapName: op.MapName, EventType: op.Kind, Key: op.Key, Record: op.Record, HasRecord: true}
			buf = event.AppendTo(buf[:0])
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*n), "ns/record")
}

func BenchmarkLeafWriter(b *testing.B) {
	r := lwwmap.Record{Value: pack(nil, pairs{"name", "Alice", "age", 30}), Timestamp: hlc.Timestamp{Millis: 1700000000000, NodeID: "client-a"}}
	buf := make([]byte, 0, 1<<20)
	b.ReportAllocs()
	for b.Loop() {
		w := wire.BeginLeaf(buf, "users", "872")
		for range 100 {
			w.Add("user:1234567", r)
		}
		w.End()
	}
}
