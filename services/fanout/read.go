package fanout

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/topgun-sync/topgun/core/query"

	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
)

// How the rows come. A map is read in rounds, one after the other: a round takes all
// evaluators that want to be read at its beginning. Few are read one by one: each
// partition scans for each of them and sends what matches. Many are read together:
// the whole map is read once, page by page, and each row is given to the evaluators
// whose query it may match. A page costs the partition a scan as a query does, and
// then the way of all its rows to this process. So a page is worth it that serves
// separateReads evaluators; when a map turns out to have more pages than that, its
// evaluators are read one by one after all.
//
// Rows that change while a round reads are noted; before a result is put in place it
// gets those that the read does not cover. So a result is never behind the events
// that were handled, and an evaluator that is read again goes on meanwhile.
const (
	separateReads = 16
	pageRows      = 100_000
	pageBytes     = 16 << 20

	// minPause and maxPause bound the pause after a round that did not work.
	minPause = 50 * time.Millisecond
	maxPause = 2 * time.Second

	// lateBytes bounds what is noted while a round reads, lateOverhead is what a row
	// takes of it beside key and value. When it is too much the round begins again.
	lateBytes    = 256 << 20
	lateOverhead = 128

	// diffRows is up to how many changes of a window are sent as such after it was
	// read again. Beyond, the whole result is.
	diffRows = 1000
)

var (
	errStale   = errors.New("the partitions answered with an older state than is known")
	errTooLate = errors.New("too much changed while the map was read")
	// errManyPages says that a map is too large to be read for so few evaluators.
	errManyPages = errors.New("the map has too many pages")
	errEnded     = errors.New("no query of the map is left")
)

// readPlan says how many evaluators are read one by one, and how many rows a page
// has; tests with little data have smaller ones.
type readPlan struct {
	separate int
	pageRows uint32
}

// round is one reading of a map.
type round struct {
	readings []*reading
	// index has the evaluators when they are many, else it is nil.
	index *index
	// began is, by shard, the newest arrival handled before it began.
	began map[uint32]arrival
	// late are the rows that changed since, at the state handled last.
	late      map[string]rowChange
	lateBytes int
	// lost says that events were lost since.
	lost bool
}

// reading is what a round brings to one evaluator.
type reading struct {
	evaluator *evaluator
	query     *query.Query
	live      *query.Live
	covered   *coverage
	// top collects rows of a scan; nil before the first.
	top     *query.Top
	failure string
	refill  bool
}

// note takes notice of a row that changed.
func (r *round) note(row rowChange) {
	if r.late == nil {
		r.late = make(map[string]rowChange)
	}
	if r.lateBytes > lateBytes {
		return // install sees it
	}
	if old, ok := r.late[row.key]; ok {
		r.lateBytes -= len(old.value)
	} else {
		r.lateBytes += len(row.key) + lateOverhead
	}
	r.lateBytes += len(row.value)
	r.late[row.key] = row
}

