package partition

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectinprocess"
	"go.uber.org/goleak"

	"github.com/topgun-sync/topgun/core/keyspace"
	"github.com/topgun-sync/topgun/core/msgval"
	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	logv1 "github.com/topgun-sync/topgun/gen/go/topgun/log/v1"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	persistencev1 "github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1/persistencev1connect"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
	"github.com/topgun-sync/topgun/services/internal/broker"
	"github.com/topgun-sync/topgun/services/internal/commitlog"
)

func TestMain(m *testing.M) {
	// Enough for every commit; -rapid.checks asks for more.
	if err := flag.Set("rapid.checks", "30"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

const shardCount = 4

// world is what outlives a partition process: the log and the store.
type world struct {
	t     testing.TB
	log   *commitlog.Log
	store *fakeStore
	wall  *wallClock
}

func newWorld(t testing.TB) *world {
	t.Helper()
	return newWorldOf(t, commitlog.Config{Stream: "TOPGUN_LOG", MaxBytes: 256 << 20, Replicas: 1, Shards: shardCount})
}

func newWorldOf(t testing.TB, config commitlog.Config) *world {
	t.Helper()
	embedded, err := broker.StartEmbedded(broker.EmbeddedConfig{Dir: t.TempDir()})
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
	log, err := commitlog.Open(context.Background(), nc, config)
	if err != nil {
		t.Fatal(err)
	}
	return &world{t: t, log: log, store: &fakeStore{}, wall: &wallClock{}}
}

// wallClock is the real clock plus an offset that tests set.
type wallClock struct {
	mu     sync.Mutex
	offset time.Duration
}

func (w *wallClock) now() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return time.Now().Add(w.offset)
}

func (w *wallClock) set(offset time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.offset = offset
}

// fakeStore is persistence in memory. Drain is called by tests, not by itself.
type fakeStore struct {
	persistencev1connect.UnimplementedPersistenceServiceHandler
	mu         sync.Mutex
	records    map[string]*typesv1.Change
	watermarks map[string]*persistencev1.Watermark
	// loading runs before a Load answers, and may fail it.
	loading func() error
	loads   int
}

func (f *fakeStore) Load(_ context.Context, req *persistencev1.LoadRequest, stream persistencev1connect.PersistenceServiceLoadServerStream) error {
	f.mu.Lock()
	f.loads++
	marks := slices.Collect(maps.Values(f.watermarks))
	records := slices.Collect(maps.Values(f.records))
	loading := f.loading
	f.mu.Unlock()
	if loading != nil {
		if err := loading(); err != nil {
			return err
		}
	}
	if err := stream.Send(&persistencev1.LoadResponse{Watermarks: marks}); err != nil {
		return err
	}
	for chunk := range slices.Chunk(records, 100) {
		if err := stream.Send(&persistencev1.LoadResponse{Changes: chunk}); err != nil {
			return err
		}
	}
	return nil
}

// drain stores what the log holds, at most the first commits that were not stored.
func (f *fakeStore) drain(t testing.TB, log *commitlog.Log, commits int) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.records == nil {
		f.records = make(map[string]*typesv1.Change)
		f.watermarks = make(map[string]*persistencev1.Watermark)
	}
	for entry, err := range log.Read(context.Background(), 1, false) {
		if err != nil {
			t.Fatal(err)
		}
		if entry.Sequence <= f.watermarks[entry.Lane].GetSequence() {
			continue
		}
		if commits--; commits < 0 {
			return
		}
		for _, s := range entry.Commit.GetChanges().GetShards() {
			for _, c := range s.GetChanges() {
				id := fmt.Sprintf("%d\x00%s\x00%s\x00%s", c.GetKind(), c.GetMap(), c.GetKey(), c.GetTag())
				if c.GetPruned() {
					delete(f.records, id)
				} else {
					f.records[id] = c
				}
			}
		}
		f.watermarks[entry.Lane] = &persistencev1.Watermark{
			History: log.History(), Lane: entry.Lane, Sequence: entry.Sequence, Number: entry.Commit.GetNumber(),
		}
	}
}

