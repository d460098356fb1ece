package gateway

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"connectrpc.com/connect/v2"
	"golang.org/x/sync/errgroup"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/keyspace"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/query"
	"github.com/topgun-sync/topgun/core/wire"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/partition/v1/partitionv1connect"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

// Leaves returns the Merkle leaves of a map, summed over all owners.
func (r *router) Leaves(ctx context.Context, of mapKind, mapName string, c merkle.Combine) (*mapState, error) {
	answers, err := fanOut(ctx, r, func(ctx context.Context, client partitionv1connect.PartitionServiceClient, shards []uint32) (*partitionv1.LeavesResponse, error) {
		answer, err := client.Leaves(ctx, &partitionv1.LeavesRequest{Map: mapName, Shards: shards, Combine: combineToProto(c), Kind: of.proto()})
		if err == nil && !goodLeaves(answer) {
			return nil, errors.New("owner answered leaves and hashes that do not fit")
		}
		return answer, err
	})
	if err != nil {
		return nil, fmt.Errorf("read leaves: %w", err)
	}
	state := &mapState{}
	for i, a := range answers {
		for n, leaf := range a.Leaves {
			state.leaves.AddSum(int(leaf), a.Hashes[n])
		}
		state.records += a.Records
		covered := arrivalFromProto(a.Covered)
		if i == 0 || covered.Compare(state.covered) < 0 {
			state.covered = covered
		}
		if i == 0 || a.NowMillis < state.nowMillis {
			state.nowMillis = a.NowMillis
		}
	}
	return state, nil
}

func goodLeaves(a *partitionv1.LeavesResponse) bool {
	return len(a.Leaves) == len(a.Hashes) && !slices.ContainsFunc(a.Leaves, func(leaf uint32) bool {
		return leaf >= merkle.LeafCount
	})
}

// Records returns the records of a map below the leaves firstLeaf to lastLeaf, both
// included, tombstones included, in no order.
func (r *router) Records(ctx context.Context, of mapKind, mapName string, firstLeaf, lastLeaf int) ([]keyed, error) {
	answers, err := fanOut(ctx, r, func(ctx context.Context, client partitionv1connect.PartitionServiceClient, shards []uint32) (*partitionv1.RecordsResponse, error) {
		return client.Records(ctx, &partitionv1.RecordsRequest{
			Map: mapName, Shards: shards, FirstLeaf: uint32(firstLeaf), LastLeaf: uint32(lastLeaf), Kind: of.proto(),
		})
	})
	if err != nil {
		return nil, fmt.Errorf("read records: %w", err)
	}
	n := 0
	for _, a := range answers {
		n += len(a.Changes)
	}
	records := make([]keyed, 0, n)
	for _, a := range answers {
		for _, change := range a.Changes {
			records = append(records, keyedOf(change))
		}
	}
	return records, nil
}

// getKeys is the most keys of one Get to an owner.
const getKeys = 256

// Get returns all that keys hold, tombstones included, in no order.
func (r *router) Get(ctx context.Context, of mapKind, mapName string, keys []string) ([]keyed, error) {
	var found []keyed
	for page := range slices.Chunk(keys, getKeys) {
		answers, err := fanOut(ctx, r, func(ctx context.Context, client partitionv1connect.PartitionServiceClient, shards []uint32) (*partitionv1.GetResponse, error) {
			request := &partitionv1.GetRequest{Map: mapName, Kind: of.proto()}
			count := r.shardCount()
			for _, key := range page {
				if slices.Contains(shards, uint32(keyspace.ShardOf(key, count))) {
					request.Keys = append(request.Keys, []byte(key))
				}
			}
			if len(request.Keys) == 0 {
				return &partitionv1.GetResponse{}, nil
			}
			return client.Get(ctx, request)
		})
		if err != nil {
			return nil, fmt.Errorf("read keys: %w", err)
		}
		for _, a := range answers {
			for _, change := range a.Changes {
				found = append(found, keyedOf(change))
			}
		}
	}
	return found, nil
}

