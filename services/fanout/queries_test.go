package fanout_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/topgun-sync/topgun/core/msgval"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	"github.com/topgun-sync/topgun/services/fanout"
)

// lively is a running service on a world. Use it in a synctest bubble.
type lively struct {
	*room
	world *world
}

func openLive(t *testing.T, config fanout.Config) *lively {
	t.Helper()
	w := newWorld(t, 4, 2)
	l := &lively{room: open(t, config, fanout.Deps{Partitions: w.clients()}), world: w}
	w.bus = l.bus
	w.beat()
	synctest.Wait()
	return l
}

func inLiveBubble(t *testing.T, test func(*testing.T, *lively)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { test(t, openLive(t, fanout.DefaultConfig())) })
}

// put logs and broadcasts an LWW value, given as JSON; "" removes the key.
func (l *lively) put(mapName, key, value string) {
	l.t.Helper()
	l.add(mapName, key, "", value)
}

func (l *lively) add(mapName, key, tag, value string) {
	l.t.Helper()
	var b []byte
	if value != "" {
		b = json(l.t, value)
	}
	l.world.log(mapName, key, tag, b)
	l.world.send()
}

// ask adds a query, given as JSON.
func (w *watcher) ask(id uint64, mapName, q string) {
	w.t.Helper()
	w.change(&fanoutv1.WatchRequest{AddQueries: []*fanoutv1.LiveQuery{{Id: id, Map: mapName, Query: json(w.t, q)}}})
}

func (w *watcher) change(req *fanoutv1.WatchRequest) {
	w.t.Helper()
	req.StreamId = w.id
	if _, err := w.client.Watch(context.Background(), req); err != nil {
		w.t.Fatal(err)
	}
}

// shows reads everything and compares what the stream shows of a query, as
// "key=JSON " of each row, or its error.
func (w *watcher) shows(id uint64, want string) {
	w.t.Helper()
	w.drain()
	w.view.mu.Lock()
	defer w.view.mu.Unlock()
	q := w.view.of(id)
	if q.result == nil {
		w.t.Errorf("query %d has no result", id)
		return
	}
	got := q.result.GetError()
	if got == "" {
		got = asText(q.rows)
	}
	if got != want {
		w.t.Errorf("query %d shows %q, want %q", id, got, want)
	}
}

// counts are the results and changes that came for a query.
func (w *watcher) counts(id uint64) (results, changes int) {
	w.drain()
	w.view.mu.Lock()
	defer w.view.mu.Unlock()
	q := w.view.of(id)
	return q.results, q.changes
}

func (l *lively) watch(t *testing.T, name string) *watcher {
	w := l.watcher(t, name)
	t.Cleanup(func() { close(w.reading) })
	return w
}

func (l *lively) describeLive() *fanoutv1.DescribeResponse {
	l.t.Helper()
	response, err := l.client.Describe(context.Background(), &fanoutv1.DescribeRequest{})
	if err != nil {
		l.t.Fatal(err)
	}
	return response
}

func (l *lively) calls() (reads, scans, gets int) {
	l.world.mu.Lock()
	defer l.world.mu.Unlock()
	return l.world.reads, l.world.scans, l.world.gets
}

