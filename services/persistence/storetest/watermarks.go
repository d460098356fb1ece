package storetest

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/topgun-sync/topgun/services/persistence"
)

func testWatermarksMove(t *testing.T, h Harness) {
	store := open(t, h)
	position := func(n uint64) persistence.Position { return persistence.Position{Sequence: 10 * n, Number: n} }
	var want []persistence.Watermark
	var moves []persistence.Move
	for i := range 300 {
		name := fmt.Sprintf("lane-%03d", i)
		moves = append(moves, persistence.Move{Lane: name, To: position(1)})
		want = append(want, persistence.Watermark{History: history, Lane: name, Position: position(1)})
	}
	// A commit without changes moves its watermark too.
	commit(t, store, persistence.Batch{History: history, Moves: moves}, 0)
	// Some lanes go on and one begins, in one batch.
	commit(t, store, persistence.Batch{History: history, Moves: []persistence.Move{
		{Lane: "lane-001", From: position(1), To: position(7)},
		{Lane: "lane-000", From: position(1), To: position(1 << 40)},
		{Lane: "lane-300", To: position(2)},
	}}, 0)
	want[0].Position, want[1].Position = position(1<<40), position(7)
	want = append(want, persistence.Watermark{History: history, Lane: "lane-300", Position: position(2)})
	// Another history is another matter, also for a lane of the same name.
	commit(t, store, persistence.Batch{History: "history-2", Moves: []persistence.Move{{Lane: "lane-000", To: position(1)}}}, 0)
	want = append(want, persistence.Watermark{History: "history-2", Lane: "lane-000", Position: position(1)})

	_, got := mustLoad(t, store)
	if !slices.Equal(got, want) {
		t.Errorf("Load's watermarks are %v, want %v", got, want)
	}
	got, err := store.Watermarks(t.Context())
	slices.SortFunc(got, func(a, b persistence.Watermark) int {
		return cmp.Or(strings.Compare(a.History, b.History), strings.Compare(a.Lane, b.Lane))
	})
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("the watermarks are %v, %v; want %v", got, err, want)
	}
}

func testCompareAndSet(t *testing.T, h Harness) {
	store := open(t, h)
	at := func(sequence, number uint64) persistence.Position {
		return persistence.Position{Sequence: sequence, Number: number}
	}
	kept := record("key", "kept", 10, 10)
	commit(t, store, persistence.Batch{History: history, Records: []persistence.Record{kept}, Moves: []persistence.Move{
		{Lane: "a", To: at(10, 5)}, {Lane: "b", To: at(11, 6)},
	}}, 1)
	_, before := mustLoad(t, store)
	for name, moves := range map[string][]persistence.Move{
		"begins again":                 {{Lane: "a", To: at(20, 9)}},
		"from behind":                  {{Lane: "a", From: at(9, 4), To: at(20, 9)}},
		"from before":                  {{Lane: "a", From: at(11, 6), To: at(20, 9)}},
		"the number alone":             {{Lane: "a", From: at(10, 4), To: at(20, 9)}},
		"a lane that is not":           {{Lane: "c", From: at(10, 5), To: at(20, 9)}},
		"one of two":                   {{Lane: "a", From: at(10, 5), To: at(20, 9)}, {Lane: "b", From: at(10, 5), To: at(21, 9)}},
		"one begins, one is off":       {{Lane: "c", To: at(20, 9)}, {Lane: "b", From: at(10, 5), To: at(21, 9)}},
		"one is off, one begins again": {{Lane: "a", From: at(10, 5), To: at(20, 9)}, {Lane: "b", To: at(21, 9)}},
	} {
		next := record("key", "lost", 20, 20)
		_, err := store.Commit(t.Context(), persistence.Batch{
			History: history, Records: []persistence.Record{next, record("other", "lost", 20, 20)}, Moves: moves,
		})
		if !errors.Is(err, persistence.ErrConflict) {
			t.Errorf("%s: the commit returns %v, want a conflict", name, err)
		}
		records, marks := mustLoad(t, store)
		wantRecords(t, records, []persistence.Record{kept})
		if !slices.Equal(marks, before) {
			t.Errorf("%s: the watermarks became %v", name, marks)
		}
	}
}

// testTwoDrainers lets two drainers store one log at the same time; each reloads
// after a conflict. Each commit must be stored once.
func testTwoDrainers(t *testing.T, h Harness) {
	stores := []persistence.Store{open(t, h), open(t, h)}
	const commits = 40
	log := make([]persistence.Record, commits)
	for i := range log {
		log[i] = record(fmt.Sprintf("key-%d", i%7), fmt.Sprintf("value-%d", i), uint64(i+1), uint64(i+1))
	}
	won := make([]int, len(stores))
	var wg sync.WaitGroup
	for i, store := range stores {
		wg.Go(func() {
			for {
				marks, err := store.Watermarks(t.Context())
				if err != nil {
					t.Errorf("watermarks: %v", err)
					return
				}
				var at persistence.Position
				for _, mark := range marks {
					at = mark.Position
				}
				for int(at.Number) < commits {
					to := persistence.Position{Sequence: at.Sequence + 1, Number: at.Number + 1}
					_, err = store.Commit(t.Context(), persistence.Batch{
						History: history,
						Records: log[at.Number : at.Number+1],
						Moves:   []persistence.Move{{Lane: "lane", From: at, To: to}},
					})
					if err != nil {
						break
					}
					won[i]++
					at = to
				}
				if err == nil {
					return
				}
				if !errors.Is(err, persistence.ErrConflict) {
					t.Errorf("commit: %v", err)
					return
				}
			}
		})
	}
	wg.Wait()
	if won[0]+won[1] != commits {
		t.Errorf("%d commits were stored %d + %d times", commits, won[0], won[1])
	}
	got, _ := mustLoad(t, stores[0])
	want := slices.Clone(log[commits-7:])
	slices.SortFunc(want, func(a, b persistence.Record) int { return strings.Compare(a.Key, b.Key) })
	wantRecords(t, got, want)
}

func testBadBatch(t *testing.T, h Harness) {
	store := open(t, h)
	one := persistence.Position{Sequence: 1, Number: 1}
	for name, batch := range map[string]persistence.Batch{
		"no history":        {Moves: []persistence.Move{{Lane: "a", To: one}}},
		"no moves":          {History: history, Records: []persistence.Record{record("a", "x", 1, 1)}},
		"a lane twice":      {History: history, Moves: []persistence.Move{{Lane: "a", To: one}, {Lane: "a", To: one}}},
		"no lane":           {History: history, Moves: []persistence.Move{{To: one}}},
		"not moved":         {History: history, Moves: []persistence.Move{{Lane: "a", From: one, To: one}}},
		"moved down":        {History: history, Moves: []persistence.Move{{Lane: "a", From: persistence.Position{Sequence: 2, Number: 2}, To: one}}},
		"the number stands": {History: history, Moves: []persistence.Move{{Lane: "a", From: one, To: persistence.Position{Sequence: 2, Number: 1}}}},
	} {
		if _, err := store.Commit(t.Context(), batch); err == nil || errors.Is(err, persistence.ErrConflict) {
			t.Errorf("%s: the commit returns %v", name, err)
		}
	}
	if records, marks := mustLoad(t, store); len(records)+len(marks) != 0 {
		t.Errorf("bad batches left %v and %v", records, marks)
	}
}
