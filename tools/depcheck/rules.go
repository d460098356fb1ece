package main

import (
	"slices"
	"strings"
)

// room says what of ours the packages under a folder may import. The first room
// that a package is under decides.
type room struct {
	under string
	may   []string
	why   string
}

// rooms is the table "who may import whom".
func rooms() []room {
	everything := []string{"core", "gen", "services"}
	return []room{
		{"core", []string{"core"}, "the kernel imports nothing of ours"},
		{"gen", []string{"gen"}, "generated code imports nothing of ours"},
		{"client", []string{"client", "core", "gen"}, "users import the SDK without the server"},
		{"tools", []string{"tools", "client", "core", "gen"}, "tools play a user from outside"},
		{"services/internal", []string{"services/internal", "core", "gen"}, "what the services share knows none of them"},
		{"services/allinone", everything, "the joined process is made of services"},
		{"services/cmd", everything, "a main is made of services"},
		{"services/e2e", append(everything, "client"), "stories see the services and a client"},
		{"services/sim", append(everything, "client"), "storms see the services and a client"},
	}
}

// confined is something that only some packages may import.
type confined struct {
	what []string
	to   []string
	// inTests is whether any test may import it as well.
	inTests bool
	why     string
}

func confinements() []confined {
	return []confined{
		{
			what: []string{"github.com/jackc/pgx", "github.com/exaring/otelpgx"},
			to:   []string{"services/persistence/postgres", "services/internal/pgtest", "services/e2e"},
			why:  "Postgres is one of three stores; what is said to it stays in persistence/postgres",
		},
		{
			what: []string{"github.com/pressly/goose"},
			to:   []string{"services/persistence/postgres", "services/persistence/sqlite"},
			why:  "a schema belongs to its store",
		},
		{
			what: []string{"modernc.org/sqlite"},
			to:   []string{"services/persistence/sqlite"}, inTests: true,
			why: "SQLite is one of three stores; what is said to it stays in persistence/sqlite",
		},
		{
			what: []string{"github.com/nats-io"},
			to:   []string{"services/internal/commitlog", "services/internal/bus", "services/internal/broker"}, inTests: true,
			why: "NATS's rules of delivery are known in commitlog, bus and broker only",
		},
		{
			what: []string{"github.com/gobwas", "github.com/coder/websocket"},
			to:   []string{"services/gateway", "client", "tools/bench"}, inTests: true,
			why: "a socket ends at the gateway; inside there are sessions and frames",
		},
		{
			what: []string{"core/wire"},
			to:   []string{"core/wire", "services/gateway", "client", "tools"}, inTests: true,
			why: "the client protocol is spoken at the two edges only; between services it is protobuf",
		},
	}
}

// forbidden says why a file may not import something, or nothing when it may.
func forbidden(f file, imp string) string {
	for _, c := range confinements() {
		if underAny(imp, c.what) && !underAny(f.pkg, c.to) && (!f.test || !c.inTests) {
			return c.why
		}
	}
	if !ours(imp) {
		return thirdParty(f, imp)
	}
	for _, r := range rooms() {
		if under(f.pkg, r.under) {
			if underAny(imp, r.may) {
				return ""
			}
			return r.why
		}
	}
	// What is left under services is a service: services/<service>/...
	if !under(f.pkg, "services") {
		return "a package of ours lives in core, gen, client, services or tools"
	}
	service := strings.Join(strings.SplitN(f.pkg, "/", 3)[:2], "/")
	if under(imp, "services") && !underAny(imp, []string{service, "services/internal"}) {
		return "a service calls another one through gen's client, never by import"
	}
	if under(imp, "client") || under(imp, "tools") {
		return "a service knows neither the SDK nor our tools"
	}
	return protobuf(f, imp)
}

// thirdParty keeps the dependency lists of the modules that other people import.
func thirdParty(f file, imp string) string {
	if f.test || !strings.Contains(strings.SplitN(imp, "/", 2)[0], ".") {
		return "" // tests and the standard library
	}
	switch {
	case under(f.pkg, "core") && !underAny(imp, []string{"github.com/tinylib/msgp"}):
		return "the kernel has one dependency, a msgpack codec"
	case under(f.pkg, "client") && !underAny(imp, []string{"github.com/coder/websocket", "github.com/tinylib/msgp"}):
		return "the SDK's dependency list is a promise: a WebSocket library and core's msgpack codec"
	}
	return ""
}

// protobuf keeps messages of the services' calls at the edge of a service: a
// shard, a queue, a hub, a session never see one. Generated clients are the seam
// between services and may stand anywhere. The messages of the log and of the bus
// are also what is stored and broadcast, and may be used where that is done.
func protobuf(f file, imp string) string {
	if f.test || !under(imp, "gen") || strings.HasSuffix(imp, "connect") ||
		underAny(imp, []string{"gen/go/topgun/log", "gen/go/topgun/types", "gen/go/topgun/fanout"}) {
		return ""
	}
	edge := []string{
		"rpc.go", "operator.go", "check.go", // calls that come in
		"route.go", "batch.go", "read.go", "replay.go", // calls that go out
		"convert.go", // between the two worlds
		// Rooms that make or take calls of their own.
		"fanout/partitions.go",
		"gateway/concern.go", "gateway/counters.go", "gateway/journal.go", "gateway/locks.go",
		"partition/lockcalls.go", "partition/query.go",
	}
	if slices.Contains(edge, f.name) || slices.Contains(edge, strings.TrimPrefix(f.pkg, "services/")+"/"+f.name) {
		return ""
	}
	return "protobuf stops at a service's edge: " + strings.Join(edge, ", ")
}

func ours(imp string) bool {
	return underAny(imp, []string{"core", "gen", "client", "services", "tools"})
}

// under reports whether path is folder or below it.
func under(path, folder string) bool {
	return path == folder || strings.HasPrefix(path, folder+"/")
}

func underAny(path string, folders []string) bool {
	return slices.ContainsFunc(folders, func(folder string) bool { return under(path, folder) })
}
