package gateway

import (
	"context"
	"fmt"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/topgun-sync/topgun/core/wire"
	persistencev1 "github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

// entry makes an entry of the journal: the n-th commit's only change.
func entry(n uint64, mapName string, t persistencev1.JournalType, value []byte) *persistencev1.JournalEntry {
	return &persistencev1.JournalEntry{Sequence: n << commitShift, Type: t, Change: &typesv1.Change{
		Map: mapName, Key: fmt.Appendf(nil, "k%d", n),
		Record: &typesv1.Record{Value: value, Timestamp: &typesv1.Timestamp{Millis: n, NodeId: "client-a"}},
	}}
}

const (
	journalPut    = persistencev1.JournalType_JOURNAL_TYPE_PUT
	journalUpdate = persistencev1.JournalType_JOURNAL_TYPE_UPDATE
	journalRemove = persistencev1.JournalType_JOURNAL_TYPE_DELETE
)

// journaled is a bench with a journal of 5 entries.
func journaled(t *testing.T) *bench {
	return setup(t, nil, func(b *bench) {
		tagged := entry(5, "n", journalPut, packed("v"))
		tagged.Change.Tag = "tag"
		b.persistence.add(entry(1, "m", journalPut, packed("a")), entry(2, "n", journalPut, packed("b")),
			entry(3, "m", journalUpdate, packed("c")), entry(4, "m", journalRemove, nil), tagged)
	})
}

// PROTOCOL 16.1.
func TestJournalRead(t *testing.T) {
	b := journaled(t)
	p := b.hello(t)
	read := func(m *wire.JournalRead) *wire.JournalReadResponse {
		t.Helper()
		m.RequestID = "r"
		p.send(m)
		response := expect[*wire.JournalReadResponse](p)
		if response.RequestID != "r" {
			t.Errorf("%+v", response)
		}
		return response
	}
	all := read(&wire.JournalRead{})
	if len(all.Events) != 5 || all.HasMore || all.Error != "" {
		t.Fatalf("%+v", all)
	}
	e := all.Events[2]
	if e.Sequence != 3<<commitShift || e.Type != "UPDATE" || e.MapName != "m" || e.Key != "k3" || string(e.Value) != string(packed("c")) ||
		e.Timestamp.Millis != 3 || e.NodeID != "client-a" || e.Tag != "" {
		t.Errorf("%+v", e)
	}
	if e := all.Events[3]; e.Type != "DELETE" || len(e.Value) != 0 {
		t.Errorf("%+v", e)
	}
	if e := all.Events[4]; e.Tag != "tag" {
		t.Errorf("%+v", e)
	}
	if m := read(&wire.JournalRead{FromSequence: 2 << commitShift, Limit: 2}); len(m.Events) != 2 || !m.HasMore || m.Events[0].Key != "k2" {
		t.Errorf("%+v", m)
	}
	if m := read(&wire.JournalRead{MapName: "n"}); len(m.Events) != 2 || m.Events[0].Key != "k2" {
		t.Errorf("%+v", m)
	}
	if m := read(&wire.JournalRead{MapName: "$devices"}); !strings.HasPrefix(m.Error, "BAD_") || len(m.Events) != 0 {
		t.Errorf("%+v", m)
	}
	expect[*wire.ErrorMessage](p)
	p.ping()
}

// A response is bounded in bytes, whatever the limit, and goes on from there.
func TestJournalReadIsBounded(t *testing.T) {
	b := setup(t, nil, func(b *bench) {
		for i := range uint64(60) {
			b.persistence.add(entry(i+1, "m", journalPut, packed(strings.Repeat("x", 200<<10))))
		}
	})
	p := b.hello(t)
	got, from := 0, uint64(0)
	for more := true; more; {
		p.send(&wire.JournalRead{RequestID: "r", FromSequence: from, Limit: 1000})
		m := expect[*wire.JournalReadResponse](p)
		if len(m.Events) == 0 || len(m.Events) > 21 {
			t.Fatalf("%d events", len(m.Events))
		}
		got, more, from = got+len(m.Events), m.HasMore, m.Events[len(m.Events)-1].Sequence+1
	}
	if got != 60 {
		t.Errorf("%d events", got)
	}
}

// A read that fails is answered before its client gives up; one that fails at first is
// not noticed.
func TestJournalReadFails(t *testing.T) {
	for name, c := range map[string]struct {
		err   func(calls int) error
		fails bool
	}{
		"for good": {func(int) error { return connect.NewError(connect.CodeInternal, "broken") }, true},
		"at first": {func(calls int) error {
			if calls < 3 {
				return connect.NewError(connect.CodeUnavailable, "away")
			}
			return nil
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			calls := 0
			b := setup(t, nil, func(b *bench) {
				b.persistence.before = func(context.Context, string) error { calls++; return c.err(calls) }
			})
			p := b.hello(t)
			p.send(&wire.JournalRead{RequestID: "r"})
			m := expect[*wire.JournalReadResponse](p)
			if failed := m.Error != ""; failed != c.fails {
				t.Fatalf("%+v", m)
			}
			if c.fails {
				if e := expect[*wire.ErrorMessage](p); e.Code != 503 {
					t.Errorf("%+v", e)
				}
			}
		})
	}
}

// The client waits for 10 s.
func TestJournalReadInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &sockets{persistence: newFakePersistence().client()}
		p := newFakePersistence()
		p.before = func(ctx context.Context, _ string) error { <-ctx.Done(); return ctx.Err() }
		k.persistence = p.client()
		k.meters = &meters{}
		s := &session{k: k, ctx: t.Context()}
		s.room.L = &s.mu
		s.ended = true // no writer
		begin := time.Now()
		s.answerRead("r", &persistencev1.ReadJournalRequest{})
		if took := time.Since(begin); took != journalTimeout {
			t.Errorf("after %v", took)
		}
		if len(s.out.lanes[urgent]) != 2 {
			t.Errorf("%d frames", len(s.out.lanes[urgent]))
		}
	})
}

