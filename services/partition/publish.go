package partition

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"time"

	"go.opentelemetry.io/otel/trace"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
	"github.com/topgun-sync/topgun/services/internal/bus"
)

// publisher tells the bus what was logged. It has a goroutine of its own, so that
// neither receipts nor the next append wait for it.
type publisher struct {
	events Events
	lane   string
	now    func() time.Time
	logger *slog.Logger
	// positions of the maps of each shard, by name. A map keeps its place for as
	// long as the lane lives: its numbers must not start again.
	positions []map[string]*position
}

type position struct {
	sequence uint64
	changed  time.Time
}

func newPublisher(events Events, lane string, shards int, now func() time.Time, logger *slog.Logger) *publisher {
	p := &publisher{events: events, lane: lane, now: now, logger: logger, positions: make([]map[string]*position, shards)}
	for i := range p.positions {
		p.positions[i] = make(map[string]*position)
	}
	return p
}

// run publishes batches in order, and heartbeats, until the channel is closed.
func (p *publisher) run(ctx context.Context, logged <-chan *batch) {
	ticker := time.NewTicker(bus.HeartbeatPeriod)
	defer ticker.Stop()
	for {
		select {
		case b, ok := <-logged:
			if !ok {
				return
			}
			p.publish(ctx, b)
		case <-ticker.C:
			p.heartbeat(ctx)
		}
	}
}

// publish makes one event per map and shard of a batch.
func (p *publisher) publish(ctx context.Context, b *batch) {
	if b.span.IsValid() {
		ctx = trace.ContextWithSpanContext(ctx, b.span)
	}
	for shard, s := range b.shards {
		if s == nil {
			continue
		}
		var order []*fanoutv1.Event
		byMap := make(map[string]*fanoutv1.Event)
		for i, c := range s.GetChanges() {
			if !published(c) {
				continue
			}
			c.Origin = b.origins[shard][i]
			event := byMap[c.GetMap()]
			if event == nil {
				event = &fanoutv1.Event{Map: c.GetMap(), Shard: uint32(shard), Lane: p.lane, Sequence: p.advance(shard, c)}
				byMap[event.Map] = event
				order = append(order, event)
			}
			event.Changes = append(event.Changes, c)
		}
		for _, event := range order {
			if err := p.events.PublishEvent(ctx, event); err != nil {
				p.logger.Warn("an event was not published; subscribers will notice the gap", "shard", shard, "error", err)
			}
		}
	}
}

// published reports whether anybody looks at a change: nobody does at locks, at what
// is known of devices, and at tombstones that are forgotten.
func published(c *typesv1.Change) bool {
	return c.GetKind() != typesv1.Kind_KIND_LOCK && !c.GetPruned() && c.GetMap() != devicesMap
}

func (p *publisher) advance(shard int, c *typesv1.Change) uint64 {
	at := p.positions[shard][c.GetMap()]
	if at == nil {
		at = new(position)
		p.positions[shard][c.GetMap()] = at
	}
	at.sequence++
	at.changed = p.now()
	return at.sequence
}

// heartbeat publishes where the recently changed maps of each shard are. A shard at
// rest sends it too: if its owner died between an append and the broadcast, the new
// lane's name is the only sign of the loss (FAN-01).
func (p *publisher) heartbeat(ctx context.Context) {
	oldest := p.now().Add(-bus.HeartbeatMemory)
	for shard, positions := range p.positions {
		beat := &fanoutv1.Heartbeat{Shard: uint32(shard), Lane: p.lane}
		for name, at := range positions {
			if at.changed.After(oldest) {
				beat.Maps = append(beat.Maps, &fanoutv1.MapSequence{Map: name, Sequence: at.sequence})
			}
		}
		slices.SortFunc(beat.Maps, func(a, b *fanoutv1.MapSequence) int { return strings.Compare(a.GetMap(), b.GetMap()) })
		if err := p.events.PublishHeartbeat(ctx, beat); err != nil {
			p.logger.Debug("a heartbeat was not published", "shard", shard, "error", err)
		}
	}
}
