package lwwmap_test

import (
	"bytes"
	"encoding/json"
	"math"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/msgval"
)

// record is a record as it stands in the vectors.
type record struct {
	Value     json.RawMessage
	Timestamp hlc.Timestamp
	TTLMs     uint64
}

func (r record) lww(t *testing.T) lwwmap.Record {
	t.Helper()
	out := lwwmap.Record{Timestamp: r.Timestamp, TTLMillis: r.TTLMs}
	if string(r.Value) != "null" && r.Value != nil {
		v, err := msgval.FromJSON(r.Value)
		if err != nil {
			t.Fatal(err)
		}
		out.Value = v
	}
	return out
}

type entry struct {
	key    string
	record record
}

func (e *entry) UnmarshalJSON(b []byte) error {
	return json.Unmarshal(b, &[]any{&e.key, &e.record})
}

type vectors struct {
	Cases []struct {
		Name    string
		Local   *record
		Remote  record
		Applied bool
		Result  record
	}
	Convergence []struct {
		Name       string
		Inputs     []entry
		FinalState []entry
		RootHash   uint32
		Converges  bool
	}
	TTL []struct {
		RecordMillis, TTLMs, Now uint64
		Visible                  bool
	}
	Prune []struct {
		Records   []entry
		OlderThan hlc.Timestamp
		Removed   []string
		RootAfter uint32
	}
}

func load(t *testing.T) (v vectors) {
	t.Helper()
	data, err := os.ReadFile("testdata/lww-merge.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, &v); err != nil {
		t.Fatal(err)
	}
	if len(v.Cases) == 0 || len(v.Convergence) == 0 || len(v.TTL) == 0 || len(v.Prune) == 0 {
		t.Fatal("the vectors are not what this test reads")
	}
	return v
}

// byLocale are the cases whose node ids differ in letter case. The client
// compares them by locale, we by bytes (PROTOCOL 4.4), so we decide the opposite.
var byLocale = map[string]bool{
	"case sensitive node ids: lower vs upper (localeCompare)": true,
	"upper vs lower same letter (localeCompare)":              true,
}

