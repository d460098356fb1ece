package persistence

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	logv1 "github.com/topgun-sync/topgun/gen/go/topgun/log/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
	"github.com/topgun-sync/topgun/services/internal/commitlog"
)

// model is a store as the interface describes it.
type model map[Identity]Record

func (m model) store(b Batch) {
	for _, p := range b.Pruned {
		if stored, ok := m[p.Identity]; ok && stored.Arrival.Compare(p.Arrival) < 0 {
			delete(m, p.Identity)
		}
	}
	for _, r := range b.Records {
		if stored, ok := m[r.Identity]; !ok || r.Replaces(stored) {
			m[r.Identity] = r
		}
	}
}

func (m model) String() string {
	var lines []string
	for id, r := range m {
		lines = append(lines, fmt.Sprintf("%v=%q %v %v", id, r.State.Value, r.State.Timestamp, r.Arrival))
	}
	slices.Sort(lines)
	return fmt.Sprint(lines)
}

func logChange(kind typesv1.Kind, key, value string, millis, arrival uint64) *typesv1.Change {
	c := &typesv1.Change{
		Kind: kind, Map: "m", Key: []byte(key), Arrival: &typesv1.Arrival{Millis: arrival},
		Record: &typesv1.Record{Timestamp: &typesv1.Timestamp{Millis: millis, NodeId: "n"}},
	}
	if kind == typesv1.Kind_KIND_OR || kind == typesv1.Kind_KIND_COUNTER {
		c.Tag = "tag"
	}
	if value != "" {
		c.Record.Value = []byte{0xa1, value[0]}
	}
	return c
}

func logPruned(c *typesv1.Change, arrival uint64) *typesv1.Change {
	return &typesv1.Change{Kind: c.Kind, Map: c.Map, Key: c.Key, Tag: c.Tag, Arrival: &typesv1.Arrival{Millis: arrival}, Pruned: true}
}

// batched cuts commits of one change each into batches and stores them in order.
func batched(t *testing.T, into model, changes []*typesv1.Change, size func() int) {
	t.Helper()
	number := uint64(0)
	for len(changes) > 0 {
		b := newBatch(map[string]Position{"a": {Sequence: number, Number: number}}, number, 0)
		for range min(size(), len(changes)) {
			number++
			err := b.add(commitlog.Entry{Sequence: number, Lane: "a", Commit: &logv1.Commit{
				Version: 1, Number: number, Lane: "a", Body: &logv1.Commit_Changes{Changes: &logv1.Changes{
					Shards: []*logv1.ShardChanges{{Changes: changes[:1]}},
				}},
			}})
			if err != nil {
				t.Fatal(err)
			}
			changes = changes[1:]
		}
		batch := b.batch("history")
		bytes := 0
		for _, r := range batch.Records {
			bytes += r.Size()
		}
		if len(batch.Pruned) == 0 && bytes != b.bytes || bytes > b.bytes || b.rows() != len(batch.Records)+len(batch.Pruned) {
			t.Errorf("a batch of %d bytes in %d rows counts %d and %d", bytes, len(batch.Records)+len(batch.Pruned), b.bytes, b.rows())
		}
		into.store(batch)
	}
}

// TestTombstonePrunedNewValue puts what happens to a key that is forgotten and comes
// back with an older stamp into one batch, with a stored value or without.
func TestTombstonePrunedNewValue(t *testing.T) {
	for kind := range typesv1.Kind_name {
		kind := typesv1.Kind(kind)
		tombstone := logChange(kind, "k", "", 50, 2)
		changes := []*typesv1.Change{
			logChange(kind, "k", "a", 10, 1), tombstone, logPruned(tombstone, 3), logChange(kind, "k", "b", 5, 4),
			logChange(kind, "other", "c", 5, 5),
		}
		for size := 1; size <= len(changes); size++ {
			for before := range 4 {
				m := make(model)
				batched(t, m, changes[:before], func() int { return 1 })
				batched(t, m, changes, func() int { return size })
				id, err := identityOf(tombstone)
				if err != nil {
					t.Fatal(err)
				}
				if got := string(m[id].State.Value); got != "\xa1b" || len(m) != 2 {
					t.Errorf("kind %v, batches of %d, the first %d stored before: the store holds %v", kind, size, before, m)
				}
			}
		}
		// Forgotten and not back: gone.
		m := make(model)
		batched(t, m, changes[:3], func() int { return 3 })
		if len(m) != 0 {
			t.Errorf("kind %v: the store holds %v", kind, m)
		}
	}
}

// TestBatchesOfAllKindsDoNotMatter cuts one log in many ways.
func TestBatchesOfAllKindsDoNotMatter(t *testing.T) {
	kinds := []typesv1.Kind{0, typesv1.Kind_KIND_LWW, typesv1.Kind_KIND_OR, typesv1.Kind_KIND_COUNTER, typesv1.Kind_KIND_LOCK}
	for range 50 {
		seed := rand.Uint64()
		random := rand.New(rand.NewPCG(seed, 3))
		var changes []*typesv1.Change
		gone := make(map[string]*typesv1.Change)
		for arrival := uint64(1); arrival < 100; arrival++ {
			c := logChange(kinds[random.IntN(len(kinds))], fmt.Sprint("k", random.IntN(3)), "v", uint64(random.IntN(20)), arrival)
			name := fmt.Sprint(max(c.Kind, 1), string(c.Key))
			if tombstone := gone[name]; tombstone != nil && random.IntN(2) == 0 {
				changes = append(changes, logPruned(tombstone, arrival))
				delete(gone, name)
				continue
			}
			if random.IntN(3) == 0 {
				c.Record.Value = nil
				gone[name] = c
			}
			changes = append(changes, c)
		}
		one := make(model)
		batched(t, one, changes, func() int { return 1 })
		many := make(model)
		batched(t, many, changes, func() int { return 1 + random.IntN(20) })
		if one.String() != many.String() {
			t.Fatalf("seed %d: one at a time the store holds\n%v\nin batches\n%v", seed, one, many)
		}
	}
}
