package partition

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/topgun-sync/topgun/core/keyspace"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/pncounter"
	persistencev1 "github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
	"github.com/topgun-sync/topgun/services/internal/commitlog"
)

// maxHoles is how often a hole between store and log is taken for a trim that came
// in between, and everything loaded again.
const maxHoles = 5

var (
	// ErrLogReplaced means that the store was filled from another log than the one
	// there is (LOG-04). Config.AcceptLogLoss starts nevertheless.
	ErrLogReplaced = errors.New("the store belongs to another log: the log was lost or replaced")
	// ErrLogWentBack means that the store holds more of a lane than the log ever
	// held: the log lost commits, and acknowledged ops with them (LOG-04).
	ErrLogWentBack = errors.New("the log went back: the store is ahead of it")
	// ErrStoreBehind means that commits are neither in the store nor in the log any
	// more: the store was restored to an older state (PG-06).
	ErrStoreBehind = errors.New("the store lacks commits that the log no longer holds")
	// ErrUnreadable means that persistence or the log holds something that is no
	// record (LOG-07).
	ErrUnreadable = errors.New("a stored change cannot be read")

	// errHole means that a lane goes on further than it should right behind what is
	// stored.
	errHole = errors.New("the log has a hole behind what is stored")
)

// lanePosition is how far one lane is taken in.
type lanePosition struct {
	sequence, number uint64
}

// load builds the shards: what the store has, and what the log has above it. It
// ends at the lane's own claim, behind which nobody else can have written. A hole
// means that the log was trimmed after the store had been read; the store then has
// what is missing.
func (s *Service) load(ctx context.Context, a *active) ([]*shard, error) {
	for attempt := 1; ; attempt++ {
		shards, err := s.loadOnce(ctx, a)
		if !errors.Is(err, errHole) {
			return shards, err
		}
		if attempt == maxHoles {
			return nil, fmt.Errorf("%w (%w)", ErrStoreBehind, err)
		}
		s.deps.Logger.Warn("store and log do not meet; loading again", "error", err)
	}
}

func (s *Service) loadOnce(ctx context.Context, a *active) ([]*shard, error) {
	l := &loader{clock: a.clock, lane: a.lane.writer.Name()}
	for id := range s.deps.Log.Shards() {
		shard := newShard(id, a.clock, s.deps.Now, s.stats)
		shard.elapsed, shard.pruner.keep = s.deps.Elapsed, retentionOf(s.config.TombstoneRetention)
		l.shards = append(l.shards, shard)
	}
	watermarks, records, err := l.fromStore(ctx, s.deps)
	if err != nil {
		return nil, err
	}
	if err := s.checkHistory(watermarks, records); err != nil {
		return nil, err
	}
	from, err := l.begin(ctx, s.deps.Log, watermarks)
	if err != nil {
		return nil, err
	}
	replayed := 0
	for entry, err := range s.deps.Log.Read(ctx, from, false) {
		if err == nil {
			err = l.take(entry)
		}
		if err != nil {
			return nil, fmt.Errorf("replay the log: %w", err)
		}
		replayed++
	}
	for _, shard := range l.shards {
		shard.ready()
	}
	s.deps.Logger.Info("loaded", "records", records, "commits", replayed)
	return l.shards, nil
}

// checkHistory compares the log that the store was filled from with the log there
// is. A store without records has nothing to lose.
func (s *Service) checkHistory(watermarks []*persistencev1.Watermark, records int) error {
	others := false
	for _, w := range watermarks {
		if w.GetHistory() == s.deps.Log.History() {
			return nil
		}
		others = true
	}
	if !others || records == 0 {
		return nil
	}
	if !s.config.AcceptLogLoss {
		return ErrLogReplaced
	}
	s.deps.Logger.Warn("the store belongs to another log; what that log held and the store does not is lost")
	return nil
}

// loader fills shards.
type loader struct {
	shards []*shard
	clock  *arrivalClock
	lane   string // our own
	lanes  map[string]lanePosition
}

