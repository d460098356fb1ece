package remote

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/topgun-sync/topgun/core/keyspace"
	gatewayv1 "github.com/topgun-sync/topgun/gen/go/topgun/gateway/v1"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	persistencev1 "github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

// Bounds of one request, below those of the services.
const (
	// sinceRecords and sinceBytes are a page of Since.
	sinceRecords = 5000
	sinceBytes   = 4 << 20
	// sessionPage is a page of ListSessions.
	sessionPage = 1000
)

// retryPause is between attempts of ops that a shard could not take.
const retryPause = 100 * time.Millisecond

// Ready asks a service's health: nothing when it is ready, else why not.
func (c *Cluster) Ready(ctx context.Context, at Endpoint) (reasons []string, err error) {
	limited, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	request, err := http.NewRequestWithContext(limited, http.MethodGet, strings.TrimSuffix(at.URL, "/")+"/health/ready", http.NoBody)
	if err != nil {
		return nil, c.explain(ctx, at, err)
	}
	response, err := c.http.Do(request)
	if err != nil {
		return nil, c.explain(ctx, at, err)
	}
	defer func() { _ = response.Body.Close() }()
	var health struct {
		Ready   bool     `json:"ready"`
		Reasons []string `json:"reasons"`
	}
	if err := json.NewDecoder(io.LimitReader(response.Body, 1<<20)).Decode(&health); err != nil {
		return nil, &Error{At: at, Code: connect.CodeUnimplemented, err: err, text: fmt.Sprintf(
			"its /health/ready answers with status %d and no health; is this the operator port?", response.StatusCode)}
	}
	for _, reason := range health.Reasons {
		// One port may serve several services; each reason begins with the name of its own.
		if own, ok := strings.CutPrefix(reason, at.Name+": "); ok {
			reasons = append(reasons, own)
		}
	}
	return reasons, nil
}

// Shards returns the number of shards, having made sure that each has an owner.
func (c *Cluster) Shards(ctx context.Context) (int, error) {
	if c.owners != nil {
		return len(c.owners), nil
	}
	var owners []int
	for i, p := range c.Partitions {
		d, err := Call(ctx, c, p.Endpoint, p.Describe, &partitionv1.DescribeRequest{})
		if err != nil {
			return 0, err
		}
		if owners == nil {
			owners = make([]int, min(d.GetShardCount(), keyspace.PartitionCount))
			for shard := range owners {
				owners[shard] = -1
			}
		}
		for _, shard := range d.GetShards() {
			if int(shard) < len(owners) {
				owners[shard] = i
			}
		}
	}
	for shard, owner := range owners {
		if owner < 0 {
			return 0, &Error{At: c.Partitions[0].Endpoint, Code: connect.CodeUnavailable, text: fmt.Sprintf(
				"shard %d is served by no node that was named; name every node with --partition, or see `topgunctl status`", shard)}
		}
	}
	if len(owners) == 0 {
		return 0, &Error{At: c.Partitions[0].Endpoint, Code: connect.CodeUnavailable, text: "it does not know how many shards there are yet; try again"}
	}
	c.owners = owners
	return len(owners), nil
}

// Maps lists the maps, summed over the nodes, by name and kind.
func (c *Cluster) Maps(ctx context.Context) ([]*partitionv1.MapInfo, error) {
	type id struct {
		name string
		kind typesv1.Kind
	}
	var all []*partitionv1.MapInfo
	byID := make(map[id]*partitionv1.MapInfo)
	for _, p := range c.Partitions {
		r, err := Call(ctx, c, p.Endpoint, p.ListMaps, &partitionv1.ListMapsRequest{})
		if err != nil {
			return nil, err
		}
		for _, m := range r.GetMaps() {
			at := id{m.GetName(), m.GetKind()}
			if sum := byID[at]; sum != nil {
				sum.Records += m.GetRecords()
				sum.Tombstones += m.GetTombstones()
				continue
			}
			byID[at] = m
			all = append(all, m)
		}
	}
	return all, nil
}

