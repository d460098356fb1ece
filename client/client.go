package client

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/wire"
)

var (
	// ErrClosed is returned by what needs an open client.
	ErrClosed = errors.New("client is closed")
	// ErrBacklog refuses a write while Config.MaxPending operations wait for the
	// server's acknowledgement.
	ErrBacklog = errors.New("too many operations wait for an acknowledgement")
	// ErrAuthFailed ended a connection: the server refused the token. The client
	// asks Config.Token again and goes on trying.
	ErrAuthFailed = errors.New("the server refused the token")
	// ErrSilent ended a connection: nothing came from the server for 15 seconds.
	ErrSilent = errors.New("no frame from the server for too long")
	// ErrTransport is returned by what the transport of Config.URL cannot do.
	ErrTransport = errors.New("not possible over this transport; open the client with an http:// or https:// URL")
)

// State is what a client's connection is doing.
type State int

// The states of a connection.
//
//	Offline ──Online──▶ Connecting ──▶ Ready
//	   ▲                  ▲   │  ▲       │
//	   └──Offline, Close──┘   │  └─lost──┘
//	                          └──▶ AuthRequired (the server wants a token and
//	                               Config.Token is nil; back to Connecting
//	                               when the server closes)
const (
	Offline State = iota
	Connecting
	AuthRequired
	Ready
)

// String returns the name of the state.
func (s State) String() string {
	switch s {
	case Offline:
		return "offline"
	case Connecting:
		return "connecting"
	case AuthRequired:
		return "auth required"
	case Ready:
		return "ready"
	}
	return "unknown"
}

// Client holds local maps and keeps them in sync with a server. Its methods may
// be called concurrently.
type Client struct {
	cfg    Config
	log    *slog.Logger
	http   *http.Client
	cancel context.CancelFunc
	done   chan struct{} // closed when the connection's goroutine has ended

	mu        sync.Mutex
	clock     *hlc.Clock
	maps      map[string]*Map
	ops       opLog
	queries   []*pendingQuery // one-shot queries that no response has answered; each has a caller that waits
	lastQuery uint64
	state     State
	lastErr   error // why the last connection ended
	offline   bool
	closed    bool
	hangUp    context.CancelFunc // ends the current connection; nil without one

	wake    chan struct{} // capacity 1: the connection has something to send, or Online was called
	changed chan struct{} // closed and replaced when something that waiters look at has changed
}

// Open returns a client and starts connecting. It does not wait for the server:
// see WaitReady. The client works until ctx ends or Close is called.
func Open(ctx context.Context, cfg Config) (*Client, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	c := &Client{
		cfg:     cfg,
		log:     cfg.Logger,
		http:    &http.Client{Transport: &http.Transport{Proxy: http.ProxyFromEnvironment}},
		done:    make(chan struct{}),
		clock:   hlc.NewClock(cfg.NodeID, cfg.Now),
		maps:    make(map[string]*Map),
		state:   Connecting,
		wake:    make(chan struct{}, 1),
		changed: make(chan struct{}),
	}
	for _, name := range cfg.Maps {
		if m := c.Map(name); m.err != nil {
			return nil, fmt.Errorf("client config: Maps: %w", m.err)
		}
	}
	connect := c.serveWebSocket
	if u, _ := url.Parse(cfg.URL); strings.HasPrefix(u.Scheme, "http") {
		connect = c.servePolling
	}
	ctx, c.cancel = context.WithCancel(ctx)
	go func() {
		defer close(c.done)
		c.run(ctx, connect)
	}()
	return c, nil
}

// Close ends the connection and every goroutine of the client, and returns when
// they have ended. Operations that the server has not acknowledged are lost;
// call Flush first to wait for them.
func (c *Client) Close() {
	c.mu.Lock()
	c.closed = true
	c.notify()
	c.mu.Unlock()
	c.cancel()
	<-c.done
	c.http.CloseIdleConnections()
}

// NodeID returns the name of this replica.
func (c *Client) NodeID() string { return c.cfg.NodeID }

// Map returns the map of that name and opens it if it is not open yet; an open
// map is kept in sync. It always returns the same Map for a name. If the name is
// not a map name, every write to the Map returns the reason.
func (c *Client) Map(name string) *Map {
	c.mu.Lock()
	defer c.mu.Unlock()
	if m := c.maps[name]; m != nil {
		return m
	}
	m := newMap(c, name)
	if err := wire.CheckMapName(name); err != nil {
		m.err = err
		return m
	}
	c.maps[name] = m
	c.wakeUp()
	return m
}

// State returns what the connection is doing, and why the last one ended, if one
// has.
func (c *Client) State() (State, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state, c.lastErr
}

// WaitReady waits until the server has accepted the client.
func (c *Client) WaitReady(ctx context.Context) error {
	err := c.await(ctx, func() bool { return c.state == Ready })
	if err != nil {
		state, last := c.State()
		return errors.Join(fmt.Errorf("wait for the server, state %v: %w", state, err), last)
	}
	return nil
}

// Pending returns how many operations the server has not answered.
func (c *Client) Pending() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.ops.pending)
}

// Flush waits until the server has acknowledged, or refused, every operation
// that was written before the call.
func (c *Client) Flush(ctx context.Context) error {
	c.mu.Lock()
	last := c.ops.last
	c.mu.Unlock()
	err := c.await(ctx, func() bool {
		first := c.ops.first()
		return first == 0 || first > last
	})
	if err != nil {
		_, lastErr := c.State()
		return errors.Join(fmt.Errorf("flush, %d operations pending: %w", c.Pending(), err), lastErr)
	}
	return nil
}

