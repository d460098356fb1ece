package broker_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/goleak"

	"github.com/topgun-sync/topgun/services/internal/broker"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func start(t *testing.T, config broker.EmbeddedConfig) *broker.Embedded {
	t.Helper()
	embedded, err := broker.StartEmbedded(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for range 2 { // the second does nothing
			if err := embedded.Shutdown(); err != nil {
				t.Error(err)
			}
		}
	})
	return embedded
}

// appendMessage adds one message to the stream S, making it if it is missing, and returns
// its sequence.
func appendMessage(t *testing.T, embedded *broker.Embedded, storage jetstream.StorageType) uint64 {
	t.Helper()
	nc, err := embedded.Connect("test")
	if err != nil {
		t.Fatal(err)
	}
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := js.CreateOrUpdateStream(ctx, jetstream.StreamConfig{Name: "S", Subjects: []string{"s"}, Storage: storage}); err != nil {
		t.Fatal(err)
	}
	ack, err := js.Publish(ctx, "s", []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	return ack.Sequence
}

func TestEmbeddedKeepsItsStreams(t *testing.T) {
	config := broker.EmbeddedConfig{Dir: t.TempDir(), SyncAlways: true}
	for want := uint64(1); want <= 3; want++ {
		embedded := start(t, config)
		if got := appendMessage(t, embedded, jetstream.FileStorage); got != want {
			t.Errorf("sequence %d, want %d", got, want)
		}
		if url := embedded.ClientURL(); url != "" {
			t.Errorf("listens on %s, want nowhere", url)
		}
		if err := embedded.Shutdown(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestMemoryLeavesNothing(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	embedded := start(t, broker.EmbeddedConfig{Memory: true})
	if got := appendMessage(t, embedded, jetstream.MemoryStorage); got != 1 {
		t.Errorf("sequence %d, want 1", got)
	}
	if err := embedded.Shutdown(); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(os.Getenv("TMPDIR"))
	if err != nil || len(entries) > 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
	if _, err := embedded.Connect("late"); err == nil {
		t.Error("connected to a server that is shut down")
	}
}

func TestListener(t *testing.T) {
	embedded := start(t, broker.EmbeddedConfig{Memory: true, Listen: "127.0.0.1:0"})
	nc, err := broker.Connect(t.Context(), embedded.ClientURL(), "outside", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if nc.MaxPayload() != 8<<20 {
		t.Errorf("payloads of %d bytes, want 8 MiB", nc.MaxPayload())
	}
}

// freeAddress is where nobody listens.
func freeAddress(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}

// SEC-05: the error names the address, not the password.
func TestUnreachableBroker(t *testing.T) {
	address := freeAddress(t)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := broker.Connect(ctx, "nats://user:hunter2@"+address, "test", nil)
	if err == nil || !strings.Contains(err.Error(), "the broker at nats://"+address+" is unreachable") || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("got %v", err)
	}
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v does not say that the time was over", err)
	}
}

func TestConnectWaitsForTheBroker(t *testing.T) {
	address := freeAddress(t)
	connected := make(chan error, 1)
	go func() {
		nc, err := broker.Connect(t.Context(), "nats://"+address, "early", nil)
		if err == nil {
			nc.Close()
		}
		connected <- err
	}()
	start(t, broker.EmbeddedConfig{Memory: true, Listen: address})
	select {
	case err := <-connected:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("not connected although the broker is there")
	}
}

func TestBadURLs(t *testing.T) {
	for _, url := range []string{
		"", "nats://", "127.0.0.1:4222", "http://host:1", "nats://a:1,", "nats://a:1,ftp://b:2",
		"nats://user:hunter2@host:bad port", "nats://user:hunter2@[::1",
	} {
		_, err := broker.Connect(t.Context(), url, "test", nil)
		if err == nil || !strings.Contains(err.Error(), "want nats://host:port") || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%q: got %v", url, err)
		}
	}
}

func TestBadEmbeddedConfig(t *testing.T) {
	for want, config := range map[string]broker.EmbeddedConfig{
		"Dir is empty":              {},
		"MaxStoreBytes is negative": {Memory: true, MaxStoreBytes: -1},
		"Listen must be host:port":  {Memory: true, Listen: "4222"},
		"port of 0 to 65535":        {Memory: true, Listen: "127.0.0.1:65536"},
	} {
		if _, err := broker.StartEmbedded(config); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	first := start(t, broker.EmbeddedConfig{Memory: true, Listen: "127.0.0.1:0"})
	taken := strings.TrimPrefix(first.ClientURL(), "nats://")
	if _, err := broker.StartEmbedded(broker.EmbeddedConfig{Memory: true, Listen: taken}); err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("a port that is taken: %v", err)
	}
	file := t.TempDir() + "/file"
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	_, err := broker.StartEmbedded(broker.EmbeddedConfig{Dir: file})
	if err == nil || !strings.Contains(err.Error(), "JetStream") || time.Since(begun) > 20*time.Second {
		t.Errorf("a folder that is a file: %v after %s", err, time.Since(begun))
	}
}

// The state of a connection is in the log, without the password.
func TestConnectionLog(t *testing.T) {
	log := make(lines, 100)
	logger := slog.New(slog.NewTextHandler(log, nil))
	embedded := start(t, broker.EmbeddedConfig{Memory: true, Listen: "127.0.0.1:0"})
	url := strings.Replace(embedded.ClientURL(), "nats://", "nats://user:hunter2@", 1)
	nc, err := broker.Connect(t.Context(), url, "logged", logger)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if err := nc.ForceReconnect(); err != nil {
		t.Fatal(err)
	}
	all := ""
	for !strings.Contains(all, "broker connection restored") {
		select {
		case line := <-log:
			all += line
		case <-time.After(time.Minute):
			t.Fatalf("not in the log: %s", all)
		}
	}
	if strings.Contains(all, "hunter2") || !strings.Contains(all, "connection=logged") {
		t.Errorf("logged %s", all)
	}
}

// lines is a log that a test can wait for.
type lines chan string

func (l lines) Write(p []byte) (int, error) {
	l <- string(p)
	return len(p), nil
}
