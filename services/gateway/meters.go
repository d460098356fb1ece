package gateway

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/topgun-sync/topgun/core/wire"
)

// The types of frames that are counted apart. What a client may name freely is not a
// label: it would be a metric for every word it thinks of.
const (
	inAuth = iota
	inPing
	inSync
	inBucket
	inOps
	inCounter
	inLock
	inQuery
	inTopic
	inJournal
	inOther
	inBad
	inControl
	inTypes
)

const (
	outAuth = iota
	outPong
	outAck
	outRejected
	outEvent
	outRoot
	outBuckets
	outLeaf
	outResult
	outUpdate
	outTopic
	outJournal
	outError
	outOther
	outTypes
)

var (
	inNames  = [inTypes]string{"auth", "ping", "sync_init", "bucket_request", "ops", "counter", "lock", "query", "topic", "journal", "other", "bad", "control"}
	outNames = [outTypes]string{
		"auth", "pong", "ack", "rejected", "event", "root", "buckets", "leaf", "result", "update", "topic", "journal", "error", "other",
	}
)

// meters are the instruments of sockets. Counting a frame is one atomic addition; the
// sums are read when metrics are collected.
type meters struct {
	in        [inTypes]atomic.Int64
	out       [outTypes]atomic.Int64
	drops     atomic.Int64
	sessions  atomic.Int64
	ackTime   metric.Float64Histogram
	ackLabels metric.MeasurementOption
}

func newMeters(meter metric.Meter) (*meters, error) {
	m := &meters{ackLabels: metric.WithAttributeSet(attribute.NewSet())}
	var errs [5]error
	var in, out, drops metric.Int64ObservableCounter
	var open metric.Int64ObservableUpDownCounter
	in, errs[0] = meter.Int64ObservableCounter("topgun_gateway_frames_in_total",
		metric.WithDescription("Frames from clients, by type."))
	out, errs[1] = meter.Int64ObservableCounter("topgun_gateway_frames_out_total",
		metric.WithDescription("Frames queued for clients, by type."))
	drops, errs[2] = meter.Int64ObservableCounter("topgun_gateway_queue_drops_total",
		metric.WithDescription("Queued events dropped because a session read too slowly; a fresh root replaces them."))
	open, errs[3] = meter.Int64ObservableUpDownCounter("topgun_gateway_sessions",
		metric.WithDescription("Open WebSocket sessions."))
	m.ackTime, errs[4] = meter.Float64Histogram("topgun_gateway_ack_seconds", metric.WithUnit("s"),
		metric.WithDescription("Time from the arrival of a batch of ops to its ack being queued."),
		metric.WithExplicitBucketBoundaries(.0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10))
	if err := errors.Join(errs[:]...); err != nil {
		return nil, err
	}
	label := func(name string) metric.MeasurementOption {
		return metric.WithAttributeSet(attribute.NewSet(attribute.String("type", name)))
	}
	var inLabels [inTypes]metric.MeasurementOption
	for i, name := range inNames {
		inLabels[i] = label(name)
	}
	var outLabels [outTypes]metric.MeasurementOption
	for i, name := range outNames {
		outLabels[i] = label(name)
	}
	_, err := meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		for i := range m.in {
			o.ObserveInt64(in, m.in[i].Load(), inLabels[i])
		}
		for i := range m.out {
			o.ObserveInt64(out, m.out[i].Load(), outLabels[i])
		}
		o.ObserveInt64(drops, m.drops.Load())
		o.ObserveInt64(open, m.sessions.Load())
		return nil
	}, in, out, drops, open)
	return m, err
}

func (m *meters) opened()           { m.sessions.Add(1) }
func (m *meters) closed()           { m.sessions.Add(-1) }
func (m *meters) received(kind int) { m.in[kind].Add(1) }
func (m *meters) dropped(n int)     { m.drops.Add(int64(n)) }
func (m *meters) sentType(kind int) { m.out[kind].Add(1) }
func (m *meters) delivered(n int)   { m.out[outEvent].Add(int64(n)) }
func (m *meters) updated(n int)     { m.out[outUpdate].Add(int64(n)) }

func (m *meters) acked(took time.Duration) {
	m.ackTime.Record(context.Background(), took.Seconds(), m.ackLabels)
}

// sent counts a message by its type.
func (m *meters) sent(message wire.Message) {
	kind := outOther
	switch message.(type) {
	case *wire.AuthRequired, *wire.AuthAck, *wire.AuthFail, *wire.DeviceAck:
		kind = outAuth
	case *wire.Pong:
		kind = outPong
	case *wire.OpAck:
		kind = outAck
	case *wire.OpRejected:
		kind = outRejected
	case *wire.ServerEvent:
		kind = outEvent
	case *wire.SyncRespRoot, *wire.ORMapSyncRespRoot:
		kind = outRoot
	case *wire.SyncRespBuckets, *wire.ORMapSyncRespBuckets:
		kind = outBuckets
	case *wire.QueryResp:
		kind = outResult
	case *wire.JournalReadResponse, *wire.JournalEvent:
		kind = outJournal
	case *wire.ErrorMessage:
		kind = outError
	}
	m.sentType(kind)
}
