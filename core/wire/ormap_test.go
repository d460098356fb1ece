package wire_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/wire"
)

func push(entries ...any) []byte {
	return pack(nil, pairs{"type", "ORMAP_PUSH_DIFF", "payload", pairs{"mapName", "tags", "entries", entries}})
}

func entry(key any, records, tombstones any) pairs {
	return pairs{"key", key, "records", records, "tombstones", tombstones}
}

func orRecord(value, ts any, more ...any) pairs {
	return append(pairs{"value", value, "timestamp", ts, "tag", "t"}, more...)
}

func decodeAs[M wire.Message](t testing.TB, frame []byte) M {
	t.Helper()
	m, err := wire.DecodeClient(frame, wire.DefaultLimits())
	if err != nil {
		t.Fatal(err)
	}
	return m.(M)
}

// What must not be stored is left out, with the reason, and the rest counts.
func TestPushLeavesOut(t *testing.T) {
	good := entry("good", []any{orRecord(1, goodStamp)}, []any{"x"})
	for _, c := range []struct {
		name  string
		entry pairs
		keys  int // how many of the two entries are kept
		want  string
	}{
		{"good", entry("k", []any{orRecord(1, goodStamp)}, []any{"a", "b"}), 2, ""},
		{"nothing", entry("k", []any{}, []any{}), 2, ""},
		{"nils", entry("k", nil, nil), 2, ""},
		{"only a key", pairs{"key", "k"}, 2, ""},
		{"a stamp of a server", entry("k", []any{orRecord(1, stamp(1, 0, "topgun-3"))}, nil), 2, ""},
		{"a stamp of an expiry", entry("k", []any{orRecord(1, stamp(1, 0, strings.Repeat("n", 128)+"-ttl"))}, nil), 2, ""},
		{"an empty key", entry("", nil, nil), 1, wire.BadKey},
		{"a key that is not UTF-8", entry("\xed\xa0\xbd", nil, nil), 1, wire.BadKey},
		{"a reserved key", entry("__proto__", nil, nil), 1, wire.ReservedName},
		{"a stamp with :", entry("k", []any{orRecord(1, stamp(1, 0, "a:b"))}, nil), 2, wire.BadTimestamp},
		{"a stamp of nobody", entry("k", []any{orRecord(1, stamp(1, 0, ""))}, nil), 2, wire.BadTimestamp},
		{"a stamp with a long node", entry("k", []any{orRecord(1, stamp(1, 0, strings.Repeat("n", 257)))}, nil), 2, wire.BadTimestamp},
		{"no stamp", entry("k", []any{pairs{"value", 1, "tag", "t"}}, nil), 2, wire.BadMessage},
		{"no tag", entry("k", []any{pairs{"value", 1, "timestamp", goodStamp}}, nil), 2, wire.BadMessage},
		{"a tag of 257 bytes", entry("k", []any{orRecord(1, goodStamp, "tag", strings.Repeat("t", 257))}, nil), 2, wire.BadMessage},
		{"a ttl of -1", entry("k", []any{orRecord(1, goodStamp, "ttlMs", -1)}, nil), 2, wire.BadTTL},
		{"a large value", entry("k", []any{orRecord(strings.Repeat("v", 256<<10), goodStamp)}, nil), 2, wire.ValueTooLarge},
		{"a value with a field __proto__", entry("k", []any{orRecord(pairs{"__proto__", 1}, goodStamp)}, nil), 2, wire.ReservedName},
		{"a record that is a number", entry("k", []any{5, orRecord(1, goodStamp)}, nil), 2, wire.BadMessage},
		{"an empty tombstone", entry("k", nil, []any{"a", "", "b"}), 2, wire.BadMessage},
		{"a long tombstone", entry("k", nil, []any{strings.Repeat("t", 257)}), 2, wire.BadMessage},
		{"a tombstone with NUL", entry("k", nil, []any{"a\x00"}), 2, wire.BadMessage},
	} {
		m := decodeAs[*wire.ORMapPushDiff](t, push(c.entry, good))
		if name(m.Err) != c.want || len(m.Entries) != c.keys {
			t.Errorf("%s: %v, %d entries, want %q and %d", c.name, m.Err, len(m.Entries), c.want, c.keys)
			continue
		}
		for _, e := range m.Entries {
			for _, tag := range e.Tombstones {
				if tag == "" || len(tag) > 256 || strings.Contains(tag, "\x00") {
					t.Errorf("%s: kept the tombstone %q", c.name, tag)
				}
			}
		}
		last := m.Entries[len(m.Entries)-1]
		want := wire.OREntry{
			Key: "good", Tombstones: []string{"x"},
			Records: []wire.ORRecord{{Tag: "t", Record: lwwmap.Record{Value: []byte{1}, Timestamp: hlc.Timestamp{Millis: 1700000000000, Counter: 1, NodeID: "client-a"}}}},
		}
		if diff := cmp.Diff(want, last); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
	}
	broken := slices.Repeat([]any{entry("", nil, nil)}, 1001)
	if m := decodeAs[*wire.ORMapPushDiff](t, push(append(broken[:1000:1000], good)...)); len(m.Entries) != 1 || name(m.Err) != wire.BadKey {
		t.Errorf("1000 broken entries: %d kept, %v", len(m.Entries), m.Err)
	}
	if _, err := wire.DecodeClient(push(broken...), wire.DefaultLimits()); errName(err) != wire.BadKey {
		t.Errorf("1001 broken entries: %v", err)
	}
	m := decodeAs[*wire.ORMapPushDiff](t, push(entry("k", []any{orRecord(nil, goodStamp, "ttlMs", 7), pairs{"timestamp", goodStamp, "tag", "u"}}, nil)))
	if r := m.Entries[0].Records; len(r) != 2 || string(r[0].Record.Value) != "\xc0" || r[0].Record.TTLMillis != 7 || string(r[1].Record.Value) != "\xc0" {
		t.Errorf("records of nil: %+v", r)
	}
}

