package gateway

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/msgval"
	"github.com/topgun-sync/topgun/core/query"
	"github.com/topgun-sync/topgun/core/wire"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
)

func stampNow(node string) hlc.Timestamp {
	return hlc.Timestamp{Millis: uint64(time.Now().UnixMilli()), NodeID: node}
}

func keysOf(d wire.Delta) (keys []string) {
	for _, r := range d.Records {
		keys = append(keys, r.Key)
	}
	slices.Sort(keys)
	return keys
}

func TestSyncAppliesThenAnswers(t *testing.T) {
	g := startGateway(t, nil, nil)
	request := &wire.SyncRequest{
		ClientID: "c", ClientHLC: hlc.Timestamp{Millis: 1 << 52, NodeID: "liar"},
		Operations: []wire.Op{put("1", "m", "a", "1", 10), put("2", "m", "b", "2", 11)},
		SyncMaps:   []wire.SyncMap{{MapName: "m"}},
		Queries:    []wire.HTTPQuery{{QueryID: "q", MapName: "m"}},
	}
	request.Operations[1].Kind, request.Operations[1].Record.Value = wire.OpRemove, nil
	response := g.sync(request)
	if response.Ack == nil || response.Ack.LastID != "2" || response.Ack.Results != nil {
		t.Errorf("ack %+v", response.Ack)
	}
	if len(response.Deltas) != 1 || fmt.Sprint(keysOf(response.Deltas[0])) != "[a b]" || response.Deltas[0].HasMore {
		t.Fatalf("deltas %+v", response.Deltas)
	}
	for _, r := range response.Deltas[0].Records {
		if want := map[string]wire.OpKind{"a": wire.OpPut, "b": wire.OpRemove}[r.Key]; r.EventType != want || r.Record.Deleted() != (want == wire.OpRemove) {
			t.Errorf("%s: %v, %+v", r.Key, r.EventType, r.Record)
		}
	}
	cursor := response.Deltas[0].ServerSyncTimestamp
	if cursor.NodeID != "history-1" || cursor.Millis == 0 {
		t.Errorf("cursor %v", cursor)
	}
	if len(response.QueryResults) != 1 || len(response.QueryResults[0].Results) != 1 || response.QueryResults[0].Results[0].Key != "a" {
		t.Errorf("query %+v", response.QueryResults)
	}
	if response.ServerHLC.Millis > uint64(time.Now().Add(time.Minute).UnixMilli()) {
		t.Error("the client's clock moved the server's (CLK-02)")
	}
	// The cursor has seen everything.
	if again := g.sync(&wire.SyncRequest{SyncMaps: []wire.SyncMap{{MapName: "m", LastSync: cursor}}}); len(again.Deltas) != 1 || len(again.Deltas[0].Records) != 0 {
		t.Errorf("asked again: %+v", again.Deltas)
	}
}

// TestSyncCursorIsByArrival: story c. A record with an old client stamp that arrives
// after the cursor was handed out is delivered (SYN-01).
func TestSyncCursorIsByArrival(t *testing.T) {
	g := startGateway(t, nil, nil)
	g.sync(&wire.SyncRequest{Operations: []wire.Op{put("1", "m", "new", "x", uint64(time.Now().UnixMilli()))}})
	cursor := g.sync(&wire.SyncRequest{SyncMaps: []wire.SyncMap{{MapName: "m"}}}).Deltas[0].ServerSyncTimestamp
	g.sync(&wire.SyncRequest{Operations: []wire.Op{put("2", "m", "late", "x", 5)}}) // written in 1970, arrives now
	response := g.sync(&wire.SyncRequest{SyncMaps: []wire.SyncMap{{MapName: "m", LastSync: cursor}}})
	if got := fmt.Sprint(keysOf(response.Deltas[0])); got != "[late]" {
		t.Errorf("delivered %s, want [late]", got)
	}
}

