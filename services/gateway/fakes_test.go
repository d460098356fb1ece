package gateway

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectinprocess"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/keyspace"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/query"
	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1/fanoutv1connect"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/partition/v1/partitionv1connect"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

// fakePartition owns every shard, in memory, and publishes what it changes to a
// fakeFanout. It merges for real; the func fields make it fail on cue and are set
// before the first call.
type fakePartition struct {
	partitionv1connect.UnimplementedPartitionServiceHandler

	shards  int
	history string
	level   partitionv1.Level
	lane    string // of the commits
	now     func() time.Time
	fanout  *fakeFanout // nil publishes nothing

	retention uint64        // of tombstones, in ms
	pruned    atomic.Uint64 // in Unix ms

	// refuse says why a shard takes nothing; nil takes everything.
	refuse func(shard uint32) (partitionv1.Refusal, uint32)
	// reject says why an op can never be applied; nil rejects nothing.
	reject func(*partitionv1.Op) string
	// before runs ahead of every call, with the method's name; an error is the answer.
	before func(ctx context.Context, method string) error
	// after runs when a lock was decided about.
	after func(method string)

	mu    sync.Mutex
	maps  map[string]map[string]*typesv1.Change
	clock typesv1.Arrival
	seq   map[string]uint64
	calls map[string]int
	// commits counts the calls of Apply; the sequence in the log.
	commits uint64
	trace   string // of the last ops
	locks   fakeLocks
}

func newFakePartition(fanout *fakeFanout) *fakePartition {
	p := &fakePartition{
		shards: 4, history: "history-1", lane: "lane-1", level: partitionv1.Level_LEVEL_APPLIED, now: time.Now, fanout: fanout,
		maps: map[string]map[string]*typesv1.Change{}, seq: map[string]uint64{}, calls: map[string]int{},
	}
	if fanout != nil {
		fanout.partition = p
	}
	return p
}

// client returns a generated client of the fake over the in-process transport.
func (p *fakePartition) client() partitionv1connect.PartitionServiceClient {
	server := connect.NewServer()
	partitionv1connect.RegisterPartitionServiceHandler(server, p)
	return partitionv1connect.NewPartitionServiceClient(connect.NewClient(connectinprocess.New(server)))
}

// called reports how often a method was called.
func (p *fakePartition) called(method string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.calls[method]
}

// record returns the record of a key, or nil.
func (p *fakePartition) record(mapName, key string) *typesv1.Record {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.maps[mapName][key]; c != nil {
		return c.GetRecord()
	}
	return nil
}

// put stores a record as another writer would, and publishes the change.
func (p *fakePartition) put(mapName, key string, value []byte, ts hlc.Timestamp) {
	op := &partitionv1.Op{Map: mapName, Key: []byte(key), Record: &typesv1.Record{
		Value: value, Timestamp: &typesv1.Timestamp{Millis: ts.Millis, Counter: ts.Counter, NodeId: ts.NodeID},
	}}
	p.mu.Lock()
	_, change := p.merge(0, op, "")
	event := p.event(change)
	p.mu.Unlock()
	if event != nil && p.fanout != nil {
		p.fanout.publish(event)
	}
}

func (p *fakePartition) enter(ctx context.Context, method string) error {
	p.mu.Lock()
	p.calls[method]++
	p.mu.Unlock()
	if p.before != nil {
		return p.before(ctx, method)
	}
	return nil
}

// tick gives the next arrival; p.mu is held.
func (p *fakePartition) tick() *typesv1.Arrival {
	if now := uint64(p.now().UnixMilli()); now > p.clock.GetMillis() {
		p.clock = typesv1.Arrival{Millis: now}
	} else {
		p.clock.Counter++
	}
	return &typesv1.Arrival{Millis: p.clock.GetMillis(), Counter: p.clock.GetCounter()}
}

func fakeRecord(r *typesv1.Record) lwwmap.Record {
	ts := r.GetTimestamp()
	return lwwmap.Record{
		Value:     r.GetValue(),
		Timestamp: hlc.Timestamp{Millis: ts.GetMillis(), Counter: ts.GetCounter(), NodeID: ts.GetNodeId()},
		TTLMillis: r.GetTtlMillis(),
	}
}

