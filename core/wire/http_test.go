package wire_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/wire"
)

func TestHTTPItemErrors(t *testing.T) {
	body := pack(nil, pairs{
		"clientId", "c", "clientHlc", goodStamp,
		"operations",
		[]any{opWith("key", ""), opWith()},
		"syncMaps",
		[]any{
			pairs{"mapName", "a b", "lastSyncTimestamp", stamp(0, 0, "")},
			pairs{"mapName", "m", "lastSyncTimestamp", 5},
			pairs{"mapName", "m", "lastSyncTimestamp", stamp(5, 6, "01J")},
		},
		"queries",
		[]any{
			pairs{"queryId", "1", "mapName", "m", "filter", 5},
			pairs{"queryId", "2", "mapName", "m", "limit", -1},
			pairs{"queryId", "3", "mapName", "", "filter", pairs{}},
			pairs{"queryId", "4", "mapName", "m", "filter", nil, "limit", 3.0, "offset", 1, "cursor", "c"},
		},
		"searches",
		[]any{pairs{"searchId", "s", "mapName", "m", "query", "x", "options", pairs{}}},
	})
	r, err := wire.DecodeSyncRequest(body, wire.DefaultLimits())
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, op := range r.Operations {
		got = append(got, name(op.Err))
	}
	for _, m := range r.SyncMaps {
		got = append(got, name(m.Err))
	}
	for _, q := range r.Queries {
		got = append(got, q.QueryID+name(q.Err))
	}
	want := []string{"BAD_KEY", "", "BAD_NAME", "BAD_MESSAGE", "", "1BAD_MESSAGE", "2BAD_MESSAGE", "3BAD_NAME", "4"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got, want := r.SyncMaps[2].LastSync, (hlc.Timestamp{Millis: 5, Counter: 6, NodeID: "01J"}); got != want {
		t.Errorf("LastSync = %v, want %v", got, want)
	}
	if q := r.Queries[3]; q.Limit != 3 || q.Offset != 1 || q.Cursor != "c" || q.Where != nil {
		t.Errorf("query is %+v", q)
	}
	if diff := cmp.Diff([]wire.HTTPSearch{{SearchID: "s", MapName: "m", Query: "x"}}, r.Searches); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func name(err *wire.Error) string {
	if err == nil {
		return ""
	}
	return err.Name
}

func TestHTTPErrors(t *testing.T) {
	for name, body := range map[string][]byte{
		"no map":             pack(nil, 5),
		"truncated":          {0x81},
		"trailing byte":      {0x80, 0},
		"operations no list": pack(nil, pairs{"operations", pairs{}}),
		"syncMaps no list":   pack(nil, pairs{"syncMaps", "m"}),
		"syncMap no map":     pack(nil, pairs{"syncMaps", []any{1}}),
		"query without id":   pack(nil, pairs{"queries", []any{pairs{"mapName", "m"}}}),
		"clock is text":      pack(nil, pairs{"clientHlc", "now"}),
		"integer key":        pack(nil, pairs{1, 2}),
	} {
		if _, err := wire.DecodeSyncRequest(body, wire.DefaultLimits()); errName(err) != wire.BadMessage {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, decode := range []func([]byte, wire.Limits) (*wire.SyncRequest, error){wire.DecodeSyncRequest, wire.DecodeSyncRequestJSON} {
		if r, err := decode(nil, wire.DefaultLimits()); err != nil || !cmp.Equal(r, &wire.SyncRequest{}) {
			t.Errorf("an empty body: %v, %v", r, err)
		}
	}
	if _, err := wire.DecodeSyncRequestJSON([]byte("{"), wire.DefaultLimits()); errName(err) != wire.BadMessage {
		t.Errorf("broken JSON: %v", err)
	}
	many := make([]any, 257)
	for i := range many {
		many[i] = pairs{"mapName", "m"}
	}
	if _, err := wire.DecodeSyncRequest(pack(nil, pairs{"syncMaps", many}), wire.DefaultLimits()); errName(err) != wire.QueryTooComplex {
		t.Errorf("257 maps: %v", err)
	}
}

// A response in JSON leaves out what JSON cannot say, and says so.
func TestHTTPJSONLeavesOut(t *testing.T) {
	ts := hlc.Timestamp{Millis: 1, NodeID: "a"}
	bin := []byte{0xc4, 0}
	r := &wire.SyncResponse{
		ServerHLC: ts,
		Deltas: []wire.Delta{{MapName: "m", Records: []wire.DeltaRecord{
			{Key: "k1", Record: lwwmap.Record{Value: bin, Timestamp: ts}},
			{Key: "k2", Record: lwwmap.Record{Timestamp: ts}},
		}, ServerSyncTimestamp: ts, HasMore: true}},
		QueryResults: []wire.HTTPQueryResult{{QueryID: "q", Results: []wire.KeyValue{{Key: "k1", Value: bin}, {Key: "k3", Value: []byte{3}}}}},
		Errors:       []wire.SyncError{{Code: 403, Message: "no", Context: "x\x00\xff"}},
	}
	const stampJSON = `{"millis":1,"counter":0,"nodeId":"a"}`
	want := `{"serverHlc":` + stampJSON +
		`,"deltas":[{"mapName":"m","records":[{"key":"k2","record":{"value":null,"timestamp":` + stampJSON + `},"eventType":"REMOVE"}],"serverSyncTimestamp":` + stampJSON + `,"hasMore":true}]` +
		`,"queryResults":[{"queryId":"q","results":[{"key":"k3","value":3}],"hasMore":false}]` +
		`,"errors":[{"code":403,"message":"no","context":"x` + "\ufffd\ufffd" + `"}` +
		`,{"code":406,"message":"a value has no JSON form; ask for application/x-msgpack","context":"m"}` +
		`,{"code":406,"message":"a value has no JSON form; ask for application/x-msgpack","context":"q"}]}`
	if diff := cmp.Diff(want, string(r.AppendJSON(nil))); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if len(r.Deltas[0].Records) != 2 || len(r.QueryResults[0].Results) != 2 || len(r.Errors) != 1 {
		t.Error("AppendJSON changed the response")
	}
	broken := &wire.SyncResponse{ServerHLC: ts, Ack: &wire.SyncAck{LastID: "\xff"}}
	want = `{"serverHlc":` + stampJSON + `,"errors":[{"code":406,"message":"a value has no JSON form; ask for application/x-msgpack"}]}`
	if got := string(broken.AppendJSON(nil)); got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
}

// An OR-map is asked for by a type, and its changes come apart from those of
// LWW-maps, in msgpack and in JSON.
func TestHTTPORMaps(t *testing.T) {
	body := func(maps ...any) []byte { return pack(nil, pairs{"clientId", "c", "syncMaps", maps}) }
	packed := body(
		pairs{"mapName", "m", "type", "OR", "lastSyncTimestamp", stamp(1, 2, "01J")},
		pairs{"mapName", "m", "type", "LWW"},
		pairs{"mapName", "m", "type", nil},
		pairs{"mapName", "m", "type", "or"},
		pairs{"mapName", "m", "type", 5},
	)
	const plain = `{"clientId":"c","syncMaps":[{"mapName":"m","type":"OR","lastSyncTimestamp":{"millis":1,"counter":2,"nodeId":"01J"}},` +
		`{"mapName":"m","type":"LWW"},{"mapName":"m","type":null},{"mapName":"m","type":"or"},{"mapName":"m","type":5}]}`
	fromMsgpack, err1 := wire.DecodeSyncRequest(packed, wire.DefaultLimits())
	fromText, err2 := wire.DecodeSyncRequestJSON([]byte(plain), wire.DefaultLimits())
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	for _, r := range []*wire.SyncRequest{fromMsgpack, fromText} {
		m := r.SyncMaps
		if !m[0].OR || m[1].OR || m[2].OR || name(m[0].Err)+name(m[1].Err)+name(m[2].Err) != "" {
			t.Errorf("got %+v", m[:3])
		}
		if name(m[3].Err) != wire.BadMessage || name(m[4].Err) != wire.BadMessage {
			t.Errorf("unknown types: %v, %v", m[3].Err, m[4].Err)
		}
	}

	ts := hlc.Timestamp{Millis: 1, NodeID: "a"}
	null := []byte{0xc0}
	r := &wire.SyncResponse{ServerHLC: ts, ORDeltas: []wire.ORDelta{{
		MapName: "m",
		Entries: []wire.OREntry{
			{Key: "k", Records: []wire.ORRecord{{Tag: "1:0:a", Record: lwwmap.Record{Value: null, Timestamp: ts, TTLMillis: 5}}}, Tombstones: []string{"0:0:b"}},
			{Key: "bin", Records: []wire.ORRecord{{Tag: "1:0:a", Record: lwwmap.Record{Value: []byte{0xc4, 0}, Timestamp: ts}}, {Tag: "\xff", Record: lwwmap.Record{Value: null, Timestamp: ts}}}, Tombstones: []string{"x\x00"}},
			{Key: "\xff"},
		},
		ServerSyncTimestamp: ts, HasMore: true,
	}}}
	again, err := wire.DecodeSyncResponse(r.AppendTo(nil))
	if err != nil {
		t.Fatal(err)
	}
	// What is not there is an array of nothing.
	if diff := cmp.Diff(r, again, sameEmpty); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	const stampJSON = `{"millis":1,"counter":0,"nodeId":"a"}`
	want := `{"serverHlc":` + stampJSON + `,"orDeltas":[{"mapName":"m","entries":[` +
		`{"key":"k","records":[{"value":null,"timestamp":` + stampJSON + `,"ttlMs":5,"tag":"1:0:a"}],"tombstones":["0:0:b"]},` +
		`{"key":"bin","records":[],"tombstones":[]}],"serverSyncTimestamp":` + stampJSON + `,"hasMore":true}],` +
		`"errors":[{"code":406,"message":"a value has no JSON form; ask for application/x-msgpack","context":"m"}]}`
	if diff := cmp.Diff(want, string(r.AppendJSON(nil))); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if len(r.ORDeltas[0].Entries) != 3 || len(r.ORDeltas[0].Entries[1].Records) != 2 {
		t.Error("AppendJSON changed the response")
	}
}

// sameEmpty takes nil and empty slices of strings, records and entries as equal.
var sameEmpty = cmp.FilterValues(func(a, b any) bool { return empty(a) && empty(b) }, cmp.Ignore())

func empty(v any) bool {
	switch v := v.(type) {
	case []string:
		return len(v) == 0
	case []wire.ORRecord:
		return len(v) == 0
	case []wire.OREntry:
		return len(v) == 0
	}
	return false
}

// nested returns a value of containers within containers.
func nested(depth int) raw { return append(bytes.Repeat([]byte{0x91}, depth), 0xc0) }

// The item of a query amounts to a map Q of PROTOCOL 12.1.
func TestHTTPQueryMap(t *testing.T) {
	predicate := pairs{"op", "gt", "attribute", "n", "value", 1}
	sort := []any{pairs{"field", "n", "direction", "desc"}}
	sum := []any{pairs{"func", "sum", "field", "n"}}
	for _, c := range []struct {
		name string
		item pairs
		want any // nil: no map
		err  string
	}{
		{"nothing", pairs{}, nil, ""},
		{"nils and zeros", pairs{"filter", nil, "predicate", nil, "sort", nil, "limit", 0, "cursor", ""}, nil, ""},
		{"a filter", pairs{"filter", pairs{"a", 1}}, pairs{"where", pairs{"a", 1}}, ""},
		{
			"everything",
			pairs{
				"cursor", "c", "offset", 2.0, "limit", 3, "aggregations", sum, "groupBy",
				[]any{"g"},
				"fields",
				[]any{"f"},
				"sort", sort, "predicate", predicate, "filter",
				pairs{},
				"unknown", 1,
			},
			pairs{
				"where",
				pairs{},
				"predicate", predicate, "sort", sort, "fields",
				[]any{"f"},
				"groupBy",
				[]any{"g"},
				"aggregations", sum, "limit", 3, "offset", 2, "cursor", "c",
			},
			"",
		},
		{"the last of equal fields", pairs{"predicate", 5, "predicate", predicate}, pairs{"predicate", predicate}, ""},
		{"a filter that is large", pairs{"filter", pairs{"a", strings.Repeat("x", 64<<10)}}, nil, wire.QueryTooComplex},
		{"a predicate that is large", pairs{"predicate", strings.Repeat("x", 64<<10+1)}, nil, wire.QueryTooComplex},
		{"parts that are large together", pairs{"predicate", strings.Repeat("x", 33<<10), "sort", strings.Repeat("x", 33<<10)}, nil, wire.QueryTooComplex},
		{"a predicate nested 127 deep", pairs{"predicate", nested(127)}, pairs{"predicate", nested(127)}, ""},
		{"a predicate nested 128 deep", pairs{"predicate", nested(128)}, nil, wire.QueryTooComplex},
		{"a fraction as limit", pairs{"limit", 1.5, "predicate", predicate}, nil, wire.BadMessage},
	} {
		body := pack(nil, pairs{"queries", []any{append(pairs{"queryId", "q", "mapName", "m"}, c.item...)}})
		r, err := wire.DecodeSyncRequest(body, wire.DefaultLimits())
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		q := r.Queries[0]
		var want []byte
		if c.want != nil {
			want = pack(nil, c.want)
		}
		if name(q.Err) != c.err || show(q.Query) != show(want) {
			t.Errorf("%s: %v, %s, want %s", c.name, q.Err, show(q.Query), show(want))
		}
		if c.err != "" {
			continue
		}
		again, err := wire.DecodeSyncRequest(r.AppendTo(nil), wire.DefaultLimits())
		if diff := cmp.Diff(r, again); err != nil || diff != "" {
			t.Errorf("%s: %v (-first +again):\n%s", c.name, err, diff)
		}
	}
}
