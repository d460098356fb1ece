package gateway

import (
	"strings"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/wire"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

// Protobuf ends here: everything beyond this file and route.go, batch.go, read.go
// and the fanout stream works with the types of core. Values stay the bytes that
// the client sent.

// mapKind tells the maps apart that may have one name.
type mapKind uint8

const (
	kindLWW mapKind = iota
	kindOR
	kindCounter
)

func (k mapKind) proto() typesv1.Kind {
	switch k {
	case kindOR:
		return typesv1.Kind_KIND_OR
	case kindCounter:
		return typesv1.Kind_KIND_COUNTER
	default:
		return typesv1.Kind_KIND_UNSPECIFIED // what writers leave out means LWW
	}
}

// kindFromProto converts the kind of a change; ok is false for kinds that clients are
// not told of.
func kindFromProto(k typesv1.Kind) (kind mapKind, ok bool) {
	switch k {
	case typesv1.Kind_KIND_UNSPECIFIED, typesv1.Kind_KIND_LWW:
		return kindLWW, true
	case typesv1.Kind_KIND_OR:
		return kindOR, true
	case typesv1.Kind_KIND_COUNTER:
		return kindCounter, true
	default:
		return 0, false
	}
}

// kindOf is the kind of map that an op changes.
func kindOf(op *wire.Op) mapKind {
	if op.Kind == wire.OpORAdd || op.Kind == wire.OpORRemove {
		return kindOR
	}
	return kindLWW
}

// opsToProto converts ops for a call; entries of ops that do not travel are of no
// use. Three allocations serve the whole batch.
func opsToProto(ops []wire.Op) []*partitionv1.Op {
	protos := make([]*partitionv1.Op, len(ops))
	slab := make([]struct {
		op        partitionv1.Op
		record    typesv1.Record
		timestamp typesv1.Timestamp
	}, len(ops))
	for i := range ops {
		op, s := &ops[i], &slab[i]
		s.timestamp.Millis = op.Record.Timestamp.Millis
		s.timestamp.Counter = op.Record.Timestamp.Counter
		s.timestamp.NodeId = op.Record.Timestamp.NodeID
		s.record.Value = op.Record.Value
		s.record.Timestamp = &s.timestamp
		s.record.TtlMillis = op.Record.TTLMillis
		s.op.Map = op.MapName
		s.op.Key = []byte(op.Key)
		s.op.Record = &s.record
		s.op.Kind = kindOf(op).proto()
		s.op.Tag = op.Tag
		protos[i] = &s.op
	}
	return protos
}

// opSize is what an op counts in the queue's byte bound.
func opSize(op *partitionv1.Op) int64 {
	return int64(len(op.Map) + len(op.Key) + len(op.Tag) + len(op.GetRecord().GetValue()))
}

func recordFromProto(r *typesv1.Record) lwwmap.Record {
	return lwwmap.Record{
		Value: r.GetValue(),
		Timestamp: hlc.Timestamp{
			Millis:  r.GetTimestamp().GetMillis(),
			Counter: r.GetTimestamp().GetCounter(),
			NodeID:  r.GetTimestamp().GetNodeId(),
		},
		TTLMillis: r.GetTtlMillis(),
	}
}

// keyed is the record of a key, or with the kinds that have tags of a tag below it.
type keyed struct {
	wire.KeyedRecord
	tag string
}

func keyedOf(c *typesv1.Change) keyed {
	return keyed{wire.KeyedRecord{Key: string(c.Key), Record: recordFromProto(c.Record)}, c.Tag}
}

// arrivalFromProto converts an arrival; arrivals have no node id.
func arrivalFromProto(a *typesv1.Arrival) hlc.Timestamp {
	return hlc.Timestamp{Millis: a.GetMillis(), Counter: a.GetCounter()}
}

func arrivalToProto(t hlc.Timestamp) *typesv1.Arrival {
	return &typesv1.Arrival{Millis: t.Millis, Counter: t.Counter}
}

func combineToProto(c merkle.Combine) partitionv1.Combine {
	if c == merkle.Plain {
		return partitionv1.Combine_COMBINE_PLAIN
	}
	return partitionv1.Combine_COMBINE_MIXED
}

// levelNames are the levels of PROTOCOL 10.7 that an answered Apply can have
// reached, weakest first.
var levelNames = [...]string{
	partitionv1.Level_LEVEL_UNSPECIFIED: "FIRE_AND_FORGET",
	partitionv1.Level_LEVEL_MEMORY:      "MEMORY",
	partitionv1.Level_LEVEL_APPLIED:     "APPLIED",
	partitionv1.Level_LEVEL_REPLICATED:  "REPLICATED",
	partitionv1.Level_LEVEL_PERSISTED:   "PERSISTED",
}

// levelName names a level. A level that is not known claims nothing (ACK-03).
func levelName(l partitionv1.Level) string {
	if l < 0 || int(l) >= len(levelNames) {
		l = partitionv1.Level_LEVEL_UNSPECIFIED
	}
	return levelNames[l]
}

func resultFromProto(r *partitionv1.Receipt, level string, arrival hlc.Timestamp) opResult {
	result := opResult{level: level, arrival: arrival}
	switch r.Outcome {
	case partitionv1.Outcome_OUTCOME_APPLIED:
		result.status = opApplied
	case partitionv1.Outcome_OUTCOME_DUPLICATE:
		result.status = opDuplicate
	case partitionv1.Outcome_OUTCOME_SUPERSEDED:
		result.status = opSuperseded
		result.winner = recordFromProto(r.Winner)
	case partitionv1.Outcome_OUTCOME_RESTAMPED:
		result.status = opRestamped
		result.winner = recordFromProto(r.Winner)
	default:
		code := 400
		if strings.HasPrefix(r.Reason, tooOld) {
			code = codeTooOld
		}
		return opResult{status: opRejected, code: code, reason: r.Reason}
	}
	return result
}

// An op that is older than tombstones are kept, on a key or tag that holds nothing, is
// refused by its owner with a reason that begins so: nobody knows any more whether it
// was deleted. The client learns it as 410, and must give up its copy of the map
// (PROTOCOL 22.5).
const (
	tooOld     = "TOO_OLD"
	codeTooOld = 410
)