// merge applies one op; p.mu is held.
func (p *fakePartition) merge(shard uint32, op *partitionv1.Op, origin string) (*partitionv1.Receipt, *typesv1.Change) {
	if p.reject != nil {
		if reason := p.reject(op); reason != "" {
			return &partitionv1.Receipt{Outcome: partitionv1.Outcome_OUTCOME_REJECTED, Reason: reason}, nil
		}
	}
	name, id := fakeMap(op.GetKind(), op.GetMap()), fakeID(op.GetKey(), op.GetTag())
	records := p.maps[name]
	if records == nil {
		records = map[string]*typesv1.Change{}
		p.maps[name] = records
	}
	record, outcome := op.GetRecord(), partitionv1.Outcome_OUTCOME_APPLIED
	var restamped []*typesv1.Timestamp
	old := records[id]
	if tooOld := p.fence(old, op); tooOld != "" {
		return &partitionv1.Receipt{Outcome: partitionv1.Outcome_OUTCOME_REJECTED, Reason: tooOld}, nil
	}
	if op.GetKind() == typesv1.Kind_KIND_OR && (old.GetRecord() != nil || len(record.GetValue()) == 0) {
		if receipt := fakeTagged(old, record); receipt != nil {
			return receipt, nil
		}
		old = nil
	}
	if op.GetKind() == typesv1.Kind_KIND_COUNTER {
		var receipt *partitionv1.Receipt
		if record, receipt = fakeCounted(old, op); receipt != nil {
			return receipt, nil
		}
		old = nil
	}
	if limit := uint64(p.now().Add(hlc.MaxDrift).UnixMilli()); record.GetTimestamp().GetMillis() > limit {
		if old != nil && slices.ContainsFunc(old.GetRestamped(), func(t *typesv1.Timestamp) bool {
			return t.GetNodeId() == record.GetTimestamp().GetNodeId() && t.GetMillis() >= record.GetTimestamp().GetMillis()
		}) {
			return &partitionv1.Receipt{Outcome: partitionv1.Outcome_OUTCOME_RESTAMPED, Winner: old.GetRecord()}, nil
		}
		restamped = []*typesv1.Timestamp{record.GetTimestamp()}
		at := p.tick()
		record = &typesv1.Record{Value: record.GetValue(), TtlMillis: record.GetTtlMillis(), Timestamp: &typesv1.Timestamp{
			Millis: at.GetMillis(), Counter: at.GetCounter(), NodeId: fmt.Sprintf("topgun-%d", shard),
		}}
		outcome, origin = partitionv1.Outcome_OUTCOME_RESTAMPED, ""
	}
	if old != nil {
		local := fakeRecord(old.GetRecord())
		switch lwwmap.Decide(&local, fakeRecord(record)) {
		case lwwmap.Duplicate:
			return &partitionv1.Receipt{Outcome: partitionv1.Outcome_OUTCOME_DUPLICATE}, nil
		case lwwmap.Superseded:
			return &partitionv1.Receipt{Outcome: partitionv1.Outcome_OUTCOME_SUPERSEDED, Winner: old.GetRecord()}, nil
		case lwwmap.Conflict:
			return &partitionv1.Receipt{
				Outcome: partitionv1.Outcome_OUTCOME_REJECTED, Reason: "STAMP_REUSED: another value has this stamp",
			}, nil
		}
	}
	change := &typesv1.Change{
		Map: op.GetMap(), Key: op.GetKey(), Record: record, Arrival: p.tick(), Restamped: restamped, Origin: origin,
		Kind: op.GetKind(), Tag: op.GetTag(),
	}
	records[id] = change
	receipt := &partitionv1.Receipt{Outcome: outcome}
	if outcome == partitionv1.Outcome_OUTCOME_RESTAMPED {
		receipt.Winner = record
	}
	return receipt, change
}

// event wraps changes of one map for the fanout; p.mu is held.
func (p *fakePartition) event(changes ...*typesv1.Change) *fanoutv1.Event {
	changes = slices.DeleteFunc(changes, func(c *typesv1.Change) bool { return c == nil })
	if len(changes) == 0 {
		return nil
	}
	name := changes[0].GetMap()
	p.seq[name]++
	return &fanoutv1.Event{Map: name, Lane: "lane-1", Sequence: p.seq[name], Changes: changes}
}