// Get returns all that keys of a map hold, tombstones included.
func (c *Cluster) Get(ctx context.Context, kind typesv1.Kind, name string, keys ...string) ([]*typesv1.Change, error) {
	shards, err := c.Shards(ctx)
	if err != nil {
		return nil, err
	}
	byOwner := make(map[int][][]byte)
	for _, key := range keys {
		owner := c.owners[keyspace.ShardOf(key, shards)]
		byOwner[owner] = append(byOwner[owner], []byte(key))
	}
	var found []*typesv1.Change
	for owner, keys := range byOwner {
		p := c.Partitions[owner]
		r, err := Call(ctx, c, p.Endpoint, p.Get, &partitionv1.GetRequest{Map: name, Kind: kind, Keys: keys})
		if err != nil {
			return nil, err
		}
		found = append(found, r.GetChanges()...)
	}
	return found, nil
}

// Since yields the records of a map, tombstones included, node by node in the order
// of arrival. A record that changes meanwhile may come twice, the later state last;
// none is left out. It ends with the first error.
func (c *Cluster) Since(ctx context.Context, kind typesv1.Kind, name string) iter.Seq2[*typesv1.Change, error] {
	return func(yield func(*typesv1.Change, error) bool) {
		for _, p := range c.Partitions {
			request := &partitionv1.SinceRequest{Map: name, Kind: kind, Limit: sinceRecords, MaxBytes: sinceBytes}
			for more := true; more; {
				page, err := Call(ctx, c, p.Endpoint, p.Since, request)
				if err != nil {
					yield(nil, err)
					return
				}
				for _, change := range page.GetChanges() {
					if !yield(change, nil) {
						return
					}
				}
				request.After, more = page.GetCovered(), page.GetMore()
			}
		}
	}
}

// Result is what became of one op.
type Result struct {
	*partitionv1.Receipt
	Level   partitionv1.Level
	Arrival *typesv1.Arrival
}

// Apply merges ops and returns what became of each, in order. At most 10,000 ops and
// 16 MiB. What a shard cannot take at the moment it is offered again until the
// timeout; the same op twice has no further effect. An error says so if it leaves open
// whether ops were applied.
func (c *Cluster) Apply(ctx context.Context, ops []*partitionv1.Op) ([]Result, error) {
	shards, err := c.Shards(ctx)
	if err != nil {
		return nil, err
	}
	results := make([]Result, len(ops))
	pending := make([][]int, shards) // by shard: indexes of ops without a result
	for i, op := range ops {
		shard := keyspace.ShardOf(string(op.GetKey()), shards)
		pending[shard] = append(pending[shard], i)
	}
	limited, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	unknown := false
	var before error
	for {
		var failed error
		for i, p := range c.Partitions {
			if err := c.applyAt(limited, i, p, ops, pending, results); err != nil {
				failed = err
				unknown = unknown || !errors.Is(err, errRefused)
			}
		}
		if failed == nil {
			return results, nil
		}
		e, ok := errors.AsType[*Error](failed)
		if ok && e.Code == connect.CodeDeadlineExceeded && before != nil {
			failed = before // the time was spent on this
		} else if ok && e.Code == connect.CodeUnavailable {
			before = failed
			select {
			case <-time.After(retryPause):
				continue
			case <-limited.Done():
			}
		}
		if unknown {
			failed = fmt.Errorf("whether it was written is not known: %w", failed)
		}
		return nil, failed
	}
}

// errRefused is in the error of a shard that said that it took nothing.
var errRefused = errors.New("refused")

