package commitlog

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// StreamName is the stream's name unless a deployment needs another.
const StreamName = "TOPGUN_LOG"

const (
	// subjectPrefix and a lane name make the subject of the lane.
	subjectPrefix = "topgun.log."
	subjects      = subjectPrefix + "*"
	// metadataHistory names the log for ever: a stream that was lost and made again
	// has another one, so positions in the old one are recognised (LOG-04).
	metadataHistory = "topgun_history"
	// metadataShards is the number of shards of the cluster.
	metadataShards = "topgun_shards"

	// MaxCommitBytes bounds one commit. It stays below the smallest max_payload that
	// servers come with, 1 MiB, and above one op of the largest size.
	MaxCommitBytes = 768 << 10

	// maxShards is the number of partitions: more shards would be empty.
	maxShards = 271
)

var (
	// ErrSealed means that the lane is closed to its writer, or was never its own:
	// somebody sealed it, or wrote to it. Nothing can be appended any more.
	ErrSealed = errors.New("the lane is sealed")
	// ErrFull means that the log has reached its size bound. The commit was not
	// appended; the same commit may be tried again once the log was drained.
	ErrFull = errors.New("the log is full")
	// ErrTooLarge means that a commit exceeds MaxCommitBytes. It was not appended.
	ErrTooLarge = errors.New("the commit is larger than the log takes")
	// ErrUnreadable means that a message of the log is not a commit of a version
	// that this program knows, or not where it belongs (LOG-07).
	ErrUnreadable = errors.New("the log holds a message that cannot be read")
	// ErrWeak means that the stream exists and promises less than asked for (LOG-05).
	ErrWeak = errors.New("the log's stream is weaker than configured")
)

// Config says what the stream is like. It is made with these settings if there is
// none.
type Config struct {
	// Stream is the name of the stream, for example "TOPGUN_LOG".
	Stream string
	// MaxBytes bounds the stream; appends are refused beyond it. Used when the
	// stream is made.
	MaxBytes int64
	// Replicas is on how many servers the stream is, at least.
	Replicas int
	// Memory keeps the stream in the server's memory: a restart of the server loses
	// it.
	Memory bool
	// Shards is the number of shards of the cluster. Used when the stream is made;
	// Log.Shards says what holds.
	Shards int
}

// Validate says what is wrong with the configuration.
func (c Config) Validate() error {
	switch {
	case c.Stream == "" || strings.ContainsAny(c.Stream, " \t\r\n.*>/\\"):
		return errors.New("log: the stream needs a name without spaces, dots, wildcards and slashes")
	case c.MaxBytes < 2*MaxCommitBytes:
		return fmt.Errorf("log: max bytes must be at least %d", 2*MaxCommitBytes)
	case c.Replicas < 1 || c.Replicas > 5:
		return errors.New("log: replicas must be 1 to 5")
	case c.Shards < 1 || c.Shards > maxShards:
		return fmt.Errorf("log: shards must be 1 to %d", maxShards)
	}
	return nil
}

// Log is the opened log. Its methods may be called concurrently.
type Log struct {
	js      jetstream.JetStream
	stream  jetstream.Stream
	owners  jetstream.KeyValue
	name    string
	history string
	shards  int
	memory  bool
	// maxPayload is what the server takes in one message.
	maxPayload int64
	// publish sends a message and waits for the stream's answer. It is a field so
	// that tests lose messages and answers.
	publish func(context.Context, *nats.Msg) (*jetstream.PubAck, error)
}

// Open makes the stream and the ownership bucket, or checks that those which exist
// keep the promises of this package; ErrWeak says which they do not.
func Open(ctx context.Context, nc *nats.Conn, config Config) (*Log, error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, fmt.Errorf("open the log: %w", err)
	}
	l := &Log{js: js, name: config.Stream, memory: config.Memory, maxPayload: nc.MaxPayload()}
	l.publish = func(ctx context.Context, m *nats.Msg) (*jetstream.PubAck, error) {
		return js.PublishMsg(ctx, m)
	}
	if l.stream, err = openStream(ctx, js, streamConfig(config)); err != nil {
		return nil, fmt.Errorf("open the log: %w", err)
	}
	if err := l.check(config); err != nil {
		return nil, fmt.Errorf("open the log: %w", err)
	}
	if l.owners, err = openOwners(ctx, js, config); err != nil {
		return nil, fmt.Errorf("open the ownership bucket: %w", err)
	}
	return l, nil
}

