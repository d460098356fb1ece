package persistence

import (
	"errors"
	"fmt"
	"strings"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/keyspace"
	"github.com/topgun-sync/topgun/core/lwwmap"
	logv1 "github.com/topgun-sync/topgun/gen/go/topgun/log/v1"
	persistencev1 "github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

// The field rules of types.proto that every store relies on: numbers fit its
// integers, names and keys fit its indexes and hold nothing that its text refuses.
const (
	maxNumber = 1 << 53
	maxMap    = 128
	maxKey    = 512
)

// commitVersion is the format of log commits that this program reads.
const commitVersion = 1

// recordsOf reads the changes of a commit in log order; a commit without changes
// has none. An error means that the commit is not one that this program
// understands, and that nothing of it may be skipped (RELIABILITY LOG-07).
func recordsOf(commit *logv1.Commit) ([]Record, error) {
	if v := commit.GetVersion(); v != commitVersion {
		return nil, fmt.Errorf("its format version is %d, this program reads %d", v, commitVersion)
	}
	switch body := commit.GetBody().(type) {
	case *logv1.Commit_Claim, *logv1.Commit_Release, *logv1.Commit_Seal:
		return nil, nil
	case *logv1.Commit_Changes:
		n := 0
		for _, shard := range body.Changes.GetShards() {
			n += len(shard.GetChanges())
		}
		records := make([]Record, 0, n)
		for _, shard := range body.Changes.GetShards() {
			for _, change := range shard.GetChanges() {
				record, err := recordOf(change)
				if err != nil {
					return nil, fmt.Errorf("a change of shard %d: %w", shard.GetShard(), err)
				}
				records = append(records, record)
			}
		}
		return records, nil
	default:
		return nil, errors.New("its body is of no kind that this program reads")
	}
}

// recordOf shares the change's value and takes copies of the rest.
func recordOf(change *typesv1.Change) (Record, error) {
	state := change.GetRecord()
	if state == nil {
		return Record{}, errors.New("it holds no record")
	}
	name := change.GetMap()
	if name == "" || len(name) > maxMap || strings.Contains(name, "\x00") {
		return Record{}, fmt.Errorf("a map's name must be 1 to %d bytes without NUL", maxMap)
	}
	if n := len(change.GetKey()); n == 0 || n > maxKey {
		return Record{}, fmt.Errorf("a key must be 1 to %d bytes, not %d", maxKey, n)
	}
	stamp, err := stampOf(state.GetTimestamp())
	if err != nil {
		return Record{}, err
	}
	arrival := change.GetArrival()
	if arrival.GetMillis() > maxNumber || arrival.GetCounter() > maxNumber || state.GetTtlMillis() > maxNumber {
		return Record{}, errors.New("an arrival or a time to live is above 2^53")
	}
	record := Record{
		Map:     name,
		Key:     string(change.GetKey()),
		State:   lwwmap.Record{Value: state.GetValue(), Timestamp: stamp, TTLMillis: state.GetTtlMillis()},
		Arrival: Arrival{Millis: arrival.GetMillis(), Counter: arrival.GetCounter()},
	}
	for _, original := range change.GetRestamped() {
		// An original may be as far in the future as its writer liked.
		if original.GetNodeId() == "" || strings.Contains(original.GetNodeId(), ":") {
			return Record{}, errors.New("an original stamp has no node id, or one with a colon")
		}
		record.Restamped = append(record.Restamped, hlc.Timestamp{
			Millis: original.GetMillis(), Counter: original.GetCounter(), NodeID: original.GetNodeId(),
		})
	}
	return record, nil
}

func stampOf(stamp *typesv1.Timestamp) (hlc.Timestamp, error) {
	if stamp == nil || stamp.GetNodeId() == "" {
		return hlc.Timestamp{}, errors.New("it holds no stamp, or one without a node id")
	}
	if stamp.GetMillis() > maxNumber || stamp.GetCounter() > maxNumber {
		return hlc.Timestamp{}, errors.New("a stamp is above 2^53")
	}
	return hlc.Timestamp{Millis: stamp.GetMillis(), Counter: stamp.GetCounter(), NodeID: stamp.GetNodeId()}, nil
}

func changeOf(r Record) *typesv1.Change {
	change := &typesv1.Change{
		Map: r.Map,
		Key: []byte(r.Key),
		Record: &typesv1.Record{
			Value:     r.State.Value,
			Timestamp: protoStamp(r.State.Timestamp),
			TtlMillis: r.State.TTLMillis,
		},
		Arrival: &typesv1.Arrival{Millis: r.Arrival.Millis, Counter: r.Arrival.Counter},
	}
	for _, original := range r.Restamped {
		change.Restamped = append(change.Restamped, protoStamp(original))
	}
	return change
}

func protoStamp(t hlc.Timestamp) *typesv1.Timestamp {
	return &typesv1.Timestamp{Millis: t.Millis, Counter: t.Counter, NodeId: t.NodeID}
}

func protoWatermarks(marks []Watermark) []*persistencev1.Watermark {
	out := make([]*persistencev1.Watermark, len(marks))
	for i, mark := range marks {
		out[i] = &persistencev1.Watermark{
			History: mark.History, Lane: mark.Lane, Sequence: mark.Sequence, Number: mark.Number,
		}
	}
	return out
}

// partitionsOf checks the partitions of a request.
func partitionsOf(wanted []uint32) ([]int, error) {
	if len(wanted) == 0 || len(wanted) > keyspace.PartitionCount {
		return nil, fmt.Errorf("partitions must name 1 to %d partitions", keyspace.PartitionCount)
	}
	partitions := make([]int, len(wanted))
	for i, partition := range wanted {
		if partition >= keyspace.PartitionCount {
			return nil, fmt.Errorf("a partition must be 0 to %d", keyspace.PartitionCount-1)
		}
		partitions[i] = int(partition)
	}
	return partitions, nil
}
