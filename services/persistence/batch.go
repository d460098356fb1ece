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

// batch collects consecutive commits of the stream, each key once.
type batch struct {
	// from are the positions of the lanes before the batch; not the batch's own.
	from map[string]Position
	// last is the stream sequence of the last commit taken, or of what the store
	// holds already.
	last uint64

	records []Record
	index   map[recordKey]int
	moves   map[string]Move
	bytes   int
	commits int
	// traces are the spans that wrote the commits, at most maxLinks.
	traces []trace.SpanContext
}

type recordKey struct{ mapName, key string }

// maxLinks is how many commits one span names: OpenTelemetry's own default bound.
const maxLinks = 128

// newBatch returns an empty batch with room for so many records: the size of the one
// before, since under load they are alike.
func newBatch(from map[string]Position, last uint64, room int) *batch {
	return &batch{
		from:    from,
		last:    last,
		records: make([]Record, 0, room),
		index:   make(map[recordKey]int, room),
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
	records, err := recordsOf(entry.Commit)
	if err != nil {
		return refuse(err)
	}
	move.To = Position{Sequence: entry.Sequence, Number: entry.Commit.GetNumber()}
	b.moves[entry.Lane] = move
	b.last = entry.Sequence
	b.commits++
	for _, record := range records {
		b.put(record)
	}
	if entry.Trace != nil && len(b.traces) < maxLinks {
		ctx := propagation.TraceContext{}.Extract(context.Background(), entry.Trace)
		if span := trace.SpanContextFromContext(ctx); span.IsValid() {
			b.traces = append(b.traces, span)
		}
	}
	return nil
}

// put keeps the later state of each key, by the rule that the store itself
// follows, so that it does not matter where one batch ends and the next begins.
func (b *batch) put(record Record) {
	key := recordKey{record.Map, record.Key}
	i, ok := b.index[key]
	switch {
	case !ok:
		b.index[key] = len(b.records)
		b.records = append(b.records, record)
		b.bytes += record.Size()
	case record.Replaces(b.records[i]):
		b.bytes += record.Size() - b.records[i].Size()
		b.records[i] = record
	}
}

// batch returns what the store is to commit.
func (b *batch) batch(history string) Batch {
	return Batch{
		History: history,
		Records: b.records,
		Moves:   slices.Collect(maps.Values(b.moves)),
	}
}
