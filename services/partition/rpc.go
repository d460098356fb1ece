package partition

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync/atomic"

	"connectrpc.com/connect/v2"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"github.com/topgun-sync/topgun/core/merkle"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/partition/v1/partitionv1connect"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

const (
	// retryBusy and retryFull are the hints, in milliseconds, of a refusal because
	// the queue is full and because the log is.
	retryBusy = 100
	retryFull = 1000

	defaultLimit = 1000
	maxLimit     = 10_000
	maxKeys      = 10_000
	defaultBytes = 1 << 20
	maxBytes     = 16 << 20 // with the limit it keeps an answer below the transport's bound
)

var (
	_ partitionv1connect.PartitionServiceHandler = (*Service)(nil)

	errUnavailable = connect.NewError(connect.CodeUnavailable, "the shards are not served here at present: try again, or ask Describe who serves them")
	// errUnknown answers an Apply whose changes may or may not be in the log.
	errUnknown = connect.NewError(connect.CodeUnavailable, "the outcome of the ops is unknown: apply them again")
)

// Register registers the service's handler.
func (s *Service) Register(server *connect.Server) {
	partitionv1connect.RegisterPartitionServiceHandler(server, s)
}

// Apply implements the rpc. Groups travel independently: one shard's refusal says
// nothing about another's.
func (s *Service) Apply(ctx context.Context, req *partitionv1.ApplyRequest) (*partitionv1.ApplyResponse, error) {
	if err := checkApply(req); err != nil {
		return nil, err
	}
	resp := &partitionv1.ApplyResponse{Shards: make([]*partitionv1.ShardReceipt, len(req.GetShards()))}
	p := s.phase.Load()
	if p.serving == nil {
		refusal := partitionv1.Refusal_REFUSAL_UNAVAILABLE
		if errors.Is(p.reason, ErrFenced) {
			refusal = partitionv1.Refusal_REFUSAL_NOT_OWNER
		}
		for i := range resp.Shards {
			resp.Shards[i] = s.refuse(refusal, 0)
		}
		return resp, nil
	}
	a := p.serving
	resp.MapVersion = a.version
	calls := make([]call, len(req.GetShards()))
	for i, ops := range req.GetShards() {
		if int(ops.GetShard()) >= len(a.shards) {
			resp.Shards[i] = s.refuse(partitionv1.Refusal_REFUSAL_NOT_OWNER, 0)
			continue
		}
		c := &calls[i]
		if !fillGroup(&c.group, ops, len(a.shards)) {
			return nil, connect.NewError(connect.CodeInvalidArgument, "a key does not belong to the shard of its ops")
		}
	}
	for i, ops := range req.GetShards() {
		if resp.Shards[i] == nil {
			resp.Shards[i] = s.begin(ctx, a, &calls[i], ops)
		}
	}
	var failed error
	for i := range calls {
		if calls[i].done == nil {
			continue
		}
		receipt, err := s.end(ctx, &calls[i])
		if err != nil {
			failed = err
			continue
		}
		resp.Shards[i] = receipt
	}
	if failed != nil {
		return nil, failed
	}
	return resp, nil
}

// call is one group on its way through its shard.
type call struct {
	group group
	shard *shard
	done  chan struct{} // nil if the shard never got it
	span  trace.Span
}