func streamConfig(config Config) jetstream.StreamConfig {
	storage := jetstream.FileStorage
	if config.Memory {
		storage = jetstream.MemoryStorage
	}
	return jetstream.StreamConfig{
		Name:        config.Stream,
		Description: "TopGun write-behind log",
		Subjects:    []string{subjects},
		Retention:   jetstream.LimitsPolicy,
		Discard:     jetstream.DiscardNew,
		MaxBytes:    config.MaxBytes,
		Storage:     storage,
		Replicas:    config.Replicas,
		DenyDelete:  true,
		// Direct reads may be answered by a follower that is behind.
		AllowDirect: false,
		Metadata: map[string]string{
			metadataHistory: uuid.NewString(),
			metadataShards:  strconv.Itoa(config.Shards),
		},
	}
}

// openStream returns the stream, made with the configuration if there is none. Of
// several processes that make it at once one succeeds; the others open its.
func openStream(ctx context.Context, js jetstream.JetStream, config jetstream.StreamConfig) (jetstream.Stream, error) {
	stream, err := js.Stream(ctx, config.Name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		stream, err = js.CreateStream(ctx, config)
		if errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) {
			stream, err = js.Stream(ctx, config.Name)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("stream %s: %w", config.Name, err)
	}
	return stream, nil
}

// check compares the stream with what the package promises, and takes over its
// identity.
func (l *Log) check(want Config) error {
	have := l.stream.CachedInfo().Config
	weak := func(what string) error { return fmt.Errorf("%w: %s", ErrWeak, what) }
	switch {
	case have.Storage == jetstream.MemoryStorage && !want.Memory:
		return weak("it is kept in memory, not in files")
	case have.Replicas < want.Replicas:
		return weak(fmt.Sprintf("it has %d replicas, want %d", have.Replicas, want.Replicas))
	case have.Retention != jetstream.LimitsPolicy:
		return weak("its retention must be limits: other policies remove what was read")
	case have.Discard != jetstream.DiscardNew:
		return weak("it discards old messages when full; discard must be new")
	case have.MaxAge != 0:
		return weak("it removes messages by age; max age must be 0")
	case have.MaxMsgs > 0 || have.MaxMsgsPerSubject > 0:
		return weak("it bounds the number of messages; only max bytes may")
	case !have.DenyDelete:
		return weak("messages can be deleted from it; deny delete must be set")
	case have.AllowDirect:
		return weak("it allows direct reads, which followers answer; allow direct must be off")
	case have.PersistMode == jetstream.AsyncPersistMode:
		return weak("its persist mode is async")
	case have.Sealed || have.Mirror != nil || len(have.Sources) > 0:
		return weak("it must be neither sealed nor fed by other streams")
	case !slices.Contains(have.Subjects, subjects):
		return weak("it does not take the subjects " + subjects)
	}
	l.memory = have.Storage == jetstream.MemoryStorage
	l.history = have.Metadata[metadataHistory]
	shards, err := strconv.Atoi(have.Metadata[metadataShards])
	if l.history == "" || err != nil || shards < 1 || shards > maxShards {
		return weak("its metadata does not name a history and a number of shards: it was not made by TopGun")
	}
	l.shards = shards
	return nil
}

// History identifies the log: sequences of another history mean nothing here.
func (l *Log) History() string { return l.history }

// Shards is the number of shards of the cluster, as decided when the log was made.
func (l *Log) Shards() int { return l.shards }

// Memory reports whether the log is lost when its server restarts.
func (l *Log) Memory() bool { return l.memory }

// LastSequence is the sequence of the newest message, 0 when nothing was ever
// appended. The stream's leader answers.
func (l *Log) LastSequence(ctx context.Context) (uint64, error) {
	info, err := l.stream.Info(ctx)
	if err != nil {
		return 0, fmt.Errorf("read the state of the log: %w", err)
	}
	return info.State.LastSeq, nil
}

// Trim removes the commits of a lane below the sequence upTo, which must be stored.
// It never removes the last one: without it anybody's append would fit (LOG-03).
func (l *Log) Trim(ctx context.Context, lane string, upTo uint64) error {
	if err := checkLane(lane); err != nil {
		return err
	}
	last, err := l.tail(ctx, lane)
	if err != nil {
		return fmt.Errorf("trim lane %s: %w", lane, err)
	}
	upTo = min(upTo, last.sequence)
	if upTo <= 1 {
		return nil
	}
	err = l.stream.Purge(ctx, jetstream.WithPurgeSubject(subjectPrefix+lane), jetstream.WithPurgeSequence(upTo))
	if err != nil {
		return fmt.Errorf("trim lane %s: %w", lane, err)
	}
	return nil
}

