package ormap_test

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf16"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/msgval"
	"github.com/topgun-sync/topgun/core/ormap"
)

// record is a record as it stands in the vectors.
type record struct {
	Value     json.RawMessage
	Timestamp hlc.Timestamp
	Tag       string
	TTLMs     json.RawMessage
}

func value(t *testing.T, text json.RawMessage) []byte {
	t.Helper()
	v, err := msgval.FromJSON(text)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func (r record) or(t *testing.T) ormap.Record {
	t.Helper()
	out := ormap.Record{Tag: r.Tag, Record: lwwmap.Record{Value: value(t, r.Value), Timestamp: r.Timestamp}}
	if len(r.TTLMs) > 0 {
		if err := json.Unmarshal(r.TTLMs, &out.TTLMillis); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

type op struct {
	Key       string
	Add       *record
	Tombstone string
}

func (o op) do(t *testing.T, m *ormap.Map) {
	t.Helper()
	if o.Add != nil {
		m.Apply(o.Key, o.Add.or(t))
		return
	}
	m.ApplyTombstone(o.Tombstone)
}

func load(t *testing.T, name string, into any) {
	t.Helper()
	data, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, into); err != nil {
		t.Fatal(err)
	}
}

func root(m *ormap.Map, c merkle.Combine) uint32 { return merkle.NewTree(m.Leaves(c), c).Root() }

func TestVectorsMerge(t *testing.T) {
	var v struct {
		Cases []struct {
			Name     string
			Start    []op
			MergeKey struct {
				Key        string
				Records    []record
				Tombstones []string
			}
			Result struct{ Added, Updated int }
			State  struct {
				Items      map[string][]record
				Tombstones []string
				RootHash   uint32
			}
		}
		TagFormat []struct {
			Timestamp hlc.Timestamp
			Tag       string
		}
	}
	load(t, "ormap-merge.json", &v)
	if len(v.Cases) == 0 || len(v.TagFormat) == 0 {
		t.Fatal("the vectors are not what this test reads")
	}
	for _, c := range v.Cases {
		t.Run(c.Name, func(t *testing.T) {
			m := new(ormap.Map)
			for _, o := range c.Start {
				o.do(t, m)
			}
			var records []ormap.Record
			for _, r := range c.MergeKey.Records {
				records = append(records, r.or(t))
			}
			if added, updated := m.MergeKey(c.MergeKey.Key, records, c.MergeKey.Tombstones); added != c.Result.Added || updated != c.Result.Updated {
				t.Errorf("added %d, updated %d, want %+v", added, updated, c.Result)
			}
			got, want := make(map[string][]ormap.Record), make(map[string][]ormap.Record)
			for _, key := range m.Keys() {
				got[key] = slices.Collect(m.Records(key))
			}
			for key, records := range c.State.Items {
				for _, r := range records {
					want[key] = append(want[key], r.or(t))
				}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("items (-want +got):\n%s", diff)
			}
			slices.Sort(c.State.Tombstones)
			if tombstones := m.Tombstones(); !slices.Equal(tombstones, c.State.Tombstones) {
				t.Errorf("tombstones %v, want %v", tombstones, c.State.Tombstones)
			}
			if got := root(m, merkle.Mixed); got != c.State.RootHash {
				t.Errorf("root %d, want %d", got, c.State.RootHash)
			}
		})
	}
	for _, f := range v.TagFormat {
		clock := hlc.NewClock(f.Timestamp.NodeID, func() time.Time { return time.UnixMilli(int64(f.Timestamp.Millis)) })
		if r := new(ormap.Map).Add(clock, "k", []byte{1}, 0); r.Tag != f.Tag || r.Timestamp != f.Timestamp {
			t.Errorf("Add made %+v, want the tag %s", r, f.Tag)
		}
	}
}

// nilTTL is the dataset with a ttl of nil, which only a server that sends one brings
// about; a record here has a ttl or has none.
const nilTTL = "ttlMs null is hashed as :ttl=null: never send ttlMs nil"

func TestVectorsTree(t *testing.T) {
	var v struct {
		Datasets []struct {
			Name       string
			Ops        []op
			RootHash   uint32
			Level1     map[string]uint32
			Level2     map[string]uint32
			Level3     map[string]uint32
			Tombstones []string
			Entries    []struct {
				Key       string
				EntryHash uint32
				LeafPath  string
				Tags      []string
			}
		}
	}
	load(t, "merkle-ormap.json", &v)
	if len(v.Datasets) < 10 {
		t.Fatal("the vectors are not what this test reads")
	}
	for _, d := range v.Datasets {
		if d.Name == nilTTL {
			continue
		}
		t.Run(d.Name, func(t *testing.T) {
			m := new(ormap.Map)
			for _, o := range d.Ops {
				o.do(t, m)
			}
			tree := merkle.NewTree(m.Leaves(merkle.Mixed), merkle.Mixed)
			for _, level := range []map[string]uint32{{"": d.RootHash}, d.Level1, d.Level2, d.Level3} {
				for path, want := range level {
					if got := tree.Hash(path); got != want {
						t.Errorf("%q: %d, want %d", path, got, want)
					}
				}
			}
			for _, e := range d.Entries {
				records := slices.SortedFunc(m.Records(e.Key), func(a, b ormap.Record) int { return ormap.CompareTags(a.Tag, b.Tag) })
				if got := ormap.ItemHash(e.Key, slices.Values(records)); got != e.EntryHash {
					t.Errorf("%q: %d, want %d", e.Key, got, e.EntryHash)
				}
				if leaf := fmt.Sprintf("%03x", merkle.Leaf(merkle.Hash(e.Key))); leaf != e.LeafPath {
					t.Errorf("%q: leaf %s, want %s", e.Key, leaf, e.LeafPath)
				}
			}
			if got := len(m.Tombstones()); got != len(d.Tombstones) {
				t.Errorf("%d tombstones, want %d", got, len(d.Tombstones))
			}
		})
	}
}

// unpaired is the value string with a surrogate that has no partner: only the client
// that wrote it knows that, all others decode its bytes as U+FFFD (PROTOCOL 2.3).
const unpaired = `{"ctrl":"\u0001` + "\u2028" + `\ud83d"}`

func TestVectorsValueStrings(t *testing.T) {
	var v struct {
		ValueStrings []struct {
			Value                    json.RawMessage
			ValueString, EntryString string
			EntryHash                uint32
		}
	}
	load(t, "merkle-ormap.json", &v)
	if len(v.ValueStrings) != 35 {
		t.Fatalf("%d value strings, want 35", len(v.ValueStrings))
	}
	for i, c := range v.ValueStrings {
		b := value(t, c.Value)
		got := ormap.ValueString(b)
		if c.ValueString == unpaired {
			if want := strings.Replace(unpaired, `\ud83d`, "\ufffd", 1); got != want {
				t.Errorf("%s: %s, want %s", c.Value, got, want)
			}
			continue
		}
		if got != c.ValueString {
			t.Errorf("%s: %s, want %s", c.Value, got, c.ValueString)
		}
		stamp := hlc.Timestamp{Millis: 1_700_000_000_000, Counter: uint64(i), NodeID: "n"}
		r := ormap.Record{Tag: stamp.String(), Record: lwwmap.Record{Value: b, Timestamp: stamp}}
		if got := ormap.ItemHash("k", slices.Values([]ormap.Record{r})); got != c.EntryHash || got != merkle.Hash(c.EntryString) {
			t.Errorf("%s: hash %d, want %d", c.Value, got, c.EntryHash)
		}
	}
}

func TestValueString(t *testing.T) {
	float := func(f float64) []byte { return msgval.AppendFloat(nil, f) }
	bin := func(n int) []byte { return msgval.AppendBin(nil, make([]byte, n)) }
	pairs := func(n int, of ...[]byte) []byte {
		return slices.Concat(msgval.AppendMapHeader(nil, n), slices.Concat(of...))
	}
	str := func(s string) []byte { return msgval.AppendString(nil, s) }
	for want, v := range map[string][]byte{
		"NaN":                   float(math.NaN()),
		"Infinity":              float(math.Inf(1)),
		"-Infinity":             float(math.Inf(-1)),
		"0":                     float(math.Copysign(0, -1)),
		"123":                   float(123),
		"0.000001":              float(1e-6),
		"1.5e-9":                float(1.5e-9),
		"5e-324":                float(5e-324),
		"1e-10":                 float(1e-10),
		"-1.25e+300":            float(-1.25e300),
		"100000000000000000000": float(1e20),
		"18446744073709552000":  msgval.AppendUint(nil, math.MaxUint64), // the client holds a float64
		"-9223372036854776000":  msgval.AppendInt(nil, math.MinInt64),
		"[null,null,1]":         slices.Concat(msgval.AppendArrayHeader(nil, 3), float(math.NaN()), float(math.Inf(1)), []byte{1}),
		`{"0":0,"1":0,"2":0}`:   bin(3),
		`{"data":{}}`:           pairs(1, str("data"), bin(2)),
		`{"1":{"1":0}}`:         pairs(1, []byte{1}, bin(2)), // an integer key is a string
		`{"a":2}`:               pairs(2, str("a"), []byte{1}, str("a"), []byte{2}),
		`[{"0":1},[{"1":2}]]`: slices.Concat(msgval.AppendArrayHeader(nil, 2), pairs(2, str("0"), []byte{1}, str("2"), []byte{3}),
			msgval.AppendArrayHeader(nil, 1), pairs(2, str("1"), []byte{2}, str("01"), []byte{3})),
		"{\"\U00010000\":1,\"\ufb01\":2}": pairs(2, str("\ufb01"), []byte{2}, str("\U00010000"), []byte{1}), // UTF-16 order
		`"2023-11-14T22:13:20.000Z"`:      {0xd6, 0xff, 0x65, 0x53, 0xf1, 0x00},
		"{}":                              pairs(0), // also of no bytes, below
		`{"k":"</&\"\\\b\f\n\r\t\u001f"}`: pairs(1, str("k"), str("</&\"\\\b\f\n\r\t\x1f")),
	} {
		if got := ormap.ValueString(v); got != want {
			t.Errorf("%x: %s, want %s", v, got, want)
		}
	}
	if got := ormap.ValueString(bin(0)); got != "{}" {
		t.Errorf("no bytes: %s", got)
	}
	// Indexes are sorted as strings.
	got := ormap.ValueString(bin(1200))
	var keys []string
	for i := range 1200 {
		keys = append(keys, fmt.Sprint(i))
	}
	slices.Sort(keys)
	if want := `{"` + strings.Join(keys, `":0,"`) + `":0}`; got != want {
		t.Errorf("a long byte string: %.100s", got)
	}
}

// Any bytes may come; the text stays within what they are worth.
func FuzzValueString(f *testing.F) {
	f.Add([]byte{0x82, 0xa1, 'a', 0x81, 0xa1, 'a', 1, 0xa1, 'b', 0xc4, 2, 1, 2})
	f.Add([]byte{0xdd, 0xff, 0xff, 0xff, 0xff})
	f.Add([]byte{0xdf, 0xff, 0xff, 0xff, 0xff, 0xa1})
	f.Fuzz(func(t *testing.T, b []byte) {
		if got := ormap.ValueString(b); len(got) > 40+40*len(b) {
			t.Errorf("%d bytes became %d", len(b), len(got))
		}
	})
}

func TestCompareTags(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		runes := rapid.SliceOfN(rapid.SampledFrom([]rune("ab\u007f\u0080\u07ff\ud7ff\ue000\uffff\U00010000\U0010ffff")), 0, 4)
		a, b := string(runes.Draw(t, "a")), string(runes.Draw(t, "b"))
		want := slices.Compare(utf16.Encode([]rune(a)), utf16.Encode([]rune(b)))
		if got := ormap.CompareTags(a, b); got != want {
			t.Errorf("CompareTags(%+q, %+q) = %d, want %d", a, b, got, want)
		}
	})
}

