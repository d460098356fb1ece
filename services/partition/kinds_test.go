package partition

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/google/go-cmp/cmp"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/msgval"
	"github.com/topgun-sync/topgun/core/ormap"
	"github.com/topgun-sync/topgun/core/pncounter"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

// add is an op that adds a string under a tag.
func add(key, tag, value string, millis uint64, nodeID string) *partitionv1.Op {
	op := put(key, value, millis, nodeID)
	op.Kind, op.Tag = or, tag
	return op
}

func remove(key, tag string, millis uint64, nodeID string) *partitionv1.Op {
	return add(key, tag, "", millis, nodeID)
}

// count is an op that reports a counter's node.
func count(name, nodeID string, positive, negative uint64) *partitionv1.Op {
	return &partitionv1.Op{
		Kind: counter, Map: "+" + name, Key: []byte(name), Tag: nodeID,
		Record: &typesv1.Record{Value: pncounter.Sides{Positive: positive, Negative: negative}.Append(nil)},
	}
}

// get returns what a key holds, by tag.
func (n *node) get(kind typesv1.Kind, name, key string) map[string]*typesv1.Change {
	n.world.t.Helper()
	resp, err := n.Get(n.world.t.Context(), &partitionv1.GetRequest{Kind: kind, Map: name, Keys: [][]byte{[]byte(key)}})
	if err != nil {
		n.world.t.Fatal(err)
	}
	byTag := make(map[string]*typesv1.Change)
	for _, c := range resp.GetChanges() {
		if c.GetKind() != kind || string(c.GetKey()) != key || c.GetMap() != name {
			n.world.t.Errorf("asked for %s of %s, got %v", key, name, c)
		}
		byTag[c.GetTag()] = c
	}
	return byTag
}

// orModel puts what a node holds of an OR-map into an independent implementation.
func (n *node) orModel(name string) *ormap.Map {
	n.world.t.Helper()
	m := new(ormap.Map)
	var after *typesv1.Arrival
	for {
		resp, err := n.Since(n.world.t.Context(), &partitionv1.SinceRequest{Map: name, Kind: or, After: after, Limit: 100})
		if err != nil {
			n.world.t.Fatal(err)
		}
		for _, c := range resp.GetChanges() {
			m.Merge(string(c.GetKey()), ormap.Record{Tag: c.GetTag(), Record: recordFromProto(c.GetRecord())})
		}
		if after = resp.GetCovered(); !resp.GetMore() {
			return m
		}
	}
}

// checkRoots compares both roots of an OR-map with those of the model.
func (n *node) checkRoots(name string, m *ormap.Map) {
	n.world.t.Helper()
	for combine, rule := range map[partitionv1.Combine]merkle.Combine{
		partitionv1.Combine_COMBINE_MIXED: merkle.Mixed, partitionv1.Combine_COMBINE_PLAIN: merkle.Plain,
	} {
		resp, err := n.Leaves(n.world.t.Context(), &partitionv1.LeavesRequest{Map: name, Kind: or, Combine: combine})
		if err != nil {
			n.world.t.Fatal(err)
		}
		var got merkle.Leaves
		for i, leaf := range resp.GetLeaves() {
			got.AddSum(int(leaf), resp.GetHashes()[i])
		}
		if merkle.NewTree(&got, rule).Root() != merkle.NewTree(m.Leaves(rule), rule).Root() {
			n.world.t.Errorf("%s: the root of the OR-map differs from the one built from scratch", combine)
		}
	}
}

