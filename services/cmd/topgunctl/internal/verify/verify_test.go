package verify

import (
	"context"
	"slices"
	"testing"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/msgval"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/partition/v1/partitionv1connect"
	persistencev1 "github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1/persistencev1connect"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
	"github.com/topgun-sync/topgun/services/cmd/topgunctl/internal/remote"
	"github.com/topgun-sync/topgun/services/internal/rpc"
)

// node is a partition and a store that hold what the test wants.
type node struct {
	partitionv1connect.UnimplementedPartitionServiceHandler
	memory, store []*typesv1.Change
	leaves        *merkle.Leaves
	// got is called before each Get is answered.
	got func()
	// wide is how many leaves a request for records may name.
	wide uint32
}

func lww(key string, arrival uint64) *typesv1.Change {
	return &typesv1.Change{
		Map: "m", Key: []byte(key), Kind: typesv1.Kind_KIND_LWW, Arrival: &typesv1.Arrival{Millis: arrival},
		Record: &typesv1.Record{Value: msgval.AppendUint(nil, arrival), Timestamp: &typesv1.Timestamp{Millis: arrival, NodeId: "n"}},
	}
}

func leavesOf(changes []*typesv1.Change) *merkle.Leaves {
	var leaves merkle.Leaves
	for _, c := range changes {
		hash := merkle.HashBytes(c.GetKey())
		ts := c.GetRecord().GetTimestamp()
		leaves.Add(merkle.Leaf(hash), merkle.ItemHash(string(c.GetKey()), hlc.Timestamp{Millis: ts.GetMillis(), NodeID: ts.GetNodeId()}), merkle.Mixed)
	}
	return &leaves
}

func (n *node) ListMaps(context.Context, *partitionv1.ListMapsRequest) (*partitionv1.ListMapsResponse, error) {
	return &partitionv1.ListMapsResponse{Maps: []*partitionv1.MapInfo{{Name: "m", Kind: typesv1.Kind_KIND_LWW}}}, nil
}

func (n *node) Describe(context.Context, *partitionv1.DescribeRequest) (*partitionv1.DescribeResponse, error) {
	return &partitionv1.DescribeResponse{ShardCount: 1, Shards: []uint32{0}}, nil
}

func (n *node) Leaves(_ context.Context, r *partitionv1.LeavesRequest) (*partitionv1.LeavesResponse, error) {
	if r.GetMap() != "m" {
		return &partitionv1.LeavesResponse{}, nil
	}
	response := &partitionv1.LeavesResponse{Covered: &typesv1.Arrival{Millis: 1000}}
	for leaf, sum := range n.leaves.All() {
		response.Leaves, response.Hashes = append(response.Leaves, uint32(leaf)), append(response.Hashes, sum)
	}
	return response, nil
}

func (n *node) Records(_ context.Context, r *partitionv1.RecordsRequest) (*partitionv1.RecordsResponse, error) {
	if n.wide > 0 && r.GetLastLeaf()-r.GetFirstLeaf() >= n.wide {
		return nil, connect.NewError(connect.CodeResourceExhausted, "too much")
	}
	response := &partitionv1.RecordsResponse{}
	for _, c := range n.memory {
		if leaf := uint32(merkle.Leaf(merkle.HashBytes(c.GetKey()))); c.GetMap() == r.GetMap() && leaf >= r.GetFirstLeaf() && leaf <= r.GetLastLeaf() {
			response.Changes = append(response.Changes, c)
		}
	}
	return response, nil
}

func (n *node) Since(context.Context, *partitionv1.SinceRequest) (*partitionv1.SinceResponse, error) {
	return &partitionv1.SinceResponse{Changes: n.memory}, nil
}

func (n *node) Get(_ context.Context, r *partitionv1.GetRequest) (*partitionv1.GetResponse, error) {
	n.got()
	response := &partitionv1.GetResponse{}
	for _, c := range n.memory {
		if slices.ContainsFunc(r.GetKeys(), func(key []byte) bool { return string(key) == string(c.GetKey()) }) {
			response.Changes = append(response.Changes, c)
		}
	}
	return response, nil
}

// store is the persistence service of a node.
type store struct {
	persistencev1connect.UnimplementedPersistenceServiceHandler
	held *node
}

