package client

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/coder/websocket"

	"github.com/topgun-sync/topgun/core/wire"
)

const (
	// What a server takes in one message (RELIABILITY 3), with room to spare.
	maxBatchOps   = 1000
	maxBatchBytes = 1 << 20
	// Servers keep frames near 256 KB (PROTOCOL 8.2); this only bounds memory.
	maxFrame = 16 << 20
)

var errTokenWanted = errors.New("the server wants a token and Config.Token is nil")

// session is one WebSocket connection.
//
// Three goroutines live as long as it does: read handles the server's frames in
// order, write sends whatever the client's state asks for, watch gives up a
// silent connection. The first that ends takes the others along. There is no
// queue between them: the writer looks at the log and the maps when it is woken.
type session struct {
	client *Client
	conn   *websocket.Conn
	accept func() // called once by read: the server has accepted us
	parked func() // called by read: the server wants a token that we do not have
	hasTok bool   // AUTH was sent, and only AUTH_ACK accepts us

	// The client's lock guards what follows.
	sent  uint64    // id of the last operation sent on this connection
	heard time.Time // when the last frame came
}

// serveWebSocket connects once and returns why the connection ended.
func (c *Client) serveWebSocket(ctx context.Context) error {
	var token string
	if c.cfg.Token != nil {
		var err error
		if token, err = c.cfg.Token(ctx); err != nil {
			return fmt.Errorf("get a token: %w", err)
		}
	}
	dialCtx, cancelDial := context.WithTimeout(ctx, c.cfg.timing.connect)
	defer cancelDial()
	conn, _, err := websocket.Dial(dialCtx, c.cfg.URL, &websocket.DialOptions{HTTPClient: c.http}) //nolint:bodyclose // Dial closes it
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer conn.CloseNow()
	conn.SetReadLimit(maxFrame)

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	accepted, parked := make(chan struct{}), make(chan struct{})
	s := &session{
		client: c,
		conn:   conn,
		accept: sync.OnceFunc(func() { close(accepted) }),
		parked: sync.OnceFunc(func() { close(parked) }),
		hasTok: token != "",
		heard:  time.Now(),
	}
	var wg sync.WaitGroup
	wg.Go(func() { cancel(s.read(ctx)) })
	wg.Go(func() { cancel(s.watch(ctx, accepted)) })
	wg.Go(func() { cancel(s.write(ctx, token, accepted, parked)) })
	wg.Wait()
	return context.Cause(ctx)
}

// read handles frames until the connection ends.
func (s *session) read(ctx context.Context) error {
	for {
		kind, data, err := s.conn.Read(ctx)
		if err != nil {
			return fmt.Errorf("read: %w", err)
		}
		s.client.cfg.OnFrame(Frame{Data: data})
		s.client.mu.Lock()
		s.heard = time.Now()
		s.client.mu.Unlock()
		if kind != websocket.MessageBinary {
			continue // servers send msgpack; JSON text is a debugging aid of the original
		}
		msg, err := wire.DecodeServer(data)
		if err != nil {
			s.client.log.Warn("frame not understood", "error", err)
			continue // as PROTOCOL 2.2: a frame from a newer server must not end the session
		}
		if err := s.handle(msg); err != nil {
			return err
		}
	}
}

// watch ends a connection on which the server has been silent for too long. Any
// frame counts as life, because a PONG may wait behind a large answer.
func (s *session) watch(ctx context.Context, accepted <-chan struct{}) error {
	select {
	case <-accepted: // before, the writer has its own deadline
	case <-ctx.Done():
		return ctx.Err()
	}
	tick := time.NewTicker(s.client.cfg.timing.ping)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		s.client.mu.Lock()
		silent := time.Since(s.heard)
		s.client.mu.Unlock()
		if silent > s.client.cfg.timing.silence {
			return ErrSilent
		}
	}
}

// write introduces the client, and then sends operations, requests and PINGs.
func (s *session) write(ctx context.Context, token string, accepted, parked <-chan struct{}) error {
	if err := s.authenticate(ctx, token, accepted, parked); err != nil {
		return err
	}
	s.accept()
	s.client.mu.Lock()
	s.client.setState(Ready, nil)
	s.client.mu.Unlock()

	ping := time.NewTicker(s.client.cfg.timing.ping)
	defer ping.Stop()
	for {
		for msg := s.next(); msg != nil; msg = s.next() {
			if err := s.send(ctx, msg); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.client.wake:
		case <-ping.C:
			if err := s.send(ctx, wire.PingAt(uint64(max(0, s.client.cfg.Now().UnixMilli())))); err != nil {
				return err
			}
		}
	}
}

