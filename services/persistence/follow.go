package persistence

import (
	"context"
	"errors"
	"fmt"
)

// followWatermarks tells how far the lanes of the log are stored: first all of
// them, then what has moved since, each time as soon as the last telling has been
// taken. A follower holds one map of positions, so a slow one misses steps and never
// the latest, and costs the same. A lane that the store no longer knows, after an
// older backup was restored, is told as being at the zero Position.
//
// It waits for the first reading of the store, and ends when ctx does, when the
// service stops, and when the drain has halted, after which nothing moves.
func (s *Service) followWatermarks(ctx context.Context, send func([]Watermark) error) error {
	var told map[string]Position // nil until something was told
	for {
		s.mu.Lock()
		marks, trouble, changed := s.marks, s.trouble, s.changed
		s.mu.Unlock()
		if moved := movedSince(told, marks, s.log.History()); marks != nil && (told == nil || len(moved) > 0) {
			if err := send(moved); err != nil {
				return err
			}
			told = marks
		}
		if errors.Is(trouble, errHalted) {
			return fmt.Errorf("follow watermarks: %w", trouble)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("follow watermarks: %w", ctx.Err())
		case <-s.stopping:
			return fmt.Errorf("follow watermarks: %w", errStopping)
		}
	}
}

// movedSince lists the lanes whose position differs.
func movedSince(before, after map[string]Position, history string) (moved []Watermark) {
	for lane, position := range after {
		if before[lane] != position {
			moved = append(moved, Watermark{History: history, Lane: lane, Position: position})
		}
	}
	for lane := range before {
		if _, ok := after[lane]; !ok {
			moved = append(moved, Watermark{History: history, Lane: lane})
		}
	}
	return moved
}
