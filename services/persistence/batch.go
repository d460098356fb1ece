package persistence

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"github.com/topgun-sync/topgun/services/internal/commitlog"
)

// batch collects consecutive commits of the stream, each identity once.
type batch struct {
	// from are the positions of the lanes before the batch; not the batch's own.
	from map[string]Position
	// last is the stream sequence of the last commit taken, or of what the store
	// holds already.
	last uint64

	records []Record
	index   map[Identity]int
	// pruned says when an identity was forgotten last; what the batch holds of it
	// came later.
	pruned  map[Identity]Arrival
	moves   map[string]Move
	bytes   int
	commits int
	// traces are the spans that wrote the commits, at most maxLinks.
	traces []trace.SpanContext
}

// maxLinks is how many commits one span names: OpenTelemetry's own default bound.
const maxLinks = 128

// newBatch returns an empty batch with room for so many records: the size of the one
// before, since under load they are alike.
func newBatch(from map[string]Position, last uint64, room int) *batch {
	return &batch{
		from:    from,
		last:    last,
		records: make([]Record, 0, room),
		index:   make(map[Identity]int, room),
		pruned:  make(map[Identity]Arrival),
		moves:   make(map[string]Move),
	}
}

// add takes the next commit of the stream. It refuses a commit that proves a hole
// in the log and one that it does not understand; the batch is then as before.
func (b *batch) add(entry commitlog.Entry) error {
	refuse := func(problem error) error {
		return fmt.Errorf("%w: sequence %d of the log, lane %q: %w", errHalted, entry.Sequence, entry.Lane, problem)
	}
	if entry.Sequence <= b.last {
		return refuse(fmt.Errorf("it came after sequence %d", b.last))
	}
	move, moved := b.moves[entry.Lane]
	if !moved {
		move = Move{Lane: entry.Lane, From: b.from[entry.Lane], To: b.from[entry.Lane]}
	}
	// Numbers of a lane rise by one, and what is not stored is not trimmed: a jump
	// means that the store has lost commits which the log no longer has, or that
	// the log is not the one that was written (RELIABILITY LOG-04, PG-06).
	if number := entry.Commit.GetNumber(); number != move.To.Number+1 {
		return refuse(fmt.Errorf("commit %d follows commit %d: there is a hole between store and log", number, move.To.Number))
	}
	steps, err := stepsOf(entry.Commit)
	if err != nil {
		return refuse(err)
	}
	move.To = Position{Sequence: entry.Sequence, Number: entry.Commit.GetNumber()}
	b.moves[entry.Lane] = move
	b.last = entry.Sequence
	b.commits++
	for _, step := range steps {
		if step.pruned {
			b.prune(step.record.Identity, step.record.Arrival)
		} else {
			b.put(step.record)
		}
	}
	if entry.Trace != nil && len(b.traces) < maxLinks {
		ctx := propagation.TraceContext{}.Extract(context.Background(), entry.Trace)
		if span := trace.SpanContextFromContext(ctx); span.IsValid() {
			b.traces = append(b.traces, span)
		}
	}
	return nil
}

// put keeps the later state of each identity, by the rule that the store itself
// follows, so that it does not matter where one batch ends and the next begins.
func (b *batch) put(record Record) {
	i, ok := b.index[record.Identity]
	switch {
	case !ok:
		b.index[record.Identity] = len(b.records)
		b.records = append(b.records, record)
		b.bytes += record.Size()
	case record.Replaces(b.records[i]):
		b.bytes += record.Size() - b.records[i].Size()
		b.records[i] = record
	}
}

// prune forgets what arrived before. It stays in the batch beside a record that
// comes later, since only a row that is gone lets every record in.
func (b *batch) prune(id Identity, at Arrival) {
	before, again := b.pruned[id]
	if again && at.Compare(before) <= 0 {
		return
	}
	b.pruned[id] = at
	if !again {
		b.bytes += prunedSize + len(id.Map) + len(id.Key) + len(id.Tag)
	}
	if i, ok := b.index[id]; ok && b.records[i].Arrival.Compare(at) < 0 {
		b.drop(i)
	}
}

// drop takes a record out of the batch; the last one takes its place.
func (b *batch) drop(i int) {
	b.bytes -= b.records[i].Size()
	delete(b.index, b.records[i].Identity)
	last := len(b.records) - 1
	if i != last {
		b.records[i] = b.records[last]
		b.index[b.records[i].Identity] = i
	}
	b.records[last] = Record{}
	b.records = b.records[:last]
}

// prunedSize is about what a forgotten identity costs beside its names.
const prunedSize = 96

// rows is how many rows the batch may change.
func (b *batch) rows() int { return len(b.records) + len(b.pruned) }

// batch returns what the store is to commit.
func (b *batch) batch(history string) Batch {
	batch := Batch{
		History: history,
		Records: b.records,
		Moves:   slices.Collect(maps.Values(b.moves)),
	}
	for id, at := range b.pruned {
		batch.Pruned = append(batch.Pruned, Pruned{Identity: id, Arrival: at})
	}
	return batch
}
