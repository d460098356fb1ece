package fanout

import (
	"errors"
	"io"
	"log/slog"
	"time"

	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"

	"github.com/topgun-sync/topgun/services/internal/bus"
)

// Config holds the limits of the service. DefaultConfig is a good one.
type Config struct {
	// MaxStreams bounds the open streams, one per gateway.
	MaxStreams int
	// MaxMapsPerStream bounds the maps that one stream watches.
	MaxMapsPerStream int
	// QueueEvents and QueueBytes bound what waits for one stream. A single event
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
		MaxStreams:       1024,
		MaxMapsPerStream: 100_000,
		QueueEvents:      4096,
		QueueBytes:       16 << 20,
		MaxPositions:     1_000_000,
		HeartbeatPeriod:  bus.HeartbeatPeriod,
	}
}

// Validate says what is wrong with the configuration.
func (c Config) Validate() error {
	switch {
	case c.MaxStreams < 1:
		return errors.New("fanout: MaxStreams must be at least 1")
	case c.MaxMapsPerStream < 1:
		return errors.New("fanout: MaxMapsPerStream must be at least 1")
	case c.QueueEvents < 1:
		return errors.New("fanout: QueueEvents must be at least 1")
	case c.QueueBytes < 1:
		return errors.New("fanout: QueueBytes must be at least 1")
	case c.MaxPositions < 1:
		return errors.New("fanout: MaxPositions must be at least 1")
	case c.HeartbeatPeriod < time.Millisecond:
		return errors.New("fanout: HeartbeatPeriod must be at least 1ms")
	}
	return nil
}

// Deps are the collaborators of the service. Bus is required; of the others a nil
// one is replaced by one that does nothing, Now by time.Now and Random by
// crypto/rand.
type Deps struct {
	Bus    bus.Subscriber
	Logger *slog.Logger
	Meter  metric.Meter
	Tracer trace.Tracer
	// Now is read to judge how long a message has been missing.
	Now func() time.Time
	// Random makes the names of streams.
	Random io.Reader
}
