package commitlog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.opentelemetry.io/otel/propagation"
	"google.golang.org/protobuf/proto"

	logv1 "github.com/topgun-sync/topgun/gen/go/topgun/log/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

const (
	// version is the format of the commits written here.
	version = 1
	// answerTimeout is how long an answer of the stream is waited for before the
	// lane's end is read instead. An answer that a broker took with it when it went
	// away never comes, and no write passes until then, so it is short; where a disk
	// merely needs longer, asking again costs a message that the stream refuses.
	answerTimeout = time.Second
	// headerBytes is room for a message's headers, which count as payload.
	headerBytes = 1024
	// codeStoreFailed, codeNoResources and codeNoStorage are JetStream's error
	// codes for messages that it did not store.
	codeStoreFailed = 10077
	codeNoResources = 10023
	codeNoStorage   = 10047
	// maximumBytes is the text that tells a full stream from a broken disk under
	// codeStoreFailed.
	maximumBytes = "maximum bytes exceeded"
)

// Lane is the writer's end of one lane. It is not safe for concurrent use: one
// append at a time is what makes the fence hold, since after a seal only the first
// of several appends sent ahead would be refused.
type Lane struct {
	log    *Log
	name   string
	last   uint64 // sequence of the lane's last commit, 0 before the first
	number uint64 // number of the last commit
	sealed bool
}

// OpenLane returns the writer of a lane that nobody ever wrote. The name must be
// of this process's life alone: letters, digits, '-' and '_'.
func (l *Log) OpenLane(name string) (*Lane, error) {
	if err := checkLane(name); err != nil {
		return nil, err
	}
	return &Lane{log: l, name: name}, nil
}

// Name is the name of the lane.
func (ln *Lane) Name() string { return ln.name }

// Append adds a commit to the lane and returns its sequence in the stream. It sets
// the commit's version, lane and number. The trace context of ctx travels with it.
//
// After ErrFull and ErrTooLarge the commit is not in the log. ErrSealed ends the
// lane; the commit may be the last one before the seal or not be there. Any other
// error is the context's, and the outcome is unknown: Append of the same commit
// settles it, and nothing else may be appended before. Append a Seal to close
// one's own lane.
func (ln *Lane) Append(ctx context.Context, commit *logv1.Commit) (sequence uint64, err error) {
	if ln.sealed {
		return 0, ErrSealed
	}
	commit.Version, commit.Lane, commit.Number = version, ln.name, ln.number+1
	data, err := marshal(commit)
	if err != nil {
		return 0, fmt.Errorf("encode a commit: %w", err)
	}
	if int64(len(data)) > min(MaxCommitBytes, ln.log.maxPayload-headerBytes) {
		return 0, ErrTooLarge
	}
	sequence, err = ln.log.appendFenced(ctx, ln.name, data, ln.last)
	switch {
	case err == nil:
		ln.last, ln.number = sequence, ln.number+1
		ln.sealed = commit.GetSeal() != nil
		return sequence, nil
	case errors.Is(err, errMoved):
		ln.sealed = true
		return 0, ErrSealed
	}
	return 0, err
}

// Check returns ErrSealed if the lane was closed to its writer, as the stream's
// leader knows it: how a writer that has nothing to append notices. Any other error
// says nothing about the lane.
func (ln *Lane) Check(ctx context.Context) error {
	if ln.sealed {
		return ErrSealed
	}
	last, err := ln.log.tail(ctx, ln.name)
	if err != nil {
		return err
	}
	if last.sequence != ln.last {
		ln.sealed = true
		return ErrSealed
	}
	return nil
}

// errMoved means that the lane does not end where the append expected.
var errMoved = errors.New("the lane has moved on")

// appendFenced appends data to a lane that ends at the sequence expected, and
// settles unknown outcomes by reading the lane's end (LOG-08). The server compares
// the expectation, so sending the same bytes again adds them at most once.
func (l *Log) appendFenced(ctx context.Context, lane string, data []byte, expected uint64) (uint64, error) {
	msg := &nats.Msg{Subject: subjectPrefix + lane, Data: data, Header: nats.Header{}}
	msg.Header.Set(jetstream.ExpectedStreamHeader, l.name)
	msg.Header.Set(jetstream.ExpectedLastSubjSeqHeader, strconv.FormatUint(expected, 10))
	propagation.TraceContext{}.Inject(ctx, carrier(msg.Header))

	unknown := false // an earlier attempt may still be stored
	for attempt := 0; ; attempt++ {
		ack, err := l.send(ctx, msg)
		if err == nil {
			return ack.Sequence, nil
		}
		if ctx.Err() != nil {
			return 0, fmt.Errorf("append to lane %s: %w", lane, ctx.Err())
		}
		if errors.Is(err, ErrFull) && !unknown {
			return 0, ErrFull
		}
		unknown = unknown || !errors.Is(err, ErrFull) && !errors.Is(err, errMoved)
		end, err := l.tail(ctx, lane)
		switch {
		case err != nil:
			// The log cannot be asked: ask again.
		case end.sequence > expected && bytes.Equal(end.data, data):
			return end.sequence, nil
		case end.sequence != expected:
			return 0, errMoved
		}
		// The lane ends where it did: the message was lost, or is on its way still.
		if err := sleep(ctx, retryWait(attempt)); err != nil {
			return 0, fmt.Errorf("append to lane %s: %w", lane, err)
		}
	}
}

