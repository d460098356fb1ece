package wire_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/msgval"
	"github.com/topgun-sync/topgun/core/wire"
)

// pack builds msgpack from Go values, in the order given, which a map of Go
// would not keep: a pairs is a map.
type pairs []any

type raw []byte

func pack(dst []byte, v any) []byte {
	switch v := v.(type) {
	case nil:
		return msgval.AppendNil(dst)
	case bool:
		return msgval.AppendBool(dst, v)
	case int:
		return msgval.AppendInt(dst, int64(v))
	case uint64:
		return msgval.AppendUint(dst, v)
	case float64:
		return msgval.AppendFloat(dst, v)
	case string:
		return msgval.AppendString(dst, v)
	case raw:
		return append(dst, v...)
	case []byte:
		return msgval.AppendBin(dst, v)
	case []any:
		dst = msgval.AppendArrayHeader(dst, len(v))
		for _, e := range v {
			dst = pack(dst, e)
		}
		return dst
	case pairs:
		dst = msgval.AppendMapHeader(dst, len(v)/2)
		for _, e := range v {
			dst = pack(dst, e)
		}
		return dst
	}
	panic(fmt.Sprintf("pack %T", v))
}

func stamp(millis, counter, node any) pairs {
	return pairs{"millis", millis, "counter", counter, "nodeId", node}
}

var goodStamp = stamp(1700000000000.0, 1, "client-a")

// opWith returns a good PUT with the fields of edit in place of its own.
func opWith(edit ...any) pairs {
	op := pairs{
		"mapName", "users", "opType", "PUT", "key", "alice",
		"record",
		pairs{"value", pairs{"n", 1}, "timestamp", goodStamp},
		"timestamp", goodStamp, "synced", false, "id", "17",
	}
	for i := 0; i < len(edit); i += 2 {
		found := false
		for j := 0; j < len(op); j += 2 {
			if op[j] == edit[i] {
				op[j+1], found = edit[i+1], true
			}
		}
		if !found {
			op = append(op, edit[i], edit[i+1])
		}
	}
	return op
}

func without(op pairs, field string) pairs {
	for j := 0; j < len(op); j += 2 {
		if op[j] == field {
			return append(op[:j:j], op[j+2:]...)
		}
	}
	return op
}

func batch(ops ...any) []byte {
	return pack(nil, pairs{"type", "OP_BATCH", "payload", pairs{"ops", ops}})
}

func decodeOp(t testing.TB, op any) wire.Op {
	t.Helper()
	m, err := wire.DecodeClient(batch(op), wire.DefaultLimits())
	if err != nil {
		t.Fatal(err)
	}
	return m.(*wire.OpBatch).Ops[0]
}

func errName(err error) string {
	var e *wire.Error
	if errors.As(err, &e) {
		return e.Name
	}
	return fmt.Sprint(err)
}

