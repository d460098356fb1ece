package gateway

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/wire"
)

// narrow makes the buffers of a connection small at both ends, so that a client that
// does not read is noticed after little.
func (b *bench) narrow(t testing.TB, p *wsClient) *session {
	t.Helper()
	for _, s := range b.service.sockets.snapshot() {
		if s.conn.RemoteAddr().String() == p.conn.LocalAddr().String() {
			if err := errors.Join(s.conn.(*net.TCPConn).SetWriteBuffer(8<<10), p.conn.(*net.TCPConn).SetReadBuffer(8<<10)); err != nil {
				t.Fatal(err)
			}
			return s
		}
	}
	t.Fatal("no such session")
	return nil
}

// FAN-02: a client that reads too slowly for the changes of its map gets a fresh root
// in their place when it reads on, and converges. Nobody else notices.
func TestSlowReaderGetsARoot(t *testing.T) {
	b := setup(t, func(c *Config) { c.QueueBytes = 64 << 10; c.WriteTimeout = time.Minute }, nil)
	slow, other := b.hello(t), b.hello(t)
	s := b.narrow(t, slow)
	slow.synced("m", 0)
	slow.synced("calm", 0)
	other.synced("m", 0)
	value := packed(strings.Repeat("x", 4000))
	want := map[string]hlc.Timestamp{}
	n := 0
	for s.k.meters.drops.Load() == 0 {
		if n == 10_000 {
			t.Fatal("of 40 MB that a client does not read nothing was dropped")
		}
		ts := stamp(uint64(n + 1))
		key := fmt.Sprint("k", n%50)
		want[key] = ts
		b.partition.put("m", key, value, ts)
		if e := expect[*wire.ServerEvent](other); e.Key != key {
			t.Fatalf("other got %s, want %s", e.Key, key)
		}
		n++
	}
	s.mu.Lock()
	if queued := s.out.queuedBytes(); queued > 128<<10 {
		t.Errorf("%d bytes queued", queued)
	}
	s.mu.Unlock()
	got := map[string]hlc.Timestamp{}
	events := 0
	for {
		m := slow.recv()
		if e, ok := m.(*wire.ServerEvent); ok {
			events++
			got[e.Key] = e.Record.Timestamp
			continue
		}
		root := m.(*wire.SyncRespRoot)
		if root.MapName != "m" || root.RootHash != rootOf(want, merkle.Mixed) {
			t.Errorf("root %+v", root)
		}
		break
	}
	if events >= n {
		t.Errorf("%d events of %d arrived", events, n)
	}
	slow.walk("m", got, merkle.Mixed)
	if rootOf(got, merkle.Mixed) != rootOf(want, merkle.Mixed) {
		t.Error("the client did not converge")
	}
	b.partition.put("m", "after", packed("v"), stamp(1<<40))
	if e := expect[*wire.ServerEvent](slow); e.Key != "after" {
		t.Errorf("event %+v", e)
	}
}

// Who does not read at all is closed with 4490.
func TestNeverReads(t *testing.T) {
	for name, load := range map[string]func(*bench, *wsClient){
		"events": func(b *bench, p *wsClient) {
			for i := range 100 {
				b.partition.put("m", fmt.Sprint("k", i), packed(strings.Repeat("x", 50_000)), stamp(1))
			}
		},
		"a sync": func(b *bench, p *wsClient) {
			p.send(&wire.SyncInit{MapName: "big"})
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := setup(t, func(c *Config) { c.WriteTimeout = time.Second }, nil)
			b.fill("big", 100, strings.Repeat("x", 50_000))
			p, bystander := b.hello(t), b.hello(t)
			b.narrow(t, p)
			p.synced("m", 0)
			load(b, p)
			k := b.service.sockets
			eventually(t, func() bool {
				s := k.snapshot()[0]
				s.mu.Lock()
				defer s.mu.Unlock()
				return s.closing != nil
			})
			// It reads after all, in time for the close frame.
			for {
				h, payload, err := p.frame()
				if err != nil {
					t.Fatalf("read: %v; want a close frame", err)
				}
				if h.OpCode == ws.OpClose {
					if code, _ := ws.ParseCloseFrameData(payload); code != 4490 {
						t.Errorf("closed with %d, want 4490", code)
					}
					break
				}
			}
			bystander.ping()
			_ = p.conn.Close()
			b.awaitSessions(t, 1)
		})
	}
}

// A PONG and an ack go ahead of bulk data that waits.
func TestUrgentGoesFirst(t *testing.T) {
	b := setup(t, nil, nil)
	b.fill("big", 100, strings.Repeat("x", 20_000)) // 2 MB
	client, server := net.Pipe()
	k := b.service.sockets
	if reason := k.reserve(clientAddr(&http.Request{RemoteAddr: "192.0.2.1:1"})); reason != "" {
		t.Fatal(reason)
	}
	k.open(server, clientAddr(&http.Request{RemoteAddr: "192.0.2.1:1"}), "ws://test", nil)
	p := &wsClient{t: t, conn: client, r: client}
	t.Cleanup(func() { _ = client.Close() })
	s := k.snapshot()[0]
	p.send(&wire.SyncInit{MapName: "big"})
	// One write is under way, and one frame waits.
	eventually(t, func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.out.writing && s.writeBy.Load() != 0 && s.out.syncBytes > 0
	})
	p.send(wire.PingAt(7))
	p.send(&wire.OpBatch{Ops: []wire.Op{putOp("1", "m", "k", "v", stamp(1))}})
	eventually(t, func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.out.urgentBytes > 0 && s.out.replyBytes > 0
	})
	ahead := 0
	for {
		m := p.recv()
		if leaf, ok := m.(*wire.SyncRespLeaf); ok {
			ahead += len(leaf.AppendTo(nil))
			continue
		}
		if _, ok := m.(*wire.Pong); !ok {
			t.Fatalf("got %T, want the PONG", m)
		}
		break
	}
	if ahead > writeBytes+2*pushBytes {
		t.Errorf("%d bytes ahead of the PONG", ahead)
	}
	expect[*wire.OpAck](p)
	expect[*wire.SyncRespLeaf](p)
}

