package client

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// quick are the times of PROTOCOL; those that a test waits for are a hundred times
// shorter.
var quick = timing{
	ping:    50 * time.Millisecond,
	silence: 20 * time.Second,
	connect: 20 * time.Second,
	grace:   20 * time.Millisecond,
	request: 20 * time.Second,
}

func open(t *testing.T, url, node string, change ...func(*Config)) *Client {
	t.Helper()
	cfg := Config{
		URL: url, NodeID: node, RetryMin: time.Millisecond, RetryMax: 20 * time.Millisecond,
		PollInterval: 5 * time.Millisecond, timing: quick,
	}
	for _, f := range change {
		f(&cfg)
	}
	c, err := Open(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); {
		if time.Now().After(end) {
			t.Fatalf("not in time: %s", what)
		}
		time.Sleep(time.Millisecond) // between two looks
	}
}

func value(t *testing.T, v any) []byte {
	t.Helper()
	raw, err := EncodeValue(v)
	must(t, err)
	return raw
}

func record(t *testing.T, v any, millis uint64, node string) lwwmap.Record {
	t.Helper()
	return lwwmap.Record{Value: value(t, v), Timestamp: hlc.Timestamp{Millis: millis, NodeID: node}}
}

// frames collects what is on the wire, decoded.
type frames struct {
	mu       sync.Mutex
	sent     []wire.Message
	received []wire.Message
}

func (f *frames) record(fr Frame) {
	raw := slices.Clone(fr.Data)
	f.mu.Lock()
	defer f.mu.Unlock()
	if fr.Sent {
		if msg, err := wire.DecodeClient(raw, wire.DefaultLimits()); err == nil {
			f.sent = append(f.sent, msg)
		}
	} else if msg, err := wire.DecodeServer(raw); err == nil {
		f.received = append(f.received, msg)
	}
}

// countSent returns how many frames of a type went out.
func (f *frames) countSent(kind string) (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, m := range f.sent {
		if m.Type() == kind {
			n++
		}
	}
	return n
}

var transports = map[string]func(*testServer) string{
	"websocket": (*testServer).wsURL,
	"http":      func(s *testServer) string { return s.URL },
}

func TestTwoClientsConverge(t *testing.T) {
	for name, url := range transports {
		t.Run(name, func(t *testing.T) {
			s := newTestServer(t)
			a, b := open(t, url(s), "a"), open(t, url(s), "b")
			am, bm := a.Map("todos"), b.Map("todos")
			must(t, am.WaitSynced(within(t)))
			must(t, bm.WaitSynced(within(t)))
			must(t, am.Set("1", map[string]any{"title": "milk", "done": false}))
			eventually(t, "b sees a's write", func() bool { _, ok := bm.Get("1"); return ok })
			v, _ := bm.Get("1")
			if got := v.(map[string]any)["title"]; got != "milk" {
				t.Errorf("title is %v", got)
			}
			must(t, bm.Delete("1"))
			eventually(t, "a sees b's delete", func() bool { _, ok := am.Get("1"); return !ok })

			a.Offline()
			b.Offline()
			for i := range 100 {
				must(t, am.Set(fmt.Sprint(i), i))
				must(t, bm.Set(fmt.Sprint(i+50), -i))
			}
			a.Online()
			b.Online()
			must(t, a.Flush(within(t)))
			must(t, b.Flush(within(t)))
			eventually(t, "equal content", func() bool {
				d := s.digest("todos")
				return am.Digest() == d && bm.Digest() == d
			})
			if am.Root() != bm.Root() {
				t.Error("roots differ")
			}
			if a.Pending() != 0 || am.Len() != 150 {
				t.Errorf("pending %d, %d records", a.Pending(), am.Len())
			}
		})
	}
}