func (p *wsClient) journalEvents(n int) string {
	p.t.Helper()
	var keys []string
	for range n {
		keys = append(keys, expect[*wire.JournalEvent](p).Event.Key)
	}
	return strings.Join(keys, " ")
}

// following waits until the session's stream of the journal is open.
func (b *bench) following(t *testing.T, streams int) {
	t.Helper()
	eventually(t, func() bool {
		s := b.service.sockets.snapshot()[0]
		s.mu.Lock()
		defer s.mu.Unlock()
		if b.persistence.streams("FollowJournal") < streams || s.journal == nil {
			return false
		}
		for _, sub := range s.journal.subs {
			if sub.next == 0 {
				return false
			}
		}
		return true
	})
}

func TestJournalSubscribe(t *testing.T) {
	b := journaled(t)
	p := b.hello(t)
	p.send(&wire.JournalSubscribe{RequestID: "live"})
	b.following(t, 1)
	b.persistence.add(entry(6, "m", journalPut, packed("d")))
	if got := p.journalEvents(1); got != "k6" {
		t.Error(got)
	}
	// One that starts earlier gets what it asks for, the first event included; what all
	// want comes once.
	p.send(&wire.JournalSubscribe{RequestID: "old", HasFrom: true, FromSequence: 3 << commitShift, MapName: "m", Types: []string{"UPDATE", "PUT"}})
	if got := p.journalEvents(2); got != "k3 k6" {
		t.Error(got)
	}
	b.persistence.add(entry(7, "m", journalPut, packed("e")), entry(8, "n", journalRemove, nil))
	if got := p.journalEvents(2); got != "k7 k8" {
		t.Error(got)
	}
	// After persistence was away the stream goes on after the last event.
	b.persistence.cut()
	expect[*wire.ErrorMessage](p)
	b.persistence.add(entry(9, "m", journalPut, packed("f")))
	if got := p.journalEvents(1); got != "k9" {
		t.Error(got)
	}
	p.send(&wire.JournalUnsubscribe{SubscriptionID: "live"})
	p.send(&wire.JournalUnsubscribe{SubscriptionID: "none"})
	p.ping()
	b.persistence.add(entry(10, "n", journalPut, packed("x")), entry(11, "m", journalRemove, nil), entry(12, "m", journalPut, packed("y")))
	if got := p.journalEvents(1); got != "k12" {
		t.Error(got)
	}
	p.send(&wire.JournalUnsubscribe{SubscriptionID: "old"})
	p.ping()
	b.persistence.add(entry(13, "m", journalPut, packed("z")))
	p.ping()
	s := b.service.sockets.snapshot()[0]
	eventually(t, func() bool { s.mu.Lock(); defer s.mu.Unlock(); return !s.journal.running })
	p.ping()
}

