package fanout

import (
	"context"
	"maps"
	"slices"
	"sync"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
)

// stream is the queue of one gateway. push and gap are called by the bus, next by
// the RPC that serves the stream.
//
// Bounds: limits.events messages and limits.bytes of events. An event that does not
// fit takes the queued events of its map with it, and one Gap replaces them all; that
// Gap also stands for the map's later events until it is sent. Where this frees
// nothing, all maps are treated so. Where even the Gaps do not fit, the stream ends
// with errSlow and the gateway starts over.
type stream struct {
	id      string
	gateway string
	limits  limits

	// maps is what the stream watches; the interest's lock guards it.
	maps map[string]struct{}

	mu sync.Mutex
	// queue[head:] waits; what is before head was sent and is overwritten when the
	// queue runs empty or the front outgrows the rest.
	queue  []item
	head   int
	bytes  int
	queued map[string]queuedMap
	ended  error
	wake   chan struct{}
}

type limits struct{ events, bytes int }

// item is one message that waits: an event of size encoded bytes, or a Gap.
type item struct {
	mapName string
	message *fanoutv1.SubscribeResponse
	size    int
	gap     bool
}

// queuedMap is what waits for one map. It exists while something does.
type queuedMap struct {
	items int
	// gapLast says that the last waiting item is a Gap: another one would say
	// nothing more.
	gapLast bool
	// swallow says that the waiting Gap came from an overflow, and stands for the
	// events that follow too.
	swallow bool
}

func newStream(id, gateway string, l limits) *stream {
	return &stream{
		id:      id,
		gateway: gateway,
		limits:  l,
		maps:    make(map[string]struct{}),
		queued:  make(map[string]queuedMap),
		wake:    make(chan struct{}, 1),
	}
}

// outcome is what became of a message.
type outcome uint8

const (
	// queuedUp: the message waits, or a Gap that waits stands for it.
	queuedUp outcome = iota
	// overflowed: events of one or more maps were replaced by Gaps.
	overflowed
	// tooSlow: the stream has ended.
	tooSlow
)

// push queues an event of size encoded bytes.
func (s *stream) push(mapName string, event *fanoutv1.SubscribeResponse, size int) outcome {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended != nil {
		return tooSlow
	}
	if s.queued[mapName].swallow {
		return queuedUp
	}
	if s.waiting() == 0 || (s.waiting() < s.limits.events && s.bytes+size <= s.limits.bytes) {
		s.append(item{mapName: mapName, message: event, size: size}, false)
		return queuedUp
	}
	s.drop(mapName)
	return s.overflow(mapName)
}

// gap queues a Gap.
func (s *stream) gap(mapName string) outcome {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended != nil {
		return tooSlow
	}
	if s.queued[mapName].gapLast {
		return queuedUp
	}
	if s.waiting() < s.limits.events {
		s.append(gapItem(mapName), false)
		return queuedUp
	}
	return s.overflow(mapName)
}

// overflow puts a Gap for the map into a queue that was full, at the cost of the
// other maps if it must.
func (s *stream) overflow(mapName string) outcome {
	if s.waiting() < s.limits.events {
		s.append(gapItem(mapName), true)
		return overflowed
	}
	names := slices.Collect(maps.Keys(s.queued))
	if !slices.Contains(names, mapName) {
		names = append(names, mapName)
	}
	if len(names) > s.limits.events {
		s.end(errSlow)
		return tooSlow
	}
	s.queue, s.head, s.bytes = nil, 0, 0
	clear(s.queued)
	for _, name := range names {
		s.append(gapItem(name), true)
	}
	return overflowed
}

// drop removes what waits for a map.
func (s *stream) drop(mapName string) {
	s.queue = slices.DeleteFunc(s.queue[s.head:], func(it item) bool {
		if it.mapName != mapName {
			return false
		}
		s.bytes -= it.size
		return true
	})
	s.head = 0
	delete(s.queued, mapName)
}

func (s *stream) waiting() int { return len(s.queue) - s.head }

func (s *stream) append(it item, swallow bool) {
	if s.head > 0 && s.head*2 >= len(s.queue) && len(s.queue) == cap(s.queue) {
		rest := copy(s.queue, s.queue[s.head:])
		clear(s.queue[rest:])
		s.queue, s.head = s.queue[:rest], 0
	}
	s.queue = append(s.queue, it)
	s.bytes += it.size
	s.queued[it.mapName] = queuedMap{
		items:   s.queued[it.mapName].items + 1,
		gapLast: it.gap,
		swallow: swallow,
	}
	s.wakeUp()
}

// end closes the stream for a reason and frees its queue. The first reason counts.
func (s *stream) end(reason error) {
	if s.ended == nil {
		s.ended = reason
	}
	s.queue, s.head, s.bytes, s.queued = nil, 0, 0, nil
	s.wakeUp()
}

// close is end for other rooms of the package.
func (s *stream) close(reason error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.end(reason)
}

func (s *stream) wakeUp() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// next waits for the next message. It returns the reason when the stream has ended.
// One goroutine calls it.
func (s *stream) next(ctx context.Context) (*fanoutv1.SubscribeResponse, error) {
	for {
		message, err := s.pop()
		if message != nil || err != nil {
			return message, err
		}
		select {
		case <-s.wake:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (s *stream) pop() (*fanoutv1.SubscribeResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended != nil {
		return nil, s.ended
	}
	if s.waiting() == 0 {
		return nil, nil
	}
	it := s.queue[s.head]
	s.queue[s.head] = item{}
	if s.head++; s.head == len(s.queue) {
		s.queue, s.head = s.queue[:0], 0
	}
	s.bytes -= it.size
	if q := s.queued[it.mapName]; q.items == 1 {
		delete(s.queued, it.mapName)
	} else {
		q.items--
		s.queued[it.mapName] = q
	}
	return it.message, nil
}

// depth is what waits.
func (s *stream) depth() (messages, bytes int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.waiting(), s.bytes
}

func gapItem(mapName string) item {
	message := &fanoutv1.SubscribeResponse{Message: &fanoutv1.SubscribeResponse_Gap{Gap: &fanoutv1.Gap{Map: mapName}}}
	return item{mapName: mapName, message: message, gap: true}
}