func TestDecide(t *testing.T) {
	at := func(millis uint64, v ...byte) ormap.Record {
		return ormap.Record{Tag: "t", Record: lwwmap.Record{Value: v, Timestamp: hlc.Timestamp{Millis: millis, NodeID: "a"}}}
	}
	local := at(5, 1)
	for _, c := range []struct {
		name       string
		local      *ormap.Record
		tombstoned bool
		remote     ormap.Record
		want       lwwmap.Outcome
	}{
		{"unknown", nil, false, at(1, 1), lwwmap.Applied},
		{"a value of nil", nil, false, at(1, 0xc0), lwwmap.Applied},
		{"newer", &local, false, at(6, 2), lwwmap.Applied},
		{"older", &local, false, at(4, 2), lwwmap.Superseded},
		{"same", &local, false, at(5, 1), lwwmap.Duplicate},
		{"same stamp, other value", &local, false, at(5, 2), lwwmap.Conflict},
		{"removed", nil, true, at(9, 1), lwwmap.Superseded},
		{"removal, however old", &local, false, at(1), lwwmap.Applied},
		{"removal before the add", nil, false, at(1), lwwmap.Applied},
		{"removal again", nil, true, at(9), lwwmap.Duplicate},
	} {
		if got := ormap.Decide(c.local, c.tombstoned, c.remote); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

// write is one add or removal. A tag belongs to one key, and a stamp is used once.
type write struct {
	key    string
	record ormap.Record
}

func drawWrites(t *rapid.T) []write {
	return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) write {
		n := rapid.IntRange(0, 5).Draw(t, "tag")
		r := ormap.Record{Tag: fmt.Sprint("t", n)}
		r.Timestamp = hlc.Timestamp{Millis: rapid.Uint64Range(0, 3).Draw(t, "millis"), NodeID: "a"}
		if rapid.IntRange(0, 3).Draw(t, "removal") > 0 {
			r.Value = []byte{byte(r.Timestamp.Millis)}
		}
		return write{fmt.Sprint("k", n%2), r}
	}), 0, 12).Draw(t, "writes")
}

