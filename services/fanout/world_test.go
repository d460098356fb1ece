package fanout_test

import (
	"bytes"
	"context"
	"fmt"
	"hash/fnv"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/topgun-sync/topgun/core/msgval"
	"github.com/topgun-sync/topgun/core/query"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/partition/v1/partitionv1connect"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
	"github.com/topgun-sync/topgun/services/internal/bus/membus"
)

// world is all the shards, in memory and without a log. What they hold is what was
// logged; what was logged and not yet broadcast waits in unsent.
type world struct {
	t   testing.TB
	bus *membus.Bus

	mu     sync.Mutex
	shards []*worldShard
	nodes  []*worldNode
	// before and after run around the reading of a node's state, with the lock free.
	before, after func()
	// refuse makes a node's call fail.
	refuse func() error
	// endless are the queries that no node comes to the end of.
	endless func(*query.Query) bool
	// scans, reads and gets count the calls with an empty query, another query, and
	// Get.
	scans, reads, gets int
}

type worldShard struct {
	id       uint32
	node     int
	lane     string
	lanes    int
	clock    uint64
	sequence map[string]uint64
	lww      map[string]map[string]*typesv1.Change
	or       map[string]map[string]map[string]*typesv1.Change
	unsent   []*fanoutv1.Event
	// stragglers are events of an older lane, to be sent after younger ones.
	stragglers []*fanoutv1.Event
}

// worldNode is one node as its callers see it.
type worldNode struct {
	partitionv1connect.PartitionServiceClient
	world *world
	id    int
}

func newWorld(t testing.TB, shards, nodes int) *world {
	w := &world{t: t, before: func() {}, after: func() {}, refuse: func() error { return nil }, endless: func(*query.Query) bool { return false }}
	for n := range nodes {
		w.nodes = append(w.nodes, &worldNode{world: w, id: n})
	}
	for n := range shards {
		s := &worldShard{
			id: uint32(n), node: n % nodes,
			lww: make(map[string]map[string]*typesv1.Change), or: make(map[string]map[string]map[string]*typesv1.Change),
		}
		w.shards = append(w.shards, s)
		s.newLane(s.node)
	}
	return w
}

func (w *world) clients() []partitionv1connect.PartitionServiceClient {
	clients := make([]partitionv1connect.PartitionServiceClient, len(w.nodes))
	for n, node := range w.nodes {
		clients[n] = node
	}
	return clients
}

func (s *worldShard) newLane(node int) {
	s.node, s.lanes, s.sequence = node, s.lanes+1, make(map[string]uint64)
	s.lane = fmt.Sprintf("lane-%d-%d", s.id, s.lanes)
}

func (w *world) shardOf(key string) *worldShard {
	h := fnv.New32a()
	h.Write([]byte(key))
	return w.shards[int(h.Sum32())%len(w.shards)]
}

// log changes a record, an empty value removes it, and leaves its event unsent. It
// returns the arrival.
func (w *world) log(mapName, key, tag string, value []byte) uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.shardOf(key)
	s.clock++
	change := &typesv1.Change{
		Map: mapName, Key: []byte(key), Record: &typesv1.Record{Value: value},
		Arrival: &typesv1.Arrival{Millis: s.clock / 4, Counter: s.clock % 4},
	}
	if tag == "" {
		if s.lww[mapName] == nil {
			s.lww[mapName] = make(map[string]*typesv1.Change)
		}
		s.lww[mapName][key] = change
	} else {
		change.Kind, change.Tag = typesv1.Kind_KIND_OR, tag
		if s.or[mapName] == nil {
			s.or[mapName] = make(map[string]map[string]*typesv1.Change)
		}
		if s.or[mapName][key] == nil {
			s.or[mapName][key] = make(map[string]*typesv1.Change)
		}
		s.or[mapName][key][tag] = change
	}
	s.sequence[mapName]++
	s.unsent = append(s.unsent, &fanoutv1.Event{
		Map: mapName, Shard: s.id, Lane: s.lane, Sequence: s.sequence[mapName], Changes: []*typesv1.Change{change},
	})
	return s.clock
}

// send broadcasts what is unsent of every shard.
func (w *world) send() {
	for _, s := range w.shards {
		w.sendShard(s, len(s.unsent))
	}
}

func (w *world) sendShard(s *worldShard, n int) {
	w.mu.Lock()
	n = min(n, len(s.unsent))
	events := slices.Clone(s.unsent[:n])
	s.unsent = s.unsent[n:]
	if n > 0 {
		events = append(events, s.stragglers...)
		s.stragglers = nil
	}
	w.mu.Unlock()
	for _, e := range events {
		if err := w.bus.PublishEvent(context.Background(), e); err != nil {
			w.t.Error(err)
		}
	}
}

// beat broadcasts the heartbeats, after what was unsent.
func (w *world) beat() {
	w.send()
	for _, s := range w.shards {
		h := &fanoutv1.Heartbeat{Shard: s.id, Lane: s.lane}
		for _, name := range slices.Sorted(maps.Keys(s.sequence)) {
			h.Maps = append(h.Maps, &fanoutv1.MapSequence{Map: name, Sequence: s.sequence[name]})
		}
		if err := w.bus.PublishHeartbeat(context.Background(), h); err != nil {
			w.t.Error(err)
		}
	}
}

