package e2e

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/topgun-sync/topgun/client"
	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/wire"
)

// traffic records what one client has on the wire.
type traffic struct {
	mu       sync.Mutex
	sent     []frame
	received []frame
}

// frame is one message with the bytes that it came in.
type frame struct {
	wire.Message
	size int
}

func (tr *traffic) record(f client.Frame) {
	raw := slices.Clone(f.Data) // messages alias it
	tr.mu.Lock()
	defer tr.mu.Unlock()
	if f.Sent {
		if msg, err := wire.DecodeClient(raw, wire.DefaultLimits()); err == nil {
			tr.sent = append(tr.sent, frame{msg, len(raw)})
		}
	} else if msg, err := wire.DecodeServer(raw); err == nil {
		tr.received = append(tr.received, unpack(msg, len(raw))...)
	}
}

// unpack returns the messages of a frame. Of a BATCH the first one stands for the
// bytes that the others do not account for.
func unpack(msg wire.Message, size int) []frame {
	batch, ok := msg.(*wire.Batch)
	if !ok {
		return []frame{{msg, size}}
	}
	frames := make([]frame, len(batch.Messages))
	for i, inner := range batch.Messages {
		frames[i] = frame{inner, len(inner.AppendTo(nil))}
		size -= frames[i].size
	}
	if len(frames) > 0 {
		frames[0].size += size
	}
	return frames
}

// recording is a change of a client's configuration that records into tr.
func recording(tr *traffic) func(*client.Config) {
	return func(c *client.Config) { c.OnFrame = tr.record }
}

func (tr *traffic) reset() {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.sent, tr.received = nil, nil
}

// about returns the received frames that concern a map, in order.
func (tr *traffic) about(mapName string) (frames []frame) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	for _, f := range tr.received {
		if mapOf(f.Message) == mapName {
			frames = append(frames, f)
		}
	}
	return frames
}

// requests returns how many bucket requests for a map went out.
func (tr *traffic) requests(mapName string) (n int) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	for _, f := range tr.sent {
		if r, ok := f.Message.(*wire.MerkleReqBucket); ok && r.MapName == mapName {
			n++
		}
	}
	return n
}

// events returns the events for a key, in order, batched ones included.
func (tr *traffic) events(mapName, key string) (events []wire.Event) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	for _, f := range tr.received {
		for _, ev := range eventsOf(f.Message) {
			if ev.MapName == mapName && ev.Key == key {
				events = append(events, ev)
			}
		}
	}
	return events
}

func eventsOf(msg wire.Message) (events []wire.Event) {
	switch msg := msg.(type) {
	case *wire.ServerEvent:
		return []wire.Event{msg.Event}
	case *wire.ServerBatchEvent:
		return msg.Events
	}
	return events
}

func mapOf(msg wire.Message) string {
	switch msg := msg.(type) {
	case *wire.SyncRespRoot:
		return msg.MapName
	case *wire.SyncRespBuckets:
		return msg.MapName
	case *wire.SyncRespLeaf:
		return msg.MapName
	case *wire.SyncResetRequired:
		return msg.MapName
	}
	for _, ev := range eventsOf(msg) {
		return ev.MapName
	}
	return ""
}

// roots returns the root hashes that the server has announced for a map.
func (tr *traffic) roots(mapName string) (roots []uint32) {
	for _, f := range tr.about(mapName) {
		if r, ok := f.Message.(*wire.SyncRespRoot); ok {
			roots = append(roots, r.RootHash)
		}
	}
	return roots
}

// conn is a WebSocket on which a test says exactly what it wants to.
type conn struct {
	t  testing.TB
	ws *websocket.Conn
	// unpacked are messages of a BATCH that were not asked for yet.
	unpacked []wire.Message
	packed   [][]byte // the same, for who reads them undecoded
}

func dial(t testing.TB, c Cluster, i int) *conn {
	t.Helper()
	ws, _, err := websocket.Dial(within(t, startDeadline), webSocket(gateway(c, i)), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ws.CloseNow() })
	ws.SetReadLimit(32 << 20)
	return &conn{t: t, ws: ws}
}

