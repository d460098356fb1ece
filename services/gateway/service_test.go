package gateway

import (
	"context"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectinprocess"

	"github.com/topgun-sync/topgun/core/wire"
	gatewayv1 "github.com/topgun-sync/topgun/gen/go/topgun/gateway/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/gateway/v1/gatewayv1connect"
	"github.com/topgun-sync/topgun/services/gateway/auth"
)

func TestConfigValidate(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*Config)
		want   string // part of the error; empty: valid
	}{
		"default":                   {func(*Config) {}, ""},
		"IPv6 loopback":             {func(c *Config) { c.Listen = "[::1]:8080" }, ""},
		"localhost":                 {func(c *Config) { c.Listen = "localhost:0" }, ""},
		"public without key":        {func(c *Config) { c.Listen = "0.0.0.0:8080" }, "set a JWT secret"},
		"every address without key": {func(c *Config) { c.Listen = ":8080" }, "set a JWT secret"},
		"a name without key":        {func(c *Config) { c.Listen = "localhost.example.com:80" }, "set a JWT secret"},
		"public, no-auth":           {func(c *Config) { c.Listen, c.NoAuth = ":8080", true }, ""},
		"public with key":           {func(c *Config) { c.Listen, c.Auth.Secret = ":8080", testSecret }, ""},
		"key and no-auth":           {func(c *Config) { c.Auth.Secret, c.NoAuth = testSecret, true }, "contradict"},
		"half a PEM key":            {func(c *Config) { c.Auth.Secret = "-----BEGIN PUBLIC KEY-----\nAAAA" }, "whole PEM"},
		"no port":                   {func(c *Config) { c.Listen = "127.0.0.1" }, "host:port"},
		"id":                        {func(c *Config) { c.GatewayID = "a:b" }, "gateway id"},
		"id empty":                  {func(c *Config) { c.GatewayID = "" }, "gateway id"},
		"origin with path":          {func(c *Config) { c.AllowedOrigins = []string{"https://a.example/"} }, "allowed origins"},
		"origin without scheme":     {func(c *Config) { c.AllowedOrigins = []string{"a.example"} }, "allowed origins"},
		"star and more":             {func(c *Config) { c.AllowedOrigins = []string{"*", "https://a.example"} }, "stands alone"},
		"zero":                      {func(c *Config) { c.MaxOps = 0 }, "max ops"},
		"more ops than a call":      {func(c *Config) { c.MaxOps = maxCallOps + 1; c.QueueOps = maxCallOps + 1 }, "max ops"},
		"queue below a message":     {func(c *Config) { c.QueueOpBytes = 1 << 20 }, "queue op bytes"},
		"login below auth":          {func(c *Config) { c.LoginTimeout = time.Second }, "login timeout"},
		"pre-auth below a token":    {func(c *Config) { c.MaxPreAuthMessageBytes = 1024 }, "pre-auth"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := DefaultConfig()
			c.change(&cfg)
			err := cfg.Validate()
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Fatalf("got %v, want %q", err, c.want)
			}
			if err != nil && cfg.Auth.Secret != "" && strings.Contains(err.Error(), cfg.Auth.Secret) {
				t.Error("the error repeats the secret")
			}
			if _, newErr := New(cfg, Deps{Partition: newFakePartition(nil).client(), Fanout: newFakeFanout().client(), Persistence: newFakePersistence().client()}); (newErr == nil) != (err == nil) {
				t.Errorf("New: %v", newErr)
			}
		})
	}
	if _, err := New(DefaultConfig(), Deps{}); err == nil {
		t.Error("New without clients")
	}
}

