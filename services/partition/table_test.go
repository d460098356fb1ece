package partition

import (
	"fmt"
	"runtime"
	"slices"
	"testing"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/merkle"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

func (t *table) set(key string, r lwwmap.Record, at arrival) {
	_, again := t.records[key]
	t.arrived(t.put([]byte(key), merkle.Hash(key), r, intern(r.Timestamp.NodeID), at, nil), again)
}

func TestTheArrivalLogHoldsEachRecordOnce(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		table := newTable(lww, "m")
		latest := make(map[string]uint64)
		n := rapid.IntRange(1, 2000).Draw(t, "writes")
		keys := rapid.IntRange(1, 200).Draw(t, "keys")
		next := rapid.Uint32().Draw(t, "seed")
		for i := range n {
			next = next*1664525 + 1013904223
			key := fmt.Sprint("k", next>>16%uint32(keys))
			table.set(key, record("v", uint64(i+1), 0), arrival{millis: uint64(i + 1)})
			latest[key] = uint64(i + 1)
		}
		if len(table.log) > 2*len(latest)+2*minStale {
			t.Fatalf("%d slots for %d records", len(table.log), len(latest))
		}
		after := arrival{millis: rapid.Uint64Range(0, uint64(n)).Draw(t, "after")}
		upTo := arrival{millis: rapid.Uint64Range(0, uint64(n)).Draw(t, "up to")}
		changes, cut := table.since(after, upTo, 10_000, 1<<30)
		want := 0
		for _, at := range latest {
			if at > after.millis && at <= upTo.millis {
				want++
			}
		}
		if cut || len(changes) != want || !slices.IsSortedFunc(changes, func(a, b change) int { return a.arrival.compare(b.arrival) }) {
			t.Fatalf("%d changes, want %d", len(changes), want)
		}
	})
}

func TestRememberedOriginals(t *testing.T) {
	at := func(millis uint64, node string) hlc.Timestamp { return hlc.Timestamp{Millis: millis, NodeID: node} }
	current := at(100, "x")
	var known []hlc.Timestamp
	for i := range uint64(12) {
		known = remember(known, at(200+i, fmt.Sprint("n", i)), current)
	}
	if len(known) != maxRestamped || known[0] != at(211, "n11") || repeats(known, at(200, "n0")) {
		t.Errorf("remembered %v", known)
	}
	known = remember(known, at(300, "n11"), current)
	if len(known) != maxRestamped || !repeats(known, at(300, "n11")) || !repeats(known, at(211, "n11")) || repeats(known, at(301, "n11")) {
		t.Errorf("a node's higher stamp does not take the place of its lower one: %v", known)
	}
	if known = remember(known, hlc.Timestamp{}, at(210, "z")); len(known) != 1 {
		t.Errorf("originals that lose anyway are kept: %v", known)
	}
	if remember(nil, hlc.Timestamp{}, current) != nil {
		t.Error("nothing to remember is something")
	}
}

func TestConvertRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		stamp := rapid.Custom(func(t *rapid.T) hlc.Timestamp {
			return hlc.Timestamp{Millis: rapid.Uint64().Draw(t, "millis"), Counter: rapid.Uint64().Draw(t, "counter"), NodeID: rapid.String().Draw(t, "node")}
		})
		in := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) change {
			kind := rapid.SampledFrom([]typesv1.Kind{lww, or, counter}).Draw(t, "kind")
			key := []byte(rapid.StringMatching(`[^\x00]*`).Draw(t, "key"))
			if kind != lww {
				key = joinTag(key, []byte(rapid.String().Draw(t, "tag")))
			}
			return change{
				kind: kind, table: rapid.String().Draw(t, "map"), key: string(key),
				replaced: rapid.Bool().Draw(t, "replaced"), pruned: rapid.Bool().Draw(t, "pruned"),
				record: lwwmap.Record{
					Value: rapid.SliceOf(rapid.Byte()).Draw(t, "value"), Timestamp: stamp.Draw(t, "stamp"), TTLMillis: rapid.Uint64().Draw(t, "ttl"),
				},
				arrival:   arrival{rapid.Uint64().Draw(t, "am"), rapid.Uint64().Draw(t, "ac")},
				restamped: rapid.SliceOfN(stamp, 0, 3).Draw(t, "restamped"),
			}
		}), 0, 4).Draw(t, "changes")
		for i, c := range changesToProto(in) {
			data, err := proto.Marshal(c)
			if err != nil {
				t.Fatal(err)
			}
			if len(data) > changeBytes(&in[i]) {
				t.Fatalf("a change takes %d bytes, estimated %d", len(data), changeBytes(&in[i]))
			}
			back := new(typesv1.Change)
			if err := proto.Unmarshal(data, back); err != nil {
				t.Fatal(err)
			}
			in[i].replaced = false // not a part of the state
			if in[i].pruned {
				in[i].record = lwwmap.Record{}
			}
			if diff := cmp.Diff(in[i], changeFromProto(back), cmp.AllowUnexported(change{}, arrival{}), cmpopts.EquateEmpty()); diff != "" {
				t.Fatal(diff)
			}
		}
	})
}

// The budget of ARCHITECTURE 9: at most 400 bytes for a record of 100.
func TestMemoryPerRecord(t *testing.T) {
	if size := unsafe.Sizeof(entry{}); size > 112 {
		t.Errorf("an entry has %d bytes, a size class more than 112", size)
	}
	const count = 100_000
	used := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	value := make([]byte, 100)
	before := used()
	table := newTable(lww, "m")
	for i := range count {
		r := lwwmap.Record{Value: keepValue(value), Timestamp: hlc.Timestamp{Millis: 1, NodeID: "a"}}
		table.set(fmt.Sprintf("users/%08d", i), r, arrival{millis: uint64(i)})
	}
	after := used()
	if per := (after - before) / count; per > 400 {
		t.Errorf("a record takes %d bytes, more than 400", per)
	} else {
		t.Logf("a record takes %d bytes", per)
	}
	runtime.KeepAlive(table)
}

// Store and log overlap: the store may be ahead of its watermark, so the replay brings
// states that are older than what was loaded.
func TestLoadKeepsTheLaterArrival(t *testing.T) {
	s := newShard(0, new(arrivalClock), time.Now, nil)
	later := change{table: "m", key: "k", record: record("new", 9, 0), arrival: arrival{millis: 7}}
	earlier := change{table: "m", key: "k", record: record("old", 8, 0), arrival: arrival{millis: 6}}
	for _, c := range []change{later, later, earlier} {
		s.load(c, merkle.Hash(c.key))
	}
	s.ready()
	got, _ := s.tables[lww]["m"].since(arrival{}, arrival{millis: 100}, 10, 1000)
	if len(got) != 1 || got[0].arrival != later.arrival || got[0].record.Timestamp.Millis != 9 || s.records.Load() != 1 {
		t.Errorf("loaded %+v", got)
	}
}
