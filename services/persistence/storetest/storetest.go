// Package storetest is the conformance suite of persistence.Store. Each store's
// tests run it; what it does not check, no caller may rely on.
package storetest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/keyspace"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/services/persistence"
)

// Harness is one set of data for the suite.
type Harness struct {
	// Open opens the store. Called again, it opens the same data.
	Open func(t *testing.T) persistence.Store
	// Break makes the data unreachable and returns what heals it; nil for a store
	// that cannot be away.
	Break func(t *testing.T) (heal func())
}

const history = "history-1"

// Run runs the suite. Each part gets a harness of its own from fresh, with no
// data in it.
func Run(t *testing.T, fresh func(t *testing.T) Harness) {
	t.Helper()
	for _, part := range []struct {
		name string
		run  func(t *testing.T, h Harness)
	}{
		{"Empty", testEmpty},
		{"RoundTrip", testRoundTrip},
		{"Reopen", testReopen},
		{"PG-02/Replaces", testReplaces},
		{"PG-02/BatchesDoNotMatter", testBatchesDoNotMatter},
		{"KindsAreApart", testKindsAreApart},
		{"PG-02/ReplacesByKind", testReplacesByKind},
		{"PG-02/Pruned", testPruned},
		{"PG-02/PrunedBatchesDoNotMatter", testPrunedBatchesDoNotMatter},
		{"PG-03/WatermarksMove", testWatermarksMove},
		{"PG-07/CompareAndSet", testCompareAndSet},
		{"PG-07/TwoDrainers", testTwoDrainers},
		{"BadBatch", testBadBatch},
		{"LoadSelects", testLoadSelects},
		{"LoadStops", testLoadStops},
		{"PG-05/LoadWhileCommitting", testLoadWhileCommitting},
		{"LargeBatch", testLargeBatch},
		{"Cancelled", testCancelled},
		{"PG-08/Away", testAway},
	} {
		t.Run(part.name, func(t *testing.T) {
			t.Parallel()
			h := fresh(t)
			if part.name == "PG-08/Away" && h.Break == nil {
				return // nothing can take this store away
			}
			part.run(t, h)
		})
	}
}