func TestPushRefused(t *testing.T) {
	for name, frame := range map[string][]byte{
		"entries is a map":     pack(nil, pairs{"type", "ORMAP_PUSH_DIFF", "payload", pairs{"mapName", "m", "entries", pairs{}}}),
		"an entry is a number": push(5),
		"an entry without key": push(pairs{"records", []any{}}),
		"a key is a number":    push(entry(5, nil, nil)),
		"records is a map":     push(entry("k", pairs{}, nil)),
		"tombstones is a map":  push(entry("k", nil, pairs{})),
		"a tombstone is nil":   push(entry("k", nil, []any{nil})),
		"an integer key":       push(append(entry("k", nil, nil), 5, 5)),
		"keys is text":         pack(nil, pairs{"type", "ORMAP_DIFF_REQUEST", "payload", pairs{"mapName", "m", "keys", "k"}}),
		"keys are numbers":     pack(nil, pairs{"type", "ORMAP_DIFF_REQUEST", "payload", pairs{"mapName", "m", "keys", []any{1}}}),
		"a cursor of -1":       pack(nil, pairs{"type", "CLIENT_APPLY_ACK", "cursor", -1}),
		"a path of 4 digits":   pack(nil, pairs{"type", "ORMAP_MERKLE_REQ_BUCKET", "payload", pairs{"mapName", "m", "path", "8722"}}),
		"no payload":           pack(nil, pairs{"type", "ORMAP_PUSH_DIFF"}),
	} {
		if m, err := wire.DecodeClient(frame, wire.DefaultLimits()); errName(err) != wire.BadMessage {
			t.Errorf("%s: %v, %v", name, m, err)
		}
	}
	for _, typ := range []string{"ORMAP_PUSH_DIFF", "ORMAP_DIFF_REQUEST", "ORMAP_MERKLE_REQ_BUCKET"} {
		frame := pack(nil, pairs{"type", typ, "payload", pairs{"mapName", "$devices"}})
		if _, err := wire.DecodeClient(frame, wire.DefaultLimits()); errName(err) != wire.BadName {
			t.Errorf("%s of an internal map: %v", typ, err)
		}
	}
	ask := func(n int, key string) []byte {
		keys := make([]any, n)
		for i := range keys {
			keys[i] = key
		}
		return pack(nil, pairs{"type", "ORMAP_DIFF_REQUEST", "payload", pairs{"mapName", "m", "keys", keys}})
	}
	if m := decodeAs[*wire.ORMapDiffRequest](t, ask(1000, "k")); len(m.Keys) != 1000 {
		t.Errorf("%d keys, want 1000", len(m.Keys))
	}
	if _, err := wire.DecodeClient(ask(1001, "k"), wire.DefaultLimits()); errName(err) != wire.TooManyOps {
		t.Errorf("1001 keys: %v", err)
	}
	if _, err := wire.DecodeClient(ask(1, "a\x00"), wire.DefaultLimits()); errName(err) != wire.BadKey {
		t.Errorf("a key with NUL: %v", err)
	}
}