func TestFrameErrors(t *testing.T) {
	good := batch(opWith())
	for _, c := range []struct {
		name  string
		frame []byte
		want  string
	}{
		{"empty", nil, wire.BadMessage},
		{"not msgpack", []byte{0xc1}, wire.BadMessage},
		{"trailing byte", append(bytes.Clone(good), 0), wire.BadMessage},
		{"truncated", good[:len(good)-1], wire.BadMessage},
		{"an array", pack(nil, []any{"type", "PING"}), wire.BadMessage},
		{"nil", pack(nil, nil), wire.BadMessage},
		{"4 G of map", []byte{0xdf, 0xff, 0xff, 0xff, 0xff}, wire.BadMessage},
		{"4 G of ops", append(pack(nil, pairs{"type", "OP_BATCH", "payload", pairs{"ops", raw{}}})[:27], 0xdd, 0xff, 0xff, 0xff, 0xff), wire.BadMessage},
		{"100000 containers", append(bytes.Repeat([]byte{0x91}, 100000), 0xc0), wire.BadMessage},
		{"no type", pack(nil, pairs{"payload", pairs{}}), wire.BadMessage},
		{"type is no string", pack(nil, pairs{"type", 5}), wire.BadMessage},
		{"type is nil", pack(nil, pairs{"type", nil}), wire.BadMessage},
		{"type is empty", pack(nil, pairs{"type", ""}), wire.BadMessage},
		{"type is long", pack(nil, pairs{"type", strings.Repeat("X", 65)}), wire.BadMessage},
		{"integer key", pack(nil, pairs{5, 5, "type", "PING"}), wire.BadMessage},
		{"integer key in the payload", pack(nil, pairs{"type", "OP_BATCH", "payload", pairs{1, 2}}), wire.BadMessage},
		{"integer key in the payload of another type", pack(nil, pairs{"type", "SEARCH", "payload", pairs{1, 2}}), wire.BadMessage},
		{"no payload", pack(nil, pairs{"type", "OP_BATCH"}), wire.BadMessage},
		{"payload is no map", pack(nil, pairs{"type", "OP_BATCH", "payload", []any{}}), wire.BadMessage},
		{"no ops", pack(nil, pairs{"type", "OP_BATCH", "payload", pairs{}}), wire.BadMessage},
		{"ops is no array", pack(nil, pairs{"type", "OP_BATCH", "payload", pairs{"ops", pairs{}}}), wire.BadMessage},
		{"op is no map", batch(5), wire.BadMessage},
		{"op without id", batch(without(opWith(), "id")), wire.BadMessage},
		{"op with an empty id", batch(opWith("id", "")), wire.BadMessage},
		{"op with a fraction as id", batch(opWith("id", 1.5)), wire.BadMessage},
		{"op with a boolean as id", batch(opWith("id", true)), wire.BadMessage},
		{"op with a long id", batch(opWith("id", strings.Repeat("1", 129))), wire.BadMessage},
		{"op with an id that is not UTF-8", batch(opWith("id", "\xff")), wire.BadMessage},
		{"op with an integer key", batch(append(opWith(), 5, 5)), wire.BadMessage},
		{"unknown writeConcern", pack(nil, pairs{"type", "OP_BATCH", "payload", pairs{"ops", []any{}, "writeConcern", "ALL"}}), wire.BadMessage},
		{"timeout is negative", pack(nil, pairs{"type", "OP_BATCH", "payload", pairs{"ops", []any{}, "timeout", -1}}), wire.BadMessage},
		{"token is no string", pack(nil, pairs{"type", "AUTH", "token", 5}), wire.BadMessage},
		{"token is long", pack(nil, pairs{"type", "AUTH", "token", strings.Repeat("x", 8<<10+1)}), wire.BadMessage},
		{"PING with NaN", pack(nil, pairs{"type", "PING", "timestamp", math.NaN()}), wire.BadMessage},
		{"PING with text", pack(nil, pairs{"type", "PING", "timestamp", "now"}), wire.BadMessage},
		{"PING with -1", pack(nil, pairs{"type", "PING", "timestamp", -1}), wire.BadMessage},
		{"SYNC_INIT of nothing", pack(nil, pairs{"type", "SYNC_INIT", "lastSyncTimestamp", 0}), wire.BadName},
		{"SYNC_INIT of a reserved map", pack(nil, pairs{"type", "SYNC_INIT", "mapName", "__TopGun_x", "lastSyncTimestamp", 0}), wire.ReservedName},
		{"SYNC_INIT with NaN", pack(nil, pairs{"type", "SYNC_INIT", "mapName", "m", "lastSyncTimestamp", math.NaN()}), wire.BadMessage},
		{"SYNC_INIT with a fraction", pack(nil, pairs{"type", "SYNC_INIT", "mapName", "m", "lastSyncTimestamp", 1.5}), wire.BadMessage},
		{"path is upper case", pack(nil, pairs{"type", "MERKLE_REQ_BUCKET", "payload", pairs{"mapName", "m", "path", "A"}}), wire.BadMessage},
		{"path is long", pack(nil, pairs{"type", "MERKLE_REQ_BUCKET", "payload", pairs{"mapName", "m", "path", "8722"}}), wire.BadMessage},
		{"path is a number", pack(nil, pairs{"type", "MERKLE_REQ_BUCKET", "payload", pairs{"mapName", "m", "path", 8}}), wire.BadMessage},
		{"QUERY_SUB without id", pack(nil, pairs{"type", "QUERY_SUB", "payload", pairs{"mapName", "m", "query", pairs{}}}), wire.BadMessage},
		{"QUERY_UNSUB without id", pack(nil, pairs{"type", "QUERY_UNSUB", "payload", pairs{}}), wire.BadMessage},
		{"bucket hash is large", pack(nil, pairs{"type", "ORMAP_SYNC_INIT", "mapName", "m", "bucketHashes", pairs{"a", uint64(1 << 32)}}), wire.BadMessage},
		{"bucket is no digit", pack(nil, pairs{"type", "ORMAP_SYNC_INIT", "mapName", "m", "bucketHashes", pairs{"zz", 1}}), wire.BadMessage},
	} {
		m, err := wire.DecodeClient(c.frame, wire.DefaultLimits())
		if errName(err) != c.want || m != nil {
			t.Errorf("%s: %v, %v, want %s", c.name, m, err, c.want)
		}
	}
	_, err := wire.DecodeClient(nil, wire.DefaultLimits())
	if got, want := err.Error(), "BAD_MESSAGE: the msgpack is truncated"; got != want {
		t.Errorf("Error() = %q, want %q", got, want)
	}
	many := make([]any, 1001)
	for i := range many {
		many[i] = opWith()
	}
	if _, err := wire.DecodeClient(batch(many...), wire.DefaultLimits()); errName(err) != wire.TooManyOps {
		t.Errorf("1001 operations: %v", err)
	}
	if _, err := wire.DecodeClient(batch(many[:1000]...), wire.DefaultLimits()); err != nil {
		t.Errorf("1000 operations: %v", err)
	}
}

