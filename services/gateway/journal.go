package gateway

import (
	"context"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/topgun-sync/topgun/core/wire"
	persistencev1 "github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1"
)

const (
	// maxJournals bounds the journal subscriptions of a session, and maxJournalReads its
	// reads that are being answered.
	maxJournals     = 16
	maxJournalReads = 16
	// journalTimeout is below the 10 s after which a client gives a read up.
	journalTimeout = 8 * time.Second
	// defaultJournalLimit, maxJournalLimit and maxJournalBytes bound what a read returns.
	defaultJournalLimit = 100
	maxJournalLimit     = 1000
	maxJournalBytes     = 4 << 20
	// commitShift is how a journal sequence is made: the sequence of the commit in the
	// log, and the number of the change within it below this many bits.
	commitShift = 20
)

var (
	journalUnavailable = &wire.Error{Name: "UNAVAILABLE", Code: 503, Text: "the journal cannot be read now; ask again"}
	tooManyReads       = &wire.Error{Name: "TOO_MANY_READS", Code: 429, Text: "as many reads of the journal are being answered as may be; ask again"}
	tooManyJournals    = &wire.Error{Name: "TOO_MANY_SUBS", Code: 429, Text: "this connection has as many journal subscriptions as it may; end some"}
)

var journalTypes = [...]string{
	persistencev1.JournalType_JOURNAL_TYPE_PUT:    "PUT",
	persistencev1.JournalType_JOURNAL_TYPE_UPDATE: "UPDATE",
	persistencev1.JournalType_JOURNAL_TYPE_DELETE: "DELETE",
}

func journalEntry(e *persistencev1.JournalEntry) wire.JournalEntry {
	c := e.GetChange()
	record := recordFromProto(c.GetRecord())
	entry := wire.JournalEntry{
		Sequence: e.GetSequence(), MapName: c.GetMap(), Key: string(c.GetKey()), Value: record.Value,
		Timestamp: record.Timestamp, NodeID: record.Timestamp.NodeID, Tag: c.GetTag(),
	}
	if t := e.GetType(); t > 0 && int(t) < len(journalTypes) {
		entry.Type = journalTypes[t]
	}
	return entry
}

// journalRead takes a JOURNAL_READ (PROTOCOL 16.1).
func (s *session) journalRead(m *wire.JournalRead) {
	id := strings.Clone(m.RequestID)
	refused := m.Err
	if refused == nil && m.MapName != "" {
		refused = wire.CheckMapName(m.MapName)
	}
	if refused != nil {
		s.refuseRead(id, refused)
		return
	}
	limit := uint64(defaultJournalLimit)
	if m.Limit > 0 {
		limit = min(m.Limit, maxJournalLimit)
	}
	request := &persistencev1.ReadJournalRequest{
		FromSequence: m.FromSequence, Limit: uint32(limit),
		Filter: &persistencev1.JournalFilter{Map: strings.Clone(m.MapName)},
	}
	s.mu.Lock()
	full := s.journalReads >= maxJournalReads
	if !full && s.spawnLocked(func() { s.answerRead(id, request) }) {
		s.journalReads++
	}
	s.mu.Unlock()
	if full {
		s.refuseRead(id, tooManyReads)
	}
}

func (s *session) refuseRead(requestID string, err *wire.Error) {
	s.send(urgent, &wire.JournalReadResponse{RequestID: requestID, Error: err.Error()})
	s.send(urgent, &wire.ErrorMessage{Code: err.Code, Message: err.Error()})
}

// answerRead reads the journal and answers, in time for the client to hear of a failure.
func (s *session) answerRead(id string, request *persistencev1.ReadJournalRequest) {
	defer func() {
		s.mu.Lock()
		s.journalReads--
		s.mu.Unlock()
	}()
	ctx, cancel := context.WithTimeout(s.ctx, journalTimeout)
	defer cancel()
	var page *persistencev1.ReadJournalResponse
	var err error
	for retry := firstRetry; ; retry = min(2*retry, time.Second) {
		page, err = s.k.persistence.ReadJournal(ctx, request)
		if err == nil || !worthRetrying(err) || !pause(ctx, retry) {
			break
		}
	}
	if err != nil {
		if s.ctx.Err() == nil {
			s.refuseRead(id, journalUnavailable)
		}
		return
	}
	response := &wire.JournalReadResponse{RequestID: id, HasMore: page.GetMore()}
	size := 0
	for _, e := range page.GetEntries() {
		size += len(e.GetChange().GetKey()) + len(e.GetChange().GetRecord().GetValue())
		if len(response.Events) > 0 && size > maxJournalBytes {
			response.HasMore = true
			break
		}
		response.Events = append(response.Events, journalEntry(e))
	}
	s.sendSync(response)
}

