package gateway

import (
	"fmt"
	"testing"

	"github.com/topgun-sync/topgun/core/wire"
	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

// commit publishes changes of one commit in a map.
func (b *bench) commit(name string, changes ...*typesv1.Change) {
	for i, c := range changes {
		c.Arrival = &typesv1.Arrival{Millis: 77, Counter: uint64(i)}
	}
	b.fanout.publish(&fanoutv1.Event{Map: name, Lane: "l", Sequence: 1, Changes: changes})
}

func lwwChange(key string, value []byte) *typesv1.Change {
	return &typesv1.Change{Key: []byte(key), Record: &typesv1.Record{Value: value, Timestamp: &typesv1.Timestamp{Millis: 5, NodeId: "n"}}}
}

func orChange(key, tag string, value []byte) *typesv1.Change {
	c := lwwChange(key, value)
	c.Kind, c.Tag = typesv1.Kind_KIND_OR, tag
	return c
}

// Several changes of a commit leave as one frame, a single one as itself.
func TestOneFrameForACommit(t *testing.T) {
	b := setup(t, nil, nil)
	p := b.hello(t)
	p.synced("m", 0)
	b.commit("m", lwwChange("one", packed("v")))
	if e := expect[*wire.ServerEvent](p); e.Key != "one" || e.Timestamp.Counter != 0 {
		t.Errorf("%+v", e)
	}
	b.commit("m", lwwChange("a", packed("v")), lwwChange("b", nil), lwwChange("c", packed("v")))
	m := expect[*wire.ServerBatchEvent](p)
	if len(m.Events) != 3 || m.Events[0].Key != "a" || m.Events[1].EventType != wire.OpRemove || m.Events[2].Key != "c" ||
		m.Timestamp.Millis != 77 || m.Timestamp.Counter != 2 || m.Timestamp.NodeID != serverNode {
		t.Errorf("%+v", m)
	}
	// A frame is no larger than others may wait behind.
	var many []*typesv1.Change
	for i := range 100 {
		many = append(many, lwwChange(fmt.Sprint(i), packed(string(make([]byte, 10_000)))))
	}
	b.commit("m", many...)
	frames, events := 0, 0
	for events < len(many) {
		frames++
		events += len(expect[*wire.ServerBatchEvent](p).Events)
	}
	if want := 100*10_000/pushBytes + 1; frames < want || frames > want+1 {
		t.Errorf("%d frames", frames)
	}
	p.ping()
}

// Sessions get the kinds that they look at; forgotten tombstones concern nobody.
func TestKindsOfACommit(t *testing.T) {
	b := setup(t, nil, nil)
	lww, both := b.hello(t), b.hello(t)
	lww.synced("m", 0)
	or := b.orHello(t, "m")
	or.init(0)
	or.settle()
	both.synced("m", 0)
	both.send(&wire.ORMapSyncInit{MapName: "m", HasClaimedEpoch: true})
	expect[*wire.ORMapSyncRespRoot](both)
	pruned := orChange("k", "old", nil)
	pruned.Pruned, pruned.Record = true, nil
	b.commit("m", lwwChange("a", packed("v")), orChange("b", "t", packed("w")), pruned, orChange("b", "u", nil))
	if e := expect[*wire.ServerEvent](lww); e.Key != "a" || e.EventType != wire.OpPut {
		t.Errorf("%+v", e)
	}
	if e := expect[*wire.ServerEvent](or.wsClient); e.EventType != wire.OpORAdd || e.Tag != "t" || string(e.Record.Value) != string(packed("w")) {
		t.Errorf("%+v", e)
	}
	if e := expect[*wire.ServerEvent](or.wsClient); e.EventType != wire.OpORRemove || e.Tag != "u" {
		t.Errorf("%+v", e)
	}
	if m := expect[*wire.ServerBatchEvent](both); len(m.Events) != 3 {
		t.Errorf("%+v", m)
	}
	for _, p := range []*wsClient{lww, or.wsClient, both} {
		p.ping()
	}
}

func BenchmarkDeliver(b *testing.B) {
	for _, n := range []int{1, 10, 100} {
		b.Run(fmt.Sprint("changes=", n), func(b *testing.B) {
			h := newHub("gateway", nil, nil, nil)
			m := &watched{name: "m", sessions: make(map[*session]kinds)}
			h.maps["m"] = m
			k := &sockets{cfg: DefaultConfig(), meters: &meters{}}
			for i := range 1000 {
				s := &session{k: k, origin: fmt.Sprint("s", i)}
				s.out.writing = true
				m.sessions[s] = setOf(kindLWW)
			}
			var changes []*typesv1.Change
			for i := range n {
				changes = append(changes, lwwChange(fmt.Sprint("key-", i), packed(string(make([]byte, 100)))))
			}
			b.ReportAllocs()
			for b.Loop() {
				h.deliver("m", changesOf(&fanoutv1.Event{Map: "m", Changes: changes}))
				for s := range m.sessions {
					s.out.lanes[bulk] = s.out.lanes[bulk][:0]
					s.out.events, s.out.eventBytes = 0, 0
				}
			}
		})
	}
}