func TestOpErrors(t *testing.T) {
	rec := func(v, ts any, more ...any) pairs { return append(pairs{"value", v, "timestamp", ts}, more...) }
	nested := raw(append(bytes.Repeat([]byte{0x91}, 128), 0xc0))
	tooNested := raw(append(bytes.Repeat([]byte{0x91}, 129), 0xc0))
	for _, c := range []struct {
		name string
		op   pairs
		want string // empty: none
	}{
		{"good", opWith(), ""},
		{"no map", without(opWith(), "mapName"), wire.BadName},
		{"map is a number", opWith("mapName", 5), wire.BadMessage},
		{"map with /", opWith("mapName", "a/b"), wire.BadName},
		{"map with ..", opWith("mapName", "a..b"), wire.BadName},
		{"map with >", opWith("mapName", "a>"), wire.BadName},
		{"map with *", opWith("mapName", "*"), wire.BadName},
		{"map with space", opWith("mapName", "a b"), wire.BadName},
		{"map with CR", opWith("mapName", "a\r"), wire.BadName},
		{"map is $SYS", opWith("mapName", "$SYS"), wire.BadName},
		{"map of 128 bytes", opWith("mapName", strings.Repeat("m", 128)), ""},
		{"map of 300 bytes", opWith("mapName", strings.Repeat("m", 300)), wire.BadName},
		{"reserved prefix", opWith("mapName", "_TOPGUN_x"), wire.ReservedName},
		{"map is __proto__", opWith("mapName", "__proto__"), wire.ReservedName},
		{"map is constructor", opWith("mapName", "constructor"), wire.ReservedName},
		{"no key", without(opWith(), "key"), wire.BadKey},
		{"key is empty", opWith("key", ""), wire.BadKey},
		{"key with NUL", opWith("key", "a\x00"), wire.BadKey},
		{"key is not UTF-8", opWith("key", "\xed\xa0\xbd"), wire.BadKey},
		{"key of 512 bytes", opWith("key", strings.Repeat("k", 512)), ""},
		{"key of 513 bytes", opWith("key", strings.Repeat("k", 513)), wire.BadKey},
		{"key is prototype", opWith("key", "prototype"), wire.ReservedName},
		{"key is a map", opWith("key", pairs{}), wire.BadMessage},
		{"kind is unknown", opWith("opType", "MERGE"), wire.BadMessage},
		{"kind is a number", opWith("opType", 1), wire.BadMessage},
		{"no record", without(opWith(), "record"), wire.BadMessage},
		{"record is an array", opWith("record", []any{}), wire.BadMessage},
		{"record without stamp", opWith("record", pairs{"value", 1}), wire.BadMessage},
		{"record with an integer key", opWith("record", append(rec(1, goodStamp), 5, 5)), wire.BadMessage},
		{"stamp is text", opWith("record", rec(1, "now")), wire.BadMessage},
		{"stamp without counter", opWith("record", rec(1, pairs{"millis", 1, "nodeId", "a"})), wire.BadMessage},
		{"stamp with an integer key", opWith("record", rec(1, append(goodStamp[:6:6], 5, 5))), wire.BadMessage},
		{"millis NaN", opWith("record", rec(1, stamp(math.NaN(), 0, "a"))), wire.BadMessage},
		{"millis Inf", opWith("record", rec(1, stamp(math.Inf(1), 0, "a"))), wire.BadMessage},
		{"millis -0", opWith("record", rec(1, stamp(math.Copysign(0, -1), 0, "a"))), wire.BadMessage},
		{"millis -1", opWith("record", rec(1, stamp(-1, 0, "a"))), wire.BadMessage},
		{"millis -1.0", opWith("record", rec(1, stamp(-1.0, 0, "a"))), wire.BadMessage},
		{"millis 1.5", opWith("record", rec(1, stamp(1.5, 0, "a"))), wire.BadMessage},
		{"millis 2^53", opWith("record", rec(1, stamp(float64(1<<53), 0, "a"))), ""},
		{"millis above 2^53", opWith("record", rec(1, stamp(float64(1<<53+2), 0, "a"))), wire.BadMessage},
		{"millis 2^64-1", opWith("record", rec(1, stamp(uint64(math.MaxUint64), 0, "a"))), wire.BadMessage},
		{"millis text", opWith("record", rec(1, stamp("1", 0, "a"))), wire.BadMessage},
		{"counter NaN", opWith("record", rec(1, stamp(1, math.NaN(), "a"))), wire.BadMessage},
		{"counter as float", opWith("record", rec(1, stamp(1, 3.0, "a"))), ""},
		{"node empty", opWith("record", rec(1, stamp(1, 0, ""))), wire.BadTimestamp},
		{"node of 128 bytes", opWith("record", rec(1, stamp(1, 0, strings.Repeat("n", 128)))), ""},
		{"node of 129 bytes", opWith("record", rec(1, stamp(1, 0, strings.Repeat("n", 129)))), wire.BadTimestamp},
		{"node of 1000 bytes", opWith("record", rec(1, stamp(1, 0, strings.Repeat("n", 1000)))), wire.BadTimestamp},
		{"node with :", opWith("record", rec(1, stamp(1, 0, "a:b"))), wire.BadTimestamp},
		{"node with NUL", opWith("record", rec(1, stamp(1, 0, "a\x00"))), wire.BadTimestamp},
		{"node not UTF-8", opWith("record", rec(1, stamp(1, 0, "\xff"))), wire.BadTimestamp},
		{"node is a number", opWith("record", rec(1, stamp(1, 0, 7))), wire.BadMessage},
		{"node of a server", opWith("record", rec(1, stamp(1, 0, "topgun-3"))), wire.BadTimestamp},
		{"node like that of a server", opWith("record", rec(1, stamp(1, 0, "topgun-app"))), ""},
		{"op stamp NaN", opWith("timestamp", stamp(math.NaN(), 0, "a")), wire.BadMessage},
		{"ttl -1", opWith("record", rec(1, goodStamp, "ttlMs", -1)), wire.BadTTL},
		{"ttl NaN", opWith("record", rec(1, goodStamp, "ttlMs", math.NaN())), wire.BadTTL},
		{"ttl Inf", opWith("record", rec(1, goodStamp, "ttlMs", math.Inf(1))), wire.BadTTL},
		{"ttl text", opWith("record", rec(1, goodStamp, "ttlMs", "1")), wire.BadTTL},
		{"ttl ten years", opWith("record", rec(1, goodStamp, "ttlMs", 3650*24*3600*1000)), ""},
		{"ttl more", opWith("record", rec(1, goodStamp, "ttlMs", 3650*24*3600*1000+1)), wire.BadTTL},
		{"ttl nil", opWith("record", rec(1, goodStamp, "ttlMs", nil)), ""},
		{"value of 256 KiB", opWith("record", rec(strings.Repeat("v", 256<<10-5), goodStamp)), ""},
		{"value of more", opWith("record", rec(strings.Repeat("v", 256<<10-4), goodStamp)), wire.ValueTooLarge},
		{"value nested 128 deep", opWith("record", rec(nested, goodStamp)), ""},
		{"value nested 129 deep", opWith("record", rec(tooNested, goodStamp)), wire.ValueTooDeep},
		{"value with integer keys", opWith("record", rec(pairs{5, 5}, goodStamp)), ""},
		{"value with a field __proto__", opWith("record", rec([]any{1, pairs{"a", pairs{"__proto__", 1}}}, goodStamp)), wire.ReservedName},
		{"value with the text __proto__", opWith("record", rec([]any{"__proto__", pairs{"a", "__proto__"}}, goodStamp)), ""},
		{"value with a timestamp extension", opWith("record", rec([]any{raw([]byte{0xd6, 0xff, 0, 0, 0, 1})}, goodStamp)), ""},
		{"value with another extension", opWith("record", rec([]any{raw([]byte{0xd4, 5, 0})}, goodStamp)), wire.BadMessage},
		{"OR_ADD of another extension", opWith("record", nil, "opType", "OR_ADD", "orRecord", rec(raw([]byte{0xd4, 5, 0}), goodStamp, "tag", "t")), wire.BadMessage},
		{"REMOVE with a value", opWith("opType", "REMOVE"), wire.BadMessage},
		{"OR_ADD without record", opWith("opType", "OR_ADD"), wire.BadMessage},
		{"OR_ADD without tag", opWith("opType", "OR_ADD", "record", nil, "orRecord", rec(1, goodStamp)), wire.BadMessage},
		{"OR_ADD with an LWW record", opWith("opType", "OR_ADD", "orTag", "t"), wire.BadMessage},
		{"OR_ADD with a stamp of a server", opWith("record", nil, "opType", "OR_ADD", "orRecord", rec(1, stamp(1, 0, "topgun-3"), "tag", "t")), wire.BadTimestamp},
		{"OR_ADD without stamp", opWith("record", nil, "opType", "OR_ADD", "orRecord", pairs{"value", 1, "tag", "t"}), wire.BadMessage},
		{"OR_ADD with a tag of 256 bytes", opWith("record", nil, "opType", "OR_ADD", "orRecord", rec(1, goodStamp, "tag", strings.Repeat("t", 256))), ""},
		{"OR_ADD with a tag of 257 bytes", opWith("record", nil, "opType", "OR_ADD", "orRecord", rec(1, goodStamp, "tag", strings.Repeat("t", 257))), wire.BadMessage},
		{"OR_ADD with NUL in the tag", opWith("record", nil, "opType", "OR_ADD", "orRecord", rec(1, goodStamp, "tag", "a\x00")), wire.BadMessage},
		{"OR_ADD with a number as tag", opWith("record", nil, "opType", "OR_ADD", "orRecord", rec(1, goodStamp, "tag", 5)), wire.BadMessage},
		{"OR_ADD of a large value", opWith("record", nil, "opType", "OR_ADD", "orRecord", rec(strings.Repeat("v", 256<<10), goodStamp, "tag", "t")), wire.ValueTooLarge},
		{"OR_ADD of a deep value", opWith("record", nil, "opType", "OR_ADD", "orRecord", rec(tooNested, goodStamp, "tag", "t")), wire.ValueTooDeep},
		{"OR_ADD with a ttl of -1", opWith("record", nil, "opType", "OR_ADD", "orRecord", rec(1, goodStamp, "tag", "t", "ttlMs", -1)), wire.BadTTL},
		{"OR_REMOVE of a tag of 257 bytes", opWith("record", nil, "opType", "OR_REMOVE", "orTag", strings.Repeat("t", 257)), wire.BadMessage},
		{"OR_REMOVE of a tag that is not UTF-8", opWith("record", nil, "opType", "OR_REMOVE", "orTag", "\xff"), wire.BadMessage},
		{"OR_REMOVE of a number", opWith("record", nil, "opType", "OR_REMOVE", "orTag", 5), wire.BadMessage},
		{"both records", opWith("orRecord", rec(1, goodStamp, "tag", "t")), wire.BadMessage},
		{"OR_REMOVE without tag", opWith("opType", "OR_REMOVE"), wire.BadMessage},
		{"OR_REMOVE without stamp", without(opWith("opType", "OR_REMOVE", "orTag", "t"), "timestamp"), wire.BadMessage},
		{"REMOVE without record and stamp", without(without(opWith("opType", "REMOVE"), "timestamp"), "record"), wire.BadMessage},
		{"unknown writeConcern", opWith("writeConcern", "ALL"), wire.BadMessage},
	} {
		// The next operation is fine, and must stay so.
		m, err := wire.DecodeClient(batch(c.op, opWith("id", "18")), wire.DefaultLimits())
		if err != nil {
			t.Errorf("%s: the batch is refused: %v", c.name, err)
			continue
		}
		ops := m.(*wire.OpBatch).Ops
		got := ""
		if ops[0].Err != nil {
			got = ops[0].Err.Name
		}
		if got != c.want || ops[0].ID != "17" {
			t.Errorf("%s: %s of operation %s, want %s", c.name, got, ops[0].ID, c.want)
		}
		if ops[1].Err != nil || ops[1].ID != "18" {
			t.Errorf("%s: the next operation has %v", c.name, ops[1].Err)
		}
	}
}

