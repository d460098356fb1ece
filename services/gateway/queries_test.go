package gateway

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/msgval"
	"github.com/topgun-sync/topgun/core/wire"
)

// q makes the msgpack of a query from its JSON.
func q(t testing.TB, text string) []byte {
	t.Helper()
	b, err := msgval.FromJSON([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// person is a value with an age.
func person(age uint64) []byte {
	return msgval.AppendUint(msgval.AppendString(msgval.AppendMapHeader(nil, 1), "age"), age)
}

// subscribe sends a QUERY_SUB and reads its result; roots that come unasked are passed
// over.
func (p *wsClient) subscribe(id, mapName string, query []byte) *wire.QueryResp {
	p.t.Helper()
	p.send(&wire.QuerySub{QueryID: id, MapName: mapName, Query: query})
	return p.result(id)
}

func (p *wsClient) result(id string) *wire.QueryResp {
	p.t.Helper()
	for {
		switch m := p.recv().(type) {
		case *wire.SyncRespRoot, *wire.ORMapSyncRespRoot, *wire.OpAck:
		case *wire.QueryResp:
			if m.QueryID != id {
				p.t.Fatalf("result of %q, want %q", m.QueryID, id)
			}
			return m
		default:
			p.t.Fatalf("got %T %+v, want the result of %q", m, m, id)
		}
	}
}

// settled makes a round trip, passing over roots that come unasked.
func (p *wsClient) settled() {
	p.t.Helper()
	p.send(wire.PingAt(1))
	for {
		switch m := p.recv().(type) {
		case *wire.SyncRespRoot, *wire.ORMapSyncRespRoot:
		case *wire.Pong:
			return
		default:
			p.t.Fatalf("got %T %+v, want nothing", m, m)
		}
	}
}

// update reads the next message but roots, a QUERY_UPDATE, as "id TYPE key".
func (p *wsClient) update() string {
	p.t.Helper()
	for {
		switch m := p.recv().(type) {
		case *wire.SyncRespRoot, *wire.ORMapSyncRespRoot, *wire.OpAck:
		case *wire.QueryUpdate:
			return fmt.Sprintf("%s %s %s", m.QueryID, m.ChangeType, m.Key)
		default:
			p.t.Fatalf("got %T %+v, want a QUERY_UPDATE", m, m)
		}
	}
}

func rowKeys(m *wire.QueryResp) string {
	var keys []string
	for _, row := range m.Results {
		keys = append(keys, row.Key)
	}
	return strings.Join(keys, " ")
}

const adults = `{"predicate":{"op":"gte","attribute":"age","value":18},"sort":[{"field":"age","direction":"asc"}],"limit":2}`

// PROTOCOL 12: the result as a whole, then every change of the window, the writer's own
// too.
func TestLiveQuery(t *testing.T) {
	b := setup(t, nil, nil)
	for i, age := range []uint64{30, 10, 20, 40} {
		b.partition.put("people", fmt.Sprint("k", i), person(age), stamp(1))
	}
	p := b.hello(t)
	if m := p.subscribe("q", "people", q(t, adults)); rowKeys(m) != "k2 k0" || !m.HasMore || m.NextCursor == "" || m.Error != "" {
		t.Fatalf("result %+v", m)
	}
	b.partition.put("people", "k4", person(25), stamp(2))
	if got := []string{p.update(), p.update()}; !slices.Equal(got, []string{"q LEAVE k0", "q ENTER k4"}) && !slices.Equal(got, []string{"q ENTER k4", "q LEAVE k0"}) {
		t.Errorf("updates %q", got)
	}
	p.send(&wire.OpBatch{Ops: []wire.Op{removeOp("1", "people", "k4", stamp(3))}})
	if got := []string{p.update(), p.update()}; !slices.Contains(got, "q LEAVE k4") || !slices.Contains(got, "q ENTER k0") {
		t.Errorf("own removal: %q", got)
	}
	p.send(&wire.QueryUnsub{QueryID: "q"})
	p.send(&wire.QueryUnsub{QueryID: "none"})
	p.send(&wire.QuerySub{QueryID: "other", MapName: "other"}) // a round trip by way of fanout
	p.result("other")
	h, session := b.service.sockets.hub, b.service.sockets.snapshot()[0]
	eventually(t, func() bool { // its op made it look at the map
		h.mu.Lock()
		defer h.mu.Unlock()
		people := h.maps["people"] // none between the end of the probe and the op's interest
		return people != nil && people.sessions[session].has(kindLWW)
	})
	b.partition.put("people", "k5", person(19), stamp(4))
	for {
		m := p.recv()
		if _, ok := m.(*wire.QueryUpdate); ok {
			t.Errorf("%+v after QUERY_UNSUB", m)
		}
		if e, ok := m.(*wire.ServerEvent); ok && e.Key == "k5" {
			break // and no QUERY_UPDATE came before
		}
	}
	eventually(t, func() bool { open, _, _ := b.fanout.queries(); return open == 1 })
}

// The page after a cursor, and what became of cursors.
func TestLiveQueryCursor(t *testing.T) {
	b := setup(t, nil, nil)
	for i := range 5 {
		b.partition.put("m", fmt.Sprint("k", i), person(20), stamp(1))
	}
	p := b.hello(t)
	first := p.subscribe("q1", "m", q(t, adults))
	second := p.subscribe("q2", "m", q(t, strings.Replace(adults, "{", `{"cursor":"`+first.NextCursor+`",`, 1)))
	if rowKeys(first) != "k0 k1" || rowKeys(second) != "k2 k3" || second.CursorStatus != "valid" {
		t.Errorf("%+v, then %+v", first, second)
	}
	if m := p.subscribe("q3", "m", q(t, strings.Replace(adults, "{", `{"cursor":"abc",`, 1))); m.CursorStatus != "invalid" || rowKeys(m) != "k0 k1" {
		t.Errorf("%+v", m)
	}
}

// Equal queries are one for fanout. Who joins gets the result, and who has it already
// does not get it again, though changes come in between.
func TestEqualQueriesAreShared(t *testing.T) {
	b := setup(t, nil, nil)
	b.partition.put("m", "k0", person(20), stamp(1))
	var all []*wsClient
	for i := range 5 {
		p := b.hello(t)
		text := adults
		if i%2 == 1 { // another encoding of the same query
			text = `{"limit":2,"sort":[{"direction":"asc","field":"age"}],"predicate":{"value":18.0,"attribute":"age","op":"gte"}}`
		}
		if m := p.subscribe(fmt.Sprint("q", i), "m", q(t, text)); len(m.Results) != 1 {
			t.Fatalf("%+v", m)
		}
		all = append(all, p)
		b.partition.put("m", "k0", person(21+uint64(i)), stamp(uint64(i+2)))
		for n, p := range all {
			if got := p.update(); got != fmt.Sprintf("q%d UPDATE k0", n) {
				t.Fatalf("after %d: %s", i, got)
			}
		}
	}
	if _, added, _ := b.fanout.queries(); added != 1 {
		t.Errorf("%d queries added", added)
	}
	// A result that says nothing new disturbs nobody; one that does goes to all.
	b.fanout.again()
	for _, p := range all {
		p.settled()
	}
	b.partition.fanout = nil // lost on the way
	b.partition.put("m", "k1", person(50), stamp(9))
	b.fanout.reload()
	b.fanout.again()
	for n, p := range all {
		if m := p.result(fmt.Sprint("q", n)); rowKeys(m) != "k0 k1" {
			t.Errorf("%+v", m)
		}
	}
	for _, p := range all[1:] {
		_ = p.conn.Close()
	}
	all[0].send(&wire.QueryUnsub{QueryID: "q0"})
	eventually(t, func() bool {
		open, _, _ := b.fanout.queries()
		return open == 0 && b.service.sockets.hub.queries.count() == 0
	})
}

// The same queryId again is another query, and the same query under it goes on.
func TestQueryIsReplaced(t *testing.T) {
	b := setup(t, nil, nil)
	b.partition.put("m", "k0", person(20), stamp(1))
	b.partition.put("m", "k1", person(10), stamp(1))
	p := b.hello(t)
	if m := p.subscribe("q", "m", q(t, adults)); rowKeys(m) != "k0" {
		t.Errorf("%+v", m)
	}
	if m := p.subscribe("q", "m", nil); rowKeys(m) != "k0 k1" {
		t.Errorf("%+v", m)
	}
	if m := p.subscribe("q", "m", nil); rowKeys(m) != "k0 k1" {
		t.Errorf("%+v", m)
	}
	b.partition.put("m", "k2", person(5), stamp(1))
	if got := p.update(); got != "q ENTER k2" {
		t.Error(got)
	}
	p.settled()
	if open, added, _ := b.fanout.queries(); open != 1 || added != 2 {
		t.Errorf("%d queries, %d added", open, added)
	}
}

func TestQueryRefused(t *testing.T) {
	b := setup(t, func(c *Config) { c.MaxSubscriptions = 3 }, nil)
	p := b.hello(t)
	refused := func(m *wire.QuerySub, name string, code int) {
		t.Helper()
		p.send(m)
		if m := expect[*wire.QueryResp](p); m.QueryID != "bad" || m.Code != name || !strings.HasPrefix(m.Error, name+": ") || len(m.Results) != 0 {
			t.Errorf("%s: %+v", name, m)
		}
		if m := expect[*wire.ErrorMessage](p); m.Code != code || !strings.HasPrefix(m.Message, name+": ") {
			t.Errorf("%s: %+v", name, m)
		}
	}
	for range 2 * maxErrors { // none counts as a bad message: the client repeats them when it connects
		refused(&wire.QuerySub{QueryID: "bad", MapName: "m", Query: q(t, `{"predicate":{"op":"what"}}`)}, "UNKNOWN_OPERATOR", 400)
	}
	refused(&wire.QuerySub{QueryID: "bad", MapName: "m", Query: q(t, `{"where":5}`)}, "BAD_QUERY", 400)
	b.fanout.queryError = "QUERY_TOO_LARGE: the rows take too much memory"
	p.send(&wire.QuerySub{QueryID: "bad", MapName: "m"})
	if m := p.result("bad"); m.Code != "QUERY_TOO_LARGE" || len(m.Results) != 0 {
		t.Errorf("%+v", m)
	}
	for {
		if m, ok := p.recv().(*wire.ErrorMessage); ok {
			if m.Code != 413 {
				t.Errorf("%+v", m)
			}
			break
		}
	}
	p.settled()
	b.fanout.queryError = ""
	for i := range 3 {
		p.subscribe(fmt.Sprint("q", i), "m", nil)
	}
	p.settled()
	refused(&wire.QuerySub{QueryID: "bad", MapName: "m"}, "TOO_MANY_SUBS", 429)
	p.subscribe("q2", "m", q(t, adults)) // a replacement is not one more
	p.settled()
}

// After the stream was lost every session gets its results anew.
func TestQueriesAfterStreamLoss(t *testing.T) {
	b := setup(t, nil, nil)
	p := b.hello(t)
	p.subscribe("q1", "m", nil)
	p.subscribe("q2", "m", q(t, adults))
	p.settled()
	b.fanout.setDown(true)
	b.fanout.cut()
	eventually(t, func() bool { return b.service.sockets.hub.ready() != nil })
	b.partition.put("m", "k", person(20), stamp(1))
	p.send(&wire.QuerySub{QueryID: "q3", MapName: "m", Query: q(t, adults)}) // while it is away
	b.fanout.setDown(false)
	got := map[string]string{}
	for len(got) < 3 {
		if m, ok := p.recv().(*wire.QueryResp); ok {
			got[m.QueryID] = rowKeys(m)
		}
	}
	for id, keys := range got {
		if keys != "k" {
			t.Errorf("%s: %q", id, keys)
		}
	}
	b.partition.put("m", "l", person(30), stamp(1))
	updates := []string{p.update(), p.update(), p.update()}
	slices.Sort(updates)
	if !slices.Equal(updates, []string{"q1 ENTER l", "q2 ENTER l", "q3 ENTER l"}) {
		t.Errorf("updates %q", updates)
	}
}

// A session that reads too slowly for the changes of its query gets a fresh result in
// their place when it reads on.
func TestSlowReaderGetsAResult(t *testing.T) {
	b := setup(t, func(c *Config) { c.QueueBytes = 64 << 10; c.WriteTimeout = time.Minute }, nil)
	slow, other := b.hello(t), b.hello(t)
	b.narrow(t, slow)
	slow.subscribe("slow", "m", nil)
	other.subscribe("other", "m", nil)
	other.settled()
	value := packed(strings.Repeat("x", 4000))
	n := 0
	for ; b.service.sockets.meters.drops.Load() == 0; n++ {
		if n == 10_000 {
			t.Fatal("of 40 MB that a client does not read nothing was dropped")
		}
		b.partition.put("m", fmt.Sprint("k", n%50), value, stamp(uint64(n+1)))
		other.anyUpdate()
	}
	b.partition.put("m", "last", packed("v"), stamp(1))
	other.anyUpdate()
	updates := 0
	for {
		m := slow.recv()
		if _, ok := m.(*wire.QueryUpdate); ok {
			updates++
			continue
		}
		if r, ok := m.(*wire.QueryResp); ok {
			if !strings.Contains(rowKeys(r), "last") {
				t.Errorf("%d rows without the last", len(r.Results))
			}
			break
		}
	}
	if updates >= n {
		t.Errorf("%d updates of %d arrived", updates, n)
	}
	b.partition.put("m", "after", packed("v"), stamp(1))
	if got := slow.update(); got != "slow ENTER after" {
		t.Error(got)
	}
}

func (p *wsClient) anyUpdate() {
	p.t.Helper()
	for {
		switch m := p.recv().(type) {
		case *wire.SyncRespRoot:
		case *wire.QueryUpdate:
			return
		default:
			p.t.Fatalf("got %T %+v, want a QUERY_UPDATE", m, m)
		}
	}
}

// A query sees the ops that its session sent before it.
func TestQueryHoldsOwnOps(t *testing.T) {
	g := newGate()
	b := setup(t, nil, func(b *bench) { b.partition.before = g.before })
	p := b.hello(t)
	p.send(&wire.OpBatch{Ops: []wire.Op{putOp("1", "m", "k", "v", stamp(5))}})
	p.send(&wire.QuerySub{QueryID: "q", MapName: "m"})
	p.send(&wire.QuerySub{QueryID: "gone", MapName: "m"})
	p.send(&wire.QueryUnsub{QueryID: "gone"})
	<-g.entered
	p.ping()
	g.release()
	expect[*wire.OpAck](p)
	if m := p.result("q"); rowKeys(m) != "k" {
		t.Errorf("%+v", m)
	}
	p.settled()
}

// A query does not make its session look at the map: it gets a root, and one more after
// the first change, and if the client says nothing to them, changes cost it nothing. A
// client that has the map open asks for buckets, and gets every event from there on.
func TestQueryProbesTheMap(t *testing.T) {
	b := setup(t, nil, nil)
	stamps := b.fill("m", 3, "v")
	none := q(t, `{"where":{"a":1}}`)
	silent, open := b.hello(t), b.hello(t)
	for _, p := range []*wsClient{silent, open} {
		p.send(&wire.QuerySub{QueryID: "q", MapName: "m", Query: none})
		p.send(&wire.QuerySub{QueryID: "again", MapName: "m", Query: none})
		roots := 0
		for results := 0; results < 2 || roots < 1; {
			switch m := p.recv().(type) {
			case *wire.QueryResp:
				results++
			case *wire.SyncRespRoot:
				if roots++; m.RootHash != rootOf(stamps, merkle.Mixed) {
					t.Errorf("root %d", m.RootHash)
				}
			}
		}
		p.ping() // one root only
	}
	// The first change brings the second root, a second after the first one.
	b.partition.put("m", "x", packed("v"), stamp(9))
	stamps["x"] = stamp(9)
	for _, p := range []*wsClient{silent, open} {
		if m := expect[*wire.SyncRespRoot](p); m.RootHash != rootOf(stamps, merkle.Mixed) {
			t.Errorf("second root %d", m.RootHash)
		}
	}
	open.send(&wire.MerkleReqBucket{MapName: "m"})
	expect[*wire.SyncRespBuckets](open)
	b.partition.put("m", "y", packed("v"), stamp(9))
	if e := expect[*wire.ServerEvent](open); e.Key != "y" {
		t.Errorf("%+v", e)
	}
	silent.ping()
	// What is missed is made up for too: with a root for the one, with results for both.
	b.fanout.cut()
	for {
		if _, ok := open.recv().(*wire.SyncRespRoot); ok {
			break
		}
	}
	expect[*wire.QueryResp](silent)
	expect[*wire.QueryResp](silent)
	silent.ping()
	h := b.service.sockets.hub
	h.mu.Lock()
	if n := len(h.maps["m"].sessions); n != 1 {
		t.Errorf("%d sessions look at the map", n)
	}
	h.mu.Unlock()
}

// Of a map that is looked at anyhow, and after an op on it, a query brings no root.
func TestQueryOfAnOpenMap(t *testing.T) {
	b := setup(t, nil, nil)
	p := b.hello(t)
	p.synced("m", 0)
	p.send(&wire.QuerySub{QueryID: "q", MapName: "m"})
	expect[*wire.QueryResp](p)
	b.partition.put("m", "k", packed("v"), stamp(1))
	got := []wire.Message{p.recv(), p.recv()}
	if _, ok := got[0].(*wire.ServerEvent); !ok {
		_, ok = got[1].(*wire.ServerEvent)
		if !ok {
			t.Errorf("no event: %+v", got)
		}
	}
	p.ping()
}

// A refusal of Watch loses the stream, and queries come with the next one.
func TestQueryWatchFails(t *testing.T) {
	b := setup(t, nil, nil)
	b.fanout.watchError(connect.NewError(connect.CodeUnavailable, "busy"))
	p := b.hello(t)
	p.send(&wire.QuerySub{QueryID: "q", MapName: "m"})
	p.result("q")
}

// Events that do not fit drop what waits of queries too, and their results follow.
func TestEventsDropQueryFrames(t *testing.T) {
	b := setup(t, func(c *Config) { c.QueueMessages = 8 }, nil)
	p := b.hello(t)
	p.synced("m", 0)
	p.subscribe("q", "other", nil)
	p.settled()
	s := b.service.sockets.snapshot()[0]
	holdWriter(t, s)
	b.partition.put("other", "k", packed("v"), stamp(1))
	eventually(t, func() bool { return queued(s) == 1 }) // or the events may come first
	for i := range 10 {
		b.partition.put("m", fmt.Sprint("k", i), packed("v"), stamp(1))
	}
	eventually(t, func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.owedQueries) == 1 && s.owed["m"]
	})
	s.mu.Lock()
	s.out.writing = false
	s.startWriterLocked()
	s.mu.Unlock()
	for { // the root of m and its last events may come in between
		if m, ok := p.recv().(*wire.QueryResp); ok {
			if m.QueryID != "q" || rowKeys(m) != "k" {
				t.Errorf("%+v", m)
			}
			return
		}
	}
}

// BenchmarkQueryOnce is a query that is asked once, from QUERY_SUB to QUERY_RESP, without
// what fanout takes for it.
func BenchmarkQueryOnce(b *testing.B) {
	g := setup(b, nil, nil)
	g.partition.put("m", "k", packed("v"), stamp(1))
	p := g.hello(b)
	p.subscribe("q", "m", nil)
	p.settled()
	for n := 0; b.Loop(); n++ {
		if n%100 == 0 { // below the flood limit
			p = g.hello(b)
		}
		p.subscribe("once", "m", nil)
		p.send(&wire.QueryUnsub{QueryID: "once"})
	}
}