// journal is the journal subscriptions of one session. The session's mu guards it.
//
// A client gives every JOURNAL_EVENT to each of its subscriptions, so all of them are
// served by one stream, from the lowest start on, with every event once that one of them
// asks for. Only a subscription that starts before what others have seen makes events
// come again, as far as it asks for them. The stream waits for room in the session's
// queue, and goes on after its last event when persistence was away.
type journal struct {
	subs map[string]*journalSub
	// version counts the changes of subs that the stream must begin anew for, and restart
	// ends the stream under way.
	version int
	restart context.CancelFunc
	running bool // the following goroutine; it ends when there are no subscriptions
}

// journalSub is one subscription.
type journalSub struct {
	mapName string   // empty: every map
	types   []string // empty: all
	next    uint64   // the first sequence that it has not seen; 0: what is logged from now on
}

func (sub *journalSub) wants(e *wire.JournalEntry) bool {
	return e.Sequence >= sub.next && (sub.mapName == "" || sub.mapName == e.MapName) &&
		(len(sub.types) == 0 || slices.Contains(sub.types, e.Type))
}

// journalSubscribed takes a JOURNAL_SUBSCRIBE, which has no answer of its own.
func (s *session) journalSubscribed(m *wire.JournalSubscribe) error {
	if m.Err != nil {
		return s.decline(m.Err)
	}
	if m.MapName != "" {
		if err := wire.CheckMapName(m.MapName); err != nil {
			return s.refuse(err)
		}
	}
	sub := &journalSub{mapName: strings.Clone(m.MapName), types: slices.Clone(m.Types)}
	if m.HasFrom {
		sub.next = max(m.FromSequence, 1)
	}
	if !s.addJournal(strings.Clone(m.RequestID), sub) {
		return s.decline(tooManyJournals)
	}
	return nil
}

func (s *session) addJournal(id string, sub *journalSub) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.journal == nil {
		s.journal = &journal{subs: make(map[string]*journalSub)}
	}
	j := s.journal
	if _, known := j.subs[id]; !known && len(j.subs) >= maxJournals {
		return false
	}
	if sub.next == 0 {
		for _, other := range j.subs { // all are where the stream is
			sub.next = max(sub.next, other.next)
		}
	}
	j.subs[id] = sub
	j.version++
	if j.restart != nil {
		j.restart()
	}
	if !j.running && s.spawnLocked(s.followJournal) {
		j.running = true
	}
	return true
}

// journalUnsubscribed takes a JOURNAL_UNSUBSCRIBE.
func (s *session) journalUnsubscribed(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	j := s.journal
	if j == nil || j.subs[id] == nil {
		return
	}
	// The stream may bring more than the others want; what nobody wants is not sent.
	if delete(j.subs, id); len(j.subs) == 0 && j.restart != nil {
		j.version++
		j.restart()
	}
}

// planLocked returns what the next stream is to bring; s.mu is held.
func (j *journal) planLocked() *persistencev1.FollowJournalRequest {
	request := &persistencev1.FollowJournalRequest{Filter: &persistencev1.JournalFilter{}}
	first, everyType := true, false
	for _, sub := range j.subs {
		if sub.next != 0 && (request.FromSequence == 0 || sub.next < request.FromSequence) {
			request.FromSequence = sub.next
		}
		if first {
			request.Filter.Map = sub.mapName
		} else if request.Filter.GetMap() != sub.mapName {
			request.Filter.Map = ""
		}
		first = false
		everyType = everyType || len(sub.types) == 0
		for t, name := range journalTypes {
			if t := persistencev1.JournalType(t); name != "" && slices.Contains(sub.types, name) && !slices.Contains(request.Filter.Types, t) {
				request.Filter.Types = append(request.Filter.Types, t)
			}
		}
	}
	if everyType {
		request.Filter.Types = nil
	}
	return request
}

