package partition

import (
	"context"
	"iter"
	"runtime"
	"time"

	"golang.org/x/sync/semaphore"
)

// turnTime is how long an evaluation goes on before it lets the others go first. A row
// is not split.
const turnTime = time.Millisecond

// turns bounds the evaluations of queries that use a processor at one time, so that the
// shards, the lane and all else in the process find one, however many shards a query
// has and whatever its predicate costs. Evaluations go on for a turn each, first come
// first served, so one that needs little is not held up by one that needs much.
type turns struct {
	places  *semaphore.Weighted // first come first served
	elapsed func() time.Duration
}

// newTurns leaves half of the processors to the others; elapsed is a monotonic clock.
func newTurns(elapsed func() time.Duration) *turns {
	return &turns{places: semaphore.NewWeighted(int64(max(1, runtime.GOMAXPROCS(0)/2))), elapsed: elapsed}
}

// evaluate hands over rows in turns. Making a row is part of the turn. It returns
// ctx's error as soon as ctx ends while it waits, else at the end of the turn.
func (t *turns) evaluate(ctx context.Context, rows iter.Seq2[string, []byte], do func(key string, value []byte)) error {
	if err := t.places.Acquire(ctx, 1); err != nil {
		return err
	}
	began := t.elapsed()
	for key, value := range rows {
		do(key, value)
		if t.elapsed()-began < turnTime {
			continue
		}
		t.places.Release(1)
		if err := t.places.Acquire(ctx, 1); err != nil {
			return err
		}
		began = t.elapsed()
	}
	t.places.Release(1)
	return nil
}
