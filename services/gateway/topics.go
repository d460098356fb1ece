package gateway

import (
	"context"
	"strings"
	"sync"

	"github.com/topgun-sync/topgun/core/wire"
	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
)

const (
	// maxPublishes and maxPublishBytes bound the messages of a session that wait to be
	// published. A client that was away publishes up to 100 at once (PROTOCOL 14.1), and one
	// that is busy more. What is above the bound is refused with ERROR 429 and not published,
	// so that what was taken keeps its order.
	maxPublishes    = 1000
	maxPublishBytes = 4 << 20
	// watchTopics bounds the topics that one Watch call names; the rest follows with the
	// next.
	watchTopics = 10_000
)

// topics knows which sessions are subscribed to which topic (PROTOCOL 14.1). A message is
// delivered at most once: to the sessions that are subscribed when it arrives, and not to
// one whose queue is full.
//
// Lock order: topics.mu before session.mu.
type topics struct {
	kick func() // has the stream's watcher look at wanted
	most int    // of byName

	mu      sync.Mutex
	byName  map[string]*topic
	changed map[string]struct{} // topics that fanout is to hear of
}

// topic is one topic that sessions are subscribed to, or were.
type topic struct {
	sessions map[*session]struct{}
	told     bool // the stream brings it
}

func newTopics(kick func()) *topics {
	return &topics{kick: kick, most: maxWatched, byName: make(map[string]*topic), changed: make(map[string]struct{})}
}

// join subscribes a session. It returns false if the gateway has as many topics as it may.
func (t *topics) join(s *session, name string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	one := t.byName[name]
	if one == nil {
		if len(t.byName) >= t.most {
			return false
		}
		one = &topic{sessions: make(map[*session]struct{})}
		t.byName[name] = one
	}
	one.sessions[s] = struct{}{}
	t.changedLocked(name, one)
	return true
}

// leave ends a subscription.
func (t *topics) leave(s *session, name string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if one := t.byName[name]; one != nil {
		delete(one.sessions, s)
		t.changedLocked(name, one)
	}
}

// changedLocked notes whether fanout is to hear of a topic; t.mu is held.
func (t *topics) changedLocked(name string, one *topic) {
	if used := len(one.sessions) > 0; used == one.told {
		delete(t.changed, name)
		if !used {
			delete(t.byName, name)
		}
		return
	}
	t.changed[name] = struct{}{}
	t.kick()
}

// count returns how many topics sessions are subscribed to.
func (t *topics) count() (n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, one := range t.byName {
		if len(one.sessions) > 0 {
			n++
		}
	}
	return n
}

// lost notes that the stream ended; the next one is told of every topic.
func (t *topics) lost() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for name, one := range t.byName {
		one.told = false
		t.changedLocked(name, one)
	}
}

// wanted adds to a Watch call what fanout is to hear, and reports whether there is more.
func (t *topics) wanted(call *fanoutv1.WatchRequest) (more bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for name := range t.changed {
		if len(call.AddTopics)+len(call.RemoveTopics) >= watchTopics {
			return true
		}
		delete(t.changed, name)
		one := t.byName[name]
		if one.told = len(one.sessions) > 0; one.told {
			call.AddTopics = append(call.AddTopics, name)
		} else {
			call.RemoveTopics = append(call.RemoveTopics, name)
			delete(t.byName, name)
		}
	}
	return false
}

// deliver hands a message to the sessions of its topic, but not to the one that
// published it. It is encoded once.
func (t *topics) deliver(m *fanoutv1.TopicMessage) {
	t.mu.Lock()
	defer t.mu.Unlock()
	one := t.byName[m.GetTopic()]
	if one == nil {
		return
	}
	var bytes []byte
	var woken []*session
	for s := range one.sessions {
		if s.origin == m.GetOrigin() {
			continue
		}
		if bytes == nil {
			bytes = compile(&wire.TopicMessage{
				Topic: m.GetTopic(), Data: m.GetData(), PublisherID: m.GetPublisherId(), Timestamp: m.GetMillis(),
			})
		}
		if s.giveMessage(bytes) {
			woken = append(woken, s)
			s.k.meters.sentType(outTopic)
		}
	}
	startWriters(woken)
}

// giveMessage queues a message of a topic, or drops it when the queue is full. It reports
// whether there is something to write; the caller starts the writer.
func (s *session) giveMessage(bytes []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.out.shut() {
		return false
	}
	if s.out.events > 0 && s.out.fullLocked(s.k.cfg, len(bytes)) {
		s.k.meters.dropped(1)
		return false
	}
	s.pushLocked(bulk, frame{bytes: bytes, topic: true})
	return true
}

