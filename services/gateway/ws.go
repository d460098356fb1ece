package gateway

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gobwas/ws"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sync/semaphore"

	"github.com/topgun-sync/topgun/core/wire"
	"github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1/fanoutv1connect"
	"github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1/persistencev1connect"
	"github.com/topgun-sync/topgun/services/gateway/auth"
)

const (
	// serverNode is the node id of the clock readings that clients get.
	serverNode = "topgun"
	// sweepEvery is how often every session's deadlines are looked at. One sweeper
	// for all replaces a timer for each.
	sweepEvery = time.Second
	// inboundBudget bounds the parts of large messages, of all sessions together,
	// that have arrived and are not handled yet; see budget.
	inboundBudget = 256 << 20
	// maxPushes bounds the sessions that are being sent what arrived since their
	// last sync. Each holds two pages at most, one queued and one in hand.
	maxPushes = 512
)

// sockets is the WebSocket side of the gateway: it accepts connections, knows the
// open sessions, and ends them. All methods may be called concurrently.
type sockets struct {
	cfg      Config
	router   *router
	verifier *auth.Verifier
	origins  *origins
	log      *slog.Logger
	tracer   trace.Tracer
	meters   *meters
	now      func() time.Time

	hub         *hub
	fanout      fanoutv1connect.FanoutServiceClient
	persistence persistencev1connect.PersistenceServiceClient
	concerns    *concerns
	trees       *forest
	devices     *devices
	keeper      *keeper
	inbound     budget
	pushes      *semaphore.Weighted
	tick        time.Duration
	linger      time.Duration

	// base ends when run is over; sessions live no longer than that.
	base   context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup // the sessions and what serves several of them

	incarnation string // names this run of the gateway, unlike any other

	randMu sync.Mutex
	random io.Reader

	mu       sync.Mutex
	sessions map[uint64]*session
	perAddr  map[netip.Addr]int
	reserved int // upgrades that were let in and are no sessions yet
	lastID   uint64
	draining bool
	gone     chan struct{} // closed and replaced whenever a session ends
}

// socketDeps lists what sockets works with. Meter and Tracer may be no-ops; Now and
// Rand may be nil as in Deps.
type socketDeps struct {
	router      *router
	verifier    *auth.Verifier
	origins     *origins
	fanout      fanoutv1connect.FanoutServiceClient
	persistence persistencev1connect.PersistenceServiceClient
	log         *slog.Logger
	meter       metric.Meter
	tracer      trace.Tracer
	now         func() time.Time
	random      io.Reader
}

// newSockets allocates only; run starts the work.
func newSockets(cfg Config, deps socketDeps) (*sockets, error) {
	k := &sockets{
		cfg:         cfg,
		router:      deps.router,
		verifier:    deps.verifier,
		origins:     deps.origins,
		log:         deps.log,
		tracer:      deps.tracer,
		now:         deps.now,
		random:      deps.random,
		inbound:     budget{limit: inboundBudget},
		fanout:      deps.fanout,
		persistence: deps.persistence,
		pushes:      semaphore.NewWeighted(maxPushes),
		tick:        sweepEvery,
		linger:      lingerTime,
		sessions:    make(map[uint64]*session),
		perAddr:     make(map[netip.Addr]int),
		gone:        make(chan struct{}),
	}
	if k.now == nil {
		k.now = time.Now
	}
	if k.random == nil {
		k.random = rand.Reader
	}
	var unique [12]byte
	k.randomBytes(unique[:])
	k.incarnation = hex.EncodeToString(unique[:])
	k.base, k.cancel = context.WithCancel(context.Background())
	k.trees = newForest(k)
	k.devices = newDevices(k)
	k.keeper = newKeeper(k)
	k.hub = newHub(cfg.GatewayID, deps.fanout, deps.log, k.now)
	k.concerns = newConcerns(deps.persistence, k.router.history, deps.log)
	var err error
	if k.meters, err = newMeters(deps.meter); err != nil {
		return nil, err
	}
	return k, nil
}

// run keeps the fanout stream open and sweeps until ctx ends, then drains the
// sessions within DrainTimeout. It returns nil when everything it started has ended.
func (k *sockets) run(ctx context.Context) error {
	hubCtx, stopHub := context.WithCancel(k.base)
	defer stopHub()
	k.wg.Go(func() { k.hub.run(hubCtx) })
	k.wg.Go(func() { k.concerns.run(k.base) })
	k.wg.Go(func() { k.sweep(k.base) })
	k.wg.Go(func() { k.devices.run(k.base) })
	k.wg.Go(func() { k.keeper.run(k.base) })
	<-ctx.Done()

	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), k.cfg.DrainTimeout)
	defer cancel()
	k.drain(drain, k.cfg.DrainTimeout/2)
	k.devices.flush(drain)
	k.cancel()
	k.wg.Wait()
	return nil
}

