package partition

import (
	"context"
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/ormap"
	"github.com/topgun-sync/topgun/core/pncounter"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

// Ops of several clients in any order, repeated and reordered, with restarts and
// kills in between, end in the state of the model (CRDT-01, MRK-01, ACK-06), and
// nothing that was acknowledged is missing (ACK-01, ACK-02, LOG-06): LWW-maps, OR-maps
// with the roots of their trees (MRK-03), and counters.
func TestLOG06_AnyHistoryEndsInTheStateOfTheModel(t *testing.T) {
	w := newWorld(t)
	round := 0
	rapid.Check(t, func(rt *rapid.T) {
		// A map of its own; log and store live on for some rounds.
		if round++; round%10 == 0 {
			w = newWorld(t)
		}
		name := fmt.Sprint("map", round)
		n := w.start()
		defer func() { n.stop() }()
		model := newModel()
		var known []*partitionv1.Op // sent before, to be repeated
		for range rapid.IntRange(1, 12).Draw(rt, "steps") {
			switch rapid.IntRange(0, 9).Draw(rt, "step") {
			case 0:
				before := n.digest()
				if rapid.Bool().Draw(rt, "graceful") {
					if err := n.stop(); err != nil {
						rt.Fatal(err)
					}
				} else {
					n.kill(0)
				}
				if rapid.Bool().Draw(rt, "drain") {
					w.store.drain(t, w.log, rapid.IntRange(0, 20).Draw(rt, "commits"))
					w.store.trim(t, w.log)
				}
				n = w.start()
				if n.digest() != before {
					rt.Fatal("the restart changed the state")
				}
			case 1: // killed in the middle of an append: the op may be there or not
				op := drawOp(rt, name)
				n.writer.mu.Lock()
				n.writer.dead, n.writer.dying = true, rapid.IntRange(0, 1).Draw(rt, "reached the log")
				n.writer.mu.Unlock()
				if _, err := n.tryApply(context.Background(), op); err == nil && !model.harmless(op) {
					rt.Fatal("an op was acknowledged by a dead process")
				}
				n.stop()
				n = w.start()
				known = append(known, op)
				// The client does not know, and sends it again.
				send(rt, n, model, op)
			default:
				var ops []*partitionv1.Op
				for range rapid.IntRange(1, 8).Draw(rt, "ops") {
					if len(known) > 0 && rapid.IntRange(0, 3).Draw(rt, "repeat") == 0 {
						ops = append(ops, rapid.SampledFrom(known).Draw(rt, "op"))
					} else {
						ops = append(ops, drawOp(rt, name))
					}
				}
				known = append(known, ops...)
				send(rt, n, model, ops...)
			}
		}
		model.compare(rt, n, name)
	})
}

// model is an independent implementation of the maps of one name and of a counter.
type model struct {
	lww     *lwwmap.Map
	or      *ormap.Map
	counter *pncounter.Counter
	// acked are the records of the LWW-map that the node acknowledged last.
	acked map[string]lwwmap.Record
}

func newModel() *model {
	return &model{lww: new(lwwmap.Map), or: new(ormap.Map), counter: new(pncounter.Counter), acked: make(map[string]lwwmap.Record)}
}

// merge applies an op and says what becomes of it.
func (m *model) merge(op *partitionv1.Op) partitionv1.Outcome {
	key, r := string(op.GetKey()), recordFromProto(op.GetRecord())
	var outcome lwwmap.Outcome
	switch op.GetKind() {
	case or:
		outcome = m.or.Merge(key, ormap.Record{Tag: op.GetTag(), Record: r})
	case counter:
		sides, _ := pncounter.ParseSides(r.Value)
		if outcome = lwwmap.Applied; m.counter.Merge(op.GetTag(), sides) == pncounter.Duplicate {
			outcome = lwwmap.Duplicate
		}
	default:
		if outcome = m.lww.Merge(key, r); outcome == lwwmap.Applied {
			m.acked[key] = r
		}
	}
	return map[lwwmap.Outcome]partitionv1.Outcome{
		lwwmap.Applied: partitionv1.Outcome_OUTCOME_APPLIED, lwwmap.Duplicate: partitionv1.Outcome_OUTCOME_DUPLICATE,
		lwwmap.Superseded: partitionv1.Outcome_OUTCOME_SUPERSEDED, lwwmap.Conflict: partitionv1.Outcome_OUTCOME_REJECTED,
	}[outcome]
}

// harmless reports that an op changes nothing, so that a process which cannot log
// may answer it.
func (m *model) harmless(op *partitionv1.Op) bool {
	key, r := string(op.GetKey()), recordFromProto(op.GetRecord())
	switch op.GetKind() {
	case or:
		var local *ormap.Record
		for known := range m.or.Records(key) {
			if known.Tag == op.GetTag() {
				local = &known
			}
		}
		return ormap.Decide(local, m.or.Removed(op.GetTag()), ormap.Record{Tag: op.GetTag(), Record: r}) != lwwmap.Applied
	case counter:
		local, _ := m.counter.Get(op.GetTag())
		sides, _ := pncounter.ParseSides(r.Value)
		return local.Merge(sides) == local
	}
	local, ok := m.lww.Get(key)
	return ok && lwwmap.Decide(&local, r) != lwwmap.Applied
}

// compare compares all that a node holds with the model, the root of the OR-map
// included.
func (m *model) compare(rt *rapid.T, n *node, name string) {
	got := n.model(name)
	if got.Digest() != m.lww.Digest() {
		rt.Fatal("the LWW-map differs from the model's")
	}
	for key, r := range m.acked {
		if have, ok := got.Get(key); !ok || have.Timestamp.Compare(r.Timestamp) < 0 {
			rt.Fatalf("the acknowledged record of %q is missing", key)
		}
	}
	if n.orModel(name).Digest() != m.or.Digest() {
		rt.Fatal("the OR-map differs from the model's")
	}
	n.checkRoots(name, m.or)
	nodes := n.get(counter, "+"+name, name)
	for id, sides := range m.counter.All() {
		if have, ok := pncounter.ParseSides(nodes[id].GetRecord().GetValue()); !ok || have != sides {
			rt.Fatalf("the counter has %v of a node, want %v", have, sides)
		}
	}
	if len(nodes) != m.counter.Len() {
		rt.Fatalf("the counter has %d nodes, want %d", len(nodes), m.counter.Len())
	}
}

// send applies ops at the node and to the model, and compares the outcomes.
func send(rt *rapid.T, n *node, model *model, ops ...*partitionv1.Op) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	receipts, err := n.tryApply(ctx, ops...)
	if err != nil {
		rt.Fatal(err)
	}
	for i, op := range ops {
		want, got := model.merge(op), receipts[i].GetOutcome()
		// An op that reached the log when its process was killed is there already.
		lost := len(ops) == 1 && got == partitionv1.Outcome_OUTCOME_DUPLICATE && want == partitionv1.Outcome_OUTCOME_APPLIED
		if got != want && !lost {
			rt.Fatalf("op %d, %s on %q: %s, the model says %s", i, op.GetKind(), op.GetKey(), got, want)
		}
	}
}

func drawOp(rt *rapid.T, name string) *partitionv1.Op {
	kind := rapid.SampledFrom([]typesv1.Kind{lww, or, counter}).Draw(rt, "kind")
	if kind == counter {
		return count(name, rapid.SampledFrom([]string{"a", "b", "c"}).Draw(rt, "node"),
			rapid.Uint64Range(0, 6).Draw(rt, "positive"), rapid.Uint64Range(0, 6).Draw(rt, "negative"))
	}
	op := put(fmt.Sprint("k", rapid.IntRange(0, 5).Draw(rt, "key")),
		rapid.SampledFrom([]string{"", "x", "y", "z"}).Draw(rt, "value"),
		rapid.Uint64Range(1, 6).Draw(rt, "millis"), rapid.SampledFrom([]string{"a", "b", "c"}).Draw(rt, "node"))
	if op.Map = name; kind == or {
		// The model has one set of tombstones for all keys, so a tag belongs to one key.
		op.Kind, op.Tag = or, fmt.Sprintf("%s:%d", op.GetKey(), rapid.IntRange(0, 3).Draw(rt, "tag"))
	}
	return op
}
