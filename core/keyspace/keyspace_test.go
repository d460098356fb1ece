package keyspace_test

import (
	"encoding/json"
	"os"
	"testing"

	"github.com/topgun-sync/topgun/core/keyspace"
	"github.com/topgun-sync/topgun/core/merkle"
)

func TestVectors(t *testing.T) {
	data, err := os.ReadFile("testdata/partition.json")
	if err != nil {
		t.Fatal(err)
	}
	var v struct {
		PartitionCount int
		Cases          []struct {
			Key       string
			Hash      uint32
			Partition int
		}
	}
	if err := json.Unmarshal(data, &v); err != nil || len(v.Cases) == 0 {
		t.Fatal("the vectors are not what this test reads", err)
	}
	if v.PartitionCount != keyspace.PartitionCount {
		t.Errorf("PartitionCount = %d, want %d", keyspace.PartitionCount, v.PartitionCount)
	}
	for _, c := range v.Cases {
		if got := merkle.Hash(c.Key); got != c.Hash {
			t.Errorf("Hash(%q) = %d, want %d", c.Key, got, c.Hash)
		}
		if got := keyspace.Partition(c.Key); got != c.Partition {
			t.Errorf("Partition(%q) = %d, want %d", c.Key, got, c.Partition)
		}
	}
}

// Every partition belongs to exactly one shard, whatever their number.
func TestShardsCoverPartitions(t *testing.T) {
	for _, shards := range []int{1, 2, 4, 16, 270, 271, 300} {
		owner := make(map[int]int)
		for s := range shards {
			last := -1
			for _, p := range keyspace.Partitions(s, shards) {
				if _, taken := owner[p]; taken || p <= last {
					t.Fatalf("%d shards: partition %d of shard %d is taken or out of order", shards, p, s)
				}
				if keyspace.Shard(p, shards) != s {
					t.Fatalf("%d shards: Shard(%d) = %d, want %d", shards, p, keyspace.Shard(p, shards), s)
				}
				owner[p], last = s, p
			}
		}
		if len(owner) != keyspace.PartitionCount {
			t.Fatalf("%d shards own %d partitions", shards, len(owner))
		}
	}
	if got, want := keyspace.ShardOf("alice", 4), 205%4; got != want {
		t.Errorf("ShardOf(alice, 4) = %d, want %d", got, want)
	}
}