// Since returns what arrived in a map after a position, in arrival order, with
// tombstones: at most limit records and about maxBytes of keys and values, but at
// least one record if there is any. Going on from covered neither skips a record
// nor repeats one (SYN-01).
func (r *router) Since(ctx context.Context, of mapKind, mapName string, after hlc.Timestamp, limit, maxBytes int) (page, error) {
	answers, err := fanOut(ctx, r, func(ctx context.Context, client partitionv1connect.PartitionServiceClient, shards []uint32) (*partitionv1.SinceResponse, error) {
		return client.Since(ctx, &partitionv1.SinceRequest{
			Map: mapName, Shards: shards, After: arrivalToProto(after), Limit: uint32(limit), MaxBytes: uint32(maxBytes), Kind: of.proto(),
		})
	})
	if err != nil {
		return page{}, fmt.Errorf("read what arrived: %w", err)
	}
	return mergePages(answers, limit, maxBytes), nil
}

// mergePages makes one page of the owners' pages. Each owner answers for everything
// up to its own covered; all of them together only up to the least of these, so
// what lies above that waits for the next page.
func mergePages(answers []*partitionv1.SinceResponse, limit, maxBytes int) page {
	var merged page
	var changes []*typesv1.Change
	for i, a := range answers {
		covered := arrivalFromProto(a.Covered)
		if i == 0 || covered.Compare(merged.covered) < 0 {
			merged.covered = covered
		}
		merged.more = merged.more || a.More
		changes = append(changes, a.Changes...)
	}
	slices.SortStableFunc(changes, func(a, b *typesv1.Change) int { return arrivalOrder(a.Arrival, b.Arrival) })
	if n := len(changes); n > 0 {
		end, _ := slices.BinarySearchFunc(changes, merged.covered, func(c *typesv1.Change, covered hlc.Timestamp) int {
			if arrivalFromProto(c.Arrival).Compare(covered) <= 0 {
				return -1
			}
			return 1
		})
		merged.more = merged.more || end < n
		changes = changes[:end]
	}
	// One owner has kept the bounds itself; the sum over several may exceed them.
	if len(answers) > 1 {
		if end := cutPage(changes, limit, maxBytes); end < len(changes) {
			changes = changes[:end]
			merged.covered = arrivalFromProto(changes[end-1].Arrival)
			merged.more = true
		}
	}
	merged.records = make([]keyed, 0, len(changes))
	for _, change := range changes {
		merged.records = append(merged.records, keyedOf(change))
	}
	return merged
}

// cutPage returns how many changes fit. Shards stamp arrivals independently, so two
// changes can have the same one: the cut never lies between them, or a cursor
// there would skip the second.
func cutPage(changes []*typesv1.Change, limit, maxBytes int) int {
	end, bytes := 0, 0
	for end < len(changes) && end < limit {
		bytes += len(changes[end].Key) + len(changes[end].GetRecord().GetValue())
		if end > 0 && bytes > maxBytes {
			break
		}
		end++
	}
	if end == len(changes) {
		return end
	}
	same := func(i int) bool { return arrivalOrder(changes[i-1].Arrival, changes[i].Arrival) == 0 }
	start := end
	for start > 0 && same(start) {
		start--
	}
	if start > 0 {
		return start
	}
	for end < len(changes) && same(end) { // one arrival fills the page: take all of it
		end++
	}
	return end
}

// Query returns the rows of a map that match, with all their fields, in the order of the
// query, from the first one after a position: at most limit of them, perhaps fewer when
// they are large, but at least one if there is any. more says that further rows match.
func (r *router) Query(ctx context.Context, mapName string, q *query.Query, after []byte, limit, maxBytes int) (rows []query.Row, more bool, err error) {
	encoded := q.Encode()
	answers, err := fanOut(ctx, r, func(ctx context.Context, client partitionv1connect.PartitionServiceClient, shards []uint32) (*partitionv1.QueryResponse, error) {
		return client.Query(ctx, &partitionv1.QueryRequest{
			Map: mapName, Shards: shards, Query: encoded, After: after, Limit: uint32(limit), MaxBytes: uint32(maxBytes),
		})
	})
	if err != nil {
		return nil, false, fmt.Errorf("run the query: %w", err)
	}
	rows, more = mergeRows(q, answers, limit, maxBytes)
	return rows, more, nil
}