func TestClientPort(t *testing.T) {
	g := startGateway(t, nil, nil)
	for _, c := range []struct {
		method, path string
		status       int
		want         string // part of the body
	}{
		{"GET", "/", 200, "TopGun gateway"},
		{"GET", "/ws", 426, ""},
		{"POST", "/", 405, "METHOD"},
		{"GET", "/health/live", 200, "live"},
		{"GET", "/metrics", 404, ""},
		{"GET", "/debug/pprof/", 404, ""},
		{"GET", "/health", 404, ""},
		{"GET", "/sync/../metrics", 404, ""},
		{"POST", "/topgun.gateway.v1.GatewayService/Describe", 404, ""},
		{"GET", "/%0d%0aX-Evil:1", 404, ""},
	} {
		status, header, body := g.exchange(c.method, c.path, nil, nil)
		if status == http.StatusTemporaryRedirect || status == http.StatusMovedPermanently || status == http.StatusPermanentRedirect {
			status = 404 // the mux cleans the path; nothing is there either
		}
		if status != c.status || !strings.Contains(string(body), c.want) {
			t.Errorf("%s %s: %d %s", c.method, c.path, status, body)
		}
		if header.Get("X-Content-Type-Options") != "nosniff" || header.Get("Cache-Control") != "no-store" || header.Get("X-Evil") != "" {
			t.Errorf("%s %s: headers %v", c.method, c.path, header)
		}
	}
}

// waitReady waits until the gateway says it is ready.
func waitReady(t *testing.T, g *httpGateway) {
	t.Helper()
	if _, err := g.service.router.learn(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { return g.service.Ready() == nil })
}

func TestReadiness(t *testing.T) {
	service, err := New(DefaultConfig(), Deps{Partition: newFakePartition(nil).client(), Fanout: newFakeFanout().client(), Persistence: newFakePersistence().client()})
	if err != nil {
		t.Fatal(err)
	}
	recorder := httptest.NewRecorder()
	service.Handler().ServeHTTP(recorder, httptest.NewRequest(http.MethodGet, "/health/ready", nil))
	if recorder.Code != http.StatusServiceUnavailable || !strings.Contains(recorder.Body.String(), "starting") {
		t.Errorf("before Run: %d %s", recorder.Code, recorder.Body)
	}
	g := startGateway(t, nil, nil)
	waitReady(t, g)
	if status, _, body := g.exchange(http.MethodGet, "/health/ready", nil, nil); status != 200 {
		t.Errorf("running: %d %s", status, body)
	}
	g.stop()
	if status, _, body := g.exchange(http.MethodGet, "/health/ready", nil, nil); status != 503 || !strings.Contains(string(body), "draining") {
		t.Errorf("stopped: %d %s", status, body)
	}
	// Alive all the same (OBS-01), and a poll is told to come again with status 200.
	if status, _, _ := g.exchange(http.MethodGet, "/health/live", nil, nil); status != 200 {
		t.Errorf("live: %d", status)
	}
	if response := g.sync(&wire.SyncRequest{}); len(response.Errors) != 1 || response.Errors[0].Code != 503 {
		t.Errorf("sync while draining: %+v", response)
	}
}

