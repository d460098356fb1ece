package persistence_test

import (
	"context"
	"iter"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	logv1 "github.com/topgun-sync/topgun/gen/go/topgun/log/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
	"github.com/topgun-sync/topgun/services/internal/commitlog"
	"github.com/topgun-sync/topgun/services/persistence"
	"github.com/topgun-sync/topgun/services/persistence/memstore"
)

// fakeLog is a log in memory that a test may damage.
type fakeLog struct {
	mu      sync.Mutex
	history string
	entries []commitlog.Entry
	last    uint64
	numbers map[string]uint64
	trims   map[string]uint64
	// times are when commits were appended.
	times map[uint64]time.Time
	// down is what every call returns while it is set.
	down error
	// slow is how long a commit takes to be read, slowFollow by those who wait for
	// further ones.
	slow, slowFollow time.Duration
	// asked runs whenever somebody was told the last sequence.
	asked func()
	// unreadable is the sequence that Read ends with.
	unreadable uint64
	changed    chan struct{}
}

func newFakeLog() *fakeLog {
	return &fakeLog{
		history: "history", numbers: make(map[string]uint64), trims: make(map[string]uint64), times: make(map[uint64]time.Time), changed: make(chan struct{}),
	}
}

// edit changes the log and wakes its readers.
func (l *fakeLog) edit(change func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change()
	close(l.changed)
	l.changed = make(chan struct{})
}

// append adds a commit with changes, or a claim if there are none.
func (l *fakeLog) append(lane string, changes ...*typesv1.Change) uint64 {
	commit := &logv1.Commit{Version: 1, Lane: lane, Body: &logv1.Commit_Claim{Claim: &logv1.Claim{}}}
	if len(changes) > 0 {
		commit.Body = &logv1.Commit_Changes{Changes: &logv1.Changes{
			Shards: []*logv1.ShardChanges{{Shard: 1, Changes: changes}},
		}}
	}
	return l.put(commit, nil)
}

func (l *fakeLog) put(commit *logv1.Commit, change func(*commitlog.Entry)) uint64 {
	l.edit(func() {
		l.last++
		l.numbers[commit.Lane]++
		commit.Number = l.numbers[commit.Lane]
		entry := commitlog.Entry{Sequence: l.last, Lane: commit.Lane, Commit: commit, Size: proto.Size(commit)}
		if change != nil {
			change(&entry)
		}
		l.entries = append(l.entries, entry)
		l.times[l.last] = time.Now()
	})
	return l.last
}

func (l *fakeLog) History() string { return l.history }

func (l *fakeLog) LastSequence(context.Context) (uint64, error) {
	l.mu.Lock()
	last, down, asked := l.last, l.down, l.asked
	l.mu.Unlock()
	if asked != nil {
		asked()
	}
	return last, down
}

func (l *fakeLog) Read(ctx context.Context, from uint64, follow bool) iter.Seq2[commitlog.Entry, error] {
	return func(yield func(commitlog.Entry, error) bool) {
		l.mu.Lock()
		last := l.last
		l.mu.Unlock()
		for {
			l.mu.Lock()
			i, _ := slices.BinarySearchFunc(l.entries, from, func(e commitlog.Entry, s uint64) int { return int(e.Sequence) - int(s) })
			rest, changed, down, unreadable, slow := slices.Clone(l.entries[i:]), l.changed, l.down, l.unreadable, l.slow
			if follow {
				slow += l.slowFollow
			}
			l.mu.Unlock()
			if down != nil {
				yield(commitlog.Entry{}, down)
				return
			}
			for _, entry := range rest {
				if !follow && entry.Sequence > last {
					return
				}
				if slow > 0 {
					select {
					case <-ctx.Done():
						yield(commitlog.Entry{}, ctx.Err())
						return
					case <-time.After(slow):
					}
				}
				if entry.Sequence == unreadable {
					yield(commitlog.Entry{}, commitlog.ErrUnreadable)
					return
				}
				if !yield(entry, nil) {
					return
				}
				from = entry.Sequence + 1
			}
			if len(rest) > 0 {
				continue
			}
			if !follow {
				return
			}
			select {
			case <-changed:
			case <-ctx.Done():
				yield(commitlog.Entry{}, ctx.Err())
				return
			}
		}
	}
}

