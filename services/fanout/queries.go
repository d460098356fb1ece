package fanout

import (
	"errors"
	"slices"

	"github.com/topgun-sync/topgun/core/query"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

// sub is one live query of one stream.
//
//	waiting ── the result is there ──▶ due ── its turn has come ──▶ making ── result taken ──▶ live
//	                                    ▲                                                       │
//	                                    └── refresh, dropped changes, the query failed ─────────┘
//
// Changes are queued in live alone; so they follow the result that they change.
type sub struct {
	stream *stream
	id     uint64
	// live evaluates the query; nil when it was refused, for the reason in refusal.
	live    *liveMap
	refusal string
	// evaluator is nil before the map's worker has taken the query in, and after it
	// was ended. live.mu guards it.
	evaluator *evaluator

	// stream.mu guards the rest. Changes of another epoch are obsolete.
	state subState
	epoch uint32
}

type subState uint8

const (
	subWaiting subState = iota
	subDue
	subMaking
	subLive
	subGone
)

// ready says that there is a result to be sent.
func (s *stream) ready(q *sub) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended == nil && q.state != subGone {
		s.setDue(q)
	}
}

// refresh makes a query due that has a result already. One that has none yet is
// going to be.
func (s *stream) refresh(q *sub) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended == nil && (q.state == subLive || q.state == subMaking) {
		s.setDue(q)
	}
}

func (s *stream) setDue(q *sub) {
	q.epoch++
	if q.state != subDue {
		q.state = subDue
		s.due = append(s.due, q)
		s.wakeUp()
	}
}

// taken says that the result of a query was taken and is sent next: changes from
// then on are queued. The evaluator's lock is held.
func (s *stream) taken(q *sub) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if q.state == subMaking {
		q.state = subLive
	}
}

// gone ends a query; nothing that is queued for it is sent.
func (s *stream) gone(q *sub) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if q.state == subDue {
		// The list must not grow by queries that come and go while nobody reads.
		if s.dueGone++; s.dueGone > 64 && s.dueGone > len(s.due)/2 {
			q.state = subGone
			s.due = slices.DeleteFunc(s.due, func(q *sub) bool { return q.state == subGone })
			s.dueGone = 0
		}
	}
	q.state = subGone
	q.epoch++
}

// pushChanges queues changes of a query, of size encoded bytes. Where they do not
// fit the query is due.
func (s *stream) pushChanges(q *sub, changes []*fanoutv1.QueryChange, size int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended != nil || q.state != subLive {
		return
	}
	fits := s.makeRoom(size)
	switch {
	case q.state != subLive: // making room cost its own changes
	case fits:
		message := &fanoutv1.SubscribeResponse{Message: &fanoutv1.SubscribeResponse_QueryChanges{
			QueryChanges: &fanoutv1.QueryChanges{Id: q.id, Changes: changes},
		}}
		s.append(item{kind: changesKind, message: message, size: size, sub: q, epoch: q.epoch})
	default:
		s.setDue(q)
	}
}

// watchQueries adds, removes and refreshes queries of a stream. What cannot be
// answered gets a result that says why. Adding an id again has no effect.
func (s *Service) watchQueries(req *fanoutv1.WatchRequest) error {
	if len(req.GetAddQueries())+len(req.GetRemoveQueries())+len(req.GetRefreshQueries()) == 0 {
		return nil
	}
	// Parsing takes its time, and the bus waits for s.mu.
	add := make([]asked, len(req.GetAddQueries()))
	for n, q := range req.GetAddQueries() {
		parsed, err := query.Parse(q.GetQuery(), nil)
		add[n] = asked{q.GetMap(), &sub{id: q.GetId()}, parsed}
		var refusal *query.Error
		switch {
		case errors.As(err, &refusal):
			add[n].sub.refusal = refusal.Error()
		case err != nil:
			return err
		case s.partitions.none():
			add[n].sub.refusal = noPartitions
		}
	}

	id := req.GetStreamId()
	if err := s.changeQueries(id, nil, req.GetRemoveQueries(), nil); err != nil {
		return err
	}
	for some := range slices.Chunk(add, watchChunk) {
		if err := s.changeQueries(id, some, nil, nil); err != nil {
			return err
		}
	}
	return s.changeQueries(id, nil, nil, req.GetRefreshQueries())
}

// asked is a query that a Watch adds.
type asked struct {
	mapName string
	sub     *sub
	query   *query.Query
}

// watchChunk bounds how long the bus waits for a Watch that adds many queries.
const watchChunk = 1024

