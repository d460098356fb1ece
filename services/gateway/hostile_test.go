package gateway

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"

	"github.com/topgun-sync/topgun/core/wire"
)

// rawHeader is a frame header with nothing checked.
func rawHeader(first, second byte, rest ...byte) []byte {
	return append([]byte{first, second}, rest...)
}

func withLength64(n uint64) []byte {
	return append(binary.BigEndian.AppendUint64([]byte{0x82, 0xff}, n), 1, 2, 3, 4)
}

func closeFrame(payload []byte) []byte { return masked(ws.OpClose, true, payload) }

// RELIABILITY 3 and 4: what violates the WebSocket protocol ends the connection with
// the right code at once, and nobody else notices.
func TestHostileFrames(t *testing.T) {
	const limit = 100_000
	b := setup(t, func(c *Config) { c.MaxMessageBytes = limit }, nil)
	bystander := b.hello(t)
	binaryPart := func(fin bool, n int) []byte { return masked(ws.OpBinary, fin, make([]byte, n)) }
	continuation := func(fin bool, n int) []byte { return masked(ws.OpContinuation, fin, make([]byte, n)) }
	for _, c := range []struct {
		name string
		send []byte
		code ws.StatusCode
	}{
		{"unmasked frame", ws.MustCompileFrame(ws.NewBinaryFrame([]byte{1})), 1002},
		{"RSV1", rawHeader(0xc2, 0x80, 1, 2, 3, 4), 1002},
		{"RSV2", rawHeader(0xa2, 0x80, 1, 2, 3, 4), 1002},
		{"RSV3", rawHeader(0x92, 0x80, 1, 2, 3, 4), 1002},
		{"reserved data opcode", rawHeader(0x83, 0x80, 1, 2, 3, 4), 1002},
		{"reserved control opcode", rawHeader(0x8b, 0x80, 1, 2, 3, 4), 1002},
		{"fragmented ping", masked(ws.OpPing, false, []byte("x")), 1002},
		{"fragmented close", masked(ws.OpClose, false, nil), 1002},
		{"ping of 126 bytes", masked(ws.OpPing, true, make([]byte, 126)), 1002},
		{"continuation of nothing", continuation(true, 1), 1002},
		{"binary amid fragments", append(binaryPart(false, 1), binaryPart(true, 1)...), 1002},
		{"text frame", masked(ws.OpText, true, []byte(`{"type":"PING"}`)), 1003},
		{"empty text frame", masked(ws.OpText, true, nil), 1003},
		{"fragmented text", masked(ws.OpText, false, []byte("{")), 1003},
		{"length with the top bit", withLength64(1 << 63), 1002},
		{"length of 2^63-1", withLength64(1<<63 - 1), 1009},
		{"length of 4 GiB", withLength64(1 << 32), 1009},
		{"limit + 1", withLength64(limit + 1), 1009},
		{"limit + 1 in fragments", bytes.Join([][]byte{binaryPart(false, limit), continuation(true, 1)}, nil), 1009},
		{"close with one byte", closeFrame([]byte{3}), 1002},
		{"close with 1005", closeFrame(ws.NewCloseFrameBody(1005, "")), 1002},
		{"close with 1006", closeFrame(ws.NewCloseFrameBody(1006, "")), 1002},
		{"close with 999", closeFrame(ws.NewCloseFrameBody(999, "")), 1002},
		{"close with 0", closeFrame(ws.NewCloseFrameBody(0, "")), 1002},
		{"close reason not UTF-8", closeFrame([]byte{3, 0xe8, 0xff, 0xfe}), 1007},
		{"good close", closeFrame(ws.NewCloseFrameBody(1000, "bye")), 1000},
		{"close with an own code", closeFrame(ws.NewCloseFrameBody(4000, "")), 4000},
		{"close without a code", closeFrame(nil), ws.StatusCode(1005)},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := b.hello(t)
			p.raw(c.send)
			code, before := p.closed()
			if code == 0 {
				code = 1005 // an empty close frame
			}
			if code != c.code || len(before) != 0 {
				t.Errorf("closed with %d after %d messages, want %d at once", code, len(before), c.code)
			}
			bystander.ping()
		})
	}
}