// Offline ends the connection and keeps the client from connecting until Online
// is called. When it returns nothing that arrives changes a map any more. It must
// not be called by OnFrame or OnReject.
func (c *Client) Offline() {
	c.mu.Lock()
	c.offline = true
	if c.hangUp != nil {
		c.hangUp()
	}
	c.mu.Unlock()
	// It ends, since the connection was told to; an error says that the client is closed.
	_ = c.await(context.Background(), func() bool { return c.hangUp == nil })
}

// Online lets the client connect again, at once.
func (c *Client) Online() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.offline = false
	c.wakeUp()
	c.notify()
}

// run keeps a connection until ctx ends.
func (c *Client) run(ctx context.Context, connect func(context.Context) error) {
	for attempt := 0; ctx.Err() == nil; attempt++ {
		if !c.waitOnline(ctx) {
			break
		}
		connCtx, hangUp := context.WithCancel(ctx)
		c.mu.Lock()
		c.hangUp = hangUp
		if c.offline { // Offline came in between and saw no connection
			hangUp()
		}
		c.setState(Connecting, c.lastErr)
		c.mu.Unlock()

		err := connect(connCtx)

		hangUp()
		c.mu.Lock()
		if c.state == Ready {
			attempt = 0
		}
		c.hangUp = nil
		for _, m := range c.maps {
			m.disconnected()
		}
		offline := c.offline
		if offline {
			c.setState(Offline, err)
		} else {
			c.setState(Connecting, err)
		}
		c.mu.Unlock()
		if ctx.Err() != nil {
			break
		}
		c.log.Info("connection ended", "error", err)
		if offline {
			attempt = -1 // Online connects at once
			continue
		}
		c.pause(ctx, attempt)
	}
	c.mu.Lock()
	c.closed = true
	c.setState(Offline, c.lastErr)
	c.mu.Unlock()
}

// waitOnline waits until the client may connect. It returns false when ctx ended.
func (c *Client) waitOnline(ctx context.Context) bool {
	return c.await(ctx, func() bool { return !c.offline }) == nil
}

// pause waits for the delay before the next attempt, or until Offline is called.
func (c *Client) pause(ctx context.Context, attempt int) {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.retryDelay(attempt))
	defer cancel()
	_ = c.await(ctx, func() bool { return c.offline }) // the time being over is the normal end
}

// await waits until ok, which is called with the lock held, returns true.
func (c *Client) await(ctx context.Context, ok func() bool) error {
	for {
		c.mu.Lock()
		done, closed, changed := ok(), c.closed, c.changed
		c.mu.Unlock()
		switch {
		case done:
			return nil
		case closed:
			return ErrClosed
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}

// notify makes waiters look again. The caller holds the lock.
func (c *Client) notify() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// wakeUp tells the connection that there is something to send.
func (c *Client) wakeUp() {
	select {
	case c.wake <- struct{}{}:
	default: // it will look anyway
	}
}

// setState records what the connection is doing. The caller holds the lock.
func (c *Client) setState(s State, err error) {
	c.state, c.lastErr = s, err
	c.notify()
}

// acknowledge forgets the operations up to through, of those up to sent that went
// out on the connection that answered: an acknowledgement says nothing about
// others (PROTOCOL 24.5). The results name operations one by one.
func (c *Client) acknowledge(lastID string, results []wire.OpResult, sent uint64) {
	var refused []wire.OpRejected
	c.mu.Lock()
	for _, r := range results {
		id, ok := parseID(r.OpID)
		switch {
		case !ok || id > sent:
		case r.Success:
			c.ops.drop(id)
		default:
			refused = append(refused, wire.OpRejected{OpID: r.OpID, Reason: r.Error})
		}
	}
	c.mu.Unlock()
	for _, r := range refused { // before lastId covers them
		c.reject(r, sent)
	}
	c.mu.Lock()
	if id, ok := parseID(lastID); ok {
		c.ops.dropThrough(min(id, sent))
	}
	c.notify()
	c.mu.Unlock()
}

// reject drops an operation that the server refused for good and lets the next
// sync bring the server's record back.
func (c *Client) reject(r wire.OpRejected, sent uint64) {
	id, ok := parseID(r.OpID)
	if !ok || id > sent {
		return
	}
	c.mu.Lock()
	op, ok := c.ops.drop(id)
	if ok {
		if m := c.maps[op.MapName]; m != nil {
			m.undo(op.Key, op.Record)
		}
		c.wakeUp()
		c.notify()
	}
	c.mu.Unlock()
	if !ok {
		return // answered before: OP_REJECTED and results may both name it
	}
	c.log.Warn("operation refused", "op", id, "map", op.MapName, "code", r.Code, "reason", r.Reason)
	c.cfg.OnReject(Rejection{OpID: id, Map: op.MapName, Key: op.Key, Code: r.Code, Reason: r.Reason})
}

// observe feeds a server's stamp to the clock. The caller holds the lock.
func (c *Client) observe(t hlc.Timestamp) {
	if !t.IsZero() {
		c.clock.Update(t)
	}
}

// parseID reads an operation id. Only decimal numbers are ids: a server that
// answers with another text acknowledges nothing (PROTOCOL 10.4, 24.5).
func parseID(s string) (uint64, bool) {
	id, err := strconv.ParseUint(s, 10, 64)
	return id, err == nil
}

// write merges a local record and logs the operation. The caller holds the lock.
func (c *Client) write(m *Map, key string, kind wire.OpKind, record lwwmap.Record) error {
	switch {
	case c.closed:
		return ErrClosed
	case len(c.ops.pending) >= c.cfg.MaxPending:
		return ErrBacklog
	}
	record.Timestamp = c.clock.Now()
	m.put(key, record, true)
	c.ops.append(wire.Op{MapName: m.name, Key: key, Kind: kind, Record: record})
	c.wakeUp()
	return nil
}
