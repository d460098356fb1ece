package fanout

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/topgun-sync/topgun/core/msgval"
	"github.com/topgun-sync/topgun/core/query"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/partition/v1/partitionv1connect"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
	"github.com/topgun-sync/topgun/services/internal/bus/membus"
)

// table is a partition node that owns all shards, and whose rows do not change.
type table struct {
	partitionv1connect.PartitionServiceClient
	shards uint32
	rows   []*partitionv1.Row // by key
}

func (t *table) all() (shards []uint32) {
	for n := range t.shards {
		shards = append(shards, n)
	}
	return shards
}

func (t *table) Describe(context.Context, *partitionv1.DescribeRequest) (*partitionv1.DescribeResponse, error) {
	return &partitionv1.DescribeResponse{ShardCount: t.shards, Shards: t.all()}, nil
}

func (t *table) Since(context.Context, *partitionv1.SinceRequest) (*partitionv1.SinceResponse, error) {
	return &partitionv1.SinceResponse{}, nil
}

func (t *table) Query(_ context.Context, req *partitionv1.QueryRequest) (*partitionv1.QueryResponse, error) {
	q, err := query.Parse(req.GetQuery(), nil)
	if err != nil {
		return nil, err
	}
	resp := &partitionv1.QueryResponse{}
	if len(req.GetQuery()) == 0 {
		first, _ := slices.BinarySearchFunc(t.rows, req.GetAfter(), func(r *partitionv1.Row, after []byte) int {
			if q.After(after, query.Row{Key: string(r.GetKey()), Value: r.GetValue()}) {
				return 1
			}
			return -1
		})
		last := min(first+int(req.GetLimit()), len(t.rows))
		resp.Rows, resp.More = t.rows[first:last], last < len(t.rows)
	} else {
		for _, r := range t.rows {
			if q.Match(string(r.GetKey()), r.GetValue()) {
				resp.Rows = append(resp.Rows, r)
			}
		}
	}
	for n := range t.shards {
		resp.Covered = append(resp.Covered, &partitionv1.ShardCovered{Shard: n, Covered: &typesv1.Arrival{Millis: 1}})
	}
	return resp, nil
}

func ownedValue(owner, n int) []byte {
	v := msgval.AppendMapHeader(nil, 3)
	v = msgval.AppendString(v, "owner")
	v = msgval.AppendString(v, fmt.Sprint("user-", owner))
	v = msgval.AppendString(v, "title")
	v = msgval.AppendString(v, "something to do before the end of the week")
	v = msgval.AppendString(v, "n")
	return msgval.AppendUint(v, uint64(n))
}

func ownedQuery(owner int) []byte {
	v := msgval.AppendMapHeader(nil, 1)
	v = msgval.AppendString(v, "where")
	v = msgval.AppendMapHeader(v, 1)
	v = msgval.AppendString(v, "owner")
	return msgval.AppendString(v, fmt.Sprint("user-", owner))
}

// owned is a service with one stream that shows queries for `owner = X`, and a table
// of rows, so many for each owner. It returns when all have their results.
func owned(b testing.TB, queries, rowsEach int) (s *Service, st *stream, m *liveMap, took time.Duration) {
	t := &table{shards: 16}
	for n := range queries * rowsEach {
		t.rows = append(t.rows, &partitionv1.Row{Key: fmt.Appendf(nil, "row-%09d", n), Value: ownedValue(n%queries, n)})
	}
	bus := membus.New()
	s, err := New(DefaultConfig(), Deps{Bus: bus, Partitions: []partitionv1connect.PartitionServiceClient{t}})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	b.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			b.Error(err)
		}
		if err := bus.Close(); err != nil {
			b.Error(err)
		}
	})
	for s.Ready() != nil {
		time.Sleep(time.Millisecond)
	}
	if st, err = s.open("g"); err != nil {
		b.Fatal(err)
	}
	req := &fanoutv1.WatchRequest{StreamId: st.id}
	for n := range queries {
		req.AddQueries = append(req.AddQueries, &fanoutv1.LiveQuery{Id: uint64(n + 1), Map: "m", Query: ownedQuery(n)})
	}
	began := time.Now()
	if err := s.watchQueries(req); err != nil {
		b.Fatal(err)
	}
	for range queries {
		_, due, err := st.next(ctx)
		if err != nil || due == nil {
			b.Fatal(err)
		}
		if r := s.result(due).GetQueryResult(); r.GetError() != "" || len(r.GetRows()) != rowsEach {
			b.Fatalf("%d rows, error %q", len(r.GetRows()), r.GetError())
		}
	}
	took = time.Since(began)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s, st, s.maps["m"].live, took
}

func heap() uint64 {
	var stats runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&stats)
	return stats.HeapAlloc
}

// One change of a row whose owner stays, against how many queries there are; every
// one is evaluated, delivered to the stream and taken out of its queue. B/query is
// with two rows, which are in it.
func BenchmarkChange(b *testing.B) {
	for _, queries := range []int{1, 1000, 100_000} {
		b.Run(fmt.Sprint(queries), func(b *testing.B) {
			before := heap()
			_, st, m, took := owned(b, queries, 2)
			bytes := float64(heap()-before) / float64(queries)
			var work work
			n := uint64(10_000_000)
			b.ReportAllocs()
			for b.Loop() {
				n++
				row := int(n) % (2 * queries)
				work.events = append(work.events[:0], sizedEvent{event: &fanoutv1.Event{Map: "m", Changes: []*typesv1.Change{{
					Map: "m", Key: fmt.Appendf(nil, "row-%09d", row), Record: &typesv1.Record{Value: ownedValue(row%queries, int(n))},
					Arrival: &typesv1.Arrival{Millis: n},
				}}}})
				m.handle(b.Context(), work)
				if message, _, err := st.pop(); err != nil || message == nil {
					b.Fatal("no change was delivered")
				}
			}
			b.ReportMetric(took.Seconds()*1e3, "ms-to-load")
			b.ReportMetric(bytes, "B/query")
		})
	}
}