// The limit itself is fine, whole and in fragments, also with pings in between.
func TestMessageOfTheLimit(t *testing.T) {
	const limit = 100_000
	b := setup(t, func(c *Config) { c.MaxMessageBytes = limit }, nil)
	p := b.hello(t)
	op := putOp("1", "m", "k", "", stamp(1))
	op.Record.Value = nil
	// Pad the frame with a field that nobody reads.
	frame := (&wire.SyncInit{MapName: "m"}).AppendTo(nil)
	if frame[0]&0xf0 != 0x80 {
		t.Fatalf("frame begins with %x, want a fixmap", frame[0])
	}
	frame[0]++
	frame = append(frame, 0xa1, 'x', 0xc6)
	n := limit - len(frame) - 4
	frame = append(binary.BigEndian.AppendUint32(frame, uint32(n)), make([]byte, n)...)
	p.payload(frame)
	expect[*wire.SyncRespRoot](p)
	for i := 0; i < len(frame); i += 7777 {
		end := min(i+7777, len(frame))
		code := ws.OpContinuation
		if i == 0 {
			code = ws.OpBinary
		}
		p.raw(masked(code, end == len(frame), frame[i:end]))
		if i == 0 {
			p.raw(masked(ws.OpPing, true, nil))
		}
	}
	if h, _, err := p.frame(); err != nil || h.OpCode != ws.OpPong {
		t.Fatalf("got %v %v, want a pong", h.OpCode, err)
	}
	expect[*wire.SyncRespRoot](p)
}

// What cannot be read is answered with ERROR, has no effect, and ends the session the
// tenth time.
func TestBadMessages(t *testing.T) {
	b := setup(t, nil, nil)
	bystander := b.hello(t)
	for name, frame := range map[string][]byte{
		"empty":                      {},
		"truncated":                  {0x82, 0xa4, 't', 'y'},
		"reserved byte":              {0xc1},
		"trailing byte":              append((&wire.DeviceHello{}).AppendTo(nil), 0xc0),
		"array of 4 G":               {0xdd, 0xff, 0xff, 0xff, 0xff},
		"map of 4 G":                 {0xdf, 0xff, 0xff, 0xff, 0xff},
		"string of 4 G":              {0xdb, 0xff, 0xff, 0xff, 0xff},
		"ext of 4 G":                 {0xc9, 0xff, 0xff, 0xff, 0xff, 1},
		"100,000 nested":             bytes.Repeat([]byte{0x91}, 100_000),
		"not a map":                  {0x93, 1, 2, 3},
		"type is a number":           {0x81, 0xa4, 't', 'y', 'p', 'e', 1},
		"unknown type":               append([]byte{0x81, 0xa4, 't', 'y', 'p', 'e'}, packed("<script>")...),
		"a type that servers send":   (&wire.OpAck{LastID: "9"}).AppendTo(nil),
		"BATCH":                      append([]byte{0x82, 0xa4, 't', 'y', 'p', 'e'}, append(packed("BATCH"), 0xa4, 'd', 'a', 't', 'a', 0xc4, 1, 0)...),
		"SYNC_INIT of a bad name":    (&wire.SyncInit{MapName: "a/../b"}).AppendTo(nil),
		"SYNC_INIT of a subject":     (&wire.SyncInit{MapName: "$SYS.>"}).AppendTo(nil),
		"SYNC_INIT of a reserved":    (&wire.SyncInit{MapName: "__proto__"}).AppendTo(nil),
		"bucket of a bad path":       (&wire.MerkleReqBucket{MapName: "m", Path: "G"}).AppendTo(nil),
		"bucket of a long path":      (&wire.MerkleReqBucket{MapName: "m", Path: "0000"}).AppendTo(nil),
		"bucket of an uppercase one": (&wire.MerkleReqBucket{MapName: "m", Path: "A"}).AppendTo(nil),
	} {
		t.Run(name, func(t *testing.T) {
			p := b.hello(t)
			for range maxErrors - 1 {
				p.payload(frame)
				e := expect[*wire.ErrorMessage](p)
				if e.Code != 400 || strings.Contains(e.Message, "script") {
					t.Fatalf("error %+v, want 400 with a fixed text", e)
				}
			}
			p.ping() // and goes on
			p.payload(frame)
			code, before := p.closed()
			if code != 1008 || len(before) != 1 {
				t.Errorf("closed with %d after %d messages, want 1008 after an error", code, len(before))
			}
			bystander.ping()
		})
	}
	if strings.Contains(b.log.String(), "script") {
		t.Error("the log repeats a client's text")
	}
}

