package gateway

import (
	"context"
	"slices"
	"sync"
	"testing"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectinprocess"

	"github.com/topgun-sync/topgun/core/query"
	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	persistencev1 "github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1/persistencev1connect"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

// fakeQuery is a query of a stream of fakeFanout, kept up to date by the real engine.
type fakeQuery struct {
	mapName string
	query   *query.Query
	live    *query.Live
	error   string
}

// watchLive does the query and topic part of a Watch call; f.mu is held.
func (f *fakeFanout) watchLive(s *fakeStream, req *fanoutv1.WatchRequest) {
	for _, q := range req.GetAddQueries() {
		f.added++
		parsed, err := query.Parse(q.GetQuery(), nil)
		if err != nil {
			f.result(s, q.GetId(), &fakeQuery{error: err.Error()})
			continue
		}
		one := &fakeQuery{mapName: q.GetMap(), query: parsed, live: query.NewLive(parsed, q.GetMap(), 10_000), error: f.queryError}
		one.live.Reset(f.partition.rows(q.GetMap(), parsed, one.live))
		s.queries[q.GetId()] = one
		f.result(s, q.GetId(), one)
	}
	for _, id := range req.GetRefreshQueries() {
		f.refreshed++
		if one := s.queries[id]; one != nil {
			f.result(s, id, one)
		}
	}
	for _, id := range req.GetRemoveQueries() {
		delete(s.queries, id)
	}
	for _, name := range req.GetAddTopics() {
		s.topics[name] = true
	}
	for _, name := range req.GetRemoveTopics() {
		delete(s.topics, name)
	}
}

// rows returns the first rows of a query; a Live asks for them.
func (p *fakePartition) rows(name string, q *query.Query, live *query.Live) ([]query.Row, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	top := query.NewTop(q, live.After(), live.Want(), 0)
	for _, c := range p.selected(typesv1.Kind_KIND_LWW, name, nil) {
		if key := string(c.GetKey()); len(c.GetRecord().GetValue()) > 0 && q.Match(key, c.GetRecord().GetValue()) {
			top.Add(key, c.GetRecord().GetValue())
		}
	}
	return top.Rows()
}

// result sends a result as a whole; f.mu is held.
func (f *fakeFanout) result(s *fakeStream, id uint64, one *fakeQuery) {
	result := &fanoutv1.QueryResult{Id: id, Error: one.error}
	if one.error == "" {
		rows, more, next := one.live.Window()
		result.More, result.NextCursor = more, next
		for _, row := range rows {
			result.Rows = append(result.Rows, &typesv1.Row{Key: []byte(row.Key), Value: row.Value})
		}
		switch one.live.Status() {
		case query.CursorValid:
			result.CursorStatus = fanoutv1.CursorStatus_CURSOR_STATUS_VALID
		case query.CursorInvalid:
			result.CursorStatus = fanoutv1.CursorStatus_CURSOR_STATUS_INVALID
		}
	}
	s.out <- &fanoutv1.SubscribeResponse{Message: &fanoutv1.SubscribeResponse_QueryResult{QueryResult: result}}
}

// publishQueries brings the queries of a map up to date; f.mu is held.
func (f *fakeFanout) publishQueries(e *fanoutv1.Event) {
	for _, s := range f.streams {
		for id, one := range s.queries {
			if one.mapName != e.GetMap() || one.error != "" {
				continue
			}
			changes := &fanoutv1.QueryChanges{Id: id}
			for _, c := range e.GetChanges() {
				if k := c.GetKind(); k != typesv1.Kind_KIND_UNSPECIFIED && k != typesv1.Kind_KIND_LWW {
					continue
				}
				value := c.GetRecord().GetValue()
				if len(value) == 0 {
					value = nil
				}
				updates, _ := one.live.Apply(string(c.GetKey()), value)
				for _, u := range updates {
					changes.Changes = append(changes.Changes, &fanoutv1.QueryChange{
						Type: fanoutv1.QueryChangeType(u.Type), Row: &typesv1.Row{Key: []byte(u.Row.Key), Value: u.Row.Value},
					})
				}
			}
			if len(changes.Changes) > 0 {
				s.out <- &fanoutv1.SubscribeResponse{Message: &fanoutv1.SubscribeResponse_QueryChanges{QueryChanges: changes}}
			}
		}
	}
}

// reload reads the rows of every query anew, as after a gap.
func (f *fakeFanout) reload() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.streams {
		for _, one := range s.queries {
			one.live.Reset(f.partition.rows(one.mapName, one.query, one.live))
		}
	}
}

