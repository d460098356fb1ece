package persistence_test

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/topgun-sync/topgun/core/keyspace"
	logv1 "github.com/topgun-sync/topgun/gen/go/topgun/log/v1"
	persistencev1 "github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
	"github.com/topgun-sync/topgun/services/internal/broker"
	"github.com/topgun-sync/topgun/services/internal/commitlog"
	"github.com/topgun-sync/topgun/services/internal/pgtest"
	"github.com/topgun-sync/topgun/services/persistence"
	"github.com/topgun-sync/topgun/services/persistence/stores"
)

// The variables that make the test binary a drainer, for the tests that kill one.
const (
	childNATS = "TOPGUN_TEST_DRAINER_NATS"
	childURL  = "TOPGUN_TEST_DRAINER_POSTGRES"
)

func TestMain(m *testing.M) {
	if url := os.Getenv(childNATS); url != "" {
		drainerMain(url, os.Getenv(childURL))
	}
	goleak.VerifyTestMain(m)
}

// world is a real log with a writer on it.
type world struct {
	embedded *broker.Embedded
	log      *commitlog.Log
	// appended tells the number of each commit that the writer has appended.
	appended chan int
}

func newWorld(t testing.TB, listen string) *world {
	t.Helper()
	embedded, err := broker.StartEmbedded(broker.EmbeddedConfig{Dir: filepath.Join(t.TempDir(), "nats"), Listen: listen})
	if err != nil {
		t.Fatalf("start NATS: %v", err)
	}
	t.Cleanup(func() {
		if err := embedded.Shutdown(); err != nil {
			t.Errorf("stop NATS: %v", err)
		}
	})
	nc, err := embedded.Connect("test")
	if err != nil {
		t.Fatalf("connect to NATS: %v", err)
	}
	t.Cleanup(nc.Close)
	log, err := commitlog.Open(t.Context(), nc, logConfig())
	if err != nil {
		t.Fatalf("open the log: %v", err)
	}
	return &world{embedded: embedded, log: log, appended: make(chan int)}
}

func logConfig() commitlog.Config {
	return commitlog.Config{Stream: "TOPGUN_LOG", MaxBytes: 1 << 30, Replicas: 1, Shards: 4}
}

// write appends commits to three lanes until ctx ends: few keys, so that they
// meet, with deletes among them. It tells of each commit, so that a test paces it.
func (w *world) write(ctx context.Context, t *testing.T) {
	lanes := make([]*commitlog.Lane, 3)
	for i := range lanes {
		lane, err := w.log.OpenLane(fmt.Sprintf("lane-%d", i))
		if err != nil {
			t.Errorf("open lane: %v", err)
			return
		}
		lanes[i] = lane
	}
	at := uint64(0)
	for n := 1; ctx.Err() == nil; n++ {
		var changes []*typesv1.Change
		for range 1 + rand.IntN(20) {
			at++
			value := fmt.Sprint(at)
			if rand.IntN(5) == 0 {
				value = ""
			}
			changes = append(changes, change(fmt.Sprint("k", rand.IntN(200)), value, at))
		}
		// A background context: the outcome of an append that is given up is unknown.
		_, err := lanes[rand.IntN(len(lanes))].Append(context.Background(), &logv1.Commit{
			Body: &logv1.Commit_Changes{Changes: &logv1.Changes{Shards: []*logv1.ShardChanges{{Changes: changes}}}},
		})
		if err != nil {
			t.Errorf("append: %v", err)
			return
		}
		select {
		case w.appended <- n:
		case <-ctx.Done():
		}
	}
}

// writing runs the writer until stop is called.
func (w *world) writing(t *testing.T) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { w.write(ctx, t) })
	stop = sync.OnceFunc(func() {
		cancel()
		wg.Wait()
	})
	t.Cleanup(stop)
	return stop
}

// let lets the writer append that many more commits.
func (w *world) let(commits int) {
	for range commits {
		<-w.appended
	}
}

// wantStoreEqualsLog replays the log, by a model of its own, and wants the table to
// hold the same.
func (w *world) wantStoreEqualsLog(t *testing.T, store persistence.Store) {
	t.Helper()
	model := make(map[string]*typesv1.Change)
	for entry, err := range w.log.Read(t.Context(), 1, false) {
		if err != nil {
			t.Fatalf("read the log: %v", err)
		}
		apply(model, entry.Commit)
	}
	records, _ := loadAll(t, store)
	for key, record := range records {
		if got, want := describeRecord(record), describeChange(model[key]); got != want {
			t.Errorf("key %s is stored as %s, the log says %s", key, got, want)
		}
	}
	if len(records) != len(model) {
		t.Errorf("%d keys are stored, the log has %d", len(records), len(model))
	}
}