func TestLiveQuery(t *testing.T) {
	inLiveBubble(t, func(t *testing.T, l *lively) {
		l.put("m", "a", `{"owner":"x","n":1}`)
		l.put("m", "b", `{"owner":"y","n":2}`)
		g, h := l.watch(t, "g"), l.watch(t, "h")
		g.ask(1, "m", `{"where":{"owner":"x"}}`)
		h.ask(7, "m", `{"where":{"owner":"x"}}`)
		g.shows(1, `a={"owner":"x","n":1} `)
		h.shows(7, `a={"owner":"x","n":1} `)
		if d := l.describeLive(); d.GetQueries() != 1 || d.GetMaps() != 1 {
			t.Errorf("equal queries of two streams are %d queries of %d maps, want 1 and 1", d.GetQueries(), d.GetMaps())
		}
		l.put("m", "b", `{"owner":"x","n":3}`)
		g.shows(1, `a={"owner":"x","n":1} b={"owner":"x","n":3} `)
		l.put("m", "a", `{"owner":"z","n":4}`) // found by its key
		l.put("m", "c", `{"owner":"z","n":5}`)
		g.shows(1, `b={"owner":"x","n":3} `)
		l.put("m", "b", "")
		g.shows(1, "")
		h.shows(7, "")
		if results, changes := g.counts(1); results != 1 || changes != 3 {
			t.Errorf("%d results and %d changes, want 1 and 3", results, changes)
		}
		// The event of the map is not for a stream that watches queries alone.
		if g.view.received != 1+3 {
			t.Errorf("%d messages came, want 4", g.view.received)
		}

		g.change(&fanoutv1.WatchRequest{RemoveQueries: []uint64{1, 99}})
		l.put("m", "a", `{"owner":"x","n":6}`)
		h.shows(7, `a={"owner":"x","n":6} `)
		if _, changes := g.counts(1); changes != 3 {
			t.Error("changes came of a query that was removed")
		}
		h.change(&fanoutv1.WatchRequest{RemoveQueries: []uint64{7}})
		synctest.Wait()
		if d := l.describeLive(); d.GetQueries() != 0 || d.GetMaps() != 0 || l.bus.Maps() != 0 {
			t.Errorf("%v, %d subscriptions are left", d, l.bus.Maps())
		}
	})
}

// A result carries what a page needs, in order.
func TestLiveQueryPages(t *testing.T) {
	inLiveBubble(t, func(t *testing.T, l *lively) {
		for n := range 10 {
			l.put("m", fmt.Sprint("k", n), fmt.Sprintf(`{"rank":%d}`, 9-n))
		}
		g := l.watch(t, "g")
		const q = `{"sort":[{"field":"rank","direction":"asc"}],"limit":3`
		g.ask(1, "m", q+`}`)
		g.shows(1, `k7={"rank":2} k8={"rank":1} k9={"rank":0} `)
		first := g.view.of(1).result
		if keys := fmt.Sprintf("%s %s %s", first.GetRows()[0].GetKey(), first.GetRows()[1].GetKey(), first.GetRows()[2].GetKey()); keys != "k9 k8 k7" {
			t.Errorf("the rows come as %s", keys)
		}
		if !first.GetMore() || first.GetNextCursor() == "" || first.GetCursorStatus() != fanoutv1.CursorStatus_CURSOR_STATUS_UNSPECIFIED {
			t.Errorf("first page: %v", first)
		}
		g.ask(2, "m", q+fmt.Sprintf(`,"cursor":%q}`, first.GetNextCursor()))
		g.shows(2, `k4={"rank":5} k5={"rank":4} k6={"rank":3} `)
		if s := g.view.of(2).result.GetCursorStatus(); s != fanoutv1.CursorStatus_CURSOR_STATUS_VALID {
			t.Errorf("second page: %v", s)
		}
		g.ask(3, "m", q+`,"cursor":"nonsense"}`)
		g.shows(3, `k7={"rank":2} k8={"rank":1} k9={"rank":0} `)
		if s := g.view.of(3).result.GetCursorStatus(); s != fanoutv1.CursorStatus_CURSOR_STATUS_INVALID {
			t.Errorf("page of a bad cursor: %v", s)
		}
		// What leaves the first page is followed by the next row, on both.
		l.put("m", "k9", "")
		g.shows(1, `k6={"rank":3} k7={"rank":2} k8={"rank":1} `)
		g.shows(2, `k4={"rank":5} k5={"rank":4} k6={"rank":3} `)
	})
}