func TestVectorsMerge(t *testing.T) {
	reversed := 0
	for _, c := range load(t).Cases {
		t.Run(c.Name, func(t *testing.T) {
			var m lwwmap.Map
			if c.Local != nil {
				m.Merge("k", c.Local.lww(t))
			}
			applied := m.Merge("k", c.Remote.lww(t)) == lwwmap.Applied
			if byLocale[c.Name] {
				reversed++
				if applied == c.Applied {
					t.Errorf("applied = %v, which is what a locale says, not bytes", applied)
				}
				return
			}
			if applied != c.Applied {
				t.Errorf("applied = %v, want %v", applied, c.Applied)
			}
			got, _ := m.Get("k")
			if diff := cmp.Diff(c.Result.lww(t), got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
	if reversed != len(byLocale) {
		t.Errorf("%d cases excluded, want %d", reversed, len(byLocale))
	}
}

// permutations calls f with every order of list.
func permutations[T any](list []T, f func([]T)) {
	var rec func(n int)
	rec = func(n int) {
		if n <= 1 {
			f(list)
			return
		}
		for i := range n {
			rec(n - 1)
			j := 0
			if n%2 == 0 {
				j = i
			}
			list[j], list[n-1] = list[n-1], list[j]
		}
	}
	rec(len(list))
}

func TestVectorsConvergence(t *testing.T) {
	for _, c := range load(t).Convergence {
		t.Run(c.Name, func(t *testing.T) {
			if !c.Converges {
				t.Fatal("unknown kind of case")
			}
			var want lwwmap.Map
			for _, e := range c.FinalState {
				want.Merge(e.key, e.record.lww(t))
			}
			permutations(slices.Clone(c.Inputs), func(order []entry) {
				var m lwwmap.Map
				for _, e := range order {
					m.Merge(e.key, e.record.lww(t))
				}
				if m.Digest() != want.Digest() {
					t.Errorf("another state in the order %v", order)
				}
				if got := merkle.NewTree(m.Leaves(merkle.Mixed), merkle.Mixed).Root(); got != c.RootHash {
					t.Errorf("root %d, want %d", got, c.RootHash)
				}
			})
		})
	}
}

func TestVectorsTTL(t *testing.T) {
	for _, c := range load(t).TTL {
		r := lwwmap.Record{Value: []byte{1}, Timestamp: hlc.Timestamp{Millis: c.RecordMillis, NodeID: "a"}, TTLMillis: c.TTLMs}
		if got := r.VisibleAt(c.Now); got != c.Visible {
			t.Errorf("%+v: visible = %v", c, got)
		}
	}
}

func TestVectorsPrune(t *testing.T) {
	for _, c := range load(t).Prune {
		var m lwwmap.Map
		for _, e := range c.Records {
			m.Merge(e.key, e.record.lww(t))
		}
		if n := m.Prune(c.OlderThan); n != len(c.Removed) {
			t.Errorf("Prune() = %d, want %d", n, len(c.Removed))
		}
		for _, key := range c.Removed {
			if _, ok := m.Get(key); ok {
				t.Errorf("%q was not pruned", key)
			}
		}
		if got := merkle.NewTree(m.Leaves(merkle.Mixed), merkle.Mixed).Root(); got != c.RootAfter {
			t.Errorf("root %d, want %d", got, c.RootAfter)
		}
	}
}

func TestDecide(t *testing.T) {
	at := func(millis uint64) hlc.Timestamp { return hlc.Timestamp{Millis: millis, NodeID: "a"} }
	local := lwwmap.Record{Value: []byte{0x81, 0xa1, 'a', 1}, Timestamp: at(5)}
	for _, c := range []struct {
		name   string
		remote lwwmap.Record
		want   lwwmap.Outcome
	}{
		{"newer", lwwmap.Record{Value: []byte{2}, Timestamp: at(6)}, lwwmap.Applied},
		{"newer tombstone", lwwmap.Record{Timestamp: at(6)}, lwwmap.Applied},
		{"older", lwwmap.Record{Value: []byte{2}, Timestamp: at(4)}, lwwmap.Superseded},
		{"older with the same value", lwwmap.Record{Value: local.Value, Timestamp: at(4)}, lwwmap.Superseded},
		{"same", local, lwwmap.Duplicate},
		{"same in another encoding", lwwmap.Record{Value: []byte{0xde, 0, 1, 0xa1, 'a', 0xcb, 0x3f, 0xf0, 0, 0, 0, 0, 0, 0}, Timestamp: at(5)}, lwwmap.Duplicate},
		{"same stamp, other value", lwwmap.Record{Value: []byte{2}, Timestamp: at(5)}, lwwmap.Conflict},
		{"same stamp, deleted", lwwmap.Record{Timestamp: at(5)}, lwwmap.Conflict},
		{"same stamp, other ttl", lwwmap.Record{Value: local.Value, Timestamp: at(5), TTLMillis: 1}, lwwmap.Conflict},
	} {
		if got := lwwmap.Decide(&local, c.remote); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
	var names []string
	for o := lwwmap.Applied; o <= lwwmap.Conflict+1; o++ {
		names = append(names, o.String())
	}
	if diff := cmp.Diff([]string{"applied", "duplicate", "superseded", "conflict", "unknown"}, names); diff != "" {
		t.Errorf("names (-want +got):\n%s", diff)
	}
	if got := lwwmap.Decide(nil, local); got != lwwmap.Applied {
		t.Errorf("no local: %v, want applied", got)
	}
}

func TestExpiry(t *testing.T) {
	r := lwwmap.Record{Value: []byte{1}, Timestamp: hlc.Timestamp{Millis: 10, Counter: 2, NodeID: "client-a"}, TTLMillis: math.MaxUint64}
	if at, ok := r.ExpiresAt(); !ok || at != math.MaxUint64 {
		t.Errorf("ExpiresAt() = %d, %v; want it to saturate", at, ok)
	}
	tomb := r.Expire()
	if want := (lwwmap.Record{Timestamp: hlc.Timestamp{Millis: 10, Counter: 2, NodeID: "client-a-ttl"}}); !cmp.Equal(tomb, want) {
		t.Errorf("Expire() = %v, want %v", tomb, want)
	}
	if lwwmap.Decide(&r, tomb) != lwwmap.Applied {
		t.Error("the tombstone does not beat the record")
	}
	next := lwwmap.Record{Value: []byte{1}, Timestamp: hlc.Timestamp{Millis: 10, Counter: 3, NodeID: "client-a"}}
	if lwwmap.Decide(&tomb, next) != lwwmap.Applied {
		t.Error("the next write does not beat the tombstone")
	}
	tomb.TTLMillis = 5
	if _, ok := tomb.ExpiresAt(); ok || tomb.VisibleAt(0) {
		t.Error("a tombstone expires or is visible")
	}
}

var (
	genStamp = rapid.Custom(func(t *rapid.T) hlc.Timestamp {
		return hlc.Timestamp{
			Millis:  rapid.Uint64Range(0, 2).Draw(t, "millis"),
			Counter: rapid.Uint64Range(0, 1).Draw(t, "counter"),
			NodeID:  rapid.SampledFrom([]string{"a", "B", "c"}).Draw(t, "node"),
		}
	})
	genKey = rapid.SampledFrom([]string{"a", "b", "ключ"})
)

// genWrites draws writes as correct clients make them: a stamp is used once, so
// that a stamp determines key, value and ttl.
func genWrites(t *rapid.T, label string) []write {
	return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) write {
		w := write{key: genKey.Draw(t, "key"), record: lwwmap.Record{Timestamp: genStamp.Draw(t, "stamp")}}
		ts := w.record.Timestamp
		if n := byte(ts.Millis*4 + ts.Counter*2 + uint64(len(w.key))%2); n%3 != 0 {
			w.record.Value = []byte{n}
			w.record.TTLMillis = uint64(n % 2)
		}
		return w
	}), 0, 12).Draw(t, label)
}

type write struct {
	key    string
	record lwwmap.Record
}

func build(lists ...[]write) *lwwmap.Map {
	m := new(lwwmap.Map)
	for _, list := range lists {
		for _, w := range list {
			m.Merge(w.key, w.record)
		}
	}
	return m
}

// mergeInto merges all records of from, as a sync does.
func mergeInto(m, from *lwwmap.Map) *lwwmap.Map {
	for key, r := range from.All() {
		m.Merge(key, r)
	}
	return m
}

// CRDT-01: as long as a stamp is used once, merging is commutative, associative
// and idempotent.
func TestMergeLaws(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, b, c := genWrites(t, "a"), genWrites(t, "b"), genWrites(t, "c")
		if mergeInto(build(a), build(b)).Digest() != mergeInto(build(b), build(a)).Digest() {
			t.Fatal("not commutative")
		}
		left := mergeInto(mergeInto(build(a), build(b)), build(c))
		right := mergeInto(build(a), mergeInto(build(b), build(c)))
		if left.Digest() != right.Digest() {
			t.Fatal("not associative")
		}
		before := left.Digest()
		for key, r := range build(a, b, c).All() {
			if got := left.Merge(key, r); got != lwwmap.Duplicate {
				t.Fatalf("merging again: %v", got)
			}
		}
		if left.Digest() != before {
			t.Fatal("not idempotent")
		}
		all := slices.Concat(a, b, c)
		shuffled := rapid.Permutation(all).Draw(t, "order")
		if build(shuffled).Digest() != before {
			t.Fatal("the order of writes matters")
		}
	})
}