// rows are the visible rows of a map in some shards.
func (w *world) rows(mapName string, shards []uint32) map[string][]byte {
	rows := make(map[string][]byte)
	for _, id := range shards {
		s := w.shards[id]
		for key, tags := range s.or[mapName] {
			var visible []*typesv1.Change
			for _, change := range tags {
				if len(change.GetRecord().GetValue()) > 0 {
					visible = append(visible, change)
				}
			}
			slices.SortFunc(visible, func(a, b *typesv1.Change) int {
				x, y := a.GetArrival(), b.GetArrival()
				return int(4*x.GetMillis()+x.GetCounter()) - int(4*y.GetMillis()+y.GetCounter())
			})
			if len(visible) > 0 {
				row := msgval.AppendArrayHeader(nil, len(visible))
				for _, change := range visible {
					row = append(row, change.GetRecord().GetValue()...)
				}
				rows[key] = row
			}
		}
		for key, change := range s.lww[mapName] {
			if value := change.GetRecord().GetValue(); len(value) > 0 {
				rows[key] = value
			}
		}
	}
	return rows
}

// evaluate is what a query makes of rows, from the definition; it looks at no more
// than most.
func evaluate(t testing.TB, mapName string, q *query.Query, rows map[string][]byte, most int) map[string][]byte {
	t.Helper()
	var matching []query.Row
	for key, value := range rows {
		if q.Match(key, value) {
			matching = append(matching, query.Row{Key: key, Value: value})
		}
	}
	position, _ := q.ResolveCursor(mapName)
	if q.Grouped() {
		groups := query.NewGroups(q)
		for _, row := range matching {
			if err := groups.Add(row.Key, row.Value); err != nil {
				t.Fatal(err)
			}
		}
		matching, _ = groups.Rows(position)
	} else {
		slices.SortFunc(matching, q.Compare)
		matching = slices.DeleteFunc(matching, func(r query.Row) bool { return !q.After(position, r) })
		if q.Limit() > 0 {
			most = min(most, q.Offset()+q.Limit())
		}
		most = min(most, len(matching))
		matching = matching[min(q.Offset(), most):most]
	}
	result := make(map[string][]byte)
	for _, row := range matching {
		if !q.Grouped() {
			row.Value = q.Project(nil, row.Value)
		}
		result[row.Key] = row.Value
	}
	return result
}

var errAway = connect.NewError(connect.CodeUnavailable, "the shard is away")

// serve calls read with the node's state, if it serves the shards.
func (n *worldNode) serve(shards []uint32, read func(w *world)) error {
	w := n.world
	w.before()
	err := func() error {
		w.mu.Lock()
		defer w.mu.Unlock()
		if err := w.refuse(); err != nil {
			return err
		}
		for _, id := range shards {
			if w.shards[id].node != n.id {
				return errAway
			}
		}
		read(w)
		return nil
	}()
	w.after()
	return err
}

func (n *worldNode) Describe(context.Context, *partitionv1.DescribeRequest) (*partitionv1.DescribeResponse, error) {
	resp := &partitionv1.DescribeResponse{}
	return resp, n.serve(nil, func(w *world) {
		resp.ShardCount = uint32(len(w.shards))
		for _, s := range w.shards {
			if s.node == n.id {
				resp.Shards = append(resp.Shards, s.id)
			}
		}
	})
}

func (n *worldNode) Since(_ context.Context, req *partitionv1.SinceRequest) (*partitionv1.SinceResponse, error) {
	resp := &partitionv1.SinceResponse{}
	return resp, n.serve(req.GetShards(), func(w *world) {
		for _, id := range req.GetShards() {
			for _, tags := range w.shards[id].or[req.GetMap()] {
				for _, change := range tags {
					resp.Changes = []*typesv1.Change{change}
				}
			}
		}
	})
}

func (n *worldNode) Get(_ context.Context, req *partitionv1.GetRequest) (*partitionv1.GetResponse, error) {
	var shards []uint32
	for _, key := range req.GetKeys() {
		shards = append(shards, n.world.shardOf(string(key)).id)
	}
	resp := &partitionv1.GetResponse{}
	return resp, n.serve(shards, func(w *world) {
		w.gets++
		for i, key := range req.GetKeys() {
			s := w.shards[shards[i]]
			if req.GetKind() == typesv1.Kind_KIND_OR {
				resp.Changes = slices.AppendSeq(resp.GetChanges(), maps.Values(s.or[req.GetMap()][string(key)]))
			} else if change := s.lww[req.GetMap()][string(key)]; change != nil {
				resp.Changes = append(resp.Changes, change)
			}
		}
	})
}

