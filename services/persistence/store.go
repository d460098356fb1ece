package persistence

import (
	"context"
	"errors"
	"fmt"
)

// Store keeps records and watermarks. All methods may run at the same time, also
// in several processes on one database.
//
// Errors are ErrConflict, ErrUnavailable, ErrRefused or the context's, wrapped
// with what was being done; none carries a driver's text, which may hold client
// data or the address of the database.
type Store interface {
	// Load reads the records of partitions. It calls watermarks once, before the
	// first record, with how far the store was, then record for each record of
	// the partitions in no particular order; everything comes from one
	// consistent snapshot. It stops at the first error of a callback and returns
	// it. An error means that the answer is incomplete, never that there is
	// nothing (RELIABILITY PG-08). Records must not be modified.
	Load(ctx context.Context, partitions []int, watermarks func([]Watermark) error, record func(Record) error) error
	// Commit stores a batch in one transaction and returns how many rows it
	// changed, those that it deleted included: first what Pruned names goes, then
	// the records come, each by Record.Replaces. ErrConflict means that nothing was stored because a watermark was
	// not where the batch expected it. After any other error the outcome is
	// unknown; committing the same batch again then ends in ErrConflict if it had
	// been stored.
	Commit(ctx context.Context, batch Batch) (changed int, err error)
	// Watermarks returns how far each lane is stored, for every history that the
	// store has seen.
	Watermarks(ctx context.Context) ([]Watermark, error)
	// Stats counts what is stored. It may read the whole store.
	Stats(ctx context.Context) (Stats, error)
	// Close ends the use of the store; no method may run or be called after it.
	Close() error
}

var (
	// ErrConflict means that another drainer moved a watermark of the batch, or
	// that the store went back to an older state (RELIABILITY PG-06, PG-07).
	// Reload the watermarks and start from them.
	ErrConflict = errors.New("the watermarks have moved")
	// ErrUnavailable means that the store cannot be reached or cannot work at
	// present. Trying again later may succeed.
	ErrUnavailable = errors.New("the store is unavailable")
	// ErrRefused means that the store was reached and does not do what was asked:
	// a missing table, a missing right, a broken file. It takes an operator.
	ErrRefused = errors.New("the store refuses")
)

// Watermark says that a lane is stored completely up to a commit.
type Watermark struct {
	// History is the identity of the log that Sequence counts in.
	History string
	// Lane is the lane.
	Lane string
	Position
}

// Position is a commit of a lane. The zero Position is before its first commit.
type Position struct {
	// Sequence is the commit's sequence in the stream.
	Sequence uint64
	// Number is the commit's number within its lane.
	Number uint64
}

// Move is a step of one lane's watermark.
type Move struct {
	// Lane is the lane.
	Lane string
	// From is where the watermark must be for the batch to be stored; the zero
	// Position means that the lane has none.
	From Position
	// To is where it is afterwards.
	To Position
}

// Batch is what one transaction stores.
type Batch struct {
	// History is the identity of the log that the moves count in.
	History string
	// Records holds each identity at most once.
	Records []Record
	// Pruned holds each identity at most once. One that is also in Records came back
	// after it was forgotten.
	Pruned []Pruned
	// Moves holds each lane at most once, and at least one lane.
	Moves []Move
}

// Check reports a batch that no store could commit as meant.
func (b Batch) Check() error {
	if b.History == "" || len(b.Moves) == 0 {
		return errors.New("a batch needs a history and at least one move")
	}
	lanes := make(map[string]bool, len(b.Moves))
	for _, move := range b.Moves {
		if move.Lane == "" || lanes[move.Lane] {
			return errors.New("a batch must name each of its lanes once")
		}
		lanes[move.Lane] = true
		if move.To.Sequence <= move.From.Sequence || move.To.Number <= move.From.Number {
			return fmt.Errorf("the watermark of a lane must move up, not from %d to %d", move.From.Sequence, move.To.Sequence)
		}
	}
	return nil
}

// Stats counts what a store holds.
type Stats struct {
	// Records counts stored records, tombstones included.
	Records uint64
	// Tombstones counts stored tombstones.
	Tombstones uint64
}
