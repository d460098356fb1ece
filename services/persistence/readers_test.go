package persistence_test

import (
	"context"
	"encoding/json"
	"runtime"
	"testing"
	"time"

	persistencev1 "github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1"
	"github.com/topgun-sync/topgun/services/persistence"
)

// wantReaders waits until the log's stream has so many consumers and no more than so
// many goroutines run.
func (w *world) wantReaders(t *testing.T, consumers, goroutines int) {
	t.Helper()
	nc, err := w.embedded.Connect("count")
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	// This connection has goroutines of its own, on both sides.
	const own = 10
	var info struct {
		State struct {
			Consumers int `json:"consumer_count"`
		} `json:"state"`
	}
	deadline := time.Now().Add(5 * time.Second)
	for {
		answer, err := nc.Request("$JS.API.STREAM.INFO."+logConfig().Stream, nil, time.Second)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(answer.Data, &info); err != nil {
			t.Fatal(err)
		}
		running := runtime.NumGoroutine()
		if info.State.Consumers == consumers && running <= goroutines+own {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d consumers and %d goroutines are left, want %d and at most %d",
				info.State.Consumers, running, consumers, goroutines+own)
		}
		runtime.Gosched()
	}
}

// TestJournalLeavesNoReaders reads and follows the journal on a real log, to the end and
// left at many moments: only the drain's reader is left, and that one goes with the
// service.
func TestJournalLeavesNoReaders(t *testing.T) {
	w := newWorld(t, "")
	lane, err := w.log.OpenLane("a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lane.Append(t.Context(), changesCommit("a", change("k", "1", 1))); err != nil {
		t.Fatal(err)
	}
	service, stop := start(t, config(), persistence.Deps{Store: newFakeStore(), Log: w.log})
	client := dial(service)
	read := func(ctx context.Context) error {
		_, err := client.ReadJournal(ctx, &persistencev1.ReadJournalRequest{Limit: 10})
		return err
	}
	follow := func(ctx context.Context, from uint64) error {
		stream, err := client.FollowJournal(ctx, &persistencev1.FollowJournalRequest{FromSequence: from})
		if err != nil {
			return err
		}
		defer func() { _ = stream.Close() }() // it was ended
		_, err = stream.Receive()
		return err
	}
	flush(t, service)
	if err := read(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.wantReaders(t, 1, runtime.NumGoroutine())
	baseline := runtime.NumGoroutine()
	for i := range 100 {
		if err := read(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := follow(t.Context(), uint64(i%2)); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*20*time.Microsecond)
		_ = read(ctx) // as far as it came
		cancel()
		ctx, cancel = context.WithTimeout(t.Context(), time.Duration(i)*20*time.Microsecond)
		_ = follow(ctx, uint64(i%2))
		cancel()
	}
	w.wantReaders(t, 1, baseline)
	stop()
	w.wantReaders(t, 0, baseline)
}