func TestOpForms(t *testing.T) {
	ts := hlc.Timestamp{Millis: 1700000000000, Counter: 1, NodeID: "client-a"}
	want := wire.Op{
		ID: "17", MapName: "users", Key: "alice", Kind: wire.OpPut,
		Record: lwwmap.Record{Value: pack(nil, pairs{"n", 1}), Timestamp: ts},
	}
	tombstone := wire.Op{ID: "17", MapName: "users", Key: "alice", Kind: wire.OpRemove, Record: lwwmap.Record{Timestamp: ts}}
	added := wire.Op{ID: "17", MapName: "users", Key: "alice", Kind: wire.OpORAdd, Record: lwwmap.Record{Value: []byte{1}, Timestamp: ts, TTLMillis: 5}, Tag: "t"}
	dropped := wire.Op{ID: "17", MapName: "users", Key: "alice", Kind: wire.OpORRemove, Record: lwwmap.Record{Timestamp: ts}, Tag: "t"}
	null := pairs{"value", nil, "timestamp", goodStamp, "ttlMs", 5}
	orRecord := pairs{"value", 1, "timestamp", goodStamp, "tag", "t", "ttlMs", 5.0}
	addedNil := added
	addedNil.Record.Value = []byte{0xc0}
	withTTL := want
	withTTL.Record.TTLMillis = 1
	for _, c := range []struct {
		name string
		op   pairs
		want wire.Op
	}{
		{"PUT", opWith(), want},
		{"PUT by its record", without(opWith(), "opType"), want},
		{"PUT with nil or for the others", opWith("orRecord", nil, "orTag", nil), want},
		{"PUT with integers", opWith("record", pairs{"value", pairs{"n", 1}, "timestamp", stamp(1700000000000, 1.0, "client-a")}), want},
		{"PUT with a ttl below 1 ms", opWith("record", pairs{"value", pairs{"n", 1}, "timestamp", goodStamp, "ttlMs", 0.25}), withTTL},
		{"PUT of nil", opWith("record", null), tombstone},
		{"PUT without value", opWith("record", pairs{"timestamp", goodStamp}), tombstone},
		{"REMOVE", opWith("opType", "REMOVE", "record", null), tombstone},
		{"REMOVE by its record", without(opWith("record", null), "opType"), tombstone},
		{"REMOVE without record", opWith("opType", "REMOVE", "record", nil), tombstone},
		{"OR_ADD", opWith("opType", "OR_ADD", "record", nil, "orRecord", orRecord), added},
		{"OR_ADD of nil", opWith("opType", "OR_ADD", "record", nil, "orRecord", append(null[:6:6], "tag", "t")), addedNil},
		{"OR_ADD without value", opWith("opType", "OR_ADD", "record", nil, "orRecord", append(null[2:6:6], "tag", "t")), addedNil},
		{"OR_ADD by its record", without(without(opWith("orRecord", orRecord), "opType"), "record"), added},
		{"OR_REMOVE", opWith("opType", "OR_REMOVE", "record", nil, "orTag", "t"), dropped},
		{"OR_REMOVE by its tag", without(without(opWith("orTag", "t"), "opType"), "record"), dropped},
		{"last of equal keys", append(pairs{"id", "1", "mapName", 5, "key", nil, "record", 7, "timestamp", 9, "opType", "x"}, opWith()...), want},
		{"last of equal keys in the record", opWith("record", pairs{"value", 9, "ttlMs", -5, "timestamp", 7, "timestamp", goodStamp, "ttlMs", 0, "value", pairs{"n", 1}}), want},
		{"last of equal keys in the stamp", opWith("record", pairs{"value", pairs{"n", 1}, "timestamp", append(pairs{"millis", "x", "nodeId", 3, "counter", -1}, goodStamp...)}), want},
	} {
		got := decodeOp(t, c.op)
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
	}
	m, err := wire.DecodeClient(pack(nil, pairs{"type", "CLIENT_OP", "payload", opWith()}), wire.DefaultLimits())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&wire.OpBatch{Ops: []wire.Op{want}}, m); diff != "" {
		t.Errorf("CLIENT_OP (-want +got):\n%s", diff)
	}
}

