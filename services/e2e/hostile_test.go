package e2e

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/topgun-sync/topgun/core/wire"
)

// Whatever somebody sends, the answer is the one that is documented, and a client
// beside it does not notice (RELIABILITY 4, RES-04).
func hostileInput(t *testing.T, c Cluster) {
	const name = "hostile"
	var tr traffic
	bystander := open(t, webSocket(gateway(c, 0)), name+"-bystander", recording(&tr))
	must(t, bystander.Map(name).WaitSynced(within(t, deadline)))
	unharmed := func(t *testing.T) {
		t.Helper()
		must(t, bystander.Map(name).Set("beat", t.Name()))
		flush(t, bystander)
	}

	badMessages := map[string][]byte{
		"empty":                    {},
		"reserved byte":            {0xc1},
		"garbage":                  []byte("GET / HTTP/1.1\r\n\r\n"),
		"array of 4 G elements":    {0xdd, 0xff, 0xff, 0xff, 0xff},
		"map of 4 G entries":       {0xdf, 0xff, 0xff, 0xff, 0xff},
		"bin of 4 GB":              {0xc6, 0xff, 0xff, 0xff, 0xff},
		"nesting of 100,000":       append(bytes.Repeat([]byte{0x91}, 100_000), 0xc0),
		"truncated":                (&wire.SyncInit{MapName: name}).AppendTo(nil)[:10],
		"trailing byte":            append((&wire.SyncInit{MapName: name}).AppendTo(nil), 0),
		"no type":                  {0x80},
		"type is a number":         {0x81, 0xa4, 't', 'y', 'p', 'e', 0x01},
		"payload is a number":      append([]byte{0x82, 0xa4, 't', 'y', 'p', 'e', 0xa8}, "OP_BATCH\xa7payload\x01"...),
		"a message of the server":  (&wire.OpAck{LastID: "1"}).AppendTo(nil),
		"ops are a string":         append([]byte{0x82, 0xa4, 't', 'y', 'p', 'e', 0xa8}, "OP_BATCH\xa7payload\x81\xa3ops\xa3abc"...),
		"announced ops are absent": append([]byte{0x82, 0xa4, 't', 'y', 'p', 'e', 0xa8}, "OP_BATCH\xa7payload\x81\xa3ops\xdd\xff\xff\xff\xff"...),
	}
	for what, bytes := range badMessages {
		t.Run(what, func(t *testing.T) {
			conn := dial(t, c, 0).hello()
			conn.sendBytes(bytes)
			if msg, ok := conn.next().(*wire.ErrorMessage); !ok || msg.Code < 400 || msg.Code > 499 && msg.Code != 501 || msg.Message == "" {
				t.Errorf("answer %+v; want an ERROR with a reason", msg)
			}
			// The session goes on.
			conn.send(&wire.SyncInit{MapName: name})
			expect[*wire.SyncRespRoot](conn)
			unharmed(t)
		})
	}

	t.Run("ten errors in a row", func(t *testing.T) {
		conn := dial(t, c, 0).hello()
		for range 12 {
			if conn.ws.Write(within(t, deadline), websocket.MessageBinary, []byte{0xc1}) != nil {
				break
			}
		}
		if code := conn.expectClose(); code != 1002 && code != 1007 && code != websocket.StatusPolicyViolation {
			t.Errorf("closed with %d", code)
		}
		unharmed(t)
	})
	t.Run("text frame", func(t *testing.T) {
		conn := dial(t, c, 0).hello()
		must(t, conn.ws.Write(within(t, deadline), websocket.MessageText, []byte(`{"type":"PING"}`)))
		if code := conn.expectClose(); code != websocket.StatusUnsupportedData {
			t.Errorf("closed with %d; want 1003", code)
		}
		unharmed(t)
	})
	t.Run("too many ops", func(t *testing.T) {
		conn := dial(t, c, 0).hello()
		var batch wire.OpBatch
		for i := range 1001 {
			batch.Ops = append(batch.Ops, put(fmt.Sprint(i+1), name, fmt.Sprint("many-", i), i, stamp(now(), uint64(i), "hostile")))
		}
		conn.send(&batch)
		if msg, ok := conn.next().(*wire.ErrorMessage); !ok || !strings.Contains(msg.Message, "TOO_MANY_OPS") {
			t.Errorf("answer %+v; want TOO_MANY_OPS", msg)
		}
		unharmed(t)
		if _, ok := bystander.Map(name).Get("many-0"); ok {
			t.Error("an op of the refused batch was applied")
		}
	})
	t.Run("oversize", func(t *testing.T) {
		conn := dial(t, c, 0).hello()
		// The server may close before it has read everything.
		_ = conn.ws.Write(within(t, deadline), websocket.MessageBinary, make([]byte, 16<<20+1))
		if code := conn.expectClose(); code != websocket.StatusMessageTooBig && code != -1 {
			t.Errorf("closed with %d; want 1009", code)
		}
		unharmed(t)
	})
	t.Run("announced length", func(t *testing.T) {
		for what, length := range map[string]uint64{"huge": 1 << 62, "top bit set": 1 << 63} {
			raw, br := upgraded(t, c)
			header := []byte{0x82, 0x80 | 127}
			header = binary.BigEndian.AppendUint64(header, length)
			_, err := raw.Write(append(header, 1, 2, 3, 4, 'x'))
			must(t, err)
			if code := closeCode(t, br); code != 1009 && code != 1002 {
				t.Errorf("%s: closed with %d; want 1009 or 1002", what, code)
			}
		}
		unharmed(t)
	})
	t.Run("frames against the rules", func(t *testing.T) {
		for what, frame := range map[string][]byte{
			"unmasked":                {0x82, 0x01, 0xc0},
			"reserved bit":            {0xc2, 0x81, 0, 0, 0, 0, 0xc0},
			"reserved opcode":         {0x83, 0x81, 0, 0, 0, 0, 0xc0},
			"fragmented ping":         {0x09, 0x80, 0, 0, 0, 0},
			"ping of 126 bytes":       append([]byte{0x89, 0xfe, 0, 126, 0, 0, 0, 0}, make([]byte, 126)...),
			"continuation of nothing": {0x80, 0x81, 0, 0, 0, 0, 0xc0},
		} {
			raw, br := upgraded(t, c)
			_, err := raw.Write(frame)
			must(t, err)
			if code := closeCode(t, br); code != 1002 {
				t.Errorf("%s: closed with %d; want 1002", what, code)
			}
		}
		unharmed(t)
	})
	t.Run("http", func(t *testing.T) {
		for what, status := range map[string]int{
			"GET /ws HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("a", 64<<10) + "\r\n\r\n":                                               http.StatusRequestHeaderFieldsTooLarge,
			"GET /ws HTTP/1.1\r\nHost: x\r\n\r\n":                                                                                         http.StatusUpgradeRequired,
			"POST /sync HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: 1\r\n\r\nx":                                    http.StatusUnsupportedMediaType,
			"POST /sync HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-msgpack\r\nContent-Length: 5\r\n\r\n\xdd\xff\xff\xff\xff":      http.StatusBadRequest,
			"POST /sync HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-msgpack\r\nContent-Length: 99999999999\r\n\r\n":                http.StatusRequestEntityTooLarge,
			"GET /ws HTTP/1.1\r\nHost: x\r\nOrigin: https://evil.example\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" + key + "\r\n": http.StatusForbidden,
		} {
			raw := dialTCP(t, c)
			_, err := io.WriteString(raw, what)
			must(t, err)
			resp, err := http.ReadResponse(bufio.NewReader(raw), nil)
			must(t, err)
			resp.Body.Close()
			if resp.StatusCode != status {
				t.Errorf("%.60q: status %d; want %d", what, resp.StatusCode, status)
			}
		}
		unharmed(t)
	})

	connects := 0
	tr.mu.Lock()
	for _, f := range tr.received {
		if f.Type() == "DEVICE_ACK" {
			connects++
		}
	}
	tr.mu.Unlock()
	if connects != 1 {
		t.Errorf("the bystander connected %d times", connects)
	}
}

