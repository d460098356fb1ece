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
	maxTag    = 256
	maxNode   = 128
	// maxCounterMap is "+" and the longest name of a counter.
	maxCounterMap = 257
)

// commitVersion is the format of log commits that this program reads.
const commitVersion = 1

// eachChange yields the changes of a commit in log order; a commit without changes
// has none. An error means that the commit is not one that this program
// understands, and that nothing of it may be skipped (RELIABILITY LOG-07).
func eachChange(commit *logv1.Commit, take func(*typesv1.Change) error) error {
	if v := commit.GetVersion(); v != commitVersion {
		return fmt.Errorf("its format version is %d, this program reads %d", v, commitVersion)
	}
	switch body := commit.GetBody().(type) {
	case *logv1.Commit_Claim, *logv1.Commit_Release, *logv1.Commit_Seal:
		return nil
	case *logv1.Commit_Changes:
		for _, shard := range body.Changes.GetShards() {
			for _, change := range shard.GetChanges() {
				if err := take(change); err != nil {
					return fmt.Errorf("a change of shard %d: %w", shard.GetShard(), err)
				}
			}
		}
		return nil
	default:
		return errors.New("its body is of no kind that this program reads")
	}
}

// step is one change as the store takes it: a record, or the forgetting of one.
type step struct {
	record Record
	// pruned means that only identity and arrival of record count.
	pruned bool
}

// stepsOf reads the changes of a commit, or none of them.
func stepsOf(commit *logv1.Commit) ([]step, error) {
	n := 0
	for _, shard := range commit.GetChanges().GetShards() {
		n += len(shard.GetChanges())
	}
	steps := make([]step, 0, n)
	err := eachChange(commit, func(change *typesv1.Change) error {
		step, err := stepOf(change)
		steps = append(steps, step)
		return err
	})
	if err != nil {
		return nil, err
	}
	return steps, nil
}

// stepOf shares the change's value and takes copies of the rest.
func stepOf(change *typesv1.Change) (step, error) {
	identity, err := identityOf(change)
	if err != nil {
		return step{}, err
	}
	arrival := change.GetArrival()
	if arrival.GetMillis() > maxNumber || arrival.GetCounter() > maxNumber {
		return step{}, errors.New("an arrival is above 2^53")
	}
	record := Record{Identity: identity, Arrival: Arrival{Millis: arrival.GetMillis(), Counter: arrival.GetCounter()}}
	state := change.GetRecord()
	if change.GetPruned() {
		if len(state.GetValue()) > 0 {
			return step{}, errors.New("a record was forgotten that still holds a value")
		}
		return step{record: record, pruned: true}, nil
	}
	if state == nil {
		return step{}, errors.New("it holds no record")
	}
	stamp, err := stampOf(state.GetTimestamp())
	if err != nil {
		return step{}, err
	}
	if state.GetTtlMillis() > maxNumber {
		return step{}, errors.New("a time to live is above 2^53")
	}
	record.State = lwwmap.Record{Value: state.GetValue(), Timestamp: stamp, TTLMillis: state.GetTtlMillis()}
	for _, original := range change.GetRestamped() {
		// An original may be as far in the future as its writer liked.
		if original.GetNodeId() == "" || strings.Contains(original.GetNodeId(), ":") {
			return step{}, errors.New("an original stamp has no node id, or one with a colon")
		}
		record.Restamped = append(record.Restamped, hlc.Timestamp{
			Millis: original.GetMillis(), Counter: original.GetCounter(), NodeID: original.GetNodeId(),
		})
	}
	return step{record: record}, nil
}

// identityOf checks names by what the kind allows.
func identityOf(change *typesv1.Change) (Identity, error) {
	id := Identity{Map: change.GetMap(), Tag: change.GetTag()}
	longestMap, shortestTag, longestTag := maxMap, 0, 0
	switch change.GetKind() {
	case typesv1.Kind_KIND_UNSPECIFIED, typesv1.Kind_KIND_LWW:
		id.Kind = LWW
	case typesv1.Kind_KIND_OR:
		id.Kind = OR
		shortestTag, longestTag = 1, maxTag
	case typesv1.Kind_KIND_COUNTER:
		id.Kind = Counter
		longestMap, shortestTag, longestTag = maxCounterMap, 1, maxNode
	case typesv1.Kind_KIND_LOCK:
		id.Kind = Lock
	default:
		return Identity{}, fmt.Errorf("its kind %d is none that this program knows", change.GetKind())
	}
	if id.Map == "" || len(id.Map) > longestMap || strings.Contains(id.Map, "\x00") {
		return Identity{}, fmt.Errorf("a map's name must be 1 to %d bytes without NUL", longestMap)
	}
	if n := len(change.GetKey()); n == 0 || n > maxKey {
		return Identity{}, fmt.Errorf("a key must be 1 to %d bytes, not %d", maxKey, n)
	}
	if n := len(id.Tag); n < shortestTag || n > longestTag {
		return Identity{}, fmt.Errorf("its tag must be %d to %d bytes, not %d", shortestTag, longestTag, n)
	}
	id.Key = string(change.GetKey())
	return id, nil
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
		// An LWW record leaves its kind out, as in the log.
		Kind: typesv1.Kind(r.Kind),
		Map:  r.Map,
		Key:  []byte(r.Key),
		Tag:  r.Tag,
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

// journalFilterOf checks a filter.
func journalFilterOf(filter *persistencev1.JournalFilter) (journalFilter, error) {
	f := journalFilter{mapName: filter.GetMap()}
	if len(f.mapName) > maxMap || f.mapName != "" && !userMap(f.mapName) {
		return journalFilter{}, fmt.Errorf("the filter's map must be the name of a user's map of at most %d bytes, or empty for all", maxMap)
	}
	for _, kind := range filter.GetTypes() {
		switch kind {
		case persistencev1.JournalType_JOURNAL_TYPE_PUT:
			f.types |= 1 << journalPut
		case persistencev1.JournalType_JOURNAL_TYPE_UPDATE:
			f.types |= 1 << journalUpdate
		case persistencev1.JournalType_JOURNAL_TYPE_DELETE:
			f.types |= 1 << journalDelete
		default:
			return journalFilter{}, errors.New("the filter's types must be PUT, UPDATE or DELETE")
		}
	}
	return f, nil
}

func protoJournal(entries []journalEntry) []*persistencev1.JournalEntry {
	types := [...]persistencev1.JournalType{
		journalPut:    persistencev1.JournalType_JOURNAL_TYPE_PUT,
		journalUpdate: persistencev1.JournalType_JOURNAL_TYPE_UPDATE,
		journalDelete: persistencev1.JournalType_JOURNAL_TYPE_DELETE,
	}
	out := make([]*persistencev1.JournalEntry, len(entries))
	for i, e := range entries {
		out[i] = &persistencev1.JournalEntry{Sequence: e.sequence, Type: types[e.kind], Change: e.change}
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
