package gateway

import (
	"errors"
	"hash/maphash"
	"maps"
	"strings"
	"sync"

	"github.com/gobwas/ws"

	"github.com/topgun-sync/topgun/core/query"
	"github.com/topgun-sync/topgun/core/wire"
	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

const (
	// watchQueries and watchQueryBytes bound the queries that one Watch call adds; the
	// rest follows with the next.
	watchQueries    = 1000
	watchQueryBytes = 1 << 20
)

// queries knows which sessions have which live query, and keeps them up to date from the
// fanout stream (PROTOCOL 12). Equal queries, of whatever session and under whatever
// queryId, are one query to fanout.
//
// Every session of a query gets its result as a whole first, and from then on every
// change, in the order of the stream. A session that joins a query that others have asks
// for its result once more, and the others do not get it again, because the rows that
// they know are the same: their hashes are kept. While the stream is lost nothing
// changes; on the next one every query is added anew and every session gets its result.
//
// Lock order: queries.mu before session.mu.
type queries struct {
	kick func() // has the stream's watcher look at wanted

	mu      sync.Mutex
	lastID  uint64
	byID    map[uint64]*liveQuery
	byName  map[string]*liveQuery   // by map and canonical query
	changed map[*liveQuery]struct{} // that fanout is to hear of
	gone    []uint64                // ids that fanout is to forget
	scratch []byte                  // of the tail of a change
}

// liveQuery is one query that sessions of this gateway have.
type liveQuery struct {
	id      uint64
	name    string // in byName
	mapName string
	encoded []byte
	told    bool // fanout has heard of it on this stream; if changed too, it is to be refreshed
	subs    map[*querySub]struct{}
	// rows are hashes of the rows that the sessions know, by the hash of the key; nil
	// before the first result of a stream.
	rows map[uint64]uint64
}

// querySub is one query of one session.
type querySub struct {
	session *session
	id      string // the queryId

	// Of queries.mu.
	live    *liveQuery // nil until it has joined
	waiting bool       // for a result; changes are not for it until then
	ended   bool
}

func newQueries(kick func()) *queries {
	return &queries{
		kick:    kick,
		byID:    make(map[uint64]*liveQuery),
		byName:  make(map[string]*liveQuery),
		changed: make(map[*liveQuery]struct{}),
	}
}

// join makes a subscription get its query's result, and the changes after it.
func (q *queries) join(sub *querySub, mapName string, parsed *query.Query) {
	name := mapName + "\x00" + string(parsed.Canonical())
	q.mu.Lock()
	defer q.mu.Unlock()
	if sub.ended {
		return
	}
	live := q.byName[name]
	if live == nil {
		q.lastID++
		live = &liveQuery{
			id: q.lastID, name: name, mapName: strings.Clone(mapName), encoded: parsed.Encode(),
			subs: make(map[*querySub]struct{}),
		}
		q.byID[live.id], q.byName[name] = live, live
	}
	sub.live = live
	live.subs[sub] = struct{}{}
	q.askLocked(sub)
}

// askLocked has a subscription get the result as a whole; q.mu is held. A first result
// that is on its way will do.
func (q *queries) askLocked(sub *querySub) {
	sub.waiting = true
	live := sub.live
	if live.told && live.rows == nil {
		return
	}
	q.changed[live] = struct{}{}
	q.kick()
}

// refresh has subscriptions whose frames were dropped get their results.
func (q *queries) refresh(subs []*querySub) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, sub := range subs {
		if sub.live != nil && !sub.waiting {
			q.askLocked(sub)
		}
	}
}

// leave ends a subscription.
func (q *queries) leave(sub *querySub) {
	q.mu.Lock()
	defer q.mu.Unlock()
	sub.ended = true
	live := sub.live
	if live == nil {
		return
	}
	sub.live = nil
	if delete(live.subs, sub); len(live.subs) == 0 {
		q.forgetLocked(live)
		if live.told {
			q.gone = append(q.gone, live.id)
			q.kick()
		}
	}
}

func (q *queries) forgetLocked(live *liveQuery) {
	delete(q.byID, live.id)
	delete(q.byName, live.name)
	delete(q.changed, live)
}

// count returns how many distinct queries sessions have.
func (q *queries) count() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.byID)
}

// lost notes that the stream ended. Everybody waits for the results of the next one.
func (q *queries) lost() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.gone = nil
	for _, live := range q.byID {
		live.told, live.rows = false, nil
		q.changed[live] = struct{}{}
		for sub := range live.subs {
			sub.waiting = true
		}
	}
}

