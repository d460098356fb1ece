package gateway

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/topgun-sync/topgun/core/wire"
	"github.com/topgun-sync/topgun/services/gateway/auth"
)

const testSecret = "a-secret-of-more-than-thirty-two-bytes"

// httpGateway is a running gateway with its client port on a real socket.
type httpGateway struct {
	*httptest.Server
	t           *testing.T
	service     *Service
	partition   *fakePartition
	persistence *fakePersistence
	stop        func() // ends Run and waits for it
}

// startGateway runs a gateway over fakes; prepare changes them before anything runs.
func startGateway(t *testing.T, change func(*Config), prepare func(*fakePartition)) *httpGateway {
	t.Helper()
	fanout := newFakeFanout()
	partition := newFakePartition(fanout)
	persistence := newFakePersistence()
	if prepare != nil {
		prepare(partition)
	}
	cfg := DefaultConfig()
	cfg.DrainTimeout = 2 * time.Second
	cfg.ApplyTimeout, cfg.ReadTimeout = patience, patience
	if change != nil {
		change(&cfg)
	}
	service, err := New(cfg, Deps{Partition: partition.client(), Fanout: fanout.client(), Persistence: persistence.client()})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := service.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	g := &httpGateway{Server: httptest.NewServer(service.Handler()), t: t, service: service, partition: partition, persistence: persistence}
	g.stop = func() { cancel(); wg.Wait() }
	t.Cleanup(func() { g.stop(); g.Close() })
	return g
}