func TestFrameForms(t *testing.T) {
	query := raw(pack(nil, pairs{"where", pairs{"a", 1}}))
	sub := func(fields ...any) []byte {
		return pack(nil, pairs{"type", "QUERY_SUB", "payload", append(pairs{"queryId", "q"}, fields...)})
	}
	manyFields := make([]any, 257)
	for i := range manyFields {
		manyFields[i] = "f"
	}
	for _, c := range []struct {
		name  string
		frame []byte
		want  wire.Message
	}{
		{"payload before type", pack(nil, pairs{"payload", pairs{"queryId", "q"}, "x", 5, "type", "QUERY_UNSUB"}), &wire.QueryUnsub{QueryID: "q"}},
		{"last of equal keys", pack(nil, pairs{"type", "PING", "payload", 5, "type", "QUERY_UNSUB", "payload", pairs{"queryId", 5.0, "queryId", "q"}}), nil},
		{"last of equal payloads", pack(nil, pairs{"type", "PING", "payload", 5, "type", "QUERY_UNSUB", "payload", pairs{"queryId", "p", "queryId", "q"}}), &wire.QueryUnsub{QueryID: "q"}},
		{"SYNC_INIT with an integral float", pack(nil, pairs{"type", "SYNC_INIT", "mapName", "m", "lastSyncTimestamp", 1700000000000.0}), &wire.SyncInit{MapName: "m", LastSyncTimestamp: 1700000000000}},
		{"SYNC_INIT without timestamp", pack(nil, pairs{"type", "SYNC_INIT", "mapName", "m"}), &wire.SyncInit{MapName: "m"}},
		{"AUTH with nil", pack(nil, pairs{"type", "AUTH", "token", "t", "deviceToken", nil, "protocolVersion", 1.0}), &wire.Auth{Token: "t", ProtocolVersion: 1}},
		{"PING without timestamp", pack(nil, pairs{"type", "PING"}), &wire.Ping{}},
		{"QUERY_SUB", sub("mapName", "m", "query", query, "fields", []any{"a"}), &wire.QuerySub{QueryID: "q", MapName: "m", Query: query, Fields: []string{"a"}}},
		{"legacy ORMAP_SYNC_INIT", pack(nil, pairs{"type", "ORMAP_SYNC_INIT", "mapName", "m", "rootHash", 5, "bucketHashes", pairs{"a", 5.0}}), &wire.ORMapSyncInit{MapName: "m", RootHash: 5, BucketHashes: map[string]uint32{"a": 5}}},
	} {
		got, err := wire.DecodeClient(c.frame, wire.DefaultLimits())
		if c.want == nil {
			if errName(err) != wire.BadMessage {
				t.Errorf("%s: %v, %v", c.name, got, err)
			}
			continue
		}
		if diff := cmp.Diff(c.want, got); diff != "" || err != nil {
			t.Errorf("%s: %v (-want +got):\n%s", c.name, err, diff)
		}
	}
	for _, c := range []struct {
		name  string
		frame []byte
		want  string
	}{
		{"no map", sub("query", query), wire.BadName},
		{"map is a number", sub("mapName", 5, "query", query), wire.BadMessage},
		{"query is no map", sub("mapName", "m", "query", 5), wire.BadMessage},
		{"query is large", sub("mapName", "m", "query", pairs{"where", pairs{"a", strings.Repeat("x", 64<<10)}}), wire.QueryTooComplex},
		{"fields are numbers", sub("mapName", "m", "fields", []any{1, "a"}), wire.BadMessage},
		{"fields is text", sub("mapName", "m", "fields", "a"), wire.BadMessage},
		{"many fields", sub("mapName", "m", "fields", manyFields), wire.QueryTooComplex},
	} {
		m, err := wire.DecodeClient(c.frame, wire.DefaultLimits())
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if q := m.(*wire.QuerySub); q.QueryID != "q" || q.Err == nil || q.Err.Name != c.want {
			t.Errorf("%s: %v, want %s", c.name, q.Err, c.want)
		}
	}
}

