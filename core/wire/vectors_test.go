package wire_test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"reflect"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/msgval"
	"github.com/topgun-sync/topgun/core/wire"
)

type frame struct {
	Name, Type, Dir, Hex             string
	MinimalHex, ReferenceEncodingHex string
	InnerHex                         []string
	JSON                             json.RawMessage
}

func load(t testing.TB, file string, into any) {
	t.Helper()
	data, err := os.ReadFile("testdata/" + file)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, into); err != nil {
		t.Fatal(err)
	}
}

func frames(t testing.TB, file string) []frame {
	t.Helper()
	var v struct{ Frames []frame }
	load(t, file, &v)
	if len(v.Frames) == 0 {
		t.Fatalf("%s is not what this test reads", file)
	}
	return v.Frames
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// canonical returns what two encodings of the same frame have in common.
func canonical(b []byte) string { return fmt.Sprintf("%x", msgval.Canonical(nil, b)) }

func fromJSON(t testing.TB, text []byte) []byte {
	t.Helper()
	b, err := msgval.FromJSON(text)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func show(b []byte) string {
	text, ok := msgval.AppendJSON(nil, b)
	if !ok {
		return fmt.Sprintf("%x", b)
	}
	return string(text)
}

// clientOther are the types that a client sends and that are not served: they
// are decoded as Other, with the ids that a refusal needs.
var clientOther = map[string]bool{
	"ORMAP_MERKLE_REQ_BUCKET": true, "ORMAP_PUSH_DIFF": true, "CLIENT_APPLY_ACK": true,
	"TOPIC_SUB": true, "TOPIC_PUB": true, "TOPIC_UNSUB": true, "COUNTER_REQUEST": true,
	"COUNTER_SYNC": true, "LOCK_REQUEST": true, "LOCK_RELEASE": true, "SEARCH": true,
	"SEARCH_SUB": true, "SEARCH_UNSUB": true, "HYBRID_SEARCH": true, "HYBRID_SEARCH_SUB": true,
	"HYBRID_SEARCH_UNSUB": true, "VECTOR_SEARCH": true, "HYBRID_QUERY_SUBSCRIBE": true,
	"HYBRID_QUERY_UNSUBSCRIBE": true, "SQL_QUERY": true, "JOURNAL_READ": true,
	"JOURNAL_SUBSCRIBE": true, "JOURNAL_UNSUBSCRIBE": true, "QUERY_SYNC_INIT": true,
	"PARTITION_MAP_REQUEST": true,
}

func TestVectorsClientFrames(t *testing.T) {
	for _, f := range frames(t, "frames-client.json") {
		t.Run(f.Name, func(t *testing.T) { clientFrame(t, f) })
	}
}

// clientFrame decodes a captured frame and encodes it again. All its fields must
// have come through.
func clientFrame(t *testing.T, f frame) {
	raw := unhex(t, f.Hex)
	want := fromJSON(t, f.JSON)
	m, err := wire.DecodeClient(raw, wire.DefaultLimits())
	if err != nil {
		t.Fatal(err)
	}
	if f.Type != "" && m.Type() != f.Type {
		t.Errorf("Type() = %s, want %s", m.Type(), f.Type)
	}
	if _, other := m.(*wire.Other); other != clientOther[m.Type()] {
		t.Errorf("%s is decoded as %T", m.Type(), m)
	}
	if b, ok := m.(*wire.OpBatch); ok {
		for _, op := range b.Ops {
			if op.Err != nil {
				t.Errorf("operation %s is refused: %v", op.ID, op.Err)
			}
		}
	}
	again := m.AppendTo([]byte("before"))
	if !bytes.HasPrefix(again, []byte("before")) {
		t.Fatal("AppendTo does not append")
	}
	if again = again[6:]; canonical(again) != canonical(want) {
		t.Errorf("decoded and encoded:\n got %s\nwant %s", show(again), show(want))
	}
}

func TestVectorsOtherIDs(t *testing.T) {
	got := make(map[string]wire.Other)
	for _, f := range frames(t, "frames-client.json") {
		m, err := wire.DecodeClient(unhex(t, f.Hex), wire.DefaultLimits())
		if err != nil {
			t.Fatal(err)
		}
		if o, ok := m.(*wire.Other); ok {
			o.Frame = nil
			got[f.Name] = *o
		}
	}
	const id = "00000000-0000-4000-8000-0000000000"
	for name, want := range map[string]wire.Other{
		"SEARCH":           {TypeName: "SEARCH", RequestID: id + "08", MapName: "users"},
		"SEARCH_SUB":       {TypeName: "SEARCH_SUB", SubscriptionID: id + "10", MapName: "users"},
		"SQL_QUERY":        {TypeName: "SQL_QUERY", QueryID: id + "15"},
		"LOCK_REQUEST":     {TypeName: "LOCK_REQUEST", RequestID: id + "06", Name: "res/1"},
		"TOPIC_PUB":        {TypeName: "TOPIC_PUB", Topic: "news"},
		"JOURNAL_READ":     {TypeName: "JOURNAL_READ", RequestID: "journal_1760000003547_1"},
		"CLIENT_APPLY_ACK": {TypeName: "CLIENT_APPLY_ACK"},
	} {
		if diff := cmp.Diff(want, got[name]); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

// serverOther are the types that a server sends and that have no struct.
var serverOther = map[string]bool{
	"ORMAP_SYNC_RESP_ROOT": true, "ORMAP_SYNC_RESP_BUCKETS": true, "ORMAP_SYNC_RESP_LEAF": true,
	"ORMAP_DIFF_RESPONSE": true, "GC_PRUNE": true, "MERGE_REJECTED": true, "QUERY_UPDATE": true,
	"TOPIC_MESSAGE": true, "COUNTER_UPDATE": true, "COUNTER_RESPONSE": true, "LOCK_GRANTED": true,
	"LOCK_RELEASED": true, "SEARCH_RESP": true, "SEARCH_UPDATE": true, "SQL_QUERY_RESP": true,
	"VECTOR_SEARCH_RESP": true, "HYBRID_SEARCH_RESP": true, "HYBRID_SEARCH_UPDATE": true,
	"JOURNAL_READ_RESPONSE": true, "JOURNAL_EVENT": true, "PARTITION_MAP": true,
	"PARTITION_MAP_DELTA": true, "ENTRY_PROCESS_RESPONSE": true,
}

// decodedOnly are the frames with a struct that leaves out some of their fields.
var decodedOnly = map[string]string{
	"SERVER_EVENT OR_ADD":    "OR maps are not served: the record is left out",
	"SERVER_EVENT OR_REMOVE": "OR maps are not served: the tag is left out",
	"NOT_OWNER hint":         "there is one endpoint: no frame names another",
}

func TestVectorsServerFrames(t *testing.T) {
	for _, f := range frames(t, "frames-server.json") {
		t.Run(f.Name, func(t *testing.T) {
			encodings := []string{f.MinimalHex}
			if f.ReferenceEncodingHex != "" {
				encodings = append(encodings, f.ReferenceEncodingHex)
			}
			for _, enc := range encodings {
				m, err := wire.DecodeServer(unhex(t, enc))
				if err != nil {
					t.Fatal(err)
				}
				if m.Type() != f.Type {
					t.Errorf("Type() = %s, want %s", m.Type(), f.Type)
				}
				if _, other := m.(*wire.Other); other != serverOther[f.Type] {
					t.Errorf("%s is decoded as %T", f.Type, m)
				}
				if decodedOnly[f.Name] != "" {
					continue
				}
				want := unhex(t, f.MinimalHex)
				if f.Type != "BATCH" && canonical(want) != canonical(fromJSON(t, f.JSON)) {
					t.Fatal("the vector disagrees with itself")
				}
				got := m.AppendTo(nil)
				if b, ok := m.(*wire.Batch); ok {
					serverBatch(t, f, b)
					continue // its data depends on the order of keys within
				}
				if canonical(got) != canonical(want) {
					t.Errorf("decoded and encoded:\n got %s\nwant %s", show(got), show(want))
				}
				// Values stay as they came; so only from minimal to minimal.
				if enc == f.MinimalHex && len(got) != len(want) {
					t.Errorf("the encoding has %d bytes, the minimal one %d", len(got), len(want))
				}
			}
		})
	}
}

func serverBatch(t *testing.T, f frame, b *wire.Batch) {
	if len(b.Messages) != len(f.InnerHex) {
		t.Fatalf("%d messages, want %d", len(b.Messages), len(f.InnerHex))
	}
	again, err := wire.DecodeServer(b.AppendTo(nil))
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range f.InnerHex {
		for _, m := range []wire.Message{b.Messages[i], again.(*wire.Batch).Messages[i]} {
			if canonical(m.AppendTo(nil)) != canonical(unhex(t, want)) {
				t.Errorf("message %d is %s", i, show(m.AppendTo(nil)))
			}
		}
	}
}

// What a server builds is what the vectors show, field by field.
func TestVectorsServerFramesBuilt(t *testing.T) {
	at := func(millis uint64) hlc.Timestamp {
		return hlc.Timestamp{Millis: 1760000000000 + millis, NodeID: "server-1"}
	}
	x1 := fromJSON(t, []byte(`{"x":1}`))
	built := map[string]wire.Message{
		"AUTH_REQUIRED": &wire.AuthRequired{},
		"SERVER_EVENT PUT with TTL": &wire.ServerEvent{Event: wire.Event{
			MapName: "users", EventType: wire.OpPut, Key: "ttl", HasRecord: true,
			Record: lwwmap.Record{Value: []byte{1}, Timestamp: at(600000), TTLMillis: 60000},
		}},
		"SERVER_EVENT REMOVE with tombstone record": &wire.ServerEvent{Event: wire.Event{
			MapName: "users", EventType: wire.OpRemove, Key: "bob", HasRecord: true,
			Record: lwwmap.Record{Timestamp: at(2)},
		}},
		"SERVER_EVENT with an envelope HLC": &wire.ServerEvent{Event: wire.Event{
			MapName: "users", EventType: wire.OpPut, Key: "e3", HasRecord: true,
			Record: lwwmap.Record{Value: []byte{3}, Timestamp: at(6)},
		}, Timestamp: at(7)},
		"SYNC_RESP_ROOT different root": &wire.SyncRespRoot{MapName: "users", RootHash: 4294967295, Timestamp: at(9)},
		"SYNC_RESP_BUCKETS":             &wire.SyncRespBuckets{MapName: "users", Buckets: []wire.Bucket{{'0', 0}, {'8', 123456789}, {'f', 4294967295}}},
		"SYNC_RESP_LEAF": &wire.SyncRespLeaf{MapName: "users", Path: "8ab", Records: []wire.KeyedRecord{
			{Key: "l1", Record: lwwmap.Record{Value: x1, Timestamp: at(10)}},
			{Key: "l2", Record: lwwmap.Record{Timestamp: at(11)}},
		}},
		"OP_ACK with results": &wire.OpAck{LastID: "3", AchievedLevel: "PERSISTED", Results: []wire.OpResult{{OpID: "3", Success: true, AchievedLevel: "PERSISTED"}}},
		"OP_REJECTED":         &wire.OpRejected{OpID: "99", Reason: "Access denied", Code: 403},
		"ERROR":               &wire.ErrorMessage{Code: 429, Message: "server overloaded, try again later"},
		"PONG":                &wire.Pong{Timestamp: wire.PingAt(1760000000017).Timestamp, ServerTime: 1760000000018},
		"AUTH_ACK":            &wire.AuthAck{ProtocolVersion: 1, UserID: "user-1", DeviceID: "dev-1", DeviceToken: "opaque"},
		"AUTH_ACK minimal":    &wire.AuthAck{},
		"DEVICE_ACK":          &wire.DeviceAck{DeviceID: "dev-1", DeviceToken: "opaque"},
		"AUTH_FAIL":           &wire.AuthFail{Error: "Authentication failed", Code: 401},
		"SYNC_RESET_REQUIRED": &wire.SyncResetRequired{MapName: "users", Reason: "client too old"},
		"QUERY_RESP empty":    &wire.QueryResp{QueryID: "00000000-0000-4000-8000-000000000016"},
	}
	for _, f := range frames(t, "frames-server.json") {
		m, ok := built[f.Name]
		if !ok {
			continue
		}
		delete(built, f.Name)
		if got, want := m.AppendTo(nil), unhex(t, f.MinimalHex); canonical(got) != canonical(want) || len(got) != len(want) {
			t.Errorf("%s:\n got %s\nwant %s", f.Name, show(got), show(want))
		}
	}
	for name := range built {
		t.Errorf("no vector is named %q", name)
	}
}

func TestVectorsSessions(t *testing.T) {
	for _, file := range []string{"session-minimal.json", "session-minimal-jwt.json", "session-ormap-repair.json"} {
		for i, f := range frames(t, file) {
			name := fmt.Sprintf("%s/%d", file, i)
			switch f.Dir {
			case "client->server":
				t.Run(name, func(t *testing.T) { clientFrame(t, f) })
			case "server->client":
				m, err := wire.DecodeServer(unhex(t, f.Hex))
				if err != nil {
					t.Errorf("%s: %v", name, err)
					continue
				}
				if got := m.AppendTo(nil); canonical(got) != canonical(fromJSON(t, f.JSON)) {
					t.Errorf("%s:\n got %s\nwant %s", name, show(got), f.JSON)
				}
			default:
				t.Fatalf("%s: direction %q", name, f.Dir)
			}
		}
	}
}

func TestVectorsHTTP(t *testing.T) {
	type body struct {
		JSON json.RawMessage
		Hex  string
	}
	var v struct {
		Exchanges []struct{ Request, Response body }
	}
	load(t, "http-sync.json", &v)
	if len(v.Exchanges) == 0 {
		t.Fatal("the vectors are not what this test reads")
	}
	for i, x := range v.Exchanges {
		packed, err := wire.DecodeSyncRequest(unhex(t, x.Request.Hex), wire.DefaultLimits())
		if err != nil {
			t.Fatalf("request %d: %v", i, err)
		}
		plain, err := wire.DecodeSyncRequestJSON(x.Request.JSON, wire.DefaultLimits())
		if err != nil {
			t.Fatalf("request %d as JSON: %v", i, err)
		}
		for _, req := range []*wire.SyncRequest{packed, plain} {
			got := req.AppendTo(nil)
			if canonical(got) != canonical(fromJSON(t, x.Request.JSON)) {
				t.Errorf("request %d:\n got %s\nwant %s", i, show(got), x.Request.JSON)
			}
			for _, op := range req.Operations {
				if op.Err != nil {
					t.Errorf("request %d: operation %s is refused: %v", i, op.ID, op.Err)
				}
			}
			for _, m := range req.SyncMaps {
				if m.Err != nil {
					t.Errorf("request %d: map is refused: %v", i, m.Err)
				}
			}
		}

		resp, err := wire.DecodeSyncResponse(unhex(t, x.Response.Hex))
		if err != nil {
			t.Fatalf("response %d: %v", i, err)
		}
		want := fromJSON(t, x.Response.JSON)
		if got := resp.AppendTo(nil); canonical(got) != canonical(want) {
			t.Errorf("response %d:\n got %s\nwant %s", i, show(got), x.Response.JSON)
		}
		if got := fromJSON(t, resp.AppendJSON(nil)); canonical(got) != canonical(want) {
			t.Errorf("response %d as JSON:\n got %s\nwant %s", i, show(got), x.Response.JSON)
		}
		again, err := wire.DecodeSyncResponse(resp.AppendTo(nil))
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(again, resp) {
			t.Errorf("response %d (-first +again):\n%s", i, cmp.Diff(resp, again))
		}
	}
}

func TestVectorsPing(t *testing.T) {
	for _, f := range frames(t, "frames-client.json") {
		if f.Type != "PING" {
			continue
		}
		m, err := wire.DecodeClient(unhex(t, f.Hex), wire.DefaultLimits())
		if err != nil {
			t.Fatal(err)
		}
		ping := m.(*wire.Ping)
		if got, want := hex.EncodeToString(ping.Timestamp), "cb42799c82ce28d000"; got != want {
			t.Errorf("Timestamp = %s, want the bytes that came, %s", got, want)
		}
		pong := (&wire.Pong{Timestamp: ping.Timestamp, ServerTime: 1}).AppendTo(nil)
		if !bytes.Contains(pong, ping.Timestamp) {
			t.Errorf("PONG %x does not echo them", pong)
		}
		back, err := wire.DecodeServer(pong)
		if err != nil {
			t.Fatal(err)
		}
		if got, ok := back.(*wire.Pong).Millis(); !ok || got != 1760000008845 {
			t.Errorf("Millis() = %d, %v", got, ok)
		}
	}
}