const key = "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"

func dialTCP(t *testing.T, c Cluster) net.Conn {
	t.Helper()
	u, err := url.Parse(gateway(c, 0))
	must(t, err)
	raw, err := net.DialTimeout("tcp", u.Host, deadline)
	must(t, err)
	t.Cleanup(func() { raw.Close() })
	must(t, raw.SetDeadline(time.Now().Add(deadline)))
	return raw
}

// upgraded returns a WebSocket as a plain connection, for frames that no library
// would send.
func upgraded(t *testing.T, c Cluster) (net.Conn, *bufio.Reader) {
	t.Helper()
	raw := dialTCP(t, c)
	_, err := io.WriteString(raw, "GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"+key+"\r\n")
	must(t, err)
	br := bufio.NewReader(raw)
	resp, err := http.ReadResponse(br, nil)
	must(t, err)
	if resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("upgrade: status %d", resp.StatusCode)
	}
	return raw, br
}

// closeCode reads frames until the close frame and returns its code, or -1 if the
// connection ended without one.
func closeCode(t *testing.T, br *bufio.Reader) int {
	t.Helper()
	for {
		var head [2]byte
		if _, err := io.ReadFull(br, head[:]); err != nil {
			return -1
		}
		length := uint64(head[1] & 0x7f)
		switch length {
		case 126:
			var b [2]byte
			_, err := io.ReadFull(br, b[:])
			must(t, err)
			length = uint64(binary.BigEndian.Uint16(b[:]))
		case 127:
			var b [8]byte
			_, err := io.ReadFull(br, b[:])
			must(t, err)
			length = binary.BigEndian.Uint64(b[:])
		}
		body := make([]byte, length)
		if _, err := io.ReadFull(br, body); err != nil {
			return -1
		}
		if head[0]&0x0f == 0x8 && len(body) >= 2 {
			return int(binary.BigEndian.Uint16(body))
		}
	}
}
