package storetest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/services/persistence"
)

// kinds are all kinds of record with a tag that fits.
var kinds = []persistence.Identity{
	{Kind: persistence.LWW, Map: "todos"},
	{Kind: persistence.OR, Map: "todos", Tag: "1:0:node"},
	{Kind: persistence.Counter, Map: "+todos", Tag: "node"},
	{Kind: persistence.Lock, Map: "!locks"},
}

// ofKind returns a record of another kind.
func ofKind(kind persistence.Identity, key, value string, millis, arrival uint64) persistence.Record {
	r := record(key, value, millis, arrival)
	kind.Key = key
	r.Identity = kind
	return r
}

func pruned(r persistence.Record, arrival, counter uint64) persistence.Pruned {
	return persistence.Pruned{Identity: r.Identity, Arrival: persistence.Arrival{Millis: arrival, Counter: counter}}
}

// testKindsAreApart stores what differs in one part of its identity only.
func testKindsAreApart(t *testing.T, h Harness) {
	store := open(t, h)
	var want []persistence.Record
	for i, id := range []persistence.Identity{
		{Kind: persistence.LWW, Map: "m"},
		{Kind: persistence.OR, Map: "m", Tag: "a"},
		{Kind: persistence.OR, Map: "m", Tag: "A"},
		{Kind: persistence.OR, Map: "m", Tag: "a "},
		{Kind: persistence.OR, Map: "m", Tag: "a\x00"},
		{Kind: persistence.OR, Map: "n", Tag: "a"},
		{Kind: persistence.Counter, Map: "m", Tag: "a"},
		{Kind: persistence.Lock, Map: "m"},
	} {
		want = append(want, ofKind(id, "key", fmt.Sprint("value ", i), 10, 10))
	}
	slices.SortFunc(want, func(a, b persistence.Record) int { return a.Compare(b.Identity) })
	l := lane{name: "lane"}
	commit(t, store, l.batch(want...), len(want))
	got, _ := mustLoad(t, store)
	wantRecords(t, got, want)
	// One of them changes, another goes, and no other notices.
	want[1].State.Value, want[1].Arrival.Millis = text("changed"), 11
	commit(t, store, l.batch(want[1]), 1)
	batch := l.batch()
	batch.Pruned = []persistence.Pruned{pruned(want[3], 11, 0)}
	commit(t, store, batch, 1)
	got, _ = mustLoad(t, store)
	wantRecords(t, got, slices.Delete(want, 3, 4))
}

// testReplacesByKind wants only an LWW-map to look at stamps.
func testReplacesByKind(t *testing.T, h Harness) {
	store := open(t, h)
	l := lane{name: "lane"}
	for i, kind := range kinds {
		for name, c := range map[string]struct {
			next        persistence.Record
			want, ofLWW bool
		}{
			"later and newer":      {ofKind(kind, "", "next", 20, 20), true, true},
			"later but older":      {ofKind(kind, "", "next", 5, 20), true, false},
			"later, older removal": {ofKind(kind, "", "", 5, 20), true, false},
			"the same arrival":     {ofKind(kind, "", "next", 20, 10), false, false},
			"earlier though newer": {ofKind(kind, "", "next", 20, 9), false, false},
		} {
			key := fmt.Sprint(i, name)
			first := ofKind(kind, key, "stored", 10, 10)
			c.next.Key = key
			want := c.want && (kind.Kind != persistence.LWW || c.ofLWW)
			commit(t, store, l.batch(first), 1)
			if got := c.next.Replaces(first); got != want {
				t.Errorf("%s of kind %d: Replaces says %t, want %t", name, kind.Kind, got, want)
			}
			holds, changed := first, 0
			if want {
				holds, changed = c.next, 1
			}
			commit(t, store, l.batch(c.next), changed)
			wantHolds(t, store, key, holds)
		}
	}
}

// wantHolds wants the records of one key.
func wantHolds(t *testing.T, store persistence.Store, key string, want ...persistence.Record) {
	t.Helper()
	got, _ := mustLoad(t, store, persistence.Identity{Key: key}.Partition())
	got = slices.DeleteFunc(got, func(r persistence.Record) bool { return r.Key != key })
	if !slices.EqualFunc(got, want, same) {
		t.Errorf("under key %q the store holds\n%swant\n%s", key, show(got), show(want))
	}
}

func testPruned(t *testing.T, h Harness) {
	store := open(t, h)
	l := lane{name: "lane"}
	for i, kind := range kinds {
		for name, c := range map[string]struct {
			millis, counter uint64
			goes            bool
		}{
			"later":                     {11, 0, true},
			"later by the counter":      {10, 3, true},
			"the same arrival":          {10, 2, false},
			"earlier: redelivered":      {9, 99, false},
			"earlier, by the counter":   {10, 1, false},
			"later, beyond 32 bits":     {1 << 40, 1 << 40, true},
			"later, at the end of time": {1 << 53, 1 << 53, true},
		} {
			key := fmt.Sprint(i, name)
			stored := ofKind(kind, key, "", 10, 10)
			commit(t, store, l.batch(stored), 1)
			batch := l.batch()
			batch.Pruned = []persistence.Pruned{pruned(stored, c.millis, c.counter)}
			changed := 0
			if c.goes {
				changed = 1
			}
			commit(t, store, batch, changed)
			again := l.batch()
			again.Pruned = batch.Pruned
			commit(t, store, again, 0)
			if c.goes {
				wantHolds(t, store, key)
				// What comes later finds nothing to compete with.
				stored = ofKind(kind, key, "again", 5, 1<<41)
				commit(t, store, l.batch(stored), 1)
			}
			wantHolds(t, store, key, stored)
		}
		// In one batch with what comes after it, whose stamp would have lost.
		key := fmt.Sprint(i, "in one batch")
		commit(t, store, l.batch(ofKind(kind, key, "", 10, 10)), 1)
		next := ofKind(kind, key, "next", 5, 12)
		batch := l.batch(next)
		batch.Pruned = []persistence.Pruned{pruned(next, 11, 0)}
		commit(t, store, batch, 2)
		wantHolds(t, store, key, next)
		// With the watermarks or not at all.
		lost := batch
		lost.Pruned = []persistence.Pruned{pruned(next, 20, 0)}
		if _, err := store.Commit(t.Context(), lost); !errors.Is(err, persistence.ErrConflict) {
			t.Errorf("a batch from behind returns %v, want a conflict", err)
		}
		wantHolds(t, store, key, next)
	}
}

