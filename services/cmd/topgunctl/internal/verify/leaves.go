package verify

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/ormap"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
	"github.com/topgun-sync/topgun/services/cmd/topgunctl/internal/line"
	"github.com/topgun-sync/topgun/services/cmd/topgunctl/internal/remote"
)

// recordsAtOnce is how many records a request for a range of leaves is meant to
// return.
const recordsAtOnce = 2000

// memory reads a map from every node into the digest, and compares the leaves that
// the node shows with those of the records.
func (r *run) memory(ctx context.Context, m mapID) error {
	for _, p := range r.cluster.Partitions {
		before, records, err := r.leaves(ctx, p, m)
		if err != nil {
			return err
		}
		if records == 0 && len(before) == 0 {
			continue
		}
		computed, err := r.records(ctx, p, m, records)
		if err != nil {
			return err
		}
		after, _, err := r.leaves(ctx, p, m)
		if err != nil {
			return err
		}
		of := r.of(m)
		for leaf := range merkle.LeafCount {
			shown, was, is := before[leaf], computed.At(leaf), after[leaf]
			if shown != 0 || was != 0 || is != 0 {
				of.Leaves++
			}
			if was == shown || was == is {
				continue
			}
			if err := r.leafAgain(ctx, p, m, leaf); err != nil {
				return err
			}
		}
	}
	return nil
}

// leaves reads the hashes of a node's leaves, by leaf, and the number of records.
func (r *run) leaves(ctx context.Context, p remote.Partition, m mapID) (map[int]uint32, uint64, error) {
	response, err := remote.Call(ctx, r.cluster, p.Endpoint, p.Leaves, &partitionv1.LeavesRequest{Map: m.name, Kind: m.kind})
	if err != nil {
		return nil, 0, err
	}
	if known := r.covered[m]; known == nil || compareArrivals(response.GetCovered(), known) < 0 {
		r.covered[m] = response.GetCovered()
	}
	hashes := make(map[int]uint32, len(response.GetLeaves()))
	for i, leaf := range response.GetLeaves() {
		if i < len(response.GetHashes()) {
			hashes[int(leaf)] = response.GetHashes()[i]
		}
	}
	return hashes, response.GetRecords(), nil
}

// records reads all records of a map from a node, range by range, adds them to the
// digest and returns the leaves that they make.
func (r *run) records(ctx context.Context, p remote.Partition, m mapID, records uint64) (*merkle.Leaves, error) {
	step := merkle.LeafCount
	if records > recordsAtOnce {
		step = int(max(1, merkle.LeafCount*recordsAtOnce/records))
	}
	var leaves merkle.Leaves
	for first := 0; first < merkle.LeafCount; {
		last := min(first+step, merkle.LeafCount) - 1
		changes, err := r.between(ctx, p, m, first, last)
		if e, ok := errors.AsType[*remote.Error](err); ok && e.Code == connect.CodeResourceExhausted && step > 1 {
			step = max(1, step/8) // the values are large
			continue
		}
		if err != nil {
			return nil, err
		}
		addLeaves(&leaves, m, changes)
		for _, c := range changes {
			r.read()
			r.of(m).Records++
			r.digest[r.nameHash(idOf(c))] = r.contentHash(c)
		}
		first = last + 1
	}
	return &leaves, nil
}

func (r *run) between(ctx context.Context, p remote.Partition, m mapID, first, last int) ([]*typesv1.Change, error) {
	response, err := remote.Call(ctx, r.cluster, p.Endpoint, p.Records, &partitionv1.RecordsRequest{
		Map: m.name, Kind: m.kind, FirstLeaf: uint32(first), LastLeaf: uint32(last),
	})
	return response.GetChanges(), err
}

// leafAgain looks at a leaf whose hash was not that of its records, until it holds
// still.
func (r *run) leafAgain(ctx context.Context, p remote.Partition, m mapID, leaf int) error {
	for range rounds {
		before, _, err := r.leaves(ctx, p, m)
		if err != nil {
			return err
		}
		changes, err := r.between(ctx, p, m, leaf, leaf)
		if err != nil {
			return err
		}
		after, _, err := r.leaves(ctx, p, m)
		if err != nil {
			return err
		}
		var leaves merkle.Leaves
		addLeaves(&leaves, m, changes)
		switch was := leaves.At(leaf); {
		case was == before[leaf] || was == after[leaf]:
			return nil
		case before[leaf] == after[leaf]:
			r.of(m).Differences++
			r.differ(Difference{Map: m.name, Kind: line.KindOf(m.kind), Leaf: &leaf, What: LeafDiffers})
			return nil
		}
		select {
		case <-time.After(retryPause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	r.of(m).Changing++
	return nil
}

// addLeaves adds the records of whole leaves.
func addLeaves(leaves *merkle.Leaves, m mapID, changes []*typesv1.Change) {
	if m.kind != typesv1.Kind_KIND_OR {
		for _, c := range changes {
			hash := merkle.HashBytes(c.GetKey())
			leaves.Add(merkle.Leaf(hash), merkle.ItemHashOf(hash, stampOf(c)), merkle.Mixed)
		}
		return
	}
	live := make(map[string][]ormap.Record)
	for _, c := range changes {
		if len(c.GetRecord().GetValue()) == 0 {
			continue
		}
		live[string(c.GetKey())] = append(live[string(c.GetKey())], ormap.Record{Tag: c.GetTag(), Record: lwwmap.Record{
			Value: c.GetRecord().GetValue(), Timestamp: stampOf(c), TTLMillis: c.GetRecord().GetTtlMillis(),
		}})
	}
	for key, records := range live {
		slices.SortFunc(records, func(a, b ormap.Record) int {
			return cmp.Or(ormap.CompareTags(a.Tag, b.Tag), cmp.Compare(a.Tag, b.Tag))
		})
		leaves.Add(merkle.Leaf(merkle.Hash(key)), ormap.ItemHash(key, slices.Values(records)), merkle.Mixed)
	}
}

func stampOf(c *typesv1.Change) hlc.Timestamp {
	t := c.GetRecord().GetTimestamp()
	return hlc.Timestamp{Millis: t.GetMillis(), Counter: t.GetCounter(), NodeID: t.GetNodeId()}
}
