package gateway

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/ormap"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

// What fakePartition does with other kinds than LWW.

func fakeMap(kind typesv1.Kind, name string) string {
	if kind == typesv1.Kind_KIND_OR {
		return "or:" + name
	}
	return name
}

func fakeID(key []byte, tag string) string {
	if tag == "" {
		return string(key)
	}
	return string(key) + "\x00" + tag
}

// add stores a tag of an OR-map as another writer would, or removes it with a nil value,
// and publishes the change.
func (p *fakePartition) add(mapName, key, tag string, value []byte, ts hlc.Timestamp) {
	p.applyAs("", &partitionv1.Op{
		Map: mapName, Key: []byte(key), Tag: tag, Kind: typesv1.Kind_KIND_OR,
		Record: &typesv1.Record{Value: value, Timestamp: &typesv1.Timestamp{Millis: ts.Millis, Counter: ts.Counter, NodeId: ts.NodeID}},
	})
}

func (p *fakePartition) applyAs(origin string, op *partitionv1.Op) {
	p.mu.Lock()
	_, change := p.merge(0, op, origin)
	event := p.event(change)
	p.mu.Unlock()
	if event != nil && p.fanout != nil {
		p.fanout.publish(event)
	}
}

// tag returns what a tag holds, or nil.
func (p *fakePartition) tag(mapName, key, tag string) *typesv1.Record {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.maps[fakeMap(typesv1.Kind_KIND_OR, mapName)][fakeID([]byte(key), tag)]; c != nil {
		return c.GetRecord()
	}
	return nil
}

// forget prunes an identity.
func (p *fakePartition) forget(kind typesv1.Kind, mapName, key, tag string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.maps[fakeMap(kind, mapName)], fakeID([]byte(key), tag))
}

// fence rejects what is older than the retention on something that holds nothing.
func (p *fakePartition) fence(old *typesv1.Change, op *partitionv1.Op) string {
	if p.retention == 0 || old != nil || op.GetKind() == typesv1.Kind_KIND_COUNTER ||
		op.GetKind() == typesv1.Kind_KIND_OR && len(op.GetRecord().GetValue()) == 0 {
		return ""
	}
	if op.GetRecord().GetTimestamp().GetMillis()+p.retention < uint64(p.now().UnixMilli()) {
		return "TOO_OLD: deletions of that time are forgotten"
	}
	return ""
}

// fakeTagged decides about a tag that is known, or a removal; nil means that the record is
// stored.
func fakeTagged(old *typesv1.Change, record *typesv1.Record) *partitionv1.Receipt {
	if old == nil {
		return nil
	}
	local := old.GetRecord()
	gone, removes := len(local.GetValue()) == 0, len(record.GetValue()) == 0
	switch {
	case gone && removes:
		return &partitionv1.Receipt{Outcome: partitionv1.Outcome_OUTCOME_DUPLICATE}
	case gone:
		return &partitionv1.Receipt{Outcome: partitionv1.Outcome_OUTCOME_SUPERSEDED, Winner: local}
	case removes:
		return nil
	}
	switch order := fakeRecord(record).Timestamp.Compare(fakeRecord(local).Timestamp); {
	case order == 0:
		return &partitionv1.Receipt{Outcome: partitionv1.Outcome_OUTCOME_DUPLICATE}
	case order < 0:
		return &partitionv1.Receipt{Outcome: partitionv1.Outcome_OUTCOME_SUPERSEDED, Winner: local}
	}
	return nil
}

// fakeCounted merges what a node counted.
func fakeCounted(old *typesv1.Change, op *partitionv1.Op) (*typesv1.Record, *partitionv1.Receipt) {
	have, _ := counterNode(op.GetTag(), old.GetRecord().GetValue())
	news, ok := counterNode(op.GetTag(), op.GetRecord().GetValue())
	switch {
	case !ok:
		return nil, &partitionv1.Receipt{Outcome: partitionv1.Outcome_OUTCOME_REJECTED, Reason: "BAD_COUNTER: want two sums"}
	case news.Positive <= have.Positive && news.Negative <= have.Negative:
		return nil, &partitionv1.Receipt{Outcome: partitionv1.Outcome_OUTCOME_DUPLICATE}
	}
	have.Positive, have.Negative = max(have.Positive, news.Positive), max(have.Negative, news.Negative)
	return &typesv1.Record{Value: counterValue(have), Timestamp: &typesv1.Timestamp{Millis: 1, NodeId: "topgun-0"}}, nil
}

