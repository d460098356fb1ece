package commitlog

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	logv1 "github.com/topgun-sync/topgun/gen/go/topgun/log/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
	"github.com/topgun-sync/topgun/services/internal/broker"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func testConfig() Config {
	return Config{Stream: "TOPGUN_LOG", MaxBytes: 64 << 20, Replicas: 1, Shards: 4}
}

// connect starts a durable server for one test.
func connect(t *testing.T) *nats.Conn {
	t.Helper()
	embedded, err := broker.StartEmbedded(broker.EmbeddedConfig{Dir: t.TempDir(), SyncAlways: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := embedded.Shutdown(); err != nil {
			t.Error(err)
		}
	})
	nc, err := embedded.Connect("test")
	if err != nil {
		t.Fatal(err)
	}
	return nc
}

func open(t *testing.T, nc *nats.Conn, config Config) *Log {
	t.Helper()
	l, err := Open(t.Context(), nc, config)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func openLane(t *testing.T, l *Log, name string) *Lane {
	t.Helper()
	lane, err := l.OpenLane(name)
	if err != nil {
		t.Fatal(err)
	}
	return lane
}

func appendTo(t *testing.T, lane *Lane, commit *logv1.Commit) uint64 {
	t.Helper()
	sequence, err := lane.Append(t.Context(), commit)
	if err != nil {
		t.Fatal(err)
	}
	return sequence
}

func claimCommit() *logv1.Commit {
	return &logv1.Commit{Body: &logv1.Commit_Claim{Claim: &logv1.Claim{NodeId: "node"}}}
}

func changes(key string, size int) *logv1.Commit {
	return &logv1.Commit{
		ClockCeiling: &typesv1.Arrival{Millis: 1000, Counter: 2},
		Body: &logv1.Commit_Changes{Changes: &logv1.Changes{Shards: []*logv1.ShardChanges{{Changes: []*typesv1.Change{{
			Map: "m", Key: []byte(key), Record: &typesv1.Record{Value: make([]byte, size)},
		}}}}}},
	}
}

// read returns lane:number of every commit in the log.
func read(t *testing.T, l *Log) []string {
	t.Helper()
	var got []string
	for entry, err := range l.Read(t.Context(), 1, false) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, fmt.Sprintf("%s:%d", entry.Lane, entry.Commit.GetNumber()))
	}
	return got
}

func wantLog(t *testing.T, l *Log, want string) {
	t.Helper()
	if got := strings.Join(read(t, l), " "); got != want {
		t.Errorf("the log holds %q, want %q", got, want)
	}
}

func TestAppendAndRead(t *testing.T) {
	l := open(t, connect(t), testConfig())
	a, b := openLane(t, l, "a"), openLane(t, l, "b")
	ids := trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}, TraceFlags: trace.FlagsSampled,
	})
	if _, err := a.Append(trace.ContextWithSpanContext(t.Context(), ids), claimCommit()); err != nil {
		t.Fatal(err)
	}
	appendTo(t, b, claimCommit())
	if got := appendTo(t, a, changes("k", 10)); got != 3 {
		t.Errorf("the third commit has sequence %d", got)
	}
	wantLog(t, l, "a:1 b:1 a:2")

	for entry, err := range l.Read(t.Context(), 1, false) {
		if err != nil {
			t.Fatal(err)
		}
		ctx := propagation.TraceContext{}.Extract(t.Context(), entry.Trace)
		if got := trace.SpanContextFromContext(ctx); got.TraceID() != ids.TraceID() {
			t.Errorf("the commit carries trace %s, want %s", got.TraceID(), ids.TraceID())
		}
		if entry.Sequence != 1 || entry.Size == 0 || entry.Commit.GetClaim().GetNodeId() != "node" {
			t.Errorf("unexpected entry %+v", entry)
		}
		break
	}
	if last, err := l.LastSequence(t.Context()); err != nil || last != 3 {
		t.Errorf("LastSequence = %d, %v, want 3", last, err)
	}
}

func TestReadFollowsUntilTheContextEnds(t *testing.T) {
	l := open(t, connect(t), testConfig())
	a := openLane(t, l, "a")
	appendTo(t, a, claimCommit())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var last error
	for entry, err := range l.Read(ctx, 1, true) {
		if err != nil {
			last = err
			break
		}
		if n := entry.Commit.GetNumber(); n < 5 {
			appendTo(t, a, changes("k", 1))
		} else {
			cancel()
		}
	}
	if !errors.Is(last, context.Canceled) {
		t.Errorf("reading ended with %v, want canceled", last)
	}
}