func (l *fakeLog) Trim(_ context.Context, lane string, upTo uint64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.trims[lane] = upTo
	l.entries = slices.DeleteFunc(l.entries, func(e commitlog.Entry) bool { return e.Lane == lane && e.Sequence < upTo })
	return l.down
}

// Expired takes a commit for as many bytes as the test appended it with, and for as
// old as its entry says.
func (l *fakeLog) Expired(_ context.Context, before time.Time, keep int64) (uint64, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	excess := -keep
	for _, entry := range l.entries {
		excess += int64(entry.Size)
	}
	for _, entry := range l.entries {
		if excess < int64(entry.Size) && !l.times[entry.Sequence].Before(before) {
			return entry.Sequence, l.down
		}
		excess -= int64(entry.Size)
	}
	return l.last, l.down
}

func (l *fakeLog) trimmed() map[string]uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.trims)
}

// fakeStore is a memory store whose commits a test may watch and disturb.
type fakeStore struct {
	*memstore.Store
	mu sync.Mutex
	// before runs before a commit; its error is the commit's.
	before func(persistence.Batch) error
	// after runs after a commit that was stored; its error takes the place of the answer.
	after func(persistence.Batch) error
	// down is what every call returns while it is set.
	down    error
	batches []persistence.Batch
	// times are when the batches were stored.
	times []time.Time
}

func newFakeStore() *fakeStore { return &fakeStore{Store: memstore.New()} }

func (s *fakeStore) set(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
}

func (s *fakeStore) hooks() (before, after func(persistence.Batch) error, down error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.before, s.after, s.down
}

func (s *fakeStore) Commit(ctx context.Context, batch persistence.Batch) (int, error) {
	before, after, down := s.hooks()
	if down != nil {
		return 0, down
	}
	if before != nil {
		if err := before(batch); err != nil {
			return 0, err
		}
	}
	s.mu.Lock()
	store := s.Store
	s.mu.Unlock()
	changed, err := store.Commit(ctx, batch)
	if err != nil {
		return 0, err
	}
	s.set(func() { s.batches, s.times = append(s.batches, batch), append(s.times, time.Now()) })
	if after != nil {
		return changed, after(batch)
	}
	return changed, nil
}

func (s *fakeStore) Watermarks(ctx context.Context) ([]persistence.Watermark, error) {
	if _, _, down := s.hooks(); down != nil {
		return nil, down
	}
	s.mu.Lock()
	store := s.Store
	s.mu.Unlock()
	return store.Watermarks(ctx)
}

func (s *fakeStore) Load(ctx context.Context, partitions []int, watermarks func([]persistence.Watermark) error, record func(persistence.Record) error) error {
	if _, _, down := s.hooks(); down != nil {
		return down
	}
	return s.Store.Load(ctx, partitions, watermarks, record)
}

func (s *fakeStore) stored() []persistence.Batch {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.batches)
}

func config() persistence.Config {
	c := persistence.DefaultConfig()
	c.Store = persistence.StoreMemory
	// What the tests of batches count on, whatever suits production.
	c.BatchChanges, c.BatchBytes, c.BatchDelay = 1000, 4<<20, 50*time.Millisecond
	// Tests of the journal ask for a log that is kept.
	c.JournalAge, c.JournalBytes = 0, 0
	return c
}

// start runs a service until the test ends or stop is called.
func start(t testing.TB, config persistence.Config, deps persistence.Deps) (service *persistence.Service, stop func()) {
	t.Helper()
	if deps.Logger == nil {
		deps.Logger = slog.New(slog.DiscardHandler)
	}
	service, err := persistence.New(config, deps)
	if err != nil {
		t.Fatalf("new: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := service.Run(ctx); err != nil {
			t.Errorf("run: %v", err)
		}
	})
	stop = sync.OnceFunc(func() {
		cancel()
		wg.Wait()
	})
	t.Cleanup(stop)
	return service, stop
}

func change(key, value string, at uint64) *typesv1.Change {
	c := &typesv1.Change{
		Map: "todos", Key: []byte(key),
		Record: &typesv1.Record{
			Value:     append([]byte{0xd9, byte(len(value))}, value...),
			Timestamp: &typesv1.Timestamp{Millis: at, NodeId: "node"},
		},
		Arrival: &typesv1.Arrival{Millis: at},
	}
	if value == "" {
		c.Record.Value = nil
	}
	return c
}