// watchError has the next Watch with queries fail.
func (f *fakeFanout) watchError(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.watchFails = err
}

// again sends the result of every query once more, as after a gap.
func (f *fakeFanout) again() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.streams {
		for id, one := range s.queries {
			f.result(s, id, one)
		}
	}
}

func (f *fakeFanout) Publish(ctx context.Context, req *fanoutv1.PublishRequest) (*fanoutv1.PublishResponse, error) {
	if f.beforePublish != nil {
		if err := f.beforePublish(ctx); err != nil {
			return nil, err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.streams {
		if s.topics[req.GetMessage().GetTopic()] {
			s.out <- &fanoutv1.SubscribeResponse{Message: &fanoutv1.SubscribeResponse_TopicMessage{TopicMessage: req.GetMessage()}}
		}
	}
	return &fanoutv1.PublishResponse{}, nil
}

// queries returns how many queries streams have, and how often one was added and
// refreshed.
func (f *fakeFanout) queries() (open, added, refreshed int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.streams {
		open += len(s.queries)
	}
	return open, f.added, f.refreshed
}

// awaitTopic blocks until some stream has the topic, or none does.
func (f *fakeFanout) awaitTopic(t testing.TB, name string, watched bool) {
	t.Helper()
	eventually(t, func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		got := false
		for _, s := range f.streams {
			got = got || s.topics[name]
		}
		return got == watched
	})
}

// fakePersistence has a journal and watermarks that tests move.
type fakePersistence struct {
	persistencev1connect.UnimplementedPersistenceServiceHandler

	// before runs ahead of every call, with the method's name; an error is the answer.
	before func(ctx context.Context, method string) error

	mu      sync.Mutex
	changed chan struct{} // closed and replaced when something below changes
	store   string
	stored  map[string]uint64 // by lane
	history string
	journal []*persistencev1.JournalEntry
	cuts    int // streams opened before the last cut end
	opened  map[string]int
	flushes int
}

func newFakePersistence() *fakePersistence {
	return &fakePersistence{
		changed: make(chan struct{}), store: "sqlite", history: "history-1",
		stored: map[string]uint64{}, opened: map[string]int{},
	}
}

func (p *fakePersistence) client() persistencev1connect.PersistenceServiceClient {
	server := connect.NewServer()
	persistencev1connect.RegisterPersistenceServiceHandler(server, p)
	return persistencev1connect.NewPersistenceServiceClient(connect.NewClient(connectinprocess.New(server)))
}

// change changes something that streams look at.
func (p *fakePersistence) change(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
	close(p.changed)
	p.changed = make(chan struct{})
}

// storedTo moves a watermark.
func (p *fakePersistence) storedTo(lane string, sequence uint64) {
	p.change(func() { p.stored[lane] = sequence })
}

// cut ends every open stream.
func (p *fakePersistence) cut() { p.change(func() { p.cuts++ }) }

// streams reports how often a stream of a method was opened.
func (p *fakePersistence) streams(method string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.opened[method]
}

func (p *fakePersistence) enter(ctx context.Context, method string) error {
	p.mu.Lock()
	p.opened[method]++
	p.mu.Unlock()
	if p.before != nil {
		return p.before(ctx, method)
	}
	return nil
}

// add appends changes to the journal.
func (p *fakePersistence) add(entries ...*persistencev1.JournalEntry) {
	p.change(func() { p.journal = append(p.journal, entries...) })
}

func (p *fakePersistence) Describe(ctx context.Context, _ *persistencev1.DescribeRequest) (*persistencev1.DescribeResponse, error) {
	if err := p.enter(ctx, "Describe"); err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return &persistencev1.DescribeResponse{Store: p.store}, nil
}

func (p *fakePersistence) Flush(ctx context.Context, _ *persistencev1.FlushRequest) (*persistencev1.FlushResponse, error) {
	if err := p.enter(ctx, "Flush"); err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.flushes++
	return &persistencev1.FlushResponse{}, nil
}

// follow calls send whenever something changed, until ctx ends or the stream is cut.
func (p *fakePersistence) follow(ctx context.Context, send func() error) error {
	p.mu.Lock()
	cuts := p.cuts
	for {
		changed := p.changed
		if p.cuts != cuts {
			p.mu.Unlock()
			return connect.NewError(connect.CodeUnavailable, "stream cut")
		}
		err := send() // with the lock held: the stream has room
		p.mu.Unlock()
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
		p.mu.Lock()
	}
}

func (p *fakePersistence) FollowWatermarks(ctx context.Context, _ *persistencev1.FollowWatermarksRequest,
	stream persistencev1connect.PersistenceServiceFollowWatermarksServerStream,
) error {
	if err := p.enter(ctx, "FollowWatermarks"); err != nil {
		return err
	}
	return p.follow(ctx, func() error {
		response := &persistencev1.FollowWatermarksResponse{}
		for lane, sequence := range p.stored {
			response.Watermarks = append(response.Watermarks, &persistencev1.Watermark{
				History: p.history, Lane: lane, Sequence: sequence,
			})
		}
		if n := len(p.journal); n > 0 { // it is stored, by a lane that no op is on
			response.Watermarks = append(response.Watermarks, &persistencev1.Watermark{
				History: p.history, Lane: "journal", Sequence: p.journal[n-1].GetSequence() >> commitShift,
			})
		}
		return stream.Send(response)
	})
}

func fakeWants(filter *persistencev1.JournalFilter, e *persistencev1.JournalEntry) bool {
	return (filter.GetMap() == "" || filter.GetMap() == e.GetChange().GetMap()) &&
		(len(filter.GetTypes()) == 0 || slices.Contains(filter.GetTypes(), e.GetType()))
}

func (p *fakePersistence) ReadJournal(ctx context.Context, req *persistencev1.ReadJournalRequest) (*persistencev1.ReadJournalResponse, error) {
	if err := p.enter(ctx, "ReadJournal"); err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	response := &persistencev1.ReadJournalResponse{}
	for _, e := range p.journal {
		if e.GetSequence() < req.GetFromSequence() || !fakeWants(req.GetFilter(), e) {
			continue
		}
		if len(response.Entries) == int(req.GetLimit()) {
			response.More = true
			break
		}
		response.Entries = append(response.Entries, e)
	}
	return response, nil
}

func (p *fakePersistence) FollowJournal(ctx context.Context, req *persistencev1.FollowJournalRequest,
	stream persistencev1connect.PersistenceServiceFollowJournalServerStream,
) error {
	if err := p.enter(ctx, "FollowJournal"); err != nil {
		return err
	}
	next, first := req.GetFromSequence(), true
	p.mu.Lock()
	beyond := len(p.journal) > 0 && next > p.journal[len(p.journal)-1].GetSequence()+1<<commitShift
	p.mu.Unlock()
	if beyond {
		return connect.NewError(connect.CodeOutOfRange, "the log was replaced")
	}
	return p.follow(ctx, func() error {
		if first {
			if first = false; next == 0 && len(p.journal) > 0 {
				next = p.journal[len(p.journal)-1].GetSequence() + 1
			}
			if err := stream.Send(&persistencev1.FollowJournalResponse{}); err != nil {
				return err
			}
		}
		for _, e := range p.journal {
			if e.GetSequence() < next || !fakeWants(req.GetFilter(), e) {
				continue
			}
			next = e.GetSequence() + 1
			if err := stream.Send(&persistencev1.FollowJournalResponse{Entries: []*persistencev1.JournalEntry{e}}); err != nil {
				return err
			}
		}
		return nil
	})
}
