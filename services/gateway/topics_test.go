package gateway

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/topgun-sync/topgun/core/wire"
)

// PROTOCOL 14.1: to the subscribers of now, in the order of the publisher, and not to the
// connection that published.
func TestTopics(t *testing.T) {
	b := setup(t, nil, nil)
	one, two, pub := b.hello(t), b.hello(t), b.hello(t)
	for _, p := range []*wsClient{one, two, pub} {
		p.send(&wire.TopicSub{Topic: "news"})
		p.send(&wire.TopicSub{Topic: "news"})
		p.ping()
	}
	b.fanout.awaitTopic(t, "news", true)
	const n = 50
	for i := range n {
		pub.send(&wire.TopicPub{Topic: "news", Data: packed(fmt.Sprint(i))})
	}
	pub.send(&wire.TopicPub{Topic: "news"}) // nil
	for _, p := range []*wsClient{one, two} {
		for i := range n {
			m := expect[*wire.TopicMessage](p)
			if string(m.Data) != string(packed(fmt.Sprint(i))) || m.Topic != "news" || m.PublisherID != "" || m.Timestamp == 0 {
				t.Fatalf("message %d: %+v", i, m)
			}
		}
		if m := expect[*wire.TopicMessage](p); len(m.Data) != 0 { // as nil is read
			t.Errorf("%+v", m)
		}
	}
	pub.ping()
	two.send(&wire.TopicUnsub{Topic: "news"})
	two.send(&wire.TopicUnsub{Topic: "none"})
	two.ping()
	pub.send(&wire.TopicPub{Topic: "news", Data: packed("last")})
	expect[*wire.TopicMessage](one)
	two.ping()
	// Nobody is left: fanout is told.
	for _, p := range []*wsClient{one, pub} {
		_ = p.conn.Close()
	}
	b.fanout.awaitTopic(t, "news", false)
	eventually(t, func() bool { return b.service.sockets.hub.topics.count() == 0 })
}

// A subscription that comes as its session begins to close leaves nothing behind.
func TestTopicOfAClosingSession(t *testing.T) {
	b := setup(t, nil, nil)
	b.hello(t)
	s := b.service.sockets.snapshot()[0]
	s.beginClose(closeIdle)
	if err := s.topicSubscribed(&wire.TopicSub{Topic: "news"}); err != nil {
		t.Error(err)
	}
	if n := b.service.sockets.hub.topics.count(); n != 0 {
		t.Errorf("%d topics", n)
	}
}

// RES-01: fanout takes so many topics and maps of a gateway, and would end the stream of
// all sessions over one more; its surplus is refused to who asks for it.
func TestWatchedIsBounded(t *testing.T) {
	b := setup(t, nil, func(b *bench) {
		hub := b.service.sockets.hub
		hub.most, hub.topics.most = 2, 2
	})
	p := b.hello(t)
	for i := range 3 {
		p.send(&wire.TopicSub{Topic: fmt.Sprint(i)})
	}
	if m := expect[*wire.ErrorMessage](p); m.Code != 429 || m.Message != gatewayTopics.Error() {
		t.Errorf("%+v", m)
	}
	p.synced("a", 0)
	p.synced("b", 0)
	greedy := b.hello(t)
	greedy.send(&wire.SyncInit{MapName: "c"})
	if m := expect[*wire.ErrorMessage](greedy); m.Code != 503 {
		t.Errorf("%+v", m)
	}
	b.partition.put("b", "k", packed("v"), stamp(5))
	if m := expect[*wire.ServerEvent](p); m.Key != "k" {
		t.Errorf("%+v", m)
	}
	p.send(&wire.TopicUnsub{Topic: "0"})
	b.fanout.awaitTopic(t, "0", false)
	p.send(&wire.TopicSub{Topic: "4"})
	p.ping()
	b.fanout.awaitTopic(t, "4", true)
}

// After the stream was lost, messages arrive again.
func TestTopicsAfterStreamLoss(t *testing.T) {
	b := setup(t, nil, nil)
	p, pub := b.hello(t), b.hello(t)
	p.send(&wire.TopicSub{Topic: "a"})
	b.fanout.awaitTopic(t, "a", true)
	b.fanout.setDown(true)
	b.fanout.cut()
	eventually(t, func() bool { return b.service.sockets.hub.ready() != nil })
	p.send(&wire.TopicSub{Topic: "b"}) // while it is away
	p.send(&wire.TopicSub{Topic: "c"})
	p.send(&wire.TopicUnsub{Topic: "c"})
	p.ping()
	b.fanout.setDown(false)
	b.fanout.awaitTopic(t, "a", true)
	b.fanout.awaitTopic(t, "b", true)
	b.fanout.awaitTopic(t, "c", false)
	for _, topic := range []string{"a", "b"} {
		pub.send(&wire.TopicPub{Topic: topic, Data: packed("x")})
		if m := expect[*wire.TopicMessage](p); m.Topic != topic {
			t.Errorf("%+v", m)
		}
	}
}