// followJournal keeps the session's stream until it has no subscriptions or ends.
func (s *session) followJournal() {
	retry := firstRetry
	told := false // of the present trouble
	for {
		s.mu.Lock()
		j := s.journal
		if len(j.subs) == 0 || s.ended || s.closing != nil {
			j.running, j.restart = false, nil
			s.mu.Unlock()
			return
		}
		ctx, cancel := context.WithCancel(s.ctx)
		j.restart = cancel
		version, request := j.version, j.planLocked()
		s.mu.Unlock()
		opened, err := s.readStream(ctx, version, request)
		cancel()
		if opened {
			retry, told = firstRetry, false
		}
		s.mu.Lock()
		changed := j.version != version
		s.mu.Unlock()
		if changed || s.ctx.Err() != nil {
			continue
		}
		if connect.CodeOf(err) == connect.CodeOutOfRange {
			s.rewind(version)
			s.send(urgent, &wire.ErrorMessage{Code: 410, Message: "JOURNAL_REPLACED: the journal ends before the sequence asked for, " +
				"as the log was replaced; its events follow from the beginning"})
			continue
		}
		if !told {
			told = true
			s.k.log.Warn("journal stream lost", "session", s.id, "error", err)
			s.send(urgent, &wire.ErrorMessage{
				Code: 503, Message: "UNAVAILABLE: the journal cannot be read now; its events follow when it can",
			})
		}
		pause(s.ctx, retry)
		retry = min(2*retry, maxRetry)
	}
}

// readStream opens a stream and hands on its events until it ends.
func (s *session) readStream(ctx context.Context, version int, request *persistencev1.FollowJournalRequest) (opened bool, err error) {
	// A stream of what is logged from now on does not say where that is. Should it end
	// before it brought anything, the next one begins after what is stored already: it may
	// bring what was logged shortly before, and misses nothing.
	var resume uint64
	if request.GetFromSequence() == 0 {
		stored, err := s.k.storedSequence(ctx)
		if err != nil {
			return false, err
		}
		resume = (stored + 1) << commitShift
	}
	stream, err := s.k.persistence.FollowJournal(ctx, request)
	if err != nil {
		return false, err
	}
	defer func() { _ = stream.Close() }() // it has ended, or its context has
	for {
		message, err := stream.Receive()
		if err != nil {
			return opened, err
		}
		if !opened {
			opened = true
			s.positioned(version, resume)
		}
		for _, e := range message.GetEntries() {
			entry := journalEntry(e)
			wanted, current := s.wanted(version, &entry)
			if !current {
				return opened, ctx.Err()
			}
			if wanted {
				s.sendSync(&wire.JournalEvent{Event: entry})
			}
		}
	}
}

// storedSequence returns the stream sequence of the newest commit that is stored.
func (k *sockets) storedSequence(ctx context.Context) (newest uint64, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := k.persistence.FollowWatermarks(ctx, &persistencev1.FollowWatermarksRequest{})
	if err != nil {
		return 0, err
	}
	defer func() { _ = stream.Close() }() // its first message is all that is wanted
	all, err := stream.Receive()
	if err != nil {
		return 0, err
	}
	for _, mark := range all.GetWatermarks() {
		newest = max(newest, mark.GetSequence())
	}
	return newest, nil
}

// positioned notes where the subscriptions without a start begin, as the stream for a
// version of them is open.
func (s *session) positioned(version int, resume uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.journal.version != version {
		return
	}
	for _, sub := range s.journal.subs {
		if sub.next == 0 {
			sub.next = resume
		}
	}
}

// rewind has the subscriptions begin anew.
func (s *session) rewind(version int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.journal.version != version {
		return
	}
	for _, sub := range s.journal.subs {
		sub.next = 1
	}
}

// wanted reports whether some subscription wants an event, and notes that all have seen
// it; current is false if the stream is not that of the subscriptions any more.
func (s *session) wanted(version int, e *wire.JournalEntry) (wanted, current bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.journal.version != version {
		return false, false
	}
	for _, sub := range s.journal.subs {
		wanted = wanted || sub.wants(e)
		sub.next = max(sub.next, e.Sequence+1)
	}
	return wanted, true
}
