package main

import (
	"strings"
	"testing"
)

func TestForbidden(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		from, file, imports string
		// want is part of the reason; empty means that the import is allowed.
		want string
	}{
		{"core/hlc", "hlc.go", "core/merkle", ""},
		{"core/hlc", "hlc.go", "gen/go/topgun/types/v1", "nothing of ours"},
		{"core/wire", "wire.go", "github.com/tinylib/msgp/msgp", ""},
		{"core/wire", "wire.go", "github.com/google/uuid", "one dependency"},
		{"core/wire", "wire_test.go", "pgregory.net/rapid", ""},
		{"gen/go/topgun/log/v1", "log.pb.go", "google.golang.org/protobuf/proto", ""},
		{"gen/go/topgun/log/v1", "log.pb.go", "core/hlc", "nothing of ours"},
		{"client", "session.go", "core/wire", ""},
		{"client", "session.go", "github.com/coder/websocket", ""},
		{"client", "session.go", "services/gateway", "without the server"},
		{"client", "session.go", "github.com/google/uuid", "promise"},
		{"tools/bench", "main.go", "client", ""},
		{"tools/bench", "main.go", "services/allinone", "from outside"},
		{"services/internal/bus", "bus.go", "github.com/nats-io/nats.go", ""},
		{"services/internal/bus", "bus.go", "services/fanout", "knows none of them"},
		{"services/internal/run", "run.go", "github.com/nats-io/nats.go", "NATS"},
		{"services/partition", "shard.go", "services/internal/commitlog", ""},
		{"services/partition", "shard.go", "gen/go/topgun/log/v1", ""},
		{"services/partition", "shard.go", "gen/go/topgun/partition/v1", "protobuf stops"},
		{"services/partition", "rpc.go", "gen/go/topgun/partition/v1", ""},
		{"services/partition", "shard.go", "services/persistence", "gen's client"},
		{"services/partition", "shard.go", "services/persistence/postgres", "gen's client"},
		{"services/partition", "shard.go", "services/allinone", "gen's client"},
		{"services/partition", "shard.go", "core/wire", "two edges"},
		{"services/partition", "shard_test.go", "core/wire", ""},
		{"services/partition", "shard.go", "github.com/nats-io/nats.go", "NATS"},
		{"services/partition", "shard.go", "client", "knows neither"},
		{"services/gateway/auth", "auth.go", "services/gateway", ""},
		{"services/gateway", "ws.go", "github.com/gobwas/ws", ""},
		{"services/gateway", "ws.go", "core/wire", ""},
		{"services/fanout", "hub.go", "github.com/gobwas/ws", "socket ends"},
		{"services/persistence/postgres", "store.go", "github.com/jackc/pgx/v5", ""},
		{"services/persistence", "drain.go", "github.com/jackc/pgx/v5", "three stores"},
		{"services/persistence", "drain_test.go", "github.com/jackc/pgx/v5", "three stores"},
		{"services/cmd/topgun", "main.go", "services/allinone", ""},
		{"services/allinone", "allinone.go", "services/gateway", ""},
		{"services/allinone", "allinone.go", "client", "made of services"},
		{"services/e2e", "story_test.go", "client", ""},
		{"services/e2e", "story_test.go", "tools/bench", "a client"},
	} {
		f := file{pkg: c.from, name: c.file, test: strings.HasSuffix(c.file, "_test.go")}
		got := forbidden(f, c.imports)
		if (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("%s/%s imports %s: got %q, want %q in it", c.from, c.file, c.imports, got, c.want)
		}
	}
}

// TestCheckReportsAViolation is the negative control: a workspace with one
// forbidden import gives one line that names file, import and reason.
func TestCheckReportsAViolation(t *testing.T) {
	t.Parallel()
	got := check([]file{
		{pkg: "services/fanout", name: "hub.go", imports: []string{"context", "services/gateway"}},
		{pkg: "core/hlc", name: "hlc.go", imports: []string{"time"}},
	})
	const want = "services/fanout/hub.go imports services/gateway: a service calls another one through gen's client, never by import"
	if len(got) != 1 || got[0] != want {
		t.Errorf("got %q, want %q alone", got, want)
	}
}

// TestLoadReadsThisFile shows that the list of files is the real one.
func TestLoadReadsThisFile(t *testing.T) {
	t.Parallel()
	files, err := load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if f.pkg == "tools/depcheck" && f.name == "main_test.go" && f.test {
			return
		}
	}
	t.Error("main_test.go of tools/depcheck is not among the files of the workspace")
}
