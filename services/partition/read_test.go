package partition

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/merkle"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

// model puts what a node holds of a map into an independent implementation.
func (n *node) model(name string) *lwwmap.Map {
	m := new(lwwmap.Map)
	for _, c := range n.everything(name, 0) {
		m.Merge(string(c.GetKey()), recordFromProto(c.GetRecord()))
	}
	return m
}

func TestMRK03_LeavesEqualATreeBuiltFromScratch(t *testing.T) {
	n := newWorld(t).start()
	check := func() {
		t.Helper()
		m := n.model("m")
		for combine, rule := range map[partitionv1.Combine]merkle.Combine{
			partitionv1.Combine_COMBINE_UNSPECIFIED: merkle.Mixed, partitionv1.Combine_COMBINE_PLAIN: merkle.Plain,
		} {
			resp, err := n.Leaves(t.Context(), &partitionv1.LeavesRequest{Map: "m", Combine: combine})
			if err != nil {
				t.Fatal(err)
			}
			var got merkle.Leaves
			for i, leaf := range resp.GetLeaves() {
				got.AddSum(int(leaf), resp.GetHashes()[i])
			}
			if merkle.NewTree(&got, rule).Root() != merkle.NewTree(m.Leaves(rule), rule).Root() {
				t.Errorf("%s: the root differs from the one built from scratch", combine)
			}
			if !slices.IsSorted(resp.GetLeaves()) || resp.GetRecords() != uint64(m.Len()) {
				t.Errorf("%s: %d records, want %d", combine, resp.GetRecords(), m.Len())
			}
			if resp.GetNowMillis() < resp.GetCovered().GetMillis() {
				t.Error("now is before covered")
			}
		}
	}
	check()
	var ops []*partitionv1.Op
	for i := range 1500 { // beyond what is scanned and what is sparse
		ops = append(ops, put(fmt.Sprint("k", i%1200), fmt.Sprint("v", i), uint64(i+1), "a"))
	}
	n.apply(ops...)
	check()
	n.apply(put("k7", "", 5000, "a"), put("k8", "new", 5000, "a"), put("new", "new", 5000, "a"))
	check()
}

func TestRecordsReturnsExactlyTheLeaves(t *testing.T) {
	n := newWorld(t).start()
	for _, count := range []int{100, 2000} { // scanned, and by lists
		var ops []*partitionv1.Op
		for i := range count {
			ops = append(ops, put(fmt.Sprint("k", i), "v", 1, "a"))
		}
		n.apply(ops...)
		for _, r := range [][2]uint32{{0, 4095}, {0, 0}, {100, 1700}, {4095, 4095}} {
			resp, err := n.Records(t.Context(), &partitionv1.RecordsRequest{Map: "m", FirstLeaf: r[0], LastLeaf: r[1]})
			if err != nil {
				t.Fatal(err)
			}
			want := 0
			for i := range count {
				if leaf := uint32(merkle.Leaf(merkle.Hash(fmt.Sprint("k", i)))); r[0] <= leaf && leaf <= r[1] {
					want++
				}
			}
			seen := make(map[string]bool)
			for _, c := range resp.GetChanges() {
				seen[string(c.GetKey())] = true
			}
			if len(seen) != want || len(resp.GetChanges()) != want {
				t.Errorf("leaves %v of %d records: %d, want %d", r, count, len(resp.GetChanges()), want)
			}
		}
	}
	for _, r := range [][2]uint32{{1, 0}, {0, 4096}} {
		if _, err := n.Records(t.Context(), &partitionv1.RecordsRequest{Map: "m", FirstLeaf: r[0], LastLeaf: r[1]}); connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("range %v: %v", r, err)
		}
	}
}