func TestReadOfAnEmptyLogEnds(t *testing.T) {
	l := open(t, connect(t), testConfig())
	if got := read(t, l); len(got) != 0 {
		t.Errorf("read %v", got)
	}
}

func TestLOG01_AppendAfterSealIsRefused(t *testing.T) {
	l := open(t, connect(t), testConfig())
	a := openLane(t, l, "a")
	appendTo(t, a, claimCommit())
	appendTo(t, a, changes("k", 1))
	for range 2 { // the second changes nothing
		ceiling, err := l.Seal(t.Context(), "a", &logv1.Seal{ByNodeId: "other", ByLane: "b"})
		if err != nil {
			t.Fatal(err)
		}
		if ceiling.GetMillis() != 1000 || ceiling.GetCounter() != 2 {
			t.Errorf("the seal found the ceiling %v", ceiling)
		}
	}
	for range 3 {
		if _, err := a.Append(t.Context(), changes("lost", 1)); !errors.Is(err, ErrSealed) {
			t.Fatalf("append to a sealed lane: %v", err)
		}
	}
	wantLog(t, l, "a:1 a:2 a:3")
}

func TestLOG01_SealOfAnEmptyLaneBlocksItsClaim(t *testing.T) {
	l := open(t, connect(t), testConfig())
	if _, err := l.Seal(t.Context(), "a", &logv1.Seal{ByNodeId: "other"}); err != nil {
		t.Fatal(err)
	}
	if _, err := openLane(t, l, "a").Append(t.Context(), claimCommit()); !errors.Is(err, ErrSealed) {
		t.Fatalf("the claim of a sealed lane: %v", err)
	}
	wantLog(t, l, "a:1")
}

// A process that was stopped for long wakes with a message on its way, whose
// expectation was right when it was made.
func TestLOG01_AStaleExpectationIsRefused(t *testing.T) {
	l := open(t, connect(t), testConfig())
	a := openLane(t, l, "a")
	appendTo(t, a, claimCommit())
	asleep, wake := make(chan struct{}), make(chan struct{})
	publish := l.publish
	zombie := *l
	zombie.publish = func(ctx context.Context, m *nats.Msg) (*jetstream.PubAck, error) {
		close(asleep)
		<-wake
		zombie.publish = publish
		return publish(ctx, m)
	}
	a.log = &zombie
	result := make(chan error)
	go func() {
		_, err := a.Append(context.WithoutCancel(t.Context()), changes("lost", 1))
		result <- err
	}()
	<-asleep
	if _, err := l.Seal(t.Context(), "a", &logv1.Seal{ByNodeId: "other"}); err != nil {
		t.Fatal(err)
	}
	close(wake)
	if err := <-result; !errors.Is(err, ErrSealed) {
		t.Errorf("the sleeper's append: %v, want ErrSealed", err)
	}
	wantLog(t, l, "a:1 a:2")
}

func TestLOG08_ALostAnswerEndsAsOneCommit(t *testing.T) {
	lost := errors.New("the answer was lost")
	for name, delivered := range map[string]bool{"after it was stored": true, "before it was stored": false} {
		t.Run(name, func(t *testing.T) {
			l := open(t, connect(t), testConfig())
			a := openLane(t, l, "a")
			appendTo(t, a, claimCommit())
			publish := l.publish
			var sent atomic.Int32
			l.publish = func(ctx context.Context, m *nats.Msg) (*jetstream.PubAck, error) {
				if sent.Add(1) > 1 {
					return publish(ctx, m)
				}
				if delivered {
					if _, err := publish(ctx, m); err != nil {
						t.Error(err)
					}
				}
				return nil, lost
			}
			if got := appendTo(t, a, changes("k", 1)); got != 2 {
				t.Errorf("the commit has sequence %d, want 2", got)
			}
			appendTo(t, a, changes("l", 1))
			wantLog(t, l, "a:1 a:2 a:3")
		})
	}
}

