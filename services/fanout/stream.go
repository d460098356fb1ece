package fanout

import (
	"context"
	"maps"
	"slices"
	"sync"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
)

// stream is the queue of one gateway. Events, gaps, topic messages and changes of
// queries are pushed; next, called by the RPC that serves the stream, takes them out.
//
// Bounds: limits.events messages and limits.bytes of them. What does not fit makes
// room in this order:
//
//  1. Topic messages are dropped and counted; they are at most once.
//  2. Changes of queries are dropped, and their queries are due: a fresh result
//     follows, which costs no read.
//  3. An event takes the queued events of its map with it, and one Gap replaces them
//     all; that Gap also stands for the map's later events until it is sent.
//  4. Where this frees nothing, all maps are treated so.
//  5. Where even the Gaps do not fit, the stream ends with errSlow and the gateway
//     starts over.
//
// Results of queries do not wait in the queue: a query that is due waits in a list,
// and its result is made when its turn has come. So they cost a slow stream nothing,
// and the list is bounded by the number of the stream's queries.
type stream struct {
	id      string
	gateway string
	limits  limits
	meters  *meters

	// maps, topics and queries are what the stream watches; the interest's lock
	// guards them.
	maps    map[string]struct{}
	topics  map[string]struct{}
	queries map[uint64]*sub

	mu sync.Mutex
	// queue[head:] waits; what is before head was sent and is overwritten when the
	// queue runs empty or the front outgrows the rest.
	queue  []item
	head   int
	bytes  int
	queued map[string]queuedMap
	// kinds counts what waits of each kind.
	kinds [kindCount]int
	// due are the queries whose result is to be sent, first come first served; those
	// that changed their state since are skipped. Results and the queue take turns.
	due       []*sub
	dueIsNext bool
	// dueGone counts those in due that were ended there, about.
	dueGone int
	ended   error
	wake    chan struct{}
}

type limits struct{ events, bytes int }

type itemKind uint8

const (
	eventKind itemKind = iota
	gapKind
	topicKind
	changesKind
	kindCount
)