// CRDT-01, CRDT-03, MRK-01: order and repetition do not matter, neither of ops nor of
// whole keys that are merged, and equal maps have equal roots.
func TestMergeLaws(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		writes := drawWrites(t)
		build := func(writes []write) *ormap.Map {
			m := new(ormap.Map)
			for _, w := range writes {
				m.Merge(w.key, w.record)
			}
			return m
		}
		want := build(writes)
		other := build(rapid.Permutation(slices.Concat(writes, writes)).Draw(t, "order"))
		if other.Digest() != want.Digest() || root(other, merkle.Mixed) != root(want, merkle.Mixed) || root(other, merkle.Plain) != root(want, merkle.Plain) {
			t.Fatal("the order of writes matters")
		}
		// Two replicas that saw a part each and merge each other's keys are equal.
		cut := rapid.IntRange(0, len(writes)).Draw(t, "cut")
		a, b := build(writes[:cut]), build(writes[cut:])
		for range 2 {
			for _, pair := range [][2]*ormap.Map{{a, b}, {b, a}} {
				for _, key := range []string{"k0", "k1"} {
					pair[0].MergeKey(key, slices.Collect(pair[1].Records(key)), pair[1].Tombstones())
				}
			}
		}
		if a.Digest() != want.Digest() || b.Digest() != want.Digest() {
			t.Fatal("replicas that merged differ")
		}
		for _, w := range writes {
			if want.Removed(w.record.Tag) {
				for r := range want.Records(w.key) {
					if r.Tag == w.record.Tag {
						t.Fatal("a removed record is there")
					}
				}
			}
		}
	})
}

