package fanout

import (
	"context"
	"errors"
	"fmt"

	"github.com/topgun-sync/topgun/services/internal/bus"
)

// watchedMap is a map that at least one stream watches.
type watchedMap struct {
	streams      map[*stream]struct{}
	subscription bus.Subscription
	// confirmed says that the broker has the subscription.
	confirmed bool
}

// watch adds and removes maps of a stream. All or nothing of add is done. When it
// returns nil the broker has all subscriptions, so that what is logged from then on
// is delivered or noticed missing.
func (s *Service) watch(ctx context.Context, streamID string, add, remove []string) error {
	change, err := s.changeInterest(streamID, add, remove)
	if err != nil || len(change.unconfirmed) == 0 {
		return err
	}
	err = s.bus.Flush(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		for _, name := range change.added {
			s.unwatchLocked(change.stream, name)
		}
		return fmt.Errorf("%w: %w", errBus, err)
	}
	for _, w := range change.unconfirmed {
		w.confirmed = true
	}
	return nil
}

// change is what a Watch did before the broker confirmed it.
type change struct {
	stream *stream
	// added are the maps that the stream did not watch before.
	added []string
	// unconfirmed are the maps whose subscription the broker may not have yet,
	// whoever made it.
	unconfirmed []*watchedMap
}

// changeInterest subscribes and unsubscribes.
func (s *Service) changeInterest(streamID string, add, remove []string) (change, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := change{stream: s.streams[streamID]}
	if c.stream == nil {
		return change{}, errNoStream
	}
	for _, name := range remove {
		s.unwatchLocked(c.stream, name)
	}
	for _, name := range add {
		fresh, err := s.watchLocked(c.stream, name)
		if err != nil {
			for _, name := range c.added {
				s.unwatchLocked(c.stream, name)
			}
			return change{}, err
		}
		if fresh {
			c.added = append(c.added, name)
		}
		if w := s.maps[name]; !w.confirmed {
			c.unconfirmed = append(c.unconfirmed, w)
		}
	}
	return c, nil
}

// watchLocked makes the stream watch a map, if it does not yet.
func (s *Service) watchLocked(st *stream, name string) (fresh bool, err error) {
	if _, ok := st.maps[name]; ok {
		return false, nil
	}
	if len(st.maps) >= s.config.MaxMapsPerStream {
		return false, errTooManyMaps
	}
	w := s.maps[name]
	if w == nil {
		subscription, err := s.bus.SubscribeEvents(name, s.onEvent)
		if err != nil {
			return false, fmt.Errorf("%w: %w", errBus, err)
		}
		w = &watchedMap{streams: make(map[*stream]struct{}), subscription: subscription}
		s.maps[name] = w
	}
	w.streams[st] = struct{}{}
	st.maps[name] = struct{}{}
	return true, nil
}

// unwatchLocked undoes watchLocked; the last stream takes the subscription along.
func (s *Service) unwatchLocked(st *stream, name string) {
	if _, ok := st.maps[name]; !ok {
		return
	}
	delete(st.maps, name)
	w := s.maps[name]
	delete(w.streams, st)
	if len(w.streams) > 0 {
		return
	}
	delete(s.maps, name)
	if err := w.subscription.Unsubscribe(); err != nil && !errors.Is(err, bus.ErrClosed) {
		// The broker may send on what nobody handles.
		s.logger.Warn("unsubscribe from a map", "error", err)
	}
}

// detachLocked removes a stream and its interest. It may be called again.
func (s *Service) detachLocked(st *stream) {
	if s.streams[st.id] != st {
		return
	}
	delete(s.streams, st.id)
	for name := range st.maps {
		s.unwatchLocked(st, name)
	}
}