// Many rows leave a window: it is read again and never shows less than there is.
func TestLiveQueryRefills(t *testing.T) {
	inLiveBubble(t, func(t *testing.T, l *lively) {
		for n := range 200 {
			l.put("m", fmt.Sprintf("k%03d", n), `{"open":true}`)
		}
		g := l.watch(t, "g")
		g.ask(1, "m", `{"where":{"open":true},"sort":[{"field":"_key","direction":"asc"}],"limit":2}`)
		for n := range 198 {
			l.put("m", fmt.Sprintf("k%03d", n), "")
			synctest.Wait()
		}
		g.shows(1, `k198={"open":true} k199={"open":true} `)
		if reads, _, _ := l.calls(); reads > 2*40 {
			t.Errorf("%d reads for 198 removals", reads)
		}
	})
}

func TestGroupedLiveQuery(t *testing.T) {
	inLiveBubble(t, func(t *testing.T, l *lively) {
		l.put("m", "a", `{"owner":"x","n":1}`)
		l.put("m", "b", `{"owner":"x","n":2}`)
		l.put("m", "c", `{"owner":"y","n":3}`)
		g := l.watch(t, "g")
		g.ask(1, "m", `{"groupBy":["owner"],"aggregations":[{"func":"sum","field":"n"}]}`)
		g.drain()
		rows := func() string {
			var got []string
			for _, value := range g.view.of(1).rows {
				text, _ := msgval.AppendJSON(nil, value)
				got = append(got, string(text))
			}
			slices.Sort(got)
			return strings.Join(got, " ")
		}
		if got := rows(); strings.Count(got, "__count") != 2 || !strings.Contains(got, `"__sum_n":3`) || !strings.Contains(got, `"__count":2`) {
			t.Errorf("got %s", got)
		}
		l.put("m", "c", `{"owner":"x","n":10}`)
		g.drain()
		if got := rows(); strings.Count(got, "__count") != 1 || !strings.Contains(got, `"__sum_n":13`) {
			t.Errorf("got %s", got)
		}
	})
}

// A row is the LWW value of its key, else the array of its OR values; what the OR-map
// holds is read only where a map has one.
func TestLiveQueryOfBothKinds(t *testing.T) {
	inLiveBubble(t, func(t *testing.T, l *lively) {
		l.add("both", "k", "t1", `1`)
		g := l.watch(t, "g")
		g.ask(1, "both", `{}`)
		g.ask(2, "plain", `{}`)
		g.shows(1, `k=[1] `)
		l.add("both", "k", "t2", `2`)
		g.shows(1, `k=[1,2] `)
		l.put("both", "k", `"lww"`)
		g.shows(1, `k="lww" `)
		l.add("both", "k", "t1", "")
		g.shows(1, `k="lww" `)
		l.put("both", "k", "")
		g.shows(1, `k=[2] `)
		l.add("both", "k", "t2", "")
		g.shows(1, "")

		_, _, before := l.calls()
		for n := range 20 {
			l.put("plain", "k", fmt.Sprint(n))
			l.put("plain", "k", "")
		}
		g.shows(2, "")
		if _, _, after := l.calls(); after != before {
			t.Errorf("%d keys of a map without OR values were read", after-before)
		}
		// The first OR value of a map whose LWW records were all there was.
		l.put("plain", "k", `"lww"`)
		l.add("plain", "k", "t", `3`)
		l.put("plain", "k", "")
		g.shows(2, `k=[3] `)
		// Many changes that wait cost few reads.
		synctest.Wait()
		_, _, before = l.calls()
		l.world.before = func() { time.Sleep(time.Second) }
		for n := range 500 {
			l.add("both", "k", fmt.Sprint("t", n%7), fmt.Sprint(n))
		}
		settle()
		g.shows(1, `k=[493,494,495,496,497,498,499] `)
		if _, _, after := l.calls(); after-before > 40 {
			t.Errorf("500 changes cost %d reads of keys", after-before)
		}
	})
}

