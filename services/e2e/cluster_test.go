package e2e

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/topgun-sync/topgun/client"
	"github.com/topgun-sync/topgun/core/lwwmap"
)

// Cluster is a running TopGun, however many processes it takes.
type Cluster interface {
	// URLs are the addresses of the client ports, http://host:port, one per
	// gateway. They stay the same when processes are restarted.
	URLs() []string
	// Roles are the names of the processes.
	Roles() []string
	// Kill ends a process with SIGKILL.
	Kill(role string)
	// Restart starts processes that have ended, all at once, and returns when they
	// listen.
	Restart(t testing.TB, roles ...string)
	// Stop asks every process to end, in the order an operator would, and returns
	// the longest time that one of them took.
	Stop(t testing.TB) time.Duration
	// Start starts all processes, after Stop, and returns when they listen.
	Start(t testing.TB)
	// Rows reads the records of a map from the database, past every service.
	Rows(t testing.TB, mapName string) map[string]lwwmap.Record
	// Database is the Postgres server behind the cluster, nil if it has none.
	Database() *database
}

// options change how a cluster runs.
type options struct {
	// jwtSecret makes the cluster demand tokens.
	jwtSecret string
	// collector is the host:port that traces go to.
	collector string
	// retention is how long tombstones are kept; 0 is the default.
	retention time.Duration
	// postgres puts a Postgres behind the one binary, which has SQLite by default.
	postgres bool
}

func (o options) env() []string {
	// The same faults shall end in the same way wherever the tests run.
	env := []string{"GOTRACEBACK=all"}
	if o.collector != "" {
		env = append(env,
			"OTEL_EXPORTER_OTLP_ENDPOINT=http://"+o.collector,
			"OTEL_EXPORTER_OTLP_INSECURE=true",
			"OTEL_BSP_SCHEDULE_DELAY=100",
			"OTEL_TRACES_SAMPLER=always_on")
	}
	return env
}

func (o options) retentionFlags() []string {
	if o.retention == 0 {
		return nil
	}
	return []string{"--tombstone-retention", o.retention.String()}
}

func (o options) authFlags(t testing.TB, dir string) []string {
	t.Helper()
	if o.jwtSecret == "" {
		return []string{"--no-auth"}
	}
	file := filepath.Join(dir, "jwt-secret")
	if err := os.WriteFile(file, []byte(o.jwtSecret), 0o600); err != nil {
		t.Fatal(err)
	}
	return []string{"--jwt-secret-file", file}
}

// stories runs a story once per topology.
func stories(t *testing.T, o options, story func(t *testing.T, c Cluster)) {
	t.Helper()
	t.Run("one process", func(t *testing.T) { story(t, newOneProcess(t, o)) })
	t.Run("four processes", func(t *testing.T) { story(t, newFourProcesses(t, o)) })
}

// group is what both topologies are made of: processes in the order of starting.
type group struct {
	processes []*process
	urls      []string
	db        *database
}

func (g *group) URLs() []string      { return g.urls }
func (g *group) Database() *database { return g.db }

func (g *group) Roles() []string {
	var roles []string
	for _, p := range g.processes {
		roles = append(roles, p.name)
	}
	return roles
}

func (g *group) role(name string) *process {
	for _, p := range g.processes {
		if p.name == name {
			return p
		}
	}
	panic("no process is called " + name)
}

func (g *group) Kill(role string) { g.role(role).kill() }

func (g *group) Restart(t testing.TB, roles ...string) {
	t.Helper()
	for _, role := range roles {
		g.role(role).launch(t)
	}
	for _, role := range roles { // one may wait for another before it listens
		g.role(role).waitListening(t)
	}
}

func (g *group) Start(t testing.TB) {
	t.Helper()
	g.Restart(t, g.Roles()...)
}

func (g *group) Stop(t testing.TB) time.Duration {
	t.Helper()
	var longest time.Duration
	for _, p := range slices.Backward(g.processes) {
		longest = max(longest, p.terminate(t, syscall.SIGTERM))
	}
	return longest
}

// run starts the processes and makes sure that they end with the test.
func (g *group) run(t testing.TB) {
	t.Helper()
	for _, p := range g.processes {
		p.launch(t)
		t.Cleanup(p.kill)
	}
	for _, p := range g.processes {
		p.waitListening(t)
	}
}

const (
	listening = "listening on"
	operator  = "operator on"
)

