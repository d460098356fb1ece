package gateway

import (
	"context"
	"slices"
	"strings"

	"github.com/topgun-sync/topgun/core/msgval"
	"github.com/topgun-sync/topgun/core/wire"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

// A counter is, for the owners and on the fanout stream, a map of its own name behind a
// "+", with one key. A session is told of a counter from its first COUNTER_REQUEST or
// COUNTER_SYNC on (PROTOCOL 14.2). What it is told may be part of the state: a client
// takes the maximum of each node and side, so parts add up.

// maxCounters bounds the counters of one session.
const maxCounters = 256

// counterPrefix begins the map of a counter, and no name of a map that clients use.
const counterPrefix = "+"

func counterMap(counter string) string { return counterPrefix + counter }

func counterOf(mapName string) (counter string, ok bool) {
	return strings.CutPrefix(mapName, counterPrefix)
}

var tooManyCounters = &wire.Error{
	Name: "TOO_MANY_SUBS", Code: 429, Text: "this connection follows as many counters as it may; use another one",
}

// follow notes that the session is to be told of a counter, or says why not.
func (s *session) follow(counter string) *wire.Error {
	if err := wire.CheckResourceName(counter); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, follows := s.counters[counter]; follows {
		return nil
	}
	if len(s.counters) >= maxCounters {
		return tooManyCounters
	}
	if s.counters == nil {
		s.counters = make(map[string]struct{})
	}
	s.counters[strings.Clone(counter)] = struct{}{}
	return nil
}

// counterRequested takes a COUNTER_REQUEST.
func (s *session) counterRequested(m *wire.CounterRequest) error {
	if err := s.follow(m.Name); err != nil {
		return s.decline(err)
	}
	return s.addJob(job{kind: jobCall, do: func(ctx context.Context) error {
		state, err := s.readCounter(ctx, m.Name)
		if err == nil {
			s.sendSync(&wire.CounterResponse{Name: m.Name, State: state})
		}
		return err
	}})
}

// counterSynced takes a COUNTER_SYNC: a client's whole state. What is more than the
// owner has becomes ops, usually one, and comes to the other sessions as an event; this
// one gets the merged state, also when it told nothing new, for it may have missed updates
// before it was told of the counter.
func (s *session) counterSynced(m *wire.CounterSync, frame *inbound) error {
	if err := s.follow(m.Name); err != nil {
		return s.decline(err)
	}
	return s.addJob(job{kind: jobCall, frame: frame.keep(), do: func(ctx context.Context) error {
		state, err := s.readCounter(ctx, m.Name)
		if err != nil {
			return err
		}
		merged, news := mergeCounter(state, m.State)
		if len(news) > 0 {
			if refused := s.count(m.Name, news); refused != nil {
				// Nothing of it is repeated by itself: the client sends its state again
				// with its next change.
				return s.decline(refused)
			}
		}
		s.sendSync(&wire.CounterUpdate{Name: m.Name, State: merged})
		return nil
	}})
}

// readCounter returns the state of a counter that the session is told of from then on.
func (s *session) readCounter(ctx context.Context, counter string) (wire.CounterState, error) {
	if err := s.join(counterMap(counter), setOf(kindCounter)); err != nil {
		return wire.CounterState{}, err
	}
	records, err := s.k.router.Get(ctx, kindCounter, counterMap(counter), []string{counter})
	if err != nil {
		return wire.CounterState{}, err
	}
	state := wire.CounterState{Nodes: make([]wire.CounterNode, 0, len(records))}
	for i := range records {
		if node, ok := counterNode(records[i].tag, records[i].Record.Value); ok {
			state.Nodes = append(state.Nodes, node)
		}
	}
	return state, nil
}

// sendCounter tells the session the state of a counter.
func (s *session) sendCounter(ctx context.Context, counter string) error {
	state, err := s.readCounter(ctx, counter)
	if err == nil {
		s.sendSync(&wire.CounterUpdate{Name: counter, State: state})
	}
	return err
}

// mergeCounter returns the merged state, and the nodes of remote that change local.
func mergeCounter(local, remote wire.CounterState) (merged wire.CounterState, news []wire.CounterNode) {
	at := make(map[string]int, len(local.Nodes))
	merged.Nodes = append(merged.Nodes, local.Nodes...)
	for i := range merged.Nodes {
		at[merged.Nodes[i].NodeID] = i
	}
	for _, node := range remote.Nodes {
		i, known := at[node.NodeID]
		if !known {
			i = len(merged.Nodes)
			at[node.NodeID] = i
			merged.Nodes = append(merged.Nodes, wire.CounterNode{NodeID: node.NodeID})
		}
		have := &merged.Nodes[i]
		if node.Positive <= have.Positive && node.Negative <= have.Negative {
			continue
		}
		have.Positive, have.Negative = max(have.Positive, node.Positive), max(have.Negative, node.Negative)
		news = append(news, *have)
	}
	return merged, news
}

// count has the owner of a counter merge what nodes added and took, and says why it did
// not.
func (s *session) count(counter string, nodes []wire.CounterNode) *wire.Error {
	ctx, cancel := context.WithTimeout(s.k.base, s.k.cfg.ApplyTimeout)
	defer cancel()
	for _, result := range s.k.router.Count(ctx, s.origin, counter, nodes) {
		if result.status == opUnavailable || result.status == opRejected {
			name, text, _ := strings.Cut(result.reason, ": ")
			return &wire.Error{Name: name, Code: result.code, Text: text}
		}
	}
	return nil
}

// Count has the owner of a counter merge what nodes added and took; result i belongs to
// node i. See Apply for the rest.
func (r *router) Count(ctx context.Context, origin, counter string, nodes []wire.CounterNode) []opResult {
	results := make([]opResult, len(nodes))
	protos := make([]*partitionv1.Op, len(nodes))
	pending := make([]int, len(nodes))
	stamp := &typesv1.Timestamp{NodeId: serverNode} // replaced by the owner
	for i := range nodes {
		results[i] = opResult{code: 503, reason: reasonUnavailable}
		pending[i] = i
		protos[i] = &partitionv1.Op{
			Map: counterMap(counter), Key: []byte(counter), Kind: typesv1.Kind_KIND_COUNTER, Tag: nodes[i].NodeID,
			Record: &typesv1.Record{Value: counterValue(nodes[i]), Timestamp: stamp},
		}
	}
	for page := range slices.Chunk(pending, maxRunningOps) {
		r.carry(ctx, origin, "", protos, page, results)
	}
	return results
}

// counterValue is the value of a node's record: what it added, and what it took.
func counterValue(n wire.CounterNode) []byte {
	value := msgval.AppendArrayHeader(make([]byte, 0, 19), 2)
	return msgval.AppendUint(msgval.AppendUint(value, n.Positive), n.Negative)
}

func counterNode(node string, value []byte) (n wire.CounterNode, ok bool) {
	head, ok := msgval.ReadHead(value)
	if !ok || head.Kind != msgval.ArrayKind || head.Values() != 2 {
		return n, false
	}
	n.NodeID = node
	rest := value[head.Size:]
	for _, side := range []*uint64{&n.Positive, &n.Negative} {
		head, ok := msgval.ReadHead(rest)
		if !ok || head.Kind != msgval.UintKind {
			return n, false
		}
		*side = head.Num
		rest = rest[head.Size:]
	}
	return n, true
}

// counterUpdate is the update that changes of a counter's map make.
func counterUpdate(mapName string, changes []change) *wire.CounterUpdate {
	counter, _ := counterOf(mapName)
	update := &wire.CounterUpdate{Name: counter}
	for i := range changes {
		if node, ok := counterNode(changes[i].tag, changes[i].record.Value); ok {
			update.State.Nodes = append(update.State.Nodes, node)
		}
	}
	return update
}
