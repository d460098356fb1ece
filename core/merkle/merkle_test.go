package merkle_test

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/keyspace"
	"github.com/topgun-sync/topgun/core/merkle"
)

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

func TestVectorsHash(t *testing.T) {
	var v struct {
		FNV1a []struct {
			Input, UTF16, UTF8, LeafPath string
			Hash                         uint32
		}
		Mix     []struct{ H, Mix uint32 }
		Combine []struct {
			Hashes                     []uint32
			Combined, CombineLegacySum uint32
		}
	}
	load(t, "hash.json", &v)
	if len(v.FNV1a) == 0 || len(v.Mix) == 0 || len(v.Combine) == 0 {
		t.Fatal("the vectors are not what this test reads")
	}
	surrogates := 0
	for _, c := range v.FNV1a {
		raw, err := hex.DecodeString(c.UTF8)
		if err != nil {
			t.Fatal(err)
		}
		// A Go string holds no unpaired surrogate; those two cases are the only
		// ones left out.
		if c.UTF16 == "d83d" || c.UTF16 == "de00" {
			surrogates++
			continue
		}
		h := merkle.Hash(string(raw))
		if h != c.Hash || merkle.HashBytes(raw) != c.Hash {
			t.Errorf("Hash(%q) = %d, want %d", raw, h, c.Hash)
		}
		if got := fmt.Sprintf("%03x", merkle.Leaf(h)); got != c.LeafPath {
			t.Errorf("Leaf(Hash(%q)) = %s, want %s", raw, got, c.LeafPath)
		}
	}
	if surrogates != 2 {
		t.Errorf("%d cases left out, want 2", surrogates)
	}
	for _, c := range v.Mix {
		if got := merkle.Mix(c.H); got != c.Mix {
			t.Errorf("Mix(%d) = %d, want %d", c.H, got, c.Mix)
		}
	}
	for _, c := range v.Combine {
		for rule, want := range map[merkle.Combine]uint32{merkle.Mixed: c.Combined, merkle.Plain: c.CombineLegacySum} {
			var l merkle.Leaves
			for _, h := range c.Hashes {
				l.Add(7, h, rule)
			}
			if got := l.At(7); got != want {
				t.Errorf("combine %v by rule %d = %d, want %d", c.Hashes, rule, got, want)
			}
		}
	}
}

// A byte that is not UTF-8 hashes as a replacement character.
func TestHashOfBrokenUTF8(t *testing.T) {
	if got, want := merkle.Hash("a\xed\xa0\xbdb"), merkle.Hash("a\ufffd\ufffd\ufffdb"); got != want {
		t.Errorf("%d, want %d", got, want)
	}
}

type item struct {
	key string
	ts  hlc.Timestamp
}

func (i item) addTo(l *merkle.Leaves, c merkle.Combine) {
	l.Add(merkle.Leaf(merkle.Hash(i.key)), merkle.ItemHash(i.key, i.ts), c)
}

func (i item) removeFrom(l *merkle.Leaves, c merkle.Combine) {
	l.Remove(merkle.Leaf(merkle.Hash(i.key)), merkle.ItemHash(i.key, i.ts), c)
}

type dataset struct {
	Name    string
	Records []json.RawMessage
	Items   []struct {
		Key, LeafPath     string
		ItemHash, KeyHash uint32
		Partition         int
	}
	RootHash                uint32
	Level1, Level2, Level3  map[string]uint32
	CombineOfPartitionRoots uint32
	PartitionsUsed          int
}

