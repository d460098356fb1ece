package wire_test

import (
	"fmt"
	"testing"
	"unsafe"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/merkle"
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
	if n := testing.AllocsPerRun(50, func() {
		event.AppendTo(buf)
		ack.AppendTo(buf)
		w := wire.BeginLeaf(buf, "users", "872")
		for range 20 {
			w.Add(op.Key, op.Record)
		}
		w.End()
	}); n != 0 {
		t.Errorf("encoding allocates %v times", n)
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