// exchange sends a body as it is and returns status, headers and body of the answer.
func (g *httpGateway) exchange(method, path string, header http.Header, body []byte) (int, http.Header, []byte) {
	g.t.Helper()
	request, err := http.NewRequestWithContext(g.t.Context(), method, g.URL+path, bytes.NewReader(body))
	if err != nil {
		g.t.Fatal(err)
	}
	for name, values := range header {
		request.Header[name] = values
	}
	response, err := http.DefaultTransport.RoundTrip(request) // follows no redirect
	if err != nil {
		g.t.Fatal(err)
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err != nil {
		g.t.Fatal(err)
	}
	return response.StatusCode, response.Header, answer
}

var msgpack = http.Header{"Content-Type": {"application/x-msgpack"}}

// sync makes a msgpack request that must succeed.
func (g *httpGateway) sync(request *wire.SyncRequest) *wire.SyncResponse {
	g.t.Helper()
	status, header, body := g.exchange(http.MethodPost, "/sync", msgpack, request.AppendTo(nil))
	if status != http.StatusOK || header.Get("Content-Type") != "application/x-msgpack" {
		g.t.Fatalf("status %d, %s: %s", status, header.Get("Content-Type"), body)
	}
	response, err := wire.DecodeSyncResponse(body)
	if err != nil {
		g.t.Fatal(err)
	}
	if response.ServerHLC.Millis == 0 || response.ServerHLC.NodeID == "" {
		g.t.Errorf("serverHlc %v", response.ServerHLC)
	}
	return response
}

func TestSyncEmptyRequest(t *testing.T) {
	g := startGateway(t, nil, nil)
	for _, path := range []string{"/sync", "/ws/sync"} {
		status, _, body := g.exchange(http.MethodPost, path, msgpack, nil)
		response, err := wire.DecodeSyncResponse(body)
		if status != http.StatusOK || err != nil || response.Ack != nil || response.Deltas != nil || response.Errors != nil {
			t.Errorf("%s: %d %+v %v", path, status, response, err)
		}
	}
	status, header, body := g.exchange(http.MethodPost, "/sync", http.Header{"Content-Type": {"application/json; charset=utf-8"}}, []byte("{}"))
	var answer map[string]any
	if err := json.Unmarshal(body, &answer); status != 200 || err != nil || answer["serverHlc"] == nil || header.Get("Content-Type") != "application/json" {
		t.Errorf("JSON: %d %s", status, body)
	}
}

func TestSyncRefusals(t *testing.T) {
	g := startGateway(t, func(c *Config) { c.MaxBodyBytes = 4096 }, nil)
	inflate := func(n int) []byte {
		var b bytes.Buffer
		w := gzip.NewWriter(&b)
		_, _ = w.Write(make([]byte, n))
		_ = w.Close()
		return b.Bytes()
	}
	zip := func(b []byte) []byte {
		var out bytes.Buffer
		w := gzip.NewWriter(&out)
		_, _ = w.Write(b)
		_ = w.Close()
		return out.Bytes()
	}
	kind := func(k string, more ...string) http.Header {
		h := http.Header{"Content-Type": {k}}
		if len(more) > 0 {
			h["Content-Encoding"] = more
		}
		return h
	}
	good := (&wire.SyncRequest{ClientID: "c", ClientHLC: stampNow("c")}).AppendTo(nil)
	padded := func(n int) []byte {
		return fmt.Appendf(nil, `{"pad":"%s"}`, strings.Repeat("x", n-len(`{"pad":""}`)))
	}
	for name, c := range map[string]struct {
		method string
		header http.Header
		body   []byte
		status int
	}{
		"msgpack":                      {"POST", kind("application/msgpack"), good, 200},
		"upper case type":              {"POST", kind("Application/X-MsgPack"), good, 200},
		"gzip":                         {"POST", kind("application/x-msgpack", "gzip"), zip(good), 200},
		"identity":                     {"POST", kind("application/x-msgpack", "identity"), good, 200},
		"empty gzip":                   {"POST", kind("application/x-msgpack", "gzip"), nil, 200},
		"no content type":              {"POST", http.Header{}, good, 415},
		"two content types":            {"POST", http.Header{"Content-Type": {"application/json", "application/msgpack"}}, good, 415},
		"text":                         {"POST", kind("text/plain"), good, 415},
		"form":                         {"POST", kind("application/x-www-form-urlencoded"), good, 415},
		"br":                           {"POST", kind("application/x-msgpack", "br"), good, 415},
		"gzip twice":                   {"POST", kind("application/x-msgpack", "gzip, gzip"), good, 415},
		"gzip in two headers":          {"POST", kind("application/x-msgpack", "gzip", "gzip"), good, 415},
		"not gzip":                     {"POST", kind("application/x-msgpack", "gzip"), good, 400},
		"cut gzip":                     {"POST", kind("application/x-msgpack", "gzip"), zip(good)[:20], 400},
		"GET":                          {"GET", kind("application/json"), nil, 405},
		"PUT":                          {"PUT", kind("application/json"), []byte("{}"), 405},
		"body of the limit":            {"POST", kind("application/json"), padded(4096), 200},
		"body of the limit and 1 byte": {"POST", kind("application/json"), padded(4097), 413},
		"bomb":                         {"POST", kind("application/x-msgpack", "gzip"), inflate(1 << 20), 413},
		"inflated limit and 1 byte":    {"POST", kind("application/json", "gzip"), zip(padded(4097)), 413},
		"inflated limit":               {"POST", kind("application/json", "gzip"), zip(padded(4096)), 200},
		"garbage":                      {"POST", kind("application/x-msgpack"), []byte{0xc1}, 400},
		"no map":                       {"POST", kind("application/x-msgpack"), []byte{0x90}, 400},
		"huge array":                   {"POST", kind("application/x-msgpack"), []byte{0x81, 0xaa, 'o', 'p', 'e', 'r', 'a', 't', 'i', 'o', 'n', 's', 0xdd, 0xff, 0xff, 0xff, 0xff}, 400},
		"trailing bytes":               {"POST", kind("application/x-msgpack"), append(slices.Clone(good), 1), 400},
		"nested":                       {"POST", kind("application/x-msgpack"), bytes.Repeat([]byte{0x91}, 4000), 400},
		"bad JSON":                     {"POST", kind("application/json"), []byte(`{"operations":`), 400},
		"nested JSON":                  {"POST", kind("application/json"), []byte(strings.Repeat("[", 4000)), 400},
	} {
		t.Run(name, func(t *testing.T) {
			status, header, body := g.exchange(c.method, "/sync", c.header, c.body)
			if status != c.status {
				t.Fatalf("status %d, want %d: %s", status, c.status, body)
			}
			if status == 200 {
				return
			}
			var answer struct {
				Code    int
				Message string
			}
			if err := json.Unmarshal(body, &answer); err != nil || answer.Code != status || answer.Message == "" || header.Get("Content-Type") != "application/json" {
				t.Errorf("%s: %s", header.Get("Content-Type"), body)
			}
		})
	}
	// The process is as well as before.
	if response := g.sync(&wire.SyncRequest{Operations: []wire.Op{put("1", "m", "k", "v", 1)}}); response.Ack == nil {
		t.Error("no ack afterwards")
	}
}

// TestSyncChunkedBodyIsBounded: a body without length is cut at the limit.
func TestSyncChunkedBodyIsBounded(t *testing.T) {
	g := startGateway(t, func(c *Config) { c.MaxBodyBytes = 4096 }, nil)
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, g.URL+"/sync", io.MultiReader(bytes.NewReader(make([]byte, 3000)), bytes.NewReader(make([]byte, 3000))))
	if err != nil {
		t.Fatal(err)
	}
	request.Header = msgpack.Clone()
	response, err := http.DefaultTransport.RoundTrip(request)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != http.StatusRequestEntityTooLarge {
		t.Errorf("status %d", response.StatusCode)
	}
}