func TestFloods(t *testing.T) {
	b := setup(t, nil, nil)
	bystander := b.hello(t)
	for name, frame := range map[string][]byte{
		"pings":            masked(ws.OpPing, true, nil),
		"pongs":            masked(ws.OpPong, true, nil),
		"PINGs":            masked(ws.OpBinary, true, wire.PingAt(1).AppendTo(nil)),
		"empty fragments":  masked(ws.OpContinuation, false, nil),
		"DEVICE_HELLOs":    masked(ws.OpBinary, true, (&wire.DeviceHello{}).AppendTo(nil)),
		"pushed diffs":     masked(ws.OpBinary, true, pushOf("m", "k", "t", 1).AppendTo(nil)),
		"refused requests": masked(ws.OpBinary, true, (&wire.QuerySub{QueryID: "q", MapName: "m", Query: []byte{0x80}}).AppendTo(nil)),
	} {
		t.Run(name, func(t *testing.T) {
			p := b.hello(t)
			if name == "empty fragments" {
				p.raw(masked(ws.OpBinary, false, []byte{0x80}))
			}
			go func() {
				flood := bytes.Repeat(frame, 100)
				_ = p.conn.SetWriteDeadline(time.Now().Add(patience))
				for range 100 {
					if _, err := p.conn.Write(flood); err != nil {
						return
					}
				}
			}()
			for {
				h, payload, err := p.frame()
				if err != nil {
					t.Fatalf("read: %v; want a close frame", err)
				}
				if h.OpCode != ws.OpClose {
					continue
				}
				if code, _ := ws.ParseCloseFrameData(payload); code != 4429 && code != 4490 {
					t.Fatalf("closed with %d, want 4429", code)
				}
				break
			}
			bystander.ping()
		})
	}
}

// A message that has begun must go on arriving.
func TestDribble(t *testing.T) {
	b := setup(t, func(c *Config) { c.BodyTimeout = 50 * time.Millisecond }, nil)
	for name, send := range map[string][]byte{
		"header":   {0x82},
		"payload":  masked(ws.OpBinary, true, make([]byte, 50))[:20],
		"fragment": masked(ws.OpBinary, false, []byte{0x80}),
	} {
		t.Run(name, func(t *testing.T) {
			p := b.hello(t)
			p.raw(send)
			if code, _ := p.closed(); code != 1008 {
				t.Errorf("closed with %d, want 1008", code)
			}
		})
	}
}

// Announcing much costs nothing; sending much is bounded over all sessions.
func TestInboundBudget(t *testing.T) {
	b := setup(t, nil, func(b *bench) { b.service.sockets.inbound.limit = 1 << 20 })
	p := b.hello(t)
	p.raw(withLength64(16 << 20)[:14])
	p.raw(make([]byte, 32<<10))
	if held := b.service.sockets.inbound.held.Load(); held != 0 {
		t.Errorf("%d bytes held for a message that did not arrive", held)
	}
	go func() {
		_ = p.conn.SetWriteDeadline(time.Now().Add(patience))
		_, _ = p.conn.Write(make([]byte, 4<<20)) // fails when the gateway closes
	}()
	for {
		h, payload, err := p.frame()
		if err != nil {
			t.Fatalf("read: %v; want a close frame", err)
		}
		if h.OpCode == ws.OpClose {
			if code, _ := ws.ParseCloseFrameData(payload); code != 1013 {
				t.Fatalf("closed with %d, want 1013", code)
			}
			break
		}
	}
	_ = p.conn.Close()
	b.awaitSessions(t, 0)
	if held := b.service.sockets.inbound.held.Load(); held != 0 {
		t.Errorf("%d bytes held after the session", held)
	}
}

// awaitSessions blocks until n sessions are open.
func (b *bench) awaitSessions(t testing.TB, n int) {
	t.Helper()
	deadline := time.After(patience)
	k := b.service.sockets
	for {
		k.mu.Lock()
		open, gone := len(k.sessions), k.gone
		k.mu.Unlock()
		if open == n {
			return
		}
		select {
		case <-gone:
		case <-deadline:
			t.Fatalf("%d sessions are open, want %d", open, n)
		}
	}
}