// send publishes once. ErrFull and errMoved say that the stream refused; every
// other error leaves the outcome open.
func (l *Log) send(ctx context.Context, msg *nats.Msg) (*jetstream.PubAck, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	ack, err := l.publish(ctx, msg)
	var api *jetstream.APIError
	if !errors.As(err, &api) {
		return ack, err
	}
	switch api.ErrorCode {
	case jetstream.JSErrCodeStreamWrongLastSequence, jetstream.JSErrCodeStreamWrongLastSequenceConstant:
		return nil, errMoved
	case codeNoResources, codeNoStorage:
		return nil, ErrFull
	case codeStoreFailed:
		if api.Description == maximumBytes {
			return nil, ErrFull
		}
	}
	return nil, err
}

// end is the last message of a lane; sequence is 0 when there is none.
type end struct {
	sequence uint64
	data     []byte
}

// tail reads the end of a lane from the stream's leader.
func (l *Log) tail(ctx context.Context, lane string) (end, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	msg, err := l.stream.GetLastMsgForSubject(ctx, subjectPrefix+lane)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return end{}, nil
	}
	if err != nil {
		return end{}, fmt.Errorf("read the end of lane %s: %w", lane, err)
	}
	return end{sequence: msg.Sequence, data: msg.Data}, nil
}

// Seal closes somebody's lane: from then on every append of its writer is refused.
// It returns the lane's clock ceiling, nil if the lane was empty; the next owner of
// its shards starts its arrival clock above it. Sealing a sealed lane changes
// nothing.
func (l *Log) Seal(ctx context.Context, lane string, by *logv1.Seal) (ceiling *typesv1.Arrival, err error) {
	if err := checkLane(lane); err != nil {
		return nil, err
	}
	for {
		last, err := l.tail(ctx, lane)
		if err != nil {
			return nil, fmt.Errorf("seal lane %s: %w", lane, err)
		}
		seal := &logv1.Commit{Version: version, Lane: lane, Number: 1, Body: &logv1.Commit_Seal{Seal: by}}
		if last.sequence != 0 {
			commit, err := unmarshal(lane, last.data)
			if err != nil {
				return nil, fmt.Errorf("seal lane %s: %w", lane, err)
			}
			if commit.GetSeal() != nil {
				return commit.GetClockCeiling(), nil
			}
			seal.Number, seal.ClockCeiling = commit.GetNumber()+1, commit.GetClockCeiling()
		}
		data, err := marshal(seal)
		if err != nil {
			return nil, fmt.Errorf("encode a seal: %w", err)
		}
		_, err = l.appendFenced(ctx, lane, data, last.sequence)
		switch {
		case err == nil:
			return seal.GetClockCeiling(), nil
		case !errors.Is(err, errMoved):
			return nil, fmt.Errorf("seal lane %s: %w", lane, err)
		}
		// Its writer was faster: seal behind what it wrote.
	}
}

// marshal is deterministic, so that the same commit is recognised by its bytes.
func marshal(commit *logv1.Commit) ([]byte, error) {
	return proto.MarshalOptions{Deterministic: true}.Marshal(commit)
}

// unmarshal decodes a message of a lane and checks that it may be read (LOG-07).
func unmarshal(lane string, data []byte) (*logv1.Commit, error) {
	commit := new(logv1.Commit)
	if err := proto.Unmarshal(data, commit); err != nil {
		return nil, fmt.Errorf("%w: not a commit", ErrUnreadable)
	}
	switch {
	case commit.GetVersion() != version:
		return nil, fmt.Errorf("%w: version %d, this program knows %d", ErrUnreadable, commit.GetVersion(), version)
	case commit.GetLane() != lane:
		return nil, fmt.Errorf("%w: a commit of another lane", ErrUnreadable)
	case commit.GetNumber() == 0 || commit.GetBody() == nil:
		return nil, fmt.Errorf("%w: a commit without number or body", ErrUnreadable)
	}
	return commit, nil
}

// carrier carries trace context in the header of a message, whose keys, unlike
// HTTP's, are used as written.
type carrier nats.Header

func (c carrier) Get(key string) string { return nats.Header(c).Get(key) }
func (c carrier) Set(key, value string) { nats.Header(c).Set(key, value) }
func (c carrier) Keys() []string {
	keys := make([]string, 0, len(c))
	for key := range c {
		keys = append(keys, key)
	}
	return keys
}