const (
	// keptShare of the log's size may be taken by what is kept without need; the rest
	// is for commits that are not stored yet.
	keptShare = 4
	// expiredMessages is how many commits one Expired looks at.
	expiredMessages = 500_000
	// messageBytes is what the stream keeps beside subject, header lines and payload.
	messageBytes = 46
)

// Expired returns a sequence of the stream below which all commits were appended
// before a time or are followed by at least keep bytes of the log: what need not be
// kept for readers of the past. Whether they are stored it does not know. A quarter of
// the log's size is kept at most, whatever keep says, so that a log which is kept for
// long is not full. The age is by the server's clock. It reads the headers of the
// commits that have expired, so its time is that of what is trimmed afterwards; when
// the deadline of ctx ends that, or half a million commits, what it returns is short of
// the end, and the next call goes on once that much was trimmed.
func (l *Log) Expired(ctx context.Context, before time.Time, keep int64) (uint64, error) {
	info, err := l.stream.Info(ctx)
	if err != nil {
		return 0, fmt.Errorf("read the state of the log: %w", err)
	}
	if limit := info.Config.MaxBytes; limit > 0 {
		keep = min(keep, limit/keptShare)
	}
	excess := int64(info.State.Bytes) - keep
	if info.State.Msgs == 0 || excess <= 0 && !info.State.FirstTime.Before(before) {
		return info.State.FirstSeq, nil
	}
	messages, stop, err := l.messages(ctx, max(info.State.FirstSeq, 1), true)
	if err != nil {
		return 0, err
	}
	defer stop()
	reached := info.State.FirstSeq
	for looked := 1; ; looked++ {
		msg, meta, err := nextMessage(ctx, messages)
		if errors.Is(err, context.DeadlineExceeded) {
			return reached, nil
		}
		if err != nil {
			return 0, err
		}
		reached = meta.Sequence.Stream
		size, err := storedSize(msg)
		if err != nil {
			return 0, fmt.Errorf("sequence %d of the log: %w", reached, err)
		}
		if excess < size && !meta.Timestamp.Before(before) ||
			reached >= info.State.LastSeq || looked == expiredMessages {
			return reached, nil
		}
		excess -= size
	}
}

// storedSize is how many bytes a message takes in the stream, when it was delivered
// without its payload.
func storedSize(msg jetstream.Msg) (int64, error) {
	payload, err := strconv.ParseInt(msg.Headers().Get(nats.MsgSize), 10, 64)
	if err != nil {
		return 0, errors.New("it comes without its size")
	}
	size := payload + int64(len(msg.Subject())+messageBytes)
	for key, values := range msg.Headers() {
		for _, value := range values {
			if key != nats.MsgSize {
				size += int64(len(key) + len(value) + len(": \r\n"))
			}
		}
	}
	return size, nil
}

// checkLane keeps lane names to one token of a subject.
func checkLane(lane string) error {
	ok := lane != "" && len(lane) <= 128
	for i := range len(lane) {
		c := lane[i]
		ok = ok && ('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '_')
	}
	if !ok {
		return errors.New("a lane is named by 1 to 128 letters, digits, '-' and '_'")
	}
	return nil
}

// retryWait is the pause before an append is looked up or tried again: first short,
// for a lost message, then longer, for a server that is away.
func retryWait(attempt int) time.Duration {
	return min(10*time.Millisecond<<min(attempt, 10), time.Second)
}

// sleep waits, or returns the context's error.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// LaneEnds returns the sequence of the last commit of every lane, as the stream's
// leader knows it. A lane whose watermark is there holds nothing that is not stored.
func (l *Log) LaneEnds(ctx context.Context) (map[string]uint64, error) {
	info, err := l.stream.Info(ctx, jetstream.WithSubjectFilter(subjects))
	if err != nil {
		return nil, fmt.Errorf("list the lanes of the log: %w", err)
	}
	ends := make(map[string]uint64, len(info.State.Subjects))
	for subject := range info.State.Subjects {
		lane := strings.TrimPrefix(subject, subjectPrefix)
		last, err := l.tail(ctx, lane)
		if err != nil {
			return nil, err
		}
		ends[lane] = last.sequence
	}
	return ends, nil
}