func apply(model map[string]*typesv1.Change, commit *logv1.Commit) {
	for _, shard := range commit.GetChanges().GetShards() {
		for _, c := range shard.GetChanges() {
			model[string(c.GetKey())] = c
		}
	}
}

func loadAll(t *testing.T, store persistence.Store) (records map[string]persistence.Record, marks []persistence.Watermark) {
	t.Helper()
	var partitions []int
	for partition := range keyspace.PartitionCount {
		partitions = append(partitions, partition)
	}
	records = make(map[string]persistence.Record)
	err := store.Load(t.Context(), partitions,
		func(got []persistence.Watermark) error { marks = got; return nil },
		func(r persistence.Record) error { records[r.Key] = r; return nil })
	if err != nil {
		t.Fatalf("load: %v", err)
	}
	return records, marks
}

func describeRecord(r persistence.Record) string {
	return fmt.Sprintf("%q at %d by %s, arrived %d", r.State.Value, r.State.Timestamp.Millis, r.State.Timestamp.NodeID, r.Arrival.Millis)
}

func describeChange(c *typesv1.Change) string {
	stamp := c.GetRecord().GetTimestamp()
	return fmt.Sprintf("%q at %d by %s, arrived %d", c.GetRecord().GetValue(), stamp.GetMillis(), stamp.GetNodeId(), c.GetArrival().GetMillis())
}

func openStore(t testing.TB, config persistence.Config) persistence.Store {
	t.Helper()
	store, err := stores.Open(t.Context(), config, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatalf("open the store: %v", err)
	}
	t.Cleanup(func() {
		if err := store.Close(); err != nil {
			t.Errorf("close the store: %v", err)
		}
	})
	return store
}

func postgresConfig(url string) persistence.Config {
	config := persistence.DefaultConfig()
	config.Store, config.PostgresURL = persistence.StorePostgres, url
	return config
}

func flush(t *testing.T, service *persistence.Service) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	if _, err := dial(service).Flush(ctx, &persistencev1.FlushRequest{}); err != nil {
		t.Fatalf("flush: %v, ready: %v", err, service.Ready())
	}
}

// TestStoryPG04PostgresStops stops and starts Postgres under load, also before the
// service has ever reached it; afterwards the table equals the log.
func TestStoryPG04PostgresStops(t *testing.T) {
	t.Parallel()
	server := pgtest.Start(t)
	config := postgresConfig(server.NewDatabase(t))
	w := newWorld(t, "")
	server.Stop(t)
	store := openStore(t, config)
	service, _ := start(t, config, persistence.Deps{Store: store, Log: w.log})
	stop := w.writing(t)
	w.let(50)
	if service.Ready() == nil {
		t.Error("ready without a store")
	}
	for range 3 {
		server.Start(t)
		w.let(50)
		flush(t, service)
		if err := service.Ready(); err != nil {
			t.Errorf("Postgres is back and the service not ready: %v", err)
		}
		w.let(50)
		server.Stop(t)
		w.let(100)
	}
	server.Start(t)
	w.let(10)
	stop()
	flush(t, service)
	w.wantStoreEqualsLog(t, store)
}

// TestStoryPG07TwoDrainers lets two services with a pool each drain one log into
// one database, and stops one of them in the middle.
func TestStoryPG07TwoDrainers(t *testing.T) {
	t.Parallel()
	config := postgresConfig(pgtest.NewDatabase(t))
	w := newWorld(t, "")
	store := openStore(t, config)
	one, _ := start(t, config, persistence.Deps{Store: store, Log: w.log})
	_, kill := start(t, config, persistence.Deps{Store: openStore(t, config), Log: w.log})
	stop := w.writing(t)
	w.let(200)
	kill()
	w.let(200)
	stop()
	flush(t, one)
	w.wantStoreEqualsLog(t, store)
}

