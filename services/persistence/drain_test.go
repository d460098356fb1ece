package persistence_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/topgun-sync/topgun/core/keyspace"
	logv1 "github.com/topgun-sync/topgun/gen/go/topgun/log/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
	"github.com/topgun-sync/topgun/services/internal/commitlog"
	"github.com/topgun-sync/topgun/services/persistence"
	"github.com/topgun-sync/topgun/services/persistence/memstore"
)

// content is what a store holds: values by key, and the positions of the lanes.
func content(t testing.TB, store persistence.Store) (values map[string]string, marks map[string]uint64) {
	t.Helper()
	values, marks = make(map[string]string), make(map[string]uint64)
	var all []int
	for partition := range keyspace.PartitionCount {
		all = append(all, partition)
	}
	err := store.Load(t.Context(), all,
		func(got []persistence.Watermark) error {
			for _, mark := range got {
				marks[mark.History+"/"+mark.Lane] = mark.Sequence
			}
			return nil
		},
		func(r persistence.Record) error {
			value := "-"
			if !r.State.Deleted() {
				value = string(r.State.Value[2:])
			}
			values[r.Key] = value
			return nil
		})
	if err != nil {
		t.Fatalf("load: %v", err)
	}
	return values, marks
}

func wantContent(t testing.TB, store persistence.Store, values string, marks string) {
	t.Helper()
	v, m := content(t, store)
	if got := fmt.Sprint(v); got != "map["+values+"]" {
		t.Errorf("the store holds %s, want %s", got, values)
	}
	if got := fmt.Sprint(m); got != "map["+marks+"]" {
		t.Errorf("the watermarks are %s, want %s", got, marks)
	}
}

func TestDrainStoresInStreamOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, store := newFakeLog(), newFakeStore()
		log.append("a")
		log.append("a", change("x", "1", 1), change("y", "1", 2))
		log.append("b")
		log.append("b", change("x", "2", 3))
		service, _ := start(t, config(), persistence.Deps{Store: store, Log: log})
		time.Sleep(time.Second)
		synctest.Wait()
		wantContent(t, store, "x:2 y:1", "history/a:2 history/b:4")
		if err := service.Ready(); err != nil {
			t.Errorf("not ready: %v", err)
		}
		// What comes later is stored too, deletes as tombstones.
		log.append("a", change("x", "", 4))
		time.Sleep(time.Second)
		synctest.Wait()
		wantContent(t, store, "x:- y:1", "history/a:5 history/b:4")
	})
}

// TestBatchesFill feeds one commit a millisecond to a store that takes its time:
// transactions must be few, no commit may wait longer than the delay, and after a
// quiet time none at all.
func TestBatchesFill(t *testing.T) {
	for name, c := range map[string]struct {
		takes    time.Duration
		min, max int
		worst    time.Duration
	}{
		// A batch begins every 50 ms, the delay.
		"slow store": {20 * time.Millisecond, 20, 22, 50 * time.Millisecond},
		// A batch begins every five times its time.
		"quick store": {2 * time.Millisecond, 95, 105, 10 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				log, store := newFakeLog(), newFakeStore()
				appended := make(map[uint64]time.Time)
				var begun []time.Time // guarded by store.mu
				store.before = func(persistence.Batch) error {
					store.set(func() { begun = append(begun, time.Now()) })
					time.Sleep(c.takes)
					return nil
				}
				// waited is how long the first commit of each batch waited.
				waited := func() (waited []time.Duration) {
					store.mu.Lock()
					defer store.mu.Unlock()
					for i, batch := range store.batches {
						waited = append(waited, begun[i].Sub(appended[batch.Moves[0].From.Sequence+1]))
					}
					return waited
				}
				start(t, config(), persistence.Deps{Store: store, Log: log})
				time.Sleep(time.Second)
				appended[1] = time.Now()
				log.append("a", change("first", "1", 1))
				time.Sleep(time.Second)
				if w := waited(); len(w) != 1 || w[0] != 0 {
					t.Errorf("after a quiet time the batches are stored after %v", w)
				}
				for i := range 1000 {
					appended[uint64(i+2)] = time.Now()
					log.append("a", change(fmt.Sprint("k", i), "1", uint64(i+2)))
					time.Sleep(time.Millisecond)
				}
				time.Sleep(time.Second)
				w := waited()
				if len(w) < c.min || len(w) > c.max {
					t.Errorf("a second of commits took %d batches, want %d to %d", len(w), c.min, c.max)
				}
				if worst := slices.Max(w); worst > c.worst {
					t.Errorf("a commit waited %v", worst)
				}
			})
		})
	}
}

func TestBatchesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, store := newFakeLog(), newFakeStore()
		at := uint64(0)
		for range 50 {
			var changes []*typesv1.Change
			for range 100 {
				at++
				changes = append(changes, change(fmt.Sprint("k", at), "1", at))
			}
			log.append("a", changes...)
		}
		big := strings.Repeat("x", 200)
		for range 50 {
			var changes []*typesv1.Change
			for range 10 {
				at++
				c := change(fmt.Sprint("k", at), big, at)
				c.Record.Value = append([]byte{0xc5, 0x40, 0}, make([]byte, 16<<10)...)
				changes = append(changes, c)
			}
			log.append("a", changes...)
		}
		start(t, config(), persistence.Deps{Store: store, Log: log})
		time.Sleep(time.Second)
		for i, batch := range store.stored() {
			size := 0
			for _, r := range batch.Records {
				size += r.Size()
			}
			if len(batch.Records) > 1100 || size > 4<<20+200<<10 {
				t.Errorf("batch %d has %d changes of %d bytes", i, len(batch.Records), size)
			}
		}
		if n := len(store.stored()); n < 7 || n > 9 {
			t.Errorf("5,000 small and 8 MiB of large changes took %d batches", n)
		}
	})
}

func TestCoalesces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, store := newFakeLog(), newFakeStore()
		for i := range 500 {
			log.append("a", change("hot", fmt.Sprint(i), uint64(i+1)), change("cold", "same", 1))
		}
		start(t, config(), persistence.Deps{Store: store, Log: log})
		time.Sleep(time.Second)
		wantContent(t, store, "cold:same hot:499", "history/a:500")
		rows := 0
		for _, batch := range store.stored() {
			rows += len(batch.Records)
		}
		if batches := len(store.stored()); rows > 2*batches || batches > 2 {
			t.Errorf("500 commits of two keys took %d rows in %d batches", rows, batches)
		}
	})
}

// TestCoalescingFollowsTheStoresRule puts states that do not replace what came
// before into one batch, and into two: the result must be the same.
func TestCoalescingFollowsTheStoresRule(t *testing.T) {
	for _, apart := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			log, store := newFakeLog(), newFakeStore()
			older := change("stamp", "lost", 8)
			older.Arrival.Millis = 20
			for _, changes := range [][]*typesv1.Change{
				{change("stamp", "kept", 9), change("arrival", "kept", 9)},
				{older, change("arrival", "lost", 8)},
			} {
				log.append("a", changes...)
				if apart {
					_, stop := start(t, config(), persistence.Deps{Store: store, Log: log})
					synctest.Wait()
					stop()
				}
			}
			_, stop := start(t, config(), persistence.Deps{Store: store, Log: log})
			synctest.Wait()
			stop()
			wantContent(t, store, "arrival:kept stamp:kept", "history/a:2")
		})
	}
}

