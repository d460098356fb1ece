package gateway

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
)

// watchTimeout bounds one Watch call; a fanout that does not answer it is lost.
const watchTimeout = 10 * time.Second

// follow opens the gateway's stream of changes, again and again until ctx ends.
func (h *hub) follow(ctx context.Context) {
	retry := firstRetry
	for ctx.Err() == nil {
		opened, err := h.subscribe(ctx)
		h.stirAll() // who probes may miss a change from here on
		h.lost()
		h.queries.lost()
		h.topics.lost()
		if ctx.Err() != nil {
			return
		}
		if opened {
			retry = firstRetry
		}
		h.log.Warn("fanout stream lost", "error", err, "retry", retry)
		// Jittered, so that the gateways of a cluster do not return as one.
		if !pause(ctx, retry/2+rand.N(retry)) {
			return
		}
		retry = min(2*retry, maxRetry)
	}
}

// subscribe opens one stream and hands on what it brings until it ends.
func (h *hub) subscribe(ctx context.Context) (opened bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel(nil)
	stream, err := h.fanout.Subscribe(ctx, &fanoutv1.SubscribeRequest{GatewayId: h.gatewayID})
	if err != nil {
		return false, err
	}
	// Closing releases the stream; that it has ended is known already.
	defer func() { _ = stream.Close() }()
	for {
		message, err := stream.Receive()
		if err != nil {
			if cause := context.Cause(ctx); cause != nil {
				err = cause
			}
			return opened, err
		}
		switch m := message.Message.(type) {
		case *fanoutv1.SubscribeResponse_Ready:
			if !opened {
				opened = true
				h.opened(m.Ready.GetStreamId())
				// Beside the receiving: fanout may send before it answers.
				wg.Go(func() { cancel(h.watch(ctx, m.Ready.GetStreamId())) })
			}
		case *fanoutv1.SubscribeResponse_Event:
			if h.concerns(m.Event) {
				h.deliver(m.Event.GetMap(), changesOf(m.Event))
			}
		case *fanoutv1.SubscribeResponse_Gap:
			h.stir(m.Gap.GetMap())
			h.gap(m.Gap.GetMap())
		case *fanoutv1.SubscribeResponse_QueryResult:
			h.queries.result(m.QueryResult)
		case *fanoutv1.SubscribeResponse_QueryChanges:
			h.queries.changes(m.QueryChanges)
		case *fanoutv1.SubscribeResponse_TopicMessage:
			h.topics.deliver(m.TopicMessage)
		}
	}
}

// watch tells fanout which maps, queries and topics the stream is to bring, until ctx
// ends or a call fails. Everything that is wanted when it gets to it travels in one call.
func (h *hub) watch(ctx context.Context, stream string) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-h.kick:
		}
		current, add, remove := h.wanted()
		if current != stream {
			return nil
		}
		request := &fanoutv1.WatchRequest{StreamId: stream, Add: add, Remove: remove}
		moreQueries, moreTopics := h.queries.wanted(request), h.topics.wanted(request)
		if moreQueries || moreTopics {
			notify(h.kick) // the rest follows
		}
		if asksNothing(request) {
			continue
		}
		call, cancel := context.WithTimeout(ctx, watchTimeout)
		_, err := h.fanout.Watch(call, request)
		cancel()
		if err != nil {
			return err
		}
		for _, name := range add {
			h.stir(name) // who probed it before now may have missed a change
		}
		h.watching(stream, add)
	}
}

func asksNothing(r *fanoutv1.WatchRequest) bool {
	return len(r.GetAdd())+len(r.GetRemove())+len(r.GetAddQueries())+len(r.GetRefreshQueries())+
		len(r.GetRemoveQueries())+len(r.GetAddTopics())+len(r.GetRemoveTopics()) == 0
}

// concerns reports whether an event holds a change for some session here, which its
// own changes are not: a map that one client alone writes and looks at is the usual
// case, and nothing of such an event needs to be converted and encoded.
func (h *hub) concerns(event *fanoutv1.Event) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.stirLocked(event.GetMap())
	t := h.maps[event.GetMap()]
	if t == nil || len(t.sessions) != 1 {
		return t != nil && len(t.sessions) > 0
	}
	for s, looks := range t.sessions {
		for _, c := range event.GetChanges() {
			of, ok := kindFromProto(c.GetKind())
			if ok && looks.has(of) && c.GetOrigin() != s.origin {
				return true
			}
		}
	}
	return false
}

// changesOf returns the changes that clients are told of: a forgotten tombstone changes
// nothing for them.
func changesOf(e *fanoutv1.Event) []change {
	changes := make([]change, 0, len(e.GetChanges()))
	for _, c := range e.GetChanges() {
		of, ok := kindFromProto(c.GetKind())
		if !ok || c.GetPruned() {
			continue
		}
		changes = append(changes, change{
			of:      of,
			key:     string(c.GetKey()),
			tag:     c.GetTag(),
			record:  recordFromProto(c.GetRecord()),
			arrival: arrivalFromProto(c.GetArrival()),
			origin:  c.GetOrigin(),
		})
	}
	return changes
}