// wanted adds to a Watch call what fanout is to hear, and reports whether there is more.
func (q *queries) wanted(call *fanoutv1.WatchRequest) (more bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	size := 0
	for live := range q.changed {
		if len(call.AddQueries) >= watchQueries || size >= watchQueryBytes {
			more = true
			break
		}
		delete(q.changed, live)
		if live.told {
			call.RefreshQueries = append(call.RefreshQueries, live.id)
		} else {
			call.AddQueries = append(call.AddQueries, &fanoutv1.LiveQuery{Id: live.id, Map: live.mapName, Query: live.encoded})
			size += len(live.encoded)
		}
		live.told = true
	}
	call.RemoveQueries, q.gone = q.gone, nil
	return more
}

// rowSeed keys the hashes of rows. It is one process' own, so that no rows can be made
// to look alike.
var rowSeed = maphash.MakeSeed()

func rowHashes(key, value []byte) (k, v uint64) {
	return maphash.Bytes(rowSeed, key), maphash.Bytes(rowSeed, value)
}

// result takes in the result of a query as a whole.
func (q *queries) result(r *fanoutv1.QueryResult) {
	q.mu.Lock()
	live := q.byID[r.GetId()]
	if live == nil {
		q.mu.Unlock()
		return // nobody has it any more
	}
	if r.GetError() != "" {
		q.forgetLocked(live)
		q.gone = append(q.gone, live.id)
		q.kick()
		for sub := range live.subs {
			sub.live, sub.ended = nil, true
		}
		q.mu.Unlock()
		for sub := range live.subs {
			sub.session.queryFailed(sub, r.GetError())
		}
		return
	}
	defer q.mu.Unlock()
	rows := make(map[uint64]uint64, len(r.GetRows()))
	for _, row := range r.GetRows() {
		k, v := rowHashes(row.GetKey(), row.GetValue())
		rows[k] = v
	}
	same := live.rows != nil && maps.Equal(live.rows, rows)
	live.rows = rows
	response := &wire.QueryResp{
		Results: keyValues(r.GetRows()), NextCursor: r.GetNextCursor(), HasMore: r.GetMore(),
		CursorStatus: cursorStatus(r.GetCursorStatus()),
	}
	var woken []*session
	for sub := range live.subs {
		if same && !sub.waiting {
			continue
		}
		sub.waiting = false
		response.QueryID = sub.id
		if sub.session.giveResult(sub, compile(response)) {
			woken = append(woken, sub.session)
			sub.session.k.meters.sentType(outResult)
		}
	}
	startWriters(woken)
}

// changes takes in changes of the rows of a query. What does not depend on the session
// is encoded once.
func (q *queries) changes(c *fanoutv1.QueryChanges) {
	q.mu.Lock()
	defer q.mu.Unlock()
	live := q.byID[c.GetId()]
	if live == nil || live.rows == nil {
		return
	}
	tails, ends := q.scratch[:0], make([]int, len(c.GetChanges()))
	for i, change := range c.GetChanges() {
		row := change.GetRow()
		k, v := rowHashes(row.GetKey(), row.GetValue())
		if change.GetType() == fanoutv1.QueryChangeType_QUERY_CHANGE_TYPE_LEAVE {
			delete(live.rows, k)
		} else {
			live.rows[k] = v
		}
		tails = wire.AppendQueryUpdateTail(tails, string(row.GetKey()), row.GetValue(), changeType(change.GetType()))
		ends[i] = len(tails)
	}
	buf := encodeBuffers.Get().(*[]byte)
	payload := (*buf)[:0]
	var woken []*session
	for sub := range live.subs {
		if sub.waiting {
			continue // the result that it waits for comes after these
		}
		frames := make([]byte, 0, len(tails)+len(ends)*(queryUpdateHead+len(sub.id)))
		begin := 0
		for _, end := range ends {
			payload = wire.AppendQueryUpdate(payload[:0], sub.id, tails[begin:end])
			frames = appendFrame(frames, ws.OpBinary, payload)
			begin = end
		}
		if sub.session.giveChanges(sub, frames) {
			woken = append(woken, sub.session)
			sub.session.k.meters.updated(len(ends))
		}
	}
	recycle(buf, payload)
	if q.scratch = tails; cap(tails) > keepEncodeBuffer {
		q.scratch = nil
	}
	startWriters(woken)
}

