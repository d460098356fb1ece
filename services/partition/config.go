package partition

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"time"

	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1/persistencev1connect"
	"github.com/topgun-sync/topgun/services/internal/commitlog"
)

// maxNodeID keeps lane names, which begin with the node's, to their bound.
const maxNodeID = 64

// Config sets the service. DefaultConfig gives the values that suit everybody.
type Config struct {
	// NodeID names the process: 1 to 64 letters, digits, '-' and '_'.
	NodeID string
	// AcceptLogLoss starts on a store that was filled from another log, which is
	// gone. What that log held and the store does not is lost.
	AcceptLogLoss bool
	// MaxPendingBytes bounds the keys and values of ops that were taken and are not
	// in the log yet. Beyond it a caller waits until its context ends and is then
	// refused as OVERLOADED.
	MaxPendingBytes int64
	// TombstoneRetention is how long a removal is remembered, at least a minute; 0 is
	// for ever. Who was away for longer must sync anew, and what it wrote before is
	// rejected where nothing is known of the key. It should be well above the hours
	// that a wall clock may be wrong by.
	TombstoneRetention time.Duration
	// StopTimeout is how long a stopping service tries to log what it merged and to
	// close its lane.
	StopTimeout time.Duration
}

// DefaultConfig returns settings that suit everybody; NodeID must still be chosen.
func DefaultConfig() Config {
	return Config{MaxPendingBytes: 64 << 20, TombstoneRetention: 30 * 24 * time.Hour, StopTimeout: 10 * time.Second}
}

// Validate reports what is wrong with the settings.
func (c Config) Validate() error {
	var errs []error
	ok := c.NodeID != "" && len(c.NodeID) <= maxNodeID
	for i := range len(c.NodeID) {
		b := c.NodeID[i]
		ok = ok && ('a' <= b && b <= 'z' || 'A' <= b && b <= 'Z' || '0' <= b && b <= '9' || b == '-' || b == '_')
	}
	if !ok {
		errs = append(errs, errors.New("partition: the node id must be 1 to 64 letters, digits, '-' and '_'"))
	}
	if c.MaxPendingBytes < 1<<20 {
		errs = append(errs, errors.New("partition: max pending bytes must be at least 1 MiB"))
	}
	if c.TombstoneRetention != 0 && c.TombstoneRetention < minRetention {
		errs = append(errs, errors.New("partition: the tombstone retention must be 0, for ever, or at least 1 minute"))
	}
	if c.StopTimeout <= 0 {
		errs = append(errs, errors.New("partition: the stop timeout must be above 0"))
	}
	return errors.Join(errs...)
}

// Events takes what was logged to those who look at the maps. An error means that
// subscribers may miss it, which they notice by the sequence.
type Events interface {
	// PublishEvent sends an event; calls come from one goroutine.
	PublishEvent(ctx context.Context, event *fanoutv1.Event) error
	// PublishHeartbeat sends a heartbeat; calls come from the same goroutine.
	PublishHeartbeat(ctx context.Context, heartbeat *fanoutv1.Heartbeat) error
}

// Deps are the collaborators. Log, Persistence and Events are required.
type Deps struct {
	Log         *commitlog.Log
	Persistence persistencev1connect.PersistenceServiceClient
	Events      Events
	// Logger, Meter and Tracer do nothing when nil.
	Logger *slog.Logger
	Meter  metric.Meter
	Tracer trace.Tracer
	// Now is the wall clock; time.Now when nil.
	Now func() time.Time
	// Elapsed is a monotonic clock: the time since some moment, whatever becomes of the
	// wall clock. The process's own when nil.
	Elapsed func() time.Duration
	// Random makes lane names; crypto/rand when nil.
	Random io.Reader
}
