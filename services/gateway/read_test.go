package gateway

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/keyspace"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/query"
	"github.com/topgun-sync/topgun/core/wire"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

// twoOwners returns a router over two owners with n keys in map m, written through it.
func twoOwners(t *testing.T, n int) (*router, []wire.Op) {
	t.Helper()
	r := newTestRouter(t, nil, newOwner(func() []uint32 { return []uint32{0, 2} }), newOwner(func() []uint32 { return []uint32{1, 3} }))
	var ops []wire.Op
	for i := range n {
		ops = append(ops, put(fmt.Sprint(i), "m", fmt.Sprintf("key-%04d", i), "v", uint64(i+1)))
	}
	for i, result := range r.Apply(within(t, patience), "s", "", ops) {
		if result.status != opApplied {
			t.Fatalf("op %d: %+v", i, result)
		}
	}
	return r, ops
}

func TestLeavesAddUpOverOwners(t *testing.T) {
	r, ops := twoOwners(t, 300)
	for _, combine := range []merkle.Combine{merkle.Mixed, merkle.Plain} {
		var want merkle.Leaves
		for _, op := range ops {
			want.Add(merkle.Leaf(merkle.Hash(op.Key)), merkle.ItemHash(op.Key, op.Record.Timestamp), combine)
		}
		state, err := r.Leaves(within(t, patience), kindLWW, "m", combine)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := merkle.NewTree(&state.leaves, combine).Root(), merkle.NewTree(&want, combine).Root(); got != want {
			t.Errorf("combine %v: root %d, want %d", combine, got, want)
		}
		if state.records != 300 || state.covered.IsZero() || state.nowMillis < state.covered.Millis || state.covered.NodeID != "" {
			t.Errorf("state %d records, covered %v, now %d", state.records, state.covered, state.nowMillis)
		}
	}
}

func TestRecordsOfALeafRange(t *testing.T) {
	r, ops := twoOwners(t, 100)
	records, err := r.Records(within(t, patience), kindLWW, "m", 0, merkle.LeafCount-1)
	if err != nil || len(records) != len(ops) {
		t.Fatalf("%d records, %v", len(records), err)
	}
	leaf := merkle.Leaf(merkle.Hash(ops[0].Key))
	records, err = r.Records(within(t, patience), kindLWW, "m", leaf, leaf)
	if err != nil || !slices.ContainsFunc(records, func(k keyed) bool { return k.Key == ops[0].Key }) {
		t.Errorf("leaf %d: %v, %v", leaf, records, err)
	}
}