// TestSyncCursorOfAnotherHistory: positions of a log that is gone mean nothing, so
// everything is delivered.
func TestSyncCursorOfAnotherHistory(t *testing.T) {
	g := startGateway(t, nil, nil)
	g.sync(&wire.SyncRequest{Operations: []wire.Op{put("1", "m", "a", "x", 5)}})
	for _, cursor := range []hlc.Timestamp{
		{}, {Millis: 1 << 50, Counter: 9, NodeID: "another-history"}, {Millis: 1 << 50, NodeID: "history-12"},
	} {
		response := g.sync(&wire.SyncRequest{SyncMaps: []wire.SyncMap{{MapName: "m", LastSync: cursor}}})
		if got := fmt.Sprint(keysOf(response.Deltas[0])); got != "[a]" {
			t.Errorf("cursor %v delivered %s", cursor, got)
		}
	}
}

// TestSyncHistoryChangesUnderTheRead: the log was replaced between what the gateway
// knew and the read; the cursor must not name the old history.
func TestSyncHistoryChangesUnderTheRead(t *testing.T) {
	g := startGateway(t, nil, nil)
	g.sync(&wire.SyncRequest{Operations: []wire.Op{put("1", "m", "a", "x", 5)}})
	cursor := g.sync(&wire.SyncRequest{SyncMaps: []wire.SyncMap{{MapName: "m"}}}).Deltas[0].ServerSyncTimestamp
	if _, err := g.service.router.learn(t.Context()); err != nil {
		t.Fatal(err)
	}
	g.partition.mu.Lock()
	g.partition.history = "history-2"
	g.partition.mu.Unlock()
	response := g.sync(&wire.SyncRequest{SyncMaps: []wire.SyncMap{{MapName: "m", LastSync: cursor}}})
	if d := response.Deltas[0]; d.ServerSyncTimestamp.NodeID != "history-2" || fmt.Sprint(keysOf(d)) != "[a]" {
		t.Errorf("cursor %v, records %v", d.ServerSyncTimestamp, keysOf(d))
	}
}

// TestSyncPages: more records than one response holds come with a cursor that moves,
// each once, with writes between the pages.
func TestSyncPages(t *testing.T) {
	g := startGateway(t, nil, nil)
	stamp := stampNow("w")
	const total = 2500
	for i := range total {
		g.partition.put("m", fmt.Sprintf("k%04d", i), text("v"), stamp)
	}
	seen := map[string]int{}
	var cursor hlc.Timestamp
	pages := 0
	for more := true; more; pages++ {
		d := g.sync(&wire.SyncRequest{SyncMaps: []wire.SyncMap{{MapName: "m", LastSync: cursor}}}).Deltas[0]
		if len(d.Records) > maxDeltaRecords || d.ServerSyncTimestamp.Compare(cursor) <= 0 {
			t.Fatalf("page %d: %d records, cursor %v after %v", pages, len(d.Records), d.ServerSyncTimestamp, cursor)
		}
		for _, r := range d.Records {
			seen[r.Key]++
		}
		if pages == 1 {
			g.partition.put("m", "between", text("v"), hlc.Timestamp{Millis: 1, NodeID: "old"})
		}
		cursor, more = d.ServerSyncTimestamp, d.HasMore
	}
	if pages != 3 || len(seen) != total+1 {
		t.Errorf("%d pages, %d keys", pages, len(seen))
	}
	for key, n := range seen {
		if n != 1 {
			t.Errorf("%s came %d times", key, n)
		}
	}
}

