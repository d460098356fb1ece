package gateway

import (
	"context"
	crand "crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect/v2"
	"go.opentelemetry.io/otel/metric"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
	"golang.org/x/sync/semaphore"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1/fanoutv1connect"
	"github.com/topgun-sync/topgun/gen/go/topgun/gateway/v1/gatewayv1connect"
	"github.com/topgun-sync/topgun/gen/go/topgun/partition/v1/partitionv1connect"
	"github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1/persistencev1connect"
	"github.com/topgun-sync/topgun/services/gateway/auth"
)

// Deps lists what the gateway works with. Partition, Fanout and Persistence are required.
type Deps struct {
	// Partition is the owner of the shards.
	Partition partitionv1connect.PartitionServiceClient
	// Fanout delivers the changes that others make.
	Fanout fanoutv1connect.FanoutServiceClient
	// Persistence says how far the log is stored, and reads the journal.
	Persistence persistencev1connect.PersistenceServiceClient
	// Logger gets one line per event; nil discards.
	Logger *slog.Logger
	// Meter makes the room's instruments; nil measures nothing.
	Meter metric.Meter
	// Tracer makes the room's spans; nil traces nothing.
	Tracer trace.Tracer
	// Now is the wall clock; nil means time.Now.
	Now func() time.Time
	// Rand is the source of jitter and device tokens; nil means crypto/rand.
	Rand io.Reader
}

// Service is one gateway. Its methods may be called concurrently.
type Service struct {
	cfg      Config
	log      *slog.Logger
	tracer   trace.Tracer
	now      func() time.Time
	verifier *auth.Verifier
	origins  *origins
	router   *router
	sockets  *sockets

	draining  atomic.Bool         // not ready, no new work
	running   atomic.Bool         // Run has begun
	syncBytes *semaphore.Weighted // bodies of POST /sync in flight
}

// New checks the configuration and makes a gateway. It does no I/O and starts no
// goroutine.
func New(cfg Config, deps Deps) (*Service, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("gateway config: %w", err)
	}
	if deps.Partition == nil || deps.Fanout == nil || deps.Persistence == nil {
		return nil, errors.New("gateway deps: the partition, fanout and persistence clients are required")
	}
	if deps.Logger == nil {
		deps.Logger = slog.New(slog.DiscardHandler)
	}
	if deps.Meter == nil {
		deps.Meter = metricnoop.Meter{}
	}
	if deps.Tracer == nil {
		deps.Tracer = tracenoop.Tracer{}
	}
	if deps.Now == nil {
		deps.Now = time.Now
	}
	if deps.Rand == nil {
		deps.Rand = crand.Reader
	}
	verifier, err := auth.New(cfg.Auth, auth.Deps{Logger: deps.Logger, Meter: deps.Meter, Now: deps.Now})
	if err != nil {
		return nil, fmt.Errorf("gateway auth: %w", err)
	}
	host, _, err := net.SplitHostPort(cfg.Listen)
	if err != nil {
		return nil, fmt.Errorf("gateway config: listen address: %w", err)
	}
	allowed, err := newOrigins(cfg.AllowedOrigins, loopbackHost(host))
	if err != nil {
		return nil, fmt.Errorf("gateway config: %w", err)
	}
	jitter, err := newJitter(deps.Rand)
	if err != nil {
		return nil, err
	}
	s := &Service{
		cfg:      cfg,
		log:      deps.Logger,
		tracer:   deps.Tracer,
		now:      deps.Now,
		verifier: verifier,
		origins:  allowed,
		router: newRouter([]partitionv1connect.PartitionServiceClient{deps.Partition}, routerLimits{
			callsPerOwner: cfg.CallsPerOwner,
			queueOps:      int64(cfg.QueueOps),
			queueBytes:    cfg.QueueOpBytes,
			callTimeout:   cfg.ApplyTimeout,
		}, jitter, deps.Logger),
		syncBytes: semaphore.NewWeighted(cfg.MaxSyncBytes),
	}
	s.sockets, err = newSockets(cfg, socketDeps{
		router: s.router, verifier: verifier, origins: allowed, fanout: deps.Fanout, persistence: deps.Persistence,
		log: deps.Logger, meter: deps.Meter, tracer: deps.Tracer, now: deps.Now, random: deps.Rand,
	})
	if err != nil {
		return nil, fmt.Errorf("gateway sockets: %w", err)
	}
	return s, nil
}

// newJitter returns a source of numbers in [0, 1), seeded from random.
func newJitter(random io.Reader) (func() float64, error) {
	var seed [32]byte
	if _, err := io.ReadFull(random, seed[:]); err != nil {
		return nil, fmt.Errorf("seed the jitter: %w", err)
	}
	var mu sync.Mutex
	source := rand.New(rand.NewChaCha8(seed))
	return func() float64 {
		mu.Lock()
		defer mu.Unlock()
		return source.Float64()
	}, nil
}

// Register adds GatewayService, which is for operators, to the server of the
// operator port.
func (s *Service) Register(server *connect.Server) {
	gatewayv1connect.RegisterGatewayServiceHandler(server, operator{s})
}

