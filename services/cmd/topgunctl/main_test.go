package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"go.uber.org/goleak"

	"github.com/topgun-sync/topgun/services/allinone"
	"github.com/topgun-sync/topgun/services/internal/obs"
	"github.com/topgun-sync/topgun/services/persistence"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// server is a running one binary.
type server struct{ client, operator string }

func memoryConfig() allinone.Config {
	config := allinone.DefaultConfig("")
	config.Persistence.Store = persistence.StoreMemory
	config.Gateway.GatewayID = "gw"
	return config
}

// start starts a server, which stops with the test.
func start(t *testing.T, config allinone.Config) server {
	t.Helper()
	listen := func() net.Listener {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	telemetry, err := obs.Setup(t.Context(), obs.Config{Service: "topgun-test"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	listeners := allinone.Listeners{Client: listen(), Operator: listen()}
	s := server{listeners.Client.Addr().String(), "http://" + listeners.Operator.Addr().String()}
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	ready, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- errors.Join(allinone.Run(ctx, config, listeners, telemetry, func() { close(ready) }), telemetry.Shutdown(ctx))
	}()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("stop: %v", err)
		}
	})
	select {
	case <-ready:
	case err := <-ended:
		ended <- nil
		t.Fatalf("ended at start: %v", err)
	}
	return s
}

// result is what a run of the program left.
type result struct {
	code     int
	out, err string
}

// ctl runs the program against a server.
func (s server) ctl(t *testing.T, in string, args ...string) result {
	t.Helper()
	return ctl(t, in, append([]string{"--server", s.operator}, args...)...)
}

func ctl(t *testing.T, in string, args ...string) result {
	t.Helper()
	for _, name := range []string{"SERVER", "PARTITION", "PERSISTENCE", "FANOUT", "GATEWAY", "TIMEOUT"} {
		if value, set := os.LookupEnv("TOPGUN_" + name); set {
			t.Setenv("TOPGUN_"+name, value) // restores it after the test
			if err := os.Unsetenv("TOPGUN_" + name); err != nil {
				t.Fatal(err)
			}
		}
	}
	var out, errOut bytes.Buffer
	code := run(t.Context(), args, strings.NewReader(in), &out, &errOut)
	return result{code, out.String(), errOut.String()}
}

// must is ctl that has to go well.
func (s server) must(t *testing.T, in string, args ...string) string {
	t.Helper()
	r := s.ctl(t, in, args...)
	if r.code != exitOK {
		t.Fatalf("%v: exit code %d\n%s%s", args, r.code, r.out, r.err)
	}
	return r.out
}

