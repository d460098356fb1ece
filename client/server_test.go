package client

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/query"
	"github.com/topgun-sync/topgun/core/wire"
)

// testServer is the smallest server the client can talk to (PROTOCOL 23), with
// switches for the ways in which real ones differ. It knows nothing of durability.
type testServer struct {
	*httptest.Server

	mu       sync.Mutex
	clock    *hlc.Clock
	maps     map[string]*serverMap
	sessions map[*serverSession]struct{}
	batches  [][]wire.Op // every batch received, in order
	asked    []*wire.MerkleReqBucket
	busy     int // bucket requests received and not answered
	mostBusy int

	// Switches; set before use or with the lock held.
	token       string          // AUTH must carry it
	mute        bool            // answers nothing at all
	noAcks      bool            // takes ops and does not answer them
	reject      map[string]bool // keys whose ops are refused
	restamp     bool            // gives every op a stamp of its own
	holdBuckets int             // bucket answers are held back until so many wait
	leafFor     map[string]bool // paths answered with all records in one leaf
	reset       map[string]bool // maps whose first SYNC_INIT is answered with a reset
	status      int             // of POST /sync, 0 for 200
	pageSize    int             // of deltas, 0 for all
	held        []func()
}

type serverMap struct {
	lwwmap.Map
	arrivals []string // keys in the order in which they arrived, for deltas
}

type serverSession struct {
	conn *websocket.Conn
	maps map[string]bool
	mu   sync.Mutex // one frame at a time
}

func newTestServer(t *testing.T) *testServer {
	s := &testServer{
		clock:    hlc.NewClock("test-server", time.Now),
		maps:     make(map[string]*serverMap),
		sessions: make(map[*serverSession]struct{}),
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /sync", s.serveSync)
	mux.HandleFunc("/", s.serveWebSocket)
	s.Server = httptest.NewServer(mux)
	t.Cleanup(func() {
		s.closeSessions()
		s.Close()
	})
	return s
}

func (s *testServer) wsURL() string { return "ws" + strings.TrimPrefix(s.URL, "http") }

// locked runs f with the server's lock held.
func (s *testServer) locked(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

func (s *testServer) mapOf(name string) *serverMap {
	m := s.maps[name]
	if m == nil {
		m = new(serverMap)
		s.maps[name] = m
	}
	return m
}

// put merges a record as another client's write and tells the sessions.
func (s *testServer) put(mapName, key string, r lwwmap.Record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.apply(nil, wire.Op{MapName: mapName, Key: key, Record: r})
}

// putQuietly merges a record that no session hears of.
func (s *testServer) putQuietly(mapName, key string, r lwwmap.Record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	m := s.mapOf(mapName)
	if m.Merge(key, r) == lwwmap.Applied {
		m.arrivals = append(m.arrivals, key)
	}
}

func (s *testServer) record(mapName, key string) (r lwwmap.Record, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mapOf(mapName).Get(key)
}

func (s *testServer) digest(mapName string) [32]byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mapOf(mapName).Digest()
}

func (s *testServer) closeSessions() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.sessions {
		c.conn.CloseNow()
	}
}

// apply merges one op and sends events. The caller holds the lock.
func (s *testServer) apply(from *serverSession, op wire.Op) {
	m := s.mapOf(op.MapName)
	r := op.Record
	echo := false
	if s.restamp {
		r.Timestamp, echo = s.clock.Now(), true
	}
	if m.Merge(op.Key, r) == lwwmap.Applied {
		m.arrivals = append(m.arrivals, op.Key)
	}
	ev := event(op.MapName, op.Key, r)
	ev.Timestamp = s.clock.Now()
	for c := range s.sessions {
		if c.maps[op.MapName] && (c != from || echo) {
			c.send(ev)
		}
	}
}

func event(mapName, key string, r lwwmap.Record) *wire.ServerEvent {
	kind := wire.OpPut
	if r.Deleted() {
		kind = wire.OpRemove
	}
	return &wire.ServerEvent{Event: wire.Event{MapName: mapName, EventType: kind, Key: key, Record: r, HasRecord: true}}
}

func (c *serverSession) send(msg wire.Message) {
	c.mu.Lock()
	defer c.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_ = c.conn.Write(ctx, websocket.MessageBinary, msg.AppendTo(nil)) // the reader notices
}

func (s *testServer) serveWebSocket(w http.ResponseWriter, r *http.Request) {
	conn, err := websocket.Accept(w, r, nil)
	if err != nil {
		return
	}
	defer conn.CloseNow()
	conn.SetReadLimit(maxFrame)
	c := &serverSession{conn: conn, maps: make(map[string]bool)}
	s.locked(func() { s.sessions[c] = struct{}{} })
	defer s.locked(func() { delete(s.sessions, c) })
	if s.token != "" {
		c.send(&wire.AuthRequired{})
	}
	for {
		_, data, err := conn.Read(r.Context())
		if err != nil {
			return
		}
		msg, err := wire.DecodeClient(data, wire.DefaultLimits())
		if err != nil {
			conn.Close(websocket.StatusProtocolError, err.Error())
			return
		}
		s.mu.Lock()
		alive := s.mute || s.handle(c, msg)
		s.mu.Unlock()
		if !alive {
			return
		}
	}
}