// TestSyncDribbledBody: a body that comes too slowly ends at the deadline.
func TestSyncDribbledBody(t *testing.T) {
	g := startGateway(t, func(c *Config) { c.BodyTimeout = 50 * time.Millisecond }, nil)
	conn, err := net.Dial("tcp", g.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "POST /sync HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
	answer, err := io.ReadAll(conn) // the gateway answers and closes
	if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 400") {
		t.Errorf("%q, %v", answer, err)
	}
}

func TestSyncAuthorization(t *testing.T) {
	token := func(change time.Duration) string {
		s, err := jwt.NewWithClaims(jwt.SigningMethodHS256, jwt.MapClaims{"sub": "alice", "exp": time.Now().Add(change).Unix()}).SignedString([]byte(testSecret))
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	good := token(time.Hour)
	protected := startGateway(t, func(c *Config) { c.Auth = auth.Config{Secret: testSecret} }, nil)
	open := startGateway(t, nil, nil)
	for name, c := range map[string]struct {
		values          []string
		protected, open int
	}{
		"good":                 {[]string{"Bearer " + good}, 200, 200},
		"lower case scheme":    {[]string{"bearer " + good}, 200, 200},
		"none":                 {nil, 401, 200},
		"bare Bearer":          {[]string{"Bearer"}, 401, 200}, // the original client without a token
		"Bearer and a space":   {[]string{"Bearer "}, 401, 200},
		"expired":              {[]string{"Bearer " + token(-time.Hour)}, 401, 200},
		"garbage":              {[]string{"Bearer x"}, 401, 200},
		"two headers":          {[]string{"Bearer " + good, "Bearer " + good}, 401, 401},
		"list":                 {[]string{"Bearer " + good + ", Bearer " + good}, 401, 401},
		"two tokens":           {[]string{"Bearer " + good + " " + good}, 401, 401},
		"Basic":                {[]string{"Basic YTpi"}, 401, 401},
		"token without Bearer": {[]string{good}, 401, 401},
		"empty header":         {[]string{""}, 401, 401},
	} {
		t.Run(name, func(t *testing.T) {
			header := msgpack.Clone()
			if c.values != nil {
				header["Authorization"] = c.values
			}
			status, answer, body := protected.exchange(http.MethodPost, "/sync", header, nil)
			if status != c.protected {
				t.Errorf("with a key: status %d, want %d", status, c.protected)
			}
			if status == 401 && (answer.Get("WWW-Authenticate") != "Bearer" || !strings.Contains(string(body), `"code":401`)) {
				t.Errorf("answer %v %s", answer, body)
			}
			if status, _, _ = open.exchange(http.MethodPost, "/sync", header, nil); status != c.open {
				t.Errorf("without a key: status %d, want %d", status, c.open)
			}
		})
	}
	// In the URL a token is refused, good or not, with a key or without.
	for _, g := range []*httpGateway{protected, open} {
		for _, path := range []string{"/sync?token=" + good, "/?access_token=" + good, "/ws?token=x"} {
			header := msgpack.Clone()
			header.Set("Authorization", "Bearer "+good)
			if status, _, _ := g.exchange(http.MethodPost, path, header, nil); status != 401 {
				t.Errorf("%.20s: status %d", path, status)
			}
		}
	}
	// Nobody without a token makes the gateway buffer a body.
	header := msgpack.Clone()
	if status, _, _ := protected.exchange(http.MethodPost, "/sync", header, make([]byte, 1<<20)); status != 401 {
		t.Errorf("status %d", status)
	}
}

func TestSyncJSON(t *testing.T) {
	g := startGateway(t, nil, nil)
	header := http.Header{"Content-Type": {"application/json"}}
	body := fmt.Sprintf(`{"clientId":"c","clientHlc":{"millis":1,"counter":0,"nodeId":"c"},
		"operations":[{"id":"1","mapName":"m","key":"k","opType":"PUT","record":{"value":{"n":1.5,"s":"x"},"timestamp":{"millis":%d,"counter":0,"nodeId":"c"}},
		"timestamp":{"millis":5,"counter":0,"nodeId":"c"}}],
		"syncMaps":[{"mapName":"m","lastSyncTimestamp":{"millis":0,"counter":0,"nodeId":""}}],
		"queries":[{"queryId":"q","mapName":"m"}]}`, 5)
	status, _, answer := g.exchange(http.MethodPost, "/sync", header, []byte(body))
	var got struct {
		ServerHlc struct{ Millis float64 }
		Ack       struct{ LastId string }
		Deltas    []struct {
			MapName string
			Records []struct {
				Key, EventType string
				Record         struct{ Value map[string]any }
			}
			ServerSyncTimestamp struct{ NodeId string }
		}
		QueryResults []struct{ Results []struct{ Key string } }
		Errors       []any
	}
	if err := json.Unmarshal(answer, &got); err != nil || status != 200 {
		t.Fatalf("%d %s %v", status, answer, err)
	}
	if got.Ack.LastId != "1" || len(got.Deltas) != 1 || got.Deltas[0].Records[0].EventType != "PUT" || got.Deltas[0].Records[0].Record.Value["n"] != 1.5 ||
		got.Deltas[0].ServerSyncTimestamp.NodeId != "history-1" || len(got.QueryResults) != 1 || got.Errors != nil {
		t.Errorf("%s", answer)
	}
}

func TestSyncBusy(t *testing.T) {
	held := make(chan struct{})
	entered := make(chan struct{}, 10)
	g := startGateway(t, func(c *Config) { c.MaxSyncBytes = int64(c.MaxBodyBytes) }, func(p *fakePartition) {
		p.before = func(_ context.Context, method string) error {
			if method == "Apply" {
				entered <- struct{}{}
				<-held
			}
			return nil
		}
	})
	first := make(chan int, 1)
	body := (&wire.SyncRequest{Operations: []wire.Op{put("1", "m", "k", "v", 1)}}).AppendTo(nil)
	go func() {
		header := msgpack.Clone()
		header.Set("Content-Encoding", "gzip") // of unknown size, so it counts as the greatest
		var b bytes.Buffer
		w := gzip.NewWriter(&b)
		_, _ = w.Write(body)
		_ = w.Close()
		status, _, _ := g.exchange(http.MethodPost, "/sync", header, b.Bytes())
		first <- status
	}()
	<-entered
	response := g.sync(&wire.SyncRequest{Operations: []wire.Op{put("1", "m", "k", "v", 1)}})
	if response.Ack != nil || len(response.Errors) != 1 || response.Errors[0].Code != 503 {
		t.Errorf("%+v", response)
	}
	close(held)
	if status := <-first; status != 200 {
		t.Errorf("status %d", status)
	}
}