// The caller's time runs out while the outcome is open; the same commit settles it.
func TestLOG08_AnUnknownOutcomeIsSettledByTheSameCommit(t *testing.T) {
	l := open(t, connect(t), testConfig())
	a := openLane(t, l, "a")
	appendTo(t, a, claimCommit())
	ctx, cancel := context.WithCancel(t.Context())
	publish := l.publish
	l.publish = func(ctx context.Context, m *nats.Msg) (*jetstream.PubAck, error) {
		if _, err := publish(t.Context(), m); err != nil {
			t.Error(err)
		}
		cancel()
		<-ctx.Done()
		return nil, ctx.Err()
	}
	commit := changes("k", 1)
	if _, err := a.Append(ctx, commit); !errors.Is(err, context.Canceled) {
		t.Fatalf("append: %v", err)
	}
	l.publish = publish
	if got := appendTo(t, a, commit); got != 2 {
		t.Errorf("the commit has sequence %d, want 2", got)
	}
	wantLog(t, l, "a:1 a:2")
}

func TestLOG08_ServerRestartDuringAppends(t *testing.T) {
	config := broker.EmbeddedConfig{Dir: t.TempDir(), Listen: "127.0.0.1:0"}
	embedded, err := broker.StartEmbedded(config)
	if err != nil {
		t.Fatal(err)
	}
	config.Listen = strings.TrimPrefix(embedded.ClientURL(), "nats://")
	nc, err := broker.Connect(t.Context(), embedded.ClientURL(), "test", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	l := open(t, nc, testConfig())
	a := openLane(t, l, "a")
	appendTo(t, a, claimCommit())
	done := make(chan error, 1)
	go func() {
		for range 300 {
			if _, err := a.Append(context.WithoutCancel(t.Context()), changes("k", 1)); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	if err := embedded.Shutdown(); err != nil {
		t.Error(err)
	}
	again, err := broker.StartEmbedded(config)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		nc.Close()
		if err := again.Shutdown(); err != nil {
			t.Error(err)
		}
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	for i, got := range read(t, l) {
		if want := fmt.Sprintf("a:%d", i+1); got != want {
			t.Fatalf("commit %d of the log is %s, want %s", i, got, want)
		}
	}
	if got := len(read(t, l)); got != 301 {
		t.Errorf("the log holds %d commits, want 301", got)
	}
}

func TestLOG02_AFullLogRefusesAndGoesOnAfterTrim(t *testing.T) {
	config := testConfig()
	config.MaxBytes = 2 * MaxCommitBytes
	l := open(t, connect(t), config)
	a := openLane(t, l, "a")
	appendTo(t, a, claimCommit())
	full := changes("k", 256<<10)
	var last uint64
	for {
		sequence, err := a.Append(t.Context(), full)
		if errors.Is(err, ErrFull) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		last = sequence
	}
	if before := read(t, l); before[0] != "a:1" {
		t.Errorf("the full log dropped its first commit: %v", before)
	}
	if err := l.Trim(t.Context(), "a", last); err != nil {
		t.Fatal(err)
	}
	if got := appendTo(t, a, full); got != last+1 {
		t.Errorf("the commit has sequence %d, want %d", got, last+1)
	}
}

func TestLOG03_TrimKeepsTheLastCommit(t *testing.T) {
	l := open(t, connect(t), testConfig())
	a, b := openLane(t, l, "a"), openLane(t, l, "b")
	appendTo(t, a, claimCommit())
	appendTo(t, b, claimCommit())
	appendTo(t, a, changes("k", 1))
	appendTo(t, a, changes("k", 1))
	for _, upTo := range []uint64{0, 1, 4, 1 << 40} {
		if err := l.Trim(t.Context(), "a", upTo); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Trim(t.Context(), "never", 10); err != nil {
		t.Errorf("trim of a lane that is empty: %v", err)
	}
	wantLog(t, l, "b:1 a:3")
	if _, err := openLane(t, l, "a").Append(t.Context(), claimCommit()); !errors.Is(err, ErrSealed) {
		t.Errorf("a stranger's first append after the trim: %v", err)
	}
	appendTo(t, a, changes("k", 1))
}

func TestLOG05_AWeakerStreamIsRefused(t *testing.T) {
	nc := connect(t)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	for name, weaken := range map[string]func(*jetstream.StreamConfig){
		"memory":     func(c *jetstream.StreamConfig) { c.Storage = jetstream.MemoryStorage },
		"discard":    func(c *jetstream.StreamConfig) { c.Discard = jetstream.DiscardOld },
		"age":        func(c *jetstream.StreamConfig) { c.MaxAge = time.Hour },
		"count":      func(c *jetstream.StreamConfig) { c.MaxMsgs = 10 },
		"delete":     func(c *jetstream.StreamConfig) { c.DenyDelete = false },
		"direct":     func(c *jetstream.StreamConfig) { c.AllowDirect = true },
		"retention":  func(c *jetstream.StreamConfig) { c.Retention = jetstream.InterestPolicy },
		"subjects":   func(c *jetstream.StreamConfig) { c.Subjects = []string{"topgun.log.a"} },
		"no history": func(c *jetstream.StreamConfig) { c.Metadata = nil },
		"persist":    func(c *jetstream.StreamConfig) { c.PersistMode = jetstream.AsyncPersistMode },
	} {
		t.Run(name, func(t *testing.T) {
			// A name of its own: the server removes a deleted stream's folder a little
			// later than it says.
			want := testConfig()
			want.Stream += "_" + strings.ReplaceAll(name, " ", "_")
			config := streamConfig(want)
			weaken(&config)
			if _, err := js.CreateStream(t.Context(), config); err != nil {
				t.Fatal(err)
			}
			if _, err := Open(t.Context(), nc, want); !errors.Is(err, ErrWeak) {
				t.Errorf("Open: %v, want ErrWeak", err)
			}
			if err := js.DeleteStream(t.Context(), config.Name); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestOpenAgainKeepsHistoryAndShards(t *testing.T) {
	nc := connect(t)
	first := open(t, nc, testConfig())
	config := testConfig()
	config.Shards = 9
	second := open(t, nc, config)
	if first.History() == "" || first.History() != second.History() || second.Shards() != 4 {
		t.Errorf("history %q then %q, %d shards", first.History(), second.History(), second.Shards())
	}
}

func TestLOG07_AnUnreadableMessageStopsTheReader(t *testing.T) {
	future, err := proto.Marshal(&logv1.Commit{Version: 2, Lane: "a", Number: 2, Body: &logv1.Commit_Seal{Seal: &logv1.Seal{}}})
	if err != nil {
		t.Fatal(err)
	}
	stranger, err := proto.Marshal(&logv1.Commit{Version: 1, Lane: "z", Number: 2, Body: &logv1.Commit_Seal{Seal: &logv1.Seal{}}})
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"garbage": []byte("\xff\xff\xff"), "version": future, "lane": stranger, "empty": nil} {
		t.Run(name, func(t *testing.T) {
			nc := connect(t)
			l := open(t, nc, testConfig())
			appendTo(t, openLane(t, l, "a"), claimCommit())
			if _, err := l.js.Publish(t.Context(), "topgun.log.a", data); err != nil {
				t.Fatal(err)
			}
			appendTo(t, openLane(t, l, "b"), claimCommit())
			var got []uint64
			var failed error
			for entry, err := range l.Read(t.Context(), 1, false) {
				if err != nil {
					failed = err
					break
				}
				got = append(got, entry.Sequence)
			}
			if !errors.Is(failed, ErrUnreadable) || len(got) != 1 {
				t.Errorf("read %v, then %v", got, failed)
			}
		})
	}
}

func TestAppendRefusesWhatIsTooLarge(t *testing.T) {
	l := open(t, connect(t), testConfig())
	a := openLane(t, l, "a")
	appendTo(t, a, claimCommit())
	if _, err := a.Append(t.Context(), changes("k", MaxCommitBytes)); !errors.Is(err, ErrTooLarge) {
		t.Errorf("append: %v", err)
	}
	appendTo(t, a, changes("k", 1))
}

func TestOWN01_OfTwoClaimersExactlyOneCanAppend(t *testing.T) {
	nc := connect(t)
	for round := range 10 {
		l := open(t, nc, testConfig())
		shards := []int{0, 1, 2, 3}
		lanes := []*Lane{openLane(t, l, fmt.Sprintf("a%d", round)), openLane(t, l, fmt.Sprintf("b%d", round))}
		var wg sync.WaitGroup
		for _, lane := range lanes {
			wg.Go(func() {
				if _, err := l.Claim(t.Context(), "node", lane.Name(), shards); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		// Whoever holds an entry in the end has sealed nobody that still writes it.
		able := 0
		for _, lane := range lanes {
			switch _, err := lane.Append(t.Context(), claimCommit()); {
			case err == nil:
				able++
			case !errors.Is(err, ErrSealed):
				t.Error(err)
			}
		}
		if able > 1 {
			t.Fatalf("round %d: both lanes took a claim of the same shards", round)
		}
	}
}

func TestOWN01_ATakeoverSealsAndInheritsTheCeiling(t *testing.T) {
	l := open(t, connect(t), testConfig())
	shards := []int{0, 1, 2, 3}
	first, err := l.Claim(t.Context(), "n1", "a", shards)
	if err != nil {
		t.Fatal(err)
	}
	a := openLane(t, l, "a")
	appendTo(t, a, claimCommit())
	appendTo(t, a, changes("k", 1)) // ceiling 1000:2

	// The second owner dies before its first commit; its lane stays empty.
	if _, err := l.Claim(t.Context(), "n2", "b", shards); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Append(t.Context(), changes("lost", 1)); !errors.Is(err, ErrSealed) {
		t.Errorf("the first owner's append: %v", err)
	}
	third, err := l.Claim(t.Context(), "n3", "c", shards)
	if err != nil {
		t.Fatal(err)
	}
	if third.Ceiling.GetMillis() != 1000 || third.Ceiling.GetCounter() != 2 {
		t.Errorf("the third owner found the ceiling %v, want 1000:2", third.Ceiling)
	}
	for i := range shards {
		if third.Shards[i].GetEpoch() <= first.Shards[i].GetEpoch() {
			t.Errorf("shard %d: epoch %d after %d", i, third.Shards[i].GetEpoch(), first.Shards[i].GetEpoch())
		}
	}
	again, err := l.Claim(t.Context(), "n3", "c", shards)
	if err != nil || again.Shards[0].GetEpoch() != third.Shards[0].GetEpoch() {
		t.Errorf("a claim of one's own shards gave %v, %v", again, err)
	}
	if _, err := l.Claim(t.Context(), "n3", "c", []int{4}); err == nil {
		t.Error("claimed a shard that does not exist")
	}
}

func TestBadNamesAreRefused(t *testing.T) {
	l := open(t, connect(t), testConfig())
	for _, name := range []string{"", "a.b", "a b", "*", ">", "ä", strings.Repeat("a", 129)} {
		if _, err := l.OpenLane(name); err == nil {
			t.Errorf("lane %q was accepted", name)
		}
	}
	for _, config := range []Config{{}, {Stream: "a.b", MaxBytes: 1 << 30, Replicas: 1, Shards: 1}, {Stream: "a", MaxBytes: 1, Replicas: 1, Shards: 1}, {Stream: "a", MaxBytes: 1 << 30, Shards: 1}, {Stream: "a", MaxBytes: 1 << 30, Replicas: 1, Shards: 272}} {
		if config.Validate() == nil {
			t.Errorf("%+v was accepted", config)
		}
	}
}

func TestOWN01_AnIdleWriterNoticesTheSeal(t *testing.T) {
	l := open(t, connect(t), testConfig())
	a := openLane(t, l, "a")
	if err := a.Check(t.Context()); err != nil {
		t.Errorf("an empty lane of one's own: %v", err)
	}
	appendTo(t, a, claimCommit())
	if err := a.Check(t.Context()); err != nil {
		t.Errorf("a lane of one's own: %v", err)
	}
	if _, err := l.Seal(t.Context(), "a", &logv1.Seal{ByNodeId: "other"}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := a.Check(t.Context()); !errors.Is(err, ErrSealed) {
			t.Errorf("a sealed lane: %v", err)
		}
	}
}

func TestLaneEnds(t *testing.T) {
	l := open(t, connect(t), testConfig())
	a, b := openLane(t, l, "a"), openLane(t, l, "b")
	appendTo(t, a, claimCommit())
	appendTo(t, b, claimCommit())
	appendTo(t, a, changes("k", 1))
	ends, err := l.LaneEnds(t.Context())
	if err != nil || len(ends) != 2 || ends["a"] != 3 || ends["b"] != 2 {
		t.Errorf("LaneEnds = %v, %v", ends, err)
	}
}

// A follower may answer a direct read with an owner that is none any more.
func TestOWN05_ABucketWithDirectReadsIsRefused(t *testing.T) {
	nc := connect(t)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	// As the client library makes it: with direct reads.
	if _, err := js.CreateKeyValue(t.Context(), jetstream.KeyValueConfig{Bucket: ownersBucket}); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), nc, testConfig()); !errors.Is(err, ErrWeak) {
		t.Errorf("Open: %v, want ErrWeak", err)
	}
}
