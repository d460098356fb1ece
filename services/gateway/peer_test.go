package gateway

import (
	"bufio"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gobwas/ws"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/keyspace"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/msgval"
	"github.com/topgun-sync/topgun/core/wire"
)

// patience is how long a test waits for what must happen.
const patience = 30 * time.Second

// bench is a running gateway with fakes around it.
type bench struct {
	service     *Service
	partition   *fakePartition
	fanout      *fakeFanout
	persistence *fakePersistence
	url         string // of the WebSocket
	stop        func() // stops the service and waits for it
	log         *logBuffer
	metrics     *sdkmetric.ManualReader
	spans       *tracetest.SpanRecorder
}

// logBuffer collects log lines.
type logBuffer struct {
	mu   sync.Mutex
	text strings.Builder
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// setup starts a gateway without authentication. change may be nil; prepare is called
// with the bench before anything runs, and may be nil.
func setup(t testing.TB, change func(*Config), prepare func(*bench)) *bench {
	t.Helper()
	cfg := DefaultConfig()
	cfg.GatewayID = "gateway-test"
	cfg.DrainTimeout = 500 * time.Millisecond
	if change != nil {
		change(&cfg)
	}
	b := &bench{fanout: newFakeFanout(), persistence: newFakePersistence(), log: &logBuffer{}}
	b.partition = newFakePartition(b.fanout)
	b.metrics = sdkmetric.NewManualReader()
	b.spans = tracetest.NewSpanRecorder()
	service, err := New(cfg, Deps{
		Partition:   b.partition.client(),
		Fanout:      b.fanout.client(),
		Persistence: b.persistence.client(),
		Logger:      slog.New(slog.NewTextHandler(b.log, nil)),
		Meter:       sdkmetric.NewMeterProvider(sdkmetric.WithReader(b.metrics)).Meter("test"),
		Tracer:      sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(b.spans)).Tracer("test"),
	})
	if err != nil {
		t.Fatalf("New: %v", err)
	}
	b.service = service
	service.sockets.tick = 10 * time.Millisecond
	service.sockets.linger = patience // a slow machine must not cut off what a test reads
	if prepare != nil {
		prepare(b)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- service.Run(ctx) }()
	server := httptest.NewServer(service.Handler())
	b.url = "ws" + strings.TrimPrefix(server.URL, "http") + "/ws"
	b.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
		server.Close()
	})
	t.Cleanup(b.stop)
	// Else sessions that come first are healed when the stream opens.
	eventually(t, func() bool { return service.sockets.hub.ready() == nil })
	return b
}

// eventually waits until what nothing announces has come true.
func eventually(t testing.TB, holds func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	deadline := time.After(patience)
	for !holds() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not within %v", patience)
		}
	}
}

// wsClient is a raw WebSocket client.
type wsClient struct {
	t    testing.TB
	conn net.Conn
	r    io.Reader

	inner   []wire.Message // of a BATCH, not read yet
	batches int            // that came
}