// A stamp that was used for two values is the one thing that breaks the laws:
// each side keeps its own. Decide reports it from both sides, so that it can be
// refused where writes come in.
func TestEqualStampsConflict(t *testing.T) {
	ts := hlc.Timestamp{Millis: 1, NodeID: "a"}
	x, y := lwwmap.Record{Value: []byte{1}, Timestamp: ts}, lwwmap.Record{Value: []byte{2}, Timestamp: ts}
	xy, yx := build([]write{{"k", x}, {"k", y}}), build([]write{{"k", y}, {"k", x}})
	if xy.Digest() == yx.Digest() {
		t.Error("the two orders are not told apart by the digest")
	}
	if xy.Merge("k", y) != lwwmap.Conflict || yx.Merge("k", x) != lwwmap.Conflict {
		t.Error("the conflict is not reported")
	}
}

func TestMapWrites(t *testing.T) {
	clock := hlc.NewClock("n", func() time.Time { return time.UnixMilli(7) })
	var m lwwmap.Map
	set := m.Set(clock, "a", []byte{1}, 50)
	if got, ok := m.Get("a"); !ok || !cmp.Equal(got, set) || set.Timestamp.Millis != 7 || set.TTLMillis != 50 {
		t.Errorf("after Set: %v, %v", got, ok)
	}
	del := m.Remove(clock, "a")
	if got, _ := m.Get("a"); !got.Deleted() || del.Timestamp.Compare(set.Timestamp) <= 0 || m.Len() != 1 {
		t.Errorf("after Remove: %v", got)
	}
	m.Set(clock, "Z", []byte{1}, 0)
	var keys []string
	for key := range m.All() {
		keys = append(keys, key)
	}
	if diff := cmp.Diff([]string{"Z", "a"}, keys); diff != "" {
		t.Errorf("All (-want +got):\n%s", diff)
	}
}