func (s *testServer) handle(c *serverSession, msg wire.Message) bool {
	switch msg := msg.(type) {
	case *wire.Auth:
		if s.token != "" && msg.Token != s.token {
			c.send(&wire.AuthFail{Error: "bad token"})
			return false
		}
		c.send(&wire.AuthAck{ProtocolVersion: 1})
	case *wire.DeviceHello:
		if s.token == "" {
			c.send(&wire.DeviceAck{})
		}
	case *wire.Ping:
		c.send(&wire.Pong{Timestamp: msg.Timestamp, ServerTime: uint64(time.Now().UnixMilli())})
	case *wire.SyncInit:
		c.maps[msg.MapName] = true
		if s.reset[msg.MapName] {
			delete(s.reset, msg.MapName)
			c.send(&wire.SyncResetRequired{MapName: msg.MapName, Reason: "away for too long"})
			return true
		}
		c.send(s.root(msg.MapName))
	case *wire.MerkleReqBucket:
		s.asked = append(s.asked, msg)
		s.busy++
		s.mostBusy = max(s.mostBusy, s.busy)
		answer := s.bucket(msg)
		s.held = append(s.held, func() { s.busy--; c.send(answer) })
		if len(s.held) >= s.holdBuckets {
			s.release()
		}
	case *wire.OpBatch:
		s.takeBatch(c, msg.Ops)
	}
	return true
}

// release sends the bucket answers that were held back. The caller holds the lock.
func (s *testServer) release() {
	for _, answer := range s.held {
		answer()
	}
	s.held = nil
}

func (s *testServer) root(mapName string) *wire.SyncRespRoot {
	tree := merkle.NewTree(s.mapOf(mapName).Leaves(merkle.Mixed), merkle.Mixed)
	return &wire.SyncRespRoot{MapName: mapName, RootHash: tree.Root(), Timestamp: s.clock.Now()}
}

func (s *testServer) bucket(msg *wire.MerkleReqBucket) wire.Message {
	m := s.mapOf(msg.MapName)
	if len(msg.Path) < merkle.Depth && !s.leafFor[msg.Path] {
		tree := merkle.NewTree(m.Leaves(merkle.Mixed), merkle.Mixed)
		digits, hashes, _ := tree.Buckets(msg.Path)
		resp := &wire.SyncRespBuckets{MapName: msg.MapName, Path: msg.Path}
		for i, d := range digits {
			resp.Buckets = append(resp.Buckets, wire.Bucket{Digit: d, Hash: hashes[i]})
		}
		return resp
	}
	first, last, _ := merkle.LeafRange(msg.Path)
	resp := &wire.SyncRespLeaf{MapName: msg.MapName, Path: msg.Path}
	for key, r := range m.All() {
		if leaf := merkle.Leaf(merkle.Hash(key)); first <= leaf && leaf <= last {
			resp.Records = append(resp.Records, wire.KeyedRecord{Key: key, Record: r})
		}
	}
	return resp
}

func (s *testServer) takeBatch(c *serverSession, ops []wire.Op) {
	s.batches = append(s.batches, slices.Clone(ops))
	for _, op := range ops {
		if s.reject[op.Key] {
			c.send(&wire.OpRejected{OpID: op.ID, Reason: "FORBIDDEN: not this key", Code: 403})
			continue
		}
		s.apply(c, op)
	}
	if !s.noAcks {
		c.send(&wire.OpAck{LastID: ops[len(ops)-1].ID, AchievedLevel: "APPLIED"})
	}
}

func (s *testServer) serveSync(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.status != 0 {
		w.WriteHeader(s.status)
		return
	}
	if s.token != "" && r.Header.Get("Authorization") != "Bearer "+s.token {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	req, err := wire.DecodeSyncRequest(body, wire.DefaultLimits())
	if err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	resp := &wire.SyncResponse{ServerHLC: s.clock.Now()}
	if len(req.Operations) > 0 {
		s.batches = append(s.batches, slices.Clone(req.Operations))
		ack := &wire.SyncAck{LastID: req.Operations[len(req.Operations)-1].ID}
		for _, op := range req.Operations {
			if s.reject[op.Key] {
				ack.Results = append(ack.Results, wire.OpResult{OpID: op.ID, Error: "FORBIDDEN: not this key"})
				continue
			}
			s.apply(nil, op)
		}
		if !s.noAcks {
			resp.Ack = ack
		}
	}
	for _, sm := range req.SyncMaps {
		m := s.mapOf(sm.MapName)
		from := int(sm.LastSync.Counter)
		to := len(m.arrivals)
		if s.pageSize > 0 {
			to = min(to, from+s.pageSize)
		}
		d := wire.Delta{MapName: sm.MapName, HasMore: to < len(m.arrivals)}
		d.ServerSyncTimestamp = hlc.Timestamp{Millis: 1, Counter: uint64(to), NodeID: "log-1"}
		for _, key := range m.arrivals[from:to] {
			r, _ := m.Get(key)
			d.Records = append(d.Records, wire.DeltaRecord{Key: key, Record: r})
		}
		resp.Deltas = append(resp.Deltas, d)
	}
	for _, q := range req.Queries {
		parsed, err := query.Parse(q.Query, nil)
		if err != nil {
			resp.Errors = append(resp.Errors, wire.SyncError{Code: 400, Message: "QUERY: not understood", Context: q.QueryID})
			continue
		}
		result := wire.HTTPQueryResult{QueryID: q.QueryID}
		for key, r := range s.mapOf(q.MapName).All() {
			if r.VisibleAt(uint64(time.Now().UnixMilli())) && parsed.Match(key, r.Value) {
				result.Results = append(result.Results, wire.KeyValue{Key: key, Value: r.Value})
			}
		}
		if q.Limit > 0 && uint64(len(result.Results)) > q.Limit {
			result.Results = result.Results[:q.Limit]
			result.HasMore, result.NextCursor = true, strconv.FormatUint(q.Limit, 10)
		}
		resp.QueryResults = append(resp.QueryResults, result)
	}
	w.Header().Set("Content-Type", "application/x-msgpack")
	_, _ = w.Write(resp.AppendTo(nil)) // the client notices
}