// varying are the parts of an output that differ from run to run.
var varying = []struct {
	is   *regexp.Regexp
	name string
}{
	{regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z`), "TIME"},
	{regexp.MustCompile(`topgun-[0-9a-f]{16}`), "LANE"},
	{regexp.MustCompile(`[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`), "HISTORY"},
	{regexp.MustCompile(`127\.0\.0\.1:\d+`), "ADDRESS"},
	{regexp.MustCompile(`topgunctl-[a-z0-9]{10}`), "NODE"},
	{regexp.MustCompile(`\b17(9|[89])\d{10}\b|\b1[89]\d{11}\b`), "MILLIS"},
	{regexp.MustCompile(`#[0-9a-f]{8}`), "#HASH"},
	{regexp.MustCompile(`(ends at|up to|commit) \d+`), "$1 N"},
	{regexp.MustCompile(`, gone before TIME`), ""}, // the first look for tombstones may still be to come
}

func golden(t *testing.T, got, want string) {
	t.Helper()
	for _, v := range varying {
		got = v.is.ReplaceAllString(got, v.name)
	}
	var lines []string
	for text := range strings.SplitSeq(strings.TrimSpace(got), "\n") {
		lines = append(lines, strings.TrimRight(text, " "))
	}
	if got, want = strings.Join(lines, "\n"), strings.TrimSpace(want); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
}

// recent is a stamp of the last hour, so that no retention touches it.
func recent() uint64 { return uint64(time.Now().UnixMilli()) - 3_600_000 }

// sample is a few records of both kinds, as lines to import.
func sample(millis uint64) string {
	var lines strings.Builder
	for _, text := range []string{
		`{"map":"todos","kind":"lww","key":"milk","value":{"text":"Buy milk","n":9007199254740993},"stamp":{"millis":%d,"counter":1,"nodeId":"a"}}`,
		`{"map":"todos","kind":"lww","key":"eggs","value":null,"stamp":{"millis":%d,"counter":2,"nodeId":"a"},"ttlMillis":86400000}`,
		`{"map":"todos","kind":"lww","key":"gone","deleted":true,"stamp":{"millis":%d,"counter":3,"nodeId":"a"}}`,
		`{"map":"todos","kind":"lww","key":"raw","msgpack":"xAIA/w==","stamp":{"millis":%d,"counter":4,"nodeId":"a"}}`,
		`{"map":"todos","kind":"or","key":"milk","tag":"t1","value":"blue","stamp":{"millis":%d,"counter":5,"nodeId":"a"}}`,
		`{"map":"todos","kind":"or","key":"milk","tag":"t2","value":"red","stamp":{"millis":%d,"counter":6,"nodeId":"b"},"ttlMillis":86400000}`,
		`{"map":"todos","kind":"or","key":"milk","tag":"t3","deleted":true,"stamp":{"millis":%d,"counter":7,"nodeId":"b"}}`,
		`{"map":"tags","kind":"or","key":"ключ","tag":"t1","value":null,"stamp":{"millis":%d,"counter":0,"nodeId":"a"}}`,
	} {
		fmt.Fprintf(&lines, text+"\n", millis)
	}
	return lines.String()
}

func TestTables(t *testing.T) {
	s := start(t, memoryConfig())
	golden(t, s.must(t, sample(recent()), "import"), `
LINES  APPLIED  DUPLICATE  SUPERSEDED  RESTAMPED  REJECTED
8      8        0          0           0          0`)
	golden(t, s.must(t, "", "maps"), `
MAP    KIND  RECORDS  TOMBSTONES
tags   or    1        0
todos  lww   3        1
todos  or    2        1`)
	golden(t, s.must(t, "", "get", "todos", "milk"), `
{"text":"Buy milk","n":9007199254740993}
  stamp MILLIS:1:a (TIME)
  arrival TIME
TAG  VALUE      STAMP              ARRIVAL                   TTL
t1   "blue"     MILLIS:5:a  TIME  -
t2   "red"      MILLIS:6:b  TIME  24h0m0s
t3   (deleted)  MILLIS:7:b  TIME  -`)
	golden(t, s.must(t, "", "get", "todos", "eggs"), `
null
  stamp MILLIS:2:a (TIME)
  arrival TIME
  ttl 24h0m0s, until TIME`)
	golden(t, s.must(t, "", "status"), `
SERVICE      ADDRESS                 STATE
gateway      http://ADDRESS  ready
partition    http://ADDRESS  ready
persistence  http://ADDRESS  ready
fanout       http://ADDRESS  ready

gateway gw        0 sessions, 0 maps watched
partition topgun  shards 0-3 of 4, map version 4
                  an answered write is MEMORY
                  lane LANE, history HISTORY
                  tombstones kept for 720h0m0s
store memory      8 records, 2 of them tombstones
                  log ends at N, stored up to N, 0 behind
                  lane LANE stored up to N, its commit N
fanout            1 streams, 0 maps, 0 live queries, 0 topics`)
	golden(t, s.must(t, "", "verify"), `
MAP    KIND  RECORDS  STORED  LEAVES  DIFFERENCES  CHANGING
tags   or    1        1       1       0            0
todos  lww   4        4       4       0            0
todos  or    3        3       1       0            0`)
}

func TestPutAndDeleteTellTheTruth(t *testing.T) {
	s := start(t, memoryConfig())
	golden(t, s.must(t, "", "put", "todos", "k", `{"a":[1,2.5,"x"]}`, "--ttl", "90s"), "applied, as MILLIS:0:NODE; level MEMORY")
	var got shown
	if err := json.Unmarshal([]byte(s.must(t, "", "--json", "get", "todos", "k")), &got); err != nil {
		t.Fatal(err)
	}
	if string(got.Value) != `{"a":[1,2.5,"x"]}` || got.TTLMillis != 90_000 || got.Arrival.Millis == 0 ||
		!strings.HasPrefix(got.Stamp.NodeID, "topgunctl-") || time.Since(time.UnixMilli(int64(got.Stamp.Millis))) > time.Minute {
		t.Errorf("%+v", got)
	}
	golden(t, s.must(t, "", "delete", "todos", "k"), "applied, as MILLIS:0:NODE; level MEMORY")
	if out := s.must(t, "", "get", "todos", "k"); !strings.HasPrefix(out, "(deleted)\n") {
		t.Error(out)
	}

	// A client whose clock is half a minute ahead has the greater stamp.
	ahead := time.Now().Add(30 * time.Second).UnixMilli()
	s.must(t, fmt.Sprintf(`{"map":"todos","kind":"lww","key":"k","value":"theirs","stamp":{"millis":%d,"counter":0,"nodeId":"z"}}`, ahead), "import")
	r := s.ctl(t, "", "put", "todos", "k", `"ours"`)
	golden(t, r.out, "superseded: the key holds a record with a greater stamp\nit holds \"theirs\", as MILLIS:0:z (TIME)")
	if r.code != exitFailed || !strings.Contains(r.err, "the key was not changed") {
		t.Errorf("%d %s", r.code, r.err)
	}
	r = s.ctl(t, "", "--json", "put", "9", "k", "1")
	var o outcome
	if err := json.Unmarshal([]byte(r.out), &o); err != nil || r.code != exitFailed || o.Outcome != "REJECTED" || o.Level != "" ||
		!strings.HasPrefix(o.Reason, "BAD_MAP_NAME") {
		t.Errorf("%d %+v %v", r.code, o, err)
	}
}

func TestWrongCommandLines(t *testing.T) {
	for _, args := range [][]string{
		{},
		{"nonsense"},
		{"get", "todos"},
		{"put", "todos", "k", "no JSON"},
		{"put", "todos", "k", "1", "--ttl", "-1s"},
		{"put", "todos", "k", "1", "--ttl", "1us"},
		{"watch", "todos", "--from", "-1"},
		{"close-session", "0"},
		{"close-session", "x"},
		{"drain", "--over", "11m"},
		{"maps", "--server", "127.0.0.1:8081"},
		{"maps", "--partition", "ftp://h"},
		{"maps", "--timeout", "0s"},
	} {
		if r := ctl(t, "", args...); r.code != exitUsage || !strings.HasPrefix(r.err, "topgunctl: ") || r.out != "" {
			t.Errorf("%v: %+v", args, r)
		}
	}
	if r := ctl(t, "", "--help"); r.code != exitOK || !strings.Contains(r.out, "close-session") {
		t.Errorf("%+v", r)
	}
	if r := ctl(t, "", "--version"); r.code != exitOK || !strings.HasPrefix(r.out, "topgunctl ") {
		t.Errorf("%+v", r)
	}
}

func TestWhatIsNotThereIsSaid(t *testing.T) {
	s := start(t, memoryConfig())
	for want, args := range map[string][]string{
		"the key holds nothing":                 {"get", "todos", "k"},
		"there is no map of that name: nothing": {"export", "nothing"},
		"there is no map of that name; ":        {"verify", "nothing"},
		"there is no session of that id":        {"close-session", "77"},
		"no such file":                          {"import", filepath.Join(t.TempDir(), "none")},
	} {
		if r := s.ctl(t, "", args...); r.code != exitFailed || !strings.Contains(r.err, want) {
			t.Errorf("%v: %+v, want %q", args, r, want)
		}
	}
}

// every is each command with arguments that are right, and the service it asks first.
var every = map[string][]string{
	"maps":          {"partition"},
	"get":           {"partition", "todos", "k"},
	"put":           {"partition", "todos", "k", "1"},
	"delete":        {"partition", "todos", "k"},
	"watch":         {"persistence", "todos"},
	"export":        {"partition", "todos"},
	"import":        {"partition"},
	"verify":        {"partition"},
	"sessions":      {"gateway"},
	"close-session": {"gateway", "1"},
	"drain":         {"gateway"},
}

func TestAServiceThatCannotBeReachedIsNamed(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := "http://" + l.Addr().String()
	_ = l.Close()
	in := `{"map":"todos","kind":"lww","key":"k","value":1,"stamp":{"millis":1,"nodeId":"a"}}`
	for command, args := range every {
		r := ctl(t, in, append([]string{"--server", nobody, command}, args[1:]...)...)
		want := args[0] + " at " + nobody + ": cannot be reached (connection refused); is it running? give its address with --" + args[0]
		if r.code != exitFailed || !strings.Contains(r.err, want) || strings.Contains(r.err, "not known") || r.out != "" {
			t.Errorf("%s: %+v", command, r)
		}
	}
	r := ctl(t, "", "--server", nobody, "status")
	if r.code != exitFailed || strings.Count(r.out, "NOT READY: cannot be reached") != 4 {
		t.Errorf("status: %+v", r)
	}
	r = ctl(t, "", "--server", nobody, "--json", "status")
	var got status
	if err := json.Unmarshal([]byte(r.out), &got); err != nil || got.OK || len(got.Services) != 4 || got.Gateway != nil {
		t.Errorf("status: %+v, %v", r, err)
	}
}

func TestAnAddressOfSomethingElseIsNamed(t *testing.T) {
	s := start(t, memoryConfig())
	for command, args := range every {
		in := `{"map":"todos","kind":"lww","key":"k","value":1,"stamp":{"millis":1,"nodeId":"a"}}`
		r := ctl(t, in, append([]string{"--server", "http://" + s.client, command}, args[1:]...)...)
		if r.code != exitFailed || !strings.Contains(r.err, args[0]+" at ") || !strings.Contains(r.err, "not this service") {
			t.Errorf("%s: %+v", command, r)
		}
	}
}

func TestASilentServiceIsGivenUp(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var accepted sync.WaitGroup
	accepted.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			stop := context.AfterFunc(t.Context(), func() { _ = c.Close() })
			accepted.Go(func() {
				defer stop()
				_, _ = io.Copy(io.Discard, c)
			})
		}
	})
	t.Cleanup(accepted.Wait)
	t.Cleanup(func() { _ = l.Close() })
	silent := "http://" + l.Addr().String()
	for command, args := range every {
		in := `{"map":"todos","kind":"lww","key":"k","value":1,"stamp":{"millis":1,"nodeId":"a"}}`
		r := ctl(t, in, append([]string{"--server", silent, "--timeout", "50ms", command}, args[1:]...)...)
		if r.code != exitFailed || !strings.Contains(r.err, args[0]+" at "+silent+": no answer within 50ms") {
			t.Errorf("%s: %+v", command, r)
		}
	}
}