func TestACK06_TagsMergeAndRepeat(t *testing.T) {
	n := newWorld(t).start()
	for i, step := range []struct {
		op   *partitionv1.Op
		want string
	}{
		{add("k", "t", "x", 5, "a"), "APPLIED"},
		{add("k", "t", "x", 5, "a"), "DUPLICATE"},
		{add("k", "t", "y", 5, "a"), "REJECTED"},
		{add("k", "t", "y", 4, "a"), "SUPERSEDED x@5:a"},
		{add("k", "t", "y", 6, "a"), "APPLIED"},
		{add("k", "u", "x", 1, "b"), "APPLIED"},
		{remove("k", "t", 1, "a"), "APPLIED"}, // however old
		{remove("k", "t", 9, "a"), "DUPLICATE"},
		{add("k", "t", "z", 99, "a"), "SUPERSEDED -@1:a"},
		{remove("k", "later", 2, "c"), "APPLIED"},
		{add("k", "later", "x", 1, "c"), "SUPERSEDED -@2:c"},
		{add("other", "u", "x", 1, "b"), "APPLIED"}, // the same tag under another key
		{remove("other", "u", 2, "b"), "APPLIED"},
	} {
		r := n.apply(step.op)[0]
		got := outcomeWords([]*partitionv1.Receipt{r})
		if r.GetWinner() != nil {
			got += " " + describeRecord(r.GetWinner())
		}
		if got != step.want {
			t.Errorf("step %d: %s, want %s", i, got, step.want)
		}
	}
	tags := n.get(or, "m", "k")
	if len(tags) != 3 || len(tags["u"].GetRecord().GetValue()) == 0 || len(tags["t"].GetRecord().GetValue()) != 0 {
		t.Errorf("the key holds %v", tags)
	}
	n.checkRoots("m", n.orModel("m"))
	if maps := n.listMaps(); !slices.Equal(maps, []string{"m OR 1+3"}) {
		t.Errorf("maps %v", maps)
	}
}

func (n *node) listMaps() (list []string) {
	resp, err := n.ListMaps(n.world.t.Context(), nil)
	if err != nil {
		n.world.t.Fatal(err)
	}
	for _, m := range resp.GetMaps() {
		kind := strings.TrimPrefix(m.GetKind().String(), "KIND_")
		list = append(list, fmt.Sprintf("%s %s %d+%d", m.GetName(), kind, m.GetRecords(), m.GetTombstones()))
	}
	return list
}

func TestACK06_CountersMergeAndRepeat(t *testing.T) {
	n := newWorld(t).start()
	const most = pncounter.MaxSum
	for i, step := range []struct {
		op   *partitionv1.Op
		want string
	}{
		{count("c", "a", 5, 1), "APPLIED"},
		{count("c", "a", 5, 1), "DUPLICATE"},
		{count("c", "a", 4, 2), "APPLIED"}, // the maximum of each side
		{count("c", "a", 5, 2), "DUPLICATE"},
		{count("c", "b", most-5, 0), "APPLIED"},
		{count("c", "c", 1, 0), "REJECTED"},
		{count("c", "c", 0, most-1), "REJECTED"},
		{count("c", "c", 0, most+1), "REJECTED"},
		{count("c", "c", 0, 0), "DUPLICATE"}, // nothing new
		{count("d", "c", 0, most), "APPLIED"},
	} {
		if got := outcomeWords(n.apply(step.op)); got != step.want {
			t.Errorf("step %d: %s, want %s", i, got, step.want)
		}
	}
	nodes := n.get(counter, "+c", "c")
	if got := nodes["a"].GetRecord(); len(nodes) != 2 || !msgval.Equal(got.GetValue(), pncounter.Sides{Positive: 5, Negative: 2}.Append(nil)) ||
		!strings.HasPrefix(got.GetTimestamp().GetNodeId(), "topgun-") {
		t.Errorf("the counter holds %v", nodes)
	}
	if maps := n.listMaps(); len(maps) != 0 {
		t.Errorf("counters are listed among the maps: %v", maps)
	}
}

func TestRES01_ACounterHasABoundedNumberOfNodes(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	var ops []*partitionv1.Op
	for i := range pncounter.MaxNodes {
		ops = append(ops, count("c", fmt.Sprint("n", i), 1, 1))
	}
	for batch := range slices.Chunk(ops, 5000) {
		n.apply(batch...)
	}
	for range 2 {
		got := n.apply(count("c", "one more", 1, 0), count("c", "n1", 2, 0))
		if got[0].GetReason() != reasonTooManyNodes || got[1].GetOutcome() == partitionv1.Outcome_OUTCOME_REJECTED {
			t.Errorf("%v", got)
		}
		n.stop()
		n = w.start()
	}
}