var tooManyTopics = &wire.Error{
	Name: "TOO_MANY_SUBS", Code: 429, Text: "this connection is subscribed to as many topics as it may be; use another one",
}

var gatewayTopics = &wire.Error{
	Name: "TOO_MANY_SUBS", Code: 429, Text: "the clients of this gateway are subscribed to as many topics as it takes; use one of them, or try again later",
}

// topicSubscribed takes a TOPIC_SUB.
func (s *session) topicSubscribed(m *wire.TopicSub) error {
	name := strings.Clone(m.Topic)
	s.mu.Lock()
	_, known := s.topics[name]
	fresh := !known && s.closing == nil // else endTopics may be over
	full := len(s.topics) >= s.k.cfg.MaxSubscriptions
	if fresh && !full {
		if s.topics == nil {
			s.topics = make(map[string]struct{})
		}
		s.topics[name] = struct{}{}
	}
	s.mu.Unlock()
	switch {
	case !fresh:
		return nil
	case full:
		return s.decline(tooManyTopics)
	case !s.k.hub.topics.join(s, name):
		s.mu.Lock()
		delete(s.topics, name)
		s.mu.Unlock()
		return s.decline(gatewayTopics)
	}
	return nil
}

// topicUnsubscribed takes a TOPIC_UNSUB.
func (s *session) topicUnsubscribed(m *wire.TopicUnsub) {
	s.mu.Lock()
	_, known := s.topics[m.Topic]
	delete(s.topics, m.Topic)
	s.mu.Unlock()
	if known {
		s.k.hub.topics.leave(s, m.Topic)
	}
}

// endTopics ends the subscriptions of a session that has ended.
func (s *session) endTopics() {
	s.mu.Lock()
	names := s.topics
	s.topics = nil
	s.mu.Unlock()
	for name := range names {
		s.k.hub.topics.leave(s, name)
	}
}

// publishing holds the messages of a session that wait to be published, one after the
// other, so that they keep their order. The session's mu guards it.
type publishing struct {
	waiting []*fanoutv1.TopicMessage
	bytes   int
	running bool // the publishing goroutine; it ends when nothing waits
	failing bool // fanout did not take the last one
}

var tooManyPublishes = &wire.Error{
	Name: "TOO_FAST", Code: 429, Text: "the message was not published: as many as may wait do; publish more slowly",
}

// topicPublished takes a TOPIC_PUB.
func (s *session) topicPublished(m *wire.TopicPub) error {
	message := &fanoutv1.TopicMessage{
		Topic: strings.Clone(m.Topic), Data: m.Data, Origin: s.origin, Millis: uint64(max(0, s.k.now().UnixMilli())),
	}
	if len(message.Data) == 0 {
		message.Data = []byte{0xc0} // nil
	}
	if !s.queuePublish(message) {
		return s.decline(tooManyPublishes)
	}
	return nil
}

// queuePublish queues a message, or reports that too many wait.
func (s *session) queuePublish(message *fanoutv1.TopicMessage) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	message.PublisherId = s.principal.UserID
	p := &s.publishing
	if len(p.waiting) >= maxPublishes || p.bytes > 0 && p.bytes+len(message.Data) > maxPublishBytes {
		return false
	}
	p.waiting = append(p.waiting, message)
	p.bytes += len(message.Data)
	if !p.running && s.spawnLocked(s.publish) {
		p.running = true
	}
	return true
}

// publish publishes what waits. A message that fanout does not take is not sent again:
// it may have been delivered (PROTOCOL 14.1 wants at most once). The client is told, once
// for all that fail in a row.
func (s *session) publish() {
	p := &s.publishing
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(p.waiting) > 0 {
		message := p.waiting[0]
		p.waiting[0] = nil
		p.waiting = p.waiting[1:]
		p.bytes -= len(message.GetData())
		s.mu.Unlock()
		// Published although its client may be gone: it was sent before.
		ctx, cancel := context.WithTimeout(s.k.base, s.k.cfg.ReadTimeout)
		_, err := s.k.fanout.Publish(ctx, &fanoutv1.PublishRequest{Message: message})
		cancel()
		s.mu.Lock()
		tell := err != nil && !p.failing
		p.failing = err != nil
		if tell {
			s.mu.Unlock()
			s.send(urgent, &wire.ErrorMessage{Code: 503, Message: "UNAVAILABLE: a message was not published"})
			s.mu.Lock()
		}
		if p.failing && s.ctx.Err() != nil {
			break // not worth the wait that each would be
		}
	}
	p.waiting, p.bytes, p.running = nil, 0, false
}