func TestEachServiceMayHaveItsOwnAddress(t *testing.T) {
	s := start(t, memoryConfig())
	flags := []string{"--server", "http://127.0.0.1:1"}
	for _, service := range []string{"gateway", "partition", "persistence", "fanout"} {
		flags = append(flags, "--"+service, s.operator+"/")
	}
	if r := ctl(t, "", append(flags, "status")...); r.code != exitOK {
		t.Errorf("%+v", r)
	}
	// The same node twice is no second owner, but its counts would add up.
	if r := ctl(t, "", append(flags, "--partition", s.operator, "put", "todos", "k", "1")...); r.code != exitOK {
		t.Errorf("%+v", r)
	}
	// A service away does not hide the others.
	r := ctl(t, "", "--server", s.operator, "--fanout", "http://127.0.0.1:1", "status")
	if r.code != exitFailed || strings.Count(r.out, "NOT READY") != 1 || !strings.Contains(r.out, "store memory") {
		t.Errorf("%+v", r)
	}
	for _, name := range []string{"GATEWAY", "PARTITION", "PERSISTENCE", "FANOUT"} {
		t.Setenv("TOPGUN_"+name, s.operator)
	}
	t.Setenv("TOPGUN_SERVER", "http://127.0.0.1:1")
	var out bytes.Buffer
	if code := run(t.Context(), []string{"status"}, nil, &out, &out); code != exitOK {
		t.Errorf("by the environment: %d %s", code, &out)
	}
}