// queryUpdateHead is about what a QUERY_UPDATE takes beside the id and the tail.
const queryUpdateHead = 64

// startWriters starts writers after everything is queued, so that one write takes all.
func startWriters(woken []*session) {
	for _, s := range woken {
		s.mu.Lock()
		s.startWriterLocked()
		s.mu.Unlock()
	}
}

func keyValues(rows []*typesv1.Row) []wire.KeyValue {
	list := make([]wire.KeyValue, len(rows))
	for i, row := range rows {
		list[i] = wire.KeyValue{Key: string(row.GetKey()), Value: row.GetValue()}
	}
	return list
}

func cursorStatus(s fanoutv1.CursorStatus) string {
	switch s {
	case fanoutv1.CursorStatus_CURSOR_STATUS_VALID:
		return "valid"
	case fanoutv1.CursorStatus_CURSOR_STATUS_INVALID:
		return "invalid"
	default:
		return ""
	}
}

func changeType(t fanoutv1.QueryChangeType) string {
	switch t {
	case fanoutv1.QueryChangeType_QUERY_CHANGE_TYPE_ENTER:
		return "ENTER"
	case fanoutv1.QueryChangeType_QUERY_CHANGE_TYPE_LEAVE:
		return "LEAVE"
	default:
		return "UPDATE"
	}
}

var tooManyQueries = &wire.Error{
	Name: "TOO_MANY_SUBS", Code: 429, Text: "this connection has as many live queries as it may; end some or use another one",
}

// queryErrors are the codes of ERROR for what can be wrong with a query; what is not
// listed is the server's own trouble.
var queryErrors = map[string]int{
	"BAD_QUERY": 400, "QUERY_TOO_COMPLEX": 400, "UNKNOWN_OPERATOR": 400, "NOT_SUPPORTED": 501,
	"QUERY_TOO_MANY": 429, "QUERY_TOO_LARGE": 413,
}

// queryError makes an error of the gateway of a query's.
func queryError(err error) *wire.Error {
	bad, ok := errors.AsType[*query.Error](err)
	if !ok {
		return &wire.Error{Name: "BAD_QUERY", Code: 400, Text: "the query cannot be read"}
	}
	code := queryErrors[bad.Name]
	if code == 0 {
		code = 400
	}
	return &wire.Error{Name: bad.Name, Code: code, Text: bad.Text}
}

// parseQuery reads the query of a client, whose size the decoder has bounded.
func parseQuery(mapName string, q []byte, fields []string) (*query.Query, *wire.Error) {
	if err := wire.CheckMapName(mapName); err != nil {
		return nil, err
	}
	parsed, err := query.Parse(q, fields)
	if err != nil {
		return nil, queryError(err)
	}
	return parsed, nil
}

// subscribed takes a QUERY_SUB. A queryId that the session has is given a new query.
func (s *session) subscribed(m *wire.QuerySub) error {
	live := s.k.hub.queries
	parsed, refused := parseQuery(m.MapName, m.Query, m.Fields)
	if m.Err != nil {
		refused = m.Err
	}
	var sub, old *querySub
	var after <-chan struct{}
	if refused == nil {
		sub, old, after, refused = s.addSub(m.QueryID)
	} else {
		old = s.removeSub(m.QueryID)
	}
	if refused != nil {
		live.leaveAll(old)
		return s.refuseQuery(m.QueryID, refused)
	}
	if sub == nil {
		return nil // it closes
	}
	mapName := strings.Clone(m.MapName)
	join := func() {
		live.join(sub, mapName, parsed)
		live.leaveAll(old) // after it, so that the same query goes on
	}
	if after == nil {
		join()
	} else {
		// The result is to hold the client's own ops that came before. The reading goroutine
		// has not ended, so the session has not.
		s.mu.Lock()
		s.spawnLocked(func() {
			s.waitFor(after)
			join()
		})
		s.mu.Unlock()
	}
	s.probe(mapName)
	return nil
}

// addSub makes a subscription in the place of the one with its queryId, and returns what
// it has to wait for. It returns no subscription once the session closes.
func (s *session) addSub(queryID string) (sub, old *querySub, after <-chan struct{}, refused *wire.Error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old = s.subs[queryID]
	switch {
	case s.closing != nil:
		return nil, nil, nil, nil
	case old == nil && len(s.subs) >= s.k.cfg.MaxSubscriptions:
		return nil, nil, nil, tooManyQueries
	}
	s.dropSubLocked(old)
	if s.subs == nil {
		s.subs = make(map[string]*querySub)
	}
	sub = &querySub{session: s, id: strings.Clone(queryID)}
	s.subs[sub.id] = sub
	return sub, old, s.ops.tail, nil
}

