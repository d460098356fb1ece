package persistence

import (
	"context"
	"errors"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

type metrics struct {
	rows     metric.Int64Counter
	commits  metric.Int64Counter
	batches  metric.Int64Counter
	duration metric.Float64Histogram
	gauges   metric.Registration
}

func newMetrics(meter metric.Meter, s *Service) (*metrics, error) {
	var m metrics
	var errs []error
	keep := func(err error) { errs = append(errs, err) }
	var err error
	m.rows, err = meter.Int64Counter("topgun.persistence.rows",
		metric.WithUnit("{row}"), metric.WithDescription("Rows that batches offered to the store, by whether they changed it."))
	keep(err)
	m.commits, err = meter.Int64Counter("topgun.persistence.commits",
		metric.WithUnit("{commit}"), metric.WithDescription("Commits of the log that have been stored."))
	keep(err)
	m.batches, err = meter.Int64Counter("topgun.persistence.batches",
		metric.WithUnit("{batch}"), metric.WithDescription("Transactions tried, by outcome: stored, conflict, unavailable, refused."))
	keep(err)
	m.duration, err = meter.Float64Histogram("topgun.persistence.store.duration",
		metric.WithUnit("s"), metric.WithDescription("Time of one transaction, by outcome."),
		metric.WithExplicitBucketBoundaries(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10))
	keep(err)
	lag, err := meter.Int64ObservableGauge("topgun.persistence.lag",
		metric.WithUnit("{commit}"), metric.WithDescription("Commits in the log that are not stored yet."))
	keep(err)
	halted, err := meter.Int64ObservableGauge("topgun.persistence.halted",
		metric.WithDescription("1 when the drain has halted and an operator is needed, else 0."))
	keep(err)
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	m.gauges, err = meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		s.mu.Lock()
		behind, stopped := s.end-min(s.end, s.stored), errors.Is(s.trouble, errHalted)
		s.mu.Unlock()
		o.ObserveInt64(lag, int64(behind))
		o.ObserveInt64(halted, map[bool]int64{true: 1}[stopped])
		return nil
	}, lag, halted)
	return &m, err
}

func (m *metrics) close() error { return m.gauges.Unregister() }

// tried counts one transaction.
func (m *metrics) tried(ctx context.Context, took time.Duration, err error) {
	outcome := "stored"
	switch {
	case err == nil:
	case errors.Is(err, ErrConflict):
		outcome = "conflict"
	case errors.Is(err, ErrRefused):
		outcome = "refused"
	default:
		outcome = "unavailable"
	}
	attributes := metric.WithAttributes(attribute.String("outcome", outcome))
	m.batches.Add(ctx, 1, attributes)
	m.duration.Record(ctx, took.Seconds(), attributes)
}

// stored counts what a transaction brought.
func (m *metrics) stored(ctx context.Context, b *batch, changed int) {
	m.commits.Add(ctx, int64(b.commits))
	m.rows.Add(ctx, int64(changed), metric.WithAttributes(attribute.Bool("changed", true)))
	if same := b.rows() - changed; same > 0 {
		m.rows.Add(ctx, int64(same), metric.WithAttributes(attribute.Bool("changed", false)))
	}
}
