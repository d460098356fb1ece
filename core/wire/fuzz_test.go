package wire_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"math"
	"strings"
	"testing"

	"github.com/topgun-sync/topgun/core/msgval"
	"github.com/topgun-sync/topgun/core/wire"
)

// frameSeeds adds every frame of the vectors, of both directions, and some that
// are wrong.
func frameSeeds(f *testing.F) {
	for _, file := range []string{"frames-client.json", "frames-server.json", "session-minimal.json", "session-ormap-repair.json"} {
		for _, v := range frames(f, file) {
			for _, h := range []string{v.Hex, v.MinimalHex, v.ReferenceEncodingHex} {
				f.Add(unhex(f, h))
			}
		}
	}
	f.Add(batch(opWith("record", 5), opWith("key", "")))
	f.Add(batch(opWith("opType", "OR_ADD", "record", nil, "orRecord", orRecord(nil, goodStamp, "ttlMs", 5)), opWith("opType", "OR_REMOVE", "orTag", "t")))
	f.Add(push(entry("k", []any{orRecord(nil, goodStamp), 5}, []any{"a", ""}), entry("l", nil, []any{"a", ""}), entry("", nil, nil)))
	f.Add(wrapped("ORMAP_DIFF_REQUEST", "mapName", "m", "keys", []any{"a", "b"}))
	f.Add(wrapped("COUNTER_SYNC", "name", "c", "state", pairs{"positive", pairs{"a", 1}, "n", pairs{"b", 2.0, "a", 0}, "p", pairs{"a", 7}}))
	f.Add(wrapped("LOCK_REQUEST", "requestId", "r", "name", "l", "ttl", 0.5))
	f.Add(wrapped("LOCK_RELEASE", "requestId", "r", "name", "l", "fencingToken", 1.7e15))
	f.Add(flat("JOURNAL_READ", "requestId", "r", "fromSequence", "9223372036854775807", "limit", 5, "mapName", "m"))
	f.Add(flat("JOURNAL_SUBSCRIBE", "requestId", "r", "fromSequence", 7, "types", []any{"PUT", "PUT"}))
	f.Add((&wire.JournalEvent{Event: wire.JournalEntry{Sequence: 5, Type: "DELETE", MapName: "m", Key: "k", Tag: "t"}}).AppendTo(nil))
	f.Add((&wire.PartitionMap{Version: 1, NodeID: "n", WebSocketURL: "ws://n"}).AppendTo(nil))
	f.Add((&wire.ORMapSyncRespRoot{MapName: "m", FullResync: true}).AppendTo(nil))
	f.Add(wire.AppendBatch(nil, (&wire.QueryUpdate{QueryID: "q", Key: "k", ChangeType: "LEAVE"}).AppendTo(nil)))
	f.Add([]byte{0xdf, 0xff, 0xff, 0xff, 0xff})
}

// echo is input that no error may repeat.
const echo = "ECHO me"

// wireError fails unless err is an *Error with all its parts.
func wireError(t *testing.T, err error) {
	t.Helper()
	var e *wire.Error
	if !errors.As(err, &e) || e.Name == "" || e.Text == "" || e.Code < 400 || e.Code > 499 || strings.Contains(e.Text, echo) {
		t.Errorf("error %#v", err)
	}
}

// itemErrors returns what in the message is marked as broken.
func itemErrors(m wire.Message) (errs []error) {
	var one *wire.Error
	switch m := m.(type) {
	case *wire.OpBatch:
		return opErrors(m.Ops)
	case *wire.QuerySub:
		one = m.Err
	case *wire.LockRequest:
		one = m.Err
	case *wire.LockRelease:
		one = m.Err
	case *wire.JournalRead:
		one = m.Err
	case *wire.JournalSubscribe:
		one = m.Err
	}
	if one != nil {
		errs = append(errs, one)
	}
	return errs
}

func opErrors(ops []wire.Op) (errs []error) {
	for _, op := range ops {
		if op.Err != nil {
			errs = append(errs, op.Err)
		}
	}
	return errs
}

