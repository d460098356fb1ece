package partition

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect/v2"
	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/msgval"
	"github.com/topgun-sync/topgun/core/query"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

// object is a msgpack map of names and values in turn.
func object(pairs ...any) []byte {
	b := msgval.AppendMapHeader(nil, len(pairs)/2)
	for _, p := range pairs {
		b = appendAny(b, p)
	}
	return b
}

func appendAny(b []byte, v any) []byte {
	switch v := v.(type) {
	case string:
		return msgval.AppendString(b, v)
	case int:
		return msgval.AppendInt(b, int64(v))
	case []byte:
		return append(b, v...)
	case []any:
		b = msgval.AppendArrayHeader(b, len(v))
		for _, e := range v {
			b = appendAny(b, e)
		}
		return b
	}
	panic("a test wants a value that appendAny does not know")
}

func keysOf(rows []*partitionv1.Row) []string {
	keys := make([]string, 0, len(rows))
	for _, r := range rows {
		keys = append(keys, string(r.GetKey()))
	}
	return keys
}

// fillQuery writes 100 records {n: i%10, i: i}, of which k01 is deleted again.
func fillQuery(n *node) {
	var ops []*partitionv1.Op
	for i := range 100 {
		op := put(fmt.Sprintf("k%02d", i), "", 1, "a")
		op.Record.Value = object("n", i%10, "i", i)
		ops = append(ops, op)
	}
	expired := put("k00x", "v", 1, "a") // its time is long over
	expired.Record.TtlMillis = 1
	n.apply(append(ops, expired, put("k01", "", 2, "a"))...)
}

func TestQuery(t *testing.T) {
	n := newWorld(t).start()
	fillQuery(n)
	where := object("where", object("n", 3))
	q, err := query.Parse(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	after := func(key string) []byte { return q.Position(query.Row{Key: key}) }
	for name, test := range map[string]struct {
		req   *partitionv1.QueryRequest
		first string
		rows  int
		more  bool
	}{
		"all":   {&partitionv1.QueryRequest{}, "k00", 99, false},
		"limit": {&partitionv1.QueryRequest{Limit: 5}, "k00", 5, true},
		"after": {&partitionv1.QueryRequest{After: after("k90")}, "k91", 9, false},
		"where": {&partitionv1.QueryRequest{Query: where}, "k03", 10, false},
		"both":  {&partitionv1.QueryRequest{Query: where, After: after("k03"), Limit: 2}, "k13", 2, true},
		"exact": {&partitionv1.QueryRequest{Query: where, Limit: 10}, "k03", 10, false},
		"bytes": {&partitionv1.QueryRequest{MaxBytes: 24}, "k00", 2, true},
	} {
		test.req.Map = "m"
		resp, err := n.Query(t.Context(), test.req)
		if err != nil {
			t.Fatal(err)
		}
		keys := keysOf(resp.GetRows())
		if len(keys) != test.rows || keys[0] != test.first || !slices.IsSorted(keys) || resp.GetMore() != test.more {
			t.Errorf("%s: %d rows from %v, more %t", name, len(keys), keys[:1], resp.GetMore())
		}
		if len(resp.GetCovered()) != shardCount {
			t.Errorf("%s: %d shards are covered", name, len(resp.GetCovered()))
		}
	}
	for name, req := range map[string]*partitionv1.QueryRequest{
		"query": {Query: []byte{0xc1}}, "limit": {Limit: 100_001}, "bytes": {MaxBytes: 17 << 20},
	} {
		if _, err := n.Query(t.Context(), req); connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("bad %s: %v", name, err)
		}
	}
}

func TestQueryInItsOrder(t *testing.T) {
	n := newWorld(t).start()
	fillQuery(n)
	sort := object("sort", []any{object("field", "n", "direction", "desc")})
	var keys []string
	req := &partitionv1.QueryRequest{Map: "m", Query: sort, Limit: 7}
	q, err := query.Parse(sort, nil)
	if err != nil {
		t.Fatal(err)
	}
	for more := true; more; {
		resp, err := n.Query(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, keysOf(resp.GetRows())...)
		last := resp.GetRows()[len(resp.GetRows())-1]
		req.After, more = q.Position(query.Row{Key: string(last.GetKey()), Value: last.GetValue()}), resp.GetMore()
	}
	var want []string
	for rest := 9; rest >= 0; rest-- {
		for i := rest; i < 100; i += 10 {
			if i != 1 {
				want = append(want, fmt.Sprintf("k%02d", i))
			}
		}
	}
	if diff := cmp.Diff(want, keys); diff != "" {
		t.Errorf("pages in order (-want +got):\n%s", diff)
	}
}