// open opens the harness's store and closes it when the test ends.
func open(t *testing.T, h Harness) persistence.Store {
	t.Helper()
	store := h.Open(t)
	t.Cleanup(func() {
		if err := store.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return store
}

// lane builds batches of one lane whose commits carry what a test says.
type lane struct {
	name string
	at   persistence.Position
}

// batch returns the lane's next batch.
func (l *lane) batch(records ...persistence.Record) persistence.Batch {
	move := persistence.Move{Lane: l.name, From: l.at, To: persistence.Position{Sequence: l.at.Sequence + 3, Number: l.at.Number + 1}}
	l.at = move.To
	return persistence.Batch{History: history, Records: records, Moves: []persistence.Move{move}}
}

func record(key, value string, millis, arrival uint64) persistence.Record {
	r := persistence.Record{
		Identity: persistence.Identity{Map: "todos", Key: key},
		State:    lwwmap.Record{Timestamp: hlc.Timestamp{Millis: millis, Counter: 1, NodeID: "node"}},
		Arrival:  persistence.Arrival{Millis: arrival, Counter: 2},
	}
	if value != "" {
		r.State.Value = text(value)
	}
	return r
}

// text is a msgpack string.
func text(s string) []byte {
	return append([]byte{0xd9, byte(len(s))}, s...)
}

func commit(t *testing.T, store persistence.Store, batch persistence.Batch, want int) {
	t.Helper()
	changed, err := store.Commit(t.Context(), batch)
	if err != nil {
		t.Fatalf("commit: %v", err)
	}
	if changed != want {
		t.Errorf("the commit changed %d rows, want %d", changed, want)
	}
}

// load returns everything that the store holds of the partitions, all if none is
// named, sorted.
func load(ctx context.Context, store persistence.Store, partitions ...int) (records []persistence.Record, marks []persistence.Watermark, err error) {
	if len(partitions) == 0 {
		for partition := range keyspace.PartitionCount {
			partitions = append(partitions, partition)
		}
	}
	calls := 0
	err = store.Load(ctx, partitions,
		func(got []persistence.Watermark) error {
			if calls++; calls > 1 || len(records) > 0 {
				return errors.New("the watermarks must come once and first")
			}
			marks = got
			return nil
		},
		func(r persistence.Record) error {
			if calls == 0 {
				return errors.New("a record came before the watermarks")
			}
			records = append(records, r)
			return nil
		})
	if err == nil && calls == 0 {
		err = errors.New("the watermarks never came")
	}
	slices.SortFunc(records, func(a, b persistence.Record) int {
		return a.Compare(b.Identity)
	})
	slices.SortFunc(marks, func(a, b persistence.Watermark) int {
		return cmp.Or(strings.Compare(a.History, b.History), strings.Compare(a.Lane, b.Lane))
	})
	return records, marks, err
}

func mustLoad(t *testing.T, store persistence.Store, partitions ...int) ([]persistence.Record, []persistence.Watermark) {
	t.Helper()
	records, marks, err := load(t.Context(), store, partitions...)
	if err != nil {
		t.Fatalf("load: %v", err)
	}
	return records, marks
}

// same compares records as content: nil and empty slices are equal.
func same(a, b persistence.Record) bool {
	return a.Identity == b.Identity && string(a.State.Value) == string(b.State.Value) &&
		a.State.Timestamp == b.State.Timestamp && a.State.TTLMillis == b.State.TTLMillis &&
		a.Arrival == b.Arrival && slices.Equal(a.Restamped, b.Restamped)
}

func wantRecords(t *testing.T, got, want []persistence.Record) {
	t.Helper()
	if !slices.EqualFunc(got, want, same) {
		t.Errorf("the store holds %d records\n%s\nwant %d\n%s", len(got), show(got), len(want), show(want))
	}
}

func show(records []persistence.Record) string {
	var b strings.Builder
	for i, r := range records {
		if i == 20 {
			b.WriteString("  …\n")
			break
		}
		value := r.State.Value
		fmt.Fprintf(&b, "  %d %s/%q/%q = %.40q stamp %q ttl %d arrival %v restamped %q\n",
			r.Kind, r.Map, r.Key, r.Tag, value, r.State.Timestamp, r.State.TTLMillis, r.Arrival, r.Restamped)
	}
	return b.String()
}

func testEmpty(t *testing.T, h Harness) {
	store := open(t, h)
	records, marks := mustLoad(t, store)
	if len(records) != 0 || len(marks) != 0 {
		t.Errorf("an empty store loads %d records and %d watermarks", len(records), len(marks))
	}
	if marks, err := store.Watermarks(t.Context()); err != nil || len(marks) != 0 {
		t.Errorf("an empty store has the watermarks %v, %v", marks, err)
	}
	if stats, err := store.Stats(t.Context()); err != nil || stats != (persistence.Stats{}) {
		t.Errorf("an empty store counts %+v, %v", stats, err)
	}
}

// odd are records that a database is tempted to change or refuse.
func odd() []persistence.Record {
	var records []persistence.Record
	add := func(change func(r *persistence.Record)) {
		r := record(fmt.Sprintf("key-%02d", len(records)), "value", 1_700_000_000_000+uint64(len(records)), 1_700_000_001_000)
		change(&r)
		records = append(records, r)
	}
	for _, key := range []string{
		"\x00", "a\x00b", "\xff\xfe", "ends in a space ", " ", "ä", "a\u0308", "😀", "'; DROP TABLE records; --", `\`, `{"a":1}`,
		"UPPER", "upper", "%s", "\n\r\t", strings.Repeat("k", 512), strings.Repeat("\xff", 512), "__proto__",
	} {
		add(func(r *persistence.Record) { r.Key = key })
	}
	for _, name := range []string{"a", "A", "a.b", "a:b", "a-b", strings.Repeat("m", 128)} {
		add(func(r *persistence.Record) { r.Map = name })
	}
	for _, value := range [][]byte{
		nil,                                  // a tombstone
		{0xc0},                               // nil
		{0xc3},                               // true
		{0xcb, 0x7f, 0xf8, 0, 0, 0, 0, 0, 0}, // NaN
		{0xcb, 0x7f, 0xef, 255, 255, 255, 255, 255, 255}, // the largest float
		{0xcb, 0x80, 0, 0, 0, 0, 0, 0, 0},                // -0
		{0xcf, 255, 255, 255, 255, 255, 255, 255, 255},   // the largest uint64
		{0xd3, 0x80, 0, 0, 0, 0, 0, 0, 0},                // the smallest int64
		{0xa3, 'a', 0, 'b'},                              // a string with a NUL
		{0xa2, 0xff, 0xfe},                               // a string that is not UTF-8
		{0xa6, 0xed, 0xa0, 0x80, 0xed, 0xb0, 0x80},       // surrogates in UTF-8
		{0xc4, 2, 0, 255},                                // bin
		{0xd4, 0, 0},                                     // ext, JavaScript's undefined
		{0xd6, 0xff, 1, 2, 3, 4},                         // a time
		{0x81, 0x01, 0x02},                               // a map with a number as key
		{0x82, 0xa1, 'a', 1, 0xa1, 'a', 2},               // a map with a key twice
		{0x81, 0xa2, 'a', 0, 1},                          // a map with a NUL in a key
		{0x80},
		{0x90},
		append(slices.Repeat([]byte{0x91}, 127), 0xc0), // nested as deep as it may be
		append([]byte{0xc6, 0, 4, 0, 0}, make([]byte, 256<<10)...),
		append([]byte{0xdb, 0, 3, 0xff, 0xf0}, slices.Repeat([]byte{'"'}, 256<<10-16)...),
	} {
		add(func(r *persistence.Record) { r.State.Value = value })
	}
	for _, node := range []string{"a\x00b", "ü", "😀", "node-ttl", "topgun-3", strings.Repeat("n", 132)} {
		add(func(r *persistence.Record) { r.State.Timestamp.NodeID = node })
	}
	add(func(r *persistence.Record) { r.State.Timestamp.Millis, r.State.Timestamp.Counter = 1<<53, 1<<53 })
	add(func(r *persistence.Record) { r.State.Timestamp.Millis, r.State.Timestamp.Counter = 0, 0 })
	add(func(r *persistence.Record) { r.State.TTLMillis = 1 })
	add(func(r *persistence.Record) { r.State.TTLMillis = 10 * 365 * 24 * 3600 * 1000 })
	add(func(r *persistence.Record) { r.State.Timestamp.Millis, r.State.TTLMillis = 1<<53, 1<<53 })
	add(func(r *persistence.Record) { r.Arrival = persistence.Arrival{Millis: 1 << 53, Counter: 1 << 53} })
	add(func(r *persistence.Record) {
		r.Restamped = []hlc.Timestamp{
			{Millis: 1<<64 - 1, Counter: 1<<64 - 1, NodeID: "liar"}, {Millis: 5, NodeID: "a\x00b"}, {Millis: 6, NodeID: `"</ü`},
		}
	})
	records = append(records, oddKinds()...)
	slices.SortFunc(records, func(a, b persistence.Record) int { return a.Compare(b.Identity) })
	return records
}

