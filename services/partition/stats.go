package partition

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	logv1 "github.com/topgun-sync/topgun/gen/go/topgun/log/v1"
)

// outcomeNames are the values of the attribute outcome.
var outcomeNames = [outcomes]string{"applied", "duplicate", "superseded", "restamped", "rejected"}

// stats measures the service. Counting an op costs one atomic addition; the
// instruments read when they are asked.
type stats struct {
	ops     [outcomes]atomic.Int64
	refused atomic.Int64
	// active is what is being served, nil otherwise.
	active atomic.Pointer[active]

	commitChanges metric.Int64Histogram
	append        metric.Float64Histogram
}

func newStats(meter metric.Meter) (*stats, error) {
	s := new(stats)
	var errs [6]error
	s.commitChanges, errs[0] = meter.Int64Histogram("topgun.partition.commit.size",
		metric.WithUnit("{change}"), metric.WithDescription("Changes per commit appended to the log."))
	s.append, errs[1] = meter.Float64Histogram("topgun.partition.append.duration",
		metric.WithUnit("s"), metric.WithDescription("Time from the first attempt to append a commit until it was in the log."))
	_, errs[2] = meter.Int64ObservableCounter("topgun.partition.ops",
		metric.WithDescription("Merged ops by outcome."), metric.WithInt64Callback(s.observeOps))
	_, errs[3] = meter.Int64ObservableCounter("topgun.partition.refusals",
		metric.WithDescription("Groups of ops of which none was merged."), metric.WithInt64Callback(s.observeRefusals))
	_, errs[4] = meter.Int64ObservableGauge("topgun.partition.records",
		metric.WithDescription("Records in memory, tombstones included."), metric.WithInt64Callback(s.observeRecords))
	_, errs[5] = meter.Int64ObservableGauge("topgun.partition.shard.queue",
		metric.WithDescription("Tasks that wait for a shard."), metric.WithInt64Callback(s.observeQueues))
	for _, err := range errs {
		if err != nil {
			return nil, fmt.Errorf("make an instrument: %w", err)
		}
	}
	return s, nil
}

// appended counts one commit.
func (s *stats) appended(ctx context.Context, commit *logv1.Commit, took time.Duration) {
	changes := 0
	for _, shard := range commit.GetChanges().GetShards() {
		changes += len(shard.GetChanges())
	}
	s.commitChanges.Record(ctx, int64(changes))
	s.append.Record(ctx, took.Seconds())
}

func (s *stats) observeOps(_ context.Context, o metric.Int64Observer) error {
	for i := range s.ops {
		o.Observe(s.ops[i].Load(), metric.WithAttributes(attribute.String("outcome", outcomeNames[i])))
	}
	return nil
}

func (s *stats) observeRefusals(_ context.Context, o metric.Int64Observer) error {
	o.Observe(s.refused.Load())
	return nil
}

func (s *stats) observeRecords(_ context.Context, o metric.Int64Observer) error {
	if a := s.active.Load(); a != nil {
		for _, shard := range a.shards {
			o.Observe(shard.records.Load(), metric.WithAttributes(attribute.Int("shard", shard.id)))
		}
	}
	return nil
}

func (s *stats) observeQueues(_ context.Context, o metric.Int64Observer) error {
	if a := s.active.Load(); a != nil {
		for _, shard := range a.shards {
			o.Observe(int64(len(shard.inbox)), metric.WithAttributes(attribute.Int("shard", shard.id)))
		}
	}
	return nil
}