// ready is nil while new sessions are taken and changes arrive from fanout.
func (k *sockets) ready() error {
	k.mu.Lock()
	draining := k.draining
	k.mu.Unlock()
	if draining {
		return errDraining
	}
	return k.hub.ready()
}

// isUpgrade reports whether a request asks for a WebSocket.
func isUpgrade(r *http.Request) bool {
	return strings.EqualFold(r.Header.Get("Upgrade"), "websocket")
}

// serve answers GET /ws, and GET / with an upgrade (PROTOCOL 2.1). After the
// upgrade it returns, so that what net/http holds for the request is freed; the
// session goes on in a goroutine of its own.
func (k *sockets) serve(w http.ResponseWriter, r *http.Request) {
	switch {
	case r.Method != http.MethodGet:
		w.Header().Set("Allow", http.MethodGet)
		http.Error(w, "METHOD: a WebSocket is opened with GET", http.StatusMethodNotAllowed)
		return
	case r.ProtoMajor != 1 || r.ProtoMinor < 1:
		http.Error(w, "BAD_UPGRADE: a WebSocket is opened over HTTP/1.1", http.StatusBadRequest)
		return
	case !isUpgrade(r):
		w.Header().Set("Connection", "Upgrade")
		w.Header().Set("Upgrade", "websocket")
		http.Error(w, "UPGRADE_REQUIRED: this address speaks WebSocket", http.StatusUpgradeRequired)
		return
	case !k.origins.allowed(r):
		http.Error(w, "ORIGIN: pages of this origin may not connect", http.StatusForbidden)
		return
	}
	addr := clientAddr(r)
	if reason := k.reserve(addr); reason != "" {
		w.Header().Set("Retry-After", strconv.Itoa(int(math.Ceil(k.cfg.DrainTimeout.Seconds()))))
		http.Error(w, reason, http.StatusServiceUnavailable)
		return
	}
	upgrader := ws.HTTPUpgrader{Timeout: k.cfg.WriteTimeout}
	conn, rw, _, err := upgrader.Upgrade(r, w) // answers 400 or 426 itself
	if err != nil {
		if conn != nil {
			_ = conn.Close() // the handshake failed; there is nobody to tell
		}
		k.unreserve(addr)
		return
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		// What is to be sent together waits in our queue, not in Nagle's; net sets
		// this by default, and the latency of every ack depends on it.
		_ = tcp.SetNoDelay(true)
	}
	var early []byte
	if n := rw.Reader.Buffered(); n > 0 {
		early, _ = rw.Reader.Peek(n) // cannot fail: n bytes are buffered
		early = slices.Clone(early)
	}
	k.open(conn, addr, k.endpoint(r), early)
}

var errDraining = fixedError("DRAINING: the gateway takes no new sessions")

// clientAddr is the address that connection caps and the slowing down of wrong
// tokens go by: that of the TCP peer. A forwarded header is client text.
func clientAddr(r *http.Request) netip.Addr {
	ap, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Addr{}
	}
	return ap.Addr().Unmap()
}

// reserve takes a place for a connection, or says why there is none (503).
func (k *sockets) reserve(addr netip.Addr) (reason string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case k.draining:
		return errDraining.Error()
	case len(k.sessions)+k.reserved >= k.cfg.MaxSessions:
		return "BUSY: the gateway has as many sessions as it takes; try again later"
	case k.perAddr[addr] >= k.cfg.MaxSessionsPerAddress:
		return "BUSY: this address has as many sessions as it may have; close some or try again later"
	}
	k.reserved++
	k.perAddr[addr]++
	return ""
}

func (k *sockets) unreserve(addr netip.Addr) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.reserved--
	k.releaseAddr(addr)
}

// releaseAddr gives back an address's place; k.mu is held.
func (k *sockets) releaseAddr(addr netip.Addr) {
	if k.perAddr[addr]--; k.perAddr[addr] <= 0 {
		delete(k.perAddr, addr)
	}
}

// open makes a reserved place a session and starts it.
func (k *sockets) open(conn net.Conn, addr netip.Addr, at string, early []byte) {
	k.mu.Lock()
	k.reserved--
	if k.draining {
		k.releaseAddr(addr)
		k.mu.Unlock()
		_ = conn.Close() // the client reconnects elsewhere
		return
	}
	k.lastID++
	s := newSession(k, k.lastID, conn, addr, at, early)
	k.sessions[s.id] = s
	k.wg.Add(1) // under the lock, so that run does not wait before it
	k.mu.Unlock()
	k.meters.opened()
	k.log.Info("session opened", "session", s.id, "remote", conn.RemoteAddr().String())
	go func() {
		defer k.wg.Done()
		s.serve()
	}()
}

