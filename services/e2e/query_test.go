package e2e

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/topgun-sync/topgun/client"
	"github.com/topgun-sync/topgun/core/wire"
)

// encode is a value as msgpack.
func encode(value any) []byte {
	raw, err := client.EncodeValue(value)
	if err != nil {
		panic(err)
	}
	return raw
}

// write sends ops on a connection of their own and waits until they are acknowledged.
func write(t testing.TB, c Cluster, i int, ops ...wire.Op) {
	t.Helper()
	for n := range ops {
		ops[n].ID = fmt.Sprint(n + 1)
	}
	conn := dial(t, c, i).hello()
	conn.send(&wire.OpBatch{Ops: ops})
	ack := expect[*wire.OpAck](conn)
	for _, r := range ack.Results {
		if !r.Success {
			t.Fatalf("op %s: %s", r.OpID, r.Error)
		}
	}
	if len(ops) > 0 && ack.LastID != fmt.Sprint(len(ops)) {
		t.Fatalf("lastId %s; want %d", ack.LastID, len(ops))
	}
}

// window is what a client shows of a live query: the last QUERY_RESP and the
// QUERY_UPDATEs since, as the original client applies them.
func (l *listener) window(queryID string) map[string]string {
	l.mu.Lock()
	defer l.mu.Unlock()
	rows := map[string]string{}
	for _, msg := range l.seen {
		switch m := msg.(type) {
		case *wire.QueryResp:
			if m.QueryID == queryID {
				clear(rows)
				for _, r := range m.Results {
					rows[r.Key] = string(r.Value)
				}
			}
		case *wire.QueryUpdate:
			switch {
			case m.QueryID != queryID:
			case m.ChangeType == "LEAVE":
				delete(rows, m.Key)
			default:
				rows[m.Key] = string(m.Value)
			}
		}
	}
	return rows
}

func (l *listener) wantWindow(queryID string, want map[string]any) {
	l.t.Helper()
	eventually(l.t, deadline, func() error {
		got := l.window(queryID)
		if len(got) != len(want) {
			return fmt.Errorf("query %s shows %d rows; want %d", queryID, len(got), len(want))
		}
		for key, value := range want {
			if got[key] != string(encode(value)) {
				return fmt.Errorf("query %s: row %s is % x; want %v", queryID, key, got[key], value)
			}
		}
		return nil
	})
}

type item struct {
	key   string
	owner string
	n     int
}

func (i item) value() map[string]any { return map[string]any{"owner": i.owner, "n": i.n} }