// TestStopAnswersWhatIsInFlight: UPG-01. A request that is being answered when the
// gateway is told to stop gets its ack.
func TestStopAnswersWhatIsInFlight(t *testing.T) {
	entered, release := make(chan struct{}, 1), make(chan struct{})
	g := startGateway(t, func(c *Config) { c.DrainTimeout = patience }, func(p *fakePartition) {
		p.before = func(ctx context.Context, method string) error {
			if method == "Apply" {
				entered <- struct{}{}
				select {
				case <-release:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			return nil
		}
	})
	answer := make(chan *wire.SyncResponse, 1)
	go func() { answer <- g.sync(&wire.SyncRequest{Operations: []wire.Op{put("1", "m", "k", "v", 1)}}) }()
	<-entered
	stopped := make(chan struct{})
	go func() { g.stop(); close(stopped) }()
	// The bodies in flight have a waiter once Run waits for them, and then cannot be had.
	for g.service.syncBytes.TryAcquire(1) && len(answer) == 0 {
		g.service.syncBytes.Release(1)
		runtime.Gosched()
	}
	close(release)
	if response := <-answer; response.Ack == nil || response.Ack.LastID != "1" {
		t.Errorf("answer %+v", response)
	}
	<-stopped
}

func TestOrigins(t *testing.T) {
	public, err := newOrigins([]string{"https://app.example.com", "http://partner.example:8080"}, false)
	if err != nil {
		t.Fatal(err)
	}
	local, err := newOrigins(nil, true)
	if err != nil {
		t.Fatal(err)
	}
	all, err := newOrigins([]string{"*"}, false)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name    string
		origins *origins
		host    string
		origin  []string
		want    bool
	}{
		{"no page", public, "sync.example.com", nil, true},
		{"listed", public, "sync.example.com", []string{"https://app.example.com"}, true},
		{"listed with port", public, "sync.example.com", []string{"http://partner.example:8080"}, true},
		{"http in place of https", public, "sync.example.com", []string{"http://app.example.com"}, false},
		{"other port", public, "sync.example.com", []string{"https://app.example.com:444"}, false},
		{"foreign", public, "sync.example.com", []string{"https://evil.example"}, false},
		{"null", public, "sync.example.com", []string{"null"}, false},
		{"empty", public, "sync.example.com", []string{""}, false},
		{"look-alike suffix", public, "sync.example.com", []string{"https://app.example.com.evil.example"}, false},
		{"look-alike prefix", public, "sync.example.com", []string{"https://evilapp.example.com"}, false},
		{"user part", public, "sync.example.com", []string{"https://app.example.com@evil.example"}, false},
		{"upper case", public, "sync.example.com", []string{"HTTPS://APP.EXAMPLE.COM"}, false},
		{"two", public, "sync.example.com", []string{"https://app.example.com", "https://evil.example"}, false},
		{"same host", public, "sync.example.com", []string{"https://sync.example.com"}, true},
		{"same host, other port", public, "sync.example.com:8443", []string{"https://sync.example.com"}, false},
		{"localhost page, public gateway", public, "sync.example.com", []string{"http://localhost:3000"}, false},
		{"localhost page, local gateway", local, "127.0.0.1:8080", []string{"http://localhost:5173"}, true},
		{"IPv6 page, local gateway", local, "localhost:8080", []string{"http://[::1]:5173"}, true},
		{"127.0.0.2", local, "127.0.0.1:8080", []string{"http://127.0.0.2"}, true},
		{"rebound name, local gateway", local, "evil.example:8080", []string{"http://evil.example:8080"}, false},
		{"localhost look-alike", local, "127.0.0.1:8080", []string{"http://localhost.evil.example"}, false},
		{"file", local, "127.0.0.1:8080", []string{"file://"}, false},
		{"all", all, "sync.example.com", []string{"https://anything.example"}, true},
		{"all, null", all, "sync.example.com", []string{"null"}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			request := httptest.NewRequest(http.MethodGet, "http://x/", nil)
			request.Host = c.host
			if c.origin != nil {
				request.Header["Origin"] = c.origin
			}
			if got := c.origins.allowed(request); got != c.want {
				t.Errorf("allowed: %v", got)
			}
		})
	}
}

func TestCORS(t *testing.T) {
	g := startGateway(t, func(c *Config) { c.AllowedOrigins = []string{"https://app.example.com"} }, nil)
	all := startGateway(t, func(c *Config) { c.AllowedOrigins = []string{"*"} }, nil)
	preflight := func(origin string) http.Header {
		return http.Header{"Origin": {origin}, "Access-Control-Request-Method": {"POST"}, "Access-Control-Request-Headers": {"authorization,content-type"}}
	}
	status, header, _ := g.exchange(http.MethodOptions, "/sync", preflight("https://app.example.com"), nil)
	if status != 204 || header.Get("Access-Control-Allow-Origin") != "https://app.example.com" || header.Get("Access-Control-Allow-Methods") != "POST" ||
		header.Get("Access-Control-Allow-Headers") != "Authorization, Content-Type" || header.Get("Vary") != "Origin" {
		t.Errorf("preflight: %d %v", status, header)
	}
	for _, origin := range []string{"https://evil.example", "null", "http://app.example.com"} {
		_, header, _ = g.exchange(http.MethodOptions, "/sync", preflight(origin), nil)
		for name := range header {
			if strings.HasPrefix(name, "Access-Control-Allow") {
				t.Errorf("foreign preflight from %s: %s", origin, name)
			}
		}
		with := msgpack.Clone()
		with.Set("Origin", origin)
		if status, header, _ = g.exchange(http.MethodPost, "/sync", with, nil); status != 403 || header.Get("Access-Control-Allow-Origin") != "" {
			t.Errorf("foreign POST from %s: %d %v", origin, status, header)
		}
	}
	with := msgpack.Clone()
	with.Set("Origin", "https://app.example.com")
	if status, header, _ = g.exchange(http.MethodPost, "/sync", with, nil); status != 200 || header.Get("Access-Control-Allow-Origin") != "https://app.example.com" {
		t.Errorf("POST: %d %v", status, header)
	}
	// A page must be able to read why it was refused.
	with.Set("Content-Type", "text/plain")
	if status, header, _ = g.exchange(http.MethodPost, "/sync", with, nil); status != 415 || header.Get("Access-Control-Allow-Origin") == "" {
		t.Errorf("refusal: %d %v", status, header)
	}
	status, header, _ = all.exchange(http.MethodOptions, "/sync", preflight("https://anything.example"), nil)
	if status != 204 || header.Get("Access-Control-Allow-Origin") != "*" || header.Get("Access-Control-Allow-Credentials") != "" {
		t.Errorf("all: %d %v", status, header)
	}
}

