package persistence_test

import (
	"fmt"
	"path/filepath"
	"testing"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/keyspace"
	"github.com/topgun-sync/topgun/core/lwwmap"
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
			Map: "todos", Key: key,
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
