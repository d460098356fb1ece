package fanout

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/topgun-sync/topgun/core/query"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

// liveMap keeps the live queries of one map up to date. The bus and Watch put into
// its inbox, which never waits; one worker at a time takes out and evaluates; one
// reader at a time asks the partitions for the rows of the evaluators that want
// them (read.go). An idle map has neither goroutine, see crew.
//
// Every row that an evaluator gets is newer than the one it has, by the arrival in
// its shard: changes that are not after the newest one handled are left out, and so
// are those that the read of the evaluator covers.
type liveMap struct {
	service *Service
	name    string
	// users counts the queries of streams; Service.mu guards it.
	users int
	// ended is closed with the last user.
	ended chan struct{}

	inbox inbox

	mu sync.Mutex
	// evaluators are found by the canonical form of their query.
	evaluators map[string]*evaluator
	index      index
	holders    holders
	// seen is, by shard, the newest arrival handled.
	seen map[uint32]arrival
	// or says whether the OR-map of this name may have records.
	or orState
	// ahead holds keys that were read from their shard after events which are still
	// to come; those say nothing new. Any later event of the shard clears what it has
	// here, so there are never more than the keys of a few events.
	ahead map[string]keyState
	// wanted are the evaluators that want to be read; reading says that a reader is
	// at work, and round is what it reads for.
	wanted  []*evaluator
	reading bool
	round   *round
	// pause is how long the reader waits when a round does not work once more. The
	// reader alone uses it.
	pause time.Duration
	// covered is the newest coverage in use: equal ones are shared.
	covered *coverage
	// generation marks the evaluators that had the row; candidates is scratch.
	generation uint64
	candidates []*evaluator
}

// evaluator keeps the result of one query, for all streams that show it. The lock of
// its map guards it.
type evaluator struct {
	query     *query.Query
	canonical string
	subs      []*sub
	// live is nil before the first read.
	live *query.Live
	// covered says which changes are in what was read.
	covered *coverage
	// bytes and rows are what was counted of live last.
	bytes, rows int
	place       place
	mark        uint64
	wanted      bool
	// failure is why the query cannot be answered. Nothing follows.
	failure string
}

// orState says what is known of the OR-map that has the map's name. While it may
// have records, the end of an LWW record uncovers the OR values of the key.
type orState uint8

const (
	orUnknown orState = iota
	orEmpty
	orUsed
)

// keyState is what was read of a key: the newest arrivals of its kinds.
type keyState struct {
	shard   uint32
	lww, or arrival
	// value is the row; nil when there is none. lwwVisible says that it is the LWW
	// value.
	value      []byte
	lwwVisible bool
}

// row is what the key's state makes of its row, and as of when: an LWW value has
// its own arrival, whatever there is in the OR-map.
func (k keyState) row() (value []byte, at arrival) {
	if k.lwwVisible {
		return k.value, k.lww
	}
	return k.value, k.newest()
}

func (k keyState) newest() arrival { return later(k.lww, k.or) }

// rowChange is what became of the row of a key. A nil value means that there is none.
type rowChange struct {
	key   string
	shard uint32
	at    arrival
	value []byte
}

func newLiveMap(s *Service, name string) *liveMap {
	return &liveMap{
		service:    s,
		name:       name,
		inbox:      inbox{limits: limits{s.config.QueueEvents, s.config.QueueBytes}},
		evaluators: make(map[string]*evaluator),
		holders:    holders{byKey: make(map[string][]*evaluator)},
		seen:       make(map[uint32]arrival),
		ahead:      make(map[string]keyState),
		ended:      make(chan struct{}),
	}
}

// inbox is what a map's worker has to do. Its events are bounded; what does not fit
// is lost, and as with any loss all evaluators are read again. Commands are bounded
// by the queries of the streams.
type inbox struct {
	limits limits

	mu       sync.Mutex
	commands []command
	events   []sizedEvent
	bytes    int
	// lost says that events are missing before the first of events.
	lost    bool
	working bool
}

type sizedEvent struct {
	event *fanoutv1.Event
	size  int
}

// command adds a query to a map, or ends it when add is nil.
type command struct {
	sub *sub
	add *query.Query
}

// work is what a worker takes out at a time.
type work struct {
	commands []command
	events   []sizedEvent
	lost     bool
}

const (
	// workEvents bounds how long the lock of the evaluators is held.
	workEvents = 64
	// allInboxes is how many full inboxes there may be, by their bytes.
	allInboxes = 16
)

func (m *liveMap) event(event *fanoutv1.Event, size int) {
	m.put(func(in *inbox) {
		all := &m.service.inboxBytes
		if len(in.events) >= in.limits.events || (len(in.events) > 0 && in.bytes+size > in.limits.bytes) ||
			all.Load() > int64(allInboxes*in.limits.bytes) {
			all.Add(int64(-in.bytes))
			in.events, in.bytes, in.lost = nil, 0, true
		}
		in.events = append(in.events, sizedEvent{event, size})
		in.bytes += size
		all.Add(int64(size))
	})
}

func (m *liveMap) gap() { m.put(func(in *inbox) { in.lost = true }) }

func (m *liveMap) do(commands ...command) {
	m.put(func(in *inbox) { in.commands = append(in.commands, commands...) })
}

// put changes the inbox and sees to it that a worker looks.
func (m *liveMap) put(change func(*inbox)) {
	m.inbox.mu.Lock()
	defer m.inbox.mu.Unlock()
	change(&m.inbox)
	if !m.inbox.working {
		m.inbox.working = true
		m.service.crew.run(m.work)
	}
}

