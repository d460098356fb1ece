package commitlog

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"go.opentelemetry.io/otel/propagation"

	logv1 "github.com/topgun-sync/topgun/gen/go/topgun/log/v1"
)

const (
	// prefetchBytes and prefetchMessages bound what a reader holds that its loop has
	// not taken yet.
	prefetchBytes    = 16 << 20
	prefetchMessages = 1000
	// idleConsumer is how long the server remembers a reader that went away.
	idleConsumer = time.Minute
)

// Entry is one message of the log.
type Entry struct {
	// Sequence is its position in the stream.
	Sequence uint64
	// Lane is the lane it belongs to.
	Lane string
	// Commit is what was appended.
	Commit *logv1.Commit
	// Trace holds the trace context of the append; extract it with
	// propagation.TraceContext.
	Trace propagation.TextMapCarrier
	// Size is the length of the encoded commit in bytes.
	Size int
}

// Read yields the commits of all lanes in stream order, from the first whose
// sequence is at least from. Without follow it ends with the last one that was
// there when the loop began; with follow it goes on until ctx ends, whose error it
// then yields. Any error ends it. A message that is no commit of a known version is
// such an error, ErrUnreadable, and never skipped (LOG-07).
//
// A reader that fell silent or lost its connection goes on by itself where it was;
// an error means that this did not work, and reading may begin again.
func (l *Log) Read(ctx context.Context, from uint64, follow bool) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		last := uint64(0)
		if !follow {
			var err error
			if last, err = l.LastSequence(ctx); err != nil {
				yield(Entry{}, err)
				return
			}
			if from > last || last == 0 {
				return
			}
		}
		messages, err := l.messages(ctx, max(from, 1), false)
		if err != nil {
			yield(Entry{}, err)
			return
		}
		defer messages.Stop()
		for {
			entry, err := next(ctx, messages)
			if err != nil {
				yield(Entry{}, err)
				return
			}
			// The last message of the stream is the last of its lane, so it can only be
			// missing if its lane went on and was trimmed meanwhile.
			past := !follow && entry.Sequence > last
			if past || !yield(entry, nil) || !follow && entry.Sequence == last {
				return
			}
		}
	}
}

// messages reads the stream from a sequence on, with or without payloads.
func (l *Log) messages(ctx context.Context, from uint64, headersOnly bool) (jetstream.MessagesContext, error) {
	consumer, err := l.stream.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{
		DeliverPolicy:     jetstream.DeliverByStartSequencePolicy,
		OptStartSeq:       from,
		InactiveThreshold: idleConsumer,
		HeadersOnly:       headersOnly,
	})
	if err != nil {
		return nil, fmt.Errorf("read the log: %w", err)
	}
	messages, err := consumer.Messages(jetstream.PullMaxMessagesWithBytesLimit(prefetchMessages, prefetchBytes))
	if err != nil {
		return nil, fmt.Errorf("read the log: %w", err)
	}
	return messages, nil
}

func nextMessage(ctx context.Context, messages jetstream.MessagesContext) (jetstream.Msg, *jetstream.MsgMetadata, error) {
	msg, err := messages.Next(jetstream.NextContext(ctx))
	if err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, nil, fmt.Errorf("read the log: %w", err)
	}
	meta, err := msg.Metadata()
	if err != nil {
		return nil, nil, fmt.Errorf("read the log: %w", err)
	}
	return msg, meta, nil
}

func next(ctx context.Context, messages jetstream.MessagesContext) (Entry, error) {
	msg, meta, err := nextMessage(ctx, messages)
	if err != nil {
		return Entry{}, err
	}
	lane, ok := strings.CutPrefix(msg.Subject(), subjectPrefix)
	if !ok || lane == "" {
		return Entry{}, errors.Join(fmt.Errorf("sequence %d", meta.Sequence.Stream), ErrUnreadable)
	}
	commit, err := unmarshal(lane, msg.Data())
	if err != nil {
		return Entry{}, fmt.Errorf("read sequence %d of the log: %w", meta.Sequence.Stream, err)
	}
	return Entry{
		Sequence: meta.Sequence.Stream,
		Lane:     lane,
		Commit:   commit,
		Trace:    carrier(msg.Headers()),
		Size:     len(msg.Data()),
	}, nil
}