// The TypeScript client repeats the tombstones of the whole map in each entry
// (PROTOCOL 9.2): they are read once.
func TestPushSharesTombstones(t *testing.T) {
	tags := make([]any, 1000)
	for i := range tags {
		tags[i] = fmt.Sprintf("1760000000%03d:0:client-a", i)
	}
	var list []any
	for i := range 200 {
		list = append(list, entry(fmt.Sprint("k", i), []any{orRecord(1, goodStamp)}, tags))
	}
	list = append(list, entry("other", nil, tags[:999]))
	frame := push(list...)
	m := decodeAs[*wire.ORMapPushDiff](t, frame)
	first := m.Entries[0].Tombstones
	for _, e := range m.Entries[1:200] {
		if len(e.Tombstones) != 1000 || unsafe.SliceData(e.Tombstones) != unsafe.SliceData(first) {
			t.Fatal("equal tombstones are not shared")
		}
	}
	if first[999] != tags[999] || len(m.Entries[200].Tombstones) != 999 {
		t.Errorf("the last is %q; the other entry has %d", first[999], len(m.Entries[200].Tombstones))
	}
	if n := testing.AllocsPerRun(5, func() { decodeAs[*wire.ORMapPushDiff](t, frame) }); n > 4*200 {
		t.Errorf("decoding allocates %v times", n)
	}
	// No tag keeps the frame, and all of a list keep one copy of it.
	within := func(s string) bool {
		from := uintptr(unsafe.Pointer(unsafe.SliceData(frame)))
		p := uintptr(unsafe.Pointer(unsafe.StringData(s)))
		return from <= p && p < from+uintptr(len(frame))
	}
	if within(first[0]) || within(m.Entries[0].Records[0].Tag) || within(m.Entries[0].Key) {
		t.Error("a tag or a key is no copy")
	}
}