func (b *bench) dial(t testing.TB) *wsClient {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	conn, br, _, err := ws.Dial(ctx, b.url)
	if err != nil {
		t.Fatalf("dial: %v", err)
	}
	p := &wsClient{t: t, conn: conn, r: conn}
	if br != nil {
		p.r = br
	} else {
		p.r = bufio.NewReader(conn)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return p
}

// hello dials, says DEVICE_HELLO and takes the DEVICE_ACK.
func (b *bench) hello(t testing.TB) *wsClient {
	t.Helper()
	p := b.dial(t)
	p.send(&wire.DeviceHello{})
	expect[*wire.DeviceAck](p)
	return p
}

func (p *wsClient) raw(bytes []byte) {
	p.t.Helper()
	_ = p.conn.SetWriteDeadline(time.Now().Add(patience))
	if _, err := p.conn.Write(bytes); err != nil {
		p.t.Fatalf("write: %v", err)
	}
}

func masked(op ws.OpCode, fin bool, payload []byte) []byte {
	return ws.MustCompileFrame(ws.MaskFrame(ws.NewFrame(op, fin, payload)))
}

// payload sends bytes as one binary message.
func (p *wsClient) payload(bytes []byte) {
	p.t.Helper()
	p.raw(masked(ws.OpBinary, true, bytes))
}

func (p *wsClient) send(m wire.Message) {
	p.t.Helper()
	p.payload(m.AppendTo(nil))
}

// frame reads the next frame, of any kind.
func (p *wsClient) frame() (ws.Header, []byte, error) {
	_ = p.conn.SetReadDeadline(time.Now().Add(patience))
	h, err := ws.ReadHeader(p.r)
	if err != nil {
		return h, nil, err
	}
	payload := make([]byte, h.Length)
	_, err = io.ReadFull(p.r, payload)
	return h, payload, err
}

// recv reads the next message, also one within a BATCH.
func (p *wsClient) recv() wire.Message {
	p.t.Helper()
	if len(p.inner) > 0 {
		m := p.inner[0]
		p.inner = p.inner[1:]
		return m
	}
	h, payload, err := p.frame()
	if err != nil {
		p.t.Fatalf("read: %v", err)
	}
	if h.OpCode == ws.OpClose {
		code, reason := ws.ParseCloseFrameData(payload)
		p.t.Fatalf("closed with %d %q; want a message", code, reason)
	}
	m, err := wire.DecodeServer(payload)
	if err != nil {
		p.t.Fatalf("decode %x: %v", payload, err)
	}
	if batch, ok := m.(*wire.Batch); ok {
		p.batches++
		p.inner = batch.Messages
		return p.recv()
	}
	return m
}

// tryRecv reads the next message, or nil when the connection has ended.
func (p *wsClient) tryRecv() wire.Message {
	if len(p.inner) > 0 {
		m := p.inner[0]
		p.inner = p.inner[1:]
		return m
	}
	h, payload, err := p.frame()
	if err != nil || h.OpCode != ws.OpBinary {
		return nil
	}
	m, err := wire.DecodeServer(payload)
	if batch, ok := m.(*wire.Batch); ok && err == nil {
		p.inner = batch.Messages
		return p.tryRecv()
	}
	if err != nil {
		return nil
	}
	return m
}

// expect reads the next message, which must be of type M.
func expect[M wire.Message](p *wsClient) M {
	p.t.Helper()
	m := p.recv()
	want, ok := m.(M)
	if !ok {
		p.t.Fatalf("got %T %+v, want %T", m, m, want)
	}
	return want
}

// closed reads up to the close frame and the end of the connection, and returns the
// code and the messages before it.
func (p *wsClient) closed() (code ws.StatusCode, before []wire.Message) {
	p.t.Helper()
	before = append(before, p.inner...)
	for {
		h, payload, err := p.frame()
		if err != nil {
			p.t.Fatalf("read: %v; want a close frame", err)
		}
		if h.OpCode == ws.OpClose {
			code, _ = ws.ParseCloseFrameData(payload)
			break
		}
		m, err := wire.DecodeServer(payload)
		if err != nil {
			p.t.Fatalf("decode: %v", err)
		}
		if batch, ok := m.(*wire.Batch); ok {
			before = append(before, batch.Messages...)
			continue
		}
		before = append(before, m)
	}
	if _, _, err := p.frame(); err == nil {
		p.t.Fatal("a frame came after the close frame")
	} else if ne := net.Error(nil); errors.As(err, &ne) && ne.Timeout() {
		p.t.Fatal("the connection stays open after the close frame")
	}
	_ = p.conn.Close()
	return code, before
}

// ping makes a round trip, so that everything sent before was handled; it fails on any
// other message.
func (p *wsClient) ping() {
	p.t.Helper()
	p.send(wire.PingAt(1760000008845))
	if got, ok := expect[*wire.Pong](p).Millis(); !ok || got != 1760000008845 {
		p.t.Fatalf("PONG echoes %d, %v", got, ok)
	}
}

// pong makes a round trip below the messages, which needs no authentication.
func (p *wsClient) pong() {
	p.t.Helper()
	p.raw(masked(ws.OpPing, true, nil))
	if h, _, err := p.frame(); err != nil || h.OpCode != ws.OpPong {
		p.t.Fatalf("got %v %v, want a pong", h.OpCode, err)
	}
}

func packed(s string) []byte { return msgval.AppendString(nil, s) }

func stamp(millis uint64) hlc.Timestamp { return hlc.Timestamp{Millis: millis, NodeID: "client-a"} }

func putOp(id, mapName, key, value string, ts hlc.Timestamp) wire.Op {
	return wire.Op{
		ID: id, MapName: mapName, Key: key, Kind: wire.OpPut, Record: lwwmap.Record{Value: packed(value), Timestamp: ts},
	}
}

func removeOp(id, mapName, key string, ts hlc.Timestamp) wire.Op {
	return wire.Op{ID: id, MapName: mapName, Key: key, Kind: wire.OpRemove, Record: lwwmap.Record{Timestamp: ts}}
}

// synced says SYNC_INIT and reads up to the root.
func (p *wsClient) synced(mapName string, since uint64) (records []wire.KeyedRecord, root *wire.SyncRespRoot) {
	p.t.Helper()
	p.send(&wire.SyncInit{MapName: mapName, LastSyncTimestamp: since})
	for {
		switch m := p.recv().(type) {
		case *wire.SyncRespLeaf:
			records = append(records, m.Records...)
		case *wire.SyncRespRoot:
			return records, m
		default:
			p.t.Fatalf("got %T %+v during a sync", m, m)
		}
	}
}

// rootOf is the root that a client with these records computes.
func rootOf(records map[string]hlc.Timestamp, combine merkle.Combine) uint32 {
	var leaves merkle.Leaves
	for key, ts := range records {
		leaves.Add(merkle.Leaf(merkle.Hash(key)), merkle.ItemHash(key, ts), combine)
	}
	return merkle.NewTree(&leaves, combine).Root()
}

func shardOf(key string) int { return keyspace.ShardOf(key, 4) }
