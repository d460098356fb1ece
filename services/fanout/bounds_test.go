package fanout_test

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"

	"connectrpc.com/connect/v2"

	"github.com/topgun-sync/topgun/core/query"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	"github.com/topgun-sync/topgun/services/fanout"
	"github.com/topgun-sync/topgun/services/internal/bus/membus"
)

func TestQueryRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := fanout.DefaultConfig()
		config.MaxQueriesPerStream, config.MaxQueries, config.MaxQueryRows = 4, 6, 8
		l := openLive(t, config)
		for n := range 9 {
			l.put("m", fmt.Sprint("k", n), `{"n":1}`)
		}
		g := l.watch(t, "g")
		g.change(&fanoutv1.WatchRequest{AddQueries: []*fanoutv1.LiveQuery{{Id: 1, Map: "m", Query: []byte{0xc1}}}})
		g.drain()
		if got := g.view.of(1).result.GetError(); !strings.HasPrefix(got, "BAD_QUERY: ") {
			t.Errorf("got the error %q", got)
		}
		// The id of a refused query is free again, and so is its place.
		for id := range uint64(5) {
			g.ask(10+id, "m", fmt.Sprintf(`{"where":{"n":%d}}`, id))
		}
		g.drain()
		for id := range uint64(4) {
			if got := g.view.of(10 + id).result; got.GetError() != "" {
				t.Errorf("query %d: %s", id, got.GetError())
			}
		}
		if got := g.view.of(14).result.GetError(); !strings.HasPrefix(got, "QUERY_TOO_MANY: ") {
			t.Errorf("got the error %q", got)
		}
		h := l.watch(t, "h")
		for id := range uint64(3) {
			h.ask(id+1, "m", fmt.Sprintf(`{"where":{"n":%d}}`, id))
		}
		h.drain()
		if got := h.view.of(3).result.GetError(); !strings.HasPrefix(got, "QUERY_TOO_MANY: ") {
			t.Errorf("over all streams: got the error %q", got)
		}
		h.change(&fanoutv1.WatchRequest{RemoveQueries: []uint64{1}})
		h.ask(4, "m", `{"aggregations":[{"func":"count"}]}`)
		h.drain()
		if got := h.view.of(4).result.GetError(); !strings.HasPrefix(got, "QUERY_TOO_LARGE: ") {
			t.Errorf("groups of too many rows: got the error %q", got)
		}
		if _, err := h.client.Watch(t.Context(), &fanoutv1.WatchRequest{StreamId: h.id, AddQueries: []*fanoutv1.LiveQuery{{Id: 9}}}); connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("no map: got %v, want invalid_argument", err)
		}
		if _, err := h.client.Watch(t.Context(), &fanoutv1.WatchRequest{StreamId: "x", AddQueries: []*fanoutv1.LiveQuery{{Id: 9, Map: "m"}}}); connect.CodeOf(err) != connect.CodeNotFound {
			t.Errorf("no stream: got %v, want not_found", err)
		}
		// Refusals that nobody reads are bounded too.
		slow := l.subscribe("slow")
		req := &fanoutv1.WatchRequest{StreamId: slow.id}
		for id := range uint64(20) {
			req.AddQueries = append(req.AddQueries, &fanoutv1.LiveQuery{Id: id, Map: "m", Query: []byte{0xc1}})
		}
		if _, err := slow.client.Watch(t.Context(), req); connect.CodeOf(err) != connect.CodeResourceExhausted {
			t.Errorf("20 bad queries: got %v, want resource_exhausted", err)
		}
	})
}

func TestNoPartitionsNoQueries(t *testing.T) {
	inBubble(t, func(t *testing.T, r *room) {
		w := r.watcher(t, "g")
		defer close(w.reading)
		w.ask(1, "m", `{}`)
		w.shows(1, "QUERY_UNAVAILABLE: live queries are not served here")
		if r.bus.Maps() != 0 {
			t.Error("a refused query left a subscription")
		}
	})
}