func (f *fakeStore) trim(t testing.TB, log *commitlog.Log) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	for lane, mark := range f.watermarks {
		if err := log.Trim(context.Background(), lane, mark.GetSequence()); err != nil {
			t.Fatal(err)
		}
	}
}

// fakeEvents keeps what was published.
type fakeEvents struct {
	mu     sync.Mutex
	events []*fanoutv1.Event
	beats  []*fanoutv1.Heartbeat
	traces []context.Context
}

func (f *fakeEvents) PublishEvent(ctx context.Context, e *fanoutv1.Event) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.events = append(f.events, e)
	f.traces = append(f.traces, ctx)
	return nil
}

func (f *fakeEvents) PublishHeartbeat(_ context.Context, b *fanoutv1.Heartbeat) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.beats = append(f.beats, b)
	return nil
}

func (f *fakeEvents) all() []*fanoutv1.Event {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.events)
}

// node is one partition process.
type node struct {
	*Service
	world  *world
	events *fakeEvents
	writer *mortal
	cancel context.CancelFunc
	ended  chan error
}

// mortal is the lane's writer in a process that may be killed: from then on nothing
// reaches the log, nor does an answer reach the process.
type mortal struct {
	appender
	mu   sync.Mutex
	dead bool
	// dying lets this many more appends reach the log without an answer.
	dying int
}

func (m *mortal) Append(ctx context.Context, c *logv1.Commit) (uint64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dead {
		if m.dying > 0 {
			m.dying--
			if _, err := m.appender.Append(context.WithoutCancel(ctx), c); err != nil {
				return 0, err
			}
		}
		return 0, errKilled
	}
	return m.appender.Append(ctx, c)
}

var errKilled = errors.New("killed")

// kill ends the process as a signal would: nothing is flushed. With unanswered the
// append in flight still reaches the log.
func (n *node) kill(unanswered int) {
	n.world.t.Helper()
	n.writer.mu.Lock()
	n.writer.dead, n.writer.dying = true, unanswered
	n.writer.mu.Unlock()
	n.stop()
}

// stop ends the process and returns what Run returned.
func (n *node) stop() error {
	n.cancel()
	err := <-n.ended
	n.ended <- err
	return err
}

// serving is a logger that tells when the service serves.
type serving struct {
	slog.Handler
	once  sync.Once
	ready chan struct{}
}

func (s *serving) Enabled(context.Context, slog.Level) bool { return true }
func (s *serving) Handle(_ context.Context, r slog.Record) error {
	if r.Message == "serving" {
		s.once.Do(func() { close(s.ready) })
	}
	return nil
}

func (w *world) config() Config {
	c := DefaultConfig()
	c.NodeID = "node"
	c.TombstoneRetention = 0 // most tests stamp their ops at the beginning of time
	return c
}