// begin hands a group to its shard, or returns why not. It waits for room until ctx
// ends.
func (s *Service) begin(ctx context.Context, a *active, c *call, ops *partitionv1.ShardOps) *partitionv1.ShardReceipt {
	c.shard = a.shards[ops.GetShard()]
	if a.lane.full() {
		return s.refuse(partitionv1.Refusal_REFUSAL_OVERLOADED, retryFull)
	}
	c.group.held = min(c.group.held, s.config.MaxPendingBytes)
	if s.room.Acquire(ctx, c.group.held) != nil {
		return s.refuse(partitionv1.Refusal_REFUSAL_OVERLOADED, retryBusy)
	}
	parent := ctx
	if tp := ops.GetTraceParent(); tp != "" {
		parent = propagation.TraceContext{}.Extract(ctx, propagation.MapCarrier{"traceparent": tp})
	}
	_, c.span = s.deps.Tracer.Start(parent, "partition.apply")
	if c.span.IsRecording() {
		c.span.SetAttributes(attribute.Int("shard", c.shard.id), attribute.Int("ops", len(c.group.ops)))
	}
	c.group.span = c.span.SpanContext()
	done, err := c.shard.submit(ctx, func() { c.shard.apply(&c.group) })
	if err != nil {
		s.room.Release(c.group.held)
		c.span.SetStatus(codes.Error, "refused")
		c.span.End()
		if errors.Is(err, errStopped) {
			return s.refuse(partitionv1.Refusal_REFUSAL_UNAVAILABLE, 0)
		}
		return s.refuse(partitionv1.Refusal_REFUSAL_OVERLOADED, retryBusy)
	}
	c.done = done
	return nil
}

// end waits until a group is merged and logged. An error means that this is not
// known (ACK-04).
func (s *Service) end(ctx context.Context, c *call) (*partitionv1.ShardReceipt, error) {
	defer c.span.End()
	if err := c.shard.await(ctx, c.done); err != nil {
		if !c.group.turn.Swap(true) { // the shard has not begun, and will not
			s.room.Release(c.group.held)
			c.span.SetStatus(codes.Error, "refused")
			if errors.Is(err, errStopped) {
				return s.refuse(partitionv1.Refusal_REFUSAL_UNAVAILABLE, 0), nil
			}
			return s.refuse(partitionv1.Refusal_REFUSAL_OVERLOADED, retryBusy), nil
		}
		<-c.done
	}
	if c.group.overloaded {
		return s.refuse(partitionv1.Refusal_REFUSAL_OVERLOADED, retryFull), nil
	}
	if err := c.group.batch.wait(ctx); err != nil {
		c.span.SetStatus(codes.Error, "unknown")
		return nil, errUnknown.WithCause(err)
	}
	receipt := &partitionv1.ShardReceipt{
		Receipts: receiptsToProto(c.group.ops),
		Level:    s.level(),
		Arrival:  arrivalToProto(c.group.arrival),
	}
	if b := c.group.batch; b != nil {
		receipt.Lane, receipt.Sequence = c.shard.lane.writer.Name(), b.sequence
	}
	return receipt, nil
}

func (s *Service) refuse(refusal partitionv1.Refusal, retryAfter uint32) *partitionv1.ShardReceipt {
	s.stats.refused.Add(1)
	return &partitionv1.ShardReceipt{Refusal: refusal, RetryAfterMillis: retryAfter}
}

// level is what an answered Apply reaches; never more than was done (ACK-03).
func (s *Service) level() partitionv1.Level {
	if s.deps.Log.Memory() {
		return partitionv1.Level_LEVEL_MEMORY
	}
	return partitionv1.Level_LEVEL_APPLIED
}

// Leaves implements the rpc.
func (s *Service) Leaves(ctx context.Context, req *partitionv1.LeavesRequest) (*partitionv1.LeavesResponse, error) {
	combine := merkle.Mixed
	switch req.GetCombine() {
	case partitionv1.Combine_COMBINE_UNSPECIFIED, partitionv1.Combine_COMBINE_MIXED:
	case partitionv1.Combine_COMBINE_PLAIN:
		combine = merkle.Plain
	default:
		return nil, connect.NewError(connect.CodeInvalidArgument, "combine must be MIXED or PLAIN")
	}
	kind, err := tree(req.GetKind())
	if err != nil {
		return nil, err
	}
	r, err := s.newReading(req.GetShards())
	if err != nil {
		return nil, err
	}
	sums := make([]*merkle.Leaves, len(r.shards))
	counts := make([]int, len(r.shards))
	err = r.each(ctx, func(i int, shard *shard) {
		if t := shard.tables[kind][req.GetMap()]; t != nil {
			sums[i], counts[i] = t.leafSums(combine).Clone(), len(t.records)
		}
	})
	if err != nil {
		return nil, err
	}
	var total merkle.Leaves
	resp := &partitionv1.LeavesResponse{}
	for i, sum := range sums {
		if sum != nil {
			total.Merge(sum)
			resp.Records += uint64(counts[i])
		}
	}
	for leaf, sum := range total.All() {
		resp.Leaves = append(resp.Leaves, uint32(leaf))
		resp.Hashes = append(resp.Hashes, sum)
	}
	covered := r.covered()
	resp.Covered = arrivalToProto(covered)
	resp.NowMillis = max(wallMillis(s.deps.Now()), covered.millis)
	return resp, nil
}

