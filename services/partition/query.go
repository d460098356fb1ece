package partition

import (
	"context"
	"errors"

	"connectrpc.com/connect/v2"
	"golang.org/x/sync/errgroup"

	"github.com/topgun-sync/topgun/core/query"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
)

const (
	maxRows          = 100_000
	defaultRowsBytes = 8 << 20
	// maxQueries bounds the queries that are evaluated at one time, each of which keeps
	// values alive that are replaced meanwhile. Others wait.
	maxQueries = 16
)

// Query implements the rpc. Each shard is read as it was at a moment of its own and
// evaluated here, beside the shard, in turns.
func (s *Service) Query(ctx context.Context, req *partitionv1.QueryRequest) (*partitionv1.QueryResponse, error) {
	limit, err := limitOf(req.GetLimit(), defaultLimit, maxRows)
	if err != nil {
		return nil, err
	}
	bytes, err := limitOf(req.GetMaxBytes(), defaultRowsBytes, maxBytes)
	if err != nil {
		return nil, err
	}
	q, err := query.Parse(req.GetQuery(), nil)
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err.Error())
	}
	r, err := s.newReading(req.GetShards())
	if err != nil {
		return nil, err
	}
	if err := s.queries.Acquire(ctx, 1); err != nil {
		return nil, err
	}
	defer s.queries.Release(1)

	results := make([]result, len(r.shards))
	now := wallMillis(s.deps.Now())
	shards, scanning := errgroup.WithContext(ctx)
	for i, shard := range r.shards {
		res := &results[i]
		if q.Grouped() && !req.GetUngrouped() {
			res.groups = query.NewGroups(q)
		} else {
			res.top = query.NewTop(q, req.GetAfter(), limit, bytes)
		}
		shards.Go(func() error {
			covered, err := r.scan(scanning, shard, req.GetMap(), now, s.turns, func(key string, value []byte) {
				if q.Match(key, value) {
					res.add(key, value)
				}
			})
			res.covered = covered
			return err
		})
	}
	if err := shards.Wait(); err != nil {
		return nil, readError(ctx, err)
	}

	resp := &partitionv1.QueryResponse{}
	for i, shard := range r.shards {
		resp.Covered = append(resp.Covered, &partitionv1.ShardCovered{
			Shard: uint32(shard.id), Covered: arrivalToProto(results[i].covered),
		})
	}
	var rows []query.Row
	if results[0].groups != nil {
		rows, resp.More, err = s.mergeGroups(ctx, q, results)
	} else {
		rows, resp.More, err = s.mergeRows(ctx, q, results, query.NewTop(q, req.GetAfter(), limit, bytes))
	}
	if err != nil {
		return nil, readError(ctx, err)
	}
	for _, row := range rows {
		resp.Rows = append(resp.Rows, &partitionv1.Row{Key: []byte(row.Key), Value: row.Value})
	}
	return resp, nil
}

// result is what one shard contributes.
type result struct {
	top     *query.Top
	groups  *query.Groups
	tooMany bool // groups
	covered arrival
}

func (res *result) add(key string, value []byte) {
	switch {
	case res.top != nil:
		res.top.Add(key, value)
	case errors.Is(res.groups.Add(key, value), query.ErrTooManyGroups):
		res.tooMany = true
	}
}

func (s *Service) mergeGroups(ctx context.Context, q *query.Query, results []result) (rows []query.Row, tooMany bool, err error) {
	all := query.NewGroups(q)
	err = s.turns.evaluate(ctx, func(yield func(string, []byte) bool) {
		for i := range results {
			tooMany = tooMany || results[i].tooMany
			for _, row := range results[i].groups.Partials() {
				if !yield(row.Key, row.Value) {
					return
				}
			}
		}
	}, func(key string, value []byte) {
		// Partials of this process can be merged, so there are too many.
		tooMany = all.Merge(query.Row{Key: key, Value: value}) != nil || tooMany
	})
	if err != nil {
		return nil, false, err
	}
	return all.Partials(), tooMany, nil
}

// mergeRows returns the first rows of all shards, collected in all.
func (s *Service) mergeRows(ctx context.Context, q *query.Query, results []result, all *query.Top) (rows []query.Row, more bool, err error) {
	var end *query.Row // behind it, rows of a shard that was cut are missing
	err = s.turns.evaluate(ctx, func(yield func(string, []byte) bool) {
		for i := range results {
			found, cut := results[i].top.Rows()
			if n := len(found); cut && n > 0 && (end == nil || q.Compare(found[n-1], *end) < 0) {
				end = &found[n-1]
			}
			for _, row := range found {
				if !yield(row.Key, row.Value) {
					return
				}
			}
		}
	}, all.Add)
	if err != nil {
		return nil, false, err
	}
	rows, more = all.Rows()
	for n := len(rows); end != nil; n-- {
		more = true
		if n == 0 || q.Compare(rows[n-1], *end) <= 0 {
			return rows[:n], more, nil
		}
	}
	return rows, more, nil
}
