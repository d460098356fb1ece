package compose

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/types"
)

const root = "../.."

// load reads docker-compose.yml as `docker compose` does: strictly, with its
// variables filled in from env alone.
func load(ctx context.Context, profiles []string, env ...string) (*types.Project, error) {
	options, err := cli.NewProjectOptions(
		[]string{filepath.Join(root, "docker-compose.yml")},
		cli.WithEnv(env), cli.WithProfiles(profiles),
	)
	if err != nil {
		return nil, err
	}
	return options.LoadProject(ctx)
}

func TestComposeFileIsValid(t *testing.T) {
	t.Parallel()
	project, err := load(t.Context(), nil, "JWT_SECRET=secret")
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"fanout", "gateway", "nats", "partition", "persistence", "postgres"}
	if got := project.ServiceNames(); !slices.Equal(got, want) {
		t.Errorf("services are %q, want %q", got, want)
	}
	for _, s := range project.Services {
		if s.HealthCheck == nil {
			t.Errorf("%s has no health check", s.Name)
		}
		for _, p := range s.Ports {
			if p.HostIP != "127.0.0.1" {
				t.Errorf("%s publishes port %s to %q, want 127.0.0.1 only", s.Name, p.Published, p.HostIP)
			}
		}
		for dependency, d := range s.DependsOn {
			if d.Condition != types.ServiceConditionHealthy {
				t.Errorf("%s starts when %s is %s, want healthy", s.Name, dependency, d.Condition)
			}
		}
		if s.Build == nil {
			continue
		}
		if !s.ReadOnly || !slices.Contains(s.CapDrop, "ALL") {
			t.Errorf("%s may write to its image or keeps capabilities", s.Name)
		}
		if service := s.Build.Args["SERVICE"]; service == nil || *service != s.Name {
			t.Errorf("%s is not built as itself", s.Name)
		}
	}
}

func TestComposeStartsInOrder(t *testing.T) {
	t.Parallel()
	project, err := load(t.Context(), nil, "JWT_SECRET=secret")
	if err != nil {
		t.Fatal(err)
	}
	for service, want := range map[string][]string{
		"gateway":     {"fanout", "partition"},
		"partition":   {"persistence"},
		"persistence": {"nats", "postgres"},
		"fanout":      {"nats"},
	} {
		if got := slices.Sorted(slices.Values(project.Services[service].GetDependencies())); !slices.Equal(got, want) {
			t.Errorf("%s waits for %q, want %q", service, got, want)
		}
	}
}

func TestComposeAllInOneStandsAlone(t *testing.T) {
	t.Parallel()
	project, err := load(t.Context(), []string{"allinone"}, "JWT_SECRET=secret")
	if err != nil {
		t.Fatal(err)
	}
	topgun, err := project.GetService("topgun")
	if err != nil {
		t.Fatal(err)
	}
	if got := topgun.GetDependencies(); len(got) != 0 {
		t.Errorf("topgun waits for %q, want nothing", got)
	}
}

// TestComposeRefusesToStartWithoutASecret: a default secret would be one that
// everybody knows.
func TestComposeRefusesToStartWithoutASecret(t *testing.T) {
	t.Parallel()
	_, err := load(t.Context(), nil)
	if err == nil || !strings.Contains(err.Error(), "JWT_SECRET") {
		t.Errorf("got %v, want an error that names JWT_SECRET", err)
	}
}

// TestComposeUsesFlagsThatExist builds the services and looks every flag and
// variable of docker-compose.yml up in the help of the one it is for.
func TestComposeUsesFlagsThatExist(t *testing.T) {
	t.Parallel()
	project, err := load(t.Context(), []string{"allinone"}, "JWT_SECRET=secret")
	if err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	build := exec.CommandContext(t.Context(), "go", "build", "-o", bin, "./cmd/...")
	build.Dir = filepath.Join(root, "services")
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // as `make build`, so that it finds compiled packages
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the services: %v\n%s", err, out)
	}
	flag := regexp.MustCompile(`^--[a-z-]+`)
	for _, s := range project.Services {
		if s.Build == nil {
			continue
		}
		help, err := exec.CommandContext(t.Context(), filepath.Join(bin, s.Name), "--help").CombinedOutput()
		if err != nil {
			t.Errorf("%s --help: %v", s.Name, err)
			continue
		}
		var names []string
		for _, arg := range s.Command {
			if name := flag.FindString(arg); name != "" {
				names = append(names, name)
			}
		}
		for name := range s.Environment {
			names = append(names, name)
		}
		for _, name := range names {
			if !regexp.MustCompile(regexp.QuoteMeta(name) + `\b`).Match(help) {
				t.Errorf("%s is given %s, which its help does not know", s.Name, name)
			}
		}
	}
}