// removeSub forgets the subscription with a queryId and returns it, or nil.
func (s *session) removeSub(queryID string) *querySub {
	s.mu.Lock()
	defer s.mu.Unlock()
	sub := s.subs[queryID]
	s.dropSubLocked(sub)
	return sub
}

// leaveAll ends subscriptions; nil ones are none.
func (q *queries) leaveAll(subs ...*querySub) {
	for _, sub := range subs {
		if sub != nil {
			q.leave(sub)
		}
	}
}

// unsubscribed takes a QUERY_UNSUB.
func (s *session) unsubscribed(queryID string) {
	s.k.hub.queries.leaveAll(s.removeSub(queryID))
}

// dropSubLocked forgets a subscription, which may be nil; s.mu is held. Its frames that
// wait stay: a client that does not know the query ignores them, and one that gave the
// id to another query gets the result of that one after them.
func (s *session) dropSubLocked(sub *querySub) {
	if sub != nil && s.subs[sub.id] == sub {
		delete(s.subs, sub.id)
		delete(s.owedQueries, sub)
	}
}

// endQueries ends the subscriptions of a session that has ended.
func (s *session) endQueries() {
	s.mu.Lock()
	subs := make([]*querySub, 0, len(s.subs))
	for _, sub := range s.subs {
		subs = append(subs, sub)
	}
	s.subs, s.owedQueries = nil, nil
	s.mu.Unlock()
	s.k.hub.queries.leaveAll(subs...)
}

// refuseQuery answers a query that is not served. Live queries ignore the error of a
// response, so it goes to the log as well (PROTOCOL 12.2).
func (s *session) refuseQuery(queryID string, err *wire.Error) error {
	s.send(urgent, &wire.QueryResp{QueryID: queryID, Error: err.Error(), Code: err.Name})
	return s.decline(err)
}

// queryFailed ends a subscription that fanout cannot serve, for a reason of the form
// "NAME: text".
func (s *session) queryFailed(sub *querySub, reason string) {
	s.mu.Lock()
	had := s.subs[sub.id] == sub
	s.dropSubLocked(sub)
	s.mu.Unlock()
	if !had {
		return
	}
	name, text, _ := strings.Cut(reason, ": ")
	code := queryErrors[name]
	if code == 0 {
		code = 503
	}
	_ = s.refuseQuery(sub.id, &wire.Error{Name: name, Code: code, Text: text}) // ends no session
}

// giveResult queues a QUERY_RESP. It reports whether there is something to write; the
// caller starts the writer.
func (s *session) giveResult(sub *querySub, bytes []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.subs[sub.id] != sub {
		return false
	}
	delete(s.owedQueries, sub)
	return s.queueQueryLocked(sub, bytes)
}

// giveChanges queues QUERY_UPDATEs, unless the session is owed a result that will hold
// them.
func (s *session) giveChanges(sub *querySub, bytes []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, owed := s.owedQueries[sub]; owed || s.subs[sub.id] != sub {
		return false
	}
	return s.queueQueryLocked(sub, bytes)
}

// queueQueryLocked queues frames of a query; s.mu is held. They share the bounds of
// events. What does not fit is dropped with all that waits of the query, and its result
// follows when the queue is drained.
func (s *session) queueQueryLocked(sub *querySub, bytes []byte) bool {
	if s.out.shut() {
		return false
	}
	if s.out.events > 0 && s.out.fullLocked(s.k.cfg, len(bytes)) {
		s.dropFramesLocked(func(f *frame) bool { return f.query == sub })
		s.oweQueryLocked(sub)
		return false
	}
	s.pushLocked(bulk, frame{bytes: bytes, query: sub})
	return true
}

func (s *session) oweQueryLocked(sub *querySub) {
	if s.closing != nil || s.subs[sub.id] != sub {
		return
	}
	if s.owedQueries == nil {
		s.owedQueries = make(map[*querySub]struct{})
	}
	s.owedQueries[sub] = struct{}{}
}

// takeOwedQueriesLocked returns the subscriptions that are owed a result; s.mu is held.
// They are owed no longer: changes from here on are in the result or follow it.
func (s *session) takeOwedQueriesLocked() (subs []*querySub) {
	for sub := range s.owedQueries {
		subs = append(subs, sub)
	}
	s.owedQueries = nil
	return subs
}
