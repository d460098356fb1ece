package fanout

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/partition/v1/partitionv1connect"
	"github.com/topgun-sync/topgun/services/internal/bus"
)

// Config holds the limits of the service. DefaultConfig is a good one.
type Config struct {
	// MaxStreams bounds the open streams, one per gateway.
	MaxStreams int
	// MaxMapsPerStream bounds the maps that one stream watches, MaxTopicsPerStream the
	// topics, MaxQueriesPerStream the live queries, MaxQueries those of all streams.
	MaxMapsPerStream    int
	MaxTopicsPerStream  int
	MaxQueriesPerStream int
	MaxQueries          int
	// MaxQueryRows bounds the rows that are kept for one query, at most 100,000: a
	// query without a limit shows so many, and a grouped query that matches more
	// cannot be answered.
	MaxQueryRows int
	// MaxQueryBytes bounds the keys and values that are read for one query, at most
	// 8 MiB; what is kept of them may grow to twice that, with all it takes.
	// MaxQueriesBytes bounds what is kept for all queries; a row counts in each query
	// that has it.
	MaxQueryBytes   int
	MaxQueriesBytes int
	// MaxReads bounds the maps that are read for live queries at the same moment, and
	// the calls for rows.
	MaxReads int
	// QueueEvents and QueueBytes bound what waits for one stream, and for the live
	// queries of one map; for those of all maps 16 times QueueBytes. A single message
	// larger than QueueBytes still passes, alone.
	QueueEvents int
	QueueBytes  int
	// MaxPositions bounds the remembered sequences of (map, shard), over all shards.
	// A forgotten one costs a needless Gap, never an unnoticed loss; a remembered one
	// costs about 100 bytes.
	MaxPositions int
	// HeartbeatPeriod is how often shards publish heartbeats, and how long an event
	// that a heartbeat speaks of may be on its way before it counts as lost.
	HeartbeatPeriod time.Duration
}

// DefaultConfig returns the documented limits.
func DefaultConfig() Config {
	return Config{
		MaxStreams:          1024,
		MaxMapsPerStream:    100_000,
		MaxTopicsPerStream:  100_000,
		MaxQueriesPerStream: 200_000,
		MaxQueries:          500_000,
		MaxQueryRows:        10_000,
		MaxQueryBytes:       8 << 20,
		MaxQueriesBytes:     1 << 30,
		MaxReads:            8,
		QueueEvents:         4096,
		QueueBytes:          16 << 20,
		MaxPositions:        1_000_000,
		HeartbeatPeriod:     bus.HeartbeatPeriod,
	}
}

// Validate says what is wrong with the configuration.
func (c Config) Validate() error {
	for _, limit := range []struct {
		name  string
		value int
	}{
		{"MaxStreams", c.MaxStreams},
		{"MaxMapsPerStream", c.MaxMapsPerStream},
		{"MaxTopicsPerStream", c.MaxTopicsPerStream},
		{"MaxQueriesPerStream", c.MaxQueriesPerStream},
		{"MaxQueries", c.MaxQueries},
		{"MaxQueryRows", c.MaxQueryRows},
		{"MaxQueryBytes", c.MaxQueryBytes},
		{"MaxQueriesBytes", c.MaxQueriesBytes},
		{"MaxReads", c.MaxReads},
		{"QueueEvents", c.QueueEvents},
		{"QueueBytes", c.QueueBytes},
		{"MaxPositions", c.MaxPositions},
	} {
		if limit.value < 1 {
			return fmt.Errorf("fanout: %s must be at least 1", limit.name)
		}
	}
	switch {
	case c.MaxQueryRows > 100_000:
		return errors.New("fanout: MaxQueryRows must be at most 100000")
	case c.MaxQueryBytes > 8<<20:
		return errors.New("fanout: MaxQueryBytes must be at most 8 MiB")
	case c.HeartbeatPeriod < time.Millisecond:
		return errors.New("fanout: HeartbeatPeriod must be at least 1ms")
	}
	return nil
}

// Bus is the end of the bus that the service needs: it receives what was broadcast,
// and publishes the messages of topics.
type Bus interface {
	bus.Subscriber
	PublishTopic(ctx context.Context, message *fanoutv1.TopicMessage) error
}

// Deps are the collaborators of the service. Bus is required. Without Partitions
// every live query is refused. Of the others a nil one is replaced by one that does
// nothing, Now by time.Now and Random by crypto/rand.
type Deps struct {
	Bus Bus
	// Partitions are all nodes that serve shards.
	Partitions []partitionv1connect.PartitionServiceClient
	Logger     *slog.Logger
	Meter      metric.Meter
	Tracer     trace.Tracer
	// Now is read to judge how long a message has been missing.
	Now func() time.Time
	// Random makes the names of streams.
	Random io.Reader
}