func (s *Service) changeQueries(streamID string, add []asked, remove, refresh []uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.streams[streamID]
	if st == nil {
		return errNoStream
	}
	for _, id := range remove {
		if q := st.queries[id]; q != nil {
			s.dropQueryLocked(q)
		}
	}
	// A map gets its queries together, so that it reads for all of them at once.
	fresh := make(map[*liveMap][]command)
	defer func() {
		for m, commands := range fresh {
			m.do(commands...)
		}
	}()
	for _, a := range add {
		if err := s.addQueryLocked(st, a, fresh); err != nil {
			return err
		}
	}
	for _, id := range refresh {
		if q := st.queries[id]; q != nil {
			st.refresh(q)
		}
	}
	return nil
}

// addQueryLocked adds a query of a stream, or its refusal. What its map has to do
// goes to fresh.
func (s *Service) addQueryLocked(st *stream, a asked, fresh map[*liveMap][]command) error {
	q := a.sub
	if st.queries[q.id] != nil {
		return nil
	}
	if q.refusal == "" && (len(st.queries) >= s.config.MaxQueriesPerStream || s.queries >= s.config.MaxQueries) {
		q.refusal = tooManyQueries
	}
	q.stream = st
	if q.refusal != "" {
		// Refusals wait until the gateway reads them.
		if len(st.queries) >= 2*s.config.MaxQueriesPerStream {
			return errTooManyQueries
		}
		st.queries[q.id] = q
		s.queries++
		st.ready(q)
		return nil
	}
	w, err := s.mapLocked(a.mapName)
	if err != nil {
		return err
	}
	if w.live == nil {
		w.live = newLiveMap(s, a.mapName)
	}
	q.live = w.live
	q.live.users++
	st.queries[q.id] = q
	s.queries++
	fresh[q.live] = append(fresh[q.live], command{sub: q, add: a.query})
	return nil
}

// dropQueryLocked ends a query. The worker of its map forgets it later, because the
// lock of the evaluators must not be waited for here.
func (s *Service) dropQueryLocked(q *sub) {
	delete(q.stream.queries, q.id)
	s.queries--
	q.stream.gone(q)
	m := q.live
	if m == nil {
		return
	}
	m.do(command{sub: q})
	if m.users--; m.users > 0 {
		return
	}
	w := s.maps[m.name]
	w.live = nil
	close(m.ended)
	s.releaseLocked(m.name, w)
}

// result makes the result of a query whose turn has come, nil if it has ended. One
// that failed is forgotten.
func (s *Service) result(q *sub) *fanoutv1.SubscribeResponse {
	result := &fanoutv1.QueryResult{Id: q.id, Error: q.refusal}
	if q.live != nil && !q.live.result(q, result) {
		return nil
	}
	if result.GetError() != "" {
		s.mu.Lock()
		if q.stream.queries[q.id] == q {
			s.dropQueryLocked(q)
		}
		s.mu.Unlock()
	}
	return &fanoutv1.SubscribeResponse{Message: &fanoutv1.SubscribeResponse_QueryResult{QueryResult: result}}
}

func statusOf(status query.CursorStatus) fanoutv1.CursorStatus {
	switch status {
	case query.CursorValid:
		return fanoutv1.CursorStatus_CURSOR_STATUS_VALID
	case query.CursorInvalid:
		return fanoutv1.CursorStatus_CURSOR_STATUS_INVALID
	}
	return fanoutv1.CursorStatus_CURSOR_STATUS_UNSPECIFIED
}

// changesOf turns updates into messages, and gives about their encoded size.
func changesOf(updates []query.Update) (changes []*fanoutv1.QueryChange, size int) {
	changes = make([]*fanoutv1.QueryChange, len(updates))
	size = changesOverhead
	for n, u := range updates {
		change := &fanoutv1.QueryChange{Row: &typesv1.Row{Key: []byte(u.Row.Key)}}
		switch u.Type {
		case query.ChangeEnter:
			change.Type = fanoutv1.QueryChangeType_QUERY_CHANGE_TYPE_ENTER
			change.Row.Value = u.Row.Value
		case query.ChangeUpdate:
			change.Type = fanoutv1.QueryChangeType_QUERY_CHANGE_TYPE_UPDATE
			change.Row.Value = u.Row.Value
		case query.ChangeLeave:
			change.Type = fanoutv1.QueryChangeType_QUERY_CHANGE_TYPE_LEAVE
		}
		changes[n] = change
		size += changeOverhead + len(u.Row.Key) + len(change.GetRow().GetValue())
	}
	return changes, size
}

// What the encoding adds to keys and values.
const (
	changesOverhead = 16
	changeOverhead  = 16
)