// authenticate sends the first frame and waits until the server has accepted the
// client (PROTOCOL 24.2).
func (s *session) authenticate(ctx context.Context, token string, accepted, parked <-chan struct{}) error {
	var first wire.Message = &wire.DeviceHello{}
	patience := s.client.cfg.timing.grace
	if s.hasTok {
		first = &wire.Auth{Token: token}
		patience = s.client.cfg.timing.silence
	}
	if err := s.send(ctx, first); err != nil {
		return err
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-accepted:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		if s.hasTok {
			return errors.New("no answer to the token in time")
		}
		return nil // a server of an older generation has nothing to say (PROTOCOL 3.2)
	case <-parked:
	}
	s.client.mu.Lock()
	s.client.setState(AuthRequired, errTokenWanted)
	s.client.mu.Unlock()
	select {
	case <-accepted:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *session) send(ctx context.Context, msg wire.Message) error {
	frame := msg.AppendTo(nil)
	s.client.cfg.OnFrame(Frame{Sent: true, Data: frame})
	// A peer that takes nothing is as dead as one that says nothing.
	ctx, cancel := context.WithTimeout(ctx, s.client.cfg.timing.silence)
	defer cancel()
	if err := s.conn.Write(ctx, websocket.MessageBinary, frame); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	return nil
}

// next returns the next message that the client's state asks for, or nil. The
// operations come first: after a reconnect the server shall have them before it
// is asked for its root.
func (s *session) next() wire.Message {
	c := s.client
	c.mu.Lock()
	defer c.mu.Unlock()
	if ops, last := c.ops.batch(s.sent, maxBatchOps, maxBatchBytes); len(ops) > 0 {
		s.sent = last
		return &wire.OpBatch{Ops: ops}
	}
	for _, m := range c.maps {
		if !m.initSent {
			m.initSent = true
			return &wire.SyncInit{MapName: m.name, LastSyncTimestamp: m.lastSync}
		}
	}
	inFlight := 0
	for _, m := range c.maps {
		inFlight += len(m.walk.asked)
	}
	if inFlight >= maxInFlight {
		return nil // an answer wakes the writer again
	}
	for _, m := range c.maps {
		if path, ok := m.walk.next(); ok {
			return &wire.MerkleReqBucket{MapName: m.name, Path: path}
		}
	}
	return nil
}

// handle does what one message of the server asks for.
func (s *session) handle(msg wire.Message) error {
	c := s.client
	switch msg := msg.(type) {
	case *wire.AuthRequired:
		if s.hasTok {
			return nil // AUTH went out already and is not repeated
		}
		s.parked()
		if state, _ := c.State(); state == Ready {
			return errTokenWanted // we took its silence for consent; it has ignored what we sent
		}
		return nil
	case *wire.AuthFail:
		return ErrAuthFailed
	case *wire.Batch:
		for _, inner := range msg.Messages {
			if err := s.handle(inner); err != nil {
				return err
			}
		}
		return nil
	case *wire.ErrorMessage:
		c.log.Warn("error from the server", "code", msg.Code, "message", msg.Message)
		if s.hasTok {
			return nil // says nothing about the token
		}
	case *wire.OpAck:
		c.acknowledge(msg.LastID, msg.Results, s.sentID())
		c.mu.Lock()
		c.observe(msg.Timestamp)
		for _, m := range c.maps {
			m.stillSynced(msg.Timestamp)
		}
		c.mu.Unlock()
	case *wire.OpRejected:
		c.reject(*msg, s.sentID())
	case *wire.SyncRespRoot, *wire.SyncRespBuckets, *wire.SyncRespLeaf, *wire.SyncResetRequired,
		*wire.ServerEvent, *wire.ServerBatchEvent:
		c.mu.Lock()
		s.sync(msg)
		c.mu.Unlock()
		c.wakeUp()
	}
	if _, isAck := msg.(*wire.AuthAck); isAck || !s.hasTok {
		s.accept() // without a token any message means that the server needs none (PROTOCOL 3.2)
	}
	return nil
}

func (s *session) sentID() uint64 {
	s.client.mu.Lock()
	defer s.client.mu.Unlock()
	return s.sent
}