func (p *fakePartition) Apply(ctx context.Context, req *partitionv1.ApplyRequest) (*partitionv1.ApplyResponse, error) {
	if err := p.enter(ctx, "Apply"); err != nil {
		return nil, err
	}
	res := &partitionv1.ApplyResponse{MapVersion: 1}
	var events []*fanoutv1.Event
	p.mu.Lock()
	p.commits++
	for _, shard := range req.GetShards() {
		p.trace = shard.GetTraceParent()
		receipt := &partitionv1.ShardReceipt{Level: p.level, Lane: p.lane, Sequence: p.commits}
		res.Shards = append(res.Shards, receipt)
		if p.refuse != nil {
			if receipt.Refusal, receipt.RetryAfterMillis = p.refuse(shard.GetShard()); receipt.Refusal != 0 {
				continue
			}
		}
		changed := map[string][]*typesv1.Change{}
		for _, op := range shard.GetOps() {
			if want := keyspace.ShardOf(string(op.GetKey()), p.shards); want != int(shard.GetShard()) {
				p.mu.Unlock()
				return nil, connect.NewError(connect.CodeInvalidArgument,
					fmt.Sprintf("op of shard %d sent to shard %d", want, shard.GetShard()))
			}
			r, change := p.merge(shard.GetShard(), op, shard.GetOrigin())
			receipt.Receipts = append(receipt.Receipts, r)
			if change != nil {
				changed[op.GetMap()] = append(changed[op.GetMap()], change)
			}
		}
		receipt.Arrival = &typesv1.Arrival{Millis: p.clock.GetMillis(), Counter: p.clock.GetCounter()}
		for _, name := range slices.Sorted(maps.Keys(changed)) {
			events = append(events, p.event(changed[name]...))
		}
	}
	p.mu.Unlock()
	if p.fanout != nil {
		for _, e := range events {
			p.fanout.publish(e)
		}
	}
	return res, nil
}

// selected returns the changes of a map that lie in the given shards, in arrival
// order; p.mu is held.
func (p *fakePartition) selected(kind typesv1.Kind, name string, shards []uint32) []*typesv1.Change {
	var out []*typesv1.Change
	for _, c := range p.maps[fakeMap(kind, name)] {
		if len(shards) == 0 || slices.Contains(shards, uint32(keyspace.ShardOf(string(c.GetKey()), p.shards))) {
			out = append(out, c)
		}
	}
	slices.SortFunc(out, func(a, b *typesv1.Change) int { return compareArrivals(a.GetArrival(), b.GetArrival()) })
	return out
}

func compareArrivals(a, b *typesv1.Arrival) int {
	return cmp.Or(cmp.Compare(a.GetMillis(), b.GetMillis()), cmp.Compare(a.GetCounter(), b.GetCounter()))
}

func (p *fakePartition) Leaves(ctx context.Context, req *partitionv1.LeavesRequest) (*partitionv1.LeavesResponse, error) {
	if err := p.enter(ctx, "Leaves"); err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	combine := merkle.Mixed
	if req.GetCombine() == partitionv1.Combine_COMBINE_PLAIN {
		combine = merkle.Plain
	}
	var leaves merkle.Leaves
	changes := p.selected(req.GetKind(), req.GetMap(), req.GetShards())
	if req.GetKind() == typesv1.Kind_KIND_OR {
		leaves = fakeORLeaves(changes, combine)
	}
	for _, c := range changes {
		if req.GetKind() == typesv1.Kind_KIND_OR {
			break
		}
		key := string(c.GetKey())
		leaves.Add(merkle.Leaf(merkle.Hash(key)), merkle.ItemHash(key, fakeRecord(c.GetRecord()).Timestamp), combine)
	}
	res := &partitionv1.LeavesResponse{Records: uint64(len(changes)), Covered: p.tick(), NowMillis: p.clock.GetMillis()}
	for leaf, sum := range leaves.All() {
		res.Leaves = append(res.Leaves, uint32(leaf))
		res.Hashes = append(res.Hashes, sum)
	}
	return res, nil
}