// read makes a round. While evaluators want another one, the map lines up again
// behind the others that wait to be read.
func (m *liveMap) read(ctx context.Context) {
	if r := m.begin(); r != nil {
		err := m.fill(ctx, r)
		if err == nil {
			err = m.install(r)
		}
		if err == nil {
			m.pause = 0
		} else {
			m.abandon(r)
			if !m.await(ctx, err) {
				return // nobody needs another reader
			}
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reading = false
	m.startReading()
}

// await pauses the reader after a round that did not work. It returns false when the
// map or the service has ended.
func (m *liveMap) await(ctx context.Context, err error) bool {
	m.service.partitions.mistrust()
	m.service.meters.readsFailed.Add(ctx, 1)
	if m.pause == 0 {
		m.service.logger.Info("live queries not read; trying again", "error", err)
	}
	m.pause = min(max(2*m.pause, minPause), maxPause)
	select {
	case <-time.After(m.pause):
		return true
	case <-m.ended:
	case <-ctx.Done():
	}
	return false
}

// begin starts a round, or returns nil if nobody is left who wants one.
func (m *liveMap) begin() *round {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := &round{began: maps.Clone(m.seen)}
	for _, e := range m.wanted {
		e.wanted = false
		if m.evaluators[e.canonical] == e {
			r.readings = append(r.readings, &reading{
				evaluator: e,
				query:     e.query,
				live:      query.NewLive(e.query, m.name, m.service.config.MaxQueryRows),
			})
		}
	}
	m.wanted = nil
	if len(r.readings) == 0 {
		return nil
	}
	m.round = r
	return r
}

// abandon ends a round that did not work.
func (m *liveMap) abandon(r *round) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.round = nil
	for _, reading := range r.readings {
		m.want(reading.evaluator)
	}
}

// fill reads what a round wants.
func (m *liveMap) fill(ctx context.Context, r *round) error {
	ctx, cancel := context.WithCancel(ctx)
	var watcher sync.WaitGroup
	defer watcher.Wait()
	defer cancel()
	watcher.Go(func() {
		select {
		case <-m.ended:
			cancel()
		case <-ctx.Done():
		}
	})
	if err := m.service.confirm(ctx, m); err != nil {
		return err
	}
	t, err := m.service.partitions.ask(ctx)
	if err != nil {
		return err
	}
	if err := m.lookForOR(ctx, t, r); err != nil {
		return err
	}
	if len(r.readings) > m.service.plan.separate {
		if err := m.scan(ctx, t, r); !errors.Is(err, errManyPages) {
			return err
		}
	}
	errs := make([]error, len(r.readings))
	var wg sync.WaitGroup
	for n, reading := range r.readings {
		wg.Go(func() { errs[n] = m.readOne(ctx, t, reading) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// confirm returns when the broker has the subscription of the map.
func (s *Service) confirm(ctx context.Context, m *liveMap) error {
	s.mu.Lock()
	w := s.maps[m.name]
	if w == nil || w.live != m {
		s.mu.Unlock()
		return errEnded
	}
	confirmed := w.confirmed
	s.mu.Unlock()
	if confirmed {
		return nil
	}
	if err := s.bus.Flush(ctx); err != nil {
		return fmt.Errorf("%w: %w", errBus, err)
	}
	s.mu.Lock()
	w.confirmed = true
	s.mu.Unlock()
	return nil
}

// lookForOR finds out whether there is an OR-map to reckon with.
func (m *liveMap) lookForOR(ctx context.Context, t *topology, r *round) error {
	m.mu.Lock()
	or := m.or
	m.mu.Unlock()
	if or != orUnknown {
		return nil
	}
	used, err := m.service.partitions.hasOR(ctx, t, m.name)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case used:
		m.or = orUsed
	case m.or == orUnknown && !r.lost:
		m.or = orEmpty
	}
	return nil
}

// readOne reads the rows of one evaluator from every node.
func (m *liveMap) readOne(ctx context.Context, t *topology, r *reading) error {
	want, after := r.live.Want(), r.live.After()
	top := query.NewTop(r.query, after, want, m.service.config.MaxQueryBytes)
	covered := &coverage{upTo: make([]arrival, len(t.owner))}
	// A node that sent fewer rows than it has, because of their bytes, says nothing of
	// the rows behind its last one.
	var ends []query.Row
	others := false
	for _, n := range t.nodes {
		resp, err := m.service.partitions.query(ctx, n, &partitionv1.QueryRequest{
			Map: m.name, Query: r.query.Encode(), After: after, Limit: uint32(want),
			MaxBytes: uint32(m.service.config.MaxQueryBytes), Ungrouped: r.query.Grouped(),
		})
		switch {
		case connect.CodeOf(err) == connect.CodeInvalidArgument:
			r.failure = refusedBelow
			return nil
		case m.service.partitions.tooSlow(ctx, n, err):
			// Another try would be as slow, and the round's other readings fail with it.
			r.failure = slowQuery
			return nil
		case err != nil:
			return fmt.Errorf("read a query: %w", err)
		}
		m.service.meters.reads.Add(ctx, 1)
		m.service.meters.readRows.Add(ctx, int64(len(resp.GetRows())))
		if err := cover(covered.upTo, n, resp); err != nil {
			return err
		}
		for _, row := range resp.GetRows() {
			top.Add(string(row.GetKey()), row.GetValue())
		}
		others = others || resp.GetMore()
		if rows := resp.GetRows(); resp.GetMore() && len(rows) < want && len(rows) > 0 {
			last := rows[len(rows)-1]
			ends = append(ends, query.Row{Key: string(last.GetKey()), Value: last.GetValue()})
		}
	}
	rows, more := top.Rows()
	for _, end := range ends {
		for len(rows) > 0 && r.query.Compare(rows[len(rows)-1], end) > 0 {
			rows = rows[:len(rows)-1]
		}
	}
	r.put(rows, more || others, covered, want)
	return nil
}

// put sets the rows of a reading. Where bytes left out rows that the window needs,
// the query takes too much.
func (r *reading) put(rows []query.Row, more bool, covered *coverage, want int) {
	window := want
	if limit := r.query.Limit(); limit > 0 && !r.query.Grouped() {
		window = min(want, r.query.Offset()+limit)
	}
	if more && len(rows) < window {
		r.failure = tooLarge
		return
	}
	r.live.Reset(rows, more)
	r.covered = covered
}

// cover takes over what an answer covers: every shard that was asked for.
func cover(upTo []arrival, n node, resp *partitionv1.QueryResponse) error {
	missing := len(n.shards)
	for _, c := range resp.GetCovered() {
		if int(c.GetShard()) >= len(upTo) {
			return errIncomplete
		}
		upTo[c.GetShard()] = arrivalOf(c.GetCovered())
		missing--
	}
	if missing != 0 {
		return errIncomplete
	}
	return nil
}

// scan reads the whole map once for all evaluators of a round.
func (m *liveMap) scan(ctx context.Context, t *topology, r *round) error {
	everything := m.service.partitions.everything
	covered := &coverage{upTo: make([]arrival, len(t.owner)), order: everything}
	r.index = &index{}
	readings := make(map[*evaluator]*reading, len(r.readings))
	for _, reading := range r.readings {
		readings[reading.evaluator] = reading
		r.index.add(reading.evaluator)
	}
	// The rows are kept once, however many queries have them.
	kept := 0
	var candidates []*evaluator
	for _, n := range t.nodes {
		shards := make([]bool, len(t.owner))
		for _, shard := range n.shards {
			shards[shard] = true
		}
		var after []byte
		for {
			resp, err := m.service.partitions.query(ctx, n, &partitionv1.QueryRequest{
				Map: m.name, After: after, Limit: m.service.plan.pageRows, MaxBytes: pageBytes,
			})
			if err != nil {
				return fmt.Errorf("scan a map: %w", err)
			}
			m.service.meters.reads.Add(ctx, 1)
			m.service.meters.readRows.Add(ctx, int64(len(resp.GetRows())))
			p := page{shards: shards, last: !resp.GetMore(), upTo: make([]arrival, len(t.owner))}
			if err := cover(p.upTo, n, resp); err != nil {
				return err
			}
			for _, row := range resp.GetRows() {
				key, value := string(row.GetKey()), row.GetValue()
				matched := false
				candidates = r.index.candidates(candidates[:0], value)
				for _, e := range candidates {
					if !e.query.Match(key, value) {
						continue
					}
					matched = true
					reading := readings[e]
					if reading.top == nil {
						reading.top = query.NewTop(e.query, reading.live.After(), reading.live.Want(), m.service.config.MaxQueryBytes)
					}
					reading.top.Add(key, value)
				}
				if matched {
					kept += len(key) + len(value)
				}
				p.through = key
			}
			if kept > m.service.config.MaxQueriesBytes {
				for _, reading := range r.readings {
					reading.failure = tooLarge
				}
				return nil
			}
			for _, shard := range n.shards {
				covered.upTo[shard] = p.upTo[shard]
			}
			covered.pages = append(covered.pages, p)
			if p.last {
				break
			}
			if len(resp.GetRows()) == 0 {
				return fmt.Errorf("scan a map: %w", errIncomplete)
			}
			last := resp.GetRows()[len(resp.GetRows())-1]
			if len(covered.pages) >= max(1, len(r.readings)/m.service.plan.separate) {
				for _, reading := range r.readings {
					reading.top = nil
				}
				return errManyPages
			}
			after = everything.Position(query.Row{Key: string(last.GetKey()), Value: last.GetValue()})
		}
	}
	if len(covered.pages) == len(t.nodes) {
		covered.pages = nil
	}
	for _, reading := range r.readings {
		var rows []query.Row
		more := false
		if reading.top != nil {
			rows, more = reading.top.Rows()
			reading.top = nil
		}
		reading.put(rows, more, covered, reading.live.Want())
	}
	return nil
}

// install puts the results of a round in place.
func (m *liveMap) install(r *round) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r.lateBytes > lateBytes {
		return errTooLate
	}
	var checked *coverage
	for _, reading := range r.readings {
		if reading.covered == nil || reading.covered == checked {
			continue
		}
		checked = reading.covered
		least := checked.least()
		for shard, at := range r.began {
			if int(shard) >= len(least) || at.after(least[shard]) {
				return errStale
			}
		}
	}
	m.round = nil
	m.catchUp(r)
	for _, reading := range r.readings {
		if e := reading.evaluator; m.evaluators[e.canonical] == e {
			m.replace(e, reading)
		}
	}
	return nil
}

// catchUp gives the results of a round the rows that changed while it read.
func (m *liveMap) catchUp(r *round) {
	if len(r.late) == 0 {
		return
	}
	offer := func(reading *reading, row rowChange) {
		if reading.failure != "" || reading.covered.has(row.shard, row.key, row.at) {
			return
		}
		_, refill := reading.live.Apply(row.key, row.value)
		reading.refill = reading.refill || refill
	}
	if r.index == nil {
		for _, row := range r.late {
			for _, reading := range r.readings {
				offer(reading, row)
			}
		}
		return
	}
	readings := make(map[*evaluator]*reading, len(r.readings))
	for _, reading := range r.readings {
		readings[reading.evaluator] = reading
		var held []rowChange
		for key := range reading.live.Keys() {
			if row, ok := r.late[key]; ok {
				held = append(held, row)
			}
		}
		for _, row := range held {
			offer(reading, row)
		}
	}
	var candidates []*evaluator
	for _, row := range r.late {
		candidates = r.index.candidates(candidates[:0], row.value)
		for _, e := range candidates {
			offer(readings[e], row)
		}
	}
}

// replace gives an evaluator what was read for it, and the streams what that
// changes.
func (m *liveMap) replace(e *evaluator, r *reading) {
	if r.failure != "" {
		m.fail(e, r.failure)
		return
	}
	old := e.live
	e.live, e.covered = r.live, r.covered
	if m.covered != nil && m.covered.equal(e.covered) {
		e.covered = m.covered
	}
	m.covered = e.covered
	m.count(e)
	if reason := m.excess(e); reason != "" {
		m.fail(e, reason)
		return
	}
	if e.place.indexed() {
		for key := range e.live.Keys() {
			if old == nil || !old.Holds(key) {
				m.holders.add(key, e)
			}
		}
	}
	if r.refill {
		m.want(e)
	}
	if old == nil {
		for _, q := range e.subs {
			q.stream.ready(q)
		}
		return
	}
	updates, ok := differences(old, e.live)
	if !ok {
		for _, q := range e.subs {
			q.stream.refresh(q)
		}
		return
	}
	m.publish(e, updates)
}

// differences are the changes from one window to another; false if they are so many
// that the whole is shorter.
func differences(old, fresh *query.Live) (updates []query.Update, ok bool) {
	was, _, _ := old.Window()
	is, _, _ := fresh.Window()
	values := make(map[string][]byte, len(was))
	for _, row := range was {
		values[row.Key] = row.Value
	}
	var entered []query.Update
	for _, row := range is {
		value, there := values[row.Key]
		delete(values, row.Key)
		switch {
		case !there:
			entered = append(entered, query.Update{Type: query.ChangeEnter, Row: row})
		case !bytes.Equal(value, row.Value):
			entered = append(entered, query.Update{Type: query.ChangeUpdate, Row: row})
		}
	}
	for _, row := range was {
		if _, left := values[row.Key]; left {
			updates = append(updates, query.Update{Type: query.ChangeLeave, Row: query.Row{Key: row.Key}})
		}
	}
	updates = append(updates, entered...)
	return updates, len(updates) <= diffRows
}