// Types that only a server sends, BATCH among them, are no more than a name when
// a client sends them.
func TestServerTypesFromClient(t *testing.T) {
	for _, f := range frames(t, "frames-server.json") {
		m, err := wire.DecodeClient(unhex(t, f.MinimalHex), wire.DefaultLimits())
		if err != nil {
			t.Errorf("%s: %v", f.Name, err)
			continue
		}
		if _, ok := m.(*wire.Other); !ok {
			t.Errorf("%s is decoded as %T", f.Name, m)
		}
	}
}

// What a server sends is read with the least demands: any map name and node id,
// a tombstone with a ttl, which has none for us.
func TestServerRecordForms(t *testing.T) {
	ts := stamp(5, 0, "topgun-3")
	m, err := wire.DecodeServer(pack(nil, pairs{"type", "SERVER_EVENT", "timestamp", 5, "payload", pairs{
		"mapName", "a:b", "eventType", "REMOVE", "key", "\xff",
		"record",
		pairs{"value", nil, "timestamp", ts, "ttlMs", 60000},
	}}))
	if err != nil {
		t.Fatal(err)
	}
	want := &wire.ServerEvent{Event: wire.Event{
		MapName: "a:b", EventType: wire.OpRemove, Key: "\xff", HasRecord: true,
		Record: lwwmap.Record{Timestamp: hlc.Timestamp{Millis: 5, NodeID: "topgun-3"}},
	}}
	if diff := cmp.Diff(want, m); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for name, payload := range map[string]pairs{
		"no kind":        {"mapName", "m", "key", "k"},
		"unknown kind":   {"mapName", "m", "key", "k", "eventType", "MERGE"},
		"broken record":  {"mapName", "m", "key", "k", "eventType", "PUT", "record", pairs{"value", 1}},
		"negative stamp": {"mapName", "m", "key", "k", "eventType", "PUT", "record", pairs{"value", 1, "timestamp", stamp(-1, 0, "a")}},
	} {
		if m, err := wire.DecodeServer(pack(nil, pairs{"type", "SERVER_EVENT", "payload", payload})); errName(err) != wire.BadMessage {
			t.Errorf("%s: %v, %v", name, m, err)
		}
	}
}