func (s store) Flush(context.Context, *persistencev1.FlushRequest) (*persistencev1.FlushResponse, error) {
	return &persistencev1.FlushResponse{}, nil
}

func (s store) Load(_ context.Context, _ *persistencev1.LoadRequest, stream persistencev1connect.PersistenceServiceLoadServerStream) error {
	return stream.Send(&persistencev1.LoadResponse{Changes: s.held.store})
}

func (n *node) verify(t *testing.T) *Report {
	t.Helper()
	if n.got == nil {
		n.got = func() {}
	}
	server := rpc.NewServer(rpc.Deps{})
	partitionv1connect.RegisterPartitionServiceHandler(server, n)
	persistencev1connect.RegisterPersistenceServiceHandler(server, store{held: n})
	client := rpc.InProcess(server, rpc.Deps{})
	cluster := remote.Dial(remote.Config{Partitions: []string{"http://p"}, Timeout: time.Minute})
	t.Cleanup(cluster.Close)
	cluster.Partitions[0].PartitionServiceClient = partitionv1connect.NewPartitionServiceClient(client)
	cluster.Persistence = persistencev1connect.NewPersistenceServiceClient(client)
	report, err := Run(t.Context(), cluster, "", func(uint64) {})
	if err != nil {
		t.Fatal(err)
	}
	return report
}

func TestALeafThatIsNotOfItsRecordsIsFound(t *testing.T) {
	held := []*typesv1.Change{lww("a", 1), lww("b", 2)}
	n := &node{memory: held, store: held, leaves: leavesOf(held)}
	if r := n.verify(t); !r.Equal {
		t.Fatalf("%+v", r)
	}
	n.leaves.AddSum(7, 1)
	r := n.verify(t)
	if r.Equal || len(r.Differences) != 1 || r.Differences[0].What != LeafDiffers || *r.Differences[0].Leaf != 7 {
		t.Errorf("%+v", r)
	}
}

// A key that is written all the time: the store is always one write behind what is
// read next.
func TestAKeyThatNeverHoldsStillIsCountedAsChanging(t *testing.T) {
	n := &node{memory: []*typesv1.Change{lww("a", 1)}, store: []*typesv1.Change{lww("a", 2)}}
	n.leaves = leavesOf(n.memory)
	clock := uint64(10)
	n.got = func() {
		clock += 2
		n.memory = []*typesv1.Change{lww("a", clock)}
		n.store = []*typesv1.Change{lww("a", clock+1)}
	}
	r := n.verify(t)
	if !r.Equal || len(r.Maps) != 1 || r.Maps[0].Changing != 1 {
		t.Errorf("%+v", r)
	}
	// A store that stays behind is no write in between.
	n = &node{memory: []*typesv1.Change{lww("a", 5)}, store: []*typesv1.Change{lww("a", 2)}}
	n.leaves = leavesOf(n.memory)
	if r := n.verify(t); r.Equal || len(r.Differences) != 1 || r.Differences[0].What != Differs {
		t.Errorf("%+v", r)
	}
}

func TestCountersAreCompared(t *testing.T) {
	counter := func(positive uint64) *typesv1.Change {
		c := lww("hits", 3)
		c.Map, c.Kind, c.Tag = "+hits", typesv1.Kind_KIND_COUNTER, "node"
		c.Record.Value = msgval.AppendUint(msgval.AppendUint(msgval.AppendArrayHeader(nil, 2), positive), 0)
		return c
	}
	n := &node{memory: []*typesv1.Change{counter(4)}, store: []*typesv1.Change{counter(4)}, leaves: leavesOf(nil)}
	for _, equal := range []bool{true, false} {
		report := n.verify(t)
		if report.Equal != equal {
			t.Errorf("%+v, want %t", report, equal)
		}
		n.store = []*typesv1.Change{counter(3)}
	}
}

func TestLargeValuesAreReadInSmallRanges(t *testing.T) {
	held := []*typesv1.Change{lww("a", 1), lww("b", 2), lww("c", 3)}
	n := &node{memory: held, store: held, leaves: leavesOf(held), wide: 100}
	if r := n.verify(t); !r.Equal || r.Maps[0].Records != 3 {
		t.Errorf("%+v", r)
	}
}