// hello introduces the connection to a cluster that wants no token.
func (c *conn) hello() *conn {
	c.t.Helper()
	c.send(&wire.DeviceHello{})
	expect[*wire.DeviceAck](c)
	return c
}

func (c *conn) send(msg wire.Message) {
	c.t.Helper()
	c.sendBytes(msg.AppendTo(nil))
}

func (c *conn) sendBytes(frame []byte) {
	c.t.Helper()
	must(c.t, c.ws.Write(within(c.t, deadline), websocket.MessageBinary, frame))
}

// next returns the next message.
func (c *conn) next() wire.Message {
	c.t.Helper()
	msg, err := c.read()
	if err != nil {
		c.t.Fatal(err)
	}
	return msg
}

func (c *conn) read() (wire.Message, error) { return c.readWithin(within(c.t, deadline)) }

func (c *conn) readWithin(ctx context.Context) (wire.Message, error) {
	for {
		if len(c.unpacked) > 0 {
			msg := c.unpacked[0]
			c.unpacked = c.unpacked[1:]
			return msg, nil
		}
		_, data, err := c.ws.Read(ctx)
		if err != nil {
			return nil, err
		}
		msg, err := wire.DecodeServer(data)
		if err != nil {
			return nil, err
		}
		batch, ok := msg.(*wire.Batch)
		if !ok {
			return msg, nil
		}
		c.unpacked = batch.Messages
	}
}

// expect returns the next message of a type; others in between are passed over.
func expect[M wire.Message](c *conn) M {
	c.t.Helper()
	for {
		msg := c.next()
		if m, ok := msg.(M); ok {
			return m
		}
		var want M
		if _, ok := msg.(*wire.ErrorMessage); ok {
			c.t.Fatalf("got %+v while waiting for %T", msg, want)
		}
	}
}

// expectClose reads until the server closes, and returns its code.
func (c *conn) expectClose() websocket.StatusCode {
	c.t.Helper()
	for {
		if _, err := c.read(); err != nil {
			if code := websocket.CloseStatus(err); code != -1 {
				return code
			}
			if errors.Is(err, context.DeadlineExceeded) {
				c.t.Fatal("the server did not close")
			}
			return -1 // closed without a code
		}
	}
}

// put is an operation that writes a value.
func put(id, mapName, key string, value any, ts hlc.Timestamp) wire.Op {
	raw, err := client.EncodeValue(value)
	if err != nil {
		panic(err)
	}
	return wire.Op{ID: id, MapName: mapName, Key: key, Kind: wire.OpPut, Record: lwwmap.Record{Value: raw, Timestamp: ts}}
}

// now is the time in the unit of stamps.
func now() uint64 { return uint64(time.Now().UnixMilli()) }

// ago is the time of stamps a while back.
func ago(d time.Duration) uint64 { return uint64(time.Now().Add(-d).UnixMilli()) }

// postSync makes one POST /sync.
func postSync(t testing.TB, url string, req *wire.SyncRequest) *wire.SyncResponse {
	t.Helper()
	if req.ClientID == "" {
		req.ClientID = "e2e"
	}
	if req.ClientHLC.IsZero() {
		req.ClientHLC = stamp(now(), 0, "e2e")
	}
	status, body := post(t, url+"/sync", "application/x-msgpack", req.AppendTo(nil))
	if status != http.StatusOK {
		t.Fatalf("POST /sync: status %d: %s", status, body)
	}
	resp, err := wire.DecodeSyncResponse(body)
	must(t, err)
	for _, e := range resp.Errors {
		t.Errorf("POST /sync: error %d %s %s", e.Code, e.Message, e.Context)
	}
	return resp
}

func post(t testing.TB, url, contentType string, body []byte) (status int, answer []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(within(t, deadline), http.MethodPost, url, bytes.NewReader(body))
	must(t, err)
	req.Header.Set("Content-Type", contentType)
	resp, err := http.DefaultClient.Do(req)
	must(t, err)
	defer resp.Body.Close()
	answer, err = io.ReadAll(resp.Body)
	must(t, err)
	return resp.StatusCode, answer
}