// TestPG04StoreAway keeps the store away from the start for minutes.
func TestPG04StoreAway(t *testing.T) {
	for _, away := range []error{persistence.ErrUnavailable, persistence.ErrRefused} {
		synctest.Test(t, func(t *testing.T) {
			log, store := newFakeLog(), newFakeStore()
			store.down = away
			service, _ := start(t, config(), persistence.Deps{Store: store, Log: log})
			for i := range 100 {
				log.append("a", change(fmt.Sprint("k", i), "1", uint64(i+1)))
				time.Sleep(time.Second)
			}
			if err := service.Ready(); !errors.Is(err, away) {
				t.Errorf("ready says %v", err)
			}
			store.set(func() { store.down = nil })
			time.Sleep(10 * time.Second)
			if err := service.Ready(); err != nil {
				t.Errorf("not ready: %v", err)
			}
			// And away again while it runs.
			store.set(func() { store.down = away })
			log.append("a", change("late", "1", 200))
			time.Sleep(time.Second)
			if err := service.Ready(); !errors.Is(err, away) {
				t.Errorf("ready says %v", err)
			}
			time.Sleep(time.Hour)
			store.set(func() { store.down = nil })
			time.Sleep(10 * time.Second)
			if err := service.Ready(); err != nil {
				t.Errorf("not ready: %v", err)
			}
			if values, marks := content(t, store); len(values) != 101 || marks["history/a"] != 101 {
				t.Errorf("%d records are stored up to %v", len(values), marks)
			}
		})
	}
}

func TestLogAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, store := newFakeLog(), newFakeStore()
		service, _ := start(t, config(), persistence.Deps{Store: store, Log: log})
		log.append("a", change("x", "1", 1))
		time.Sleep(time.Second)
		log.edit(func() { log.down = errors.New("no responders") })
		time.Sleep(time.Minute)
		if err := service.Ready(); err == nil || !strings.Contains(err.Error(), "log is unavailable") {
			t.Errorf("ready says %v", err)
		}
		log.edit(func() { log.down = nil })
		log.append("a", change("x", "2", 2))
		time.Sleep(10 * time.Second)
		wantContent(t, store, "x:2", "history/a:2")
		if err := service.Ready(); err != nil {
			t.Errorf("not ready: %v", err)
		}
	})
}

// TestPG02LostAnswer loses the answer of every second transaction that was stored,
// as a process that is killed behind its commit does, and starts the service anew
// in between.
func TestPG02LostAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, store := newFakeLog(), newFakeStore()
		n := 0
		store.after = func(persistence.Batch) error {
			if n++; n%2 == 0 {
				return persistence.ErrUnavailable
			}
			return nil
		}
		for round := range uint64(10) {
			_, stop := start(t, config(), persistence.Deps{Store: store, Log: log})
			for i := range uint64(5) {
				at := round*5 + i + 1
				log.append("a", change(fmt.Sprint("k", at%7), fmt.Sprint(at), at))
				time.Sleep(time.Second)
			}
			stop()
		}
		start(t, config(), persistence.Deps{Store: store, Log: log})
		time.Sleep(10 * time.Second)
		wantContent(t, store, "k0:49 k1:50 k2:44 k3:45 k4:46 k5:47 k6:48", "history/a:50")
		next := uint64(1)
		for _, batch := range store.stored() {
			if from := batch.Moves[0].From.Number; from+1 != next {
				t.Errorf("a batch was stored from commit %d on, want %d", from+1, next)
			}
			next = batch.Moves[0].To.Number + 1
		}
	})
}

// TestPG07TwoDrainers runs two services on one log and one store.
func TestPG07TwoDrainers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, store := newFakeLog(), newFakeStore()
		store.before = func(persistence.Batch) error {
			time.Sleep(3 * time.Millisecond) // so that they meet
			return nil
		}
		start(t, config(), persistence.Deps{Store: store, Log: log})
		_, stop := start(t, config(), persistence.Deps{Store: store, Log: log})
		for i := range uint64(2000) {
			log.append(fmt.Sprint("lane", i%3), change(fmt.Sprint("k", i%5), fmt.Sprint(i), i+1))
			time.Sleep(5 * time.Millisecond)
		}
		stop() // the other one goes on
		log.append("lane0", change("last", "1", 3000))
		time.Sleep(20 * time.Second)
		wantContent(t, store, "k0:1995 k1:1996 k2:1997 k3:1998 k4:1999 last:1", "history/lane0:2001 history/lane1:2000 history/lane2:1998")
		commits := uint64(0)
		for _, batch := range store.stored() {
			for _, move := range batch.Moves {
				commits += move.To.Number - move.From.Number
			}
		}
		if commits != 2001 {
			t.Errorf("2001 commits were stored as %d", commits)
		}
	})
}