// applyAt offers a node the pending ops of its shards, and notes what it took.
func (c *Cluster) applyAt(ctx context.Context, node int, p Partition, ops []*partitionv1.Op, pending [][]int, results []Result) error {
	request := &partitionv1.ApplyRequest{}
	for shard, indexes := range pending {
		if len(indexes) == 0 || c.owners[shard] != node {
			continue
		}
		group := &partitionv1.ShardOps{Shard: uint32(shard)}
		for _, i := range indexes {
			group.Ops = append(group.Ops, ops[i])
		}
		request.Shards = append(request.Shards, group)
	}
	if len(request.Shards) == 0 {
		return nil
	}
	response, err := p.Apply(ctx, request)
	if err != nil {
		return c.explain(ctx, p.Endpoint, err)
	}
	var refused error
	for i, receipt := range response.GetShards() {
		if i >= len(request.Shards) {
			break
		}
		shard := request.Shards[i].GetShard()
		if receipt.GetRefusal() != partitionv1.Refusal_REFUSAL_UNSPECIFIED || len(receipt.GetReceipts()) != len(pending[shard]) {
			refused = &Error{At: p.Endpoint, Code: connect.CodeUnavailable, err: errRefused, text: fmt.Sprintf(
				"shard %d takes no ops (%s); `topgunctl status` says more, and the same command may be repeated",
				shard, strings.TrimPrefix(receipt.GetRefusal().String(), "REFUSAL_"))}
			continue
		}
		for j, r := range receipt.GetReceipts() {
			results[pending[shard][j]] = Result{r, receipt.GetLevel(), receipt.GetArrival()}
		}
		pending[shard] = nil
	}
	return refused
}

// Load yields the stored records of partitions. It ends with the first error.
func (c *Cluster) Load(ctx context.Context, partitions []uint32) iter.Seq2[*typesv1.Change, error] {
	return func(yield func(*typesv1.Change, error) bool) {
		patient, p := c.patient(ctx)
		defer p.end()
		stream, err := c.Persistence.Load(patient, &persistencev1.LoadRequest{Partitions: partitions})
		if err != nil {
			yield(nil, c.explain(patient, c.AtPersistence, err))
			return
		}
		defer func() { _ = stream.Close() }()
		for {
			piece, err := stream.Receive()
			if errors.Is(err, io.EOF) {
				return
			}
			if err != nil {
				yield(nil, c.explain(patient, c.AtPersistence, err))
				return
			}
			for _, change := range piece.GetChanges() {
				if !yield(change, nil) {
					return
				}
			}
			p.heard()
		}
	}
}

// Journal yields the changes of a map from a sequence on, or from now on with 0,
// until ctx ends. opened is called once nothing more can be missed.
func (c *Cluster) Journal(ctx context.Context, name string, from uint64, opened func()) iter.Seq2[*persistencev1.JournalEntry, error] {
	return func(yield func(*persistencev1.JournalEntry, error) bool) {
		patient, p := c.patient(ctx)
		defer p.end()
		stream, err := c.Persistence.FollowJournal(patient, &persistencev1.FollowJournalRequest{
			FromSequence: from, Filter: &persistencev1.JournalFilter{Map: name},
		})
		if err != nil {
			yield(nil, c.explain(patient, c.AtPersistence, err))
			return
		}
		defer func() { _ = stream.Close() }()
		for first := true; ; first = false {
			message, err := stream.Receive()
			if err != nil {
				yield(nil, c.explain(patient, c.AtPersistence, err))
				return
			}
			if first {
				p.forever()
				opened()
			}
			for _, entry := range message.GetEntries() {
				if !yield(entry, nil) {
					return
				}
			}
		}
	}
}

// Sessions yields the gateway's sessions by id.
func (c *Cluster) Sessions(ctx context.Context) iter.Seq2[*gatewayv1.Session, error] {
	return func(yield func(*gatewayv1.Session, error) bool) {
		request := &gatewayv1.ListSessionsRequest{Limit: sessionPage}
		for {
			page, err := Call(ctx, c, c.AtGateway, c.Gateway.ListSessions, request)
			if err != nil {
				yield(nil, err)
				return
			}
			for _, session := range page.GetSessions() {
				if !yield(session, nil) {
					return
				}
				request.AfterId = session.GetId()
			}
			if len(page.GetSessions()) < sessionPage {
				return
			}
		}
	}
}