// 1,000 new queries of a map are read together.
func TestManyQueriesAreOneScan(t *testing.T) {
	inLiveBubble(t, func(t *testing.T, l *lively) {
		for n := range 3000 {
			l.put("m", fmt.Sprint("k", n), fmt.Sprintf(`{"owner":"o%d"}`, n%1000))
		}
		synctest.Wait()
		g := l.watch(t, "g")
		l.world.before = func() { time.Sleep(10 * time.Millisecond) }
		req := &fanoutv1.WatchRequest{}
		for n := range uint64(1000) {
			req.AddQueries = append(req.AddQueries, &fanoutv1.LiveQuery{Id: n, Map: "m", Query: json(t, fmt.Sprintf(`{"where":{"owner":"o%d"}}`, n))})
		}
		g.change(req)
		settle()
		g.shows(7, `k1007={"owner":"o7"} k2007={"owner":"o7"} k7={"owner":"o7"} `)
		g.shows(999, `k1999={"owner":"o999"} k2999={"owner":"o999"} k999={"owner":"o999"} `)
		if reads, scans, _ := l.calls(); reads+scans > 4 {
			t.Errorf("%d reads and %d scans, want one scan of two nodes", reads, scans)
		}
		l.put("m", "k7", `{"owner":"o999"}`)
		settle()
		g.shows(7, `k1007={"owner":"o7"} k2007={"owner":"o7"} `)
	})
}

// A map of many pages is not read as a whole for a few queries.
func TestLargeMapIsNotScanned(t *testing.T) {
	inLiveBubble(t, func(t *testing.T, l *lively) {
		text := strings.Repeat("x", 200_000)
		for n := range 300 { // 60 MB on two nodes
			l.put("m", fmt.Sprint("k", n), fmt.Sprintf(`{"v":%d,"text":%q}`, n, text))
		}
		synctest.Wait()
		g := l.watch(t, "g")
		req := &fanoutv1.WatchRequest{}
		for n := range uint64(20) {
			req.AddQueries = append(req.AddQueries, &fanoutv1.LiveQuery{Id: n, Map: "m", Query: json(t, fmt.Sprintf(`{"where":{"v":%d},"fields":["v"]}`, n))})
		}
		g.change(req)
		g.shows(7, `k7={"v":7} `)
		if reads, scans, _ := l.calls(); reads != 20*2 || scans > 2 {
			t.Errorf("%d reads and %d scans, want 40 and 1", reads, scans)
		}
		l.put("m", "k8", `{"v":7}`)
		g.shows(7, `k7={"v":7} k8={"v":7} `)
	})
}

// A stream that does not read costs one result per query when it does, no read, and
// nobody else anything.
func TestSlowStreamGetsFreshResults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := fanout.DefaultConfig()
		config.QueueEvents = 5
		l := openLive(t, config)
		slow, fast := l.watch(t, "slow"), l.watch(t, "fast")
		for _, w := range []*watcher{slow, fast} {
			w.ask(1, "m", `{}`)
			w.ask(2, "m", `{"where":{"v":3}}`)
			w.drain()
		}
		reads, _, _ := l.calls()
		for n := range 100 {
			l.put("m", "k", fmt.Sprintf(`{"v":%d}`, n))
			fast.drain()
		}
		l.put("m", "k", `{"v":3}`)
		fast.shows(1, `k={"v":3} `)
		slow.shows(1, `k={"v":3} `)
		slow.shows(2, `k={"v":3} `)
		if results, changes := fast.counts(1); results != 1 || changes != 101 {
			t.Errorf("fast: %d results and %d changes", results, changes)
		}
		if results, changes := slow.counts(1); results != 2 || changes > 5 {
			t.Errorf("slow: %d results and %d changes", results, changes)
		}
		if after, _, _ := l.calls(); after != reads {
			t.Errorf("%d reads", after-reads)
		}
		l.put("m", "k", `{"v":4}`)
		slow.shows(1, `k={"v":4} `)
		slow.shows(2, "")
	})
}