// items reads the records of either file.
func (d dataset) items(t *testing.T) (list []item) {
	t.Helper()
	newest := make(map[string]hlc.Timestamp) // some datasets list what was overwritten too
	for _, raw := range d.Records {
		var i item
		if raw[0] == '[' {
			if err := json.Unmarshal(raw, &[]any{&i.key, &i.ts.Millis, &i.ts.Counter, &i.ts.NodeID}); err != nil {
				t.Fatal(err)
			}
		} else {
			var r struct {
				Key    string
				Record struct{ Timestamp hlc.Timestamp }
			}
			if err := json.Unmarshal(raw, &r); err != nil {
				t.Fatal(err)
			}
			i = item{r.Key, r.Record.Timestamp}
		}
		if i.ts.Compare(newest[i.key]) > 0 {
			newest[i.key] = i.ts
		}
	}
	for key, ts := range newest {
		list = append(list, item{key, ts})
	}
	return list
}

func nonZero(m map[string]uint32) map[string]uint32 {
	m = maps.Clone(m)
	maps.DeleteFunc(m, func(_ string, h uint32) bool { return h == 0 })
	return m
}

// level returns the hashes of all nodes whose path has length n, as the client
// learns them: by Buckets.
func level(t *testing.T, tree *merkle.Tree, n int) map[string]uint32 {
	t.Helper()
	paths := map[string]uint32{"": tree.Root()}
	for range n {
		next := make(map[string]uint32)
		for path := range paths {
			digits, hashes, ok := tree.Buckets(path)
			if !ok {
				t.Fatalf("Buckets(%q) is refused", path)
			}
			for i, d := range digits {
				p := path + string(d)
				next[p] = hashes[i]
				if got := tree.Hash(p); got != hashes[i] {
					t.Fatalf("Hash(%q) = %d, in Buckets it is %d", p, got, hashes[i])
				}
			}
		}
		paths = next
	}
	return paths
}

func TestVectorsTrees(t *testing.T) {
	var sets []dataset
	for _, file := range []string{"merkle-lww.json", "merkle-lww-1000.json"} {
		var v struct{ Datasets []dataset }
		load(t, file, &v)
		sets = append(sets, v.Datasets...)
	}
	if len(sets) < 5 {
		t.Fatalf("%d datasets", len(sets))
	}
	for _, d := range sets {
		t.Run(d.Name, func(t *testing.T) {
			items := d.items(t)
			var whole merkle.Leaves
			parts := make(map[int]*merkle.Leaves) // by partition
			for _, i := range items {
				i.addTo(&whole, merkle.Mixed)
				p := keyspace.Partition(i.key)
				if parts[p] == nil {
					parts[p] = new(merkle.Leaves)
				}
				i.addTo(parts[p], merkle.Mixed)
				for _, want := range d.Items {
					if want.Key != i.key {
						continue
					}
					h := merkle.Hash(i.key)
					if want.KeyHash != h || want.ItemHash != merkle.ItemHash(i.key, i.ts) ||
						want.ItemHash != merkle.ItemHashOf(h, i.ts) ||
						want.Partition != p || want.LeafPath != fmt.Sprintf("%03x", merkle.Leaf(h)) {
						t.Errorf("item %q differs from %+v", i.key, want)
					}
				}
			}
			if len(d.Items) > 0 && len(items) != len(d.Items) {
				t.Errorf("%d items, want %d", len(items), len(d.Items))
			}
			tree := merkle.NewTree(&whole, merkle.Mixed)
			if tree.Root() != d.RootHash || tree.Hash("") != d.RootHash {
				t.Errorf("root %d, want %d", tree.Root(), d.RootHash)
			}
			for n, want := range []map[string]uint32{d.Level1, d.Level2, d.Level3} {
				if diff := cmp.Diff(nonZero(want), level(t, tree, n+1)); diff != "" && len(want) > 0 {
					t.Errorf("level %d (-want +got):\n%s", n+1, diff)
				}
			}
			var sum merkle.Leaves
			var wrong uint32
			for _, l := range parts {
				sum.Merge(l)
				wrong += merkle.Mix(merkle.NewTree(l, merkle.Mixed).Root())
			}
			if got := merkle.NewTree(&sum, merkle.Mixed).Root(); got != d.RootHash {
				t.Errorf("root of the sum of %d partitions is %d, want %d", len(parts), got, d.RootHash)
			}
			if d.PartitionsUsed > 1 && (d.RootHash == wrong || d.CombineOfPartitionRoots == d.RootHash) {
				t.Errorf("the root is that of folded partition roots, %d", wrong)
			}
		})
	}
}