func TestMap(t *testing.T) {
	now := int64(1000)
	clock := hlc.NewClock("n", func() time.Time { return time.UnixMilli(now) })
	m := new(ormap.Map)
	x := m.Add(clock, "k", []byte{1}, 0)
	y := m.Add(clock, "k", []byte{2}, 50)
	m.Add(clock, "k", []byte{3}, 0)
	m.Apply("k", ormap.Record{Tag: x.Tag, Record: lwwmap.Record{Value: []byte{9}, Timestamp: x.Timestamp}})
	if got := m.Get("k", 1000); !cmp.Equal(got, [][]byte{{9}, {2}, {3}}) {
		t.Errorf("values %v", got)
	}
	if got := m.Get("k", 2000); !cmp.Equal(got, [][]byte{{9}, {3}}) {
		t.Errorf("after the ttl %v", got)
	}
	if tags := m.Remove("k", []byte{2}); !slices.Equal(tags, []string{y.Tag}) || !m.Removed(y.Tag) || m.Apply("k", y) {
		t.Errorf("removed %v", tags)
	}
	if key, ok := m.ApplyTombstone(x.Tag); !ok || key != "k" || len(m.Get("k", 0)) != 1 {
		t.Errorf("the tombstone belongs to %q", key)
	}
	if _, ok := m.ApplyTombstone("unknown"); ok || !m.Removed("unknown") {
		t.Error("a tombstone of an unknown tag is not kept")
	}
	if n := m.Prune(hlc.Timestamp{Millis: 1000, Counter: 1, NodeID: "n"}); n != 1 || m.Removed(x.Tag) || !m.Removed(y.Tag) || !m.Removed("unknown") {
		t.Errorf("pruned %d", n)
	}
	if m.Remove("none", []byte{1}) != nil || m.Get("none", 0) != nil {
		t.Error("an unknown key holds something")
	}
}

func BenchmarkItemHash(b *testing.B) {
	r := ormap.Record{Tag: "1700000000000:0:client-a"}
	r.Timestamp = hlc.Timestamp{Millis: 1_700_000_000_000, NodeID: "client-a"}
	r.Value, _ = msgval.FromJSON([]byte(`{"name":"somebody","tags":["a","b"],"address":{"name":"x","city":"y"},"n":12.5}`))
	b.ReportAllocs()
	for b.Loop() {
		ormap.ExtendItem(1, r)
	}
}