func TestTopicLimits(t *testing.T) {
	b := setup(t, func(c *Config) { c.MaxSubscriptions = 3 }, nil)
	p := b.hello(t)
	for i := range 3 {
		p.send(&wire.TopicSub{Topic: fmt.Sprint("t", i)})
	}
	p.send(&wire.TopicSub{Topic: "t1"}) // one that it has
	p.ping()
	for range 2 * maxErrors { // none counts as a bad message
		p.send(&wire.TopicSub{Topic: "more"})
		if m := expect[*wire.ErrorMessage](p); m.Code != 429 || !strings.HasPrefix(m.Message, "TOO_MANY_SUBS: ") {
			t.Errorf("%+v", m)
		}
	}
	for _, m := range []wire.Message{
		&wire.TopicSub{Topic: "a b"}, &wire.TopicSub{}, &wire.TopicPub{Topic: "../x", Data: packed("v")},
		&wire.TopicPub{Topic: "t", Data: packed(strings.Repeat("x", 256<<10))},
	} {
		p.send(m)
		if m := expect[*wire.ErrorMessage](p); m.Code != 400 && m.Code != 413 {
			t.Errorf("%+v", m)
		}
	}
}

// What a client publishes while as much as may wait does is refused; what was taken keeps
// its order.
func TestPublishQueueIsBounded(t *testing.T) {
	g := make(chan struct{})
	entered := make(chan struct{}, 1000)
	b := setup(t, func(c *Config) { c.QueueMessages = 2 * maxPublishes }, func(b *bench) {
		b.fanout.beforePublish = func(context.Context) error {
			entered <- struct{}{}
			<-g
			return nil
		}
	})
	p, pub := b.hello(t), b.hello(t)
	p.send(&wire.TopicSub{Topic: "t"})
	b.fanout.awaitTopic(t, "t", true)
	pub.send(&wire.TopicPub{Topic: "t", Data: packed("first")})
	<-entered
	for i := range maxPublishes + 3 {
		pub.send(&wire.TopicPub{Topic: "t", Data: packed(fmt.Sprint(i))})
	}
	for range 3 {
		if m := expect[*wire.ErrorMessage](pub); m.Code != 429 || !strings.HasPrefix(m.Message, "TOO_FAST: ") {
			t.Errorf("%+v", m)
		}
	}
	pub.ping() // while all of it waits
	close(g)
	expect[*wire.TopicMessage](p)
	for i := range maxPublishes {
		if m := expect[*wire.TopicMessage](p); string(m.Data) != string(packed(fmt.Sprint(i))) {
			t.Fatalf("message %d: %q", i, m.Data)
		}
	}
	p.ping()
}

// A publisher hears that fanout is away, once; its messages are lost and not repeated.
func TestPublishFails(t *testing.T) {
	var calls atomic.Int64
	b := setup(t, nil, func(b *bench) {
		b.fanout.beforePublish = func(context.Context) error {
			calls.Add(1)
			return connect.NewError(connect.CodeUnavailable, "away")
		}
	})
	pub := b.hello(t)
	for range 3 {
		pub.send(&wire.TopicPub{Topic: "t", Data: packed("x")})
	}
	if m := expect[*wire.ErrorMessage](pub); m.Code != 503 {
		t.Errorf("%+v", m)
	}
	s := b.service.sockets.snapshot()[0]
	eventually(t, func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return calls.Load() == 3 && !s.publishing.running
	})
	pub.ping() // no second error
	if n := calls.Load(); n != 3 {
		t.Errorf("%d calls", n)
	}
}

// A reader that is too slow loses messages, and nothing else.
func TestSlowReaderLosesMessages(t *testing.T) {
	b := setup(t, func(c *Config) { c.QueueBytes = 64 << 10; c.WriteTimeout = time.Minute }, nil)
	slow, other, pub := b.hello(t), b.hello(t), b.hello(t)
	b.narrow(t, slow)
	slow.send(&wire.TopicSub{Topic: "t"})
	other.send(&wire.TopicSub{Topic: "t"})
	slow.ping()
	other.ping()
	b.fanout.awaitTopic(t, "t", true)
	n := 0
	for ; b.service.sockets.meters.drops.Load() == 0; n++ {
		if n == 10_000 {
			t.Fatal("of 40 MB that a client does not read nothing was dropped")
		}
		pub.send(&wire.TopicPub{Topic: "t", Data: packed(strings.Repeat("x", 4000))})
		expect[*wire.TopicMessage](other)
	}
	for range n - int(b.service.sockets.meters.drops.Load()) {
		expect[*wire.TopicMessage](slow)
	}
	pub.send(&wire.TopicPub{Topic: "t", Data: packed("small")})
	if m := expect[*wire.TopicMessage](slow); string(m.Data) != string(packed("small")) {
		t.Errorf("%d bytes", len(m.Data))
	}
}

// publisherId is who the token says, not what the client says.
func TestPublisherID(t *testing.T) {
	a := setup(t, withAuth(nil), nil)
	sub, pub := a.login(t, "reader"), a.login(t, "writer")
	sub.send(&wire.TopicSub{Topic: "t"})
	a.fanout.awaitTopic(t, "t", true)
	pub.send(&wire.TopicPub{Topic: "t", Data: packed("x")})
	if m := expect[*wire.TopicMessage](sub); m.PublisherID != "writer" {
		t.Errorf("%+v", m)
	}
}
