package charts

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// program is what the help of a service says.
type program struct {
	// flags are their defaults as text, empty where there is none, by name.
	flags map[string]string
	// required are the flags without which it does not start.
	required []string
	// variables are the flags that a variable of the environment stands for.
	variables map[string]string
}

var (
	usage      = regexp.MustCompile(`^Usage: .*`)
	usageFlag  = regexp.MustCompile(`--([a-z-]+)=`)
	flagLine   = regexp.MustCompile(`(?m)^ +(?:-[a-z], +)?--([a-z-]+)(?:=(\S+))?`)
	stated     = regexp.MustCompile(`\(default (\S+)\)`)
	variable   = regexp.MustCompile(`\$([A-Z_]+)`)
	whitespace = regexp.MustCompile(`\s+`)
)

// parseHelp reads the help of a program.
func parseHelp(help string) program {
	p := program{flags: map[string]string{}, variables: map[string]string{}}
	for _, m := range usageFlag.FindAllStringSubmatch(usage.FindString(help), -1) {
		p.required = append(p.required, m[1])
	}
	starts := flagLine.FindAllStringSubmatchIndex(help, -1)
	for i, at := range starts {
		end := len(help)
		if i+1 < len(starts) {
			end = starts[i+1][0]
		}
		name := help[at[2]:at[3]]
		text := whitespace.ReplaceAllString(help[at[1]:end], " ")
		value := ""
		if at[4] >= 0 {
			value = help[at[4]:at[5]]
		}
		// A placeholder is in capitals: then the default, if there is one, is in words.
		if value == strings.ToUpper(value) && strings.ToLower(value) != value {
			value = ""
			if m := stated.FindStringSubmatch(text); m != nil {
				value = m[1]
			}
		}
		p.flags[name] = value
		for _, m := range variable.FindAllStringSubmatch(text, -1) {
			p.variables[m[1]] = name
		}
	}
	delete(p.flags, "help")
	return p
}

// buildServices returns a folder with the programs of the services.
func buildServices(t *testing.T) string {
	t.Helper()
	bin := t.TempDir()
	build := exec.CommandContext(t.Context(), "go", "build", "-o", bin)
	for _, service := range services() {
		build.Args = append(build.Args, "./cmd/"+service)
	}
	build.Dir = filepath.Join(root, "services")
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // as `make build`, so that it finds compiled packages
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the services: %v\n%s", err, out)
	}
	return bin
}

// programs asks each service for its help.
func programs(t *testing.T, bin string) map[string]program {
	t.Helper()
	all := map[string]program{}
	for _, service := range services() {
		help, err := exec.CommandContext(t.Context(), filepath.Join(bin, service), "--help").CombinedOutput()
		if err != nil {
			t.Fatalf("%s --help: %v", service, err)
		}
		all[service] = parseHelp(string(help))
	}
	return all
}

// decided are the flags that a chart gives itself, and their reason.
func decided(service string) map[string]string {
	port := "a port inside of a pod is nobody's choice"
	secret := "from a Secret, by the values of that name"
	return map[string]map[string]string{
		"gateway":     {"listen": port, "operator-listen": port, "jwt-secret-file": secret},
		"partition":   {"listen": port, "nats": "global.nats"},
		"persistence": {"listen": port, "nats": "global.nats", "postgres": secret},
		"fanout":      {"listen": port, "nats": "global.nats"},
	}[service]
}

// schemaFlags are the names under flags that the schema of a chart knows.
func schemaFlags(t *testing.T, service string) []string {
	t.Helper()
	var schema struct {
		Properties struct {
			Flags struct {
				Properties map[string]any `json:"properties"`
			} `json:"flags"`
		} `json:"properties"`
	}
	if err := json.Unmarshal(load(t, service).Schema, &schema); err != nil {
		t.Fatal(err)
	}
	return slices.Collect(maps.Keys(schema.Properties.Flags.Properties))
}

// TestChartsFitThePrograms builds the services once for what is compared with them.
func TestChartsFitThePrograms(t *testing.T) {
	bin := buildServices(t)
	t.Run("flags", func(t *testing.T) { flagsMirrorThePrograms(t, programs(t, bin)) })
	t.Run("probes", func(t *testing.T) { probesAskWhatIsServed(t, filepath.Join(bin, "gateway")) })
}

// flagsMirrorThePrograms: every flag of a program is a value of its chart, under its
// own name and with its own default, or is decided by the chart; and no other.
func flagsMirrorThePrograms(t *testing.T, all map[string]program) {
	t.Helper()
	for service, p := range all {
		known := append(schemaFlags(t, service), slices.Collect(maps.Keys(decided(service)))...)
		if got, want := slices.Sorted(slices.Values(known)), slices.Sorted(maps.Keys(p.flags)); !slices.Equal(got, want) {
			t.Errorf("the chart of %s knows the flags\n%q, the program\n%q", service, got, want)
		}
		defaults, _ := load(t, service).Values["flags"].(map[string]any)
		for name, value := range defaults {
			got := fmt.Sprint(value)
			if number, isNumber := value.(float64); isNumber {
				got = fmt.Sprintf("%.0f", number)
			}
			if empty := got == "false" || got == "[]"; empty {
				got = ""
			}
			// The help does not show a default that stands behind a placeholder.
			if name == "node-id" {
				continue
			}
			if want := p.flags[name]; got != want {
				t.Errorf("%s: the default of %s is %q, the program's is %q", service, name, got, want)
			}
		}
		if len(defaults) != len(schemaFlags(t, service)) {
			t.Errorf("%s: values.yaml shows %d flags, the schema knows %d", service, len(defaults), len(schemaFlags(t, service)))
		}
		for _, values := range []string{"", full(service)} {
			checkStart(t, p, deployments(mustDecode(t, service, values))[service].Spec.Template.Spec.Containers[0])
		}
		acceptsAll(t, service)
	}
}