// UPG-01: no new sessions, ops in flight are acked, then 1012.
func TestDrain(t *testing.T) {
	g := newGate()
	b := setup(t, func(c *Config) { c.DrainTimeout = patience }, func(b *bench) { b.partition.before = g.before })
	defer g.release()
	idle, busy := b.hello(t), b.hello(t)
	busy.send(&wire.OpBatch{Ops: []wire.Op{putOp("1", "m", "k", "v", stamp(1))}})
	<-g.entered
	drained := make(chan int, 1)
	go func() { drained <- b.service.sockets.drain(within(t, patience), 10*time.Millisecond) }()
	if code, before := idle.closed(); code != 1012 || len(before) != 0 {
		t.Errorf("idle: closed with %d after %d messages", code, len(before))
	}
	_, _, _, err := ws.Dial(t.Context(), b.url)
	var status ws.StatusError
	if !errors.As(err, &status) || int(status) != http.StatusServiceUnavailable {
		t.Errorf("new connection: %v, want 503", err)
	}
	// Retired, and waiting for its op.
	eventually(t, func() bool {
		all := b.service.sockets.snapshot()
		if len(all) != 1 {
			return false
		}
		all[0].mu.Lock()
		defer all[0].mu.Unlock()
		return all[0].leaving
	})
	busy.send(&wire.OpBatch{Ops: []wire.Op{putOp("2", "m", "k", "v", stamp(2))}}) // too late
	g.release()
	code, before := busy.closed()
	if code != 1012 || len(before) != 1 || before[0].(*wire.OpAck).LastID != "1" {
		t.Errorf("busy: closed with %d after %+v", code, before)
	}
	if n := <-drained; n != 2 {
		t.Errorf("drained %d", n)
	}
}

// Stopping ends everything, also what hangs.
func TestStop(t *testing.T) {
	g := newGate()
	before := runtime.NumGoroutine()
	b := setup(t, nil, func(b *bench) { b.partition.before = g.before })
	p := b.hello(t)
	p.synced("m", 0)
	p.send(&wire.OpBatch{Ops: []wire.Op{putOp("1", "m", "k", "v", stamp(1))}})
	<-g.entered
	b.stop()
	g.release()
	_ = p.conn.Close()
	eventually(t, func() bool { return runtime.NumGoroutine() <= before+1 })
}

func TestCloseSession(t *testing.T) {
	b := setup(t, nil, nil)
	p := b.hello(t)
	p.synced("m", 0)
	k := b.service.sockets
	infos := k.list(0, 10)
	if len(infos) != 1 || len(infos[0].maps) != 1 || infos[0].maps[0] != "m" || infos[0].remote != p.conn.LocalAddr().String() {
		t.Fatalf("infos %+v", infos)
	}
	if k.closeSession(infos[0].id + 1) {
		t.Error("a session that is not there was closed")
	}
	if !k.closeSession(infos[0].id) {
		t.Error("the session was not there")
	}
	if code, _ := p.closed(); code != 1012 {
		t.Errorf("closed with %d, want 1012", code)
	}
}

// An idle connection costs at most 12 KB, all in.
func TestIdleMemory(t *testing.T) {
	const n = 1000
	b := setup(t, nil, nil)
	use := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapInuse + m.StackInuse
	}
	// The clients are plain sockets: what they cost in this process is little, and
	// counted too.
	ready := (&wire.DeviceHello{}).AppendTo(nil)
	conns := make([]net.Conn, 0, n)
	host := strings.TrimSuffix(strings.TrimPrefix(b.url, "ws://"), "/ws")
	request := "GET /ws HTTP/1.1\r\nHost: " + host + "\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
	buf := make([]byte, 4096)
	before := use()
	for range n {
		conn, err := net.Dial("tcp", host)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conns = append(conns, conn)
		_ = conn.SetDeadline(time.Now().Add(patience))
		if _, err := conn.Write([]byte(request)); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Read(buf); err != nil {
			t.Fatal(err)
		}
		// It is not idle from the start: it says hello, pings, and syncs.
		for _, m := range [][]byte{ready, wire.PingAt(1).AppendTo(nil), (&wire.SyncInit{MapName: "m"}).AppendTo(nil)} {
			if _, err := conn.Write(masked(ws.OpBinary, true, m)); err != nil {
				t.Fatal(err)
			}
			if _, err := conn.Read(buf); err != nil {
				t.Fatal(err)
			}
		}
	}
	each := (use() - before) / n
	t.Logf("%d bytes for each of %d idle connections, client ends included", each, n)
	if each > 12<<10 && !raceDetector {
		t.Errorf("%d bytes each, want at most 12 KiB", each)
	}
	runtime.KeepAlive(conns)
}
