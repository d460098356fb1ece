// Package keyspace says where a key lives: its partition, fixed by the wire
// protocol (PROTOCOL 18.1), and the shard that owns the partition. It knows
// nothing of who owns a shard.
package keyspace

import "github.com/topgun-sync/topgun/core/merkle"

// PartitionCount is the number of partitions of the keyspace. Clients in cluster
// mode compute partitions themselves, so it never changes.
const PartitionCount = 271

// Partition returns the partition of a key, 0 to PartitionCount-1. The map name
// plays no part.
func Partition(key string) int {
	return int(merkle.Hash(key) % PartitionCount)
}

// Shard returns the shard of a partition in a cluster of that many shards, which
// must be positive.
func Shard(partition, shards int) int { return partition % shards }

// ShardOf returns the shard of a key.
func ShardOf(key string, shards int) int { return Shard(Partition(key), shards) }

// Partitions returns the partitions of a shard in ascending order.
func Partitions(shard, shards int) []int {
	ps := make([]int, 0, PartitionCount/shards+1)
	for p := shard; p < PartitionCount; p += shards {
		ps = append(ps, p)
	}
	return ps
}