func TestWatchShowsThePastAndWhatComes(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		want []string
	}{
		"from now on":        {nil, []string{"UPDATE a", "DELETE b"}},
		"from the beginning": {[]string{"--from", "1"}, []string{"PUT a", "PUT b", "UPDATE a", "DELETE b"}},
		"one key":            {[]string{"b", "--from", "1"}, []string{"PUT b", "DELETE b"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t, memoryConfig())
			s.must(t, "", "put", "todos", "a", "1")
			s.must(t, "", "put", "other", "a", "1")
			s.must(t, "", "put", "todos", "b", "1")
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			out, in := io.Pipe()
			errOut, errIn := io.Pipe()
			ended := make(chan int, 1)
			go func() {
				ended <- run(ctx, append([]string{"--server", s.operator, "watch", "todos"}, c.args...), nil, in, errIn)
				_, _ = in.Close(), errIn.Close()
			}()
			if n, err := errOut.Read(make([]byte, 100)); err != nil || n == 0 { // watching
				t.Fatal(err)
			}
			go func() { _, _ = io.Copy(io.Discard, errOut) }()
			go func() {
				s.ctl(t, "", "put", "todos", "a", "2")
				s.ctl(t, "", "delete", "todos", "b")
			}()
			var got []string
			for buffer := make([]byte, 4096); len(got) < len(c.want); {
				n, err := out.Read(buffer) // one line a write
				if err != nil {
					t.Fatalf("%v after %v", err, got)
				}
				fields := strings.Fields(string(buffer[:n]))
				got = append(got, fields[2]+" "+fields[3])
			}
			cancel()
			go func() { _, _ = io.Copy(io.Discard, out) }()
			if code := <-ended; code != exitOK || !slices.Equal(got, c.want) {
				t.Errorf("exit code %d, %v; want %v", code, got, c.want)
			}
		})
	}
	// The journal's positions are strings, which JavaScript does not round.
	s := start(t, memoryConfig())
	s.must(t, "", "put", "todos", "a", "1")
	ctx, cancel := context.WithCancel(t.Context())
	first := &firstWrite{end: cancel}
	if code := run(ctx, []string{"--server", s.operator, "--json", "watch", "todos", "--from", "1"}, nil, first, io.Discard); code != exitOK {
		t.Errorf("exit code %d", code)
	}
	var c change
	if err := json.Unmarshal(first.text, &c); err != nil || c.Type != "PUT" || c.Key != "a" || len(c.Sequence) < 7 {
		t.Errorf("%s: %v", first.text, err)
	}
}