func testRoundTrip(t *testing.T, h Harness) {
	store := open(t, h)
	want := odd()
	l := lane{name: "lane"}
	commit(t, store, l.batch(want...), len(want))
	got, _ := mustLoad(t, store)
	wantRecords(t, got, want)
	stats, err := store.Stats(t.Context())
	if err != nil || stats.Records != uint64(len(want)) || stats.Tombstones != 2 {
		t.Errorf("the store counts %+v, %v; want %d records, 2 tombstones", stats, err, len(want))
	}
}

func testReopen(t *testing.T, h Harness) {
	store := h.Open(t)
	l := lane{name: "lane"}
	first, second := record("a", "one", 10, 10), record("b", "two", 11, 11)
	commit(t, store, l.batch(first), 1)
	if err := store.Close(); err != nil {
		t.Fatalf("close: %v", err)
	}
	store = open(t, h)
	commit(t, store, l.batch(second), 1)
	got, marks := mustLoad(t, store)
	wantRecords(t, got, []persistence.Record{first, second})
	if want := (persistence.Watermark{History: history, Lane: "lane", Position: l.at}); len(marks) != 1 || marks[0] != want {
		t.Errorf("the watermarks are %v, want %v", marks, want)
	}
}

func testReplaces(t *testing.T, h Harness) {
	store := open(t, h)
	at := func(millis, counter uint64, node string, arrivalMillis, arrivalCounter uint64, value string) persistence.Record {
		r := record("", value, 0, 0)
		r.State.Timestamp = hlc.Timestamp{Millis: millis, Counter: counter, NodeID: node}
		r.Arrival = persistence.Arrival{Millis: arrivalMillis, Counter: arrivalCounter}
		return r
	}
	grown := at(5, 5, "m", 6, 0, "stored")
	grown.Restamped = []hlc.Timestamp{{Millis: 99, NodeID: "liar"}}
	stored := at(5, 5, "m", 5, 5, "stored")
	l := lane{name: "lane"}
	for name, c := range map[string]struct {
		next persistence.Record
		want bool
	}{
		"later and newer":                              {at(6, 0, "a", 6, 0, "next"), true},
		"later and newer, by counters":                 {at(5, 6, "a", 5, 6, "next"), true},
		"later and newer, by node":                     {at(5, 5, "n", 5, 6, "next"), true},
		"later, node longer: an expiry":                {at(5, 5, "m-ttl", 5, 6, ""), true},
		"later, node above ASCII":                      {at(5, 5, "ä", 5, 6, "next"), true},
		"later, node below though not in a dictionary": {at(5, 5, "Z", 5, 6, "next"), false},
		"the same again":                               {stored, false},
		"later, the same stamp":                        {grown, true},
		"later but older: a fault":                     {at(4, 9, "z", 9, 9, "next"), false},
		"later but older, by counter":                  {at(5, 4, "z", 9, 9, "next"), false},
		"later but older, by node":                     {at(5, 5, "l", 9, 9, "next"), false},
		"earlier though newer: redelivered":            {at(9, 9, "z", 5, 4, "next"), false},
		"earlier and older: redelivered":               {at(1, 0, "a", 4, 9, "next"), false},
		"a tombstone that is later":                    {at(6, 0, "a", 6, 0, ""), true},
		"a counter beyond 32 bits":                     {at(5, 1<<40, "a", 5, 1<<40, "next"), true},
	} {
		first, next := stored, c.next
		first.Key, next.Key = name, name
		commit(t, store, l.batch(first), 1)
		want, wantChanged := first, 0
		if c.want {
			want, wantChanged = next, 1
		}
		if got := next.Replaces(first); got != c.want {
			t.Errorf("%s: Replaces says %t, want %t", name, got, c.want)
		}
		commit(t, store, l.batch(next), wantChanged)
		got, _ := mustLoad(t, store, keyspace.Partition(name))
		got = slices.DeleteFunc(got, func(r persistence.Record) bool { return r.Key != name })
		if len(got) != 1 || !same(got[0], want) {
			t.Errorf("%s: the store holds\n%swant\n%s", name, show(got), show([]persistence.Record{want}))
		}
	}
}