func (p *fakePartition) Records(ctx context.Context, req *partitionv1.RecordsRequest) (*partitionv1.RecordsResponse, error) {
	if err := p.enter(ctx, "Records"); err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	res := &partitionv1.RecordsResponse{}
	for _, c := range p.selected(req.GetKind(), req.GetMap(), req.GetShards()) {
		leaf := uint32(merkle.Leaf(merkle.Hash(string(c.GetKey()))))
		if leaf >= req.GetFirstLeaf() && leaf <= req.GetLastLeaf() {
			res.Changes = append(res.Changes, c)
		}
	}
	return res, nil
}

func (p *fakePartition) Since(ctx context.Context, req *partitionv1.SinceRequest) (*partitionv1.SinceResponse, error) {
	if err := p.enter(ctx, "Since"); err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	limit, maxBytes := int(cmp.Or(req.GetLimit(), 1000)), int(cmp.Or(req.GetMaxBytes(), 1<<20))
	res := &partitionv1.SinceResponse{Covered: p.tick()}
	size := 0
	for _, c := range p.selected(req.GetKind(), req.GetMap(), req.GetShards()) {
		if compareArrivals(c.GetArrival(), req.GetAfter()) <= 0 {
			continue
		}
		size += len(c.GetKey()) + len(c.GetRecord().GetValue())
		if len(res.Changes) == limit || (len(res.Changes) > 0 && size > maxBytes) {
			res.Covered, res.More = res.Changes[len(res.Changes)-1].GetArrival(), true
			break
		}
		res.Changes = append(res.Changes, c)
	}
	return res, nil
}

// Query answers as the real one does, from a scan.
func (p *fakePartition) Query(ctx context.Context, req *partitionv1.QueryRequest) (*partitionv1.QueryResponse, error) {
	if err := p.enter(ctx, "Query"); err != nil {
		return nil, err
	}
	q, err := query.Parse(req.GetQuery(), nil)
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err.Error())
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	top := query.NewTop(q, req.GetAfter(), int(cmp.Or(req.GetLimit(), 1000)), int(cmp.Or(req.GetMaxBytes(), 8<<20)))
	groups := query.NewGroups(q)
	for _, c := range p.selected(typesv1.Kind_KIND_LWW, req.GetMap(), req.GetShards()) {
		key, value := string(c.GetKey()), c.GetRecord().GetValue()
		if len(value) == 0 || !q.Match(key, value) {
			continue
		}
		if top.Add(key, value); q.Grouped() {
			if err := groups.Add(key, value); err != nil {
				return &partitionv1.QueryResponse{More: true}, nil
			}
		}
	}
	res := &partitionv1.QueryResponse{}
	rows, more := top.Rows()
	if res.More = more; q.Grouped() && !req.GetUngrouped() {
		rows, res.More = groups.Partials(), false
	}
	for _, row := range rows {
		res.Rows = append(res.Rows, &partitionv1.Row{Key: []byte(row.Key), Value: row.Value})
	}
	return res, nil
}

func (p *fakePartition) Describe(ctx context.Context, _ *partitionv1.DescribeRequest) (*partitionv1.DescribeResponse, error) {
	if err := p.enter(ctx, "Describe"); err != nil {
		return nil, err
	}
	res := &partitionv1.DescribeResponse{
		NodeId: "node-1", Lane: "lane-1", History: p.history, ShardCount: uint32(p.shards), MapVersion: 1, Level: p.level,
		TombstoneRetentionMillis: p.retention, PrunedBeforeMillis: p.pruned.Load(),
	}
	for shard := range p.shards {
		res.Shards = append(res.Shards, uint32(shard))
	}
	return res, nil
}

// fakeFanout delivers published events to the streams that watch their map.
type fakeFanout struct {
	fanoutv1connect.UnimplementedFanoutServiceHandler

	mu      sync.Mutex
	changed chan struct{} // closed and replaced when streams or watched maps change
	down    bool
	opened  int
	streams map[string]*fakeStream

	partition     *fakePartition // whose rows queries are about
	watchFails    error          // the answer of the next Watch with queries
	queryError    string         // the result of every query that is added
	added         int            // queries, and
	refreshed     int
	beforePublish func(context.Context) error // an error is the answer
}