// testPrunedBatchesDoNotMatter stores one log of all kinds, in which tombstones are
// forgotten and values come back with older stamps, cut into batches anyhow and with
// the last part of it delivered again each time.
func testPrunedBatchesDoNotMatter(t *testing.T, h Harness) {
	store := open(t, h)
	seed := rand.Uint64()
	random := rand.New(rand.NewPCG(seed, 2))
	type step struct {
		record persistence.Record
		prune  bool
	}
	var log []step
	model := make(map[persistence.Identity]persistence.Record)
	for arrival := uint64(1); arrival <= 400; arrival++ {
		r := ofKind(kinds[random.IntN(len(kinds))], fmt.Sprint("key-", random.IntN(6)), fmt.Sprint("value ", arrival), 0, arrival)
		held, ok := model[r.Identity]
		switch {
		case ok && held.State.Deleted():
			// Its stamp is below the tombstone's, which is gone by then.
			r.State.Timestamp.Millis = held.State.Timestamp.Millis
			delete(model, r.Identity)
			log = append(log, step{r, true})
			continue
		case ok && random.IntN(3) == 0:
			r.State.Value = nil
		}
		r.State.Timestamp.Millis = held.State.Timestamp.Millis + uint64(random.IntN(3))
		if !ok {
			r.State.Timestamp.Millis = uint64(random.IntN(50))
		}
		model[r.Identity] = r
		log = append(log, step{r, false})
	}
	l := lane{name: "lane"}
	put := func(steps []step) {
		t.Helper()
		records := make(map[persistence.Identity]persistence.Record)
		forgotten := make(map[persistence.Identity]persistence.Pruned)
		for _, s := range steps {
			if s.prune {
				forgotten[s.record.Identity] = persistence.Pruned{Identity: s.record.Identity, Arrival: s.record.Arrival}
				delete(records, s.record.Identity)
			} else {
				records[s.record.Identity] = s.record
			}
		}
		batch := l.batch()
		for _, r := range records {
			batch.Records = append(batch.Records, r)
		}
		for _, p := range forgotten {
			batch.Pruned = append(batch.Pruned, p)
		}
		if _, err := store.Commit(t.Context(), batch); err != nil {
			t.Fatalf("commit: %v (seed %d)", err, seed)
		}
	}
	for start := 0; start < len(log); {
		end := min(start+1+random.IntN(40), len(log))
		put(log[start:end])
		// Again, from anywhere to the end, in one batch and in two.
		from := random.IntN(end)
		middle := from + random.IntN(end-from)
		put(log[from:end])
		put(log[from:middle])
		put(log[middle:end])
		start = end
	}
	var want []persistence.Record
	for _, r := range model {
		want = append(want, r)
	}
	slices.SortFunc(want, func(a, b persistence.Record) int { return a.Compare(b.Identity) })
	got, _ := mustLoad(t, store)
	wantRecords(t, got, want)
	if t.Failed() {
		t.Logf("seed %d", seed)
	}
}

// oddKinds are identities that a database is tempted to change or refuse.
func oddKinds() []persistence.Record {
	var records []persistence.Record
	add := func(id persistence.Identity, key string, value []byte) {
		r := ofKind(id, key, "", 1_700_000_000_000, 1_700_000_000_000)
		r.State.Value = value
		records = append(records, r)
	}
	long := func(c byte, n int) string { return string(slices.Repeat([]byte{c}, n)) }
	for _, tag := range []string{"\x00", "a\x00b", "\xff\xfe", " ", "ü", "'", `\`, long('t', 256), long(0xff, 256)} {
		add(persistence.Identity{Kind: persistence.OR, Map: "odd", Tag: tag}, "key", []byte{0xc0})
	}
	longest := persistence.Identity{Kind: persistence.OR, Map: long('m', 128), Tag: long(0xff, 256)}
	add(longest, long(0xff, 512), nil)
	add(persistence.Identity{Kind: persistence.Counter, Map: "+" + long('c', 256), Tag: long('n', 128)}, long('c', 256),
		[]byte{0x92, 0xcf, 0, 0x20, 0, 0, 0, 0, 0, 0, 0})
	add(persistence.Identity{Kind: persistence.Lock, Map: "!locks"}, "a/b", []byte{0x80})
	records[len(records)-1].Restamped = []hlc.Timestamp{{Millis: 1, NodeID: "n"}}
	return records
}