// TestLOG07Halts feeds what must not be skipped: what came before it is stored,
// what comes after it is not, and nobody is told that all is well.
func TestLOG07Halts(t *testing.T) {
	ok := func() *logv1.Commit {
		return &logv1.Commit{Version: 1, Lane: "a", Body: &logv1.Commit_Changes{Changes: &logv1.Changes{
			Shards: []*logv1.ShardChanges{{Changes: []*typesv1.Change{change("bad", "1", 2)}}},
		}}}
	}
	first := func(c *logv1.Commit) *typesv1.Change { return c.GetChanges().Shards[0].Changes[0] }
	for name, damage := range map[string]func(log *fakeLog){
		"unreadable":      func(log *fakeLog) { log.put(ok(), nil); log.edit(func() { log.unreadable = log.last }) },
		"unknown version": func(log *fakeLog) { c := ok(); c.Version = 2; log.put(c, nil) },
		"no body":         func(log *fakeLog) { c := ok(); c.Body = nil; log.put(c, nil) },
		"no record":       func(log *fakeLog) { c := ok(); first(c).Record = nil; log.put(c, nil) },
		"no stamp":        func(log *fakeLog) { c := ok(); first(c).Record.Timestamp = nil; log.put(c, nil) },
		"no node id":      func(log *fakeLog) { c := ok(); first(c).Record.Timestamp.NodeId = ""; log.put(c, nil) },
		"huge stamp":      func(log *fakeLog) { c := ok(); first(c).Record.Timestamp.Millis = 1<<53 + 1; log.put(c, nil) },
		"huge counter":    func(log *fakeLog) { c := ok(); first(c).Record.Timestamp.Counter = 1 << 63; log.put(c, nil) },
		"huge arrival":    func(log *fakeLog) { c := ok(); first(c).Arrival.Millis = 1 << 63; log.put(c, nil) },
		"huge ttl":        func(log *fakeLog) { c := ok(); first(c).Record.TtlMillis = 1 << 63; log.put(c, nil) },
		"no map":          func(log *fakeLog) { c := ok(); first(c).Map = ""; log.put(c, nil) },
		"NUL in the map":  func(log *fakeLog) { c := ok(); first(c).Map = "a\x00b"; log.put(c, nil) },
		"long map":        func(log *fakeLog) { c := ok(); first(c).Map = strings.Repeat("m", 129); log.put(c, nil) },
		"no key":          func(log *fakeLog) { c := ok(); first(c).Key = nil; log.put(c, nil) },
		"long key":        func(log *fakeLog) { c := ok(); first(c).Key = make([]byte, 513); log.put(c, nil) },
		"odd original": func(log *fakeLog) {
			c := ok()
			first(c).Restamped = []*typesv1.Timestamp{{NodeId: "a:b"}}
			log.put(c, nil)
		},
		"unknown kind":     func(log *fakeLog) { c := ok(); first(c).Kind = 5; log.put(c, nil) },
		"LWW with a tag":   func(log *fakeLog) { c := ok(); first(c).Tag = "t"; log.put(c, nil) },
		"OR without a tag": func(log *fakeLog) { c := ok(); first(c).Kind = typesv1.Kind_KIND_OR; log.put(c, nil) },
		"lock with a tag": func(log *fakeLog) {
			c := ok()
			first(c).Kind, first(c).Tag = typesv1.Kind_KIND_LOCK, "t"
			log.put(c, nil)
		},
		"counter without node": func(log *fakeLog) { c := ok(); first(c).Kind = typesv1.Kind_KIND_COUNTER; log.put(c, nil) },
		"long tag": func(log *fakeLog) {
			c := ok()
			first(c).Kind, first(c).Tag = typesv1.Kind_KIND_OR, strings.Repeat("t", 257)
			log.put(c, nil)
		},
		"long node": func(log *fakeLog) {
			c := ok()
			first(c).Kind, first(c).Tag = typesv1.Kind_KIND_COUNTER, strings.Repeat("n", 129)
			log.put(c, nil)
		},
		"pruned with a value": func(log *fakeLog) { c := ok(); first(c).Pruned = true; log.put(c, nil) },
		"pruned without a key": func(log *fakeLog) {
			c := ok()
			first(c).Pruned, first(c).Record, first(c).Key = true, nil, nil
			log.put(c, nil)
		},
		"pruned, unknown kind": func(log *fakeLog) {
			c := ok()
			first(c).Pruned, first(c).Record, first(c).Kind = true, nil, 5
			log.put(c, nil)
		},
		"hole":                 func(log *fakeLog) { log.numbers["a"]++; log.put(ok(), nil) },
		"number again":         func(log *fakeLog) { log.numbers["a"]--; log.put(ok(), nil) },
		"lane from the middle": func(log *fakeLog) { log.numbers["c"] = 7; c := ok(); c.Lane = "c"; log.put(c, nil) },
		"sequence again":       func(log *fakeLog) { log.put(ok(), func(e *commitlog.Entry) { e.Sequence-- }) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				log, store := newFakeLog(), newFakeStore()
				service, _ := start(t, config(), persistence.Deps{Store: store, Log: log})
				log.append("a", change("good", "1", 1))
				damage(log)
				log.append("b", change("later", "1", 3))
				time.Sleep(time.Hour)
				wantContent(t, store, "good:1", "history/a:1")
				if err := service.Ready(); err == nil || !strings.Contains(err.Error(), "halted") {
					t.Errorf("ready says %v", err)
				}
				if trims := log.trimmed(); len(trims) > 0 {
					t.Errorf("a halted service trimmed %v", trims)
				}
			})
		})
	}
}

