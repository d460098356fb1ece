package partition

import (
	"unique"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

func arrivalToProto(a arrival) *typesv1.Arrival {
	return &typesv1.Arrival{Millis: a.millis, Counter: a.counter}
}

// arrivalFromProto takes an absent arrival for zero, which is before every change.
func arrivalFromProto(a *typesv1.Arrival) arrival {
	return arrival{millis: a.GetMillis(), counter: a.GetCounter()}
}

func stampToProto(t hlc.Timestamp) *typesv1.Timestamp {
	return &typesv1.Timestamp{Millis: t.Millis, Counter: t.Counter, NodeId: t.NodeID}
}

func stampFromProto(t *typesv1.Timestamp) hlc.Timestamp {
	return hlc.Timestamp{Millis: t.GetMillis(), Counter: t.GetCounter(), NodeID: t.GetNodeId()}
}

// recordToProto shares the value.
func recordToProto(r lwwmap.Record) *typesv1.Record {
	return &typesv1.Record{Value: r.Value, Timestamp: stampToProto(r.Timestamp), TtlMillis: r.TTLMillis}
}

// recordFromProto shares the value.
func recordFromProto(r *typesv1.Record) lwwmap.Record {
	return lwwmap.Record{Value: r.GetValue(), Timestamp: stampFromProto(r.GetTimestamp()), TTLMillis: r.GetTtlMillis()}
}

// changeBlock is a change with all its parts, so that many changes are one
// allocation.
type changeBlock struct {
	change  typesv1.Change
	record  typesv1.Record
	stamp   typesv1.Timestamp
	arrival typesv1.Arrival
}

// newChanges converts changes. Values are shared, keys copied. Origin stays empty:
// it is for events only.
func newChanges(changes []change) []changeBlock {
	keys := 0
	for i := range changes {
		keys += len(changes[i].key)
	}
	buf := make([]byte, 0, keys)
	blocks := make([]changeBlock, len(changes))
	for i := range changes {
		from, to := &changes[i], &blocks[i]
		start := len(buf)
		key := from.key
		if from.kind == or || from.kind == counter {
			key, to.change.Tag = splitTag(key)
		}
		buf = append(buf, key...)
		to.stamp.Millis, to.stamp.Counter = from.record.Timestamp.Millis, from.record.Timestamp.Counter
		to.stamp.NodeId = from.record.Timestamp.NodeID
		to.change.Kind, to.change.Replaced = from.kind, from.replaced
		to.record.Value, to.record.TtlMillis, to.record.Timestamp = from.record.Value, from.record.TTLMillis, &to.stamp
		to.arrival.Millis, to.arrival.Counter = from.arrival.millis, from.arrival.counter
		to.change.Map, to.change.Key = from.table, buf[start:len(buf):len(buf)]
		to.change.Arrival = &to.arrival
		if to.change.Pruned = from.pruned; !from.pruned {
			to.change.Record = &to.record
		}
		for _, r := range from.restamped {
			to.change.Restamped = append(to.change.Restamped, stampToProto(r))
		}
	}
	return blocks
}

// changesToProto is newChanges as a message field wants it.
func changesToProto(changes []change) []*typesv1.Change {
	blocks := newChanges(changes)
	out := make([]*typesv1.Change, len(blocks))
	for i := range blocks {
		out[i] = &blocks[i].change
	}
	return out
}

// changeFromProto shares the value and copies the key.
func changeFromProto(c *typesv1.Change) change {
	to := change{
		kind:    kindOf(c.GetKind()),
		table:   c.GetMap(),
		key:     string(c.GetKey()),
		record:  recordFromProto(c.GetRecord()),
		arrival: arrivalFromProto(c.GetArrival()),
		pruned:  c.GetPruned(),
	}
	if to.kind != lww {
		to.key = string(joinTag(c.GetKey(), []byte(c.GetTag())))
	}
	for _, r := range c.GetRestamped() {
		to.restamped = append(to.restamped, stampFromProto(r))
	}
	return to
}

// intern makes node ids that are equal the same.
func intern(nodeID string) unique.Handle[string] { return unique.Make(nodeID) }

// outcomesToProto is indexed by outcome.
var outcomesToProto = [outcomes]partitionv1.Outcome{
	applied:    partitionv1.Outcome_OUTCOME_APPLIED,
	duplicate:  partitionv1.Outcome_OUTCOME_DUPLICATE,
	superseded: partitionv1.Outcome_OUTCOME_SUPERSEDED,
	restamped:  partitionv1.Outcome_OUTCOME_RESTAMPED,
	rejected:   partitionv1.Outcome_OUTCOME_REJECTED,
}

// receiptsToProto answers merged ops.
func receiptsToProto(ops []op) []*partitionv1.Receipt {
	receipts := make([]partitionv1.Receipt, len(ops))
	out := make([]*partitionv1.Receipt, len(ops))
	for i := range ops {
		out[i] = &receipts[i]
		out[i].Outcome, out[i].Reason = outcomesToProto[ops[i].outcome], ops[i].reason
		if o := ops[i].outcome; o == superseded || o == restamped {
			out[i].Winner = recordToProto(ops[i].winner)
		}
	}
	return out
}
