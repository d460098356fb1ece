package fanout

import (
	"context"
	"errors"
	"fmt"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/protobuf/proto"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	"github.com/topgun-sync/topgun/services/internal/bus"
)

// watchTopicLocked makes the stream watch a topic, if it does not yet.
func (s *Service) watchTopicLocked(st *stream, topic string) (fresh bool, err error) {
	if _, ok := st.topics[topic]; ok {
		return false, nil
	}
	if len(st.topics) >= s.config.MaxTopicsPerStream {
		return false, errTooManyTopics
	}
	w := s.topics[topic]
	if w == nil {
		subscription, err := s.bus.SubscribeTopic(topic, s.onTopic)
		if err != nil {
			return false, fmt.Errorf("%w: %w", errBus, err)
		}
		w = &watchedTopic{streams: make(map[*stream]struct{}), subscription: subscription}
		s.topics[topic] = w
	}
	w.streams[st] = struct{}{}
	st.topics[topic] = struct{}{}
	return true, nil
}

// unwatchTopicLocked undoes watchTopicLocked; the last stream takes the subscription
// along.
func (s *Service) unwatchTopicLocked(st *stream, topic string) {
	if _, ok := st.topics[topic]; !ok {
		return
	}
	delete(st.topics, topic)
	w := s.topics[topic]
	delete(w.streams, st)
	if len(w.streams) == 0 {
		delete(s.topics, topic)
		s.unsubscribe(w.subscription)
	}
}

// publish sends a message that the edge has checked to all that watch its topic,
// wherever they are; the service's own streams get it from the bus too, so that all
// see the messages of a publisher in one order.
func (s *Service) publish(ctx context.Context, message *fanoutv1.TopicMessage) error {
	s.mu.Lock()
	running := s.running
	s.mu.Unlock()
	if !running {
		return errNotRunning
	}
	if err := s.bus.PublishTopic(ctx, message); err != nil {
		if errors.Is(err, bus.ErrTooLarge) {
			return fmt.Errorf("%w: %w", errBigMessage, err)
		}
		return fmt.Errorf("%w: %w", errBus, err)
	}
	return nil
}

// onTopic takes a message from the bus and queues it for the streams that watch its
// topic. The message is built once and shared; nobody changes it.
func (s *Service) onTopic(ctx context.Context, message *fanoutv1.TopicMessage) {
	ctx, span := s.tracer.Start(ctx, "fanout.topic", trace.WithSpanKind(trace.SpanKindConsumer))
	defer span.End()
	response := &fanoutv1.SubscribeResponse{Message: &fanoutv1.SubscribeResponse_TopicMessage{TopicMessage: message}}
	size := proto.Size(message)
	s.meters.topicsIn.Add(ctx, 1)

	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.topics[message.GetTopic()]
	if w == nil {
		return // on its way when the last stream lost interest
	}
	if span.IsRecording() {
		span.SetAttributes(attribute.Int("streams", len(w.streams)))
	}
	for st := range w.streams {
		st.pushTopic(response, size)
	}
}