// Records implements the rpc.
func (s *Service) Records(ctx context.Context, req *partitionv1.RecordsRequest) (*partitionv1.RecordsResponse, error) {
	if req.GetFirstLeaf() > req.GetLastLeaf() || req.GetLastLeaf() >= merkle.LeafCount {
		return nil, connect.NewError(connect.CodeInvalidArgument, "first leaf and last leaf must be a range within 0 to 4095")
	}
	kind, err := tree(req.GetKind())
	if err != nil {
		return nil, err
	}
	r, err := s.newReading(req.GetShards())
	if err != nil {
		return nil, err
	}
	found := make([][]change, len(r.shards))
	err = r.each(ctx, func(i int, shard *shard) {
		if t := shard.tables[kind][req.GetMap()]; t != nil {
			found[i] = t.inLeaves(int(req.GetFirstLeaf()), int(req.GetLastLeaf()))
		}
	})
	if err != nil {
		return nil, err
	}
	return &partitionv1.RecordsResponse{Changes: changesToProto(slices.Concat(found...))}, nil
}

// Since implements the rpc. The clock is read before the shards: what they take in
// later arrives above that reading, so up to it the answer of all shards together
// is complete, and a page that ends there or before neither skips nor repeats.
func (s *Service) Since(ctx context.Context, req *partitionv1.SinceRequest) (*partitionv1.SinceResponse, error) {
	kind, err := tree(req.GetKind())
	if err != nil {
		return nil, err
	}
	limit, err := limitOf(req.GetLimit(), defaultLimit, maxLimit)
	if err != nil {
		return nil, err
	}
	bytes, err := limitOf(req.GetMaxBytes(), defaultBytes, maxBytes)
	if err != nil {
		return nil, err
	}
	r, err := s.newReading(req.GetShards())
	if err != nil {
		return nil, err
	}
	after := arrivalFromProto(req.GetAfter())
	found := make([][]change, len(r.shards))
	cut := make([]bool, len(r.shards))
	// Keys spread evenly over the shards, so twice its share is as much of a page as a
	// shard is likely to fill; asked for all of it, most of the answers would be
	// dropped again. Where keys do not spread, pages are smaller.
	share := func(n int) int { return min(n, 2*n/len(r.shards)+1) }
	err = r.each(ctx, func(i int, shard *shard) {
		if t := shard.tables[kind][req.GetMap()]; t != nil {
			found[i], cut[i] = t.since(after, r.cut, share(limit), share(bytes))
		}
	})
	if err != nil {
		return nil, err
	}
	// Beyond the last record of a shard that was cut, its records are missing.
	covered, more := r.covered(), false
	for i := range found {
		if cut[i] {
			more = true
			covered = earliest(covered, found[i][len(found[i])-1].arrival)
		}
	}
	// Each shard's are in arrival order: merging them costs less than sorting.
	var page []change
	next := firstArrived(found)
	for next >= 0 && len(page) < limit && bytes > 0 {
		c := &found[next][0]
		if c.arrival.compare(covered) > 0 {
			break
		}
		bytes -= len(c.key) + len(c.record.Value)
		page = append(page, *c)
		found[next] = found[next][1:]
		next = firstArrived(found)
	}
	if next >= 0 {
		more = true
		if len(page) > 0 && found[next][0].arrival.compare(covered) <= 0 {
			covered = page[len(page)-1].arrival
		}
	}
	return &partitionv1.SinceResponse{
		Changes: changesToProto(page),
		// A position from another node may lie above all of ours.
		Covered: arrivalToProto(latest(covered, after)),
		More:    more,
	}, nil
}

