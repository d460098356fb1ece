package main

import (
	"bytes"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/alecthomas/kong"

	"github.com/topgun-sync/topgun/services/allinone"
	"github.com/topgun-sync/topgun/services/persistence"
)

// parse reads a command line. The machine's own environment does not count, only
// what the test gives.
func parse(t *testing.T, environment map[string]string, args ...string) (*topgun, allinone.Config, error) {
	t.Helper()
	for _, name := range []string{
		"TOPGUN_LISTEN", "TOPGUN_OPERATOR_LISTEN", "TOPGUN_DATA", "TOPGUN_STORE", "TOPGUN_POSTGRES", "DATABASE_URL",
		"TOPGUN_NATS", "TOPGUN_LOG_SYNC", "TOPGUN_JWT_SECRET_FILE", "JWT_SECRET", "TOPGUN_NO_AUTH",
	} {
		if value, ok := environment[name]; ok {
			t.Setenv(name, value)
			continue
		}
		t.Setenv(name, "") // restores it after the test
		if err := os.Unsetenv(name); err != nil {
			t.Fatal(err)
		}
	}
	program := &topgun{}
	parser, err := kong.New(program)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := parser.Parse(args); err != nil {
		return nil, allinone.Config{}, err
	}
	config, err := program.config()
	return program, config, err
}

func TestStartsWithoutAnyConfiguration(t *testing.T) {
	program, config, err := parse(t, nil)
	if err != nil {
		t.Fatal(err)
	}
	if program.Listen != "127.0.0.1:8080" || filepath.Base(config.DataDir) != "topgun-data" {
		t.Errorf("listens on %s, keeps data in %s", program.Listen, config.DataDir)
	}
	if config.Persistence.Store != persistence.StoreSQLite || !config.SyncAlways || config.NATSURL != "" {
		t.Errorf("store %s, fsync %t, broker %q", config.Persistence.Store, config.SyncAlways, config.NATSURL)
	}
	if err := errors.Join(config.Validate(), config.Gateway.Validate(), config.Persistence.Validate(), config.Partition.Validate()); err != nil {
		t.Error(err)
	}
}