// Pages that are cut by their bytes neither skip nor repeat a row, whatever shards the
// large and the small ones are in.
func TestQueryPagesOfBytes(t *testing.T) {
	n := newWorld(t).start()
	const records = 300
	var ops []*partitionv1.Op
	for i := range records {
		ops = append(ops, put(fmt.Sprintf("k%03d", i), strings.Repeat("x", i*37%10*60+1), 1, "a"))
	}
	n.apply(ops...)
	q, err := query.Parse(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	var keys []string
	req := &partitionv1.QueryRequest{Map: "m", MaxBytes: 900}
	for more := true; more; {
		resp, err := n.Query(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, keysOf(resp.GetRows())...)
		req.After, more = q.Position(query.Row{Key: keys[len(keys)-1]}), resp.GetMore()
	}
	if len(keys) != records || !slices.IsSorted(keys) || len(slices.Compact(slices.Clone(keys))) != records {
		t.Errorf("%d rows, want %d, each once and in order", len(keys), records)
	}
}

func TestQueryGroups(t *testing.T) {
	n := newWorld(t).start()
	fillQuery(n)
	b := object("groupBy", []any{"n"}, "aggregations", []any{object("func", "sum", "field", "i")})
	q, err := query.Parse(b, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := n.Query(t.Context(), &partitionv1.QueryRequest{Map: "m", Query: b, Limit: 1})
	if err != nil {
		t.Fatal(err)
	}
	groups := query.NewGroups(q)
	for _, r := range resp.GetRows() {
		if err := groups.Merge(query.Row{Key: string(r.GetKey()), Value: r.GetValue()}); err != nil {
			t.Fatal(err)
		}
	}
	rows, more := groups.Rows(nil)
	if len(rows) != 10 || more || resp.GetMore() {
		t.Fatalf("%d groups", len(rows))
	}
	text, _ := msgval.AppendJSON(nil, rows[1].Value)
	if !strings.Contains(string(text), `"__count":9`) || !strings.Contains(string(text), `"__sum_i":459`) {
		t.Errorf("the group of 1: %s", text)
	}
	resp, err = n.Query(t.Context(), &partitionv1.QueryRequest{Map: "m", Query: b, Ungrouped: true})
	if err != nil || len(resp.GetRows()) != 99 {
		t.Errorf("ungrouped: %d rows, %v", len(resp.GetRows()), err)
	}
}

// A row is the LWW record, or else the array of the values in the OR-map.
func TestQueryRowsOfBothMaps(t *testing.T) {
	for _, others := range []int{0, 2000} { // scanned whole, and by leaves
		t.Run(fmt.Sprint(others), func(t *testing.T) {
			n := newWorld(t).start()
			var ops []*partitionv1.Op
			for i := range others {
				ops = append(ops, put(fmt.Sprint("x", i), "x", 1, "a"), add(fmt.Sprint("y", i), "t", "y", 1, "a"))
			}
			n.apply(append(ops,
				put("both", "single", 1, "a"), add("both", "t1", "hidden", 1, "a"),
				put("gone", "v", 1, "a"), add("gone", "t2", "shown", 1, "a"), put("gone", "", 2, "a"),
				add("many", "t9", "first", 9, "a"), add("many", "t5", "second", 5, "a"), add("many", "t7", "removed", 7, "a"),
				remove("many", "t7", 8, "a"), add("none", "t3", "v", 1, "a"), remove("none", "t3", 2, "a"),
			)...)
			resp, err := n.Query(t.Context(), &partitionv1.QueryRequest{Map: "m", Limit: 10_000})
			if err != nil {
				t.Fatal(err)
			}
			got := make(map[string]string)
			for _, r := range resp.GetRows() {
				text, _ := msgval.AppendJSON(nil, r.GetValue())
				got[string(r.GetKey())] = string(text)
			}
			for i := range others {
				if got[fmt.Sprint("x", i)] != `"x"` || got[fmt.Sprint("y", i)] != `["y"]` {
					t.Fatalf("row %d: %s, %s", i, got[fmt.Sprint("x", i)], got[fmt.Sprint("y", i)])
				}
				delete(got, fmt.Sprint("x", i))
				delete(got, fmt.Sprint("y", i))
			}
			want := map[string]string{"both": `"single"`, "gone": `["shown"]`, "many": `["first","second"]`}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// With few keys of many tags a scan goes through leaf lists too: without them it would
// look at all keys for each of the leaves, in one go.
func TestAScanOfFewKeysWithManyTags(t *testing.T) {
	s := newShard(0, new(arrivalClock), new(wallClock).now, nil)
	for i := range 2 * smallTable {
		key := []byte(fmt.Sprint("k", i%10))
		s.store(s.table(or, "m"), joinTag(key, fmt.Append(nil, i)), merkle.HashBytes(key), record("v", 1, 0), hlc.Timestamp{}, 1, "")
	}
	sc := new(scan)
	sc.begin(s, "m")
	if s.tables[or]["m"].bags.leaves == nil {
		t.Error("there are no leaf lists")
	}
	shown := 0
	for last := false; !last; {
		p := sc.step(scanBudget)
		last = p.last
		shown += len(p.values[1])
	}
	if shown != 2*smallTable {
		t.Errorf("%d values, want %d", shown, 2*smallTable)
	}
}

// A scan shows the map as it was at its beginning, whatever happens between its steps,
// and exactly once.
func TestAScanIsACut(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := &wallClock{}
		s := newShard(0, new(arrivalClock), w.now, nil)
		seed := rapid.Uint32().Draw(t, "seed")
		random := func(n uint32) uint32 {
			seed = seed*1664525 + 1013904223
			return seed >> 8 % n
		}
		stamp := uint64(0)
		change := func(keys uint32) {
			stamp++
			key := []byte(fmt.Sprint("k", random(keys)))
			hash := merkle.HashBytes(key)
			r := record(fmt.Sprint("v", stamp), stamp, 0)
			if random(4) == 0 {
				r.Value = nil
			}
			kind := lww
			if random(2) == 0 {
				kind, key = or, joinTag(key, fmt.Append(nil, "t", random(3)))
			}
			s.store(s.table(kind, "m"), key, hash, r, hlc.Timestamp{}, 1, "")
		}
		keys := rapid.SampledFrom([]uint32{1, 300, 3000, 3000}).Draw(t, "keys")
		budget := rapid.SampledFrom([]int{1, 300, scanBudget}).Draw(t, "budget")
		for range rapid.SampledFrom([]int{0, 10, 5000, 5000}).Draw(t, "before") {
			change(keys)
		}
		want := make(map[string]string)
		rowsOf := func(into map[string]string) func(string, []byte) bool {
			return func(key string, value []byte) bool {
				if _, again := into[key]; again {
					t.Fatalf("%q is shown twice", key)
				}
				into[key] = string(value)
				return true
			}
		}
		whole := new(scan)
		whole.begin(s, "m")
		for last := false; !last; {
			p := whole.step(scanBudget)
			last = p.last
			p.rows(rowsOf(want))
		}
		if n := visibleKeys(s); len(want) != n {
			t.Fatalf("%d rows without changes, want %d", len(want), n)
		}
		got := make(map[string]string)
		sc := new(scan)
		sc.begin(s, "m")
		for last := false; !last; {
			p := sc.step(budget)
			last = p.last
			p.rows(rowsOf(got))
			for range random(1 + uint32(2*budget)) {
				change(keys)
			}
			if table := s.tables[lww]["m"]; !last && table != nil && table.leaves != nil {
				if e := table.leaves[sc.next]; e != nil { // where the scan goes on
					s.store(table, []byte(e.key), e.hash, record("next", stamp, 0), hlc.Timestamp{}, 1, "")
				}
			}
		}
		if !maps.Equal(want, got) {
			t.Fatalf("%d rows, want %d, or others", len(got), len(want))
		}
		change(1) // whoever changes the table next finds the scans over
		for _, kind := range []typesv1.Kind{lww, or} {
			if table := s.tables[kind]["m"]; table != nil {
				if table.dropScans(); len(table.scans) != 0 {
					t.Fatal("a scan that is over is kept")
				}
			}
		}
	})
}

// visibleKeys counts the keys that hold something in either map.
func visibleKeys(s *shard) int {
	keys := make(map[string]bool)
	for _, kind := range []typesv1.Kind{lww, or} {
		if table := s.tables[kind]["m"]; table != nil {
			for _, e := range table.records {
				if key, _ := splitTag(e.key); len(e.value) > 0 {
					keys[key] = true
				}
			}
		}
	}
	return len(keys)
}

// A query is over when its caller gives up, and nothing of it stays behind.
func TestAQueryThatIsGivenUp(t *testing.T) {
	n := newWorld(t).start()
	for first := 0; first < 40_000; first += 1000 {
		n.fill(t, first, 1000)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := n.Query(ctx, &partitionv1.QueryRequest{Map: "m"}); err == nil {
		t.Error("a query without a caller was answered")
	}
	n.fill(t, 0, 1000)
	r, err := n.newReading(nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.each(t.Context(), func(_ int, s *shard) {
		if table := s.tables[lww]["m"]; len(table.scans) != 0 {
			t.Error("a scan stayed behind")
		}
	}); err != nil {
		t.Fatal(err)
	}
}
