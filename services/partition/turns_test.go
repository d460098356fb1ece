package partition

import (
	"context"
	"errors"
	"iter"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sync/semaphore"

	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
)

// testTurns has so many places, in the time of a bubble.
func testTurns(places int64) *turns {
	return &turns{places: semaphore.NewWeighted(places), elapsed: monotonic()}
}

func emptyRows(n int) iter.Seq2[string, []byte] {
	return func(yield func(string, []byte) bool) {
		for range n {
			if !yield("", nil) {
				return
			}
		}
	}
}

func TestRES01_EvaluationsAtOnceAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turns := testTurns(2)
		began := time.Now()
		var all sync.WaitGroup
		var mu sync.Mutex
		var running, most int
		count := func(by int) {
			mu.Lock()
			defer mu.Unlock()
			running += by
			most = max(most, running)
		}
		for range 8 {
			all.Go(func() {
				if err := turns.evaluate(t.Context(), emptyRows(100), func(string, []byte) {
					count(1)
					time.Sleep(300 * time.Microsecond) // what the predicate costs
					count(-1)
				}); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if most != 2 {
			t.Errorf("%d at once, want 2", most)
		}
		if took := time.Since(began); took != 120*time.Millisecond {
			t.Errorf("8 times 30 ms in two places took %v", took)
		}
	})
}

// Who needs little waits for one turn of each of the others, not for their end.
func TestRES01_ACheapEvaluationGoesBetweenExpensiveOnes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turns := testTurns(1)
		var all sync.WaitGroup
		for range 5 {
			all.Go(func() {
				if err := turns.evaluate(t.Context(), emptyRows(1000), func(string, []byte) {
					time.Sleep(100 * time.Microsecond)
				}); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		began := time.Now()
		if err := turns.evaluate(t.Context(), emptyRows(5), func(string, []byte) {}); err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took != 5*turnTime {
			t.Errorf("it waited for %v, want a turn of each", took)
		}
		all.Wait()
	})
}

func TestACancelledEvaluationEndsWithItsTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turns := testTurns(1)
		ctx, cancel := context.WithCancel(t.Context())
		var all sync.WaitGroup
		rows := 0
		for range 2 { // one has its turn, one waits
			all.Go(func() {
				err := turns.evaluate(ctx, emptyRows(1000), func(string, []byte) {
					rows++
					time.Sleep(400 * time.Microsecond)
				})
				if !errors.Is(err, context.Canceled) {
					t.Errorf("it ended with %v", err)
				}
			})
		}
		synctest.Wait()
		began := time.Now()
		cancel()
		all.Wait()
		if took := time.Since(began); took != 1200*time.Microsecond || rows != 3 {
			t.Errorf("%d rows and %v after its caller left, want those of a turn", rows, took)
		}
		if !turns.places.TryAcquire(1) {
			t.Error("the place was not given back")
		}
	})
}

func TestRES01_AQueryTakesTurns(t *testing.T) {
	n := newWorld(t).start()
	fillQuery(n)
	n.turns.places = semaphore.NewWeighted(1)
	if err := n.turns.places.Acquire(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if resp, err := n.Query(ctx, &partitionv1.QueryRequest{Map: "m"}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%d rows and %v while others had all places", len(resp.GetRows()), err)
	}
	n.turns.places.Release(1)
	if resp, err := n.Query(t.Context(), &partitionv1.QueryRequest{Map: "m"}); err != nil || len(resp.GetRows()) != 99 {
		t.Errorf("%d rows and %v with a place", len(resp.GetRows()), err)
	}
	if !n.turns.places.TryAcquire(1) {
		t.Error("a place was not given back")
	}
}
