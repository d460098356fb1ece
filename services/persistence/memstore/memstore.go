// Package memstore is a persistence.Store in memory. It owns its maps and
// promises what every Store does, for as long as the process lives; nothing
// survives it.
package memstore

import (
	"context"
	"fmt"
	"sync"

	"github.com/topgun-sync/topgun/services/persistence"
)

// Store is safe for concurrent use.
type Store struct {
	mu         sync.RWMutex
	records    map[persistence.Identity]persistence.Record
	watermarks map[lane]persistence.Position
}

type lane struct{ history, lane string }

// New returns an empty store.
func New() *Store {
	return &Store{
		records:    make(map[persistence.Identity]persistence.Record),
		watermarks: make(map[lane]persistence.Position),
	}
}

// Load implements persistence.Store. The callbacks run on a copy, so that a slow
// reader holds up no commit.
func (s *Store) Load(ctx context.Context, partitions []int, watermarks func([]persistence.Watermark) error, record func(persistence.Record) error) error {
	wanted := make(map[int]bool, len(partitions))
	for _, partition := range partitions {
		wanted[partition] = true
	}
	s.mu.RLock()
	marks := s.marks()
	var records []persistence.Record
	for _, r := range s.records {
		if wanted[r.Partition()] {
			records = append(records, r)
		}
	}
	s.mu.RUnlock()
	if err := watermarks(marks); err != nil {
		return err
	}
	for _, r := range records {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("load records: %w", err)
		}
		if err := record(r); err != nil {
			return err
		}
	}
	return nil
}

// Commit implements persistence.Store.
func (s *Store) Commit(ctx context.Context, batch persistence.Batch) (int, error) {
	if err := batch.Check(); err != nil {
		return 0, fmt.Errorf("commit batch: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return 0, fmt.Errorf("commit batch: %w", err)
	}
	for _, move := range batch.Moves {
		if s.watermarks[lane{batch.History, move.Lane}] != move.From {
			return 0, fmt.Errorf("commit batch: %w", persistence.ErrConflict)
		}
	}
	for _, move := range batch.Moves {
		s.watermarks[lane{batch.History, move.Lane}] = move.To
	}
	changed := 0
	for _, p := range batch.Pruned {
		if stored, ok := s.records[p.Identity]; ok && stored.Arrival.Compare(p.Arrival) < 0 {
			delete(s.records, p.Identity)
			changed++
		}
	}
	for _, r := range batch.Records {
		if stored, ok := s.records[r.Identity]; ok && !r.Replaces(stored) {
			continue
		}
		s.records[r.Identity] = r
		changed++
	}
	return changed, nil
}

// Watermarks implements persistence.Store.
func (s *Store) Watermarks(context.Context) ([]persistence.Watermark, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.marks(), nil
}

// marks copies the watermarks; the caller holds the lock.
func (s *Store) marks() []persistence.Watermark {
	marks := make([]persistence.Watermark, 0, len(s.watermarks))
	for l, position := range s.watermarks {
		marks = append(marks, persistence.Watermark{History: l.history, Lane: l.lane, Position: position})
	}
	return marks
}

// Stats implements persistence.Store.
func (s *Store) Stats(context.Context) (persistence.Stats, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	stats := persistence.Stats{Records: uint64(len(s.records))}
	for _, r := range s.records {
		if r.State.Deleted() {
			stats.Tombstones++
		}
	}
	return stats, nil
}

// Close implements persistence.Store; the data stays readable to who holds the
// Store, which is how a test opens it again.
func (s *Store) Close() error { return nil }