// take returns the next work. Without any the worker has to end.
func (in *inbox) take(all *atomic.Int64) (w work, ok bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if len(in.commands)+len(in.events) == 0 && !in.lost {
		in.working = false
		in.commands, in.events = nil, nil
		return work{}, false
	}
	w = work{commands: in.commands, lost: in.lost}
	n := min(len(in.events), workEvents)
	w.events = in.events[:n:n]
	for _, e := range w.events {
		in.bytes -= e.size
		all.Add(int64(-e.size))
	}
	if in.events = in.events[n:]; len(in.events) == 0 {
		in.events = nil
	}
	in.commands, in.lost = nil, false
	return w, true
}

// work handles what is in the inbox until it is empty.
func (m *liveMap) work(ctx context.Context) {
	for {
		w, ok := m.inbox.take(&m.service.inboxBytes)
		if !ok || ctx.Err() != nil {
			return
		}
		m.handle(ctx, w)
	}
}

// handle does the work. Keys whose row no event tells are read first, outside the
// lock; the order of the changes stays.
func (m *liveMap) handle(ctx context.Context, w work) {
	m.mu.Lock()
	if w.lost {
		m.lostEvents()
	}
	keys := m.unknownRows(w.events)
	m.mu.Unlock()
	var states map[string]keyState
	if len(keys) > 0 {
		var err error
		if states, err = m.service.partitions.get(ctx, m.name, keys); err != nil {
			m.service.logger.Info("keys of live queries not read", "error", err)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range w.commands {
		if c.add != nil {
			m.addSub(c.sub, c.add)
		} else {
			m.removeSub(c.sub)
		}
	}
	for change, shard := range changesIn(w.events) {
		m.change(shard, change, states)
	}
	for key, state := range m.ahead {
		if !state.newest().after(m.seen[state.shard]) {
			delete(m.ahead, key)
		}
	}
	m.startReading()
}

// lostEvents makes all evaluators want to be read, and those that are being read
// once more: their read may have begun before the loss.
func (m *liveMap) lostEvents() {
	if m.or == orEmpty {
		m.or = orUnknown
	}
	if m.round != nil {
		m.round.lost = true
	}
	for _, e := range m.evaluators {
		m.want(e)
	}
}

func (m *liveMap) want(e *evaluator) {
	if !e.wanted && e.failure == "" {
		e.wanted = true
		m.wanted = append(m.wanted, e)
	}
}

// startReading starts a reader if somebody wants one.
func (m *liveMap) startReading() {
	if len(m.wanted) > 0 && !m.reading {
		m.reading = true
		m.service.crew.read(m.read)
	}
}

func (m *liveMap) addSub(q *sub, parsed *query.Query) {
	canonical := parsed.Canonical()
	e := m.evaluators[string(canonical)]
	if e == nil {
		e = &evaluator{query: parsed, canonical: string(canonical)}
		m.evaluators[e.canonical] = e
		e.place = m.index.add(e)
		m.service.evaluators.Add(1)
		m.want(e)
	}
	q.evaluator = e
	e.subs = append(e.subs, q)
	if e.live != nil {
		q.stream.ready(q)
	}
}

func (m *liveMap) removeSub(q *sub) {
	e := q.evaluator
	q.evaluator = nil
	if e == nil {
		return
	}
	for n, other := range e.subs {
		if other == q {
			last := len(e.subs) - 1
			e.subs[n], e.subs[last] = e.subs[last], nil
			e.subs = e.subs[:last]
			break
		}
	}
	if len(e.subs) == 0 && e.failure == "" {
		m.forget(e)
	}
}

// forget takes an evaluator out of the map. What holders still has of it goes with
// the next sweep.
func (m *liveMap) forget(e *evaluator) {
	delete(m.evaluators, e.canonical)
	m.index.remove(e.place)
	m.service.evaluators.Add(-1)
	e.live = nil
	m.count(e)
	m.holders.sweep()
}

// fail ends an evaluator. The streams get the reason as their result.
func (m *liveMap) fail(e *evaluator, reason string) {
	m.forget(e)
	e.failure = reason
	for _, q := range e.subs {
		q.stream.ready(q)
	}
}

// count takes notice of what an evaluator holds.
func (m *liveMap) count(e *evaluator) {
	bytes, rows := 0, 0
	if e.live != nil {
		bytes, rows = e.live.Bytes(), e.live.Len()
	}
	m.service.queriesBytes.Add(int64(bytes - e.bytes))
	if e.place.indexed() {
		m.holders.rows += rows - e.rows
	}
	e.bytes, e.rows = bytes, rows
}

// excess says why an evaluator holds too much, or nothing.
func (m *liveMap) excess(e *evaluator) string {
	switch {
	case e.live.Overflow():
		return tooManyRows
	case e.bytes > 2*m.service.config.MaxQueryBytes,
		m.service.queriesBytes.Load() > int64(m.service.config.MaxQueriesBytes):
		return tooLarge
	}
	return ""
}

// result fills in the result of a query whose turn has come, or its error. It
// returns false if the query was ended.
func (m *liveMap) result(q *sub, result *fanoutv1.QueryResult) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := q.evaluator
	if e == nil {
		return false
	}
	if e.failure != "" {
		result.Error = e.failure
		return true
	}
	rows, more, cursor := e.live.Window()
	result.Rows = make([]*typesv1.Row, len(rows))
	for n, row := range rows {
		result.Rows[n] = &typesv1.Row{Key: []byte(row.Key), Value: row.Value}
	}
	result.More, result.NextCursor, result.CursorStatus = more, cursor, statusOf(e.live.Status())
	q.stream.taken(q)
	return true
}
