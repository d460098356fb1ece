package gateway

import (
	"context"
	"errors"
	"hash/maphash"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gobwas/ws"

	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/wire"
	"github.com/topgun-sync/topgun/services/gateway/auth"
)

const (
	// lingerTime is how long a closing connection may take to come to its end.
	lingerTime = 2 * time.Second
	// maxErrors is how many bad messages end a session.
	maxErrors = 10
	// floodRate and floodBurst bound, per second and at once, the messages that cost
	// the client nothing: pings, requests that are refused, bad messages, starts of a
	// sync, pushed diffs that nothing asked for. What waits for an answer (ops, bucket
	// requests) is bounded by its queue instead. A client with many maps starts a sync for each when it connects.
	floodRate  = 200
	floodBurst = 2000
	// greetAfter is how long a gateway without authentication waits for the first
	// word of a client before it says AUTH_ACK unasked: clients before 2026-04-23
	// wait for it for ever, all others speak first (PROTOCOL 3.3, 21).
	greetAfter = time.Second
)

// session is one client connection.
//
//	               upgrade
//	                  │
//	no token required │ token required: AUTH_REQUIRED is sent
//	    ┌─────────────┴──────────────┐
//	    │                            ▼
//	    │                        ┌────────┐  bad token: AUTH_FAIL ───▶ 4401
//	    │     AUTH, good token   │waiting │  AuthTimeout, or LoginTimeout
//	    │   ◀──── AUTH_ACK ──────│        │  after DEVICE_HELLO ─────▶ 4408
//	    ▼                        └────────┘  all else has no effect
//	┌───────┐
//	│ ready │  DEVICE_HELLO → DEVICE_ACK; AUTH again → AUTH_ACK, or nothing for
//	│       │  the same token, or ERROR 403 for somebody else; ops, syncs, PING
//	└───┬───┘
//	    │  token expired 4401; silent 1008; 10 bad messages 1008; flood 4429;
//	    │  too slow 4490; owners away 1013; protocol 1002, 1003, 1007, 1009;
//	    ▼  drain 1012 when the ops in flight are acked; close from the client
//	┌─────────┐  what is queued and cannot be dropped goes out, then the close
//	│ closing │  frame, then our half of the connection ends; what arrives is
//	└───┬─────┘  thrown away until the client's half ends, 2 s at most
//	    ▼
//	  ended      ops in flight still get their receipts, which nobody reads
//
// One goroutine reads and handles messages in order, and answers what can be answered
// without waiting. The others exist only while they have work: one writes, up to
// syncWorkers answer sync requests, one for each batch of ops waits for its receipts.
type session struct {
	k      *sockets
	id     uint64
	origin string // names the session in changes
	conn   net.Conn
	addr   netip.Addr
	at     string // the address that the client connected to, for PARTITION_MAP
	opened time.Time
	ctx    context.Context // ends with the connection
	cancel context.CancelFunc
	wg     sync.WaitGroup

	left bool // of the hub, whose mu guards it

	reader  frameReader
	writeBy atomic.Int64 // deadline of the write under way, Unix nanoseconds; or 0

	// Of the reading goroutine alone.
	errors    int
	tokens    float64 // of the flood limit
	tokensAt  int64
	tokenHash uint64 // of the accepted token
	devToken  string

	mu           sync.Mutex
	room         sync.Cond // something left a queue, or the session shuts
	principal    auth.Principal
	ready        bool
	hello        bool // DEVICE_HELLO came
	spoke        bool // anything came
	combine      merkle.Combine
	mixed        bool // it is certain that combine is Mixed
	closing      *closeReason
	leaving      bool // to be closed as soon as no op is in flight
	ended        bool // no goroutine may be started
	out          outbox
	deviceID     string // written by the reading goroutine alone
	device       *device
	prunedTo     uint64 // what the client was told to forget, in Unix ms
	maps         map[string]*interest
	counters     map[string]struct{} // that it is told of
	owed         map[string]bool     // names, as the hub has them, that it must be told of anew
	behind       bool                // it is closing, and did not get all that it was to be told
	cut          bool                // it is closing, and did not get all that a sync asked for
	probes       map[string]*probe
	subs         map[string]*querySub   // live queries, by queryId
	topics       map[string]struct{}    // that it is subscribed to
	owedQueries  map[*querySub]struct{} // queries that must get a result
	publishing   publishing
	journal      *journal // nil without subscriptions
	journalReads int
	jobs         []job
	jobBytes     int // of the frames that jobs keep
	workers      int
	pushes       pushes
	ops          opLine
	locks        locks
}