// testBatchesDoNotMatter commits one log several times over, cut into batches in
// different ways and with parts delivered again, and wants one result.
func testBatchesDoNotMatter(t *testing.T, h Harness) {
	store := open(t, h)
	seed := rand.Uint64()
	random := rand.New(rand.NewPCG(seed, 1))
	model := make(map[string]persistence.Record)
	var log []persistence.Record
	for arrival := range uint64(300) {
		key := fmt.Sprintf("key-%d", random.IntN(20))
		value := fmt.Sprintf("value-%d", arrival)
		if random.IntN(4) == 0 {
			value = ""
		}
		r := record(key, value, model[key].State.Timestamp.Millis+uint64(random.IntN(3)), arrival+1)
		model[key] = r
		log = append(log, r)
	}
	l := lane{name: "lane"}
	// The last round is the log as it is, the ones before redeliver parts of it.
	for start := 0; start < len(log); {
		end := min(start+1+random.IntN(40), len(log))
		for _, part := range [][]persistence.Record{log[start:end], log[random.IntN(end):end]} {
			latest := make(map[string]persistence.Record)
			for _, r := range part {
				latest[r.Key] = r
			}
			var records []persistence.Record
			for _, r := range latest {
				records = append(records, r)
			}
			if _, err := store.Commit(t.Context(), l.batch(records...)); err != nil {
				t.Fatalf("commit: %v (seed %d)", err, seed)
			}
		}
		start = end
	}
	var want []persistence.Record
	for _, r := range model {
		want = append(want, r)
	}
	slices.SortFunc(want, func(a, b persistence.Record) int { return strings.Compare(a.Key, b.Key) })
	got, _ := mustLoad(t, store)
	wantRecords(t, got, want)
	if t.Failed() {
		t.Logf("seed %d", seed)
	}
}

