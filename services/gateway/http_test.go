package gateway

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/golang-jwt/jwt/v5"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/wire"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	"github.com/topgun-sync/topgun/services/gateway/auth"
)

const testSecret = "a-secret-of-more-than-thirty-two-bytes"

// httpGateway is a running gateway with its client port on a real socket.
type httpGateway struct {
	*httptest.Server
	t         *testing.T
	service   *Service
	partition *fakePartition
	stop      func() // ends Run and waits for it
}

// startGateway runs a gateway over fakes; prepare changes them before anything runs.
func startGateway(t *testing.T, change func(*Config), prepare func(*fakePartition)) *httpGateway {
	t.Helper()
	fanout := newFakeFanout()
	partition := newFakePartition(fanout)
	if prepare != nil {
		prepare(partition)
	}
	cfg := DefaultConfig()
	cfg.DrainTimeout = 2 * time.Second
	cfg.ApplyTimeout = 500 * time.Millisecond
	cfg.ReadTimeout = 500 * time.Millisecond
	if change != nil {
		change(&cfg)
	}
	service, err := New(cfg, Deps{Partition: partition.client(), Fanout: fanout.client()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := service.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	g := &httpGateway{Server: httptest.NewServer(service.Handler()), t: t, service: service, partition: partition}
	g.stop = func() { cancel(); wg.Wait() }
	t.Cleanup(func() { g.stop(); g.Close() })
	return g
}

// exchange sends a body as it is and returns status, headers and body of the answer.
func (g *httpGateway) exchange(method, path string, header http.Header, body []byte) (int, http.Header, []byte) {
	g.t.Helper()
	request, err := http.NewRequestWithContext(g.t.Context(), method, g.URL+path, bytes.NewReader(body))
	if err != nil {
		g.t.Fatal(err)
	}
	for name, values := range header {
		request.Header[name] = values
	}
	response, err := http.DefaultTransport.RoundTrip(request) // follows no redirect
	if err != nil {
		g.t.Fatal(err)
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err != nil {
		g.t.Fatal(err)
	}
	return response.StatusCode, response.Header, answer
}

var msgpack = http.Header{"Content-Type": {"application/x-msgpack"}}

// sync makes a msgpack request that must succeed.
func (g *httpGateway) sync(request *wire.SyncRequest) *wire.SyncResponse {
	g.t.Helper()
	status, header, body := g.exchange(http.MethodPost, "/sync", msgpack, request.AppendTo(nil))
	if status != http.StatusOK || header.Get("Content-Type") != "application/x-msgpack" {
		g.t.Fatalf("status %d, %s: %s", status, header.Get("Content-Type"), body)
	}
	response, err := wire.DecodeSyncResponse(body)
	if err != nil {
		g.t.Fatal(err)
	}
	if response.ServerHLC.Millis == 0 || response.ServerHLC.NodeID == "" {
		g.t.Errorf("serverHlc %v", response.ServerHLC)
	}
	return response
}

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

func TestSyncEmptyRequest(t *testing.T) {
	g := startGateway(t, nil, nil)
	for _, path := range []string{"/sync", "/ws/sync"} {
		status, _, body := g.exchange(http.MethodPost, path, msgpack, nil)
		response, err := wire.DecodeSyncResponse(body)
		if status != http.StatusOK || err != nil || response.Ack != nil || response.Deltas != nil || response.Errors != nil {
			t.Errorf("%s: %d %+v %v", path, status, response, err)
		}
	}
	status, header, body := g.exchange(http.MethodPost, "/sync", http.Header{"Content-Type": {"application/json; charset=utf-8"}}, []byte("{}"))
	var answer map[string]any
	if err := json.Unmarshal(body, &answer); status != 200 || err != nil || answer["serverHlc"] == nil || header.Get("Content-Type") != "application/json" {
		t.Errorf("JSON: %d %s", status, body)
	}
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
			g := startGateway(t, nil, func(p *fakePartition) {
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
		{"", "MEMORY", true}, {"FIRE_AND_FORGET", "MEMORY", true}, {"APPLIED", "APPLIED", true},
		{"APPLIED", "MEMORY", false}, {"PERSISTED", "APPLIED", false}, {"MEMORY", "PERSISTED", true},
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
	foreign := []string{
		"x", "!!!", encodeCursor("k000", "other", nil), encodeCursor("k000", "m", filter),
		encodeCursor(strings.Repeat("k", maxQueryCursor), "m", nil), "Ag" + encodeCursor("k", "m", nil)[2:],
	}
	for _, cursor := range foreign {
		if _, failed := ask(wire.HTTPQuery{Cursor: cursor}); failed == nil || failed.Code != 400 || failed.Context != "q" {
			t.Errorf("cursor %.20q: %+v", cursor, failed)
		}
	}
	many := []byte{0xde, 0, 65}
	for i := range 65 {
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

func TestCursorBindsToTheFilterNotItsEncoding(t *testing.T) {
	short, long := []byte{0x81, 0xa1, 'a', 1}, []byte{0xde, 0, 1, 0xa1, 'a', 0xcb, 0x3f, 0xf0, 0, 0, 0, 0, 0, 0}
	if key, ok := decodeCursor(encodeCursor("k", "m", short), "m", long); !ok || key != "k" {
		t.Errorf("%q, %v", key, ok)
	}
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
	g := startGateway(t, nil, func(p *fakePartition) {
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

func TestSyncRefusals(t *testing.T) {
	g := startGateway(t, func(c *Config) { c.MaxBodyBytes = 4096 }, nil)
	inflate := func(n int) []byte {
		var b bytes.Buffer
		w := gzip.NewWriter(&b)
		_, _ = w.Write(make([]byte, n))
		_ = w.Close()
		return b.Bytes()
	}
	zip := func(b []byte) []byte {
		var out bytes.Buffer
		w := gzip.NewWriter(&out)
		_, _ = w.Write(b)
		_ = w.Close()
		return out.Bytes()
	}
	kind := func(k string, more ...string) http.Header {
		h := http.Header{"Content-Type": {k}}
		if len(more) > 0 {
			h["Content-Encoding"] = more
		}
		return h
	}
	good := (&wire.SyncRequest{ClientID: "c", ClientHLC: stampNow("c")}).AppendTo(nil)
	padded := func(n int) []byte {
		return fmt.Appendf(nil, `{"pad":"%s"}`, strings.Repeat("x", n-len(`{"pad":""}`)))
	}
	for name, c := range map[string]struct {
		method string
		header http.Header
		body   []byte
		status int
	}{
		"msgpack":                      {"POST", kind("application/msgpack"), good, 200},
		"upper case type":              {"POST", kind("Application/X-MsgPack"), good, 200},
		"gzip":                         {"POST", kind("application/x-msgpack", "gzip"), zip(good), 200},
		"identity":                     {"POST", kind("application/x-msgpack", "identity"), good, 200},
		"empty gzip":                   {"POST", kind("application/x-msgpack", "gzip"), nil, 200},
		"no content type":              {"POST", http.Header{}, good, 415},
		"two content types":            {"POST", http.Header{"Content-Type": {"application/json", "application/msgpack"}}, good, 415},
		"text":                         {"POST", kind("text/plain"), good, 415},
		"form":                         {"POST", kind("application/x-www-form-urlencoded"), good, 415},
		"br":                           {"POST", kind("application/x-msgpack", "br"), good, 415},
		"gzip twice":                   {"POST", kind("application/x-msgpack", "gzip, gzip"), good, 415},
		"gzip in two headers":          {"POST", kind("application/x-msgpack", "gzip", "gzip"), good, 415},
		"not gzip":                     {"POST", kind("application/x-msgpack", "gzip"), good, 400},
		"cut gzip":                     {"POST", kind("application/x-msgpack", "gzip"), zip(good)[:20], 400},
		"GET":                          {"GET", kind("application/json"), nil, 405},
		"PUT":                          {"PUT", kind("application/json"), []byte("{}"), 405},
		"body of the limit":            {"POST", kind("application/json"), padded(4096), 200},
		"body of the limit and 1 byte": {"POST", kind("application/json"), padded(4097), 413},
		"bomb":                         {"POST", kind("application/x-msgpack", "gzip"), inflate(1 << 20), 413},
		"inflated limit and 1 byte":    {"POST", kind("application/json", "gzip"), zip(padded(4097)), 413},
		"inflated limit":               {"POST", kind("application/json", "gzip"), zip(padded(4096)), 200},
		"garbage":                      {"POST", kind("application/x-msgpack"), []byte{0xc1}, 400},
		"no map":                       {"POST", kind("application/x-msgpack"), []byte{0x90}, 400},
		"huge array":                   {"POST", kind("application/x-msgpack"), []byte{0x81, 0xaa, 'o', 'p', 'e', 'r', 'a', 't', 'i', 'o', 'n', 's', 0xdd, 0xff, 0xff, 0xff, 0xff}, 400},
		"trailing bytes":               {"POST", kind("application/x-msgpack"), append(slices.Clone(good), 1), 400},
		"nested":                       {"POST", kind("application/x-msgpack"), bytes.Repeat([]byte{0x91}, 4000), 400},
		"bad JSON":                     {"POST", kind("application/json"), []byte(`{"operations":`), 400},
		"nested JSON":                  {"POST", kind("application/json"), []byte(strings.Repeat("[", 4000)), 400},
	} {
		t.Run(name, func(t *testing.T) {
			status, header, body := g.exchange(c.method, "/sync", c.header, c.body)
			if status != c.status {
				t.Fatalf("status %d, want %d: %s", status, c.status, body)
			}
			if status == 200 {
				return
			}
			var answer struct {
				Code    int
				Message string
			}
			if err := json.Unmarshal(body, &answer); err != nil || answer.Code != status || answer.Message == "" || header.Get("Content-Type") != "application/json" {
				t.Errorf("%s: %s", header.Get("Content-Type"), body)
			}
		})
	}
	// The process is as well as before.
	if response := g.sync(&wire.SyncRequest{Operations: []wire.Op{put("1", "m", "k", "v", 1)}}); response.Ack == nil {
		t.Error("no ack afterwards")
	}
}

// TestSyncChunkedBodyIsBounded: a body without length is cut at the limit.
func TestSyncChunkedBodyIsBounded(t *testing.T) {
	g := startGateway(t, func(c *Config) { c.MaxBodyBytes = 4096 }, nil)
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, g.URL+"/sync", io.MultiReader(bytes.NewReader(make([]byte, 3000)), bytes.NewReader(make([]byte, 3000))))
	if err != nil {
		t.Fatal(err)
	}
	request.Header = msgpack.Clone()
	response, err := http.DefaultTransport.RoundTrip(request)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != http.StatusRequestEntityTooLarge {
		t.Errorf("status %d", response.StatusCode)
	}
}

// TestSyncDribbledBody: a body that comes too slowly ends at the deadline.
func TestSyncDribbledBody(t *testing.T) {
	g := startGateway(t, func(c *Config) { c.BodyTimeout = 50 * time.Millisecond }, nil)
	conn, err := net.Dial("tcp", g.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "POST /sync HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
	answer, err := io.ReadAll(conn) // the gateway answers and closes
	if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 400") {
		t.Errorf("%q, %v", answer, err)
	}
}

func TestSyncAuthorization(t *testing.T) {
	token := func(change time.Duration) string {
		s, err := jwt.NewWithClaims(jwt.SigningMethodHS256, jwt.MapClaims{"sub": "alice", "exp": time.Now().Add(change).Unix()}).SignedString([]byte(testSecret))
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	good := token(time.Hour)
	protected := startGateway(t, func(c *Config) { c.Auth = auth.Config{Secret: testSecret} }, nil)
	open := startGateway(t, nil, nil)
	for name, c := range map[string]struct {
		values          []string
		protected, open int
	}{
		"good":                 {[]string{"Bearer " + good}, 200, 200},
		"lower case scheme":    {[]string{"bearer " + good}, 200, 200},
		"none":                 {nil, 401, 200},
		"bare Bearer":          {[]string{"Bearer"}, 401, 200}, // the original client without a token
		"Bearer and a space":   {[]string{"Bearer "}, 401, 200},
		"expired":              {[]string{"Bearer " + token(-time.Hour)}, 401, 200},
		"garbage":              {[]string{"Bearer x"}, 401, 200},
		"two headers":          {[]string{"Bearer " + good, "Bearer " + good}, 401, 401},
		"list":                 {[]string{"Bearer " + good + ", Bearer " + good}, 401, 401},
		"two tokens":           {[]string{"Bearer " + good + " " + good}, 401, 401},
		"Basic":                {[]string{"Basic YTpi"}, 401, 401},
		"token without Bearer": {[]string{good}, 401, 401},
		"empty header":         {[]string{""}, 401, 401},
	} {
		t.Run(name, func(t *testing.T) {
			header := msgpack.Clone()
			if c.values != nil {
				header["Authorization"] = c.values
			}
			status, answer, body := protected.exchange(http.MethodPost, "/sync", header, nil)
			if status != c.protected {
				t.Errorf("with a key: status %d, want %d", status, c.protected)
			}
			if status == 401 && (answer.Get("WWW-Authenticate") != "Bearer" || !strings.Contains(string(body), `"code":401`)) {
				t.Errorf("answer %v %s", answer, body)
			}
			if status, _, _ = open.exchange(http.MethodPost, "/sync", header, nil); status != c.open {
				t.Errorf("without a key: status %d, want %d", status, c.open)
			}
		})
	}
	// In the URL a token is refused, good or not, with a key or without.
	for _, g := range []*httpGateway{protected, open} {
		for _, path := range []string{"/sync?token=" + good, "/?access_token=" + good, "/ws?token=x"} {
			header := msgpack.Clone()
			header.Set("Authorization", "Bearer "+good)
			if status, _, _ := g.exchange(http.MethodPost, path, header, nil); status != 401 {
				t.Errorf("%.20s: status %d", path, status)
			}
		}
	}
	// Nobody without a token makes the gateway buffer a body.
	header := msgpack.Clone()
	if status, _, _ := protected.exchange(http.MethodPost, "/sync", header, make([]byte, 1<<20)); status != 401 {
		t.Errorf("status %d", status)
	}
}

func TestSyncJSON(t *testing.T) {
	g := startGateway(t, nil, nil)
	header := http.Header{"Content-Type": {"application/json"}}
	body := fmt.Sprintf(`{"clientId":"c","clientHlc":{"millis":1,"counter":0,"nodeId":"c"},
		"operations":[{"id":"1","mapName":"m","key":"k","opType":"PUT","record":{"value":{"n":1.5,"s":"x"},"timestamp":{"millis":%d,"counter":0,"nodeId":"c"}},
		"timestamp":{"millis":5,"counter":0,"nodeId":"c"}}],
		"syncMaps":[{"mapName":"m","lastSyncTimestamp":{"millis":0,"counter":0,"nodeId":""}}],
		"queries":[{"queryId":"q","mapName":"m"}]}`, 5)
	status, _, answer := g.exchange(http.MethodPost, "/sync", header, []byte(body))
	var got struct {
		ServerHlc struct{ Millis float64 }
		Ack       struct{ LastId string }
		Deltas    []struct {
			MapName string
			Records []struct {
				Key, EventType string
				Record         struct{ Value map[string]any }
			}
			ServerSyncTimestamp struct{ NodeId string }
		}
		QueryResults []struct{ Results []struct{ Key string } }
		Errors       []any
	}
	if err := json.Unmarshal(answer, &got); err != nil || status != 200 {
		t.Fatalf("%d %s %v", status, answer, err)
	}
	if got.Ack.LastId != "1" || len(got.Deltas) != 1 || got.Deltas[0].Records[0].EventType != "PUT" || got.Deltas[0].Records[0].Record.Value["n"] != 1.5 ||
		got.Deltas[0].ServerSyncTimestamp.NodeId != "history-1" || len(got.QueryResults) != 1 || got.Errors != nil {
		t.Errorf("%s", answer)
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

func TestSyncBusy(t *testing.T) {
	held := make(chan struct{})
	entered := make(chan struct{}, 10)
	g := startGateway(t, func(c *Config) { c.MaxSyncBytes = int64(c.MaxBodyBytes) }, func(p *fakePartition) {
		p.before = func(_ context.Context, method string) error {
			if method == "Apply" {
				entered <- struct{}{}
				<-held
			}
			return nil
		}
	})
	first := make(chan int, 1)
	body := (&wire.SyncRequest{Operations: []wire.Op{put("1", "m", "k", "v", 1)}}).AppendTo(nil)
	go func() {
		header := msgpack.Clone()
		header.Set("Content-Encoding", "gzip") // of unknown size, so it counts as the greatest
		var b bytes.Buffer
		w := gzip.NewWriter(&b)
		_, _ = w.Write(body)
		_ = w.Close()
		status, _, _ := g.exchange(http.MethodPost, "/sync", header, b.Bytes())
		first <- status
	}()
	<-entered
	response := g.sync(&wire.SyncRequest{Operations: []wire.Op{put("1", "m", "k", "v", 1)}})
	if response.Ack != nil || len(response.Errors) != 1 || response.Errors[0].Code != 503 {
		t.Errorf("%+v", response)
	}
	close(held)
	if status := <-first; status != 200 {
		t.Errorf("status %d", status)
	}
}