// firstArrived returns the index of the list that begins with the earliest arrival,
// -1 if all are empty.
func firstArrived(lists [][]change) int {
	first := -1
	for i, list := range lists {
		if len(list) > 0 && (first < 0 || list[0].arrival.compare(lists[first][0].arrival) < 0) {
			first = i
		}
	}
	return first
}

// Get implements the rpc.
func (s *Service) Get(ctx context.Context, req *partitionv1.GetRequest) (*partitionv1.GetResponse, error) {
	kind, err := readable(req.GetKind())
	if err != nil {
		return nil, err
	}
	if n := len(req.GetKeys()); n == 0 || n > maxKeys {
		return nil, connect.NewError(connect.CodeInvalidArgument, "a request must name 1 to 10000 keys")
	}
	r, err := s.newReading(nil)
	if err != nil {
		return nil, err
	}
	keys := make(map[*shard][]string)
	for _, key := range req.GetKeys() {
		shard := r.shards[shardOf(merkle.HashBytes(key), len(r.shards))]
		keys[shard] = append(keys[shard], string(key))
	}
	r.shards = slices.Collect(maps.Keys(keys))
	found := make([][]change, len(r.shards))
	var bytes atomic.Int64
	err = r.each(ctx, func(i int, shard *shard) {
		t := shard.tables[kind][req.GetMap()]
		if t == nil {
			return
		}
		for _, key := range keys[shard] {
			of := t.of(key)
			for j := range of {
				bytes.Add(int64(len(of[j].key) + len(of[j].record.Value)))
			}
			if bytes.Load() > maxBytes {
				return
			}
			found[i] = append(found[i], of...)
		}
	})
	if err != nil {
		return nil, err
	}
	if bytes.Load() > maxBytes {
		return nil, connect.NewError(connect.CodeResourceExhausted, "the keys hold more than 16 MiB: ask for fewer")
	}
	return &partitionv1.GetResponse{Changes: changesToProto(slices.Concat(found...))}, nil
}

// readable checks the kind that a read asks for.
func readable(k typesv1.Kind) (typesv1.Kind, error) {
	if k = kindOf(k); k != lww && k != or && k != counter {
		return 0, connect.NewError(connect.CodeInvalidArgument, "kind must be LWW, OR or COUNTER")
	}
	return k, nil
}

// tree checks the kind of a map that has leaves.
func tree(k typesv1.Kind) (typesv1.Kind, error) {
	if k = kindOf(k); k != lww && k != or {
		return 0, connect.NewError(connect.CodeInvalidArgument, "kind must be LWW or OR")
	}
	return k, nil
}

// ListMaps implements the rpc.
func (s *Service) ListMaps(ctx context.Context, _ *partitionv1.ListMapsRequest) (*partitionv1.ListMapsResponse, error) {
	r, err := s.newReading(nil)
	if err != nil {
		return nil, err
	}
	type id struct {
		kind typesv1.Kind
		name string
	}
	type count struct{ records, tombstones int }
	counts := make([]map[id]count, len(r.shards))
	err = r.each(ctx, func(i int, shard *shard) {
		counts[i] = make(map[id]count)
		for _, kind := range []typesv1.Kind{lww, or} {
			for name, t := range shard.tables[kind] {
				if name != devicesMap {
					counts[i][id{kind, name}] = count{len(t.records) - t.tombstones, t.tombstones}
				}
			}
		}
	})
	if err != nil {
		return nil, err
	}
	byID := make(map[id]*partitionv1.MapInfo)
	resp := &partitionv1.ListMapsResponse{}
	for _, shard := range counts {
		for id, c := range shard {
			info := byID[id]
			if info == nil {
				info = &partitionv1.MapInfo{Name: id.name, Kind: max(id.kind, typesv1.Kind_KIND_LWW)}
				byID[id] = info
				resp.Maps = append(resp.Maps, info)
			}
			info.Records += uint64(c.records)
			info.Tombstones += uint64(c.tombstones)
		}
	}
	slices.SortFunc(resp.Maps, func(a, b *partitionv1.MapInfo) int {
		return cmp.Or(strings.Compare(a.GetName(), b.GetName()), cmp.Compare(a.GetKind(), b.GetKind()))
	})
	return resp, nil
}