func TestBadUpgrades(t *testing.T) {
	b := setup(t, func(c *Config) { c.AllowedOrigins = []string{"https://app.example.com"} }, nil)
	host := strings.TrimSuffix(strings.TrimPrefix(b.url, "ws://"), "/ws")
	good := map[string]string{
		"Host": host, "Upgrade": "websocket", "Connection": "Upgrade",
		"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version": "13",
	}
	for _, c := range []struct {
		name   string
		line   string
		change map[string]string
		status int
	}{
		{"good", "GET /ws HTTP/1.1", nil, 101},
		{"good on /", "GET / HTTP/1.1", nil, 101},
		{"good origin", "GET /ws HTTP/1.1", map[string]string{"Origin": "https://app.example.com"}, 101},
		{"no key", "GET /ws HTTP/1.1", map[string]string{"Sec-WebSocket-Key": ""}, 400},
		{"short key", "GET /ws HTTP/1.1", map[string]string{"Sec-WebSocket-Key": "abc"}, 400},
		{"no version", "GET /ws HTTP/1.1", map[string]string{"Sec-WebSocket-Version": ""}, 400},
		{"old version", "GET /ws HTTP/1.1", map[string]string{"Sec-WebSocket-Version": "8"}, 426},
		{"no upgrade", "GET /ws HTTP/1.1", map[string]string{"Upgrade": ""}, 426},
		{"no connection", "GET /ws HTTP/1.1", map[string]string{"Connection": "close"}, 400},
		{"POST", "POST /ws HTTP/1.1", nil, 405},
		{"HTTP/1.0", "GET /ws HTTP/1.0", nil, 400},
		{"foreign origin", "GET /ws HTTP/1.1", map[string]string{"Origin": "https://evil.example"}, 403},
		{"look-alike origin", "GET /ws HTTP/1.1", map[string]string{"Origin": "https://app.example.com.evil.example"}, 403},
		{"http origin", "GET /ws HTTP/1.1", map[string]string{"Origin": "http://app.example.com"}, 403},
		{"null origin", "GET /ws HTTP/1.1", map[string]string{"Origin": "null"}, 403},
		{"token in the URL", "GET /ws?token=abc HTTP/1.1", nil, 401},
	} {
		t.Run(c.name, func(t *testing.T) {
			conn, err := net.Dial("tcp", host)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(patience))
			request := c.line + "\r\n"
			headers := map[string]string{}
			for k, v := range good {
				headers[k] = v
			}
			for k, v := range c.change {
				headers[k] = v
			}
			for k, v := range headers {
				if v != "" {
					request += k + ": " + v + "\r\n"
				}
			}
			if _, err := io.WriteString(conn, request+"\r\n"); err != nil {
				t.Fatal(err)
			}
			res, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			if res.StatusCode != c.status {
				t.Errorf("status %d, want %d", res.StatusCode, c.status)
			}
		})
	}
	// Every place is given back.
	k := b.service.sockets
	// An upgrade that is refused is answered before its place is given back, and one
	// whose client has gone meanwhile may be on its way to a session.
	eventually(t, func() bool {
		k.mu.Lock()
		defer k.mu.Unlock()
		return k.reserved == 0 && len(k.perAddr) == 0 && len(k.sessions) == 0
	})
}

// No extension is negotiated, though clients offer one.
func TestNoCompression(t *testing.T) {
	b := setup(t, nil, nil)
	dialer := ws.Dialer{Header: ws.HandshakeHeaderHTTP{"Sec-WebSocket-Extensions": {"permessage-deflate"}}}
	conn, _, hs, err := dialer.Dial(t.Context(), b.url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if len(hs.Extensions) != 0 {
		t.Errorf("negotiated %v", hs.Extensions)
	}
}

func TestConnectionCaps(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"total":       func(c *Config) { c.MaxSessions = 2 },
		"per address": func(c *Config) { c.MaxSessionsPerAddress = 2 },
	} {
		t.Run(name, func(t *testing.T) {
			b := setup(t, change, nil)
			p := b.hello(t)
			b.hello(t)
			_, _, _, err := ws.Dial(context.Background(), b.url)
			var status ws.StatusError
			if !errors.As(err, &status) || int(status) != http.StatusServiceUnavailable {
				t.Fatalf("third connection: %v, want 503", err)
			}
			_ = p.conn.Close()
			b.awaitSessions(t, 1)
			b.hello(t)
		})
	}
}