func testLoadSelects(t *testing.T, h Harness) {
	store := open(t, h)
	var all []persistence.Record
	for i := range 2000 {
		all = append(all, record(fmt.Sprintf("key-%04d", i), "value", uint64(i+1), uint64(i+1)))
	}
	l := lane{name: "lane"}
	commit(t, store, l.batch(all...), len(all))
	total := 0
	for _, shard := range []int{0, 1, 2, 3} {
		partitions := keyspace.Partitions(shard, 4)
		got, marks := mustLoad(t, store, partitions...)
		for _, r := range got {
			if !slices.Contains(partitions, r.Partition()) {
				t.Fatalf("key %q of partition %d came with shard %d of 4", r.Key, r.Partition(), shard)
			}
		}
		if len(marks) != 1 {
			t.Errorf("shard %d came with the watermarks %v", shard, marks)
		}
		total += len(got)
	}
	if total != len(all) {
		t.Errorf("the shards hold %d records together, want %d", total, len(all))
	}
}

func testLoadStops(t *testing.T, h Harness) {
	store := open(t, h)
	l := lane{name: "lane"}
	commit(t, store, l.batch(record("a", "x", 1, 1), record("b", "x", 1, 1)), 2)
	stop := errors.New("enough")
	partitions := []int{keyspace.Partition("a"), keyspace.Partition("b")}
	for range 20 { // more often than a store has connections
		records := 0
		err := store.Load(t.Context(), partitions,
			func([]persistence.Watermark) error { return nil },
			func(persistence.Record) error { records++; return stop })
		if !errors.Is(err, stop) || records != 1 {
			t.Fatalf("Load went on to record %d and returned %v", records, err)
		}
		err = store.Load(t.Context(), partitions,
			func([]persistence.Watermark) error { return stop },
			func(persistence.Record) error { records++; return nil })
		if !errors.Is(err, stop) || records != 1 {
			t.Fatalf("Load went on after the watermarks and returned %v", err)
		}
	}
	commit(t, store, l.batch(record("c", "x", 2, 2)), 1)
}