// Events of OR-maps hold a tag, and what a client cannot do without.
func TestOREvents(t *testing.T) {
	event := func(fields ...any) []byte {
		return pack(nil, pairs{"type", "SERVER_EVENT", "payload", append(pairs{"mapName", "m", "key", "k"}, fields...)})
	}
	ts := hlc.Timestamp{Millis: 1700000000000, Counter: 1, NodeID: "client-a"}
	for _, c := range []struct {
		name  string
		frame []byte
		want  *wire.Event // nil: refused
	}{
		{
			"OR_ADD of nil", event("orRecord", orRecord(nil, goodStamp, "ttlMs", 5), "eventType", "OR_ADD"),
			&wire.Event{MapName: "m", Key: "k", EventType: wire.OpORAdd, HasRecord: true, Tag: "t", Record: lwwmap.Record{Value: []byte{0xc0}, Timestamp: ts, TTLMillis: 5}},
		},
		{
			"OR_REMOVE with what it has no use for", event("orTag", "t", "eventType", "OR_REMOVE", "record", pairs{"value", 1, "timestamp", goodStamp}),
			&wire.Event{MapName: "m", Key: "k", EventType: wire.OpORRemove, Tag: "t"},
		},
		{
			"PUT with what it has no use for", event("eventType", "PUT", "record", pairs{"value", 1, "timestamp", goodStamp}, "orTag", "t", "orRecord", orRecord(2, goodStamp)),
			&wire.Event{MapName: "m", Key: "k", EventType: wire.OpPut, HasRecord: true, Record: lwwmap.Record{Value: []byte{1}, Timestamp: ts}},
		},
		{"OR_ADD without record", event("eventType", "OR_ADD", "orRecord", nil), nil},
		{"OR_ADD with an LWW record", event("eventType", "OR_ADD", "record", pairs{"value", 1, "timestamp", goodStamp}), nil},
		{"OR_ADD without tag", event("eventType", "OR_ADD", "orRecord", pairs{"value", 1, "timestamp", goodStamp}), nil},
		{"OR_REMOVE without tag", event("eventType", "OR_REMOVE"), nil},
		{"no kind", event("orTag", "t"), nil},
	} {
		m, err := wire.DecodeServer(c.frame)
		if c.want == nil {
			if errName(err) != wire.BadMessage {
				t.Errorf("%s: %v, %v", c.name, m, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if diff := cmp.Diff(&wire.ServerEvent{Event: *c.want}, m); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
		if again, err := wire.DecodeServer(m.AppendTo(nil)); err != nil || !cmp.Equal(m, again) {
			t.Errorf("%s again: %v, %v", c.name, again, err)
		}
	}
	batch := &wire.ServerBatchEvent{Events: []wire.Event{
		{MapName: "m", Key: "k", EventType: wire.OpORAdd, HasRecord: true, Tag: "t", Record: lwwmap.Record{Value: []byte{1}, Timestamp: ts}},
		{MapName: "m", Key: "k", EventType: wire.OpORRemove, Tag: "t"},
		{MapName: "m", Key: "k", EventType: wire.OpRemove, HasRecord: true, Record: lwwmap.Record{Timestamp: ts}},
	}}
	if again, err := wire.DecodeServer(batch.AppendTo(nil)); err != nil || !cmp.Equal(again, wire.Message(batch)) {
		t.Errorf("%v (-want +got):\n%s", err, cmp.Diff(wire.Message(batch), again))
	}
}

func TestORResponses(t *testing.T) {
	ts := hlc.Timestamp{Millis: 1, NodeID: "topgun-3"}
	for _, m := range []wire.Message{
		&wire.ORMapSyncRespRoot{MapName: "m", RootHash: 5, Timestamp: ts, FullResync: true},
		&wire.GCPrune{OlderThan: hlc.Timestamp{Millis: 5}},
		&wire.ORMapDiffRequest{MapName: "m", Keys: []string{"a", "b"}},
	} {
		decode := wire.DecodeServer
		if _, ok := m.(*wire.ORMapDiffRequest); ok {
			decode = func(b []byte) (wire.Message, error) { return wire.DecodeClient(b, wire.DefaultLimits()) }
		}
		if again, err := decode(m.AppendTo(nil)); err != nil || !cmp.Equal(again, m) {
			t.Errorf("%v (-want +got):\n%s", err, cmp.Diff(m, again))
		}
	}
	leaf := func(entry pairs) []byte {
		return pack(nil, pairs{"type", "ORMAP_SYNC_RESP_LEAF", "payload", pairs{"mapName", "m", "path", "", "entries", []any{entry}}})
	}
	for name, frame := range map[string][]byte{
		"a root without stamp":   pack(nil, pairs{"type", "ORMAP_SYNC_RESP_ROOT", "payload", pairs{"mapName", "m", "rootHash", 0}}),
		"a prune without stamp":  pack(nil, pairs{"type", "GC_PRUNE", "payload", pairs{}}),
		"an entry without key":   leaf(pairs{"records", []any{}, "tombstones", []any{}}),
		"a record without tag":   leaf(entry("k", []any{pairs{"value", 1, "timestamp", goodStamp}}, nil)),
		"a record without stamp": leaf(entry("k", []any{pairs{"value", 1, "tag", "t"}}, nil)),
	} {
		if m, err := wire.DecodeServer(frame); errName(err) != wire.BadMessage {
			t.Errorf("%s: %v, %v", name, m, err)
		}
	}
}