// The bytes of one query, and of all together.
func TestQueryBytes(t *testing.T) {
	big := `{"n":1,"text":"` + strings.Repeat("x", 1000) + `"}`
	for name, set := range map[string]func(*fanout.Config){
		"one": func(c *fanout.Config) { c.MaxQueryBytes = 20_000 },
		"all": func(c *fanout.Config) { c.MaxQueriesBytes = 40_000 },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				config := fanout.DefaultConfig()
				set(&config)
				l := openLive(t, config)
				g := l.watch(t, "g")
				g.ask(1, "m", `{}`)
				g.ask(2, "m", `{"limit":2}`)
				g.shows(1, "")
				for n := range 60 { // grows too large by changes
					l.put("m", fmt.Sprintf("k%02d", n), big)
				}
				settle()
				g.drain()
				if got := g.view.of(1).result.GetError(); !strings.HasPrefix(got, "QUERY_TOO_LARGE: ") {
					t.Errorf("got the error %q", got)
				}
				g.ask(3, "m", `{"sort":[{"field":"n","direction":"asc"}]}`) // is too large when it is read
				settle()
				g.drain()
				if got := g.view.of(3).result.GetError(); !strings.HasPrefix(got, "QUERY_TOO_LARGE: ") {
					t.Errorf("got the error %q", got)
				}
				g.ask(4, "other", `{}`) // there is room again
				settle()
				g.shows(4, "")
				if l.describeLive().GetQueries() > 2 {
					t.Errorf("%v is left", l.describeLive())
				}
			})
		})
	}
}

func TestConfig(t *testing.T) {
	b := membus.New()
	defer b.Close()
	if _, err := fanout.New(fanout.DefaultConfig(), fanout.Deps{}); err == nil || !strings.Contains(err.Error(), "Deps.Bus is missing") {
		t.Errorf("without a bus: %v", err)
	}
	for name, spoil := range map[string]func(*fanout.Config){
		"MaxStreams":          func(c *fanout.Config) { c.MaxStreams = 0 },
		"MaxMapsPerStream":    func(c *fanout.Config) { c.MaxMapsPerStream = 0 },
		"MaxTopicsPerStream":  func(c *fanout.Config) { c.MaxTopicsPerStream = 0 },
		"MaxQueriesPerStream": func(c *fanout.Config) { c.MaxQueriesPerStream = 0 },
		"MaxQueries":          func(c *fanout.Config) { c.MaxQueries = 0 },
		"MaxQueryRows":        func(c *fanout.Config) { c.MaxQueryRows = 0 },
		"MaxQueryBytes":       func(c *fanout.Config) { c.MaxQueryBytes = 0 },
		"MaxQueriesBytes":     func(c *fanout.Config) { c.MaxQueriesBytes = 0 },
		"MaxReads":            func(c *fanout.Config) { c.MaxReads = 0 },
		"QueueEvents":         func(c *fanout.Config) { c.QueueEvents = 0 },
		"QueueBytes":          func(c *fanout.Config) { c.QueueBytes = 0 },
		"MaxPositions":        func(c *fanout.Config) { c.MaxPositions = 0 },
		"HeartbeatPeriod":     func(c *fanout.Config) { c.HeartbeatPeriod = 1 },
	} {
		config := fanout.DefaultConfig()
		spoil(&config)
		if _, err := fanout.New(config, fanout.Deps{Bus: b}); err == nil || !strings.Contains(err.Error(), name+" must be at least") {
			t.Errorf("%s: got %v", name, err)
		}
	}
	for name, spoil := range map[string]func(*fanout.Config){
		"MaxQueryRows":  func(c *fanout.Config) { c.MaxQueryRows = 100_001 },
		"MaxQueryBytes": func(c *fanout.Config) { c.MaxQueryBytes = 8<<20 + 1 },
	} {
		config := fanout.DefaultConfig()
		spoil(&config)
		if _, err := fanout.New(config, fanout.Deps{Bus: b}); err == nil || !strings.Contains(err.Error(), name+" must be at most") {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

// A query that no node answers in time is refused, and the others of its map get their
// results; without that it would hold them up for ever.
func TestSlowQueryIsRefused(t *testing.T) {
	inLiveBubble(t, func(t *testing.T, l *lively) {
		l.put("m", "k", `{"v":1}`)
		l.world.endless = func(q *query.Query) bool { return len(q.Equalities()) == 0 }
		g := l.watch(t, "g")
		g.ask(1, "m", `{"predicate":{"op":"contains","attribute":"v","value":"x"}}`)
		g.ask(2, "m", `{"where":{"v":1}}`)
		settle()
		g.drain()
		if got := g.view.of(1).result.GetError(); !strings.HasPrefix(got, "QUERY_TOO_SLOW: ") {
			t.Errorf("got the error %q", got)
		}
		g.shows(2, `k={"v":1} `)
	})
}