func newSession(k *sockets, id uint64, conn net.Conn, addr netip.Addr, at string, early []byte) *session {
	now := k.now()
	s := &session{
		k:        k,
		id:       id,
		origin:   k.originOf(id),
		conn:     conn,
		addr:     addr,
		at:       at,
		opened:   now,
		ready:    !k.verifier.Required(),
		tokens:   floodBurst,
		tokensAt: now.UnixNano(),
	}
	s.principal.Anonymous = s.ready
	s.ctx, s.cancel = context.WithCancel(k.base)
	s.room.L = &s.mu
	s.reader = frameReader{
		conn: conn, now: k.now, patience: k.cfg.BodyTimeout, budget: &k.inbound, unread: early, state: ws.StateServerSide,
	}
	s.reader.seen.Store(now.UnixNano())
	return s
}

// serve runs the session until its connection and everything it started has ended.
func (s *session) serve() {
	if !s.ready {
		s.send(urgent, &wire.AuthRequired{})
	}
	s.end(s.read())
}

// end closes the connection and waits for what the session started. It is apart from
// serve so that its variables do not lie on the stack of every idle session.
//
//go:noinline
func (s *session) end(reason closeReason) {
	s.reader.release()
	s.beginClose(reason)
	s.discard()

	s.mu.Lock()
	s.ended = true
	s.out.lost = true
	s.room.Broadcast()
	reason, user := *s.closing, s.principal.UserID
	s.mu.Unlock()
	_ = s.conn.Close() // whatever state it is in
	s.cancel()
	s.k.devices.look(s)
	s.endQueries()
	s.endTopics()
	s.k.hub.leave(s)
	s.k.keeper.left(s)
	s.k.remove(s)
	s.k.meters.closed()
	s.k.log.Info("session closed", "session", s.id, "user", user, "remote", s.conn.RemoteAddr().String(),
		"code", int(reason.code), "reason", reason.text, "open", s.k.now().Sub(s.opened).Round(time.Millisecond))
	s.wg.Wait()
}

// read handles messages until the session is to end, and says why. An idle session
// waits in fill, few calls deep: the runtime gives a goroutine that is found with most
// of its stack unused a smaller one, and for an idle session the stack is what it costs.
func (s *session) read() closeReason {
	for {
		err := s.reader.fill()
		if err == nil {
			err = s.readMessage()
		}
		if err != nil {
			return reasonOf(err)
		}
	}
}

// readMessage takes the next message and handles it.
//
//go:noinline
func (s *session) readMessage() error {
	limit := s.k.cfg.MaxMessageBytes
	s.mu.Lock()
	if !s.ready {
		limit = s.k.cfg.MaxPreAuthMessageBytes
	}
	s.mu.Unlock()
	message, held, err := s.reader.next(limit, s.control)
	if err != nil {
		return err
	}
	return s.handle(message, held)
}

func reasonOf(err error) closeReason {
	var reason closeReason
	var peer peerClosed
	switch {
	case errors.As(err, &reason):
		return reason
	case errors.As(err, &peer):
		return closeReason{peer.code, peer.Error()} // answered with the same code
	}
	return closeLost // a socket error, or the deadline that beginClose set
}

// control handles WebSocket pings and pongs.
func (s *session) control(op ws.OpCode, payload []byte) error {
	s.k.meters.received(inControl)
	if !s.allow() {
		return s.flooded()
	}
	if op == ws.OpPing {
		s.sendFrame(urgent, appendFrame(nil, ws.OpPong, payload))
	}
	return nil
}

// allow takes a token of the flood limit.
func (s *session) allow() bool {
	now := s.reader.seen.Load()
	s.tokens = min(floodBurst, s.tokens+float64(now-s.tokensAt)*floodRate/float64(time.Second))
	s.tokensAt = now
	s.tokens--
	return s.tokens >= 0
}

func (s *session) flooded() error {
	s.send(urgent, &wire.ErrorMessage{Code: 429, Message: "FLOOD: too many messages; slow down"})
	return closeFlood
}