// MRK-05: the digest covers all of a record, and the meaning of the value rather
// than its encoding.
func TestDigestCovers(t *testing.T) {
	base := lwwmap.Record{Value: []byte{1}, Timestamp: hlc.Timestamp{Millis: 1, Counter: 1, NodeID: "a"}, TTLMillis: 1}
	digest := func(key string, edit func(*lwwmap.Record)) [32]byte {
		r := base
		edit(&r)
		return build([]write{{key, r}}).Digest()
	}
	same := digest("k", func(*lwwmap.Record) {})
	if digest("k", func(r *lwwmap.Record) { r.Value = []byte{0xcc, 1} }) != same {
		t.Error("the encoding of the value matters")
	}
	for name, d := range map[string][32]byte{
		"key":     digest("l", func(*lwwmap.Record) {}),
		"value":   digest("k", func(r *lwwmap.Record) { r.Value = []byte{2} }),
		"deleted": digest("k", func(r *lwwmap.Record) { r.Value = nil }),
		"millis":  digest("k", func(r *lwwmap.Record) { r.Timestamp.Millis++ }),
		"counter": digest("k", func(r *lwwmap.Record) { r.Timestamp.Counter++ }),
		"node":    digest("k", func(r *lwwmap.Record) { r.Timestamp.NodeID = "b" }),
		"ttl":     digest("k", func(r *lwwmap.Record) { r.TTLMillis++ }),
	} {
		if d == same {
			t.Errorf("the digest does not cover %s", name)
		}
	}
}

func TestDecideAllocations(t *testing.T) {
	value := bytes.Repeat([]byte{1}, 400)
	value[0], value[1], value[2] = 0xdc, 1, 0x8d
	local := lwwmap.Record{Value: value, Timestamp: hlc.Timestamp{Millis: 5, NodeID: "a"}}
	newer := local
	newer.Timestamp.Millis = 6
	again := local
	again.Value = bytes.Clone(value)
	if n := testing.AllocsPerRun(100, func() {
		lwwmap.Decide(&local, newer)
		lwwmap.Decide(&newer, local)
		lwwmap.Decide(&local, again)
	}); n != 0 {
		t.Errorf("Decide allocates %v times", n)
	}
}
