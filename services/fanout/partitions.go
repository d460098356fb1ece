package fanout

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/topgun-sync/topgun/core/msgval"
	"github.com/topgun-sync/topgun/core/query"

	"github.com/topgun-sync/topgun/gen/go/topgun/partition/v1/partitionv1connect"

	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

// partitions asks the nodes that own the maps. Its methods may be called
// concurrently.
type partitions struct {
	clients []partitionv1connect.PartitionServiceClient
	// slots bounds the calls that carry rows.
	slots chan struct{}
	// everything is the query that matches all; its order is that of the keys.
	everything *query.Query

	mu sync.Mutex
	// known is who served what when it was asked last; nil to ask again.
	known *topology
}

// topology is who serves which shard. It does not change.
type topology struct {
	nodes []node
	// owner is the node of each shard.
	owner []int
}

type node struct {
	client partitionv1connect.PartitionServiceClient
	shards []uint32
}

const (
	// describeTimeout bounds the wait for a node that may be dead.
	describeTimeout = 2 * time.Second
	// callTimeout bounds any other call.
	callTimeout = 15 * time.Second
	// maxShards bounds what Describe is believed.
	maxShards = 1 << 16
	// getKeys is how many keys one call names.
	getKeys = 1000
)

var errIncomplete = errors.New("not every shard is served by one node")

func newPartitions(clients []partitionv1connect.PartitionServiceClient, slots int) (*partitions, error) {
	everything, err := query.Parse(nil, nil)
	if err != nil {
		return nil, fmt.Errorf("parse the empty query: %w", err)
	}
	return &partitions{clients: clients, slots: make(chan struct{}, slots), everything: everything}, nil
}

// none says that there is nobody to ask.
func (p *partitions) none() bool { return len(p.clients) == 0 }

// ask returns who serves the shards: each exactly one node, or an error.
func (p *partitions) ask(ctx context.Context) (*topology, error) {
	p.mu.Lock()
	known := p.known
	p.mu.Unlock()
	if known != nil {
		return known, nil
	}
	answers := make([]*partitionv1.DescribeResponse, len(p.clients))
	errs := make([]error, len(p.clients))
	var wg sync.WaitGroup
	for n, client := range p.clients {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, describeTimeout)
			defer cancel()
			answers[n], errs[n] = client.Describe(ctx, &partitionv1.DescribeRequest{})
		})
	}
	wg.Wait()
	t := &topology{}
	for n, answer := range answers {
		if errs[n] != nil {
			continue // another node may serve its shards
		}
		count := int(answer.GetShardCount())
		if count < 1 || count > maxShards || (len(t.owner) > 0 && count != len(t.owner)) {
			return nil, fmt.Errorf("describe the partitions: %w", errIncomplete)
		}
		if len(t.owner) == 0 {
			t.owner = slices.Repeat([]int{-1}, count)
		}
		for _, shard := range answer.GetShards() {
			if int(shard) >= count || t.owner[shard] >= 0 {
				return nil, fmt.Errorf("describe the partitions: %w", errIncomplete)
			}
			t.owner[shard] = len(t.nodes)
		}
		if len(answer.GetShards()) > 0 {
			t.nodes = append(t.nodes, node{p.clients[n], answer.GetShards()})
		}
	}
	if len(t.owner) == 0 || slices.Contains(t.owner, -1) {
		return nil, fmt.Errorf("describe the partitions: %w", errors.Join(errIncomplete, errors.Join(errs...)))
	}
	p.mu.Lock()
	p.known = t
	p.mu.Unlock()
	return t, nil
}

// mistrust forgets who serves what, after something did not work.
func (p *partitions) mistrust() {
	p.mu.Lock()
	p.known = nil
	p.mu.Unlock()
}