// mergeRows merges in the order of the query. An owner that has more rows vouches only
// for what comes up to its last one; what others have after that waits for the next page.
func mergeRows(q *query.Query, answers []*partitionv1.QueryResponse, limit, maxBytes int) (rows []query.Row, more bool) {
	top := query.NewTop(q, nil, limit, maxBytes)
	var end *query.Row // rows after it wait; nil when nothing waits
	for _, a := range answers {
		for _, row := range a.Rows {
			top.Add(string(row.Key), row.Value)
		}
		if a.More && len(a.Rows) > 0 {
			row := a.Rows[len(a.Rows)-1]
			if last := (query.Row{Key: string(row.Key), Value: row.Value}); end == nil || q.Compare(last, *end) < 0 {
				end = &last
			}
		}
	}
	rows, more = top.Rows()
	if end == nil {
		return rows, more
	}
	cut, found := slices.BinarySearchFunc(rows, *end, q.Compare)
	if found {
		cut++
	}
	return rows[:cut], true
}

var tooManyGroups = &wire.Error{Name: "TOO_MANY_GROUPS", Code: 413, Text: "the query makes more than 10,000 groups; group by less"}

// Groups returns the groups of a grouped query over a whole map.
func (r *router) Groups(ctx context.Context, mapName string, q *query.Query) (*query.Groups, error) {
	encoded := q.Encode()
	answers, err := fanOut(ctx, r, func(ctx context.Context, client partitionv1connect.PartitionServiceClient, shards []uint32) (*partitionv1.QueryResponse, error) {
		return client.Query(ctx, &partitionv1.QueryRequest{Map: mapName, Shards: shards, Query: encoded})
	})
	if err != nil {
		return nil, fmt.Errorf("run the query: %w", err)
	}
	groups := query.NewGroups(q)
	for _, a := range answers {
		if a.More {
			return nil, tooManyGroups
		}
		for _, row := range a.Rows {
			err := groups.Merge(query.Row{Key: string(row.Key), Value: row.Value})
			if errors.Is(err, query.ErrTooManyGroups) {
				return nil, tooManyGroups
			}
			if err != nil {
				return nil, fmt.Errorf("merge the groups of the owners: %w", err)
			}
		}
	}
	return groups, nil
}

// fanOut asks every owner for its shards and returns all answers. Until ctx ends it
// tries again when an owner is away or the shards have moved: reads change nothing.
func fanOut[T any](ctx context.Context, r *router,
	call func(ctx context.Context, client partitionv1connect.PartitionServiceClient, shards []uint32) (T, error),
) ([]T, error) {
	table, err := r.owners(ctx)
	for attempt := 0; ; attempt++ {
		if err == nil && table.whole {
			var answers []T
			answers, err = askAll(ctx, r, table, call)
			if err == nil {
				return answers, nil
			}
			if !worthRetrying(err) {
				return nil, err
			}
		}
		if !r.pause(ctx, attempt, 0) {
			return nil, errUnavailable
		}
		table, err = r.learn(ctx)
	}
}

func askAll[T any](ctx context.Context, r *router, table *ownerTable,
	call func(ctx context.Context, client partitionv1connect.PartitionServiceClient, shards []uint32) (T, error),
) ([]T, error) {
	answers := make([]T, 0, len(r.peers))
	var asked []*peer
	for i, p := range r.peers {
		if len(table.shards[i]) > 0 {
			asked = append(asked, p)
		}
	}
	if len(asked) == 1 {
		answer, err := call(ctx, asked[0].client, table.shards[asked[0].index])
		return append(answers, answer), err
	}
	answers = answers[:len(asked)]
	group, ctx := errgroup.WithContext(ctx)
	for i, p := range asked {
		group.Go(func() (err error) {
			answers[i], err = call(ctx, p.client, table.shards[p.index])
			return err
		})
	}
	return answers, group.Wait()
}

// worthRetrying reports whether the same read may work later. An owner that finds a
// request wrong, or is broken, will find so again.
func worthRetrying(err error) bool {
	switch connect.CodeOf(err) {
	case connect.CodeInvalidArgument, connect.CodeOutOfRange, connect.CodeUnimplemented, connect.CodeInternal, connect.CodeDataLoss:
		return false
	default:
		return true
	}
}

func arrivalOrder(a, b *typesv1.Arrival) int {
	return cmp.Or(cmp.Compare(a.GetMillis(), b.GetMillis()), cmp.Compare(a.GetCounter(), b.GetCounter()))
}
