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
	"SEARCH": true, "SEARCH_SUB": true, "SEARCH_UNSUB": true, "HYBRID_SEARCH": true, "HYBRID_SEARCH_SUB": true,
	"HYBRID_SEARCH_UNSUB": true, "VECTOR_SEARCH": true, "HYBRID_QUERY_SUBSCRIBE": true,
	"HYBRID_QUERY_UNSUBSCRIBE": true, "SQL_QUERY": true, "QUERY_SYNC_INIT": true,
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
		"SEARCH":          {TypeName: "SEARCH", RequestID: id + "08", MapName: "users"},
		"SEARCH_SUB":      {TypeName: "SEARCH_SUB", SubscriptionID: id + "10", MapName: "users"},
		"SQL_QUERY":       {TypeName: "SQL_QUERY", QueryID: id + "15"},
		"QUERY_SYNC_INIT": {TypeName: "QUERY_SYNC_INIT", QueryID: id + "05"},
		"VECTOR_SEARCH (queryVector arrives as a map, see msgpack.json)": {TypeName: "VECTOR_SEARCH", ID: id + "13", MapName: "users"},
	} {
		if diff := cmp.Diff(want, got[name]); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

// serverOther are the types that a server sends and that have no struct.
var serverOther = map[string]bool{
	"MERGE_REJECTED": true, "SEARCH_RESP": true, "SEARCH_UPDATE": true, "SQL_QUERY_RESP": true,
	"VECTOR_SEARCH_RESP": true, "HYBRID_SEARCH_RESP": true, "HYBRID_SEARCH_UPDATE": true,
	"PARTITION_MAP_DELTA": true, "ENTRY_PROCESS_RESPONSE": true,
}

// decodedOnly are the frames with a struct that leaves out some of their fields.
var decodedOnly = map[string]string{
	"NOT_OWNER hint":                         "there is one endpoint: no frame names another",
	"JOURNAL_EVENT":                          "the journal keeps no previousValue",
	"PARTITION_MAP (three partitions shown)": "a map has all its partitions",
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
	x1, red := fromJSON(t, []byte(`{"x":1}`)), fromJSON(t, []byte(`"red"`))
	const query, lock = "00000000-0000-4000-8000-000000000016", "00000000-0000-4000-8000-000000000001"
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
		"QUERY_RESP empty":    &wire.QueryResp{QueryID: query},
		"QUERY_UPDATE UPDATE": &wire.QueryUpdate{QueryID: query, Key: "r2", Value: fromJSON(t, []byte(`{"n":3}`)), ChangeType: "UPDATE"},
		"QUERY_UPDATE LEAVE":  &wire.QueryUpdate{QueryID: query, Key: "r2", ChangeType: "LEAVE"},
		"GC_PRUNE":            &wire.GCPrune{OlderThan: at(12)},
		"SERVER_EVENT OR_ADD": &wire.ServerEvent{Event: wire.Event{
			MapName: "tags", EventType: wire.OpORAdd, Key: "p1", HasRecord: true, Tag: "1760000000003:0:server-1",
			Record: lwwmap.Record{Value: red, Timestamp: at(3)},
		}},
		"SERVER_EVENT OR_REMOVE": &wire.ServerEvent{Event: wire.Event{
			MapName: "tags", EventType: wire.OpORRemove, Key: "p1", Tag: "1760000000003:0:server-1",
		}},
		"ORMAP_SYNC_RESP_ROOT":    &wire.ORMapSyncRespRoot{MapName: "tags", RootHash: 1, Timestamp: at(12)},
		"ORMAP_SYNC_RESP_BUCKETS": &wire.ORMapSyncRespBuckets{MapName: "tags", Buckets: []wire.Bucket{{'3', 99}}},
		"ORMAP_SYNC_RESP_LEAF": &wire.ORMapSyncRespLeaf{MapName: "tags", Path: "3ab", Entries: []wire.OREntry{{
			Key:        "p2",
			Records:    []wire.ORRecord{{Tag: "1760000000013:0:server-1", Record: lwwmap.Record{Value: fromJSON(t, []byte(`"blue"`)), Timestamp: at(13)}}},
			Tombstones: []string{"1:0:x"},
		}}},
		"ORMAP_DIFF_RESPONSE": &wire.ORMapDiffResponse{MapName: "tags", Entries: []wire.OREntry{{
			Key:     "p3",
			Records: []wire.ORRecord{{Tag: "1760000000014:0:server-1", Record: lwwmap.Record{Value: fromJSON(t, []byte(`"green"`)), Timestamp: at(14)}}},
		}}},
		"TOPIC_MESSAGE":    &wire.TopicMessage{Topic: "news", Data: fromJSON(t, []byte(`{"a":1}`)), PublisherID: "user-2", Timestamp: 1760000000016},
		"COUNTER_UPDATE":   &wire.CounterUpdate{Name: "likes", State: wire.CounterState{Nodes: []wire.CounterNode{{NodeID: "node-b", Positive: 10, Negative: 3}}}},
		"COUNTER_RESPONSE": &wire.CounterResponse{Name: "likes", State: wire.CounterState{Nodes: []wire.CounterNode{{NodeID: "node-c", Positive: 1}}}},
		"LOCK_GRANTED":     &wire.LockGranted{RequestID: lock, Name: "res/1", FencingToken: 1},
		"LOCK_RELEASED":    &wire.LockReleased{RequestID: lock, Name: "res/1", Success: true},
		"JOURNAL_READ_RESPONSE": &wire.JournalReadResponse{RequestID: "journal_1760000000000_1", Events: []wire.JournalEntry{{
			Sequence: 1, Type: "PUT", MapName: "users", Key: "k", Value: fromJSON(t, []byte(`{"a":1}`)), Timestamp: at(0), NodeID: "server-1",
		}}},
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

// What was captured is decoded to what it says, field by field.
func TestVectorsDecoded(t *testing.T) {
	at := func(millis uint64) hlc.Timestamp {
		return hlc.Timestamp{Millis: 1760000000000 + millis, NodeID: "server-1"}
	}
	const id = "00000000-0000-4000-8000-0000000000"
	want := map[string]wire.Message{
		"ORMAP_MERKLE_REQ_BUCKET at a leaf": &wire.ORMapMerkleReqBucket{MapName: "tags", Path: "ce7"},
		"ORMAP_PUSH_DIFF": &wire.ORMapPushDiff{MapName: "tags", Entries: []wire.OREntry{{
			Key:        "post:2",
			Records:    []wire.ORRecord{{Tag: "1760000001099:0:server-1", Record: lwwmap.Record{Value: fromJSON(t, []byte(`"srv"`)), Timestamp: at(1099)}}},
			Tombstones: []string{"1760000000822:0:client-a"},
		}}},
		"CLIENT_APPLY_ACK": &wire.ClientApplyAck{Cursor: 7},
		"TOPIC_SUB":        &wire.TopicSub{Topic: "news"},
		"TOPIC_UNSUB":      &wire.TopicUnsub{Topic: "gone"},
		"TOPIC_PUB":        &wire.TopicPub{Topic: "news", Data: fromJSON(t, []byte(`{"hello":"world","n":1}`))},
		"COUNTER_REQUEST":  &wire.CounterRequest{Name: "likes"},
		"COUNTER_SYNC":     &wire.CounterSync{Name: "likes", State: wire.CounterState{Nodes: []wire.CounterNode{{NodeID: "client-a", Positive: 5, Negative: 1}}}},
		"LOCK_REQUEST":     &wire.LockRequest{RequestID: id + "06", Name: "res/1", TTLMillis: 10000},
		"LOCK_RELEASE":     &wire.LockRelease{RequestID: id + "07", Name: "res/1", FencingToken: 1},
		"JOURNAL_READ":     &wire.JournalRead{RequestID: "journal_1760000003547_1", FromSequence: 5, Limit: 10},
		"JOURNAL_SUBSCRIBE": &wire.JournalSubscribe{
			RequestID: "journal_1760000003548_3", FromSequence: 7, HasFrom: true, MapName: "users", Types: []string{"PUT", "DELETE"},
		},
		"JOURNAL_SUBSCRIBE without options": &wire.JournalSubscribe{RequestID: "journal_1760000003608_4"},
		"JOURNAL_UNSUBSCRIBE":               &wire.JournalUnsubscribe{SubscriptionID: "journal_1760000003548_3"},
		"PARTITION_MAP_REQUEST":             &wire.PartitionMapRequest{},
	}
	// The reference does not encode minimally.
	sameValue := cmp.Comparer(func(a, b []byte) bool { return bytes.Equal(a, b) || canonical(a) == canonical(b) })
	check := func(name string, decode func() (wire.Message, error)) {
		m, ok := want[name]
		if !ok {
			return
		}
		delete(want, name)
		got, err := decode()
		if diff := cmp.Diff(m, got, sameValue); diff != "" || err != nil {
			t.Errorf("%s: %v (-want +got):\n%s", name, err, diff)
		}
	}
	for _, f := range frames(t, "frames-client.json") {
		check(f.Name, func() (wire.Message, error) { return wire.DecodeClient(unhex(t, f.Hex), wire.DefaultLimits()) })
	}
	want["JOURNAL_EVENT"] = &wire.JournalEvent{Event: wire.JournalEntry{
		Sequence: 2, Type: "UPDATE", MapName: "users", Key: "k", Value: fromJSON(t, []byte(`{"a":2}`)), Timestamp: at(1), NodeID: "server-1",
	}}
	want["PARTITION_MAP (three partitions shown)"] = &wire.PartitionMap{
		Version: 2, NodeID: "node-1", WebSocketURL: "ws://node-1.example:8080/ws", GeneratedAt: 1760000000000,
	}
	for _, f := range frames(t, "frames-server.json") {
		check(f.Name, func() (wire.Message, error) { return wire.DecodeServer(unhex(t, f.MinimalHex)) })
	}
	for name := range want {
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