// stable fails unless the encoding of a decoded message is read back as the same
// message.
func stable(t *testing.T, m wire.Message, decode func([]byte) (wire.Message, error)) {
	t.Helper()
	first := m.AppendTo(nil)
	if len(itemErrors(m)) > 0 {
		return
	}
	again, err := decode(first)
	if err != nil {
		t.Fatalf("%T is encoded as %x, which is refused: %v", m, first, err)
	}
	if second := again.AppendTo(nil); !bytes.Equal(first, second) {
		t.Errorf("%T:\n first %x\nsecond %x", m, first, second)
	}
}

// values returns where each value within b begins, keys included.
func values(b []byte) (at []int) {
	for pos := 0; pos < len(b); {
		at = append(at, pos)
		h, _ := msgval.ReadHead(b[pos:])
		pos += h.Size
		if !h.Kind.Container() {
			pos += int(h.N)
		}
	}
	return at
}

// Every value of every frame and body in turn becomes something else. Nothing
// panics, errors are errors of ours, and what is accepted can be encoded.
func TestWrongKinds(t *testing.T) {
	var inputs [][]byte
	for _, file := range []string{"frames-client.json", "frames-server.json"} {
		for _, v := range frames(t, file) {
			for _, h := range []string{v.Hex, v.MinimalHex} {
				if h != "" {
					inputs = append(inputs, unhex(t, h))
				}
			}
		}
	}
	httpSeeds(t, func(request, response exchange) {
		inputs = append(inputs, unhex(t, request.Hex), unhex(t, response.Hex))
	})
	lim := wire.DefaultLimits()
	decodeClient := func(b []byte) (wire.Message, error) { return wire.DecodeClient(b, lim) }
	refused := 0
	for _, in := range inputs {
		for _, at := range values(in) {
			for _, with := range []any{nil, true, -1, math.NaN(), uint64(math.MaxUint64), "", "x", echo, []byte{1}, []any{nil}, pairs{}, pairs{"x", nil}, pairs{1, 2}} {
				b := pack(bytes.Clone(in[:at]), with)
				b = append(b, in[at+msgval.Skip(in[at:]):]...)
				for _, decode := range []func([]byte) (wire.Message, error){decodeClient, wire.DecodeServer} {
					if m, err := decode(b); err != nil {
						wireError(t, err)
						refused++
						var e *wire.Error
						if errors.As(err, &e) && e.OpsLost && !bytes.Contains(b, []byte("OP_BATCH")) {
							t.Errorf("operations of %x are lost, which has none", b)
						}
					} else {
						for _, err := range itemErrors(m) {
							wireError(t, err)
						}
						stable(t, m, decode)
					}
				}
				if r, err := wire.DecodeSyncRequest(b, lim); err != nil {
					wireError(t, err)
				} else {
					stableRequest(t, r)
				}
				if r, err := wire.DecodeSyncResponse(b); err != nil {
					wireError(t, err)
				} else {
					stableResponse(t, r)
				}
			}
		}
	}
	if refused == 0 {
		t.Error("nothing was refused")
	}
}

func FuzzDecodeClient(f *testing.F) {
	frameSeeds(f)
	lim := wire.DefaultLimits()
	decode := func(b []byte) (wire.Message, error) { return wire.DecodeClient(b, lim) }
	f.Fuzz(func(t *testing.T, frame []byte) {
		before := bytes.Clone(frame)
		m, err := decode(frame)
		if err != nil {
			wireError(t, err)
			return
		}
		if rest, err := msgval.Check(frame); err == nil && len(rest) != 0 {
			t.Fatalf("accepts %x with trailing bytes", frame)
		}
		stable(t, m, decode)
		if o, ok := m.(*wire.Other); ok {
			if r, ok := wire.RefusalFor(o, "no"); ok {
				if _, err := wire.DecodeServer(r.AppendTo(nil)); err != nil {
					t.Errorf("the refusal cannot be read: %v", err)
				}
			}
		}
		if b, ok := m.(*wire.OpBatch); ok {
			for _, op := range b.Ops {
				if op.Err != nil {
					wireError(t, op.Err)
					continue
				}
				if op.Record.Deleted() != (op.Kind == wire.OpRemove || op.Kind == wire.OpORRemove) && op.Kind != wire.OpORAdd {
					t.Errorf("%v with the value %x", op.Kind, op.Record.Value)
				}
				if wire.CheckMapName(op.MapName) != nil || wire.CheckKey(op.Key) != nil {
					t.Errorf("map %q, key %q", op.MapName, op.Key)
				}
			}
		}
		if !bytes.Equal(frame, before) {
			t.Error("the frame was changed")
		}
	})
}