// TestStoryPG05LoadAndReplay stops the drain in the middle, with trimming as eager
// as can be, and wants what is stored plus the rest of the log to be everything.
// It also wants the log trimmed down to what the journal keeps, and every lane to go
// on.
func TestStoryPG05LoadAndReplay(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{persistence.StorePostgres, persistence.StoreSQLite} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			config := postgresConfig(pgtest.NewDatabase(t))
			config.Store, config.SQLitePath = kind, filepath.Join(t.TempDir(), "topgun.db")
			config.TrimEvery, config.TrimAge = 50*time.Millisecond, 20*time.Millisecond
			config.JournalBytes = 4 << 10
			w := newWorld(t, "")
			model := make(map[string]*typesv1.Change)
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			defer wg.Wait()
			defer cancel()
			// The model reads along, since the log is trimmed behind it.
			read := make(chan uint64, 1)
			wg.Go(func() {
				for entry, err := range w.log.Read(ctx, 1, true) {
					if err != nil {
						return
					}
					apply(model, entry.Commit)
					select {
					case <-read:
					default:
					}
					read <- entry.Sequence
				}
			})
			store := openStore(t, config)
			_, kill := start(t, config, persistence.Deps{Store: store, Log: w.log})
			stop := w.writing(t)
			w.let(300)
			for first := uint64(1); first < 20; {
				w.let(20)
				for entry, err := range w.log.Read(t.Context(), 1, false) {
					if err != nil {
						t.Fatalf("read the log: %v", err)
					}
					first = entry.Sequence
					break
				}
			}
			kill()
			w.let(50)
			stop()
			end, err := w.log.LastSequence(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for at := uint64(0); at < end; {
				at = <-read
			}
			cancel()
			wg.Wait()

			records, marks := loadAll(t, store)
			replayed := make(map[string]string)
			for key, r := range records {
				replayed[key] = describeRecord(r)
			}
			stored := make(map[string]uint64)
			for _, mark := range marks {
				stored[mark.Lane] = mark.Sequence
			}
			rest := 0
			for entry, err := range w.log.Read(t.Context(), 1, false) {
				if err != nil {
					t.Fatalf("read the log: %v", err)
				}
				if entry.Sequence <= stored[entry.Lane] {
					continue
				}
				rest++
				changes := make(map[string]*typesv1.Change)
				apply(changes, entry.Commit)
				for key, c := range changes {
					replayed[key] = describeChange(c)
				}
			}
			if rest < 50 {
				t.Errorf("only %d commits were left to replay", rest)
			}
			for key, c := range model {
				if want := describeChange(c); replayed[key] != want {
					t.Errorf("key %s is %s after load and replay, want %s", key, replayed[key], want)
				}
			}
			// A service that starts again finds no hole.
			service, _ := start(t, config, persistence.Deps{Store: store, Log: w.log})
			flush(t, service)
			if err := service.Ready(); err != nil {
				t.Errorf("not ready: %v", err)
			}
		})
	}
}

// TestStoryPG02Kill kills draining processes at any moment; whatever they had
// committed, the table equals the log in the end.
func TestStoryPG02Kill(t *testing.T) {
	t.Parallel()
	config := postgresConfig(pgtest.NewDatabase(t))
	w := newWorld(t, "127.0.0.1:0")
	store := openStore(t, config)
	stop := w.writing(t)
	w.let(20)
	for range 5 {
		child := exec.Command(os.Args[0])
		child.Env = append(os.Environ(), childNATS+"="+w.embedded.ClientURL(), childURL+"="+config.PostgresURL)
		child.Stderr = os.Stderr
		before := storedSequence(t, store)
		if err := child.Start(); err != nil {
			t.Fatalf("start a drainer: %v", err)
		}
		for storedSequence(t, store) < before+20 {
			w.let(1 + rand.IntN(10))
		}
		if err := child.Process.Kill(); err != nil {
			t.Fatalf("kill a drainer: %v", err)
		}
		_ = child.Wait() // it was killed
	}
	stop()
	service, _ := start(t, config, persistence.Deps{Store: store, Log: w.log})
	flush(t, service)
	w.wantStoreEqualsLog(t, store)
}

func storedSequence(t *testing.T, store persistence.Store) (stored uint64) {
	t.Helper()
	marks, err := store.Watermarks(t.Context())
	if err != nil {
		t.Fatalf("watermarks: %v", err)
	}
	for _, mark := range marks {
		stored = max(stored, mark.Sequence)
	}
	return stored
}

// drainerMain drains until it is killed.
func drainerMain(natsURL, postgresURL string) {
	ctx := context.Background()
	fail := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, "drainer:", err)
			os.Exit(1)
		}
	}
	logger := slog.New(slog.DiscardHandler)
	nc, err := broker.Connect(ctx, natsURL, "drainer", logger)
	fail(err)
	log, err := commitlog.Open(ctx, nc, logConfig())
	fail(err)
	config := postgresConfig(postgresURL)
	store, err := stores.Open(ctx, config, logger)
	fail(err)
	service, err := persistence.New(config, persistence.Deps{Store: store, Log: log, Logger: logger})
	fail(err)
	fail(service.Run(ctx))
}
