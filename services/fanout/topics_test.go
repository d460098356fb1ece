package fanout_test

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/proto"

	"github.com/topgun-sync/topgun/core/msgval"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	"github.com/topgun-sync/topgun/services/fanout"
)

func (g *gateway) topics(add, remove []string) error {
	_, err := g.client.Watch(context.Background(), &fanoutv1.WatchRequest{StreamId: g.id, AddTopics: add, RemoveTopics: remove})
	return err
}

// say publishes a number on a topic.
func (r *room) say(topic string, n uint64) {
	r.t.Helper()
	if err := r.publishTopic(&fanoutv1.TopicMessage{Topic: topic, Data: msgval.AppendUint(nil, n), PublisherId: "p", Origin: "o", Millis: n}); err != nil {
		r.t.Fatal(err)
	}
}

func (r *room) publishTopic(message *fanoutv1.TopicMessage) error {
	_, err := r.client.Publish(context.Background(), &fanoutv1.PublishRequest{Message: message})
	return err
}

func TestTopicsReachThoseWhoWatch(t *testing.T) {
	inBubble(t, func(t *testing.T, r *room) {
		a, b, idle := r.subscribe("a").read(), r.subscribe("b").read(), r.subscribe("idle").read()
		for _, g := range []*gateway{a, b} {
			if err := g.topics([]string{"news", "x/y:z"}, nil); err != nil {
				t.Fatal(err)
			}
		}
		if err := b.topics(nil, []string{"x/y:z", "never"}); err != nil {
			t.Fatal(err)
		}
		var all, news []string
		for n := range uint64(100) {
			topic := []string{"news", "x/y:z"}[n%2]
			r.say(topic, n)
			all = append(all, fmt.Sprintf("topic %s %d p o", topic, n))
			if n%2 == 0 {
				news = append(news, all[n])
			}
		}
		r.say("nobody", 1)
		a.want(all...)
		b.want(news...)
		idle.want()

		// A map of the same name is something else.
		a.watch("news")
		r.publish("news", 0, "l", 1)
		a.want("news/0/1")
		b.want()
	})
}

// The interest returns to nothing, also when a Watch fails.
func TestTopicInterest(t *testing.T) {
	inBubble(t, func(t *testing.T, r *room) {
		g, h := r.subscribe("g").read(), r.subscribe("h").read()
		if err := g.topics([]string{"a", "b", "b"}, nil); err != nil {
			t.Fatal(err)
		}
		if err := h.topics([]string{"b"}, nil); err != nil {
			t.Fatal(err)
		}
		topics := func() uint32 {
			response, err := r.client.Describe(t.Context(), &fanoutv1.DescribeRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if n := uint32(r.bus.Topics()); n != response.GetTopics() {
				t.Errorf("%d subscriptions for %d topics", n, response.GetTopics())
			}
			return response.GetTopics()
		}
		if n := topics(); n != 2 {
			t.Errorf("%d topics, want 2", n)
		}
		r.bus.SetReady(context.DeadlineExceeded)
		if err := g.topics([]string{"c"}, nil); connect.CodeOf(err) != connect.CodeUnavailable {
			t.Errorf("got %v, want unavailable", err)
		}
		r.bus.SetReady(nil)
		if n := topics(); n != 2 {
			t.Errorf("%d topics after a Watch that failed, want 2", n)
		}
		g.close()
		synctest.Wait()
		if n := topics(); n != 1 {
			t.Errorf("%d topics, want 1", n)
		}
		if err := h.topics(nil, []string{"b"}); err != nil {
			t.Fatal(err)
		}
		if n := topics(); n != 0 {
			t.Errorf("%d topics, want 0", n)
		}
	})
}

// A full queue costs topic messages first, and never a Gap because of them.
func TestTopicsGiveWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := fanout.DefaultConfig()
		config.QueueEvents = 10
		r := open(t, config, fanout.Deps{})
		slow := r.subscribe("slow")
		slow.watch("m")
		if err := slow.topics([]string{"t"}, nil); err != nil {
			t.Fatal(err)
		}
		r.publish("m", 0, "l", 1) // taken by the sender
		synctest.Wait()
		for n := range uint64(100) {
			r.say("t", n)
		}
		synctest.Wait()
		r.publish("m", 0, "l", 2)
		r.publish("m", 0, "l", 3)
		synctest.Wait()
		r.say("t", 100)
		synctest.Wait()
		slow.read()
		slow.want("m/0/1", "m/0/2", "m/0/3", "topic t 100 p o")
		r.say("t", 101)
		slow.want("topic t 101 p o")
	})
}

