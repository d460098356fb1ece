package partition

import (
	"context"
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/topgun-sync/topgun/core/lwwmap"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
)

// Ops of several clients in any order, repeated and reordered, with restarts and
// kills in between, end in the state of the model (CRDT-01, MRK-01, ACK-06), and
// nothing that was acknowledged is missing (ACK-01, ACK-02, LOG-06).
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
		model := new(lwwmap.Map)
		acked := make(map[string]lwwmap.Record)
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
				if _, err := n.tryApply(context.Background(), op); err == nil && !harmless(model, op) {
					rt.Fatal("an op was acknowledged by a dead process")
				}
				n.stop()
				n = w.start()
				known = append(known, op)
				// The client does not know, and sends it again.
				send(rt, n, model, acked, op)
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
				send(rt, n, model, acked, ops...)
			}
		}
		if got, want := n.model(name).Digest(), model.Digest(); got != want {
			rt.Fatalf("the state differs from the model's")
		}
		got := n.model(name)
		for key, r := range acked {
			if have, ok := got.Get(key); !ok || have.Timestamp.Compare(r.Timestamp) < 0 {
				rt.Fatalf("the acknowledged record of %q is missing", key)
			}
		}
	})
}

// send applies ops at the node and to the model, and compares the outcomes.
func send(rt *rapid.T, n *node, model *lwwmap.Map, acked map[string]lwwmap.Record, ops ...*partitionv1.Op) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	receipts, err := n.tryApply(ctx, ops...)
	if err != nil {
		rt.Fatal(err)
	}
	for i, op := range ops {
		key, r := string(op.GetKey()), recordFromProto(op.GetRecord())
		outcome := model.Merge(key, r)
		want := map[lwwmap.Outcome]partitionv1.Outcome{
			lwwmap.Applied: partitionv1.Outcome_OUTCOME_APPLIED, lwwmap.Duplicate: partitionv1.Outcome_OUTCOME_DUPLICATE,
			lwwmap.Superseded: partitionv1.Outcome_OUTCOME_SUPERSEDED, lwwmap.Conflict: partitionv1.Outcome_OUTCOME_REJECTED,
		}[outcome]
		got := receipts[i].GetOutcome()
		// An op that reached the log when its process was killed is there already.
		lost := len(ops) == 1 && got == partitionv1.Outcome_OUTCOME_DUPLICATE && outcome == lwwmap.Applied
		if got != want && !lost {
			rt.Fatalf("op %d on %q: %s, the model says %s", i, key, got, want)
		}
		if outcome == lwwmap.Applied {
			acked[key] = r
		}
	}
}

// harmless reports that an op changes nothing, so that a process which cannot log
// may answer it.
func harmless(model *lwwmap.Map, op *partitionv1.Op) bool {
	local, ok := model.Get(string(op.GetKey()))
	return ok && lwwmap.Decide(&local, recordFromProto(op.GetRecord())) != lwwmap.Applied
}

func drawOp(rt *rapid.T, name string) *partitionv1.Op {
	op := put(fmt.Sprint("k", rapid.IntRange(0, 5).Draw(rt, "key")),
		rapid.SampledFrom([]string{"", "x", "y", "z"}).Draw(rt, "value"),
		rapid.Uint64Range(1, 6).Draw(rt, "millis"), rapid.SampledFrom([]string{"a", "b", "c"}).Draw(rt, "node"))
	op.Map = name
	return op
}