// probesAskWhatIsServed starts the gateway with the arguments of its pod, on other
// ports. It needs nothing to be up, is alive and not ready; all services serve these
// paths by the same code.
func probesAskWhatIsServed(t *testing.T, gateway string) {
	t.Helper()
	c := deployments(mustDecode(t, "gateway", ""))["gateway"].Spec.Template.Spec.Containers[0]
	var args []string
	for _, arg := range c.Args {
		switch name, _, _ := strings.Cut(arg, "="); name {
		case "--listen", "--operator-listen":
			args = append(args, name+"=127.0.0.1:0")
		case "--jwt-secret-file":
			file := filepath.Join(t.TempDir(), "secret")
			if err := os.WriteFile(file, []byte(strings.Repeat("s", 32)), 0o600); err != nil {
				t.Fatal(err)
			}
			args = append(args, name+"="+file)
		default:
			args = append(args, arg)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	process := exec.CommandContext(ctx, gateway, args...)
	process.Env = []string{}
	out, err := process.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := process.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cancel()
		_ = process.Wait() // it was killed
	}()
	line, err := bufio.NewReader(out).ReadString('\n')
	address, found := strings.CutPrefix(strings.TrimSpace(line), "operator on ")
	if err != nil || !found {
		t.Fatalf("the gateway printed %q (%v), want its operator address", line, err)
	}
	for path, want := range map[string]int{
		c.StartupProbe.HTTPGet.Path:   http.StatusOK,
		c.LivenessProbe.HTTPGet.Path:  http.StatusOK,
		c.ReadinessProbe.HTTPGet.Path: http.StatusServiceUnavailable,
		"/metrics":                    http.StatusOK,
	} {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, address+path, http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		_ = response.Body.Close() // nothing was read
		if response.StatusCode != want {
			t.Errorf("%s answers %d, want %d", path, response.StatusCode, want)
		}
	}
}

// checkStart: what the container is given the program knows, and what the program
// requires it is given.
func checkStart(t *testing.T, p program, c corev1.Container) {
	t.Helper()
	given := map[string]bool{}
	for _, arg := range c.Args {
		name, _, _ := strings.Cut(strings.TrimPrefix(arg, "--"), "=")
		if _, known := p.flags[name]; !known || !strings.HasPrefix(arg, "--") {
			t.Errorf("%s is given %s, which it does not know", c.Name, arg)
		}
		if given[name] {
			t.Errorf("%s is given --%s twice", c.Name, name)
		}
		given[name] = true
	}
	for _, e := range c.Env {
		name, known := p.variables[e.Name]
		if !known {
			t.Errorf("%s is given %s, which it does not read", c.Name, e.Name)
		}
		if given[name] {
			t.Errorf("%s is given --%s twice", c.Name, name)
		}
		given[name] = true
	}
	for _, name := range p.required {
		if !given[name] {
			t.Errorf("%s is not given --%s, which it requires", c.Name, name)
		}
	}
}

// acceptsAll: with everything set every flag that has a value is passed on, so that
// no value is without effect.
func acceptsAll(t *testing.T, service string) {
	t.Helper()
	c := deployments(mustDecode(t, service, full(service)))[service].Spec.Template.Spec.Containers[0]
	for _, name := range schemaFlags(t, service) {
		if !slices.ContainsFunc(c.Args, func(arg string) bool { return arg == "--"+name || strings.HasPrefix(arg, "--"+name+"=") }) {
			t.Errorf("%s: the value of %s is not passed on", service, name)
		}
	}
}

// TestParseHelp keeps the tests above from comparing nothing with nothing.
func TestParseHelp(t *testing.T) {
	p := parseHelp("Usage: it --nats=URL [flags]\n\nWords.\n\nFlags:\n  -h, --help        Help.\n" +
		"      --nats=URL    Where\n                    NATS is ($T_NATS).\n      --shards=16   Number ($T_SHARDS).\n" +
		"      --age=TIME    How\n                    long (default\n                    24h).\n      --on          On.\n")
	if want := map[string]string{"nats": "", "shards": "16", "age": "24h", "on": ""}; !maps.Equal(p.flags, want) {
		t.Errorf("flags are %q, want %q", p.flags, want)
	}
	if !slices.Equal(p.required, []string{"nats"}) || p.variables["T_NATS"] != "nats" {
		t.Errorf("required are %q and variables %q", p.required, p.variables)
	}
}

// TestNumbersAreWrittenOut: numbers of YAML are floats, which print as 8.6e+09.
func TestNumbersAreWrittenOut(t *testing.T) {
	args := deployments(mustDecode(t, "partition", "flags: {log-max-bytes: 17179869184, shards: 1000000}"))["partition"].Spec.Template.Spec.Containers[0].Args
	for _, want := range []string{"--log-max-bytes=17179869184", "--shards=1000000"} {
		if !slices.Contains(args, want) {
			t.Errorf("the arguments are %q, want %s among them", args, want)
		}
	}
}