func TestPublishRefusals(t *testing.T) {
	inBubble(t, func(t *testing.T, r *room) {
		g := r.subscribe("g").read()
		value := func(n int) []byte { return msgval.AppendBin(nil, bytes.Repeat([]byte{1}, n-5)) }
		for name, test := range map[string]struct {
			message *fanoutv1.TopicMessage
			text    string
		}{
			"no message":      {nil, "names of topics"},
			"no name":         {&fanoutv1.TopicMessage{Data: []byte{1}}, "names of topics"},
			"long name":       {&fanoutv1.TopicMessage{Topic: strings.Repeat("t", 257), Data: []byte{1}}, "names of topics"},
			"two dots":        {&fanoutv1.TopicMessage{Topic: "a..b", Data: []byte{1}}, "names of topics"},
			"space":           {&fanoutv1.TopicMessage{Topic: "a b", Data: []byte{1}}, "names of topics"},
			"umlaut":          {&fanoutv1.TopicMessage{Topic: "ä", Data: []byte{1}}, "names of topics"},
			"wildcard":        {&fanoutv1.TopicMessage{Topic: "a.*", Data: []byte{1}}, "names of topics"},
			"no data":         {&fanoutv1.TopicMessage{Topic: "t"}, "one msgpack value"},
			"two values":      {&fanoutv1.TopicMessage{Topic: "t", Data: []byte{1, 1}}, "one msgpack value"},
			"truncated":       {&fanoutv1.TopicMessage{Topic: "t", Data: []byte{0xa5, 'x'}}, "one msgpack value"},
			"large":           {&fanoutv1.TopicMessage{Topic: "t", Data: value(256<<10 + 1)}, "at most 256 KiB"},
			"long origin":     {&fanoutv1.TopicMessage{Topic: "t", Data: []byte{1}, Origin: strings.Repeat("o", 129)}, "origin at most"},
			"long publisher":  {&fanoutv1.TopicMessage{Topic: "t", Data: []byte{1}, PublisherId: strings.Repeat("o", 4097)}, "publisher_id must"},
			"largest":         {&fanoutv1.TopicMessage{Topic: "t", Data: value(256 << 10)}, ""},
			"every character": {&fanoutv1.TopicMessage{Topic: "AZaz09_.:/-", Data: []byte{1}}, ""},
			"longest name":    {&fanoutv1.TopicMessage{Topic: strings.Repeat("t", 256), Data: []byte{1}}, ""},
		} {
			err := r.publishTopic(test.message)
			switch {
			case test.text == "" && err != nil:
				t.Errorf("%s: %v", name, err)
			case test.text != "" && (connect.CodeOf(err) != connect.CodeInvalidArgument || !strings.Contains(err.Error(), test.text)):
				t.Errorf("%s: got %v, want invalid_argument: %s", name, err, test.text)
			}
		}
		for _, list := range [][2][]string{{{"a..b"}, nil}, {nil, {""}}} {
			if err := g.topics(list[0], list[1]); connect.CodeOf(err) != connect.CodeInvalidArgument {
				t.Errorf("watch of %q: got %v, want invalid_argument", list, err)
			}
		}
		if err := r.stop(); err != nil {
			t.Fatal(err)
		}
		if err := r.publishTopic(&fanoutv1.TopicMessage{Topic: "t", Data: []byte{1}}); connect.CodeOf(err) != connect.CodeUnavailable {
			t.Errorf("after the end: got %v, want unavailable", err)
		}
	})
}

func TestTooManyTopics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := fanout.DefaultConfig()
		config.MaxTopicsPerStream = 2
		r := open(t, config, fanout.Deps{})
		g := r.subscribe("g").read()
		if err := g.topics([]string{"a"}, nil); err != nil {
			t.Fatal(err)
		}
		if err := g.topics([]string{"b", "c"}, nil); connect.CodeOf(err) != connect.CodeResourceExhausted {
			t.Errorf("got %v, want resource_exhausted", err)
		}
		if n := r.bus.Topics(); n != 1 {
			t.Errorf("%d topics are watched, want 1", n)
		}
	})
}

// A topic is lost silently, an event is not.
func TestTopicLossIsNoGap(t *testing.T) {
	inBubble(t, func(t *testing.T, r *room) {
		g := r.subscribe("g").read()
		if err := g.topics([]string{"t"}, nil); err != nil {
			t.Fatal(err)
		}
		r.bus.DropIf(func(proto.Message) bool { return true })
		r.say("t", 1)
		r.bus.DropIf(nil)
		r.bus.Lose()
		g.want()
		r.say("t", 2)
		if got := g.take(); !slices.Equal(got, []string{"topic t 2 p o"}) {
			t.Errorf("got %v", got)
		}
	})
}