// A subscription to what is logged from now on misses nothing, though its stream is lost
// before it brought anything.
func TestJournalLiveSurvivesALoss(t *testing.T) {
	b := journaled(t)
	p := b.hello(t)
	p.send(&wire.JournalSubscribe{RequestID: "live", MapName: "m"})
	b.following(t, 1)
	b.persistence.change(func() {
		b.persistence.cuts++
		b.persistence.journal = append(b.persistence.journal, entry(6, "m", journalPut, packed("d")))
	})
	expect[*wire.ErrorMessage](p)
	if got := p.journalEvents(1); got != "k6" {
		t.Error(got)
	}
	p.send(&wire.JournalSubscribe{RequestID: "all", HasFrom: true})
	if got := p.journalEvents(6); got != "k1 k2 k3 k4 k5 k6" {
		t.Error(got)
	}
	p.ping()
}

// A sequence of a log that was replaced is told of, and the new one is read from its
// beginning.
func TestJournalReplaced(t *testing.T) {
	b := journaled(t)
	p := b.hello(t)
	p.send(&wire.JournalSubscribe{RequestID: "old", HasFrom: true, FromSequence: 1000 << commitShift})
	if m := expect[*wire.ErrorMessage](p); m.Code != 410 {
		t.Errorf("%+v", m)
	}
	if got := p.journalEvents(5); got != "k1 k2 k3 k4 k5" {
		t.Error(got)
	}
	p.ping()
}

func TestJournalLimits(t *testing.T) {
	b := journaled(t)
	p := b.hello(t)
	for i := range maxJournals {
		p.send(&wire.JournalSubscribe{RequestID: fmt.Sprint("j", i), MapName: "none"})
	}
	p.send(&wire.JournalSubscribe{RequestID: "j0", MapName: "none"}) // one that it has
	p.ping()
	p.send(&wire.JournalSubscribe{RequestID: "more"})
	if m := expect[*wire.ErrorMessage](p); m.Code != 429 {
		t.Errorf("%+v", m)
	}
	p.send(&wire.JournalSubscribe{RequestID: "j1", MapName: "!locks"})
	if m := expect[*wire.ErrorMessage](p); m.Code != 400 {
		t.Errorf("%+v", m)
	}
	p.ping()
}

// A session that does not read holds its stream up, and gets every event when it does.
func TestJournalWaitsForTheReader(t *testing.T) {
	b := setup(t, func(c *Config) { c.WriteTimeout = time.Minute }, nil)
	p := b.hello(t)
	b.narrow(t, p)
	const n = 60
	for i := range uint64(n) {
		b.persistence.add(entry(i+1, "m", journalPut, packed(strings.Repeat("x", 10<<10))))
	}
	p.send(&wire.JournalSubscribe{RequestID: "j", HasFrom: true})
	s := b.service.sockets.snapshot()[0]
	eventually(t, func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.out.syncBytes > replyRoom-20<<10 })
	p.send(&wire.JournalSubscribe{RequestID: "none", MapName: "none", HasFrom: true, FromSequence: n << commitShift})
	_ = p.conn.(*net.TCPConn).SetReadBuffer(1 << 20) // faster from here on
	_ = s.conn.(*net.TCPConn).SetWriteBuffer(1 << 20)
	for i := range uint64(n) {
		if e := expect[*wire.JournalEvent](p).Event; e.Sequence != (i+1)<<commitShift {
			t.Fatalf("event %d: %+v", i, e.Sequence)
		}
	}
	p.ping()
}