func TestWritesDoNotWaitAndArePendingWithoutServer(t *testing.T) {
	c := open(t, "ws://127.0.0.1:1/", "a", func(c *Config) { c.MaxPending = 3 })
	m := c.Map("m")
	for i := range 3 {
		must(t, m.Set("k", i))
	}
	if err := m.Set("k", 4); !errors.Is(err, ErrBacklog) {
		t.Errorf("write beyond the bound: %v", err)
	}
	if v, _ := m.Get("k"); v != int64(2) {
		t.Errorf("value is %v", v)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := c.Flush(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("flush: %v", err)
	}
	c.Close()
	if err := m.Set("k", 5); !errors.Is(err, ErrClosed) {
		t.Errorf("write after close: %v", err)
	}
}

func TestBadInputIsRefusedLocally(t *testing.T) {
	c := open(t, "ws://127.0.0.1:1/", "a")
	m := c.Map("m")
	if m != c.Map("m") {
		t.Error("the same name gives another map")
	}
	for what, err := range map[string]error{
		"nil value":     m.Set("k", nil),
		"empty key":     m.Set("", 1),
		"channel":       m.Set("k", make(chan int)),
		"large value":   m.Set("k", make([]byte, maxValue)),
		"negative ttl":  m.SetTTL("k", 1, -time.Second),
		"tiny ttl":      m.SetTTL("k", 1, time.Microsecond),
		"two values":    m.SetRaw("k", []byte{1, 2}),
		"bad map name":  c.Map("no spaces").Set("k", 1),
		"reserved name": c.Map("_topgun_x").Delete("k"),
		"unsynced":      c.Map("no spaces").WaitSynced(t.Context()),
	} {
		if err == nil {
			t.Errorf("%s is accepted", what)
		}
	}
	if c.Pending() != 0 {
		t.Errorf("%d operations logged", c.Pending())
	}
	for _, url := range []string{"", "host:1", "ftp://host", "ws://"} {
		if _, err := Open(t.Context(), Config{URL: url}); err == nil {
			t.Errorf("URL %q is accepted", url)
		}
	}
}

func TestValuesKeepTheirTypes(t *testing.T) {
	c := open(t, "ws://127.0.0.1:1/", "a")
	m := c.Map("m")
	for want, v := range map[any]any{int64(-3): -3, uint64(1 << 63): uint64(1 << 63), 1.5: 1.5, "s": "s", true: true} {
		must(t, m.Set("k", v))
		if got, ok := m.Get("k"); !ok || got != want {
			t.Errorf("%T %v comes back as %T %v", v, v, got, got)
		}
	}
	must(t, m.Set("k", struct {
		Title string `json:"title"`
		Tags  []string
	}{"milk", []string{"a"}}))
	v, ok := m.Get("k")
	if got := v.(map[string]any); !ok || got["title"] != "milk" || got["Tags"].([]any)[0] != "a" {
		t.Errorf("struct comes back as %v", v)
	}
}

func TestTTLHides(t *testing.T) {
	now := time.Now()
	var mu sync.Mutex
	c := open(t, "ws://127.0.0.1:1/", "a", func(c *Config) {
		c.Now = func() time.Time { mu.Lock(); defer mu.Unlock(); return now }
	})
	m := c.Map("m")
	must(t, m.SetTTL("k", 1, time.Second))
	if _, ok := m.Get("k"); !ok || m.Len() != 1 {
		t.Error("not visible before it expires")
	}
	mu.Lock()
	now = now.Add(1001 * time.Millisecond)
	mu.Unlock()
	if _, ok := m.Get("k"); ok || m.Len() != 0 {
		t.Error("visible after it expired")
	}
	for range m.All() {
		t.Error("All yields it")
	}
	if _, ok := m.Record("k"); !ok {
		t.Error("the record is gone; it is to be hashed and synced until the server removes it")
	}
}

// Operations are sent once per connection, and all pending ones again on the next.
func TestResendOnlyAfterReconnect(t *testing.T) {
	s := newTestServer(t)
	s.noAcks = true
	c := open(t, s.wsURL(), "a")
	m := c.Map("m")
	must(t, c.WaitReady(within(t)))
	for i := range 3 {
		must(t, m.Set(fmt.Sprint(i), i))
		eventually(t, "the server has the write", func() bool { _, ok := s.record("m", fmt.Sprint(i)); return ok })
	}
	ids := func() (ids []string) {
		s.locked(func() {
			for _, b := range s.batches {
				for _, op := range b {
					ids = append(ids, op.ID)
				}
			}
		})
		return ids
	}
	if got := ids(); !slices.Equal(got, []string{"1", "2", "3"}) {
		t.Errorf("sent %v", got)
	}
	s.locked(func() { s.noAcks = false })
	s.closeSessions()
	must(t, c.Flush(within(t)))
	if got := ids(); !slices.Equal(got, []string{"1", "2", "3", "1", "2", "3"}) {
		t.Errorf("sent %v", got)
	}
}

// An acknowledgement says nothing about operations that were not sent on its
// connection, and one that is no number says nothing at all (PROTOCOL 24.5).
func TestAckCoversOnlyWhatWasSent(t *testing.T) {
	s := newTestServer(t)
	c := open(t, s.wsURL(), "a")
	for _, ack := range []string{"99", "call-7", ""} {
		c.Offline()
		must(t, c.Map("m").Set("k", 1))
		c.acknowledge(ack, nil, 0)
		if c.Pending() == 0 {
			t.Errorf("lastId %q covers an operation that was never sent", ack)
		}
		c.Online()
		must(t, c.Flush(within(t)))
	}
}

func TestRejectedOpIsReportedAndUndone(t *testing.T) {
	for name, url := range transports {
		t.Run(name, func(t *testing.T) {
			s := newTestServer(t)
			s.reject = map[string]bool{"theirs": true}
			s.putQuietly("m", "theirs", record(t, "server", 1000, "other"))
			rejections := make(chan Rejection, 10)
			c := open(t, url(s), "a", func(c *Config) { c.OnReject = func(r Rejection) { rejections <- r } })
			m := c.Map("m")
			must(t, m.WaitSynced(within(t)))
			must(t, m.Set("mine", 1))
			must(t, m.Set("theirs", "client"))
			must(t, c.Flush(within(t)))
			select {
			case r := <-rejections:
				if r.OpID != 2 || r.Key != "theirs" || r.Map != "m" || r.Reason == "" {
					t.Errorf("rejection %+v", r)
				}
			case <-within(t).Done():
				t.Fatal("no rejection reported")
			}
			eventually(t, "the server's value is back", func() bool { v, _ := m.Get("theirs"); return v == "server" })
			if v, _ := m.Get("mine"); v != int64(1) {
				t.Errorf("the other op of the batch: %v", v)
			}
			if len(rejections) != 0 {
				t.Error("reported twice")
			}
		})
	}
}

// PROTOCOL 5.2 and 22.4: a write of ours from the future comes back with an
// earlier stamp and is adopted.
func TestRestampedWriteIsAdopted(t *testing.T) {
	for name, url := range transports {
		t.Run(name, func(t *testing.T) {
			s := newTestServer(t)
			s.restamp = true
			c := open(t, url(s), "a", func(c *Config) {
				c.Now = func() time.Time { return time.Now().Add(time.Hour) }
			})
			m := c.Map("m")
			must(t, m.WaitSynced(within(t)))
			must(t, m.Set("k", "v"))
			eventually(t, "the server's stamp is adopted", func() bool {
				r, _ := m.Record("k")
				return r.Timestamp.NodeID == "test-server"
			})
			eventually(t, "equal content", func() bool { return m.Digest() == s.digest("m") })
		})
	}
}

// The original client would adopt here, and differ from the server afterwards.
func TestEarlierWriteOfTheSameValueIsNotAdopted(t *testing.T) {
	s := newTestServer(t)
	c := open(t, s.wsURL(), "a")
	m := c.Map("m")
	must(t, m.WaitSynced(within(t)))
	must(t, m.Set("k", "v"))
	must(t, c.Flush(within(t)))
	mine, _ := m.Record("k")
	changes := m.Watch(within(t)) // what the sync would put right again shows here
	s.locked(func() {
		for session := range s.sessions {
			session.send(event("m", "k", record(t, "v", mine.Timestamp.Millis-1000, "b")))
			session.send(event("m", "after", record(t, "v", 1, "b")))
		}
	})
	for ch := range changes {
		if ch.Key == "after" {
			return
		}
		t.Errorf("%s went from %v back to %v", ch.Key, mine.Timestamp, ch.Record.Timestamp)
	}
}

func TestEventsInEveryForm(t *testing.T) {
	s := newTestServer(t)
	c := open(t, s.wsURL(), "a")
	m := c.Map("m")
	must(t, m.WaitSynced(within(t)))
	one, two, three := event("m", "1", record(t, 1, 1, "b")), event("m", "2", record(t, 2, 1, "b")), event("m", "3", record(t, 3, 1, "b"))
	s.locked(func() {
		for session := range s.sessions {
			session.send(one)
			session.send(&wire.Batch{Messages: []wire.Message{
				&wire.ServerBatchEvent{Events: []wire.Event{two.Event}}, three,
			}})
		}
	})
	eventually(t, "all events are merged", func() bool { return m.Len() == 3 })
}

func TestHeartbeat(t *testing.T) {
	s := newTestServer(t)
	var f frames
	c := open(t, s.wsURL(), "a", func(c *Config) {
		c.OnFrame = f.record
		c.timing.ping, c.timing.silence = 10*time.Millisecond, 100*time.Millisecond
	})
	must(t, c.WaitReady(within(t)))
	eventually(t, "pings", func() bool { return f.countSent("PING") >= 3 })
	s.locked(func() { s.mute = true })
	eventually(t, "the silent server is given up", func() bool {
		_, err := c.State()
		return errors.Is(err, ErrSilent)
	})
	s.locked(func() { s.mute = false })
	must(t, c.WaitReady(within(t)))
}

func TestSilentServerNeedsNoToken(t *testing.T) {
	s := newTestServer(t)
	s.mute = true
	c := open(t, s.wsURL(), "a")
	must(t, c.WaitReady(within(t)))
}

func TestToken(t *testing.T) {
	t.Run("right after a wrong one", func(t *testing.T) {
		for name, url := range transports {
			t.Run(name, func(t *testing.T) {
				s := newTestServer(t)
				s.token = "good"
				var mu sync.Mutex
				token, asked := "bad", 0
				c := open(t, url(s), "a", func(c *Config) {
					c.Token = func(context.Context) (string, error) {
						mu.Lock()
						defer mu.Unlock()
						asked++
						return token, nil
					}
				})
				eventually(t, "the refusal is reported", func() bool {
					_, err := c.State()
					return errors.Is(err, ErrAuthFailed)
				})
				mu.Lock()
				token = "good"
				mu.Unlock()
				must(t, c.Map("m").Set("k", 1))
				must(t, c.Flush(within(t)))
			})
		}
	})
	t.Run("missing", func(t *testing.T) {
		s := newTestServer(t)
		s.token = "good"
		c := open(t, s.wsURL(), "a")
		eventually(t, "parked", func() bool { state, _ := c.State(); return state == AuthRequired })
		must(t, c.Map("m").Set("k", 1))
		if _, ok := s.record("m", "k"); ok {
			t.Error("an operation went out before authentication")
		}
	})
	t.Run("wanted late", func(t *testing.T) {
		s := newTestServer(t)
		s.mute = true
		c := open(t, s.wsURL(), "a")
		must(t, c.WaitReady(within(t)))
		s.locked(func() {
			for session := range s.sessions {
				session.send(&wire.AuthRequired{})
			}
		})
		eventually(t, "the session ends", func() bool { _, err := c.State(); return errors.Is(err, errTokenWanted) })
	})
	t.Run("sent once", func(t *testing.T) {
		s := newTestServer(t)
		s.token = "good"
		var f frames
		c := open(t, s.wsURL(), "a", func(c *Config) {
			c.OnFrame = f.record
			c.Token = StaticToken("good")
		})
		must(t, c.Map("m").WaitSynced(within(t)))
		if n := f.countSent("AUTH"); n != 1 {
			t.Errorf("%d AUTH frames", n)
		}
	})
}

func TestWatch(t *testing.T) {
	s := newTestServer(t)
	c := open(t, s.wsURL(), "a")
	m := c.Map("m")
	must(t, m.WaitSynced(within(t)))
	ctx, cancel := context.WithCancel(within(t))
	defer cancel()
	changes := m.Watch(ctx)
	must(t, m.Set("a", 1))
	must(t, m.Set("b", 1))
	must(t, m.Set("a", 2)) // joins the first: nobody has looked yet
	must(t, c.Flush(ctx))
	s.put("m", "c", record(t, 3, 1, "b"))
	var got []string
	for ch := range changes {
		v, err := DecodeValue(ch.Record.Value)
		must(t, err)
		got = append(got, fmt.Sprintf("%s%v%v", ch.Key, v, ch.Local))
		if ch.Key == "c" {
			cancel()
		}
	}
	if want := []string{"a2true", "b1true", "c3false"}; !slices.Equal(got, want) {
		t.Errorf("changes %v; want %v", got, want)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(m.watchers) != 0 {
		t.Error("the watcher is left behind")
	}
}

func TestPollPagesAndQueries(t *testing.T) {
	s := newTestServer(t)
	s.pageSize = 7
	for i := range 50 {
		s.putQuietly("m", fmt.Sprintf("%02d", i), record(t, map[string]any{"n": i % 5}, 1000, "other"))
	}
	c := open(t, s.URL, "a", func(c *Config) { c.Maps = []string{"m"}; c.PollInterval = time.Hour })
	m := c.Map("m")
	must(t, m.WaitSynced(within(t)))
	if m.Digest() != s.digest("m") {
		t.Fatal("content differs after all pages")
	}
	res, err := c.Query(within(t), Query{Map: "m", Where: map[string]any{"n": 3}, Limit: 4})
	must(t, err)
	if len(res.Rows) != 4 || !res.HasMore || res.Cursor == "" || res.Rows[0].Key != "03" {
		t.Errorf("result %+v", res)
	}
	if _, err := open(t, s.wsURL(), "b").Query(within(t), Query{Map: "m"}); !errors.Is(err, ErrTransport) {
		t.Errorf("query over a WebSocket: %v", err)
	}
}

func TestPollGoesOnAfterFailures(t *testing.T) {
	s := newTestServer(t)
	s.status = 503
	c := open(t, s.URL, "a")
	must(t, c.Map("m").Set("k", 1))
	eventually(t, "the failure is reported", func() bool { _, err := c.State(); return err != nil })
	s.locked(func() { s.status, s.noAcks = 0, true })
	eventually(t, "a server that cannot take operations is no failure", func() bool { state, _ := c.State(); return state == Ready })
	if c.Pending() != 1 {
		t.Error("an operation without an answer is forgotten")
	}
	s.locked(func() { s.noAcks = false })
	must(t, c.Flush(within(t)))
}

func TestConcurrentUse(t *testing.T) {
	s := newTestServer(t)
	c := open(t, s.wsURL(), "a")
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			m := c.Map(fmt.Sprintf("m%d", w%2))
			for i := range 100 {
				if err := m.Set(fmt.Sprint(w, i), i); err != nil {
					t.Error(err)
				}
				m.Get("0 0")
				m.Len()
				m.Root()
			}
		})
	}
	wg.Go(func() {
		for range 5 {
			c.Offline()
			c.Online()
		}
	})
	wg.Wait()
	must(t, c.Flush(within(t)))
	for _, name := range []string{"m0", "m1"} {
		if c.Map(name).Digest() != s.digest(name) {
			t.Errorf("%s differs", name)
		}
	}
}