func TestEveryFlagHasAnEnvironmentVariable(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte(strings.Repeat("s", 32)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	byFlag, flags, err := parse(t, nil, "--listen", "127.0.0.1:0", "--operator-listen", "127.0.0.1:1", "--data", "/d",
		"--store", "postgres", "--postgres", "postgres://h/d", "--nats", "nats://h", "--log-sync", "interval", "--jwt-secret-file", secret)
	if err != nil {
		t.Fatal(err)
	}
	byEnvironment, environment, err := parse(t, map[string]string{
		"TOPGUN_LISTEN": "127.0.0.1:0", "TOPGUN_OPERATOR_LISTEN": "127.0.0.1:1", "TOPGUN_DATA": "/d",
		"TOPGUN_STORE": "postgres", "DATABASE_URL": "postgres://h/d", "TOPGUN_NATS": "nats://h",
		"TOPGUN_LOG_SYNC": "interval", "JWT_SECRET": strings.Repeat("s", 32),
	})
	if err != nil {
		t.Fatal(err)
	}
	if byFlag.Listen != byEnvironment.Listen || byFlag.OperatorListen != "127.0.0.1:1" || byEnvironment.OperatorListen != "127.0.0.1:1" {
		t.Errorf("addresses: %+v and %+v", byFlag, byEnvironment)
	}
	for name, config := range map[string]allinone.Config{"flags": flags, "environment": environment} {
		if config.DataDir != "/d" || config.Persistence.PostgresURL != "postgres://h/d" || config.NATSURL != "nats://h" ||
			config.SyncAlways || config.Gateway.Auth.Secret != strings.Repeat("s", 32) {
			t.Errorf("%s: %+v", name, config)
		}
	}
	if _, config, err := parse(t, map[string]string{"TOPGUN_NO_AUTH": "true"}, "--listen", "0.0.0.0:0"); err != nil || config.Gateway.Validate() != nil {
		t.Errorf("TOPGUN_NO_AUTH: %v, %v", err, config.Gateway.Validate())
	}
}

func TestStoreFollowsFromWhatIsGiven(t *testing.T) {
	for name, c := range map[string]struct {
		environment map[string]string
		args        []string
		want        string
	}{
		"a Postgres URL":                {nil, []string{"--postgres", "postgres://h/d"}, "postgres"},
		"DATABASE_URL":                  {map[string]string{"DATABASE_URL": "postgres://h/d"}, nil, "postgres"},
		"DATABASE_URL, another store":   {map[string]string{"DATABASE_URL": "postgres://h/d"}, []string{"--store", "sqlite"}, "sqlite"},
		"memory":                        {nil, []string{"--store", "memory"}, "memory"},
		"postgres without a URL":        {nil, []string{"--store", "postgres"}, ""},
		"an unknown store":              {nil, []string{"--store", "redis"}, ""},
		"an unknown time of syncing":    {nil, []string{"--log-sync", "never"}, ""},
		"a secret in a file and beside": {map[string]string{"JWT_SECRET": "a"}, []string{"--jwt-secret-file", "main.go"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, config, err := parse(t, c.environment, c.args...)
			if c.want == "" && err == nil {
				t.Errorf("accepted: store %s", config.Persistence.Store)
			}
			if c.want != "" && (err != nil || config.Persistence.Store != c.want) {
				t.Errorf("store %s, %v; want %s", config.Persistence.Store, err, c.want)
			}
		})
	}
}

func TestServingOthersNeedsAKeyOrTheWord(t *testing.T) {
	for _, c := range []struct {
		environment map[string]string
		args        []string
		ok          bool
	}{
		{nil, []string{"--listen", "0.0.0.0:0"}, false},
		{nil, []string{"--listen", ":0"}, false},
		{nil, []string{"--listen", "0.0.0.0:0", "--no-auth"}, true},
		{map[string]string{"JWT_SECRET": strings.Repeat("s", 32)}, []string{"--listen", "0.0.0.0:0"}, true},
	} {
		_, config, err := parse(t, c.environment, c.args...)
		if err != nil {
			t.Fatal(err)
		}
		if got := config.Gateway.Validate() == nil; got != c.ok {
			t.Errorf("%v: accepted %t, want %t", c.args, got, c.ok)
		}
	}
}

// The operator port gives what the client port asks a token for.
func TestOperatorPortIsNotOpenedByAccident(t *testing.T) {
	key := map[string]string{"JWT_SECRET": strings.Repeat("s", 32)}
	for _, c := range []struct {
		environment map[string]string
		args        []string
		ok, warned  bool
	}{
		{nil, nil, true, false},
		{nil, []string{"--operator-listen", "localhost:0"}, true, false},
		{nil, []string{"--operator-listen", "[::1]:0"}, true, false},
		{nil, []string{"--operator-listen", "0.0.0.0:0"}, false, false},
		{nil, []string{"--operator-listen", ":0"}, false, false},
		{nil, []string{"--operator-listen", "0.0.0.0"}, false, false},
		{nil, []string{"--operator-listen", "0.0.0.0:0", "--no-auth"}, true, true},
		{key, []string{"--operator-listen", "0.0.0.0:0"}, true, true},
	} {
		program, config, err := parse(t, c.environment, c.args...)
		if err != nil {
			t.Fatal(err)
		}
		var lines bytes.Buffer
		err = program.checkOperator(config, slog.New(slog.NewTextHandler(&lines, nil)))
		if (err == nil) != c.ok || strings.Contains(lines.String(), "WARN") != c.warned {
			t.Errorf("%v: %v, log %q", c.args, err, lines.String())
		}
	}
}

func TestACK09_TheBannerSaysWhatAnAckIsWorth(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		want []string
	}{
		"default":  {nil, []string{"listening on http://h:1\n", "operator on http://h:2\n", "fsynced", "loopback only", "topgun.db"}},
		"memory":   {[]string{"--store", "memory"}, []string{"NOT durable", "everything is gone"}},
		"interval": {[]string{"--log-sync", "interval"}, []string{"a power cut loses up to the last two minutes"}},
		"external": {[]string{"--nats", "nats://h"}, []string{"sync_interval"}},
		"no-auth":  {[]string{"--no-auth"}, []string{"everybody"}},
	} {
		t.Run(name, func(t *testing.T) {
			program, config, err := parse(t, nil, c.args...)
			if err != nil {
				t.Fatal(err)
			}
			banner := program.banner(config, "h:1", "h:2")
			for _, want := range c.want {
				if !strings.Contains(banner, want) {
					t.Errorf("%q is missing in:\n%s", want, banner)
				}
			}
			if lines := strings.Count(banner, "\n"); lines >= 10 {
				t.Errorf("%d lines", lines)
			}
		})
	}
}

func TestASecondServerFindsAnOperatorPort(t *testing.T) {
	first, err := listenOperator("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = first.Close() }()
	if _, err := listenOperator(first.Addr().String()); err == nil {
		t.Error("an address that was asked for and is taken was replaced")
	}
	// Whether the default is free or not: there is a port.
	second, err := listenOperator("")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = second.Close() }()
	third, err := listenOperator("")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = third.Close() }()
	if third.Addr().(*net.TCPAddr).Port == second.Addr().(*net.TCPAddr).Port {
		t.Error("two operator ports are one")
	}
}