func TestSyncBoundsTheResponse(t *testing.T) {
	g := startGateway(t, nil, nil)
	big := append([]byte{0xc6, 0, 1, 0, 0}, make([]byte, 64<<10)...)
	var maps []wire.SyncMap
	for m := range 6 {
		name := fmt.Sprintf("m%d", m)
		maps = append(maps, wire.SyncMap{MapName: name})
		for k := range 40 { // 2.5 MiB
			g.partition.put(name, fmt.Sprint(k), big, stampNow("w"))
		}
	}
	got := map[string]int{}
	for round := 0; round < 30; round++ {
		status, _, body := g.exchange(http.MethodPost, "/sync", msgpack, (&wire.SyncRequest{SyncMaps: maps}).AppendTo(nil))
		if status != 200 || len(body) > maxResponseBytes+maxResponseBytes/4 {
			t.Fatalf("status %d, %d bytes", status, len(body))
		}
		response, err := wire.DecodeSyncResponse(body)
		if err != nil || len(response.Deltas) != 6 {
			t.Fatalf("%d deltas, %v", len(response.Deltas), err)
		}
		more := false
		for i, d := range response.Deltas {
			got[d.MapName] += len(d.Records)
			maps[i].LastSync = d.ServerSyncTimestamp
			more = more || d.HasMore
		}
		if !more {
			break
		}
	}
	for name, n := range got {
		if n != 40 {
			t.Errorf("%s: %d records", name, n)
		}
	}
}

// TestSyncDeliversWinners: CLK-05, over HTTP.
func TestSyncDeliversWinners(t *testing.T) {
	g := startGateway(t, nil, nil)
	g.partition.put("synced", "k", text("winner"), hlc.Timestamp{Millis: 100, NodeID: "other"})
	g.partition.put("unsynced", "k", text("winner"), hlc.Timestamp{Millis: 100, NodeID: "other"})
	cursor := g.sync(&wire.SyncRequest{SyncMaps: []wire.SyncMap{{MapName: "synced"}}}).Deltas[0].ServerSyncTimestamp
	future := uint64(time.Now().Add(time.Hour).UnixMilli())
	response := g.sync(&wire.SyncRequest{
		Operations: []wire.Op{put("1", "synced", "k", "loser", 50), put("2", "unsynced", "k", "loser", 50), put("3", "unsynced", "f", "fast clock", future)},
		SyncMaps:   []wire.SyncMap{{MapName: "synced", LastSync: cursor}},
	})
	if response.Ack == nil || response.Ack.LastID != "3" {
		t.Errorf("ack %+v", response.Ack)
	}
	if len(response.Deltas) != 2 {
		t.Fatalf("deltas %+v", response.Deltas)
	}
	synced, unsynced := response.Deltas[0], response.Deltas[1]
	if synced.MapName != "synced" || fmt.Sprint(keysOf(synced)) != "[k]" || string(synced.Records[0].Record.Value) != string(text("winner")) || synced.ServerSyncTimestamp.Compare(cursor) <= 0 {
		t.Errorf("synced map: %+v", synced)
	}
	if unsynced.MapName != "unsynced" || fmt.Sprint(keysOf(unsynced)) != "[f k]" {
		t.Errorf("other map: %+v", unsynced)
	}
	// A cursor that a client gets for a map it does not sync skips nothing.
	if !unsynced.ServerSyncTimestamp.IsZero() {
		t.Errorf("cursor %v", unsynced.ServerSyncTimestamp)
	}
	for _, r := range unsynced.Records {
		if r.Key == "f" && r.Record.Timestamp.Millis == future {
			t.Error("the stored record still has the future stamp")
		}
	}
}