func TestVectorsIncremental(t *testing.T) {
	var v struct {
		Incremental []struct {
			Step     string
			RootHash uint32
			Level1   map[string]uint32
		}
	}
	load(t, "merkle-lww.json", &v)
	const t0 = 1700000000000
	at := func(millis, counter uint64) hlc.Timestamp {
		return hlc.Timestamp{Millis: millis, Counter: counter, NodeID: "n"}
	}
	a, b := item{"a", at(t0, 0)}, item{"b", at(t0, 1)}
	a2, b2 := item{"a", at(t0+1, 0)}, item{"b", at(t0+3, 0)}
	steps := map[string]func(l *merkle.Leaves){
		"empty":                func(*merkle.Leaves) {},
		"put a @T0":            func(l *merkle.Leaves) { a.addTo(l, merkle.Mixed) },
		"put b @T0:1":          func(l *merkle.Leaves) { b.addTo(l, merkle.Mixed) },
		"remove a @T0+1":       func(l *merkle.Leaves) { a.removeFrom(l, merkle.Mixed); a2.addTo(l, merkle.Mixed) },
		"prune olderThan T0+2": func(l *merkle.Leaves) { a2.removeFrom(l, merkle.Mixed) },
		"remove b @T0+3":       func(l *merkle.Leaves) { b.removeFrom(l, merkle.Mixed); b2.addTo(l, merkle.Mixed) },
		"prune olderThan T0+9 (level1 keeps zero-hash buckets)": func(l *merkle.Leaves) { b2.removeFrom(l, merkle.Mixed) },
	}
	var l merkle.Leaves
	for _, s := range v.Incremental {
		step, ok := steps[s.Step]
		if !ok {
			t.Fatalf("unknown step %q", s.Step)
		}
		step(&l)
		tree := merkle.NewTree(&l, merkle.Mixed)
		if tree.Root() != s.RootHash {
			t.Errorf("after %q the root is %d, want %d", s.Step, tree.Root(), s.RootHash)
		}
		if diff := cmp.Diff(nonZero(s.Level1), level(t, tree, 1)); diff != "" {
			t.Errorf("after %q (-want +got):\n%s", s.Step, diff)
		}
	}
}

// MRK-01, MRK-03: the sums depend on the items that are there only, not on what
// was there before, the order, the number of shards, or the inner form.
func TestIncrementalEqualsRebuilt(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rule := rapid.SampledFrom([]merkle.Combine{merkle.Mixed, merkle.Plain}).Draw(t, "rule")
		shards := rapid.IntRange(1, 5).Draw(t, "shards")
		// Enough keys to cross from the sparse to the dense form at times.
		keys := rapid.SampledFrom([]int{3, 200, 600}).Draw(t, "keys")
		state := make(map[string]hlc.Timestamp)
		parts := make([]merkle.Leaves, shards)
		for range rapid.IntRange(0, keys).Draw(t, "steps") {
			key := fmt.Sprintf("key%d", rapid.IntRange(0, keys).Draw(t, "key"))
			l := &parts[keyspace.ShardOf(key, shards)]
			if old, ok := state[key]; ok {
				item{key, old}.removeFrom(l, rule)
				delete(state, key)
			}
			if rapid.IntRange(0, 9).Draw(t, "drop") > 0 {
				ts := hlc.Timestamp{Millis: rapid.Uint64().Draw(t, "millis"), NodeID: "ключ"}
				item{key, ts}.addTo(l, rule)
				state[key] = ts
			}
		}
		var rebuilt, sum merkle.Leaves
		for key, ts := range state {
			item{key, ts}.addTo(&rebuilt, rule)
		}
		for i := range parts {
			sum.Merge(&parts[i])
			for leaf, h := range parts[i].All() {
				if h == 0 {
					t.Fatalf("All yields leaf %d, which is empty", leaf)
				}
			}
		}
		if diff := cmp.Diff(maps.Collect(rebuilt.All()), maps.Collect(sum.All())); diff != "" {
			t.Fatalf("(-rebuilt +sum of shards):\n%s", diff)
		}
		last := -1
		for leaf, h := range sum.All() {
			if leaf <= last || h == 0 || h != sum.At(leaf) {
				t.Fatalf("All yields leaf %d after %d, hash %d", leaf, last, h)
			}
			last = leaf
		}
		a, b := merkle.NewTree(&rebuilt, rule), merkle.NewTree(sum.Clone(), rule)
		if *a != *b {
			t.Fatal("the trees differ")
		}
	})
}