// A window of the three highest of one owner is exact after every write, for the
// writer too, at every gateway (PROTOCOL 12.3).
func liveQueries(t *testing.T, c Cluster) {
	const name = "live_queries"
	base := now()
	var counter uint64
	writer, reader := dial(t, c, 0).hello(), dial(t, c, 1).hello()
	wl, rl := writer.listen(), reader.listen()
	q := encode(map[string]any{
		"where": map[string]any{"owner": "x"},
		"sort":  []any{map[string]any{"field": "n", "direction": "desc"}},
		"limit": 3,
	})
	writer.send(&wire.QuerySub{QueryID: "w", MapName: name, Query: q})
	reader.send(&wire.QuerySub{QueryID: "r", MapName: name, Query: q})
	all := encode(map[string]any{"predicate": map[string]any{"op": "gte", "attribute": "n", "value": 0}, "fields": []any{"n"}})
	reader.send(&wire.QuerySub{QueryID: "all", MapName: name, Query: all})
	await(t, rl, func(m *wire.QueryResp) bool { return m.QueryID == "all" })

	items := map[string]item{}
	apply := func(it item, remove bool) {
		counter++
		op := put(fmt.Sprint(counter), name, it.key, it.value(), stamp(base, counter, name))
		items[it.key] = it
		if remove {
			op = wire.Op{ID: op.ID, MapName: name, Key: it.key, Kind: wire.OpRemove}
			op.Record.Timestamp = stamp(base, counter, name)
			delete(items, it.key)
		}
		writer.send(&wire.OpBatch{Ops: []wire.Op{op}})
	}
	check := func() {
		t.Helper()
		top, every := map[string]any{}, map[string]any{}
		var mine []item
		for _, it := range items {
			every[it.key] = map[string]any{"n": it.n}
			if it.owner == "x" {
				mine = append(mine, it)
			}
		}
		slices.SortFunc(mine, func(a, b item) int { return cmp.Or(b.n-a.n, cmp.Compare(a.key, b.key)) })
		for _, it := range mine[:min(3, len(mine))] {
			top[it.key] = it.value()
		}
		rl.wantWindow("r", top)
		wl.wantWindow("w", top)
		rl.wantWindow("all", every)
	}
	for i := range 8 {
		apply(item{fmt.Sprint("k", i), []string{"x", "y"}[i%2], i}, false)
	}
	check()
	apply(item{"k6", "x", 6}, true) // leaves: the next one enters
	check()
	apply(item{"k4", "y", 4}, false) // changes its owner
	check()
	apply(item{"k1", "x", 100}, false)
	check()
	apply(item{"k1", "x", 1}, false) // from the top to the end
	check()
	for i := range 5 {
		apply(item{fmt.Sprint("k", i), "x", i}, true)
	}
	check()

	// One more of the same query, at the other gateway's session, gets the state.
	late := dial(t, c, 1).hello()
	ll := late.listen()
	apply(item{"z", "x", 7}, false)
	check()
	late.send(&wire.QuerySub{QueryID: "late", MapName: name, Query: q})
	ll.wantWindow("late", map[string]any{"z": item{"z", "x", 7}.value()})
	reader.send(&wire.QueryUnsub{QueryID: "r"})
	reader.send(wire.PingAt(now()))
	await(t, rl, func(*wire.Pong) bool { return true })
	before := len(received[*wire.QueryUpdate](rl))
	apply(item{"y", "x", 9}, false)
	ll.wantWindow("late", map[string]any{"z": item{"z", "x", 7}.value(), "y": item{"y", "x", 9}.value()})
	rl.wantWindow("all", map[string]any{"z": map[string]any{"n": 7}, "y": map[string]any{"n": 9}, "k5": map[string]any{"n": 5}, "k7": map[string]any{"n": 7}})
	for _, m := range received[*wire.QueryUpdate](rl)[before:] {
		if m.QueryID == "r" {
			t.Error("an update came for a query that was given up")
		}
	}
}

// Pages of a query follow each other although rows come and go in between.
func pagesOfAQuery(t *testing.T, c Cluster) {
	const name = "query_pages"
	ops := make([]wire.Op, 0, 50)
	base := now()
	for i := range 50 {
		ops = append(ops, put("", name, fmt.Sprintf("k%02d", i), map[string]any{"n": i}, stamp(base, uint64(i), name)))
	}
	write(t, c, 0, ops...)
	conn := dial(t, c, 1).hello()
	page := func(id, cursor string) *wire.QueryResp {
		q := map[string]any{"sort": []any{map[string]any{"field": "n", "direction": "asc"}}, "limit": 20}
		if cursor != "" {
			q["cursor"] = cursor
		}
		conn.send(&wire.QuerySub{QueryID: id, MapName: name, Query: encode(q)})
		for {
			if m := expect[*wire.QueryResp](conn); m.QueryID == id {
				conn.send(&wire.QueryUnsub{QueryID: id})
				return m
			}
		}
	}
	first := page("1", "")
	if len(first.Results) != 20 || !first.HasMore || first.NextCursor == "" {
		t.Fatalf("first page: %d rows, more %v", len(first.Results), first.HasMore)
	}
	// The row at the boundary goes, and one comes before it.
	gone := wire.Op{MapName: name, Key: "k19", Kind: wire.OpRemove}
	gone.Record.Timestamp = stamp(base, 100, name)
	write(t, c, 0, gone, put("", name, "early", map[string]any{"n": -1}, stamp(base, 101, name)))
	second := page("2", first.NextCursor)
	third := page("3", second.NextCursor)
	if len(second.Results) != 20 || second.Results[0].Key != "k20" || second.CursorStatus != "valid" {
		t.Errorf("second page: %d rows from %s, cursor %s", len(second.Results), second.Results[0].Key, second.CursorStatus)
	}
	if len(third.Results) != 10 || third.HasMore {
		t.Errorf("third page: %d rows, more %v", len(third.Results), third.HasMore)
	}
	if bad := page("4", "bm90IGEgY3Vyc29y"); bad.CursorStatus != "invalid" || bad.Results[0].Key != "early" {
		t.Errorf("a bad cursor: status %s; want invalid, and the first page", bad.CursorStatus)
	}
}