func (n *worldNode) Query(ctx context.Context, req *partitionv1.QueryRequest) (*partitionv1.QueryResponse, error) {
	q, err := query.Parse(req.GetQuery(), nil)
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err.Error())
	}
	if n.world.endless(q) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	resp := &partitionv1.QueryResponse{}
	return resp, n.serve(req.GetShards(), func(w *world) {
		if len(req.GetQuery()) == 0 {
			w.scans++
		} else {
			w.reads++
		}
		top := query.NewTop(q, req.GetAfter(), int(req.GetLimit()), int(req.GetMaxBytes()))
		for key, value := range w.rows(req.GetMap(), req.GetShards()) {
			if q.Match(key, value) {
				top.Add(key, value)
			}
		}
		rows, more := top.Rows()
		for _, row := range rows {
			resp.Rows = append(resp.Rows, &partitionv1.Row{Key: []byte(row.Key), Value: row.Value})
		}
		resp.More = more
		for _, id := range req.GetShards() {
			clock := w.shards[id].clock
			resp.Covered = append(resp.Covered, &partitionv1.ShardCovered{
				Shard: id, Covered: &typesv1.Arrival{Millis: clock / 4, Counter: clock % 4},
			})
		}
	})
}

// view is what a gateway makes of its messages.
type view struct {
	t testing.TB

	mu      sync.Mutex
	queries map[uint64]*viewed
	// received counts messages.
	received int
}

type viewed struct {
	rows map[string][]byte
	// result is the last QueryResult; nil before the first.
	result  *fanoutv1.QueryResult
	results int
	changes int
	// newest is, by key, the greatest number of a row.
	newest map[string]uint64
	ended  bool
}

func newView(t testing.TB) *view { return &view{t: t, queries: make(map[uint64]*viewed)} }

func (v *view) of(id uint64) *viewed {
	if v.queries[id] == nil {
		v.queries[id] = &viewed{newest: make(map[string]uint64)}
	}
	return v.queries[id]
}

func (v *view) id(of *viewed) uint64 {
	for id, q := range v.queries {
		if q == of {
			return id
		}
	}
	return 0
}

func (v *view) take(message *fanoutv1.SubscribeResponse) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.received++
	if r := message.GetQueryResult(); r != nil {
		q := v.of(r.GetId())
		q.result, q.rows = r, make(map[string][]byte)
		q.results++
		for _, row := range r.GetRows() {
			q.rows[string(row.GetKey())] = row.GetValue()
			v.monotonic(q, row)
		}
	}
	if c := message.GetQueryChanges(); c != nil {
		q := v.of(c.GetId())
		if q.result == nil {
			v.t.Errorf("changes of query %d came before its result", c.GetId())
			q.rows = make(map[string][]byte)
		}
		if q.ended {
			v.t.Errorf("changes of query %d came after its end", c.GetId())
		}
		q.changes++
		for _, change := range c.GetChanges() {
			key := string(change.GetRow().GetKey())
			_, there := q.rows[key]
			switch change.GetType() {
			case fanoutv1.QueryChangeType_QUERY_CHANGE_TYPE_ENTER:
				if there {
					v.t.Errorf("query %d: %s entered twice", c.GetId(), key)
				}
				q.rows[key] = change.GetRow().GetValue()
				v.monotonic(q, change.GetRow())
			case fanoutv1.QueryChangeType_QUERY_CHANGE_TYPE_UPDATE:
				if !there {
					v.t.Errorf("query %d: %s was updated and is not there", c.GetId(), key)
				}
				q.rows[key] = change.GetRow().GetValue()
				v.monotonic(q, change.GetRow())
			default:
				if !there {
					v.t.Errorf("query %d: %s left and is not there", c.GetId(), key)
				}
				delete(q.rows, key)
			}
		}
	}
}

// monotonic checks that a row is not older than one seen before: the field n of a
// value is the number of the write.
func (v *view) monotonic(q *viewed, row *typesv1.Row) {
	n, ok := number(row.GetValue())
	if !ok {
		return
	}
	if key := string(row.GetKey()); n < q.newest[key] {
		v.t.Errorf("query %d: row %s went back from write %d to %d", v.id(q), key, q.newest[key], n)
	} else {
		q.newest[key] = n
	}
}

// number is the field n of a map.
func number(value []byte) (uint64, bool) {
	text, ok := msgval.AppendJSON(nil, value)
	if !ok || len(text) == 0 || text[0] != '{' {
		return 0, false
	}
	i := bytes.Index(text, []byte(`"n":`))
	if i < 0 {
		return 0, false
	}
	var n uint64
	if _, err := fmt.Sscanf(string(text[i+4:]), "%d", &n); err != nil {
		return 0, false
	}
	return n, true
}

// json makes a msgpack value.
func json(t testing.TB, text string) []byte {
	t.Helper()
	value, err := msgval.FromJSON([]byte(text))
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return value
}

func asText(rows map[string][]byte) string {
	var b bytes.Buffer
	for _, key := range slices.Sorted(maps.Keys(rows)) {
		text, _ := msgval.AppendJSON(nil, rows[key])
		fmt.Fprintf(&b, "%s=%s ", key, text)
	}
	return b.String()
}

func settle() { time.Sleep(time.Minute) }