// TestLOG04LogWentBack shows a log that is shorter than what the store holds, at
// the start and while the service runs.
func TestLOG04LogWentBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, store := newFakeLog(), newFakeStore()
		service, stop := start(t, config(), persistence.Deps{Store: store, Log: log})
		for i := range uint64(10) {
			log.append("a", change("k", fmt.Sprint(i), i+1))
		}
		time.Sleep(time.Second)
		log.edit(func() { log.entries, log.last, log.numbers["a"] = log.entries[:8], 8, 8 })
		time.Sleep(time.Minute)
		if err := service.Ready(); err == nil || !strings.Contains(err.Error(), "lost commits") {
			t.Errorf("while running, ready says %v", err)
		}
		stop()
		service, _ = start(t, config(), persistence.Deps{Store: store, Log: log})
		time.Sleep(time.Minute)
		if err := service.Ready(); err == nil || !strings.Contains(err.Error(), "lost commits") {
			t.Errorf("at the start, ready says %v", err)
		}
		wantContent(t, store, "k:9", "history/a:10")
		stop()
		// It grew past the store again, with other commits: sequence alone is no proof.
		for i := range uint64(5) {
			log.append("a", change("k", "forged", i+100))
		}
		log.edit(func() { log.entries[10].Commit.Number, log.entries[11].Commit.Number = 10, 11 })
		service, _ = start(t, config(), persistence.Deps{Store: store, Log: log})
		time.Sleep(time.Minute)
		if err := service.Ready(); err == nil {
			t.Error("a log that was rewritten is taken for the old one")
		}
	})
}