// Handler serves the client port: the WebSocket on / and /ws, POST /sync and
// /ws/sync, and /health/live and /health/ready. Metrics, profiles and RPCs are not
// among them.
func (s *Service) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/{$}", s.serveRoot)
	mux.HandleFunc("/ws", s.serveRoot)
	mux.HandleFunc("/sync", s.serveSync)
	mux.HandleFunc("/ws/sync", s.serveSync)
	mux.HandleFunc("GET /health/live", func(w http.ResponseWriter, _ *http.Request) {
		writeText(w, http.StatusOK, "live\n")
	})
	mux.HandleFunc("GET /health/ready", s.serveReady)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		header := w.Header()
		header.Set("X-Content-Type-Options", "nosniff")
		header.Set("Cache-Control", "no-store")
		header.Set("Referrer-Policy", "no-referrer")
		header.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
		// Every body has to arrive in time, also one that nobody reads: net/http reads
		// on to its end after the answer. A socket's deadline is in real time, whatever
		// the clock of the room is; an upgrade clears it.
		_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(s.cfg.BodyTimeout))
		// URLs end up in logs and histories, so a token there is refused even if it
		// is good (RELIABILITY 4).
		if tokenInQuery(r) {
			writeHTTPError(w, http.StatusUnauthorized, "TOKEN_IN_URL: send the token in AUTH or in the Authorization header")
			return
		}
		mux.ServeHTTP(w, r.WithContext(auth.WithAddress(r.Context(), clientAddr(r))))
	})
}

func tokenInQuery(r *http.Request) bool {
	if r.URL.RawQuery == "" {
		return false
	}
	names := []string{"token", "access_token", "id_token", "auth", "authorization", "jwt"}
	return slices.ContainsFunc(names, r.URL.Query().Has)
}

// serveRoot upgrades to a WebSocket session, or says what this is to a person who
// opens the address in a browser.
func (s *Service) serveRoot(w http.ResponseWriter, r *http.Request) {
	if !isUpgrade(r) && r.URL.Path == "/" {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET")
			writeHTTPError(w, http.StatusMethodNotAllowed, "METHOD: connect with a WebSocket, or POST to /sync")
			return
		}
		w.Header().Set("Upgrade", "websocket")
		writeText(w, http.StatusOK, "TopGun gateway.\n\n"+
			"Clients connect here with a WebSocket (/ or /ws) or POST to /sync.\n"+
			"Health: /health/live and /health/ready.\n")
		return
	}
	s.sockets.serve(w, r)
}

func (s *Service) serveReady(w http.ResponseWriter, _ *http.Request) {
	if err := s.Ready(); err != nil {
		writeHTTPError(w, http.StatusServiceUnavailable, "NOT_READY: "+err.Error())
		return
	}
	writeText(w, http.StatusOK, "ready\n")
}

func writeText(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(status)
	_, _ = io.WriteString(w, text) // a client that is gone is no event
}

// Ready is nil when the gateway can honour what it acknowledges, else the reason
// (OBS-01).
func (s *Service) Ready() error {
	switch {
	case !s.running.Load():
		return errors.New("starting")
	case s.draining.Load():
		return errors.New("draining")
	}
	return errors.Join(s.router.Ready(), s.sockets.ready(), s.verifier.Ready())
}

// Run works until ctx ends, then ends every session in order, and returns nil when
// all goroutines of the room have ended. The order on the way out is: not ready, no
// new sessions, what is in flight is answered, sessions are closed with 1012
// (UPG-01). DrainTimeout bounds it.
func (s *Service) Run(ctx context.Context) error {
	// Keys and owners outlive ctx: sessions need them while they are drained.
	lasting, stop := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	failed := make(chan error, 1)
	wg.Go(func() {
		if err := s.verifier.Run(lasting); err != nil {
			failed <- fmt.Errorf("keep the token keys: %w", err)
		}
	})
	wg.Go(func() { s.watchOwners(lasting) })
	sessions, endSessions := context.WithCancel(ctx)
	ended := make(chan error, 1)
	wg.Go(func() { ended <- s.sockets.run(sessions) })
	s.running.Store(true)

	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	s.draining.Store(true)
	endSessions()
	err = errors.Join(err, <-ended)
	// Every POST /sync holds some of this, so all of it is free when none is left.
	drain, cancel := context.WithTimeout(lasting, s.cfg.DrainTimeout)
	if s.syncBytes.Acquire(drain, s.cfg.MaxSyncBytes) == nil {
		s.syncBytes.Release(s.cfg.MaxSyncBytes)
	}
	cancel()
	stop()
	s.router.close()
	wg.Wait()
	s.log.Info("gateway stopped")
	return err
}

// ownerInterval is how often the owners are asked what they serve. Refusals teach
// the router sooner; this keeps an idle gateway's readiness true, and has clients forget
// the tombstones that the owners forgot (PROTOCOL 11.4).
const ownerInterval = 2 * time.Second

func (s *Service) watchOwners(ctx context.Context) {
	ticker := time.NewTicker(ownerInterval)
	defer ticker.Stop()
	known := true
	pruned := uint64(0)
	for {
		table, err := s.router.learn(ctx)
		if ctx.Err() != nil {
			return
		}
		if err == nil && table.whole && table.kept.pruned > pruned {
			// Sessions are told what is forgotten from now on; what was before, each of
			// them hears when it synchronises.
			if pruned > 0 {
				s.sockets.prune(table.kept.pruned)
			}
			pruned = table.kept.pruned
		}
		if (err == nil) != known {
			known = err == nil
			if known {
				s.log.Info("owners of the shards are known again")
			} else {
				s.log.Warn("owners of the shards are not known", "error", err)
			}
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}

// clock is a reading of the gateway's clock for clients. It is never moved by what
// clients send, so no client can drag others into the future (CLK-02).
func (s *Service) clock() hlc.Timestamp {
	return hlc.Timestamp{Millis: uint64(max(s.now().UnixMilli(), 0)), NodeID: serverNode}
}