// oneProcess is the one binary with its embedded NATS server.
type oneProcess struct {
	group
	rows func(t testing.TB, mapName string) map[string]lwwmap.Record
}

func newOneProcess(t testing.TB, o options) Cluster {
	t.Helper()
	dir := t.TempDir()
	c := new(oneProcess)
	address := freeAddress(t)
	args := []string{"--listen", address, "--operator-listen", freeAddress(t), "--data", dir}
	args = append(args, o.authFlags(t, dir)...)
	args = append(args, o.retentionFlags()...)
	c.rows = func(t testing.TB, mapName string) map[string]lwwmap.Record {
		t.Helper()
		return sqliteRows(t, dir, mapName)
	}
	if o.postgres {
		c.db = newDatabase(t)
		args = append(args, "--postgres", c.db.url)
		c.rows = c.db.rows
	}
	c.processes = []*process{{
		name: "topgun", path: program(t, "topgun"), args: args, env: o.env(), wants: []string{listening, operator},
	}}
	c.urls = []string{"http://" + address}
	c.run(t)
	return c
}

func (c *oneProcess) Rows(t testing.TB, mapName string) map[string]lwwmap.Record {
	t.Helper()
	return c.rows(t, mapName)
}

// fourProcesses is the four services as processes, with two gateways, a NATS
// server and a Postgres.
type fourProcesses struct{ group }

func newFourProcesses(t testing.TB, o options) Cluster {
	t.Helper()
	dir := t.TempDir()
	c := new(fourProcesses)
	c.db = newDatabase(t)
	addr := map[string]string{}
	for _, role := range []string{"nats", "fanout", "persistence", "partition", "gateway-1", "gateway-2"} {
		addr[role] = freeAddress(t)
	}
	nats := "nats://" + addr["nats"]
	url := func(role string) string { return "http://" + addr[role] }
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	service := func(role, file string, args ...string) *process {
		return &process{
			name: role, path: program(t, file), env: o.env(), wants: []string{listening},
			args: append([]string{"--listen", addr[role]}, args...),
		}
	}
	c.processes = []*process{
		{
			name: "nats", path: self, wants: []string{listening},
			env: append(o.env(), natsDirEnv+"="+filepath.Join(dir, "nats"), natsListenEnv+"="+addr["nats"]),
		},
		service("fanout", "fanout", "--nats", nats, "--partition", url("partition")),
		service("persistence", "persistence", "--nats", nats, "--postgres", c.db.url, "--shards", "4"),
		service("partition", "partition", append([]string{
			"--nats", nats, "--persistence", url("persistence"), "--shards", "4",
		}, o.retentionFlags()...)...),
	}
	for _, role := range []string{"gateway-1", "gateway-2"} {
		args := append([]string{
			"--operator-listen", freeAddress(t), "--partition", url("partition"), "--fanout", url("fanout"),
			"--persistence", url("persistence"),
		}, o.authFlags(t, dir)...)
		gateway := service(role, "gateway", args...)
		gateway.wants = append(gateway.wants, operator)
		c.processes = append(c.processes, gateway)
		c.urls = append(c.urls, url(role))
	}
	c.run(t)
	return c
}

func (c *fourProcesses) Rows(t testing.TB, mapName string) map[string]lwwmap.Record {
	t.Helper()
	return c.db.rows(t, mapName)
}

// gateway returns the URL of the i-th gateway, or of the only one.
func gateway(c Cluster, i int) string {
	urls := c.URLs()
	return urls[i%len(urls)]
}

// webSocket turns the URL of a gateway into that of its WebSocket.
func webSocket(url string) string { return "ws" + strings.TrimPrefix(url, "http") + "/ws" }

// open opens a client that ends with the test. It retries quickly, because tests
// kill what it is connected to.
func open(t testing.TB, url, node string, change ...func(*client.Config)) *client.Client {
	t.Helper()
	cfg := client.Config{
		URL: url, NodeID: node,
		RetryMin: 20 * time.Millisecond, RetryMax: 500 * time.Millisecond,
		PollInterval: 100 * time.Millisecond,
	}
	for _, f := range change {
		f(&cfg)
	}
	c, err := client.Open(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// within returns a context for one step of a test.
func within(t testing.TB, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

func flush(t testing.TB, c *client.Client) {
	t.Helper()
	if err := c.Flush(within(t, startDeadline)); err != nil {
		t.Fatal(err)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