func TestSyncRepeats(t *testing.T) {
	var arrived atomic.Int64
	g := startGateway(t, func(c *Config) { c.MaxOps = 10 }, func(p *fakePartition) {
		p.reject = func(*partitionv1.Op) string { arrived.Add(1); return "" }
	})
	var ops []wire.Op
	for range 30 { // the original client sends all pending ops with every write
		for i := range 10 {
			ops = append(ops, put(fmt.Sprint(i+1), "m", fmt.Sprint(i), "v", uint64(i+1)))
		}
	}
	response := g.sync(&wire.SyncRequest{Operations: ops})
	if response.Ack == nil || response.Ack.LastID != "10" || arrived.Load() != 10 {
		t.Errorf("ack %+v, and %d ops travelled", response.Ack, arrived.Load())
	}
	// The same id with other content is another op.
	other := put("1", "m", "0", "w", 50)
	if got := len(distinctOps([]wire.Op{ops[0], ops[0], other, ops[0], other})); got != 2 {
		t.Errorf("%d distinct ops, want 2", got)
	}
	reused := ops[0]
	reused.Record.Value = text("other value, same stamp")
	if got := len(distinctOps([]wire.Op{ops[0], reused})); got != 2 {
		t.Errorf("a reused stamp was dropped in silence")
	}
	// One more distinct op than allowed: none is applied.
	status, _, body := g.exchange(http.MethodPost, "/sync", msgpack, (&wire.SyncRequest{Operations: append(ops[:10:10], put("11", "m", "new", "v", 1))}).AppendTo(nil))
	if status != http.StatusRequestEntityTooLarge || !strings.Contains(string(body), "TOO_MANY_OPS") || g.partition.record("m", "new") != nil {
		t.Errorf("%d %s", status, body)
	}
}

func TestSyncRejectedOpIsCovered(t *testing.T) {
	g := startGateway(t, nil, func(p *fakePartition) {
		p.reject = func(op *partitionv1.Op) string {
			if string(op.Key) == "bad" {
				return "STAMP_REUSED: another value has this stamp"
			}
			return ""
		}
	})
	reserved := put("3", "m", "__proto__", "v", 1)
	response := g.sync(&wire.SyncRequest{Operations: []wire.Op{
		put("1", "m", "a", "v", 1), put("2", "m", "bad", "v", 1), reserved, put("4", "m", "b", "v", 1), put("x", "m", "c", "v", 1),
	}})
	if response.Ack == nil || response.Ack.LastID != "4" || len(response.Ack.Results) != 3 {
		t.Fatalf("ack %+v", response.Ack)
	}
	for i, want := range []wire.OpResult{
		{OpID: "2", Error: "STAMP_REUSED"}, {OpID: "3", Error: "RESERVED_NAME"}, {OpID: "x", Success: true, AchievedLevel: "APPLIED"},
	} {
		got := response.Ack.Results[i]
		if got.OpID != want.OpID || got.Success != want.Success || !strings.HasPrefix(got.Error, want.Error) || got.AchievedLevel != want.AchievedLevel {
			t.Errorf("result %+v, want %+v", got, want)
		}
	}
	if g.partition.record("m", "__proto__") != nil {
		t.Error("a reserved key was stored")
	}
}

// TestSyncUnavailableIsNotCovered: story d. What was not taken stays with the client,
// and the status is 200 (PROTOCOL 17.2.2-4).
func TestSyncUnavailableIsNotCovered(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		refusal partitionv1.Refusal
		code    int
	}{
		"owner away": {partitionv1.Refusal_REFUSAL_UNAVAILABLE, 503},
		"overloaded": {partitionv1.Refusal_REFUSAL_OVERLOADED, 429},
	} {
		t.Run(name, func(t *testing.T) {
			var refused atomic.Int64
			refused.Store(2)
			t.Parallel() // each waits for ApplyTimeout
			g := startGateway(t, func(c *Config) { c.ApplyTimeout = 2 * time.Second }, func(p *fakePartition) {
				p.refuse = func(shard uint32) (partitionv1.Refusal, uint32) {
					if int64(shard) == refused.Load() {
						return c.refusal, 10
					}
					return 0, 0
				}
			})
			var ops []wire.Op
			for i := range 40 {
				ops = append(ops, put(fmt.Sprint(i+1), "m", fmt.Sprint(i), "v", 1))
			}
			response := g.sync(&wire.SyncRequest{Operations: ops})
			if len(response.Errors) != 1 || response.Errors[0].Code != c.code || response.Errors[0].Context != "operations" {
				t.Errorf("errors %+v", response.Errors)
			}
			last := 0
			if response.Ack != nil {
				fmt.Sscan(response.Ack.LastID, &last)
			}
			for i := range last {
				if g.partition.record("m", ops[i].Key) == nil {
					t.Errorf("op %d is covered by lastId %d and was not applied (ACK-05)", i+1, last)
				}
			}
			refused.Store(-1)
			response = g.sync(&wire.SyncRequest{Operations: ops})
			if response.Ack == nil || response.Ack.LastID != "40" || response.Errors != nil {
				t.Errorf("sent again: %+v, %+v", response.Ack, response.Errors)
			}
		})
	}
}

