package partition

import (
	"context"
	"testing"
	"time"

	"connectrpc.com/connect/v2"

	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/partition/v1/partitionv1connect"
	"github.com/topgun-sync/topgun/services/internal/rpc"
)

func TestTheServiceIsReachableByItsClient(t *testing.T) {
	n := newWorld(t).start()
	server := rpc.NewServer(rpc.Deps{})
	n.Register(server)
	client := partitionv1connect.NewPartitionServiceClient(rpc.InProcess(server, rpc.Deps{}))
	op := put("k", "v", 1, "a")
	resp, err := client.Apply(t.Context(), &partitionv1.ApplyRequest{Shards: []*partitionv1.ShardOps{{Shard: shardFor(op.GetKey()), Ops: []*partitionv1.Op{op}}}})
	if err != nil || outcomeWords(resp.GetShards()[0].GetReceipts()) != "APPLIED" || resp.GetMapVersion() == 0 {
		t.Errorf("%v, %v", resp, err)
	}
	if a := resp.GetShards()[0].GetArrival(); a.GetMillis() == 0 || resp.GetShards()[0].GetLevel() != partitionv1.Level_LEVEL_APPLIED {
		t.Errorf("%v", resp)
	}
	if _, err := client.Records(t.Context(), &partitionv1.RecordsRequest{Map: "m", FirstLeaf: 2, LastLeaf: 1}); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("a bad range: %v", err)
	}
	n.stop()
	if _, err := client.Leaves(t.Context(), &partitionv1.LeavesRequest{Map: "m"}); connect.CodeOf(err) != connect.CodeUnavailable {
		t.Errorf("a read at a stopped service: %v", err)
	}
}

// A caller that gives up before its ops' turn came is refused, and they never are
// merged: afterwards their bytes may belong to somebody else.
func TestACK04_OpsWhoseCallerGaveUpAreNotMerged(t *testing.T) {
	n := newWorld(t).start()
	shard := n.phase.Load().serving.shards[shardFor([]byte("k"))]
	release := make(chan struct{})
	if _, err := shard.submit(t.Context(), func() { <-release }); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err := n.tryApply(ctx, put("k", "v", 1, "a"))
	close(release)
	if err == nil || err.Error() != "refused: REFUSAL_OVERLOADED" {
		t.Errorf("apply at a busy shard: %v", err)
	}
	if all := n.everything("m", 0); len(all) != 0 {
		t.Errorf("the refused op was merged: %v", all)
	}
	if !n.room.TryAcquire(n.config.MaxPendingBytes) {
		t.Error("the room was not given back")
	}
	n.room.Release(n.config.MaxPendingBytes)
}

func TestConfigIsChecked(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"node id":  func(c *Config) { c.NodeID = "a.b" },
		"no id":    func(c *Config) { c.NodeID = "" },
		"pending":  func(c *Config) { c.MaxPendingBytes = 1 },
		"stopping": func(c *Config) { c.StopTimeout = 0 },
	} {
		config := DefaultConfig()
		config.NodeID = "node-1"
		if err := config.Validate(); err != nil {
			t.Fatal(err)
		}
		change(&config)
		if config.Validate() == nil {
			t.Errorf("%s: a bad configuration was accepted", name)
		}
	}
	config := DefaultConfig()
	config.NodeID = "node"
	if _, err := New(config, Deps{}); err == nil {
		t.Error("a service without collaborators was made")
	}
}