func FuzzDecodeServer(f *testing.F) {
	frameSeeds(f)
	f.Fuzz(func(t *testing.T, frame []byte) {
		m, err := wire.DecodeServer(frame)
		if err != nil {
			wireError(t, err)
			return
		}
		stable(t, m, wire.DecodeServer)
	})
}

func httpSeeds(f testing.TB, add func(request, response exchange)) {
	var v struct {
		Exchanges []struct{ Request, Response exchange }
	}
	load(f, "http-sync.json", &v)
	for _, x := range v.Exchanges {
		add(x.Request, x.Response)
	}
}

type exchange struct {
	JSON json.RawMessage
	Hex  string
}

func stableRequest(t *testing.T, r *wire.SyncRequest) {
	t.Helper()
	first := r.AppendTo(nil)
	if len(opErrors(r.Operations)) > 0 {
		return
	}
	for _, m := range r.SyncMaps {
		if m.Err != nil {
			return
		}
	}
	for _, q := range r.Queries {
		if q.Err != nil {
			return
		}
	}
	again, err := wire.DecodeSyncRequest(first, wire.DefaultLimits())
	if err != nil {
		t.Fatalf("encoded as %x, which is refused: %v", first, err)
	}
	if second := again.AppendTo(nil); !bytes.Equal(first, second) {
		t.Errorf("\n first %x\nsecond %x", first, second)
	}
}

func FuzzDecodeSyncRequest(f *testing.F) {
	httpSeeds(f, func(request, _ exchange) { f.Add(unhex(f, request.Hex)) })
	f.Add(pack(nil, pairs{
		"syncMaps",
		[]any{pairs{"mapName", "m", "type", "OR"}},
		"queries",
		[]any{pairs{"queryId", "q", "mapName", "m", "predicate", pairs{"op", "and"}, "sort", []any{}, "limit", 5, "filter", pairs{}}},
	}))
	f.Fuzz(func(t *testing.T, body []byte) {
		r, err := wire.DecodeSyncRequest(body, wire.DefaultLimits())
		if err != nil {
			wireError(t, err)
			return
		}
		stableRequest(t, r)
	})
}

func FuzzDecodeSyncRequestJSON(f *testing.F) {
	httpSeeds(f, func(request, _ exchange) { f.Add([]byte(request.JSON)) })
	f.Fuzz(func(t *testing.T, body []byte) {
		r, err := wire.DecodeSyncRequestJSON(body, wire.DefaultLimits())
		if err != nil {
			wireError(t, err)
			return
		}
		stableRequest(t, r)
	})
}

func FuzzDecodeSyncResponse(f *testing.F) {
	httpSeeds(f, func(_, response exchange) { f.Add(unhex(f, response.Hex)) })
	f.Add(pack(nil, pairs{"serverHlc", goodStamp, "orDeltas", []any{
		pairs{"mapName", "m", "entries", []any{entry("k", []any{orRecord(nil, goodStamp)}, []any{"a"})}, "serverSyncTimestamp", goodStamp, "hasMore", true},
	}}))
	f.Fuzz(func(t *testing.T, body []byte) {
		r, err := wire.DecodeSyncResponse(body)
		if err != nil {
			wireError(t, err)
			return
		}
		stableResponse(t, r)
	})
}

func stableResponse(t *testing.T, r *wire.SyncResponse) {
	t.Helper()
	first := r.AppendTo(nil)
	again, err := wire.DecodeSyncResponse(first)
	if err != nil {
		t.Fatalf("encoded as %x, which is refused: %v", first, err)
	}
	if second := again.AppendTo(nil); !bytes.Equal(first, second) {
		t.Errorf("\n first %x\nsecond %x", first, second)
	}
	if text := r.AppendJSON(nil); !json.Valid(text) {
		t.Errorf("as JSON %s", text)
	}
}