// testLoadWhileCommitting rewrites all keys in each batch: what a Load shows must
// be one batch whole, and the one that its watermark names.
func testLoadWhileCommitting(t *testing.T, h Harness) {
	store := open(t, h)
	const keys, batches = 50, 60
	l := lane{name: "lane"}
	var wg sync.WaitGroup
	done := make(chan struct{})
	wg.Go(func() {
		defer close(done)
		for version := range uint64(batches) {
			records := make([]persistence.Record, keys)
			for i := range records {
				records[i] = record(fmt.Sprintf("key-%d", i), "value", version+1, version+1)
			}
			if _, err := store.Commit(t.Context(), l.batch(records...)); err != nil {
				t.Errorf("commit: %v", err)
				return
			}
		}
	})
	for range 3 {
		wg.Go(func() {
			for stopped := false; !stopped; {
				select {
				case <-done:
					stopped = true // and look once more
				default:
				}
				records, marks, err := load(t.Context(), store)
				if err != nil {
					t.Errorf("load: %v", err)
					return
				}
				if len(marks) == 0 && len(records) == 0 {
					continue
				}
				if len(marks) != 1 || len(records) != keys {
					t.Errorf("a load shows %d watermarks and %d records", len(marks), len(records))
					return
				}
				for _, r := range records {
					if r.Arrival.Millis != marks[0].Number {
						t.Errorf("a load up to batch %d shows a record of batch %d", marks[0].Number, r.Arrival.Millis)
						return
					}
				}
			}
		})
	}
	wg.Wait()
}

func testLargeBatch(t *testing.T, h Harness) {
	store := open(t, h)
	const n = 10_000
	want := make([]persistence.Record, n)
	for i := range want {
		want[i] = record(fmt.Sprintf("key-%05d", i), strings.Repeat("v", 100), uint64(i+1), uint64(i+1))
	}
	shuffled := slices.Clone(want)
	rand.Shuffle(n, func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
	l := lane{name: "lane"}
	commit(t, store, l.batch(shuffled...), n)
	commit(t, store, l.batch(shuffled...), 0)
	got, _ := mustLoad(t, store)
	wantRecords(t, got, want)
}

func testCancelled(t *testing.T, h Harness) {
	store := open(t, h)
	l := lane{name: "lane"}
	commit(t, store, l.batch(record("a", "x", 1, 1)), 1)
	at := l
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := store.Commit(ctx, l.batch(record("b", "x", 1, 1))); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled commit returns %v", err)
	}
	if _, _, err := load(ctx, store); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled load returns %v", err)
	}
	records, _ := mustLoad(t, store)
	wantRecords(t, records, []persistence.Record{record("a", "x", 1, 1)})
	commit(t, store, at.batch(record("b", "x", 1, 1)), 1)
}

// testAway takes the data away from under an open store and from one that opens
// meanwhile.
func testAway(t *testing.T, h Harness) {
	store := open(t, h)
	l := lane{name: "lane"}
	first, second := record("a", "one", 1, 1), record("b", "two", 2, 2)
	commit(t, store, l.batch(first), 1)
	next := l.batch(second)

	heal := h.Break(t)
	late := open(t, h)
	for name, store := range map[string]persistence.Store{"open": store, "late": late} {
		_, _, err := load(t.Context(), store)
		wantAway(t, name+": load", err)
		_, err = store.Commit(t.Context(), next)
		wantAway(t, name+": commit", err)
		_, err = store.Watermarks(t.Context())
		wantAway(t, name+": watermarks", err)
		_, err = store.Stats(t.Context())
		wantAway(t, name+": stats", err)
	}
	heal()
	commit(t, store, next, 1)
	if _, err := late.Commit(t.Context(), next); !errors.Is(err, persistence.ErrConflict) {
		t.Errorf("the batch again returns %v, want a conflict", err)
	}
	got, _ := mustLoad(t, late)
	wantRecords(t, got, []persistence.Record{first, second})
}

// wantAway wants a temporary error that says nothing of where the data is.
func wantAway(t *testing.T, what string, err error) {
	t.Helper()
	if !errors.Is(err, persistence.ErrUnavailable) {
		t.Errorf("%s returns %v, want unavailable", what, err)
	}
	for _, secret := range []string{"postgres:", "password", "/tmp", "host", "dial"} {
		if err != nil && strings.Contains(err.Error(), secret) {
			t.Errorf("%s returns the text %q, which tells where the data is", what, err)
		}
	}
}
