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
	// idleConsumer is how long the server remembers a reader that went away without a
	// word: its process died, or the server could not be reached.
	idleConsumer = time.Minute
	// beginTime bounds how long a reader waits for the server to take it up.
	beginTime = 5 * time.Second
	// forgetTime bounds how long the end of a reader waits for the server to forget it.
	forgetTime = 2 * time.Second
	// resets is how often in a row a reader tries to go on where it was, a second apart.
	// The client does not look at the context meanwhile, so this also bounds for how
	// long a reader outlives it: a second if the server refuses, 21 if it is silent.
	resets = 2
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
// an error means that this did not work, and reading may begin again. However the loop
// ends, the server has forgotten the reader before it does, if it can be reached.
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
		messages, stop, err := l.messages(ctx, max(from, 1), false)
		if err != nil {
			yield(Entry{}, err)
			return
		}
		defer stop()
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

// messages reads the stream from a sequence on, with or without payloads, until stop
// is called.
func (l *Log) messages(ctx context.Context, from uint64, headersOnly bool) (messages jetstream.MessagesContext, stop func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, fmt.Errorf("read the log: %w", err)
	}
	// Whoever stops waiting for the server's answer cannot have the consumer deleted: it
	// may be made later than the request to delete it is answered.
	begin, cancel := context.WithTimeout(context.WithoutCancel(ctx), beginTime)
	defer cancel()
	consumer, err := l.stream.OrderedConsumer(begin, jetstream.OrderedConsumerConfig{
		DeliverPolicy:     jetstream.DeliverByStartSequencePolicy,
		OptStartSeq:       from,
		InactiveThreshold: idleConsumer,
		HeadersOnly:       headersOnly,
		MaxResetAttempts:  resets,
	})
	if err != nil {
		return nil, nil, fmt.Errorf("read the log: %w", err)
	}
	messages, err = consumer.Messages(jetstream.PullMaxMessagesWithBytesLimit(prefetchMessages, prefetchBytes))
	if err != nil {
		l.forget(ctx, consumer.CachedInfo().Name)
		return nil, nil, fmt.Errorf("read the log: %w", err)
	}
	return messages, func() {
		messages.Stop()
		l.forget(ctx, consumer.CachedInfo().Name)
	}, nil
}

// forget makes the server drop a consumer, which costs it memory and goroutines until
// then. Stopping the client's side does not: the server would keep it for idleConsumer,
// which is also what happens if it cannot be reached.
func (l *Log) forget(ctx context.Context, consumer string) {
	if !l.js.Conn().IsConnected() {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), forgetTime)
	defer cancel()
	_ = l.stream.DeleteConsumer(ctx, consumer) // see above
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