// Changes of queries give way to events: those queries get fresh results, and no
// event is lost.
func TestChangesGiveWayToEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := fanout.DefaultConfig()
		config.QueueEvents = 10
		l := openLive(t, config)
		g := l.watch(t, "g")
		g.ask(1, "m", `{}`)
		g.gateway.watch("n")
		g.drain()
		for n := range 9 {
			l.put("m", "k", fmt.Sprint(n+1))
			synctest.Wait()
		}
		for n := range 10 {
			l.put("n", fmt.Sprint("k", n), `1`)
			synctest.Wait()
		}
		before := g.view.received
		g.shows(1, `k=9 `)
		if results, _ := g.counts(1); results != 2 {
			t.Errorf("%d results, want 2", results)
		}
		if got := g.view.received - before; got != 12 { // one change was in the sender's hands
			t.Errorf("%d messages came, want 12", got)
		}
	})
}

func TestRefresh(t *testing.T) {
	inLiveBubble(t, func(t *testing.T, l *lively) {
		g := l.watch(t, "g")
		g.ask(1, "m", `{}`)
		g.drain()
		l.put("m", "k", `1`)
		synctest.Wait()
		g.change(&fanoutv1.WatchRequest{RefreshQueries: []uint64{1, 2}})
		g.ask(1, "m", `{"limit":1}`) // known: no effect
		g.shows(1, `k=1 `)
		if results, _ := g.counts(1); results != 2 {
			t.Errorf("%d results, want 2", results)
		}
		if n := l.describeLive().GetQueries(); n != 1 {
			t.Errorf("%d queries, want 1", n)
		}
	})
}

// Watch does not wait for partitions that are away; the result comes when they are
// back, and what changed meanwhile too.
func TestPartitionsAway(t *testing.T) {
	inLiveBubble(t, func(t *testing.T, l *lively) {
		l.put("m", "a", `1`)
		var mu sync.Mutex
		away := true
		l.world.refuse = func() error {
			mu.Lock()
			defer mu.Unlock()
			if away {
				return errAway
			}
			return nil
		}
		g := l.watch(t, "g")
		began := time.Now()
		g.ask(1, "m", `{}`)
		if took := time.Since(began); took > 0 {
			t.Errorf("Watch took %s", took)
		}
		time.Sleep(10 * time.Second)
		l.put("m", "b", `2`)
		time.Sleep(10 * time.Second)
		if results, _ := g.counts(1); results != 0 {
			t.Error("a result came from nowhere")
		}
		mu.Lock()
		away = false
		mu.Unlock()
		time.Sleep(2 * time.Second)
		g.shows(1, `a=1 b=2 `)
		if err := l.service.Ready(); err != nil {
			t.Errorf("not ready: %v", err)
		}
	})
}

// A node that answers with an older state than was broadcast is not believed.
func TestStaleReadIsRepeated(t *testing.T) {
	inLiveBubble(t, func(t *testing.T, l *lively) {
		g := l.watch(t, "g")
		g.ask(1, "m", `{}`)
		g.drain()
		for n := range 20 {
			l.put("m", "k", fmt.Sprintf(`{"n":%d}`, n))
		}
		g.shows(1, `k={"n":19} `)
		s := l.world.shardOf("k")
		l.world.mu.Lock()
		clock, record := s.clock, s.lww["m"]["k"]
		s.clock = clock / 2
		delete(s.lww["m"], "k")
		l.world.mu.Unlock()
		l.bus.Lose()
		time.Sleep(3 * time.Second)
		g.shows(1, `k={"n":19} `)
		l.world.mu.Lock()
		s.clock, s.lww["m"]["k"] = clock, record
		l.world.mu.Unlock()
		time.Sleep(3 * time.Second)
		g.ask(2, "m", `{"limit":1}`)
		g.shows(2, `k={"n":19} `)
	})
}