// handle decodes and dispatches one message. held is what its bytes hold of the
// inbound budget. An error ends the session.
func (s *session) handle(bytes []byte, held int64) error {
	message, err := wire.DecodeClient(bytes, s.k.limits())
	s.mu.Lock()
	s.spoke = true
	ready, ignored := s.ready, s.closing != nil || s.leaving
	s.mu.Unlock()
	batch, isBatch := message.(*wire.OpBatch)
	if err == nil && isBatch && ready && !ignored {
		s.k.meters.received(inOps)
		return s.submit(batch, len(bytes), held) // gives held back when the ops are done
	}
	frame := inbound{size: len(bytes), held: held}
	defer func() { s.k.inbound.give(frame.held) }() // unless a job keeps it
	switch {
	case ignored:
		return nil // the client will send it again over its next connection
	case !ready:
		return s.handleWaiting(message, err)
	case err != nil:
		s.k.meters.received(inBad)
		if bad, ok := errors.AsType[*wire.Error](err); ok && bad.OpsLost {
			s.mu.Lock()
			s.ops.skipped = true
			s.mu.Unlock()
		}
		return s.refuse(err)
	}
	switch m := message.(type) {
	case *wire.MerkleReqBucket:
		s.k.meters.received(inBucket)
		return s.bucketRequested(kindLWW, m.MapName, m.Path)
	case *wire.ORMapMerkleReqBucket:
		s.k.meters.received(inBucket)
		return s.bucketRequested(kindOR, m.MapName, m.Path)
	case *wire.ORMapPushDiff:
		s.k.meters.received(inSync)
		return s.diffPushed(m, &frame)
	}
	if !s.allow() {
		return s.flooded()
	}
	switch m := message.(type) {
	case *wire.Ping:
		s.k.meters.received(inPing)
		s.send(urgent, &wire.Pong{Timestamp: m.Timestamp, ServerTime: uint64(max(0, s.k.now().UnixMilli()))})
	case *wire.SyncInit:
		s.k.meters.received(inSync)
		return s.syncRequested(kindLWW, m.MapName, m.LastSyncTimestamp, false)
	case *wire.ORMapSyncInit:
		s.k.meters.received(inSync)
		s.learnCombine(m)
		return s.syncRequested(kindOR, m.MapName, m.LastSyncTimestamp, m.RootHash == 0)
	case *wire.ORMapDiffRequest:
		s.k.meters.received(inSync)
		return s.diffRequested(m, &frame)
	case *wire.ClientApplyAck:
		s.k.meters.received(inSync) // of epochs, which are not used here (PROTOCOL 9.4)
	case *wire.CounterRequest:
		s.k.meters.received(inCounter)
		return s.counterRequested(m)
	case *wire.CounterSync:
		s.k.meters.received(inCounter)
		return s.counterSynced(m, &frame)
	case *wire.LockRequest:
		s.k.meters.received(inLock)
		return s.lockRequested(m)
	case *wire.LockRelease:
		s.k.meters.received(inLock)
		return s.lockReleased(m)
	case *wire.PartitionMapRequest:
		s.k.meters.received(inOther)
		s.send(urgent, s.partitionMap(m.CurrentVersion))
	case *wire.Auth:
		s.k.meters.received(inAuth)
		return s.authAgain(m)
	case *wire.DeviceHello:
		s.k.meters.received(inAuth)
		s.identify(m.DeviceToken)
		s.certainlyMixed()
		s.send(urgent, &wire.DeviceAck{DeviceID: s.deviceID, DeviceToken: s.devToken})
	default:
		return s.handleFeed(message)
	}
	return nil
}

// handleFeed handles what asks for a feed: of a query, a topic or the journal.
func (s *session) handleFeed(message wire.Message) error {
	switch m := message.(type) {
	case *wire.QuerySub:
		s.k.meters.received(inQuery)
		return s.subscribed(m)
	case *wire.QueryUnsub:
		s.k.meters.received(inQuery)
		s.unsubscribed(m.QueryID)
	case *wire.TopicSub:
		s.k.meters.received(inTopic)
		return s.topicSubscribed(m)
	case *wire.TopicUnsub:
		s.k.meters.received(inTopic)
		s.topicUnsubscribed(m)
	case *wire.TopicPub:
		s.k.meters.received(inTopic)
		return s.topicPublished(m)
	case *wire.JournalRead:
		s.k.meters.received(inJournal)
		s.journalRead(m)
	case *wire.JournalSubscribe:
		s.k.meters.received(inJournal)
		return s.journalSubscribed(m)
	case *wire.JournalUnsubscribe:
		s.k.meters.received(inJournal)
		s.journalUnsubscribed(m.SubscriptionID)
	default:
		s.k.meters.received(inOther)
		return s.refuseUnserved(message)
	}
	return nil
}

