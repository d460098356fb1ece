package fanout

import (
	"context"
	"errors"
	"fmt"

	"github.com/topgun-sync/topgun/services/internal/bus"
)

// watchedMap is a map that at least one stream watches, or a query of one.
type watchedMap struct {
	streams map[*stream]struct{}
	// live keeps the queries of the map; nil where there are none.
	live         *liveMap
	subscription bus.Subscription
	// confirmed says that the broker has the subscription.
	confirmed bool
}

// watchedTopic is a topic that at least one stream watches.
type watchedTopic struct {
	streams      map[*stream]struct{}
	subscription bus.Subscription
	confirmed    bool
}

// interest is what a Watch adds or removes.
type interest struct {
	maps, topics []string
}

// watch adds and removes maps and topics of a stream. All or nothing of add is done.
// When it returns nil the broker has all subscriptions, so that what is logged or
// published from then on is delivered or, of maps, noticed missing.
func (s *Service) watch(ctx context.Context, streamID string, add, remove interest) error {
	change, err := s.changeInterest(streamID, add, remove)
	if err != nil || len(change.unconfirmed) == 0 {
		return err
	}
	err = s.bus.Flush(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		s.undoLocked(change)
		return fmt.Errorf("%w: %w", errBus, err)
	}
	for _, confirmed := range change.unconfirmed {
		*confirmed = true
	}
	return nil
}

// change is what a Watch did before the broker confirmed it.
type change struct {
	stream *stream
	// added is what the stream did not watch before.
	added interest
	// unconfirmed are the marks of the subscriptions that the broker may not have
	// yet, whoever made them.
	unconfirmed []*bool
}

func (s *Service) undoLocked(c change) {
	for _, name := range c.added.maps {
		s.unwatchLocked(c.stream, name)
	}
	for _, topic := range c.added.topics {
		s.unwatchTopicLocked(c.stream, topic)
	}
}

// changeInterest subscribes and unsubscribes.
func (s *Service) changeInterest(streamID string, add, remove interest) (change, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := change{stream: s.streams[streamID]}
	if c.stream == nil {
		return change{}, errNoStream
	}
	for _, name := range remove.maps {
		s.unwatchLocked(c.stream, name)
	}
	for _, topic := range remove.topics {
		s.unwatchTopicLocked(c.stream, topic)
	}
	for _, name := range add.maps {
		fresh, err := s.watchLocked(c.stream, name)
		if err != nil {
			s.undoLocked(c)
			return change{}, err
		}
		if fresh {
			c.added.maps = append(c.added.maps, name)
		}
		if w := s.maps[name]; !w.confirmed {
			c.unconfirmed = append(c.unconfirmed, &w.confirmed)
		}
	}
	for _, topic := range add.topics {
		fresh, err := s.watchTopicLocked(c.stream, topic)
		if err != nil {
			s.undoLocked(c)
			return change{}, err
		}
		if fresh {
			c.added.topics = append(c.added.topics, topic)
		}
		if w := s.topics[topic]; !w.confirmed {
			c.unconfirmed = append(c.unconfirmed, &w.confirmed)
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
	w, err := s.mapLocked(name)
	if err != nil {
		return false, err
	}
	w.streams[st] = struct{}{}
	st.maps[name] = struct{}{}
	return true, nil
}

// mapLocked returns a map, subscribed if it was not. Give it a watcher, or call
// releaseLocked.
func (s *Service) mapLocked(name string) (*watchedMap, error) {
	if w := s.maps[name]; w != nil {
		return w, nil
	}
	subscription, err := s.bus.SubscribeEvents(name, s.onEvent)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errBus, err)
	}
	w := &watchedMap{streams: make(map[*stream]struct{}), subscription: subscription}
	s.maps[name] = w
	return w, nil
}

// unwatchLocked undoes watchLocked.
func (s *Service) unwatchLocked(st *stream, name string) {
	if _, ok := st.maps[name]; !ok {
		return
	}
	delete(st.maps, name)
	w := s.maps[name]
	delete(w.streams, st)
	s.releaseLocked(name, w)
}

// releaseLocked ends the subscription of a map that nobody watches any more.
func (s *Service) releaseLocked(name string, w *watchedMap) {
	if len(w.streams) > 0 || w.live != nil {
		return
	}
	delete(s.maps, name)
	s.unsubscribe(w.subscription)
}

func (s *Service) unsubscribe(subscription bus.Subscription) {
	if err := subscription.Unsubscribe(); err != nil && !errors.Is(err, bus.ErrClosed) {
		// The broker may send on what nobody handles.
		s.logger.Warn("unsubscribe from the bus", "error", err)
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
	for topic := range st.topics {
		s.unwatchTopicLocked(st, topic)
	}
	for _, q := range st.queries {
		s.dropQueryLocked(q)
	}
}