func TestBatchLies(t *testing.T) {
	le := binary.LittleEndian.AppendUint32
	inner := (&wire.AuthRequired{}).AppendTo(nil)
	good := append(le(le(nil, 1), uint32(len(inner))), inner...)
	frame := func(data any) []byte { return pack(nil, pairs{"type", "BATCH", "count", 1, "data", data}) }
	if _, err := wire.DecodeServer(frame(good)); err != nil {
		t.Fatal(err)
	}
	nested := frame(good)
	for name, data := range map[string]any{
		"nothing":           []byte{},
		"no bin":            "text",
		"missing":           nil,
		"count too large":   append(le(nil, 2), good[4:]...),
		"count is 4 G":      append(le(nil, math.MaxUint32), good[4:]...),
		"count too small":   append(le(nil, 0), good[4:]...),
		"length too large":  append(le(le(nil, 1), uint32(len(inner)+1)), inner...),
		"length is 4 G":     append(le(le(nil, 1), math.MaxUint32), inner...),
		"length too small":  append(le(le(nil, 1), uint32(len(inner)-1)), inner...),
		"trailing byte":     append(bytes.Clone(good), 0),
		"truncated":         good[:len(good)-1],
		"BATCH in BATCH":    append(le(le(nil, 1), uint32(len(nested))), nested...),
		"an empty message":  le(le(nil, 1), 0),
		"big-endian length": append(binary.BigEndian.AppendUint32(nil, uint32(len(inner))), inner...),
	} {
		if m, err := wire.DecodeServer(frame(data)); errName(err) != wire.BadMessage {
			t.Errorf("%s: %v, %v", name, m, err)
		}
	}
}