func TestAckFor(t *testing.T) {
	done, unknown := opResult{status: opApplied, level: "APPLIED"}, opResult{code: 503}
	rejected := opResult{status: opRejected, code: 400, reason: "BAD_KEY: x"}
	for name, c := range map[string]struct {
		ids     string
		results []opResult
		last    string // empty: no ack
		listed  string
	}{
		"all done":                   {"1 2 3", []opResult{done, done, done}, "3", ""},
		"none known":                 {"1 2", []opResult{unknown, unknown}, "", ""},
		"a prefix":                   {"1 2 3", []opResult{done, unknown, done}, "1", ""},
		"the first is unknown":       {"1 2 3", []opResult{unknown, done, done}, "", ""},
		"out of order":               {"9 3 12", []opResult{done, done, unknown}, "9", ""},
		"out of order, low unknown":  {"9 3 12", []opResult{done, unknown, done}, "", ""},
		"rejected is covered":        {"1 2", []opResult{done, rejected}, "2", "2"},
		"rejected behind an unknown": {"1 2", []opResult{unknown, rejected}, "0", "2"},
		"same id twice, one unknown": {"1 2 2", []opResult{done, done, unknown}, "1", ""},
		"no numbers":                 {"a b", []opResult{done, unknown}, "0", "a"},
		"number and text":            {"1 1x", []opResult{done, done}, "1", "1x"},
		"signs and fractions":        {"+1 -1 1.5", []opResult{done, done, done}, "0", "+1 -1 1.5"},
		"beyond JavaScript":          {"9007199254740993 1", []opResult{done, done}, "1", "9007199254740993"},
		"beyond uint64":              {"99999999999999999999999", []opResult{done}, "0", "99999999999999999999999"},
	} {
		t.Run(name, func(t *testing.T) {
			var ops []wire.Op
			for id := range strings.FieldsSeq(c.ids) {
				ops = append(ops, wire.Op{ID: id})
			}
			ack := ackFor(ops, c.results)
			if ack == nil {
				ack = &wire.SyncAck{}
			}
			var listed []string
			for _, r := range ack.Results {
				listed = append(listed, r.OpID)
			}
			if ack.LastID != c.last || strings.Join(listed, " ") != c.listed {
				t.Errorf("lastId %q, results %v; want %q, %s", ack.LastID, listed, c.last, c.listed)
			}
		})
	}
}

// TestAckForLevel: ACK-03. A level that was not reached is a failure that names the
// one reached, of an op that is done all the same.
func TestAckForLevel(t *testing.T) {
	for _, c := range []struct {
		asked, got string
		success    bool
	}{
		{"", "MEMORY", true},
		{"FIRE_AND_FORGET", "MEMORY", true},
		{"APPLIED", "APPLIED", true},
		{"APPLIED", "MEMORY", false},
		{"PERSISTED", "APPLIED", false},
		{"MEMORY", "PERSISTED", true},
	} {
		op := wire.Op{ID: "7", WriteConcern: c.asked}
		ack := ackFor([]wire.Op{op}, []opResult{{status: opApplied, level: c.got}})
		if ack.LastID != "7" || (len(ack.Results) == 0) != c.success {
			t.Errorf("asked %s, got %s: %+v", c.asked, c.got, ack)
		}
		if !c.success && (ack.Results[0].Success || ack.Results[0].AchievedLevel != c.got) {
			t.Errorf("asked %s, got %s: %+v", c.asked, c.got, ack.Results[0])
		}
	}
}

