package fanout_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/topgun-sync/topgun/core/query"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	"github.com/topgun-sync/topgun/services/fanout"
)

// The queries of the storm; %d is a small number. Equal ones meet.
var stormQueries = []string{
	`{}`,
	`{"where":{"owner":"o%d"}}`,
	`{"where":{"owner":"o%d"},"sort":[{"field":"rank","direction":"desc"}],"limit":2}`,
	`{"where":{"owner":"o%d","open":true}}`,
	`{"predicate":{"op":"gt","attribute":"rank","value":%d}}`,
	`{"predicate":{"op":"neq","attribute":"owner","value":"o%d"},"fields":["owner","n"]}`,
	`{"sort":[{"field":"rank","direction":"asc"}],"limit":%d,"fields":["rank"]}`,
	`{"sort":[{"field":"_key","direction":"desc"}],"limit":3}`,
	`{"groupBy":["owner"],"aggregations":[{"func":"sum","field":"rank"}]}`,
	`{"where":{"owner":"o%d"},"groupBy":["open"],"aggregations":[{"func":"count"}]}`,
}

// Everything at once: changes of both kinds of map, lost and late events, shards
// that move or do not answer, streams that do not read. At rest every stream shows
// what its queries make of the maps, and no row ever went back to an older write.
func TestLiveQueriesUnderFaults(t *testing.T) {
	for seed := range uint64(100) {
		synctest.Test(t, func(t *testing.T) { storm(t, seed) })
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

// watcher is a stream of the storm and what it was told.
type watcher struct {
	*gateway
	view    *view
	reading chan struct{}
	asked   map[uint64]*fanoutv1.LiveQuery
}

func (r *room) watcher(t *testing.T, name string) *watcher {
	w := &watcher{gateway: r.subscribe(name), view: newView(t), reading: make(chan struct{}, 1), asked: make(map[uint64]*fanoutv1.LiveQuery)}
	go func() { // reads when told to
		for range w.reading {
			message, err := w.stream.Receive()
			if err != nil {
				return
			}
			w.view.take(message)
		}
	}()
	return w
}

func (w *watcher) readOne() {
	select {
	case w.reading <- struct{}{}:
	default:
	}
}

func (w *watcher) drain() {
	for {
		w.view.mu.Lock()
		before := w.view.received
		w.view.mu.Unlock()
		w.readOne()
		synctest.Wait()
		w.view.mu.Lock()
		after := w.view.received
		w.view.mu.Unlock()
		if before == after {
			return
		}
	}
}

func storm(t *testing.T, seed uint64) {
	defer func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	}()
	random := rand.New(rand.NewPCG(seed, 11))
	var mu sync.Mutex // of random, where the partitions use it
	chance := func(p float64) bool {
		mu.Lock()
		defer mu.Unlock()
		return random.Float64() < p
	}
	roll := func(n int) int {
		mu.Lock()
		defer mu.Unlock()
		return random.IntN(n)
	}
	world := newWorld(t, 4, 1+roll(2))
	config := fanout.DefaultConfig()
	config.QueueEvents = 4 + roll(20)
	config.MaxReads = 1 + roll(4)
	if chance(0.5) {
		config.MaxQueryRows = 8 // grouped queries overflow, windows end early
	}
	r := openPlanned(t, config, fanout.Deps{Partitions: world.clients()}, func(s *fanout.Service) {
		if chance(0.5) {
			s.PlanReads(2, 3) // scans of several pages
		}
	})
	world.bus = r.bus
	var faults atomic.Bool
	faults.Store(true)
	loss := 0.3 * float64(roll(2))
	r.bus.DropIf(func(proto.Message) bool { return faults.Load() && chance(loss) })
	pause := func() {
		if chance(0.3) {
			time.Sleep(time.Duration(roll(300)) * time.Millisecond)
		}
	}
	world.before, world.after = pause, pause
	world.refuse = func() error {
		if faults.Load() && chance(0.05) {
			return errAway
		}
		return nil
	}
	world.beat()
	synctest.Wait()

	maps := []string{"m", "both"}
	watchers := []*watcher{r.watcher(t, "a"), r.watcher(t, "b")}
	for _, w := range watchers {
		defer close(w.reading)
	}
	var writes, ids uint64
	write := func() {
		writes++
		name, key := maps[roll(2)], fmt.Sprint("k", roll(12))
		value := json(t, fmt.Sprintf(`{"n":%d,"owner":"o%d","rank":%d,"open":%t}`, writes, roll(3), roll(5), chance(0.5)))
		if chance(0.25) {
			value = nil
		}
		tag := ""
		if name == "both" && chance(0.5) {
			tag = fmt.Sprint("t", roll(3))
		}
		world.log(name, key, tag, value)
	}
	change := func(req *fanoutv1.WatchRequest) {
		if _, err := r.client.Watch(context.Background(), req); err != nil {
			t.Fatal(err)
		}
	}
	ask := func(w *watcher, count int) {
		req := &fanoutv1.WatchRequest{StreamId: w.id}
		for range count {
			ids++
			text := stormQueries[roll(len(stormQueries))]
			if n := fmt.Sprintf(text, 1+roll(3)); !containsExtra(n) {
				text = n
			}
			q := &fanoutv1.LiveQuery{Id: ids, Map: maps[roll(2)], Query: json(t, text)}
			w.asked[ids] = q
			req.AddQueries = append(req.AddQueries, q)
		}
		change(req)
	}
	for range 250 {
		w := watchers[roll(len(watchers))]
		switch n := roll(100); {
		case n < 45:
			write()
		case n < 60:
			world.sendShard(world.shards[roll(4)], 1+roll(3))
		case n < 65:
			ask(w, 1+roll(3))
		case n < 66:
			ask(w, 20) // enough for a scan
		case n < 68:
			for id := range w.asked {
				change(&fanoutv1.WatchRequest{StreamId: w.id, RemoveQueries: []uint64{id}})
				delete(w.asked, id)
				break
			}
		case n < 70:
			for id := range w.asked {
				change(&fanoutv1.WatchRequest{StreamId: w.id, RefreshQueries: []uint64{id}})
				break
			}
		case n < 71: // the shard moves; the end of its lane may never be broadcast
			s := world.shards[roll(4)]
			if chance(0.5) {
				world.sendShard(s, len(s.unsent))
			}
			world.mu.Lock()
			if chance(0.7) {
				if chance(0.5) {
					s.stragglers = s.unsent
				}
				s.unsent = nil
			}
			s.newLane(roll(len(world.nodes)))
			world.mu.Unlock()
		case n < 72:
			r.bus.Lose()
		case n < 80:
			w.readOne()
		case n < 84:
			w.drain()
		case n < 92:
			time.Sleep(time.Duration(roll(400)) * time.Millisecond)
		case n < 94:
			world.beat()
		default:
			synctest.Wait()
		}
	}
	faults.Store(false)
	for range 6 {
		time.Sleep(time.Second)
		world.beat()
	}
	settle()
	for _, w := range watchers {
		w.drain()
		for id, asked := range w.asked {
			compare(t, world, w.view, id, asked, config.MaxQueryRows)
		}
	}
}

func containsExtra(s string) bool {
	for i := range len(s) - 1 {
		if s[i:i+2] == "%!" {
			return true
		}
	}
	return false
}

// compare compares what a stream shows of a query with what the query makes of the
// world.
func compare(t *testing.T, world *world, v *view, id uint64, asked *fanoutv1.LiveQuery, maxRows int) {
	t.Helper()
	q, err := query.Parse(asked.GetQuery(), nil)
	if err != nil {
		t.Fatal(err)
	}
	got := v.of(id)
	rows := world.rows(asked.GetMap(), []uint32{0, 1, 2, 3})
	text := func() string { return asText(map[string][]byte{asked.GetMap(): asked.GetQuery()}) }
	switch {
	case got.result == nil:
		t.Errorf("query %d %s got no result", id, text())
	case got.result.GetError() != "":
		if !q.Grouped() || len(rows) == 0 || maxRows > len(rows)*4 {
			t.Errorf("query %d %s: %s", id, text(), got.result.GetError())
		}
	default:
		want := evaluate(t, asked.GetMap(), q, rows, maxRows-maxRows/8)
		if a, b := asText(got.rows), asText(want); a != b {
			t.Errorf("query %d %s shows\n%s\nand is\n%s\nafter %d results and %d changes", id, text(), a, b, got.results, got.changes)
		}
	}
}