// The state of 10,000 tags under one key, each of which changes once more, costs what
// their number says, not its square.
func TestRES01_ManyTagsUnderOneKey(t *testing.T) {
	n := newWorld(t).start()
	const tags = 10_000
	start := time.Now()
	for _, makeOp := range []func(i int) *partitionv1.Op{
		func(i int) *partitionv1.Op { return add("k", fmt.Sprintf("%d:0:a", tags-i), "value", 1, "a") },
		func(i int) *partitionv1.Op { return add("k", fmt.Sprintf("%d:0:a", i+1), "other", 2, "a") },
	} {
		var ops []*partitionv1.Op
		for i := range tags {
			ops = append(ops, makeOp(i))
		}
		n.apply(ops...)
	}
	n.checkRoots("m", n.orModel("m"))
	for i := range 100 { // and each is hashed when somebody asks
		n.apply(remove("k", fmt.Sprintf("%d:0:a", i+1), 3, "a"))
		if _, err := n.Leaves(t.Context(), &partitionv1.LeavesRequest{Map: "m", Kind: or}); err != nil {
			t.Fatal(err)
		}
	}
	n.checkRoots("m", n.orModel("m"))
	t.Logf("took %s", time.Since(start))
}

func TestRES01_TheValuesOfAKeyAreBounded(t *testing.T) {
	n := newWorld(t).start()
	value := strings.Repeat("x", 250<<10)
	var got []string
	for i := range 18 {
		r := n.apply(add("k", fmt.Sprint("t", i), value, 1, "a"))[0]
		got = append(got, outcomeWords([]*partitionv1.Receipt{r})+r.GetReason())
	}
	if got[15] != "APPLIED" || got[17] != "REJECTED"+reasonKeyTooLarge {
		t.Errorf("%v", got)
	}
	// What is removed gives its room back, and a tag may be written again.
	for _, op := range []*partitionv1.Op{remove("k", "t1", 2, "a"), add("k", "new", value, 1, "a"), add("k", "t2", value, 2, "a")} {
		if got := outcomeWords(n.apply(op)); got != "APPLIED" {
			t.Errorf("%s: %s", op.GetTag(), got)
		}
	}
	n.checkRoots("m", n.orModel("m"))
}

// Old removals that come again after the key was written anew remove what they
// removed, and nothing else (CRDT-03).
func TestCRDT03_AnOldRemovalAfterReCreation(t *testing.T) {
	n := newWorld(t).start()
	n.apply(add("k", "t1", "x", 1, "a"), remove("k", "t1", 2, "a"), add("k", "t2", "x", 3, "a"))
	if got := outcomeWords(n.apply(remove("k", "t1", 2, "a"), add("k", "t1", "x", 1, "a"))); got != "DUPLICATE SUPERSEDED" {
		t.Error(got)
	}
	tags := n.get(or, "m", "k")
	if len(tags["t2"].GetRecord().GetValue()) == 0 || len(tags["t1"].GetRecord().GetValue()) > 0 {
		t.Errorf("the key holds %v", tags)
	}
}

// An LWW-map, an OR-map and a counter of one name are three things (CRDT-04).
func TestCRDT04_KindsDoNotTouch(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	n.apply(put("k", "single", 5, "a"), add("k", "t", "many", 9, "a"), count("m", "a", 1, 0))
	n.apply(remove("k", "t", 9, "a"))
	n.stop()
	w.store.drain(t, w.log, 1)
	n = w.start()
	if got := n.get(lww, "m", "k")[""]; describeRecord(got.GetRecord()) != "single@5:a" {
		t.Errorf("the LWW-map holds %v", got)
	}
	if got := n.get(or, "m", "k")["t"]; describeRecord(got.GetRecord()) != "-@9:a" {
		t.Errorf("the OR-map holds %v", got)
	}
	if maps := n.listMaps(); !slices.Equal(maps, []string{"m LWW 1+0", "m OR 0+1"}) {
		t.Errorf("maps %v", maps)
	}
}

func TestCLK02_AForgedStampOfATag(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	future := w.millis() + 3_600_000
	forged := add("k", "t", "x", future, "a")
	first := n.apply(forged)[0]
	stored := first.GetWinner().GetTimestamp()
	if first.GetOutcome() != partitionv1.Outcome_OUTCOME_RESTAMPED || stored.GetMillis() >= future || !strings.HasPrefix(stored.GetNodeId(), "topgun-") {
		t.Fatalf("%v", first)
	}
	n.stop()
	n = w.start()
	if again := n.apply(forged)[0]; again.GetOutcome() != partitionv1.Outcome_OUTCOME_RESTAMPED || describeRecord(again.GetWinner()) != describeRecord(first.GetWinner()) {
		t.Errorf("sent again: %v, want %v", again, first)
	}
	if len(n.get(or, "m", "k")) != 1 {
		t.Error("the op sent again made another tag")
	}
	// A removal is one whatever its stamp; but the stamp must not keep its tombstone for
	// ever.
	if got := n.apply(remove("k", "t", future, "a"))[0]; got.GetOutcome() != partitionv1.Outcome_OUTCOME_RESTAMPED || got.GetWinner().GetTimestamp().GetMillis() >= future {
		t.Errorf("%v", got)
	}
	if got := outcomeWords(n.apply(remove("k", "t", future, "a"), forged)); got != "DUPLICATE SUPERSEDED" {
		t.Error(got)
	}
}

