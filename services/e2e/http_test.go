package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/topgun-sync/topgun/client"
	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/wire"
)

// deltas returns the records of the one delta that a response has, and its cursor.
func deltas(t *testing.T, resp *wire.SyncResponse) (map[string]wire.DeltaRecord, hlc.Timestamp) {
	t.Helper()
	if len(resp.Deltas) != 1 {
		t.Fatalf("%d deltas; want one", len(resp.Deltas))
	}
	records := map[string]wire.DeltaRecord{}
	for _, r := range resp.Deltas[0].Records {
		if _, twice := records[r.Key]; twice {
			t.Errorf("key %s twice in one delta", r.Key)
		}
		records[r.Key] = r
	}
	return records, resp.Deltas[0].ServerSyncTimestamp
}

// One request pushes operations, fetches what others did, deletes included, and
// runs a query.
func httpOnly(t *testing.T, c Cluster) {
	const name = "http_only"
	url := gateway(c, 0)
	base := now()
	resp := postSync(t, url, &wire.SyncRequest{
		Operations: []wire.Op{
			put("1", name, "a", map[string]any{"status": "open", "n": 1}, stamp(base, 0, "http-1")),
			put("2", name, "b", map[string]any{"status": "open", "n": 2}, stamp(base, 1, "http-1")),
			put("3", name, "c", map[string]any{"status": "done", "n": 3}, stamp(base, 2, "http-1")),
			put("4", name, "d", map[string]any{"status": "open", "n": 4}, stamp(base, 3, "http-1")),
		},
		SyncMaps: []wire.SyncMap{{MapName: name}},
	})
	if resp.Ack == nil || resp.Ack.LastID != "4" {
		t.Fatalf("ack %+v; want lastId 4", resp.Ack)
	}
	records, cursor := deltas(t, resp)
	if len(records) != 4 {
		t.Errorf("%d records; want the four just pushed", len(records))
	}

	where, err := client.EncodeValue(map[string]any{"status": "open"})
	must(t, err)
	remove := wire.Op{ID: "5", MapName: name, Key: "a", Kind: wire.OpRemove}
	remove.Record.Timestamp = stamp(now(), 0, "http-2")
	resp = postSync(t, gateway(c, 1), &wire.SyncRequest{
		Operations: []wire.Op{remove, put("6", name, "e", map[string]any{"status": "open", "n": 5}, stamp(now(), 1, "http-2"))},
		SyncMaps:   []wire.SyncMap{{MapName: name, LastSync: cursor}},
		Queries:    []wire.HTTPQuery{{QueryID: "q1", MapName: name, Where: where, Limit: 2}},
	})
	if resp.Ack == nil || resp.Ack.LastID != "6" {
		t.Errorf("ack %+v; want lastId 6", resp.Ack)
	}
	records, next := deltas(t, resp)
	if a, ok := records["a"]; len(records) != 2 || !ok || !a.Record.Deleted() || a.EventType != wire.OpRemove {
		t.Errorf("delta %+v; want the tombstone of a, and e", records)
	}
	if len(resp.QueryResults) != 1 || resp.QueryResults[0].QueryID != "q1" {
		t.Fatalf("query results %+v", resp.QueryResults)
	}
	rows := resp.QueryResults[0]
	if len(rows.Results) != 2 || rows.Results[0].Key != "b" || rows.Results[1].Key != "d" || !rows.HasMore {
		t.Errorf("rows %+v; want b, d, and more to come", rows)
	}

	resp = postSync(t, url, &wire.SyncRequest{SyncMaps: []wire.SyncMap{{MapName: name, LastSync: next}}})
	if records, _ := deltas(t, resp); len(records) != 0 {
		t.Errorf("%d records although nothing happened", len(records))
	}

	// The same through the SDK.
	h := open(t, url, name+"-sdk")
	hm := h.Map(name)
	must(t, hm.WaitSynced(within(t, deadline)))
	if hm.Len() != 4 {
		t.Errorf("%d values over HTTP; want 4", hm.Len())
	}
	result, err := h.Query(within(t, deadline), client.Query{Map: name, Where: map[string]any{"status": "done"}})
	must(t, err)
	if len(result.Rows) != 1 || result.Rows[0].Key != "c" || result.HasMore {
		t.Errorf("query result %+v; want c alone", result)
	}
	sameRows(t, c, name, hm.Digest())
}

// A record that was written an hour ago by a client that was offline, and arrives
// after a cursor was handed out, is delivered behind that cursor (SYN-01).
func lateArrivalOverHTTP(t *testing.T, c Cluster) {
	const name = "late_arrival"
	url := gateway(c, 0)
	resp := postSync(t, url, &wire.SyncRequest{
		Operations: []wire.Op{put("1", name, "first", 1, stamp(now(), 0, "late-1"))},
		SyncMaps:   []wire.SyncMap{{MapName: name}},
	})
	_, cursor := deltas(t, resp)
	for i := range 20 { // over all shards, and as fast as the arrival clock ticks
		key := fmt.Sprintf("old-%d", i)
		conn := dial(t, c, i).hello()
		conn.send(&wire.OpBatch{Ops: []wire.Op{put("1", name, key, i, stamp(ago(time.Hour), uint64(i), "late-2"))}})
		expect[*wire.OpAck](conn)
		resp = postSync(t, url, &wire.SyncRequest{SyncMaps: []wire.SyncMap{{MapName: name, LastSync: cursor}}})
		var records map[string]wire.DeltaRecord
		if records, cursor = deltas(t, resp); len(records) != 1 || records[key].Key != key {
			t.Fatalf("after the arrival of %s the delta is %+v", key, records)
		}
	}
}