// begin starts a process without waiting until it serves.
func (w *world) begin(config Config, deps ...func(*Deps)) (*node, *serving) {
	w.t.Helper()
	server := connect.NewServer()
	persistencev1connect.RegisterPersistenceServiceHandler(server, w.store)
	logger := &serving{ready: make(chan struct{}), Handler: slog.DiscardHandler}
	n := &node{world: w, events: &fakeEvents{}, ended: make(chan error, 1)}
	d := Deps{
		Log:         w.log,
		Persistence: persistencev1connect.NewPersistenceServiceClient(connect.NewClient(connectinprocess.New(server))),
		Events:      n.events,
		Logger:      slog.New(logger),
		Now:         w.wall.now,
	}
	for _, set := range deps {
		set(&d)
	}
	var err error
	if n.Service, err = New(config, d); err != nil {
		w.t.Fatal(err)
	}
	n.openLane = func(name string) (appender, error) {
		lane, err := w.log.OpenLane(name)
		n.writer = &mortal{appender: lane}
		return n.writer, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	n.cancel = cancel
	go func() { n.ended <- n.Run(ctx) }()
	w.t.Cleanup(func() { n.stop() })
	return n, logger
}

// start starts a process and waits until it serves.
func (w *world) start(deps ...func(*Deps)) *node {
	w.t.Helper()
	n, logger := w.begin(w.config(), deps...)
	select {
	case <-logger.ready:
	case err := <-n.ended:
		n.ended <- err
		w.t.Fatalf("the service ended at its start: %v", err)
	}
	return n
}

// put is an op that writes a string.
func put(key, value string, millis uint64, nodeID string) *partitionv1.Op {
	r := &typesv1.Record{Timestamp: &typesv1.Timestamp{Millis: millis, NodeId: nodeID}}
	if value != "" {
		r.Value = msgval.AppendString(nil, value)
	}
	return &partitionv1.Op{Map: "m", Key: []byte(key), Record: r}
}

func shardFor(key []byte) uint32 { return uint32(keyspace.ShardOf(string(key), shardCount)) }

// apply sends ops, each in an entry of its own, and returns the receipts.
func (n *node) apply(ops ...*partitionv1.Op) []*partitionv1.Receipt {
	n.world.t.Helper()
	receipts, err := n.tryApply(context.Background(), ops...)
	if err != nil {
		n.world.t.Fatal(err)
	}
	return receipts
}

func (n *node) tryApply(ctx context.Context, ops ...*partitionv1.Op) ([]*partitionv1.Receipt, error) {
	req := &partitionv1.ApplyRequest{}
	for _, op := range ops {
		req.Shards = append(req.Shards, &partitionv1.ShardOps{Shard: shardFor(op.GetKey()), Origin: "session", Ops: []*partitionv1.Op{op}})
	}
	resp, err := n.Apply(ctx, req)
	if err != nil {
		return nil, err
	}
	var receipts []*partitionv1.Receipt
	for _, s := range resp.GetShards() {
		if s.GetRefusal() != 0 {
			return nil, fmt.Errorf("refused: %s", s.GetRefusal())
		}
		receipts = append(receipts, s.GetReceipts()...)
	}
	return receipts, nil
}

// outcomeWords is the outcomes of receipts as words.
func outcomeWords(receipts []*partitionv1.Receipt) string {
	words := make([]string, len(receipts))
	for i, r := range receipts {
		words[i] = strings.TrimPrefix(r.GetOutcome().String(), "OUTCOME_")
	}
	return strings.Join(words, " ")
}

// everything returns all records of a map by Since, in pages.
func (n *node) everything(name string, limit uint32) []*typesv1.Change {
	n.world.t.Helper()
	var all []*typesv1.Change
	var after *typesv1.Arrival
	for {
		resp, err := n.Since(context.Background(), &partitionv1.SinceRequest{Map: name, After: after, Limit: limit})
		if err != nil {
			n.world.t.Fatal(err)
		}
		all = append(all, resp.GetChanges()...)
		after = resp.GetCovered()
		if !resp.GetMore() {
			return all
		}
	}
}

// dump is everything in a shard, a line for each record or lock, in no order.
func (s *shard) dump() (lines [][]byte) {
	for kind, tables := range s.tables {
		for _, t := range tables {
			for _, e := range t.records {
				line := fmt.Appendf(nil, "%d %d %q %q %x ", s.id, kind, t.name, e.key, msgval.Canonical(nil, e.value))
				line = fmt.Appendf(line, "%v %d %v %v", e.record().Timestamp, e.ttl, e.arrival, e.originals())
				lines = append(lines, line)
			}
		}
	}
	return append(lines, fmt.Appendf(nil, "%d locks %s", s.id, lockDump(s.locks)))
}

// digest is a canonical hash of everything in all tables, arrivals and remembered
// stamps included.
func (n *node) digest() [sha256.Size]byte {
	n.world.t.Helper()
	r, err := n.newReading(nil)
	if err != nil {
		n.world.t.Fatal(err)
	}
	lines := make([][][]byte, len(r.shards))
	err = r.each(context.Background(), func(i int, s *shard) {
		lines[i] = s.dump()
	})
	if err != nil {
		n.world.t.Fatal(err)
	}
	all := slices.Concat(lines...)
	slices.SortFunc(all, bytes.Compare)
	h := sha256.New()
	for _, line := range all {
		var size [8]byte
		binary.BigEndian.PutUint64(size[:], uint64(len(line)))
		h.Write(size[:])
		h.Write(line)
	}
	return [sha256.Size]byte(h.Sum(nil))
}