func TestCRDT05_TagsExpire(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	op := add("k", "t", "v", w.millis(), "a")
	op.Record.TtlMillis = 3_600_000
	n.apply(op, add("k", "stays", "v", 1, "a"))
	n.stop()
	w.wall.set(2 * time.Hour)
	n = w.start()
	for len(n.get(or, "m", "k")["t"].GetRecord().GetValue()) > 0 {
	}
	want := fmt.Sprintf("-@%d:a-ttl", op.GetRecord().GetTimestamp().GetMillis())
	if got := describeRecord(n.get(or, "m", "k")["t"].GetRecord()); got != want {
		t.Errorf("the tag holds %s, want %s", got, want)
	}
	if got := outcomeWords(n.apply(op)); got != "SUPERSEDED" {
		t.Errorf("sent again: %s", got)
	}
	n.checkRoots("m", n.orModel("m"))
}

func TestMRK03_TheRootOfAnORMapEqualsATreeBuiltFromScratch(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	n.checkRoots("m", n.orModel("m"))
	long := strings.Repeat("long ", 300)
	for round := range uint64(3) {
		var ops []*partitionv1.Op
		for i := range 900 { // beyond what is scanned
			key := fmt.Sprint("k", i%400)
			ops = append(ops, add(key, fmt.Sprint("t", i%7, ":", i), fmt.Sprint("v", i), round+1, "a"))
			if i%3 == 0 {
				ops = append(ops, remove(key, fmt.Sprint("t", i%7, ":", i-int(round)*30), round+1, "b"))
			}
			if i%50 == 0 { // beyond what is hashed at once
				ops = append(ops, add("large", fmt.Sprint(i), long, round+1, "a"))
			}
		}
		n.apply(ops...)
		n.checkRoots("m", n.orModel("m"))
	}
	n.stop()
	n = w.start()
	n.checkRoots("m", n.orModel("m"))
	all, err := n.Records(t.Context(), &partitionv1.RecordsRequest{Map: "m", Kind: or, LastLeaf: 4095})
	if err != nil {
		t.Fatal(err)
	}
	m := new(ormap.Map)
	for _, c := range all.GetChanges() {
		m.Merge(string(c.GetKey()), ormap.Record{Tag: c.GetTag(), Record: recordFromProto(c.GetRecord())})
	}
	if m.Digest() != n.orModel("m").Digest() {
		t.Error("Records and Since show different maps")
	}
}

// Everything in a receipt is in the log up to its lane and sequence.
func TestReceiptsNameTheCommit(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	send := func(op *partitionv1.Op) *partitionv1.ShardReceipt {
		t.Helper()
		resp, err := n.Apply(t.Context(), &partitionv1.ApplyRequest{Shards: []*partitionv1.ShardOps{{Shard: shardFor(op.GetKey()), Ops: []*partitionv1.Op{op}}}})
		if err != nil {
			t.Fatal(err)
		}
		return resp.GetShards()[0]
	}
	first := send(put("k", "v", 1, "a"))
	if first.GetLane() == "" || first.GetSequence() == 0 {
		t.Fatalf("%v", first)
	}
	if again := send(put("k", "v", 1, "a")); again.GetSequence() != first.GetSequence() {
		t.Errorf("a repetition is logged at %d, its record at %d", again.GetSequence(), first.GetSequence())
	}
	found := false
	for entry, err := range w.log.Read(t.Context(), 1, false) {
		if err != nil {
			t.Fatal(err)
		}
		if entry.Lane == first.GetLane() && entry.Sequence == first.GetSequence() {
			found = entry.Commit.GetChanges() != nil
		}
	}
	if !found {
		t.Error("no commit with changes has the receipt's lane and sequence")
	}
	n.stop()
	n = w.start()
	if again := send(put("k", "v", 1, "a")); again.GetSequence() != 0 || again.GetLane() != "" {
		t.Errorf("what another process logged: %v", again)
	}
}