// More events than the map's inbox holds are a loss like any other.
func TestInboxOverflow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := fanout.DefaultConfig()
		config.QueueEvents = 10
		l := openLive(t, config)
		l.add("m", "x", "t", `1`)
		g := l.watch(t, "g")
		g.ask(1, "m", `{}`)
		g.shows(1, `x=[1] `)
		l.world.before = func() { time.Sleep(time.Second) }
		l.add("m", "x", "t", `2`) // holds the worker up
		synctest.Wait()
		for n := range 100 {
			l.put("m", fmt.Sprint("k", n%3), fmt.Sprint(n))
		}
		settle()
		g.shows(1, `k0=99 k1=97 k2=98 x=[2] `)
	})
}

// More maps than may be read at once are read one after the other.
func TestReadersAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := fanout.DefaultConfig()
		config.MaxReads = 3
		l := openLive(t, config)
		var mu sync.Mutex
		now, most := 0, 0
		count := func(by int) {
			mu.Lock()
			defer mu.Unlock()
			now += by
			most = max(most, now)
		}
		l.world.before = func() { count(1); time.Sleep(10 * time.Millisecond) }
		l.world.after = func() { count(-1) }
		g := l.watch(t, "g")
		for n := range uint64(50) {
			g.ask(n, fmt.Sprint("m", n), `{}`)
		}
		settle()
		for n := range uint64(50) {
			g.shows(n, "")
		}
		// Each asks two nodes to describe themselves.
		if most > 3*2 {
			t.Errorf("%d calls at once", most)
		}
	})
}

// RES-03: queries come and go, also in the middle of reads, and nothing is left.
func TestRES03QueryChurn(t *testing.T) {
	inLiveBubble(t, func(t *testing.T, l *lively) {
		random := rand.New(rand.NewPCG(3, 4))
		l.world.before = func() { time.Sleep(5 * time.Millisecond) }
		for range 20 {
			var gateways []*gateway
			for n := range 3 {
				g := l.subscribe(fmt.Sprint(n))
				if n > 0 {
					g.read()
				}
				gateways = append(gateways, g)
			}
			for id := range uint64(200) {
				g := gateways[random.IntN(len(gateways))]
				req := &fanoutv1.WatchRequest{StreamId: g.id}
				req.AddQueries = []*fanoutv1.LiveQuery{{
					Id: id, Map: fmt.Sprint("m", random.IntN(3)),
					Query: json(t, fmt.Sprintf(`{"where":{"n":%d}}`, random.IntN(30))),
				}}
				if random.IntN(2) == 0 {
					req.RemoveQueries = []uint64{uint64(random.IntN(int(id) + 1))}
				}
				if _, err := g.client.Watch(t.Context(), req); err != nil {
					t.Fatal(err)
				}
				l.put(fmt.Sprint("m", random.IntN(3)), fmt.Sprint("k", random.IntN(9)), fmt.Sprintf(`{"n":%d}`, random.IntN(30)))
				if random.IntN(5) == 0 {
					time.Sleep(time.Millisecond)
				}
			}
			for _, g := range gateways {
				g.close()
			}
			settle()
			if d := l.describeLive(); d.GetStreams()+d.GetMaps()+d.GetQueries() != 0 || l.bus.Maps() != 0 {
				t.Fatalf("%v and %d subscriptions are left", d, l.bus.Maps())
			}
		}
	})
}

// The end of the service ends reads that are under way, and waits for them.
func TestRunEndsReads(t *testing.T) {
	inLiveBubble(t, func(t *testing.T, l *lively) {
		l.world.before = func() { time.Sleep(time.Second) }
		g := l.watch(t, "g")
		g.ask(1, "m", `{}`)
		l.add("m", "k", "t", `1`)
		synctest.Wait()
		if err := l.stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
		if _, err := g.client.Watch(t.Context(), &fanoutv1.WatchRequest{StreamId: g.id}); connect.CodeOf(err) != connect.CodeNotFound {
			t.Errorf("after the end: %v", err)
		}
	})
}