func TestSyncQueries(t *testing.T) {
	g := startGateway(t, nil, nil)
	for i := range 350 {
		g.partition.put("m", fmt.Sprintf("k%03d", i), text("v"), stampNow("w"))
	}
	ask := func(q wire.HTTPQuery) (*wire.HTTPQueryResult, *wire.SyncError) {
		q.QueryID, q.MapName = "q", "m"
		response := g.sync(&wire.SyncRequest{Queries: []wire.HTTPQuery{q}})
		if len(response.Errors) == 1 && response.QueryResults == nil {
			return nil, &response.Errors[0]
		}
		return &response.QueryResults[0], nil
	}
	result, _ := ask(wire.HTTPQuery{})
	if len(result.Results) != 100 || !result.HasMore || result.Results[0].Key != "k000" {
		t.Fatalf("default: %d rows, more %v", len(result.Results), result.HasMore)
	}
	// Pages by cursor: every row once.
	var keys []string
	for q := (wire.HTTPQuery{Limit: 120}); ; {
		result, _ := ask(q)
		for _, row := range result.Results {
			keys = append(keys, row.Key)
		}
		if !result.HasMore {
			if result.NextCursor != "" {
				t.Error("a cursor behind the last page")
			}
			break
		}
		q.Cursor = result.NextCursor
	}
	if len(keys) != 350 || !slices.IsSorted(keys) {
		t.Errorf("%d rows by cursor", len(keys))
	}
	if result, _ = ask(wire.HTTPQuery{Limit: 5, Offset: 340}); len(result.Results) != 5 || result.Results[0].Key != "k340" || !result.HasMore {
		t.Errorf("offset: %+v", result)
	}
	if result, _ = ask(wire.HTTPQuery{Offset: 350}); len(result.Results) != 0 || result.HasMore {
		t.Errorf("offset at the end: %+v", result)
	}
	if result, _ = ask(wire.HTTPQuery{Limit: 1 << 40}); len(result.Results) != 350 || result.HasMore {
		t.Errorf("a huge limit: %d rows", len(result.Results))
	}
	filter := []byte{0x81, 0xa1, 'a', 1}
	cursor := func(mapName string, where []byte) string {
		t.Helper()
		q, err := query.Parse(whereQuery(where), nil)
		if err != nil {
			t.Fatal(err)
		}
		return q.CursorAt(mapName, query.Row{Key: "k000", Value: text("v")})
	}
	foreign := []string{"x", "!!!", cursor("other", nil), cursor("m", filter), strings.Repeat("k", 4000), "Ag" + cursor("m", nil)[2:]}
	for _, cursor := range foreign {
		if _, failed := ask(wire.HTTPQuery{Cursor: cursor}); failed == nil || failed.Code != 400 || failed.Context != "q" {
			t.Errorf("cursor %.20q: %+v", cursor, failed)
		}
	}
	many := []byte{0xde, 1, 1}
	for i := range 257 {
		many = append(many, 0xa2, 'a'+byte(i/26), 'a'+byte(i%26), 1)
	}
	for name, where := range map[string][]byte{"BAD_QUERY": {0x81, 1, 1}, "QUERY_TOO_COMPLEX": many} {
		if _, failed := ask(wire.HTTPQuery{Where: where}); failed == nil || failed.Code != 400 || !strings.HasPrefix(failed.Message, name+":") {
			t.Errorf("%s: %+v", name, failed)
		}
	}
	if _, failed := ask(wire.HTTPQuery{Offset: maxQueryOffset + 1}); failed == nil || failed.Code != 400 {
		t.Errorf("offset too far: %+v", failed)
	}
}

func whereQuery(where []byte) []byte {
	if len(where) == 0 {
		return nil
	}
	return append(msgval.AppendString(msgval.AppendMapHeader(nil, 1), "where"), where...)
}