// item is one message that waits, of size encoded bytes.
type item struct {
	kind    itemKind
	message *fanoutv1.SubscribeResponse
	size    int
	// mapName is set for events and gaps.
	mapName string
	// sub and epoch are set for changes: of an older epoch than the query's they are
	// in a result that was sent, or is due.
	sub   *sub
	epoch uint32
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

func newStream(id, gateway string, l limits, m *meters) *stream {
	return &stream{
		id:      id,
		gateway: gateway,
		limits:  l,
		meters:  m,
		maps:    make(map[string]struct{}),
		topics:  make(map[string]struct{}),
		queries: make(map[uint64]*sub),
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
	if s.makeRoom(size) {
		s.appendEvent(item{kind: eventKind, mapName: mapName, message: event, size: size}, false)
		return queuedUp
	}
	s.drop(func(it item) bool { return it.kind <= gapKind && it.mapName == mapName })
	delete(s.queued, mapName)
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
	if s.makeRoom(0) || s.waiting() < s.limits.events {
		s.appendEvent(gapItem(mapName), false)
		return queuedUp
	}
	return s.overflow(mapName)
}

// pushTopic queues a topic message of size encoded bytes, or drops it.
func (s *stream) pushTopic(message *fanoutv1.SubscribeResponse, size int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended != nil {
		return
	}
	if !s.fits(size) {
		s.meters.topicsDropped.Add(context.Background(), 1)
		return
	}
	s.append(item{kind: topicKind, message: message, size: size})
}

// fits says whether a message of size bytes may wait. A single one may always.
func (s *stream) fits(size int) bool {
	return s.waiting() == 0 || (s.waiting() < s.limits.events && s.bytes+size <= s.limits.bytes)
}

// makeRoom drops what may be dropped until a message of size bytes fits. It says
// whether it does.
func (s *stream) makeRoom(size int) bool {
	if !s.fits(size) && s.kinds[topicKind] > 0 {
		s.meters.topicsDropped.Add(context.Background(), int64(s.kinds[topicKind]))
		s.drop(func(it item) bool { return it.kind == topicKind })
	}
	if !s.fits(size) && s.kinds[changesKind] > 0 {
		s.drop(func(it item) bool {
			if it.kind == changesKind && it.epoch == it.sub.epoch {
				s.setDue(it.sub)
				s.meters.resultsAgain.Add(context.Background(), 1)
			}
			return it.kind == changesKind
		})
	}
	return s.fits(size)
}

// overflow puts a Gap for the map into a queue that was full of events and gaps, at
// the cost of the other maps if it must.
func (s *stream) overflow(mapName string) outcome {
	if s.waiting() < s.limits.events {
		s.appendEvent(gapItem(mapName), true)
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
	s.drop(func(item) bool { return true })
	clear(s.queued)
	for _, name := range names {
		s.appendEvent(gapItem(name), true)
	}
	return overflowed
}

// drop removes the items for which discard says so.
func (s *stream) drop(discard func(item) bool) {
	s.queue = slices.DeleteFunc(s.queue[s.head:], func(it item) bool {
		if !discard(it) {
			return false
		}
		s.bytes -= it.size
		s.kinds[it.kind]--
		return true
	})
	s.head = 0
}

func (s *stream) waiting() int { return len(s.queue) - s.head }

// appendEvent queues an event or a gap.
func (s *stream) appendEvent(it item, swallow bool) {
	s.append(it)
	s.queued[it.mapName] = queuedMap{
		items:   s.queued[it.mapName].items + 1,
		gapLast: it.kind == gapKind,
		swallow: swallow,
	}
}

func (s *stream) append(it item) {
	if s.head > 0 && s.head*2 >= len(s.queue) && len(s.queue) == cap(s.queue) {
		rest := copy(s.queue, s.queue[s.head:])
		clear(s.queue[rest:])
		s.queue, s.head = s.queue[:rest], 0
	}
	s.queue = append(s.queue, it)
	s.bytes += it.size
	s.kinds[it.kind]++
	s.wakeUp()
}

// end closes the stream for a reason and frees its queue. The first reason counts.
func (s *stream) end(reason error) {
	if s.ended == nil {
		s.ended = reason
	}
	s.queue, s.head, s.bytes, s.queued, s.due = nil, 0, 0, nil, nil
	s.kinds = [kindCount]int{}
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

// next waits for the next message, or for a query whose result is to be made and
// sent next. It returns the reason when the stream has ended. One goroutine calls it.
func (s *stream) next(ctx context.Context) (*fanoutv1.SubscribeResponse, *sub, error) {
	for {
		message, due, err := s.pop()
		if message != nil || due != nil || err != nil {
			return message, due, err
		}
		select {
		case <-s.wake:
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		}
	}
}

func (s *stream) pop() (*fanoutv1.SubscribeResponse, *sub, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended != nil {
		return nil, nil, s.ended
	}
	for len(s.due) > 0 && (s.dueIsNext || s.waiting() == 0) {
		q := s.due[0]
		s.due[0] = nil
		if s.due = s.due[1:]; len(s.due) == 0 {
			s.due = nil
		}
		if q.state == subDue {
			q.state = subMaking
			s.dueIsNext = false
			return nil, q, nil
		}
	}
	s.dueIsNext = true
	for s.waiting() > 0 {
		it := s.queue[s.head]
		s.queue[s.head] = item{}
		if s.head++; s.head == len(s.queue) {
			s.queue, s.head = s.queue[:0], 0
		}
		s.bytes -= it.size
		s.kinds[it.kind]--
		switch it.kind {
		case eventKind, gapKind:
			if q := s.queued[it.mapName]; q.items == 1 {
				delete(s.queued, it.mapName)
			} else {
				q.items--
				s.queued[it.mapName] = q
			}
		case changesKind:
			if it.epoch != it.sub.epoch {
				continue
			}
		}
		return it.message, nil, nil
	}
	return nil, nil, nil
}

// depth is what waits.
func (s *stream) depth() (messages, bytes int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.waiting(), s.bytes
}

func gapItem(mapName string) item {
	message := &fanoutv1.SubscribeResponse{Message: &fanoutv1.SubscribeResponse_Gap{Gap: &fanoutv1.Gap{Map: mapName}}}
	return item{kind: gapKind, mapName: mapName, message: message}
}