// query asks one node.
func (p *partitions) query(ctx context.Context, n node, req *partitionv1.QueryRequest) (*partitionv1.QueryResponse, error) {
	select {
	case p.slots <- struct{}{}:
		defer func() { <-p.slots }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	req.Shards = n.shards
	return n.client.Query(ctx, req)
}

// tooSlow says whether a call of query ended with err because of its query: its time
// was over, and the node answers otherwise.
func (p *partitions) tooSlow(ctx context.Context, n node, err error) bool {
	if ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) && connect.CodeOf(err) != connect.CodeDeadlineExceeded {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, describeTimeout)
	defer cancel()
	_, err = n.client.Describe(ctx, &partitionv1.DescribeRequest{})
	return err == nil
}

// hasOR says whether the OR-map of a name has or had records.
func (p *partitions) hasOR(ctx context.Context, t *topology, mapName string) (bool, error) {
	for _, n := range t.nodes {
		ctx, cancel := context.WithTimeout(ctx, callTimeout)
		resp, err := n.client.Since(ctx, &partitionv1.SinceRequest{Map: mapName, Kind: typesv1.Kind_KIND_OR, Shards: n.shards, Limit: 1})
		cancel()
		if err != nil {
			return false, fmt.Errorf("look for an OR-map: %w", err)
		}
		if len(resp.GetChanges()) > 0 {
			return true, nil
		}
	}
	return false, nil
}

// get reads the rows of keys, given by shard. The OR values are read first: so an
// LWW value is the row whatever became of them, and a row of OR values is not older
// than the newest of what it was made of. What changes meanwhile has an event to
// come.
func (p *partitions) get(ctx context.Context, mapName string, keys map[uint32][]string) (map[string]keyState, error) {
	t, err := p.ask(ctx)
	if err != nil {
		return nil, err
	}
	byNode := make([][][]byte, len(t.nodes))
	states := make(map[string]keyState)
	for shard, names := range keys {
		if int(shard) >= len(t.owner) {
			return nil, errIncomplete
		}
		for _, key := range names {
			byNode[t.owner[shard]] = append(byNode[t.owner[shard]], []byte(key))
			states[key] = keyState{shard: shard}
		}
	}
	for n, names := range byNode {
		for chunk := range slices.Chunk(names, getKeys) {
			if err := p.getFrom(ctx, t.nodes[n], mapName, chunk, states); err != nil {
				p.mistrust()
				return nil, fmt.Errorf("get keys: %w", err)
			}
		}
	}
	return states, nil
}

func (p *partitions) getFrom(ctx context.Context, n node, mapName string, keys [][]byte, states map[string]keyState) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	or, err := n.client.Get(ctx, &partitionv1.GetRequest{Map: mapName, Kind: typesv1.Kind_KIND_OR, Keys: keys})
	if err != nil {
		return err
	}
	lww, err := n.client.Get(ctx, &partitionv1.GetRequest{Map: mapName, Keys: keys})
	if err != nil {
		return err
	}
	values := make(map[string][]*typesv1.Change)
	for _, change := range or.GetChanges() {
		key := string(change.GetKey())
		if state, ok := states[key]; ok {
			state.or = later(state.or, arrivalOf(change.GetArrival()))
			states[key] = state
			if len(change.GetRecord().GetValue()) > 0 {
				values[key] = append(values[key], change)
			}
		}
	}
	for key, changes := range values {
		state := states[key]
		state.value = arrayOf(changes)
		states[key] = state
	}
	for _, change := range lww.GetChanges() {
		if state, ok := states[string(change.GetKey())]; ok {
			state.lww = arrivalOf(change.GetArrival())
			if value := change.GetRecord().GetValue(); len(value) > 0 {
				state.value, state.lwwVisible = value, true
			}
			states[string(change.GetKey())] = state
		}
	}
	return nil
}

// arrayOf is the row of a key of an OR-map: its values in the order of arrival.
func arrayOf(changes []*typesv1.Change) []byte {
	slices.SortFunc(changes, func(a, b *typesv1.Change) int {
		return arrivalOf(a.GetArrival()).compare(arrivalOf(b.GetArrival()))
	})
	row := msgval.AppendArrayHeader(nil, len(changes))
	for _, change := range changes {
		row = append(row, change.GetRecord().GetValue()...)
	}
	return row
}