func TestRefusals(t *testing.T) {
	// The shapes are those of the vectors and of PROTOCOL 15 and 16.
	refused := make(map[string]string)
	for _, f := range frames(t, "frames-client.json") {
		m, err := wire.DecodeClient(unhex(t, f.Hex), wire.DefaultLimits())
		if err != nil {
			t.Fatal(err)
		}
		o, ok := m.(*wire.Other)
		if !ok {
			continue
		}
		if r, ok := wire.RefusalFor(o, "not available"); ok {
			b := r.AppendTo(nil)
			check, err := wire.DecodeServer(b)
			if err != nil || check.Type() != r.Type() {
				t.Errorf("the refusal of %s is read as %v, %v", f.Name, check, err)
			}
			refused[f.Name] = show(b)
		}
	}
	const id = "00000000-0000-4000-8000-0000000000"
	hybrid := "HYBRID_SEARCH (queryVector arrives as a map, see msgpack.json)"
	vector := "VECTOR_SEARCH (queryVector arrives as a map, see msgpack.json)"
	want := map[string]string{
		"SEARCH":                 `{"type":"SEARCH_RESP","payload":{"requestId":"` + id + `08","results":[],"totalCount":0,"error":"not available"}}`,
		"SEARCH without options": `{"type":"SEARCH_RESP","payload":{"requestId":"` + id + `09","results":[],"totalCount":0,"error":"not available"}}`,
		"SEARCH_SUB":             `{"type":"SEARCH_RESP","payload":{"requestId":"` + id + `10","results":[],"totalCount":0,"error":"not available"}}`,
		hybrid:                   `{"type":"HYBRID_SEARCH_RESP","payload":{"requestId":"` + id + `11","results":[],"searchTimeMs":0,"error":"not available"}}`,
		"HYBRID_SEARCH_SUB":      `{"type":"HYBRID_SEARCH_RESP","payload":{"requestId":"` + id + `12","results":[],"searchTimeMs":0,"error":"not available"}}`,
		vector:                   `{"type":"VECTOR_SEARCH_RESP","payload":{"id":"` + id + `13","results":[],"totalCandidates":0,"searchTimeMs":0,"error":"not available"}}`,
		"SQL_QUERY":              `{"type":"SQL_QUERY_RESP","payload":{"queryId":"` + id + `15","columns":[],"rows":[],"error":"not available","code":"FEATURE_DISABLED"}}`,
	}
	if diff := cmp.Diff(want, refused); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for typ, want := range map[string]string{
		"ENTRY_PROCESS":       `{"type":"ENTRY_PROCESS_RESPONSE","requestId":"r","success":false,"error":"no"}`,
		"ENTRY_PROCESS_BATCH": `{"type":"ENTRY_PROCESS_BATCH_RESPONSE","requestId":"r","results":{},"error":"no"}`,
		"REGISTER_RESOLVER":   `{"type":"REGISTER_RESOLVER_RESPONSE","requestId":"r","success":false,"error":"no"}`,
		"UNREGISTER_RESOLVER": `{"type":"UNREGISTER_RESOLVER_RESPONSE","requestId":"r","success":false,"error":"no"}`,
		"LIST_RESOLVERS":      `{"type":"LIST_RESOLVERS_RESPONSE","requestId":"r","resolvers":[],"error":"no"}`,
		"LOCK_REQUEST":        "",
		"NO_SUCH_TYPE":        "",
	} {
		r, ok := wire.RefusalFor(&wire.Other{TypeName: typ, RequestID: "r"}, "no")
		if ok != (want != "") || ok && show(r.AppendTo(nil)) != want {
			t.Errorf("%s: %v", typ, r)
		}
	}
	if _, ok := wire.RefusalFor(&wire.Other{TypeName: "SEARCH"}, "no"); ok {
		t.Error("a request without id is answered")
	}
}

func TestLeafWriter(t *testing.T) {
	r := lwwmap.Record{Value: []byte{1}, Timestamp: hlc.Timestamp{Millis: 1, NodeID: "a"}}
	for _, n := range []int{0, 1, 15, 16, 300, 70000} {
		w := wire.BeginLeaf([]byte("before"), "users", "8ab")
		for i := range n {
			w.Add(fmt.Sprint("k", i), r)
		}
		if w.Count() != n {
			t.Errorf("Count() = %d, want %d", w.Count(), n)
		}
		size := w.Size()
		b := w.End()
		if diff := size - len(b); diff < -2 || diff > 2 {
			t.Errorf("%d records: Size() = %d, then %d", n, size, len(b))
		}
		frame, ok := bytes.CutPrefix(b, []byte("before"))
		m, err := wire.DecodeServer(frame)
		if !ok || err != nil {
			t.Fatalf("%d records: %v", n, err)
		}
		leaf := m.(*wire.SyncRespLeaf)
		if leaf.MapName != "users" || leaf.Path != "8ab" || len(leaf.Records) != n {
			t.Fatalf("%d records: got %d", n, len(leaf.Records))
		}
		if n > 0 && !cmp.Equal(leaf.Records[n-1], wire.KeyedRecord{Key: fmt.Sprint("k", n-1), Record: r}) {
			t.Errorf("%d records: the last is %v", n, leaf.Records[n-1])
		}
	}
}
