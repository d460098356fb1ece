package allinone

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/topgun-sync/topgun/services/internal/obs"
	"github.com/topgun-sync/topgun/services/persistence"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// server is a running one.
type server struct {
	client, operator string
	stop             context.CancelFunc
	ended            chan error
	logs             *lines
}

// lines collects the log, for failures.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return listener
}

// start starts a server and waits until it serves.
func start(t *testing.T, config Config) *server {
	t.Helper()
	s := &server{ended: make(chan error, 1), logs: &lines{}}
	telemetry, err := obs.Setup(t.Context(), obs.Config{Service: "topgun-test"}, s.logs)
	if err != nil {
		t.Fatal(err)
	}
	listeners := Listeners{Client: listen(t), Operator: listen(t)}
	s.client, s.operator = "http://"+listeners.Client.Addr().String(), "http://"+listeners.Operator.Addr().String()
	var ctx context.Context
	ctx, s.stop = context.WithCancel(context.WithoutCancel(t.Context()))
	ready := make(chan struct{})
	go func() {
		s.ended <- errors.Join(Run(ctx, config, listeners, telemetry, func() { close(ready) }), telemetry.Shutdown(ctx))
	}()
	t.Cleanup(func() {
		s.stop()
		if t.Failed() {
			t.Log(s.logs)
		}
	})
	select {
	case <-ready:
	case err := <-s.ended:
		t.Fatalf("ended at start: %v", err)
	case <-time.After(2 * time.Minute):
		t.Fatalf("not ready in time; the log:\n%s", s.logs)
	}
	return s
}

// end stops the server in order and reports how long that took.
func (s *server) end(t *testing.T) time.Duration {
	t.Helper()
	begin := time.Now()
	s.stop()
	if err := <-s.ended; err != nil {
		t.Errorf("stop: %v", err)
	}
	return time.Since(begin)
}

func exchange(t *testing.T, method, url, body string) (status int, answer string) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Content-Type", "application/json")
	transport := &http.Transport{DisableKeepAlives: true}
	response, err := (&http.Client{Transport: transport}).Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = response.Body.Close() }()
	content, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, string(content)
}

const read = `{"syncMaps":[{"mapName":"todos","lastSyncTimestamp":{"millis":0,"counter":0,"nodeId":""}}]}`

// put is a write of the present time.
func put() string {
	return fmt.Sprintf(`{"operations":[{"id":"1","mapName":"todos","opType":"PUT","key":"k",
		"record":{"value":{"text":"kept"},"timestamp":{"millis":%d,"counter":0,"nodeId":"a"}}}]}`, time.Now().UnixMilli())
}

func TestStopsInTimeAndKeepsTheData(t *testing.T) {
	config := DefaultConfig(t.TempDir())
	s := start(t, config)
	if status, answer := exchange(t, http.MethodPost, s.client+"/sync", put()); status != 200 || !strings.Contains(answer, `"lastId":"1"`) {
		t.Fatalf("write: %d %s", status, answer)
	}
	if took := s.end(t); took >= config.Gateway.DrainTimeout { // nothing has to be cut off
		t.Errorf("the stop took %s", took)
	}
	s = start(t, config)
	if status, answer := exchange(t, http.MethodPost, s.client+"/sync", read); status != 200 || !strings.Contains(answer, `"text":"kept"`) {
		t.Errorf("read after the second start: %d %s", status, answer)
	}
	s.end(t)
}

func TestOperatorPortServesWhatClientsMustNotSee(t *testing.T) {
	config := DefaultConfig("")
	config.Persistence.Store = persistence.StoreMemory
	s := start(t, config)
	for path, want := range map[string]int{"/metrics": 200, "/debug/pprof/cmdline": 200, "/health/ready": 200, "/health/live": 200} {
		if status, _ := exchange(t, http.MethodGet, s.operator+path, ""); status != want {
			t.Errorf("operator port, %s: %d, want %d", path, status, want)
		}
	}
	for path, want := range map[string]int{"/metrics": 404, "/debug/pprof/cmdline": 404, "/health/ready": 200, "/health/live": 200} {
		if status, _ := exchange(t, http.MethodGet, s.client+path, ""); status != want {
			t.Errorf("client port, %s: %d, want %d", path, status, want)
		}
	}
	for _, service := range []string{"fanout.v1.FanoutService", "persistence.v1.PersistenceService", "partition.v1.PartitionService", "gateway.v1.GatewayService"} {
		path := "/topgun." + service + "/Describe"
		if status, answer := exchange(t, http.MethodPost, s.operator+path, "{}"); status != 200 {
			t.Errorf("operator port, %s: %d %s", path, status, answer)
		}
		if status, _ := exchange(t, http.MethodPost, s.client+path, "{}"); status != 404 {
			t.Errorf("client port, %s: %d, want 404", path, status)
		}
	}
	s.end(t)
}

func TestOWN10_ASecondProcessOnTheFolderIsRefused(t *testing.T) {
	config := DefaultConfig(t.TempDir())
	s := start(t, config)
	telemetry, err := obs.Setup(t.Context(), obs.Config{Service: "topgun-test"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	err = Run(t.Context(), config, Listeners{Client: listen(t), Operator: listen(t)}, telemetry, func() { t.Error("the second one serves") })
	if err == nil || !strings.Contains(err.Error(), "another process is using the data folder") {
		t.Errorf("the second process: %v", err)
	}
	if err := telemetry.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	s.end(t)
}

func TestConfigThatWouldLoseDataIsRefused(t *testing.T) {
	config := DefaultConfig(t.TempDir())
	config.Persistence.Store, config.NATSURL = persistence.StoreMemory, "nats://127.0.0.1:4222"
	if err := config.Validate(); err == nil || !strings.Contains(err.Error(), "memory store") {
		t.Errorf("memory store on an external log: %v", err)
	}
	if err := DefaultConfig("").Validate(); err == nil || !strings.Contains(err.Error(), "--data") {
		t.Errorf("no folder: %v", err)
	}
}

// An ack of the memory store must not claim more than it is worth (ACK-03).
func TestACK03_TheMemoryStoreAcksMemory(t *testing.T) {
	for store, want := range map[string]string{persistence.StoreMemory: "LEVEL_MEMORY", persistence.StoreSQLite: "LEVEL_APPLIED"} {
		config := DefaultConfig(t.TempDir())
		config.Persistence.Store = store
		s := start(t, config)
		_, answer := exchange(t, http.MethodPost, s.operator+"/topgun.partition.v1.PartitionService/Describe", "{}")
		if !strings.Contains(answer, fmt.Sprintf("%q", want)) {
			t.Errorf("%s: %s, want %s", store, answer, want)
		}
		s.end(t)
	}
}