// firstWrite keeps the first thing written and ends something then.
type firstWrite struct {
	text []byte
	end  func()
}

func (w *firstWrite) Write(b []byte) (int, error) {
	if w.text == nil {
		w.text = bytes.Clone(b)
		w.end()
	}
	return len(b), nil
}

func TestSessionsAreListedClosedAndDrained(t *testing.T) {
	s := start(t, memoryConfig())
	connect := func() *websocket.Conn {
		c, response, err := websocket.Dial(t.Context(), "ws://"+s.client+"/ws", nil)
		if err != nil {
			t.Fatal(err)
		}
		if response.Body != nil {
			_ = response.Body.Close()
		}
		t.Cleanup(func() { _ = c.CloseNow() })
		return c
	}
	closedWith := func(c *websocket.Conn) websocket.StatusCode {
		for {
			if _, _, err := c.Read(t.Context()); err != nil {
				return websocket.CloseStatus(err)
			}
		}
	}
	one, two := connect(), connect()
	golden(t, s.must(t, "", "sessions"), `
ID  USER  FROM             OPENED                    QUEUED  MAPS
1   -     ADDRESS  TIME  0
2   -     ADDRESS  TIME  0`)
	var listed session
	text, _, _ := strings.Cut(s.must(t, "", "--json", "sessions"), "\n")
	if err := json.Unmarshal([]byte(text), &listed); err != nil || listed.ID != 1 || listed.Maps == nil {
		t.Errorf("%s: %v", text, err)
	}
	golden(t, s.must(t, "", "close-session", "1"), "closed; its client reconnects")
	closedWith(one)
	if r := s.ctl(t, "", "--json", "close-session", "99"); r.code != exitFailed || r.out != `{"id":99,"closed":false}`+"\n" {
		t.Errorf("%+v", r)
	}
	golden(t, s.must(t, "", "drain"), "closed 1 sessions; the gateway takes no new ones until it is started again")
	if code := closedWith(two); code != websocket.StatusServiceRestart {
		t.Errorf("closed with %d", code)
	}
	if r := s.ctl(t, "", "status"); r.code != exitFailed || !strings.Contains(r.out, "NOT READY: draining") ||
		!strings.Contains(r.out, "0 sessions, 0 maps watched, DRAINING") {
		t.Errorf("%+v", r)
	}
}

func TestTextOfClientsIsHarmless(t *testing.T) {
	s := start(t, memoryConfig())
	s.must(t, "", "put", "todos", "\x1b[2Jk", `"\u001b[31mred\u202e\nnext"`)
	watch := func() string {
		ctx, cancel := context.WithCancel(t.Context())
		first := &firstWrite{end: cancel}
		run(ctx, []string{"--server", s.operator, "watch", "todos", "--from", "1"}, nil, first, io.Discard)
		return string(first.text)
	}
	for _, out := range []string{s.must(t, "", "get", "todos", "\x1b[2Jk"), watch()} {
		if strings.ContainsAny(out, "\x1b\u202e") || strings.Contains(out, "\nnext") {
			t.Errorf("%q", out)
		}
	}
}