// remove forgets a session that has ended.
func (k *sockets) remove(s *session) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.sessions, s.id)
	k.releaseAddr(s.addr)
	close(k.gone)
	k.gone = make(chan struct{})
}

// snapshot returns the open sessions, the oldest first.
func (k *sockets) snapshot() []*session {
	k.mu.Lock()
	all := make([]*session, 0, len(k.sessions))
	for _, s := range k.sessions {
		all = append(all, s)
	}
	k.mu.Unlock()
	slices.SortFunc(all, func(a, b *session) int {
		if a.id < b.id {
			return -1
		}
		return 1
	})
	return all
}

// count returns how many sessions are open and whether new ones are refused.
func (k *sockets) count() (open int, draining bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.sessions), k.draining
}

// sessionInfo describes an open session to operators.
type sessionInfo struct {
	id           uint64
	userID       string
	remote       string
	openedMillis uint64
	maps         []string // sorted
	queuedBytes  uint64
}

// list describes up to limit sessions with an id above after, by id.
func (k *sockets) list(after uint64, limit int) []sessionInfo {
	var infos []sessionInfo
	for _, s := range k.snapshot() {
		if s.id > after && len(infos) < limit {
			infos = append(infos, s.info())
		}
	}
	return infos
}

// closeSession ends one session with 1012, after its acks in flight; its client
// reconnects. It reports whether there was one.
func (k *sockets) closeSession(id uint64) bool {
	k.mu.Lock()
	s := k.sessions[id]
	k.mu.Unlock()
	if s != nil {
		s.retire()
	}
	return s != nil
}

// drain refuses new sessions from now on and ends the open ones with 1012, spread
// evenly over a time so that their clients do not arrive elsewhere all at once. A
// session ends when its ops in flight are acked. When ctx ends first the rest is cut
// off. It returns how many sessions were ended (UPG-01).
func (k *sockets) drain(ctx context.Context, over time.Duration) int {
	k.mu.Lock()
	k.draining = true
	k.mu.Unlock()
	all := k.snapshot()
	for i, s := range all {
		if i > 0 && over > 0 && !pause(ctx, over/time.Duration(len(all))) {
			break
		}
		s.retire()
	}
	for {
		k.mu.Lock()
		left, gone := len(k.sessions), k.gone
		k.mu.Unlock()
		if left == 0 {
			return len(all)
		}
		select {
		case <-gone:
		case <-ctx.Done():
			for _, s := range k.snapshot() {
				s.beginClose(closeRestart)
				_ = s.conn.Close() // out of time
			}
			return len(all)
		}
	}
}

// pause waits and reports whether ctx is still going on.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// sweep looks at every session's deadlines, again and again until ctx ends.
func (k *sockets) sweep(ctx context.Context) {
	ticker := time.NewTicker(k.tick)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		now := k.now()
		for _, s := range k.snapshot() {
			s.check(now)
		}
		k.trees.expire(now)
		k.hub.tidy()
	}
}

// randomBytes fills b with unguessable bytes.
func (k *sockets) randomBytes(b []byte) {
	k.randMu.Lock()
	defer k.randMu.Unlock()
	if _, err := io.ReadFull(k.random, b); err != nil {
		// Going on would hand out guessable tokens; crypto/rand never fails.
		panic("gateway: the random source failed: " + err.Error()) //nolint:forbidigo // RES-05
	}
}

// budget bounds a number of bytes that many goroutines hold. Who gets nothing gives
// up instead of waiting: a waiter would hold what it has.
type budget struct {
	limit int64
	held  atomic.Int64
}

func (b *budget) take(n int64) bool {
	if b.held.Add(n) > b.limit {
		b.held.Add(-n)
		return false
	}
	return true
}

func (b *budget) give(n int64) {
	if n != 0 {
		b.held.Add(-n)
	}
}

// originOf names a session in changes. The random part tells it from sessions of other
// gateways and of an earlier process: a session would not be told of their changes.
func (k *sockets) originOf(id uint64) string {
	return k.incarnation + "/" + strconv.FormatUint(id, 36)
}

// limits is what the decoder of client messages accepts.
func (k *sockets) limits() wire.Limits {
	limits := wire.DefaultLimits()
	limits.MaxOps = k.cfg.MaxOps
	// The verifier refuses tokens above its own bound with an answer; a frame that
	// cannot be read before authentication gets none.
	limits.MaxTokenBytes = k.cfg.MaxPreAuthMessageBytes
	return limits
}