// fakeORLeaves adds up the items of an OR-map (PROTOCOL 7.5).
func fakeORLeaves(changes []*typesv1.Change, combine merkle.Combine) merkle.Leaves {
	byKey := map[string][]ormap.Record{}
	for _, c := range changes {
		if r := fakeRecord(c.GetRecord()); !r.Deleted() {
			byKey[string(c.GetKey())] = append(byKey[string(c.GetKey())], ormap.Record{Tag: c.GetTag(), Record: r})
		}
	}
	var leaves merkle.Leaves
	for key, records := range byKey {
		slices.SortFunc(records, func(a, b ormap.Record) int { return ormap.CompareTags(a.Tag, b.Tag) })
		leaves.Add(merkle.Leaf(merkle.Hash(key)), ormap.ItemHash(key, slices.Values(records)), combine)
	}
	return leaves
}

func (p *fakePartition) Get(ctx context.Context, req *partitionv1.GetRequest) (*partitionv1.GetResponse, error) {
	if err := p.enter(ctx, "Get"); err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	res := &partitionv1.GetResponse{}
	for _, c := range p.selected(req.GetKind(), req.GetMap(), nil) {
		if slices.ContainsFunc(req.GetKeys(), func(key []byte) bool { return string(key) == string(c.GetKey()) }) {
			res.Changes = append(res.Changes, c)
		}
	}
	return res, nil
}

// fakeLocks grants locks first come, first served. fakePartition.mu guards it.
type fakeLocks struct {
	holder  map[string]string // session, by lock
	token   map[string]uint64
	changed chan struct{}
	kept    []string // sessions of the last KeepLocks
	waits   []uint64 // of the requests
	// impatient ends every wait at once.
	impatient bool
}

func (p *fakePartition) AcquireLock(ctx context.Context, req *partitionv1.AcquireLockRequest) (*partitionv1.AcquireLockResponse, error) {
	if err := p.enter(ctx, "AcquireLock"); err != nil {
		return nil, err
	}
	if p.after != nil {
		defer p.after("AcquireLock")
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	l := &p.locks
	wait := time.Duration(req.GetWaitMillis()) * time.Millisecond
	if l.impatient {
		wait = 0
	}
	over := time.After(wait)
	if l.holder == nil {
		l.holder, l.token, l.changed = map[string]string{}, map[string]uint64{}, make(chan struct{})
	}
	l.waits = append(l.waits, req.GetWaitMillis())
	for l.holder[req.GetName()] != "" && l.holder[req.GetName()] != req.GetSession() {
		changed := l.changed
		p.mu.Unlock()
		select {
		case <-changed:
		case <-over:
			p.mu.Lock()
			return &partitionv1.AcquireLockResponse{}, nil
		case <-ctx.Done():
			p.mu.Lock()
			return nil, ctx.Err()
		}
		p.mu.Lock()
	}
	if l.holder[req.GetName()] == "" {
		l.token[req.GetName()]++
	}
	l.holder[req.GetName()] = req.GetSession()
	return &partitionv1.AcquireLockResponse{Granted: true, FencingToken: l.token[req.GetName()]}, nil
}

func (p *fakePartition) ReleaseLock(ctx context.Context, req *partitionv1.ReleaseLockRequest) (*partitionv1.ReleaseLockResponse, error) {
	if err := p.enter(ctx, "ReleaseLock"); err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	l := &p.locks
	if l.holder[req.GetName()] == "" || l.token[req.GetName()] != req.GetFencingToken() {
		return &partitionv1.ReleaseLockResponse{}, nil
	}
	delete(l.holder, req.GetName())
	close(l.changed)
	l.changed = make(chan struct{})
	return &partitionv1.ReleaseLockResponse{Released: true}, nil
}

func (p *fakePartition) KeepLocks(ctx context.Context, req *partitionv1.KeepLocksRequest) (*partitionv1.KeepLocksResponse, error) {
	if err := p.enter(ctx, "KeepLocks"); err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.locks.kept = req.GetSessions()
	return &partitionv1.KeepLocksResponse{}, nil
}

func (p *fakePartition) holder(lock string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return cmp.Or(p.locks.holder[lock], "")
}