// fromStore takes in what persistence has.
func (l *loader) fromStore(ctx context.Context, deps Deps) (watermarks []*persistencev1.Watermark, records int, err error) {
	request := &persistencev1.LoadRequest{}
	for p := range uint32(keyspace.PartitionCount) {
		request.Partitions = append(request.Partitions, p)
	}
	stream, err := deps.Persistence.Load(ctx, request)
	if err != nil {
		return nil, 0, fmt.Errorf("read the store: %w", err)
	}
	defer func() { err = errors.Join(err, stream.Close()) }()
	for first := true; ; first = false {
		response, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			return watermarks, records, nil
		}
		if err != nil {
			return nil, 0, fmt.Errorf("read the store: %w", err)
		}
		if first {
			watermarks = response.GetWatermarks()
		}
		for _, c := range response.GetChanges() {
			if err := l.change(c); err != nil {
				return nil, 0, fmt.Errorf("read the store: %w", err)
			}
			records++
		}
	}
}

// begin notes how far each lane is stored, checks that the log holds that much
// (LOG-04), and returns the first sequence of the log that may be missing.
func (l *loader) begin(ctx context.Context, log *commitlog.Log, watermarks []*persistencev1.Watermark) (from uint64, err error) {
	ends, err := log.LaneEnds(ctx)
	if err != nil {
		return 0, err
	}
	l.lanes = make(map[string]lanePosition)
	for _, w := range watermarks {
		if w.GetHistory() != log.History() {
			continue
		}
		if ends[w.GetLane()] < w.GetSequence() {
			return 0, fmt.Errorf("%w: a lane is stored up to sequence %d and ends at %d", ErrLogWentBack, w.GetSequence(), ends[w.GetLane()])
		}
		l.lanes[w.GetLane()] = lanePosition{w.GetSequence(), w.GetNumber()}
	}
	from = math.MaxUint64
	for lane, end := range ends {
		if at := l.lanes[lane]; lane != l.lane && at.sequence < end {
			from = min(from, at.sequence+1)
		}
	}
	return from, nil
}

// take takes in one commit of the log, if it is not stored, and proves that none
// before it is missing.
func (l *loader) take(entry commitlog.Entry) error {
	if entry.Lane == l.lane {
		if entry.Commit.GetSeal() != nil {
			return ErrFenced
		}
		return nil // our claim
	}
	at := l.lanes[entry.Lane]
	if entry.Sequence <= at.sequence {
		return nil
	}
	if number := entry.Commit.GetNumber(); number != at.number+1 {
		return fmt.Errorf("%w: commit %d of a lane follows commit %d", errHole, number, at.number)
	}
	l.lanes[entry.Lane] = lanePosition{entry.Sequence, entry.Commit.GetNumber()}
	for _, s := range entry.Commit.GetChanges().GetShards() {
		for _, c := range s.GetChanges() {
			if err := l.change(c); err != nil {
				return fmt.Errorf("sequence %d: %w", entry.Sequence, err)
			}
		}
	}
	return nil
}

func (l *loader) change(c *typesv1.Change) error {
	if c.GetKind() == typesv1.Kind_KIND_LOCK {
		return l.lock(c)
	}
	if err := checkChange(c); err != nil {
		return err
	}
	hash := merkle.HashBytes(c.GetKey())
	to := changeFromProto(c)
	l.clock.raise(to.arrival)
	l.shards[shardOf(hash, len(l.shards))].load(to, hash)
	return nil
}

// checkChange reports a change that no shard can have logged.
func checkChange(c *typesv1.Change) error {
	if c.GetMap() == "" || len(c.GetKey()) == 0 || c.GetArrival() == nil || !c.GetPruned() && c.GetRecord().GetTimestamp() == nil {
		return fmt.Errorf("%w: map, key, timestamp or arrival is missing", ErrUnreadable)
	}
	switch kindOf(c.GetKind()) {
	case lww:
		return nil
	case or:
		if c.GetTag() != "" {
			return nil
		}
	case counter:
		if _, ok := pncounter.ParseSides(c.GetRecord().GetValue()); ok && c.GetTag() != "" {
			return nil
		}
	}
	return fmt.Errorf("%w: it is of an unknown kind, or its tag or sums are missing", ErrUnreadable)
}

// shardOf is the shard of a key, given its hash.
func shardOf(hash uint32, shards int) int {
	return keyspace.Shard(int(hash%keyspace.PartitionCount), shards)
}