// Groups with aggregates, over WebSocket and over HTTP alike.
func groupsOfAQuery(t *testing.T, c Cluster) {
	const name = "query_groups"
	base := now()
	write(t, c, 0,
		put("", name, "a", map[string]any{"kind": "fruit", "price": 2}, stamp(base, 0, name)),
		put("", name, "b", map[string]any{"kind": "fruit", "price": 3.5}, stamp(base, 1, name)),
		put("", name, "c", map[string]any{"kind": "nut", "price": 7}, stamp(base, 2, name)))
	q := map[string]any{
		"groupBy":      []any{"kind"},
		"aggregations": []any{map[string]any{"func": "sum", "field": "price"}, map[string]any{"func": "max", "field": "price"}},
	}
	want := map[string]map[string]any{
		"fruit": {"kind": "fruit", "__count": int64(2), "__sum_price": 5.5, "__max_price": 3.5},
		"nut":   {"kind": "nut", "__count": int64(1), "__sum_price": int64(7), "__max_price": int64(7)},
	}
	check := func(where string, rows []wire.KeyValue) {
		t.Helper()
		if len(rows) != len(want) {
			t.Fatalf("%s: %d groups; want %d", where, len(rows), len(want))
		}
		for _, row := range rows {
			decoded, err := client.DecodeValue(row.Value)
			must(t, err)
			group := decoded.(map[string]any)
			for field, value := range want[group["kind"].(string)] {
				if fmt.Sprint(group[field]) != fmt.Sprint(value) {
					t.Errorf("%s: %v: %s is %v; want %v", where, group["kind"], field, group[field], value)
				}
			}
		}
	}
	conn := dial(t, c, 1).hello()
	l := conn.listen()
	conn.send(&wire.QuerySub{QueryID: "g", MapName: name, Query: encode(q)})
	check("live", await(t, l, func(m *wire.QueryResp) bool { return m.QueryID == "g" }).Results)
	resp := postSync(t, gateway(c, 0), &wire.SyncRequest{Queries: []wire.HTTPQuery{{QueryID: "g", MapName: name, Query: encode(q)}}})
	check("HTTP", resp.QueryResults[0].Results)

	write(t, c, 0, put("", name, "d", map[string]any{"kind": "nut", "price": 1}, stamp(base, 3, name)))
	want["nut"] = map[string]any{"kind": "nut", "__count": int64(2), "__sum_price": int64(8), "__max_price": int64(7)}
	eventually(t, deadline, func() error {
		for _, value := range l.window("g") {
			decoded, err := client.DecodeValue([]byte(value))
			must(t, err)
			if g := decoded.(map[string]any); g["kind"] == "nut" && fmt.Sprint(g["__sum_price"]) == "8" {
				return nil
			}
		}
		return errors.New("the group has not changed")
	})
}

// A query that cannot be evaluated is answered at once, with the reason.
func badQueries(t *testing.T, c Cluster) {
	const name = "bad_queries"
	conn := dial(t, c, 0).hello()
	l := conn.listen()
	deep := map[string]any{"op": "eq", "attribute": "a", "value": 1}
	for range 50 {
		deep = map[string]any{"op": "not", "children": []any{deep}}
	}
	for id, q := range map[string]any{
		"operator": map[string]any{"predicate": map[string]any{"op": "sounds-like", "attribute": "a", "value": 1}},
		"regex":    map[string]any{"predicate": map[string]any{"op": "regex", "attribute": "a", "value": "(?=x)"}},
		"deep":     map[string]any{"predicate": deep},
		"match":    map[string]any{"predicate": map[string]any{"op": "match", "attribute": "a", "query": "x"}},
	} {
		conn.send(&wire.QuerySub{QueryID: id, MapName: name, Query: encode(q)})
		m := await(t, l, func(m *wire.QueryResp) bool { return m.QueryID == id })
		if m.Error == "" || m.Code == "" || len(m.Results) != 0 {
			t.Errorf("%s: error %q, code %q, %d rows", id, m.Error, m.Code, len(m.Results))
		}
	}
}