func TestChangesSayWhatTheyReplaced(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	n.apply(put("k", "v", 1, "a"), put("k", "w", 2, "a"), put("k", "", 3, "a"), put("k", "x", 4, "a"),
		add("k", "t", "v", 1, "a"), add("k", "t", "w", 2, "a"), remove("k", "t", 3, "a"), remove("k", "u", 3, "a"))
	n.stop()
	var got []bool
	for _, e := range n.events.all() {
		for _, c := range e.GetChanges() {
			got = append(got, c.GetReplaced())
		}
	}
	if want := []bool{false, true, true, false, false, true, true, false}; !slices.Equal(got, want) {
		t.Errorf("replaced %v, want %v", got, want)
	}
}

// A pruned change takes away the tombstone that is older, and nothing else.
func TestLoadOfPrunedChanges(t *testing.T) {
	for _, kind := range []typesv1.Kind{lww, or} {
		s := newShard(0, new(arrivalClock), time.Now, nil)
		at := func(millis uint64) arrival { return arrival{millis: millis} }
		key := func(name string) string {
			if kind == or {
				return string(joinTag([]byte(name), []byte("t")))
			}
			return name
		}
		load := func(c change) {
			name, _ := splitTag(c.key)
			c.kind, c.table = kind, "m"
			s.load(c, merkle.Hash(name))
		}
		tombstone := record("", 1, 0)
		tombstone.Value = nil
		load(change{key: key("gone"), record: tombstone, arrival: at(1)})
		load(change{key: key("gone"), pruned: true, arrival: at(5)})
		load(change{key: key("gone"), pruned: true, arrival: at(5)})
		load(change{key: key("back"), record: tombstone, arrival: at(1)})
		load(change{key: key("back"), pruned: true, arrival: at(5)})
		load(change{key: key("back"), record: record("v", 1, 0), arrival: at(6)})
		load(change{key: key("newer"), record: record("v", 1, 0), arrival: at(7)})
		load(change{key: key("newer"), pruned: true, arrival: at(5)})
		s.ready()
		var keys []string
		for _, c := range s.tables[kind]["m"].inLeaves(0, 4095) {
			name, _ := splitTag(c.key)
			keys = append(keys, name)
		}
		slices.Sort(keys)
		if !slices.Equal(keys, []string{"back", "newer"}) || s.records.Load() != 2 || s.tables[kind]["m"].tombstones != 0 {
			t.Errorf("%s: %v, %d records", kind, keys, s.records.Load())
		}
	}
}

// Forgetting takes entries out of every list, also out of long ones.
func TestForget(t *testing.T) {
	for _, kind := range []typesv1.Kind{lww, or} {
		s := newShard(0, new(arrivalClock), time.Now, nil)
		table := s.table(kind, "m")
		for i := range 3000 {
			key := fmt.Append(nil, "k", i%1000)
			hash := merkle.HashBytes(key)
			if kind == or {
				key = joinTag(key, fmt.Append(nil, i))
			}
			r := record("v", 1, 0)
			if i%2 == 0 {
				r.Value = nil
			}
			s.store(table, key, hash, r, hlc.Timestamp{}, 1, "")
		}
		var dead []*entry
		for _, e := range table.records {
			if len(e.value) == 0 {
				dead = append(dead, e)
			}
		}
		for chunk := range slices.Chunk(dead, 100) {
			table.forget(chunk...)
		}
		again := newTable(kind, "m")
		again.loading = true
		for _, e := range table.records {
			again.put([]byte(e.key), e.hash, e.record(), e.node, e.arrival, nil)
		}
		again.ready()
		if len(table.records) != len(again.records) || table.tombstones != 0 {
			t.Errorf("%s: %d records, %d tombstones", kind, len(table.records), table.tombstones)
		}
		for _, rule := range []merkle.Combine{merkle.Mixed, merkle.Plain} {
			if merkle.NewTree(table.leafSums(rule), rule).Root() != merkle.NewTree(again.leafSums(rule), rule).Root() {
				t.Errorf("%s: the root is not that of what is left", kind)
			}
		}
		keysIn := func(changes []change) (keys []string) {
			for _, c := range changes {
				keys = append(keys, c.key)
			}
			slices.Sort(keys)
			return keys
		}
		if diff := cmp.Diff(keysIn(again.inLeaves(0, 4095)), keysIn(table.inLeaves(0, 4095))); diff != "" {
			t.Errorf("%s (-want +got):\n%s", kind, diff)
		}
		changes, cut := table.since(arrival{}, arrival{millis: 1 << 50}, 10_000, 1<<30)
		if cut || len(changes) != len(table.records) {
			t.Errorf("%s: the arrival log shows %d of %d", kind, len(changes), len(table.records))
		}
	}
}

