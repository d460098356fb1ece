package client

import (
	"context"
	"iter"
	"slices"
)

// watcher collects the changes of a map that one Watch has not delivered yet. It
// holds the latest change per key, so it never holds more than the map does. The
// client's lock guards it.
type watcher struct {
	changes []Change
	index   map[string]int // key → position in changes
	some    chan struct{}  // capacity 1: changes is not empty
}

func (w *watcher) add(ch Change) {
	if i, ok := w.index[ch.Key]; ok {
		w.changes[i] = ch
		return
	}
	w.index[ch.Key] = len(w.changes)
	w.changes = append(w.changes, ch)
	select {
	case w.some <- struct{}{}:
	default:
	}
}

// Watch returns the changes of the map from the call on, local ones and the
// server's, until ctx ends, the client is closed, or the loop is left. Changes of a key that was not
// delivered yet are joined into the latest, so a slow loop costs no memory and
// misses no final state. The sequence can be used once.
func (m *Map) Watch(ctx context.Context) iter.Seq[Change] {
	w := &watcher{index: make(map[string]int), some: make(chan struct{}, 1)}
	m.client.mu.Lock()
	m.watchers[w] = struct{}{}
	m.client.mu.Unlock()
	remove := func() {
		m.client.mu.Lock()
		defer m.client.mu.Unlock()
		delete(m.watchers, w)
	}
	stop := context.AfterFunc(ctx, remove) // also when nobody ranges over the sequence
	return func(yield func(Change) bool) {
		defer func() {
			stop()
			remove()
		}()
		for {
			m.client.mu.Lock()
			changes := slices.Clone(w.changes)
			w.changes = w.changes[:0]
			clear(w.index)
			m.client.mu.Unlock()
			for _, ch := range changes {
				if ctx.Err() != nil || !yield(ch) {
					return
				}
			}
			select {
			case <-ctx.Done():
				return
			case <-m.client.done:
				return
			case <-w.some:
			}
		}
	}
}
