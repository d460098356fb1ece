package partition

import (
	"fmt"
	"testing"
	"time"

	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
)

// BenchmarkApply merges ops of new records in batches over all shards and waits
// until they are in the log.
func BenchmarkApply(b *testing.B) {
	for _, size := range []int{10, 1000} {
		b.Run(fmt.Sprintf("batch=%d", size), func(b *testing.B) {
			n := newWorld(b).start()
			b.ReportAllocs()
			b.SetParallelism(32)
			var made int
			b.ResetTimer()
			for made < b.N {
				n.fill(b, made, size)
				made += size
			}
		})
	}
}

// fill writes records of 100 bytes, in one request.
func (n *node) fill(tb testing.TB, first, count int) {
	shards := make([]*partitionv1.ShardOps, shardCount)
	for i := range shards {
		shards[i] = &partitionv1.ShardOps{Shard: uint32(i)}
	}
	value := string(make([]byte, 98))
	for i := range count {
		op := put(fmt.Sprintf("users/%08d", first+i), value, 1, "client-a")
		s := shards[shardFor(op.GetKey())]
		s.Ops = append(s.Ops, op)
	}
	req := &partitionv1.ApplyRequest{}
	for _, s := range shards {
		if len(s.GetOps()) > 0 {
			req.Shards = append(req.Shards, s)
		}
	}
	if _, err := n.Apply(tb.Context(), req); err != nil {
		tb.Fatal(err)
	}
}

// BenchmarkSince reads a map of 100,000 records in pages, as a first sync does.
func BenchmarkSince(b *testing.B) {
	const records = 100_000
	n := newWorld(b).start()
	for first := 0; first < records; first += 1000 {
		n.fill(b, first, 1000)
	}
	b.ReportAllocs()
	for b.Loop() {
		read, req := 0, &partitionv1.SinceRequest{Map: "m", Limit: 2000, MaxBytes: 128 << 10}
		for more := true; more; {
			resp, err := n.Since(b.Context(), req)
			if err != nil {
				b.Fatal(err)
			}
			read, more = read+len(resp.GetChanges()), resp.GetMore()
			req = &partitionv1.SinceRequest{Map: "m", Limit: 2000, MaxBytes: 128 << 10, After: resp.GetCovered()}
		}
		if read != records {
			b.Fatalf("read %d records", read)
		}
	}
}

// BenchmarkRestart measures how long a new process takes to serve 100,000 records
// again: from the log alone, and from the store.
func BenchmarkRestart(b *testing.B) {
	for _, stored := range []bool{false, true} {
		b.Run(fmt.Sprintf("stored=%t", stored), func(b *testing.B) {
			w := newWorld(b)
			n := w.start()
			for first := 0; first < 100_000; first += 1000 {
				n.fill(b, first, 1000)
			}
			if stored {
				w.store.drain(b, w.log, 1<<30)
				w.store.trim(b, w.log)
			}
			n.stop()
			for b.Loop() {
				start := time.Now()
				n = w.start()
				b.ReportMetric(time.Since(start).Seconds(), "s/start")
				b.StopTimer()
				n.stop()
				b.StartTimer()
			}
		})
	}
}
