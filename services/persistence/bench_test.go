package persistence_test

import (
	"context"
	"fmt"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/keyspace"
	"github.com/topgun-sync/topgun/core/lwwmap"
	logv1 "github.com/topgun-sync/topgun/gen/go/topgun/log/v1"
	persistencev1 "github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1/persistencev1connect"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
	"github.com/topgun-sync/topgun/services/internal/commitlog"
	"github.com/topgun-sync/topgun/services/internal/pgtest"
	"github.com/topgun-sync/topgun/services/persistence"
)

// benchStores opens the stores that last, as durable as in production.
func benchStores(b *testing.B, run func(b *testing.B, store persistence.Store)) {
	for _, kind := range []string{persistence.StorePostgres, persistence.StoreSQLite} {
		b.Run(kind, func(b *testing.B) {
			config := persistence.DefaultConfig()
			config.Store = kind
			config.SQLitePath = filepath.Join(b.TempDir(), "topgun.db")
			if kind == persistence.StorePostgres {
				config.PostgresURL = pgtest.Start(b, pgtest.WithFsync()).NewDatabase(b)
			}
			run(b, openStore(b, config))
		})
	}
}

// benchRecords are records of some 100 bytes that people can read.
func benchRecords(from, n int, at uint64) []persistence.Record {
	records := make([]persistence.Record, n)
	for i := range records {
		key := fmt.Sprintf("todo-%08x", uint32(from+i)*2654435761)
		records[i] = persistence.Record{
			Identity: persistence.Identity{Map: "todos", Key: key},
			State: lwwmap.Record{
				Value:     append([]byte("\x84\xa2id\xad"+key+"\xa5title\xd9\x28"), "buy milk, bread, butter, eggs and cheese\xa4done\xc2\xa4rank\x07"...),
				Timestamp: hlc.Timestamp{Millis: at, Counter: uint64(i), NodeID: "client-0123456789abcdef"},
			},
			Arrival: persistence.Arrival{Millis: at, Counter: uint64(i)},
		}
	}
	return records
}

func commitAll(b *testing.B, store persistence.Store, position *persistence.Position, records []persistence.Record) {
	from := *position
	position.Sequence++
	position.Number++
	if _, err := store.Commit(b.Context(), persistence.Batch{
		History: "history", Records: records, Moves: []persistence.Move{{Lane: "lane", From: from, To: *position}},
	}); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkCommit stores batches of 1,000: new keys, then the same keys again.
func BenchmarkCommit(b *testing.B) {
	const size, keys = 1000, 100_000
	benchStores(b, func(b *testing.B, store persistence.Store) {
		var position persistence.Position
		commitAll(b, store, &position, benchRecords(keys, size, 1)) // opens what opens late
		rows := 0
		for b.Loop() {
			commitAll(b, store, &position, benchRecords(rows%keys, size, uint64(2+rows/keys)))
			rows += size
		}
		b.ReportMetric(float64(rows)/b.Elapsed().Seconds(), "rows/s")
	})
}

// drainOf starts a service on a real log and store.
func drainOf(b *testing.B, store persistence.Store) (*commitlog.Lane, persistencev1connect.PersistenceServiceFollowWatermarksClientStream) {
	w := newWorld(b, "")
	c := persistence.DefaultConfig()
	c.Store = persistence.StoreMemory // only a name: the store is given
	service, _ := start(b, c, persistence.Deps{Store: store, Log: w.log})
	lane, err := w.log.OpenLane("lane")
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	stream, err := dial(service).FollowWatermarks(ctx, &persistencev1.FollowWatermarksRequest{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		cancel()
		_ = stream.Close() // it was ended
	})
	return lane, stream
}

// benchCommit is a commit of records as BenchmarkCommit stores them.
func benchCommit(from, n int, at uint64) *logv1.Commit {
	changes := &logv1.ShardChanges{}
	for _, r := range benchRecords(from, n, at) {
		changes.Changes = append(changes.Changes, &typesv1.Change{
			Map: r.Map, Key: []byte(r.Key),
			Record:  &typesv1.Record{Value: r.State.Value, Timestamp: &typesv1.Timestamp{Millis: r.State.Timestamp.Millis, Counter: r.State.Timestamp.Counter, NodeId: r.State.Timestamp.NodeID}},
			Arrival: &typesv1.Arrival{Millis: r.Arrival.Millis, Counter: r.Arrival.Counter},
		})
	}
	return &logv1.Commit{Body: &logv1.Commit_Changes{Changes: &logv1.Changes{Shards: []*logv1.ShardChanges{changes}}}}
}

func stored(b *testing.B, stream persistencev1connect.PersistenceServiceFollowWatermarksClientStream, sequence uint64) {
	for at := uint64(0); at < sequence; {
		response, err := stream.Receive()
		if err != nil {
			b.Fatal(err)
		}
		for _, mark := range response.GetWatermarks() {
			at = mark.GetSequence()
		}
	}
}

// BenchmarkPersisted appends one change to an idle system and waits until a follower
// is told that it is stored.
func BenchmarkPersisted(b *testing.B) {
	benchStores(b, func(b *testing.B, store persistence.Store) {
		lane, stream := drainOf(b, store)
		for at := uint64(1); b.Loop(); at++ {
			sequence, err := lane.Append(b.Context(), benchCommit(int(at), 1, at))
			if err != nil {
				b.Fatal(err)
			}
			stored(b, stream, sequence)
		}
	})
}

// BenchmarkDrain appends 10,000 changes a second, in 500 commits, and tells how much
// CPU one change takes from the log into the store, in how many commits a second.
func BenchmarkDrain(b *testing.B) {
	const size, every = 20, 2 * time.Millisecond
	benchStores(b, func(b *testing.B, store persistence.Store) {
		lane, stream := drainOf(b, store)
		ticker := time.NewTicker(every)
		defer ticker.Stop()
		var last uint64
		before, rows := cpuTime(b), 0
		for at := uint64(1); b.Loop(); at++ {
			<-ticker.C
			sequence, err := lane.Append(b.Context(), benchCommit(rows, size, at))
			if err != nil {
				b.Fatal(err)
			}
			rows, last = rows+size, sequence
		}
		stored(b, stream, last)
		b.ReportMetric(float64((cpuTime(b)-before).Microseconds())/float64(rows), "cpu-µs/row")
		b.ReportMetric(float64(rows)/b.Elapsed().Seconds(), "rows/s")
	})
}

// cpuTime is what this process has used.
func cpuTime(b *testing.B) time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// BenchmarkLoad reads 100,000 records of all partitions.
func BenchmarkLoad(b *testing.B) {
	const n = 100_000
	benchStores(b, func(b *testing.B, store persistence.Store) {
		var position persistence.Position
		for from := 0; from < n; from += 5000 {
			commitAll(b, store, &position, benchRecords(from, 5000, 1))
		}
		var partitions []int
		for partition := range keyspace.PartitionCount {
			partitions = append(partitions, partition)
		}
		rows := 0
		for b.Loop() {
			if err := store.Load(b.Context(), partitions,
				func([]persistence.Watermark) error { return nil },
				func(persistence.Record) error { rows++; return nil }); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(float64(rows)/b.Elapsed().Seconds(), "rows/s")
	})
}