func TestACK04_BadOpsOfEachKind(t *testing.T) {
	n := newWorld(t).start()
	change := func(op *partitionv1.Op, set func(*partitionv1.Op)) *partitionv1.Op { set(op); return op }
	for want, op := range map[string]*partitionv1.Op{
		"BAD_KIND":          change(put("k", "v", 1, "a"), func(o *partitionv1.Op) { o.Kind = typesv1.Kind_KIND_LOCK }),
		"BAD_TAG: a record": change(put("k", "v", 1, "a"), func(o *partitionv1.Op) { o.Tag = "t" }),
		"BAD_TAG: a tag":    add("k", "", "v", 1, "a"),
		"BAD_TAG":           add("k", strings.Repeat("t", 257), "v", 1, "a"),
		"BAD_TAG: ":         add("k", "a\x00b", "v", 1, "a"),
		"BAD_MAP":           change(add("k", "t", "v", 1, "a"), func(o *partitionv1.Op) { o.Map = "$devices" }),
		"BAD_MAP_NAME":      change(put("k", "v", 1, "a"), func(o *partitionv1.Op) { o.Map = "+k" }),
		"BAD_NAME":          change(count("c", "a", 1, 1), func(o *partitionv1.Op) { o.Map = "+d" }),
		"BAD_NODE":          count("c", "", 1, 1),
		"BAD_MESSAGE":       change(count("c", "a", 1, 1), func(o *partitionv1.Op) { o.Record.Value = []byte{0x91, 1} }),
		"COUNTER_TOO_LARGE": count("c", "a", 1<<60, 1),
		"BAD_TIMESTAMP":     change(add("k", "t", "v", 1, "a"), func(o *partitionv1.Op) { o.Record.Timestamp = nil }),
	} {
		if r := n.apply(op)[0]; r.GetOutcome() != partitionv1.Outcome_OUTCOME_REJECTED || !strings.HasPrefix(r.GetReason(), want) {
			t.Errorf("%s: %v", want, r)
		}
	}
	device := change(put("device", "v", 1, "a"), func(o *partitionv1.Op) { o.Map = "$devices" })
	if got := outcomeWords(n.apply(device)); got != "APPLIED" {
		t.Errorf("$devices: %s", got)
	}
	if maps := n.listMaps(); len(maps) != 0 {
		t.Errorf("maps %v", maps)
	}
	n.stop()
	if events := n.events.all(); len(events) != 0 {
		t.Errorf("events of what nobody looks at: %v", events)
	}
}

func TestGet(t *testing.T) {
	n := newWorld(t).start()
	value := strings.Repeat("x", 250<<10)
	var keys [][]byte
	for i := range 70 {
		n.apply(put(fmt.Sprint("k", i), value, 1, "a"))
		keys = append(keys, fmt.Append(nil, "k", i))
	}
	resp, err := n.Get(t.Context(), &partitionv1.GetRequest{Map: "m", Keys: keys[:60]})
	if err != nil || len(resp.GetChanges()) != 60 {
		t.Errorf("%d records, %v", len(resp.GetChanges()), err)
	}
	if _, err := n.Get(t.Context(), &partitionv1.GetRequest{Map: "m", Keys: keys}); connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("17 MiB: %v", err)
	}
	for name, req := range map[string]*partitionv1.GetRequest{
		"none": {Map: "m"}, "kind": {Map: "m", Keys: keys[:1], Kind: typesv1.Kind_KIND_LOCK},
	} {
		if _, err := n.Get(t.Context(), req); connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := n.Leaves(t.Context(), &partitionv1.LeavesRequest{Map: "+c", Kind: counter}); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("leaves of a counter: %v", err)
	}
}