// Clients over both transports, which also change between them, hold the same.
func alternatingTransports(t *testing.T, c Cluster) {
	const name = "alternating"
	ws := open(t, webSocket(gateway(c, 0)), name+"-ws")
	poll := open(t, gateway(c, 1), name+"-http")
	wm, hm := ws.Map(name), poll.Map(name)
	for i := range 30 {
		must(t, wm.Set(fmt.Sprint(i), "ws"))
		must(t, hm.Set(fmt.Sprint(i+15), "http"))
		if i%5 == 0 {
			must(t, wm.Delete(fmt.Sprint(i/2)))
			must(t, hm.Delete(fmt.Sprint(i)))
		}
	}
	flush(t, ws)
	flush(t, poll)
	for round := range 4 {
		// A replica that changes its transport every time: it must end up with the
		// same, whichever it begins with.
		url := gateway(c, round)
		if round%2 == 0 {
			url = webSocket(url)
		}
		moving := open(t, url, fmt.Sprintf("%s-moving-%d", name, round))
		mm := moving.Map(name)
		must(t, mm.WaitSynced(within(t, deadline)))
		must(t, mm.Set(fmt.Sprintf("moving-%d", round), round))
		flush(t, moving)
		eventually(t, deadline, func() error {
			if d := mm.Digest(); d != wm.Digest() || d != hm.Digest() {
				return fmt.Errorf("contents differ: ws %d, http %d, moving %d values", wm.Len(), hm.Len(), mm.Len())
			}
			return nil
		})
		moving.Close()
	}
	sameRows(t, c, name, wm.Digest())
}

// POST /sync speaks JSON with whoever sends JSON.
func jsonBody(t *testing.T, c Cluster) {
	const name = "json_body"
	body := fmt.Sprintf(`{
		"clientId": "curl", "clientHlc": {"millis": %d, "counter": 0, "nodeId": "curl"},
		"operations": [{"id": "1", "mapName": %q, "opType": "PUT", "key": "k",
			"record": {"value": {"title": "from a shell", "n": 1}, "timestamp": {"millis": %d, "counter": 0, "nodeId": "curl"}}}],
		"syncMaps": [{"mapName": %q, "lastSyncTimestamp": {"millis": 0, "counter": 0, "nodeId": ""}}],
		"queries": [{"queryId": "q", "mapName": %q, "filter": {"n": 1}, "limit": 10}]
	}`, now(), name, now(), name, name)
	status, answer := post(t, gateway(c, 0)+"/sync", "application/json", []byte(body))
	if status != http.StatusOK {
		t.Fatalf("status %d: %s", status, answer)
	}
	type value struct {
		Title string `json:"title"`
		N     int    `json:"n"`
	}
	type row struct {
		Key    string `json:"key"`
		Value  value  `json:"value"` // in query results
		Record struct {
			Value value `json:"value"`
		} `json:"record"` // in deltas
	}
	var resp struct {
		Ack struct {
			LastID string `json:"lastId"`
		} `json:"ack"`
		Deltas []struct {
			Records             []row           `json:"records"`
			ServerSyncTimestamp json.RawMessage `json:"serverSyncTimestamp"`
		} `json:"deltas"`
		QueryResults []struct {
			Results []row `json:"results"`
		} `json:"queryResults"`
	}
	must(t, json.Unmarshal(answer, &resp))
	want := value{"from a shell", 1}
	if resp.Ack.LastID != "1" || len(resp.Deltas) != 1 || len(resp.Deltas[0].Records) != 1 ||
		resp.Deltas[0].Records[0].Record.Value != want || len(resp.QueryResults) != 1 ||
		len(resp.QueryResults[0].Results) != 1 || resp.QueryResults[0].Results[0].Value != want {
		t.Fatalf("answer %s", answer)
	}
	again := fmt.Sprintf(`{"clientId": "curl", "clientHlc": {"millis": %d, "counter": 0, "nodeId": "curl"},
		"syncMaps": [{"mapName": %q, "lastSyncTimestamp": %s}]}`, now(), name, resp.Deltas[0].ServerSyncTimestamp)
	status, answer = post(t, gateway(c, 1)+"/sync", "application/json", []byte(again))
	resp.Deltas = nil
	must(t, json.Unmarshal(answer, &resp))
	if status != http.StatusOK || len(resp.Deltas) > 0 && len(resp.Deltas[0].Records) > 0 {
		t.Errorf("with the cursor: status %d: %s", status, answer)
	}
}