func TestSinceOverOwners(t *testing.T) {
	r, ops := twoOwners(t, 500)
	seen := map[string]int{}
	var after hlc.Timestamp
	for pages := 0; ; pages++ {
		p, err := r.Since(within(t, patience), kindLWW, "m", after, 70, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		if p.covered.Compare(after) <= 0 || pages > 20 {
			t.Fatalf("page %d: the cursor went from %v to %v", pages, after, p.covered)
		}
		for _, record := range p.records {
			seen[record.Key]++
		}
		after = p.covered
		if !p.more {
			break
		}
	}
	for _, op := range ops {
		if seen[op.Key] != 1 {
			t.Errorf("key %s came %d times", op.Key, seen[op.Key])
		}
	}
}

// TestMergePagesNeitherSkipsNorRepeats models owners whose arrivals may be equal, at
// random page sizes, with changes that arrive between the pages (SYN-01).
func TestMergePagesNeitherSkipsNorRepeats(t *testing.T) {
	for seed := range uint64(300) {
		random := rand.New(rand.NewPCG(seed, 1))
		owners := make([][]*typesv1.Change, 1+random.IntN(4))
		clocks := make([]uint64, len(owners))
		total := 0
		write := func() {
			o := random.IntN(len(owners))
			clocks[o] += 1 + random.Uint64N(3)
			total++
			owners[o] = append(owners[o], &typesv1.Change{
				Key: fmt.Appendf(nil, "%d", total), Arrival: &typesv1.Arrival{Millis: clocks[o]},
				Record: &typesv1.Record{Value: make([]byte, random.IntN(50)), Timestamp: &typesv1.Timestamp{}},
			})
		}
		for range random.IntN(60) {
			write()
		}
		seen := map[string]int{}
		var after hlc.Timestamp
		for more, pages := true, 0; more; pages++ {
			if pages > 1000 {
				t.Fatalf("seed %d: no end", seed)
			}
			limit, maxBytes := 1+random.IntN(10), 1+random.IntN(200)
			var answers []*partitionv1.SinceResponse
			for o, changes := range owners {
				answers = append(answers, sinceModel(changes, after.Millis, clocks[o], limit, maxBytes))
			}
			p := mergePages(answers, limit, maxBytes)
			if len(p.records) > max(limit, len(owners)) {
				t.Fatalf("seed %d: %d records on a page of %d", seed, len(p.records), limit)
			}
			if p.covered.Compare(after) < 0 {
				t.Fatalf("seed %d: the cursor went back from %v to %v", seed, after, p.covered)
			}
			for _, record := range p.records {
				seen[record.Key]++
			}
			after, more = p.covered, p.more
			for o := range clocks { // idle owners' clocks go on as well
				if random.IntN(2) == 0 {
					clocks[o] = slices.Max(clocks)
				}
			}
			if random.IntN(3) == 0 && total < 200 {
				write()
				more = true
			}
			if !more { // the clocks move on, so that the slowest owner's rest is covered
				for o := range clocks {
					clocks[o] = slices.Max(clocks)
				}
				more = after.Millis < slices.Max(clocks)
			}
		}
		for key := 1; key <= total; key++ {
			if n := seen[fmt.Sprint(key)]; n != 1 {
				t.Fatalf("seed %d: change %d of %d came %d times", seed, key, total, n)
			}
		}
	}
}

// sinceModel is what an owner answers, written from the comments of its API.
func sinceModel(changes []*typesv1.Change, after, clock uint64, limit, maxBytes int) *partitionv1.SinceResponse {
	response := &partitionv1.SinceResponse{Covered: &typesv1.Arrival{Millis: clock}}
	size := 0
	for _, c := range changes {
		if c.Arrival.Millis <= after {
			continue
		}
		size += len(c.Key) + len(c.Record.Value)
		if n := len(response.Changes); n == limit || (n > 0 && size > maxBytes) {
			response.Covered, response.More = response.Changes[n-1].Arrival, true
			break
		}
		response.Changes = append(response.Changes, c)
	}
	return response
}

func TestQueryMergesByKey(t *testing.T) {
	r, ops := twoOwners(t, 250)
	q, err := query.Parse(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	var keys []string
	var after []byte
	for more := true; more; {
		var rows []query.Row
		rows, more, err = r.Query(within(t, patience), "m", q, after, 40, 1<<20)
		if err != nil || len(rows) == 0 || len(rows) > 40 {
			t.Fatalf("%d rows, %v", len(rows), err)
		}
		for _, row := range rows {
			keys = append(keys, row.Key)
		}
		after = q.Position(rows[len(rows)-1])
	}
	if len(keys) != len(ops) || !slices.IsSorted(keys) {
		t.Errorf("%d keys, sorted %v", len(keys), slices.IsSorted(keys))
	}
}

// TestQueryOwnerCutShort: an owner that returns fewer rows than asked for, and has
// more, hides no key of its own behind a later one of another owner.
func TestQueryOwnerCutShort(t *testing.T) {
	row := func(key string) *partitionv1.Row { return &partitionv1.Row{Key: []byte(key)} }
	q, err := query.Parse(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	rows, more := mergeRows(q, []*partitionv1.QueryResponse{
		{Rows: []*partitionv1.Row{row("a"), row("b")}, More: true}, // c comes later
		{Rows: []*partitionv1.Row{row("a2"), row("d")}},
	}, 10, 0)
	var keys []string
	for _, r := range rows {
		keys = append(keys, r.Key)
	}
	if strings.Join(keys, " ") != "a a2 b" || !more {
		t.Errorf("keys %v, more %v", keys, more)
	}
}

func TestReadsRetryUntilTheCallerGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOwner(nil)
		var answer error
		o.before = func(_ context.Context, method string) error {
			if method == "Describe" {
				return nil
			}
			return answer
		}
		r := newTestRouter(t, nil, o)
		answer = connect.NewError(connect.CodeUnavailable, "loading")
		begin := time.Now()
		if _, err := r.Since(within(t, 3*time.Second), kindLWW, "m", hlc.Timestamp{}, 1, 1); !errors.Is(err, errUnavailable) || time.Since(begin) != 3*time.Second {
			t.Errorf("%v after %v", err, time.Since(begin))
		}
		if n := o.called("Since"); n < 4 || n > 20 {
			t.Errorf("%d calls in 3 s", n)
		}
		answer = connect.NewError(connect.CodeInvalidArgument, "no")
		begin = time.Now()
		if _, err := r.Records(within(t, 3*time.Second), kindLWW, "m", 0, 1); err == nil || errors.Is(err, errUnavailable) || time.Since(begin) != 0 {
			t.Errorf("a wrong request: %v after %v", err, time.Since(begin))
		}
	})
}

// TestReadsNameTheirShards: an owner is asked for its shards by number, so that a
// shard that moves during a read is neither missed nor read twice.
func TestReadsNameTheirShards(t *testing.T) {
	r, _ := twoOwners(t, 10)
	table, err := r.owners(t.Context())
	if err != nil || !table.whole || table.history != "history-1" || table.level != "APPLIED" {
		t.Fatalf("%+v, %v", table, err)
	}
	if fmt.Sprint(table.shards) != "[[0 2] [1 3]]" {
		t.Errorf("shards %v", table.shards)
	}
	if keyspace.ShardOf("key-0001", 4) >= 4 {
		t.Error("shard out of range")
	}
}
