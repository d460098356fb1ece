package remote

import (
	"context"
	"errors"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/topgun-sync/topgun/core/keyspace"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/partition/v1/partitionv1connect"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
	"github.com/topgun-sync/topgun/services/internal/rpc"
)

const shards = 4

// node owns some of the shards. It refuses what refusals says, one after another.
type node struct {
	partitionv1connect.UnimplementedPartitionServiceHandler
	owns     []uint32
	refusals []partitionv1.Refusal
	applied  []string
	// fails is answered instead of anything.
	fails error
}

func (n *node) Describe(context.Context, *partitionv1.DescribeRequest) (*partitionv1.DescribeResponse, error) {
	return &partitionv1.DescribeResponse{ShardCount: shards, Shards: n.owns}, nil
}

func (n *node) ListMaps(context.Context, *partitionv1.ListMapsRequest) (*partitionv1.ListMapsResponse, error) {
	return &partitionv1.ListMapsResponse{Maps: []*partitionv1.MapInfo{
		{Name: "m", Kind: typesv1.Kind_KIND_LWW, Records: uint64(len(n.owns)), Tombstones: 1},
		{Name: "m", Kind: typesv1.Kind_KIND_OR, Records: 10},
	}}, nil
}

func (n *node) Apply(_ context.Context, r *partitionv1.ApplyRequest) (*partitionv1.ApplyResponse, error) {
	if n.fails != nil {
		return nil, n.fails
	}
	response := &partitionv1.ApplyResponse{}
	for _, group := range r.GetShards() {
		receipt := &partitionv1.ShardReceipt{Level: partitionv1.Level_LEVEL_APPLIED}
		if len(n.refusals) > 0 {
			receipt.Refusal, n.refusals = n.refusals[0], n.refusals[1:]
		}
		if receipt.GetRefusal() == partitionv1.Refusal_REFUSAL_UNSPECIFIED {
			for _, op := range group.GetOps() {
				if keyspace.ShardOf(string(op.GetKey()), shards) != int(group.GetShard()) {
					return nil, connect.NewError(connect.CodeInvalidArgument, "wrong shard")
				}
				n.applied = append(n.applied, string(op.GetKey()))
				receipt.Receipts = append(receipt.Receipts, &partitionv1.Receipt{
					Outcome: partitionv1.Outcome_OUTCOME_APPLIED, Reason: string(op.GetKey()),
				})
			}
		}
		response.Shards = append(response.Shards, receipt)
	}
	return response, nil
}

func cluster(t *testing.T, timeout time.Duration, nodes ...*node) *Cluster {
	t.Helper()
	urls := make([]string, len(nodes))
	for i := range nodes {
		urls[i] = "http://node"
	}
	c := Dial(Config{Partitions: urls, Timeout: timeout})
	t.Cleanup(c.Close)
	for i, n := range nodes {
		server := rpc.NewServer(rpc.Deps{})
		partitionv1connect.RegisterPartitionServiceHandler(server, n)
		c.Partitions[i].PartitionServiceClient = partitionv1connect.NewPartitionServiceClient(rpc.InProcess(server, rpc.Deps{}))
	}
	return c
}

func TestMapsAreSummedOverNodes(t *testing.T) {
	c := cluster(t, time.Minute, &node{owns: []uint32{0}}, &node{owns: []uint32{1, 2, 3}})
	maps, err := c.Maps(t.Context())
	if err != nil || len(maps) != 2 || maps[0].GetRecords() != 4 || maps[0].GetTombstones() != 2 || maps[1].GetRecords() != 20 {
		t.Errorf("%v, %v", maps, err)
	}
}

func TestOpsGoToTheOwnersAndAgainWhereTheyWereRefused(t *testing.T) {
	one := &node{owns: []uint32{0, 2}, refusals: []partitionv1.Refusal{
		partitionv1.Refusal_REFUSAL_OVERLOADED, partitionv1.Refusal_REFUSAL_UNSPECIFIED, partitionv1.Refusal_REFUSAL_UNAVAILABLE,
	}}
	two := &node{owns: []uint32{1, 3}}
	c := cluster(t, time.Minute, one, two)
	var ops []*partitionv1.Op
	for _, key := range strings.Split("a b c d e f g h i j k l m n o p", " ") {
		ops = append(ops, &partitionv1.Op{Map: "m", Key: []byte(key)})
	}
	results, err := c.Apply(t.Context(), ops)
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range results {
		if r.Receipt == nil || r.GetReason() != string(ops[i].GetKey()) || r.Level != partitionv1.Level_LEVEL_APPLIED {
			t.Errorf("op %d: %+v", i, r)
		}
	}
	if n := len(one.applied) + len(two.applied); n != len(ops) || len(one.applied) == 0 || len(two.applied) == 0 {
		t.Errorf("applied %v and %v", one.applied, two.applied)
	}
}

func TestWritesThatCannotBeMadeSayWhatIsKnown(t *testing.T) {
	for name, c := range map[string]struct {
		nodes []*node
		want  string
	}{
		"refused for good": {
			[]*node{{owns: []uint32{0, 1, 2, 3}}},
			"takes no ops (OVERLOADED)",
		},
		"unknown": {
			[]*node{{owns: []uint32{0, 1, 2, 3}, fails: connect.NewError(connect.CodeUnavailable, "the outcome is unknown")}},
			"whether it was written is not known: partition at http://node: the outcome is unknown",
		},
		"rejected as a whole": {
			[]*node{{owns: []uint32{0, 1, 2, 3}, fails: connect.NewError(connect.CodeInvalidArgument, "bad")}},
			"partition at http://node: bad",
		},
		"without an owner": {[]*node{{owns: []uint32{0, 1}}, {owns: []uint32{3}}}, "shard 2 is served by no node that was named"},
	} {
		t.Run(name, func(t *testing.T) {
			for range 1000 {
				c.nodes[0].refusals = append(c.nodes[0].refusals, partitionv1.Refusal_REFUSAL_OVERLOADED)
			}
			_, err := cluster(t, 150*time.Millisecond, c.nodes...).Apply(t.Context(), []*partitionv1.Op{{Map: "m", Key: []byte("k")}})
			if strings.Contains(err.Error(), "not known") != (name == "unknown" || name == "rejected as a whole") {
				t.Errorf("%v", err)
			}
			if _, ok := errors.AsType[*Error](err); !ok || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v", err)
			}
		})
	}
}

// One port of several services tells each the reasons of its own.
func TestReasonsAreOfTheServiceThatWasAsked(t *testing.T) {
	mux := http.NewServeMux()
	rpc.MountHealth(mux, rpc.Checks{
		"topgun.partition.v1.PartitionService": func() error { return errors.New("loading: shard 3") },
		"topgun.gateway.v1.GatewayService":     func() error { return nil },
	})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- rpc.Serve(ctx, rpc.HTTPServer(mux, nil), l, time.Second) }()
	url := "http://" + l.Addr().String()
	c := Dial(Config{Gateway: url, Fanout: url, Persistence: url, Partitions: []string{url}, Timeout: time.Minute})
	for i, want := range []string{"", "loading: shard 3", "", ""} {
		reasons, err := c.Ready(t.Context(), c.Endpoints()[i])
		if err != nil || strings.Join(reasons, "|") != want {
			t.Errorf("%s: %v, %v", c.Endpoints()[i].Service, reasons, err)
		}
	}
	c.Close()
	stop()
	if err := <-served; err != nil {
		t.Error(err)
	}
}