// What a query has besides a filter is served over HTTP too: predicates, sorting,
// projection, groups, and pages of each.
func TestSyncWholeQueries(t *testing.T) {
	g := startGateway(t, nil, nil)
	for i := range 40 {
		value := msgval.AppendMapHeader(nil, 2)
		value = msgval.AppendUint(msgval.AppendString(value, "age"), uint64(i%20))
		value = msgval.AppendString(msgval.AppendString(value, "team"), string(rune('a'+i%3)))
		g.partition.put("m", fmt.Sprintf("k%02d", i), value, stampNow("w"))
	}
	run := func(text string, limit uint64) (rows []wire.KeyValue, pages int) {
		t.Helper()
		body, err := msgval.FromJSON([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		for cursor := ""; ; {
			q := wire.HTTPQuery{QueryID: "q", MapName: "m", Query: withPage(body, limit, cursor)}
			response := g.sync(&wire.SyncRequest{Queries: []wire.HTTPQuery{q}})
			if len(response.Errors) > 0 {
				t.Fatal(response.Errors)
			}
			result := response.QueryResults[0]
			pages++
			rows = append(rows, result.Results...)
			if !result.HasMore {
				return rows, pages
			}
			cursor = result.NextCursor
		}
	}
	rows, pages := run(`{"predicate":{"op":"gte","attribute":"age","value":10},"sort":[{"field":"age","direction":"desc"}],"fields":["age"]}`, 6)
	if len(rows) != 20 || pages != 4 {
		t.Fatalf("%d rows in %d pages", len(rows), pages)
	}
	if first, want := string(rows[0].Value), "\x81\xa3age\x13"; rows[0].Key != "k19" || rows[1].Key != "k39" || first != want {
		t.Errorf("first %s %q, then %s", rows[0].Key, first, rows[1].Key)
	}
	rows, pages = run(`{"groupBy":["team"],"aggregations":[{"func":"count"}],"sort":[{"field":"__count","direction":"desc"}]}`, 2)
	if len(rows) != 3 || pages != 2 || !strings.Contains(string(rows[0].Value), "__count\x0e") {
		t.Errorf("%d groups in %d pages: %q", len(rows), pages, rows)
	}
	response := g.sync(&wire.SyncRequest{Queries: []wire.HTTPQuery{
		{QueryID: "q", MapName: "m", Query: append(msgval.AppendString(msgval.AppendMapHeader(nil, 1), "predicate"), 0x81, 0xa2, 'o', 'p', 0xa1, '?')},
	}})
	if len(response.Errors) != 1 || response.Errors[0].Code != 400 || response.Errors[0].Context != "q" {
		t.Errorf("an unknown operator: %+v", response.Errors)
	}
}

// withPage adds limit and cursor to a query.
func withPage(body []byte, limit uint64, cursor string) []byte {
	n := 1
	if cursor != "" {
		n = 2
	}
	head, _ := msgval.ReadHead(body)
	q := msgval.AppendMapHeader(nil, int(head.N)+n)
	q = append(q, body[head.Size:]...)
	q = msgval.AppendUint(msgval.AppendString(q, "limit"), limit)
	if cursor != "" {
		q = msgval.AppendString(msgval.AppendString(q, "cursor"), cursor)
	}
	return q
}

func TestSyncErrorsPerItem(t *testing.T) {
	g := startGateway(t, nil, nil)
	g.partition.put("good", "k", text("v"), stampNow("w"))
	response := g.sync(&wire.SyncRequest{
		SyncMaps: []wire.SyncMap{{MapName: "good"}, {MapName: "../etc"}, {MapName: "__proto__"}, {MapName: "good"}},
		Queries:  []wire.HTTPQuery{{QueryID: "q1", MapName: "good"}, {QueryID: "q2", MapName: "a b"}},
		Searches: []wire.HTTPSearch{{SearchID: "s", MapName: "good", Query: "x"}},
	})
	if len(response.Deltas) != 1 || len(response.QueryResults) != 1 {
		t.Errorf("good items: %+v, %+v", response.Deltas, response.QueryResults)
	}
	var got []string
	for _, e := range response.Errors {
		name, _, _ := strings.Cut(e.Message, ":")
		got = append(got, fmt.Sprint(e.Context, " ", e.Code, " ", name))
		if strings.Contains(e.Message, "etc") {
			t.Errorf("the message repeats input: %s", e.Message)
		}
	}
	want := "syncMaps[1] 400 BAD_NAME|syncMaps[2] 400 RESERVED_NAME|good 400 TWICE|q2 400 BAD_NAME|s 501 NOT_SUPPORTED"
	if strings.Join(got, "|") != want {
		t.Errorf("errors\n%s, want\n%s", strings.Join(got, "|"), want)
	}
}

func TestSyncReadsUnavailable(t *testing.T) {
	var down atomic.Bool
	g := startGateway(t, func(c *Config) { c.ReadTimeout = time.Second }, func(p *fakePartition) {
		p.before = func(_ context.Context, method string) error {
			if down.Load() && method != "Describe" && method != "Apply" {
				return connect.NewError(connect.CodeUnavailable, "loading")
			}
			return nil
		}
	})
	g.partition.put("m", "k", text("winner"), hlc.Timestamp{Millis: 9, NodeID: "other"})
	cursor := g.sync(&wire.SyncRequest{SyncMaps: []wire.SyncMap{{MapName: "m"}}}).Deltas[0].ServerSyncTimestamp
	down.Store(true)
	response := g.sync(&wire.SyncRequest{
		Operations: []wire.Op{put("1", "m", "k", "loser", 1)},
		SyncMaps:   []wire.SyncMap{{MapName: "m", LastSync: cursor}, {MapName: "n"}},
		Queries:    []wire.HTTPQuery{{QueryID: "q", MapName: "m"}},
	})
	if response.Ack == nil || response.Ack.LastID != "1" {
		t.Errorf("ack %+v", response.Ack)
	}
	if len(response.Errors) != 3 || response.Errors[0].Code != 503 {
		t.Errorf("errors %+v", response.Errors)
	}
	// The winner is delivered, and the cursor does not move.
	if len(response.Deltas) != 1 || response.Deltas[0].ServerSyncTimestamp != cursor || len(response.Deltas[0].Records) != 1 {
		t.Errorf("deltas %+v", response.Deltas)
	}
}

// TestSyncTwoClientsConverge: two clients that alternate end with one content.
func TestSyncTwoClientsConverge(t *testing.T) {
	g := startGateway(t, nil, nil)
	var copies [2]lwwmap.Map
	var cursors [2]hlc.Timestamp
	for round := range 40 {
		c := round % 2
		stamp := hlc.Timestamp{Millis: uint64(1000 + (round*7)%13), Counter: uint64(round), NodeID: fmt.Sprintf("c%d", c)}
		op := wire.Op{ID: fmt.Sprint(round + 1), MapName: "m", Key: fmt.Sprint(round % 5), Kind: wire.OpPut, Record: lwwmap.Record{Value: text(fmt.Sprint(round)), Timestamp: stamp}}
		copies[c].Merge(op.Key, op.Record)
		response := g.sync(&wire.SyncRequest{Operations: []wire.Op{op}, SyncMaps: []wire.SyncMap{{MapName: "m", LastSync: cursors[c]}}})
		for _, r := range response.Deltas[0].Records {
			copies[c].Merge(r.Key, r.Record)
		}
		cursors[c] = response.Deltas[0].ServerSyncTimestamp
	}
	for c := range copies {
		for _, r := range g.sync(&wire.SyncRequest{SyncMaps: []wire.SyncMap{{MapName: "m", LastSync: cursors[c]}}}).Deltas[0].Records {
			copies[c].Merge(r.Key, r.Record)
		}
	}
	if copies[0].Digest() != copies[1].Digest() || copies[0].Len() != 5 {
		t.Error("the clients differ")
	}
}
