package commitlog

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"

	"github.com/nats-io/nats.go/jetstream"

	logv1 "github.com/topgun-sync/topgun/gen/go/topgun/log/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

// ownersBucket is the name of the ownership bucket, one per NATS account like the
// subjects of the log.
const ownersBucket = "TOPGUN_OWNERS"

// owner is the value of one shard's key. Its revision is the epoch.
type owner struct {
	// Node is the process that owns the shard, Lane what it writes.
	Node string `json:"node"`
	Lane string `json:"lane"`
	// CeilingMillis and CeilingCounter are the clock ceiling that the owner found:
	// an owner that died before its first commit leaves an empty lane, which has
	// none.
	CeilingMillis  uint64 `json:"ceiling_millis"`
	CeilingCounter uint64 `json:"ceiling_counter"`
	// History is the log that Lane is in.
	History string `json:"history"`
}

// openOwners opens the bucket. It is an ordinary key-value bucket but for direct
// reads, which are off: a follower may be behind (OWN-05).
func openOwners(ctx context.Context, js jetstream.JetStream, config Config) (jetstream.KeyValue, error) {
	log := streamConfig(config)
	stream, err := openStream(ctx, js, jetstream.StreamConfig{
		Name:              "KV_" + ownersBucket,
		Description:       "TopGun shard owners",
		Subjects:          []string{"$KV." + ownersBucket + ".>"},
		MaxMsgsPerSubject: 1,
		Discard:           jetstream.DiscardNew,
		DenyDelete:        true,
		AllowRollup:       true,
		Storage:           log.Storage,
		Replicas:          log.Replicas,
	})
	if err != nil {
		return nil, err
	}
	if stream.CachedInfo().Config.AllowDirect {
		return nil, fmt.Errorf("%w: the bucket %s allows direct reads, which followers answer", ErrWeak, ownersBucket)
	}
	return js.KeyValue(ctx, ownersBucket)
}

// Claimed is what a claim found out.
type Claimed struct {
	// Shards are the shards with the epochs under which they were claimed, for the
	// Claim commit that the caller appends next.
	Shards []*logv1.ClaimedShard
	// Ceiling is above every arrival that earlier owners gave out or answered with;
	// nil when there were none. The caller's arrival clock starts above it.
	Ceiling *typesv1.Arrival
}

// Claim makes a lane the owner of shards: it seals the lane that each belonged to
// and then puts the new owner in its place by compare-and-set. When it returns no
// earlier owner can append. The lane becomes the shard's owner for readers of the
// log only with the Claim commit, which the caller appends. On an error some shards
// may have been taken; claiming again is right.
func (l *Log) Claim(ctx context.Context, node, lane string, shards []int) (Claimed, error) {
	if err := checkLane(lane); err != nil {
		return Claimed{}, err
	}
	var claimed Claimed
	for _, shard := range shards {
		epoch, ceiling, err := l.claimShard(ctx, node, lane, shard)
		if err != nil {
			return Claimed{}, fmt.Errorf("claim shard %d: %w", shard, err)
		}
		claimed.Shards = append(claimed.Shards, &logv1.ClaimedShard{Shard: uint32(shard), Epoch: epoch})
		claimed.Ceiling = higher(claimed.Ceiling, ceiling)
	}
	return claimed, nil
}

// claimShard starts over as often as somebody else is faster.
func (l *Log) claimShard(ctx context.Context, node, lane string, shard int) (epoch uint64, ceiling *typesv1.Arrival, err error) {
	if shard < 0 || shard >= l.shards {
		return 0, nil, fmt.Errorf("there are shards 0 to %d", l.shards-1)
	}
	key := "shard." + strconv.Itoa(shard)
	for {
		ceiling = nil
		entry, err := l.owners.Get(ctx, key)
		if err != nil && !errors.Is(err, jetstream.ErrKeyNotFound) {
			return 0, nil, err
		}
		found := err == nil
		if found {
			var before owner
			if err := json.Unmarshal(entry.Value(), &before); err != nil {
				return 0, nil, fmt.Errorf("%w: the ownership entry is not JSON", ErrUnreadable)
			}
			ceiling = &typesv1.Arrival{Millis: before.CeilingMillis, Counter: before.CeilingCounter}
			if before.Lane == lane && before.History == l.history {
				return entry.Revision(), ceiling, nil
			}
			// A lane of another history is gone with its log, and its writer cannot
			// append to this one under that name once it is sealed here as well.
			sealed, err := l.Seal(ctx, before.Lane, &logv1.Seal{ByNodeId: node, ByLane: lane})
			if err != nil {
				return 0, nil, err
			}
			ceiling = higher(ceiling, sealed)
		}
		value, err := json.Marshal(owner{
			Node: node, Lane: lane, History: l.history,
			CeilingMillis: ceiling.GetMillis(), CeilingCounter: ceiling.GetCounter(),
		})
		if err != nil {
			return 0, nil, fmt.Errorf("encode the ownership entry: %w", err)
		}
		if found {
			epoch, err = l.owners.Update(ctx, key, value, entry.Revision())
		} else {
			epoch, err = l.owners.Create(ctx, key, value)
		}
		switch {
		case err == nil:
			return epoch, ceiling, nil
		case !raced(err):
			return 0, nil, err
		}
	}
}

// raced reports whether a compare-and-set lost.
func raced(err error) bool {
	var api *jetstream.APIError
	if errors.Is(err, jetstream.ErrKeyExists) {
		return true
	}
	return errors.As(err, &api) && (api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence ||
		api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequenceConstant)
}

func higher(a, b *typesv1.Arrival) *typesv1.Arrival {
	if a == nil || b != nil && (b.GetMillis() > a.GetMillis() ||
		b.GetMillis() == a.GetMillis() && b.GetCounter() > a.GetCounter()) {
		return b
	}
	return a
}