// Describe implements the rpc. A service that does not serve names no shards.
func (s *Service) Describe(context.Context, *partitionv1.DescribeRequest) (*partitionv1.DescribeResponse, error) {
	resp := &partitionv1.DescribeResponse{
		NodeId:     s.config.NodeID,
		History:    s.deps.Log.History(),
		ShardCount: uint32(s.deps.Log.Shards()),
		Level:      s.level(),

		TombstoneRetentionMillis: uint64(retentionOf(s.config.TombstoneRetention)),
	}
	if a := s.phase.Load().serving; a != nil {
		resp.Lane, resp.MapVersion = a.lane.writer.Name(), a.version
		resp.PrunedBeforeMillis = a.shards[0].pruner.announced.Load()
		for _, shard := range a.shards {
			resp.Shards = append(resp.Shards, uint32(shard.id))
			resp.PrunedBeforeMillis = min(resp.PrunedBeforeMillis, shard.pruner.announced.Load())
		}
	}
	return resp, nil
}

// reading is one read over several shards.
type reading struct {
	active *active
	shards []*shard
	// cut is the clock's reading before the shards are read: they show at least
	// everything that arrived up to it.
	cut arrival
}

// newReading checks the shards that a request names; none means all.
func (s *Service) newReading(ids []uint32) (*reading, error) {
	a := s.phase.Load().serving
	if a == nil {
		return nil, errUnavailable
	}
	r := &reading{active: a, shards: a.shards}
	if len(ids) > 0 {
		r.shards = make([]*shard, 0, min(len(ids), len(a.shards)))
		for _, id := range ids {
			if int(id) >= len(a.shards) {
				return nil, errUnavailable
			}
			if slices.Contains(r.shards, a.shards[id]) {
				return nil, connect.NewError(connect.CodeInvalidArgument, "a shard is named twice")
			}
			r.shards = append(r.shards, a.shards[id])
		}
	}
	r.cut = a.clock.read(wallMillis(s.deps.Now()))
	return r, nil
}

// each has every shard do the task, and returns when they have and everything that
// they showed is in the log (ACK-02).
func (r *reading) each(ctx context.Context, task func(i int, s *shard)) error {
	done := make([]chan struct{}, len(r.shards))
	shown := make([]*batch, len(r.shards))
	for i, s := range r.shards {
		var err error
		done[i], err = s.submit(ctx, func() {
			task(i, s)
			shown[i] = s.last
		})
		if err != nil {
			return readError(ctx, err)
		}
	}
	for i, s := range r.shards {
		if err := s.await(ctx, done[i]); err != nil {
			return readError(ctx, err)
		}
		if err := shown[i].wait(ctx); err != nil {
			return readError(ctx, err)
		}
	}
	return nil
}

// covered is the position that the reading may be handed out with: what every owner
// to come will stay above. Call it after each.
func (r *reading) covered() arrival { return earliest(r.cut, r.active.lane.ceiling()) }

func readError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return errUnavailable.WithCause(err)
}

func limitOf(asked uint32, otherwise, most int) (int, error) {
	switch {
	case asked == 0:
		return otherwise, nil
	case int64(asked) > int64(most):
		return 0, connect.NewError(connect.CodeInvalidArgument, "limit and max bytes must be within their bounds: max bytes at most 16 MiB, limit at most 10000, of a query 100000")
	}
	return int(asked), nil
}
