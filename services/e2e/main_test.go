package e2e

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"github.com/topgun-sync/topgun/services/internal/broker"
)

// The test binary is also the NATS server of the four processes, so that it can be
// killed like the others: with these variables set it runs one and nothing else.
const (
	natsDirEnv    = "TOPGUN_E2E_NATS_DIR"
	natsListenEnv = "TOPGUN_E2E_NATS_LISTEN"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(natsDirEnv); dir != "" {
		if err := runNATS(dir, os.Getenv(natsListenEnv)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	code := m.Run()
	if binDir != "" {
		os.RemoveAll(binDir)
	}
	os.Exit(code)
}

func runNATS(dir, listen string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	server, err := broker.StartEmbedded(broker.EmbeddedConfig{Dir: dir, SyncAlways: true, Listen: listen, Logger: slog.Default()})
	if err != nil {
		return err
	}
	slog.Info("nats started", "dir", dir)
	fmt.Println(listening, server.ClientURL())
	<-ctx.Done()
	return server.Shutdown()
}

var binDir string

// binaries builds the programs once, with the race detector.
var binaries = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "topgun-e2e")
	if err != nil {
		return "", err
	}
	binDir = dir
	build := exec.Command("go", "build", "-race", "-o", dir+string(filepath.Separator), "../cmd/...")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the programs: %w\n%s", err, out)
	}
	return dir, nil
})

// program returns the path of one of the programs under services/cmd.
func program(t testing.TB, name string) string {
	t.Helper()
	dir, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, name)
}