// Pages of every size, over all shards, hold each record once and in arrival order.
func TestSYN01_PagesNeitherSkipNorRepeat(t *testing.T) {
	n := newWorld(t).start()
	const count = 237
	for i := range count {
		n.apply(put(fmt.Sprint("k", i), "v", 1, "a"))
	}
	inShard := func(shard uint32) (n int) {
		for i := range count {
			if shardFor(fmt.Append(nil, "k", i)) == shard {
				n++
			}
		}
		return n
	}
	for _, req := range []*partitionv1.SinceRequest{
		{Limit: 1},
		{Limit: 7},
		{Limit: 1000},
		{MaxBytes: 1},
		{MaxBytes: 50},
		{Limit: 7, Shards: []uint32{2}},
		{MaxBytes: 50, Shards: []uint32{3}},
	} {
		req.Map = "m"
		count := count
		if len(req.GetShards()) > 0 {
			count = inShard(req.GetShards()[0])
		}
		var got []*typesv1.Change
		for {
			resp, err := n.Since(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			if req.GetLimit() > 0 && len(resp.GetChanges()) > int(req.GetLimit()) || req.GetMaxBytes() == 1 && len(resp.GetChanges()) > 1 {
				t.Fatalf("a page of %v has %d records", req, len(resp.GetChanges()))
			}
			got = append(got, resp.GetChanges()...)
			if !resp.GetMore() {
				break
			}
			req.After = resp.GetCovered()
		}
		if len(got) != count {
			t.Errorf("%v: %d records, want %d", req, len(got), count)
		}
		if !slices.IsSortedFunc(got, func(a, b *typesv1.Change) int {
			return arrivalFromProto(a.GetArrival()).compare(arrivalFromProto(b.GetArrival()))
		}) {
			t.Error("not in arrival order")
		}
	}
}

// A reader that follows while others write sees, in the end, everything.
func TestSYN01_AFollowerMissesNothingWhileOthersWrite(t *testing.T) {
	n := newWorld(t).start()
	var writers sync.WaitGroup
	for w := range 4 {
		writers.Go(func() {
			for i := range 150 {
				if _, err := n.tryApply(t.Context(), put(fmt.Sprint("k", (i*7+w)%90), fmt.Sprint(w, i), uint64(i+1), fmt.Sprint("n", w))); err != nil {
					t.Error(err)
				}
			}
		})
	}
	written := make(chan struct{})
	go func() { writers.Wait(); close(written) }()
	seen := new(lwwmap.Map)
	req := &partitionv1.SinceRequest{Map: "m", Limit: 13}
	for last := false; ; {
		resp, err := n.Since(context.Background(), req)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range resp.GetChanges() {
			if arrivalFromProto(c.GetArrival()).compare(arrivalFromProto(req.GetAfter())) <= 0 ||
				arrivalFromProto(c.GetArrival()).compare(arrivalFromProto(resp.GetCovered())) > 0 {
				t.Error("a record outside of its page's range")
			}
			seen.Merge(string(c.GetKey()), recordFromProto(c.GetRecord()))
		}
		req = &partitionv1.SinceRequest{Map: "m", Limit: 13, After: resp.GetCovered()}
		if resp.GetMore() {
			continue
		}
		if last {
			break
		}
		select {
		case <-written:
			last = true
		default:
		}
	}
	if seen.Digest() != n.model("m").Digest() {
		t.Errorf("the follower has %d records, the map %d, or their contents differ", seen.Len(), n.model("m").Len())
	}
}

func TestSinceOfAFuturePositionEnds(t *testing.T) {
	n := newWorld(t).start()
	n.apply(put("k", "v", 1, "a"))
	resp, err := n.Since(t.Context(), &partitionv1.SinceRequest{Map: "m", After: &typesv1.Arrival{Millis: 1 << 50}})
	if err != nil || resp.GetMore() || len(resp.GetChanges()) != 0 {
		t.Errorf("%v, %v", resp, err)
	}
}

func TestListMapsAndDescribe(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	other := put("x", "v", 1, "a")
	other.Map = "a_map"
	n.apply(put("k", "v", 1, "a"), put("l", "v", 1, "a"), put("k", "", 2, "a"), other)
	maps, err := n.ListMaps(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range maps.GetMaps() {
		got = append(got, fmt.Sprintf("%s %d %d", m.GetName(), m.GetRecords(), m.GetTombstones()))
	}
	if strings.Join(got, ", ") != "a_map 1 0, m 1 1" {
		t.Errorf("maps: %v", got)
	}
	d, err := n.Describe(t.Context(), nil)
	if err != nil || d.GetNodeId() != "node" || d.GetLane() != n.writer.Name() || d.GetHistory() != w.log.History() ||
		d.GetShardCount() != shardCount || len(d.GetShards()) != shardCount || d.GetMapVersion() == 0 || d.GetLevel() != partitionv1.Level_LEVEL_APPLIED {
		t.Errorf("%v, %v", d, err)
	}
}

func TestReadsNameTheirShards(t *testing.T) {
	n := newWorld(t).start()
	n.apply(put("k", "v", 1, "a"))
	at := shardFor([]byte("k"))
	for shards, want := range map[[2]uint32]int{{at, (at + 1) % shardCount}: 1, {(at + 1) % shardCount, (at + 2) % shardCount}: 0} {
		resp, err := n.Since(t.Context(), &partitionv1.SinceRequest{Map: "m", Shards: shards[:]})
		if err != nil || len(resp.GetChanges()) != want {
			t.Errorf("shards %v: %d records, want %d, %v", shards, len(resp.GetChanges()), want, err)
		}
	}
	if _, err := n.Since(t.Context(), &partitionv1.SinceRequest{Map: "m", Shards: []uint32{shardCount}}); connect.CodeOf(err) != connect.CodeUnavailable {
		t.Errorf("an unknown shard: %v", err)
	}
	if _, err := n.Since(t.Context(), &partitionv1.SinceRequest{Map: "m", Shards: []uint32{1, 1}}); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("a shard named twice: %v", err)
	}
}

// What a caller passes or gets may be shared with it: neither side's buffer may show
// up in the other's.
func TestValuesAreNotSharedWithTheRequest(t *testing.T) {
	n := newWorld(t).start()
	op := put("key", "value", 1, "a")
	n.apply(op)
	copy(op.GetKey(), "???")
	copy(op.GetRecord().GetValue(), "XXXXXX")
	got := n.everything("m", 0)[0]
	if string(got.GetKey()) != "key" || describeRecord(got.GetRecord()) != "value@1:a" {
		t.Errorf("the stored record changed with the request: %v", got)
	}
}

func TestCRDT05_ARecordExpiresAlsoAfterARestart(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	op := put("k", "v", w.millis(), "a")
	op.Record.TtlMillis = 3_600_000
	n.apply(op)
	n.stop()
	w.wall.set(2 * time.Hour)
	n = w.start()
	// The shard expires it with its first timer; reads hide it even before.
	rows, err := n.Query(t.Context(), &partitionv1.QueryRequest{Map: "m"})
	if err != nil || len(rows.GetRows()) != 0 {
		t.Errorf("an expired record was returned: %v, %v", rows, err)
	}
	for len(n.everything("m", 0)[0].GetRecord().GetValue()) > 0 {
	}
	n.stop()
	events := n.events.all()
	if len(events) != 1 || describeRecord(events[0].GetChanges()[0].GetRecord()) != fmt.Sprintf("-@%d:a-ttl", op.GetRecord().GetTimestamp().GetMillis()) {
		t.Errorf("the events are %v, want one tombstone", events)
	}
}