// handleWaiting handles a message before authentication: only AUTH has an effect,
// and nothing extends the time to authenticate. Clients without a token send
// DEVICE_HELLO first and may authenticate later (PROTOCOL 3.3), so nothing but a bad
// AUTH ends the session.
func (s *session) handleWaiting(message wire.Message, err error) error {
	if !s.allow() {
		return closeFlood
	}
	switch m := message.(type) {
	case *wire.Auth:
		s.k.meters.received(inAuth)
		return s.authFirst(m)
	case *wire.DeviceHello:
		s.k.meters.received(inAuth)
		s.identify(m.DeviceToken)
		s.certainlyMixed()
		s.mu.Lock()
		s.hello = true
		s.mu.Unlock()
	default:
		if err != nil {
			s.k.meters.received(inBad)
		} else {
			s.k.meters.received(inOther)
		}
	}
	return nil
}

// protocolVersion is the one version there is (PROTOCOL 21).
const protocolVersion = 1

func (s *session) checkVersion(m *wire.Auth) error {
	if m.ProtocolVersion <= protocolVersion {
		return nil
	}
	s.send(urgent, &wire.ErrorMessage{Code: 400, Message: "VERSION_UNSUPPORTED: this server speaks protocol version 1"})
	return closeVersion
}

// tokenSeed keys the fingerprints by which a repeated token is recognised. It is one
// process' own, so that nothing can be prepared against it.
var tokenSeed = maphash.MakeSeed()

func (s *session) authFirst(m *wire.Auth) error {
	if err := s.checkVersion(m); err != nil {
		return err
	}
	principal, err := s.verify(m.Token)
	if err != nil {
		s.send(urgent, &wire.AuthFail{Error: "AUTH_FAILED: the token is not valid", Code: 401})
		return closeAuthFailed
	}
	s.tokenHash = maphash.String(tokenSeed, m.Token)
	s.identify(m.DeviceToken)
	if m.DeviceToken != "" {
		s.certainlyMixed()
	}
	s.mu.Lock()
	s.principal, s.ready = principal, true
	s.mu.Unlock()
	s.authAck(principal)
	return nil
}

// verify asks the verifier, which slows the answer down for an address with many
// wrong tokens. The address is the connection's, never one that the client names.
func (s *session) verify(token string) (auth.Principal, error) {
	return s.k.verifier.Verify(auth.WithAddress(s.ctx, s.addr), token)
}

// authAgain handles AUTH on a session that needs none any more. Clients answer
// AUTH_REQUIRED with a second AUTH after the first was accepted (PROTOCOL 3.2), and
// send pending ops once more for every AUTH_ACK, so a repeated token is not answered.
func (s *session) authAgain(m *wire.Auth) error {
	if err := s.checkVersion(m); err != nil {
		return err
	}
	if m.DeviceToken != "" {
		s.certainlyMixed()
	}
	if !s.k.verifier.Required() {
		s.identify(m.DeviceToken)
		s.authAck(auth.Principal{Anonymous: true})
		return nil
	}
	hash := maphash.String(tokenSeed, m.Token)
	if hash == s.tokenHash {
		return nil
	}
	principal, err := s.verify(m.Token)
	if err != nil {
		// The session goes on as who it is until its own token expires.
		return s.refuse(&wire.Error{Name: "AUTH_FAILED", Code: 401, Text: "the token is not valid"})
	}
	s.mu.Lock()
	same := principal.UserID == s.principal.UserID
	if same {
		s.principal = principal
	}
	s.mu.Unlock()
	if !same {
		return s.refuse(&wire.Error{
			Name: "FORBIDDEN", Code: 403, Text: "this connection belongs to another user; open one of your own",
		})
	}
	s.tokenHash = hash
	s.authAck(principal)
	return nil
}

func (s *session) authAck(p auth.Principal) {
	ack := &wire.AuthAck{ProtocolVersion: protocolVersion, UserID: p.UserID}
	if s.deviceID != "" {
		ack.DeviceID, ack.DeviceToken = s.deviceID, s.devToken
	}
	s.send(urgent, ack)
}

// certainlyMixed notes evidence for the present rule of combining hashes.
func (s *session) certainlyMixed() {
	s.mu.Lock()
	s.mixed, s.combine = true, merkle.Mixed
	s.mu.Unlock()
}

// decline answers a message that is well formed and asks for too much. It does not
// count as bad: a client that repeats it with every connection would otherwise never
// get what it may have.
func (s *session) decline(err *wire.Error) error {
	s.send(urgent, &wire.ErrorMessage{Code: err.Code, Message: err.Error()})
	return nil
}