// TestAnotherHistory starts on a store that another log filled.
func TestAnotherHistory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newFakeStore()
		log := newFakeLog()
		_, stop := start(t, config(), persistence.Deps{Store: store, Log: log})
		log.append("a", change("old", "1", 1), change("both", "1", 1))
		log.append("a")
		time.Sleep(time.Second)
		stop()
		log = newFakeLog()
		log.history = "other"
		start(t, config(), persistence.Deps{Store: store, Log: log})
		log.append("a", change("new", "1", 2), change("both", "2", 2))
		time.Sleep(time.Second)
		wantContent(t, store, "both:2 new:1 old:1", "history/a:2 other/a:1")
	})
}

// TestPG06StoreWentBack swaps the store for an older copy of itself, as a restored
// backup does, while nothing is written.
func TestPG06StoreWentBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, store := newFakeLog(), newFakeStore()
		service, _ := start(t, config(), persistence.Deps{Store: store, Log: log})
		log.append("a", change("x", "1", 1))
		time.Sleep(time.Second)
		log.append("a", change("x", "2", 2), change("y", "2", 2))
		time.Sleep(time.Second)
		backup := memstore.New()
		if _, err := backup.Commit(t.Context(), store.stored()[0]); err != nil {
			t.Fatal(err)
		}
		store.set(func() { store.Store = backup })
		time.Sleep(time.Minute)
		wantContent(t, store, "x:2 y:2", "history/a:2")
		if err := service.Ready(); err != nil {
			t.Errorf("not ready: %v", err)
		}
	})
}

// TestPG06TooOld restores a backup that the log no longer reaches down to.
func TestPG06TooOld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, store := newFakeLog(), newFakeStore()
		service, _ := start(t, config(), persistence.Deps{Store: store, Log: log})
		for i := range uint64(10) {
			log.append("a", change("x", fmt.Sprint(i), i+1))
			time.Sleep(time.Minute)
		}
		if trims := log.trimmed(); trims["a"] < 6 {
			t.Fatalf("trimmed up to %v", trims)
		}
		backup := memstore.New()
		if _, err := backup.Commit(t.Context(), store.stored()[0]); err != nil {
			t.Fatal(err)
		}
		store.set(func() { store.Store = backup })
		time.Sleep(time.Minute)
		if err := service.Ready(); err == nil || !strings.Contains(err.Error(), "hole") {
			t.Errorf("ready says %v", err)
		}
	})
}

// TestLOG03Trim wants commits gone once they were stored for the age, and no
// earlier; a lane that rests is trimmed as well.
func TestLOG03Trim(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, store := newFakeLog(), newFakeStore()
		start(t, config(), persistence.Deps{Store: store, Log: log})
		appended := make(map[uint64]time.Time)
		log.append("resting")
		log.append("resting", change("k", "1", 1))
		begin := time.Now()
		for i := range uint64(600) {
			appended[log.append("a", change("k", fmt.Sprint(i), i+2))] = time.Now()
			time.Sleep(time.Second)
			trims := log.trimmed()
			if upTo, ok := trims["a"]; ok && time.Since(appended[upTo]) < 2*time.Minute {
				t.Fatalf("trimmed up to what was stored %v ago", time.Since(appended[upTo]))
			}
			if upTo := trims["a"]; time.Since(begin) > 3*time.Minute && time.Since(appended[upTo]) > 3*time.Minute {
				t.Fatalf("trimmed only up to what was stored %v ago", time.Since(appended[upTo]))
			}
		}
		if upTo := log.trimmed()["resting"]; upTo != 2 {
			t.Errorf("the resting lane is trimmed up to %d, want 2", upTo)
		}
		// Nothing is trimmed while the store is away.
		store.set(func() { store.down = persistence.ErrUnavailable })
		time.Sleep(time.Second)
		before := log.trimmed()["a"]
		for i := range uint64(10) {
			log.append("a", change("k", "away", i+1000))
			time.Sleep(time.Minute)
		}
		if after := log.trimmed()["a"]; after != before {
			t.Errorf("trimmed from %d to %d while the store was away", before, after)
		}
	})
}