func operatorClient(g *httpGateway) gatewayv1connect.GatewayServiceClient {
	server := connect.NewServer()
	g.service.Register(server)
	return gatewayv1connect.NewGatewayServiceClient(connect.NewClient(connectinprocess.New(server)))
}

func TestOperator(t *testing.T) {
	g := startGateway(t, func(c *Config) { c.GatewayID = "gw-7" }, nil)
	client := operatorClient(g)
	described, err := client.Describe(t.Context(), &gatewayv1.DescribeRequest{})
	if err != nil || described.GatewayId != "gw-7" || described.Sessions != 0 || described.Draining {
		t.Errorf("%v, %v", described, err)
	}
	if list, err := client.ListSessions(t.Context(), &gatewayv1.ListSessionsRequest{Limit: 1000}); err != nil || len(list.Sessions) != 0 {
		t.Errorf("%v, %v", list, err)
	}
	if closed, err := client.CloseSession(t.Context(), &gatewayv1.CloseSessionRequest{Id: 99}); err != nil || closed.Closed {
		t.Errorf("%v, %v", closed, err)
	}
	for name, call := range map[string]func() error{
		"limit": func() error {
			_, err := client.ListSessions(t.Context(), &gatewayv1.ListSessionsRequest{Limit: 1001})
			return err
		},
		"id": func() error {
			_, err := client.CloseSession(t.Context(), &gatewayv1.CloseSessionRequest{})
			return err
		},
		"over_millis": func() error {
			_, err := client.Drain(t.Context(), &gatewayv1.DrainRequest{OverMillis: 600_001})
			return err
		},
	} {
		if err := call(); connect.CodeOf(err) != connect.CodeInvalidArgument || !strings.Contains(err.Error(), name+":") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if described, _ = client.Describe(t.Context(), &gatewayv1.DescribeRequest{}); described.Draining {
		t.Error("a refused Drain began to drain")
	}
	if _, err := client.Drain(t.Context(), &gatewayv1.DrainRequest{}); err != nil {
		t.Fatal(err)
	}
	if described, _ = client.Describe(t.Context(), &gatewayv1.DescribeRequest{}); !described.Draining || g.service.Ready() == nil {
		t.Errorf("after Drain: %v, ready %v", described, g.service.Ready())
	}
}

// TestRunWithoutSigningKeys: a gateway whose JWKS is away runs, is not ready, and
// stops when it is told to.
func TestRunWithoutSigningKeys(t *testing.T) {
	away := httptest.NewServer(http.NotFoundHandler())
	defer away.Close()
	g := startGateway(t, func(c *Config) { c.Auth = auth.Config{JWKSURL: away.URL} }, nil)
	if _, err := g.service.router.learn(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, g.service.running.Load)
	if err := g.service.Ready(); err == nil || !strings.Contains(err.Error(), "signing keys") {
		t.Errorf("ready: %v", err)
	}
	g.stop()
}