// refuse answers a bad message, and ends the session after maxErrors of them.
func (s *session) refuse(err error) error {
	answer := &wire.ErrorMessage{Code: 400, Message: "BAD_MESSAGE: the message cannot be read"}
	if bad, ok := errors.AsType[*wire.Error](err); ok {
		answer = &wire.ErrorMessage{Code: bad.Code, Message: bad.Error()}
	}
	s.send(urgent, answer)
	if s.errors++; s.errors >= maxErrors {
		return closeErrors
	}
	if !s.allow() {
		return s.flooded()
	}
	return nil
}

// check is called by the sweeper, about once a second.
func (s *session) check(now time.Time) {
	nanos := now.UnixNano()
	passed := func(deadline int64) bool { return deadline != 0 && nanos > deadline }
	since := now.Sub(time.Unix(0, s.reader.seen.Load()))
	s.mu.Lock()
	var reason *closeReason
	timeout := s.k.cfg.AuthTimeout
	if s.hello {
		timeout = s.k.cfg.LoginTimeout
	}
	expires := s.principal.Expires
	greet := s.ready && !s.spoke && s.principal.Anonymous && now.Sub(s.opened) >= greetAfter
	switch {
	case s.closing != nil:
	case passed(s.writeBy.Load()):
		reason = &closeSlow
	case passed(s.reader.by.Load()):
		reason = &closeDribble
	case !s.ready && now.Sub(s.opened) > timeout:
		reason = &closeAuthTimeout
	case !expires.IsZero() && now.After(expires):
		reason = &closeExpired
	case since > s.k.cfg.IdleTimeout:
		reason = &closeIdle
	case greet:
		s.spoke = true // once is enough
	}
	if s.closing == nil && reason == nil {
		s.checkProbesLocked(now)
	}
	s.mu.Unlock()
	switch {
	case reason != nil:
		s.beginClose(*reason)
	case greet:
		s.send(urgent, &wire.AuthAck{})
	}
}

// retire ends the session with 1012 as soon as its ops in flight are acked; from now
// on it takes no more.
func (s *session) retire() {
	s.mu.Lock()
	s.leaving = true
	s.ops.pressLocked()
	idle := s.ops.idle()
	s.mu.Unlock()
	if idle {
		s.beginClose(closeRestart)
	}
}

// beginClose makes the session close, for the first reason that is given. It does
// not wait.
func (s *session) beginClose(reason closeReason) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing != nil {
		return
	}
	s.closing = &reason
	s.behind = s.out.events > 0 || len(s.owed) > 0
	s.cut = s.cut || s.answeringLocked()
	s.out.lanes[bulk], s.out.events, s.out.eventBytes, s.out.syncBytes = nil, 0, 0, 0
	clear(s.owed)
	clear(s.owedQueries)
	s.dropJobsLocked()
	s.dropPushesLocked()
	s.out.last = appendFrame(nil, ws.OpClose, closeBody(reason))
	s.room.Broadcast()
	s.startWriterLocked()
	// The deadlines wake a reading goroutine that waits for the client, and a writing
	// one that waits for a client that does not read.
	_ = s.conn.SetReadDeadline(time.Now().Add(s.k.linger))
	_ = s.conn.SetWriteDeadline(time.Now().Add(s.k.linger))
}

// discard throws away what the client still sends, until it ends its half of the
// connection or the linger time is over: closing a socket with unread bytes would
// reset the connection, and the close frame with it.
func (s *session) discard() {
	for {
		if _, err := s.conn.Read(s.reader.small[:]); err != nil {
			return
		}
	}
}

// spawnLocked starts a goroutine that serve waits for; s.mu is held. It returns
// false if the session has ended.
func (s *session) spawnLocked(f func()) bool {
	if s.ended {
		return false
	}
	s.wg.Go(f)
	return true
}

// info describes the session to operators.
func (s *session) info() sessionInfo {
	s.mu.Lock()
	defer s.mu.Unlock()
	info := sessionInfo{
		id:           s.id,
		userID:       s.principal.UserID,
		remote:       s.conn.RemoteAddr().String(),
		openedMillis: uint64(max(0, s.opened.UnixMilli())),
		queuedBytes:  uint64(s.out.queuedBytes()),
	}
	for name := range s.maps {
		info.maps = append(info.maps, name)
	}
	slices.Sort(info.maps)
	return info
}