type fakeStream struct {
	maps    map[string]bool
	queries map[uint64]*fakeQuery
	topics  map[string]bool
	out     chan *fanoutv1.SubscribeResponse
	cut     chan struct{}
}

func newFakeFanout() *fakeFanout {
	return &fakeFanout{changed: make(chan struct{}), streams: map[string]*fakeStream{}}
}

// client returns a generated client of the fake over the in-process transport.
func (f *fakeFanout) client() fanoutv1connect.FanoutServiceClient {
	server := connect.NewServer()
	fanoutv1connect.RegisterFanoutServiceHandler(server, f)
	return fanoutv1connect.NewFanoutServiceClient(connect.NewClient(connectinprocess.New(server)))
}

func (f *fakeFanout) notify() {
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *fakeFanout) Subscribe(ctx context.Context, _ *fanoutv1.SubscribeRequest, stream fanoutv1connect.FanoutServiceSubscribeServerStream) error {
	f.mu.Lock()
	if f.down {
		f.mu.Unlock()
		return connect.NewError(connect.CodeUnavailable, "fanout is down")
	}
	f.opened++
	id := fmt.Sprintf("stream-%d", f.opened)
	s := &fakeStream{maps: map[string]bool{}, queries: map[uint64]*fakeQuery{}, topics: map[string]bool{}, out: make(chan *fanoutv1.SubscribeResponse, 1<<16), cut: make(chan struct{})}
	f.streams[id] = s
	f.notify()
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		delete(f.streams, id)
		f.notify()
		f.mu.Unlock()
	}()
	ready := &fanoutv1.SubscribeResponse{Message: &fanoutv1.SubscribeResponse_Ready{Ready: &fanoutv1.Ready{StreamId: id}}}
	if err := stream.Send(ready); err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.cut:
			return connect.NewError(connect.CodeUnavailable, "stream cut")
		case m := <-s.out:
			if err := stream.Send(m); err != nil {
				return err
			}
		}
	}
}

func (f *fakeFanout) Watch(_ context.Context, req *fanoutv1.WatchRequest) (*fanoutv1.WatchResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.streams[req.GetStreamId()]
	if s == nil {
		return nil, connect.NewError(connect.CodeNotFound, "no such stream")
	}
	for _, name := range req.GetAdd() {
		s.maps[name] = true
	}
	for _, name := range req.GetRemove() {
		delete(s.maps, name)
	}
	if err := f.watchFails; err != nil && len(req.GetAddQueries()) > 0 {
		f.watchFails = nil
		return nil, err
	}
	f.watchLive(s, req)
	f.notify()
	return &fanoutv1.WatchResponse{}, nil
}

func (f *fakeFanout) send(name string, m *fanoutv1.SubscribeResponse) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.streams {
		if s.maps[name] {
			s.out <- m
		}
	}
}

// publish delivers an event to every stream that watches its map.
func (f *fakeFanout) publish(e *fanoutv1.Event) {
	f.mu.Lock()
	f.publishQueries(e)
	f.mu.Unlock()
	f.send(e.GetMap(), &fanoutv1.SubscribeResponse{Message: &fanoutv1.SubscribeResponse_Event{Event: e}})
}

// gap tells every stream that watches the map that events were lost.
func (f *fakeFanout) gap(name string) {
	f.send(name, &fanoutv1.SubscribeResponse{Message: &fanoutv1.SubscribeResponse_Gap{Gap: &fanoutv1.Gap{Map: name}}})
}

// cut ends every open stream.
func (f *fakeFanout) cut() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.streams {
		close(s.cut)
	}
	clear(f.streams)
}

// setDown refuses streams, or takes them again.
func (f *fakeFanout) setDown(down bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.down = down
}

// await blocks until some stream watches the map, or none does.
func (f *fakeFanout) await(t testing.TB, name string, watched bool) {
	t.Helper()
	deadline := time.After(patience)
	for {
		f.mu.Lock()
		got := false
		for _, s := range f.streams {
			got = got || s.maps[name]
		}
		changed := f.changed
		f.mu.Unlock()
		if got == watched {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("map %q: watched = %v after %v, want %v", name, got, patience, watched)
		}
	}
}
