package fanout

import (
	"context"
	"fmt"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
)

// Causes of gaps, as they show up in metrics and logs.
const (
	causeSequence  = "sequence"  // an event is missing before the one that came
	causeHeartbeat = "heartbeat" // events that a heartbeat spoke of did not come
	causeLane      = "lane"      // another process owns the shard
	causeBus       = "bus"       // the bus was away or dropped messages
	causeOverflow  = "overflow"  // a stream's queue was full
)

// meters are the service's instruments.
type meters struct {
	meter     metric.Meter
	eventsIn  metric.Int64Counter
	eventsOut metric.Int64Counter
	gaps      metric.Int64Counter
	causes    map[string]metric.AddOption

	topicsIn      metric.Int64Counter
	topicsDropped metric.Int64Counter
	topicLosses   metric.Int64Counter
	reads         metric.Int64Counter
	readRows      metric.Int64Counter
	readsFailed   metric.Int64Counter
	resultsAgain  metric.Int64Counter

	queries      metric.Int64ObservableGauge
	queriesBytes metric.Int64ObservableGauge
	streams      metric.Int64ObservableGauge
	maps         metric.Int64ObservableGauge
	messages     metric.Int64ObservableGauge
	bytes        metric.Int64ObservableGauge
}

func newMeters(meter metric.Meter) (*meters, error) {
	if meter == nil {
		meter = metricnoop.NewMeterProvider().Meter("")
	}
	m := &meters{meter: meter, causes: make(map[string]metric.AddOption)}
	for _, cause := range []string{causeSequence, causeHeartbeat, causeLane, causeBus, causeOverflow} {
		m.causes[cause] = metric.WithAttributeSet(attribute.NewSet(attribute.String("cause", cause)))
	}
	for _, c := range []struct {
		to                *metric.Int64Counter
		name, description string
	}{
		{&m.eventsIn, "topgun.fanout.events.received", "Events of watched maps that came from the bus."},
		{&m.eventsOut, "topgun.fanout.events.sent", "Messages of all kinds handed to gateways."},
		{&m.topicsIn, "topgun.fanout.topics.received", "Messages of watched topics that came from the bus."},
		{&m.topicsDropped, "topgun.fanout.topics.dropped", "Messages of topics that did not fit into a stream's queue."},
		{&m.topicLosses, "topgun.fanout.topics.losses", "Times that the bus may have lost messages of topics."},
		{&m.reads, "topgun.fanout.queries.reads", "Answers of partitions to reads for live queries."},
		{&m.readRows, "topgun.fanout.queries.read_rows", "Rows in them."},
		{&m.readsFailed, "topgun.fanout.queries.reads_failed", "Reads for live queries of a map that have to be done again."},
		{&m.resultsAgain, "topgun.fanout.queries.results_again", "Results sent afresh because changes did not fit into a stream's queue."},
		{&m.gaps, "topgun.fanout.gaps", "Maps, and for overflows queues, in which events were or may have been lost."},
	} {
		var err error
		if *c.to, err = meter.Int64Counter(c.name, metric.WithDescription(c.description)); err != nil {
			return nil, fmt.Errorf("make the counter %s: %w", c.name, err)
		}
	}
	for _, g := range []struct {
		to                *metric.Int64ObservableGauge
		name, description string
	}{
		{&m.queries, "topgun.fanout.queries", "Distinct queries that are kept up to date."},
		{&m.queriesBytes, "topgun.fanout.queries.bytes", "Bytes of their rows; a row counts in each query that has it."},
		{&m.streams, "topgun.fanout.streams", "Open gateway streams."},
		{&m.maps, "topgun.fanout.maps", "Maps that some stream watches."},
		{&m.messages, "topgun.fanout.queue.messages", "Messages that wait in the streams' queues."},
		{&m.bytes, "topgun.fanout.queue.bytes", "Bytes of events that wait in the streams' queues."},
	} {
		var err error
		if *g.to, err = meter.Int64ObservableGauge(g.name, metric.WithDescription(g.description)); err != nil {
			return nil, fmt.Errorf("make the gauge %s: %w", g.name, err)
		}
	}
	return m, nil
}

func (m *meters) gap(cause string) { m.gaps.Add(context.Background(), 1, m.causes[cause]) }

// observe feeds the gauges from s until the function it returns is called.
func (m *meters) observe(s *Service) (stop func(), err error) {
	registration, err := m.meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		streams, maps, queries, _ := s.describe()
		messages, bytes := s.queued()
		o.ObserveInt64(m.queries, int64(queries))
		o.ObserveInt64(m.queriesBytes, s.queriesBytes.Load())
		o.ObserveInt64(m.streams, int64(streams))
		o.ObserveInt64(m.maps, int64(maps))
		o.ObserveInt64(m.messages, int64(messages))
		o.ObserveInt64(m.bytes, int64(bytes))
		return nil
	}, m.queries, m.queriesBytes, m.streams, m.maps, m.messages, m.bytes)
	if err != nil {
		return nil, fmt.Errorf("observe gauges: %w", err)
	}
	return func() {
		if err := registration.Unregister(); err != nil {
			s.logger.Warn("stop observing gauges", "error", err)
		}
	}, nil
}
