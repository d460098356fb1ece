package query_test

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/topgun-sync/topgun/core/query"
)

func benchRows(n int) []query.Row {
	r := rand.New(rand.NewPCG(1, 2))
	rows := make([]query.Row, n)
	for i := range rows {
		rows[i] = query.Row{Key: fmt.Sprintf("key-%06d", i), Value: mapOf("title", "a row of the bench", "owner", fmt.Sprintf("user-%d", i%100), "done", i%2, "rank", r.IntN(1_000_000), "city", "Berlin")}
	}
	return rows
}

func BenchmarkMatch(b *testing.B) {
	row := benchRows(1)[0]
	for _, c := range []struct{ name, query string }{
		{"where", `{"where":{"owner":"user-0"}}`},
		{"where-not", `{"where":{"owner":"user-1"}}`},
		{"and-4", `{"predicate":{"op":"and","children":[{"op":"eq","attribute":"owner","value":"user-0"},{"op":"gte","attribute":"rank","value":0},{"op":"lt","attribute":"rank","value":1000000},{"op":"isNotNull","attribute":"city"}]}}`},
		{"like", `{"predicate":{"op":"like","attribute":"title","value":"%row%"}}`},
		{"contains", `{"predicate":{"op":"contains","attribute":"title","value":"row"}}`},
		{"regex", `{"predicate":{"op":"regex","attribute":"title","value":"r[aeiou]w"}}`},
	} {
		q := parse(b, c.query)
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				q.Match(row.Key, row.Value)
			}
		})
	}
}

func BenchmarkCompare(b *testing.B) {
	q, rows := parse(b, `{"sort":{"rank":"desc","owner":"asc"}}`), benchRows(2)
	b.ReportAllocs()
	for b.Loop() {
		q.Compare(rows[0], rows[1])
	}
}

func BenchmarkEqualityValue(b *testing.B) {
	row := benchRows(1)[0]
	b.ReportAllocs()
	for b.Loop() {
		query.EqualityValue(row.Value, "owner")
	}
}

// One operation is one row of a scan.
func BenchmarkTop(b *testing.B) {
	q, rows := parse(b, `{"sort":{"rank":"desc"}}`), benchRows(100_000)
	b.ReportAllocs()
	i, top := 0, query.NewTop(q, nil, 100, 0)
	for b.Loop() {
		if i++; i == len(rows) {
			i, top = 0, query.NewTop(q, nil, 100, 0)
		}
		top.Add(rows[i].Key, rows[i].Value)
	}
}

// One operation is one changed row of a map.
func BenchmarkLiveApply(b *testing.B) {
	rows := benchRows(20_000)
	for _, c := range []struct{ name, query string }{
		{"top-100", `{"sort":{"rank":"desc"},"limit":100}`},
		{"all-8750", `{"sort":{"rank":"desc"}}`},
		{"where", `{"where":{"owner":"user-1"}}`},
		{"groups", `{"where":{"done":1},"groupBy":["owner"],"aggregations":[{"func":"sum","field":"rank"},{"func":"max","field":"rank"}]}`},
	} {
		q := parse(b, c.query)
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			live := query.NewLive(q, "m", 10_000)
			for i := 0; i < len(rows); i += 2 {
				live.Apply(rows[i].Key, rows[i].Value)
			}
			r := rand.New(rand.NewPCG(3, 4))
			for b.Loop() {
				i := r.IntN(len(rows))
				live.Apply(rows[i].Key, rows[r.IntN(len(rows))].Value)
			}
		})
	}
}
