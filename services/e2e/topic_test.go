package e2e

import (
	"testing"

	"github.com/topgun-sync/topgun/client"
	"github.com/topgun-sync/topgun/core/wire"
)

// Messages of a topic reach every other subscriber, at every gateway, in the order
// they were published in.
func topics(t *testing.T, c Cluster) {
	const topic = "room/1:news"
	publisher, near, far := dial(t, c, 0).hello(), dial(t, c, 0).hello(), dial(t, c, 1).hello()
	pl, nl, fl := publisher.listen(), near.listen(), far.listen()
	for _, conn := range []*conn{publisher, near, far} {
		conn.send(&wire.TopicSub{Topic: topic})
	}
	// A subscription has no answer: it is in force when a message comes through.
	probe := dial(t, c, 1).hello()
	for _, l := range []*listener{pl, nl, fl} {
		eventually(t, deadline, func() error {
			probe.send(&wire.TopicPub{Topic: topic, Data: encode("probe")})
			if len(received[*wire.TopicMessage](l)) == 0 {
				return errNothingYet
			}
			return nil
		})
	}
	const messages = 200
	for i := range messages {
		publisher.send(&wire.TopicPub{Topic: topic, Data: encode(i)})
		publisher.send(&wire.TopicPub{Topic: topic + "/other", Data: encode("other")})
	}
	numbers := func(l *listener) (n []int64) {
		for _, m := range received[*wire.TopicMessage](l) {
			if m.Topic != topic {
				t.Fatalf("a message of topic %q", m.Topic)
			}
			if v, err := client.DecodeValue(m.Data); err == nil && v != "probe" {
				n = append(n, v.(int64))
			}
		}
		return n
	}
	for _, l := range []*listener{nl, fl} {
		eventually(t, deadline, func() error {
			if len(numbers(l)) < messages {
				return errNothingYet
			}
			return nil
		})
		for i, n := range numbers(l) {
			if n != int64(i) {
				t.Fatalf("message %d comes at place %d", n, i)
			}
		}
	}
	if len(numbers(pl)) != 0 {
		t.Error("the publisher got its own messages")
	}
	near.send(&wire.TopicUnsub{Topic: topic})
	near.send(wire.PingAt(now()))
	await(t, nl, func(*wire.Pong) bool { return true })
	before := len(received[*wire.TopicMessage](nl))
	publisher.send(&wire.TopicPub{Topic: topic, Data: encode(messages)})
	eventually(t, deadline, func() error {
		if len(numbers(fl)) != messages+1 {
			return errNothingYet
		}
		return nil
	})
	if got := len(received[*wire.TopicMessage](nl)); got != before {
		t.Error("a message came after the subscription had ended")
	}
	for _, name := range []string{"", "a b", "*", ">", "a..b", "$SYS"} {
		conn := dial(t, c, 0).hello()
		conn.send(&wire.TopicSub{Topic: name})
		if m, ok := conn.next().(*wire.ErrorMessage); !ok || m.Code != 400 {
			t.Errorf("topic %q: want ERROR 400", name)
		}
	}
}