func TestItemHashIsHashOfText(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		key := rapid.String().Draw(t, "key")
		ts := hlc.Timestamp{Millis: rapid.Uint64().Draw(t, "millis"), Counter: rapid.Uint64().Draw(t, "counter"), NodeID: rapid.String().Draw(t, "node")}
		if got, want := merkle.ItemHash(key, ts), merkle.Hash(key+":"+ts.String()); got != want {
			t.Fatalf("ItemHash(%q, %v) = %d, want %d", key, ts, got, want)
		}
	})
}

func TestPaths(t *testing.T) {
	for _, c := range []struct {
		path        string
		first, last int
		ok          bool
	}{
		{"", 0, 4095, true},
		{"8", 0x800, 0x8ff, true},
		{"87", 0x870, 0x87f, true},
		{"872", 0x872, 0x872, true},
		{"fff", 4095, 4095, true},
		{"8722", 0, 0, false},
		{"F", 0, 0, false},
		{"g", 0, 0, false},
		{"8\x00", 0, 0, false},
		{"é", 0, 0, false},
	} {
		first, last, ok := merkle.LeafRange(c.path)
		if first != c.first || last != c.last || ok != c.ok {
			t.Errorf("LeafRange(%q) = %d, %d, %v", c.path, first, last, ok)
		}
		_, _, ok = new(merkle.Tree).Buckets(c.path)
		if want := c.ok && len(c.path) < merkle.Depth; ok != want {
			t.Errorf("Buckets(%q) gives %v", c.path, ok)
		}
	}
	if got := new(merkle.Tree).Hash("nope"); got != 0 {
		t.Errorf("Hash of no path = %d", got)
	}
}

var sink uint32

func TestNoAllocations(t *testing.T) {
	ts := hlc.Timestamp{Millis: 1700000000000, Counter: 3, NodeID: "client-é"}
	long := strings.Repeat("ключ", 100)
	var l merkle.Leaves
	for i := range merkle.LeafCount {
		l.AddSum(i, 1)
	}
	for name, f := range map[string]func(){
		"Hash":      func() { sink += merkle.Hash(long) },
		"HashBytes": func() { sink += merkle.HashBytes([]byte("éé")) },
		"ItemHash":  func() { sink += merkle.ItemHash(long, ts) },
		"Add":       func() { l.Add(5, 7, merkle.Mixed) },
		"All of many leaves": func() {
			for _, h := range l.All() {
				sink += h
			}
		},
	} {
		if n := testing.AllocsPerRun(100, f); n != 0 {
			t.Errorf("%s allocates %v times", name, n)
		}
	}
}

func BenchmarkItemHash(b *testing.B) {
	ts := hlc.Timestamp{Millis: 1700000000000, NodeID: "0f3a7c1e-5f1a-4b7e-9a68-2d1f0c9b7e11"}
	for b.Loop() {
		sink += merkle.ItemHash("user:1234567", ts)
	}
}

func BenchmarkNewTree(b *testing.B) {
	var l merkle.Leaves
	for i := range merkle.LeafCount {
		l.AddSum(i, uint32(i)+1)
	}
	for b.Loop() {
		sink += merkle.NewTree(&l, merkle.Mixed).Root()
	}
}
