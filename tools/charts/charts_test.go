package charts

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// eachCase runs check for every chart, with its defaults and with all values set.
func eachCase(t *testing.T, check func(t *testing.T, name string, m manifests)) {
	t.Helper()
	for _, name := range charts() {
		t.Run(name+"/defaults", func(t *testing.T) { check(t, name, mustDecode(t, name, "")) })
		t.Run(name+"/everything set", func(t *testing.T) { check(t, name, mustDecode(t, name, full(name))) })
	}
}

func TestChartsRenderAndDecodeStrictly(t *testing.T) {
	eachCase(t, func(t *testing.T, name string, m manifests) {
		t.Helper()
		want := []string{name}
		if name == suite {
			want = services()
		}
		got := deployments(m)
		for _, service := range want {
			if got[service] == nil {
				t.Errorf("there is no Deployment of %s", service)
			}
		}
		if len(got) != len(want) {
			t.Errorf("there are %d Deployments, want %d", len(got), len(want))
		}
	})
}

// TestStrictDecodingFindsAMisspeltField is the negative control of the tests that
// decode.
func TestStrictDecodingFindsAMisspeltField(t *testing.T) {
	for _, document := range []string{
		"apiVersion: v1\nkind: Service\nspec: {selectors: {a: b}}\n",
		"apiVersion: v1\nkind: Service\nspec: {type: A, type: B}\n",
		"apiVersion: v1\nkind: Servise\n",
		"apiVersion: monitoring.coreos.com/v1\nkind: ServiceMonitor\nspec: {endpoint: []}\n",
	} {
		if _, err := decode(map[string]string{"a.yaml": document}); err == nil {
			t.Errorf("decoded without an error:\n%s", document)
		}
	}
}

// TestSelectorsSelect: the labels that select pods are on
// the pods, and every object lands in the release's namespace.
func TestSelectorsSelect(t *testing.T) {
	eachCase(t, func(t *testing.T, _ string, m manifests) {
		t.Helper()
		ds := deployments(m)
		selects := func(what string, selector map[string]string) {
			t.Helper()
			n := 0
			for _, d := range ds {
				if labels.SelectorFromSet(selector).Matches(labels.Set(d.Spec.Template.Labels)) {
					n++
				}
			}
			if n != 1 || len(selector) == 0 {
				t.Errorf("%s selects the pods of %d services, want 1", what, n)
			}
		}
		for _, d := range ds {
			selects("Deployment "+d.Name, d.Spec.Selector.MatchLabels)
			if d.Namespace != namespace {
				t.Errorf("%s is in namespace %q, want %q", d.Name, d.Namespace, namespace)
			}
			for _, c := range d.Spec.Template.Spec.TopologySpreadConstraints {
				selects("the spread of "+d.Name, c.LabelSelector.MatchLabels)
			}
		}
		for _, b := range of[*policyv1.PodDisruptionBudget](m) {
			selects("PodDisruptionBudget "+b.Name, b.Spec.Selector.MatchLabels)
			if b.Spec.MaxUnavailable == nil || *b.Spec.MaxUnavailable == intstr.FromInt32(0) {
				t.Errorf("%s holds up every drain of a node", b.Name)
			}
		}
		if got := len(of[*policyv1.PodDisruptionBudget](m)); got != len(ds) {
			t.Errorf("there are %d PodDisruptionBudgets, want %d", got, len(ds))
		}
		for _, s := range of[*corev1.Service](m) {
			selects("Service "+s.Name, s.Spec.Selector)
		}
		for _, monitor := range m.monitors {
			checkMonitor(t, m, monitor)
		}
	})
}

// checkMonitor: exactly one Service that the monitor selects has the port, and on
// that port there are metrics.
func checkMonitor(t *testing.T, m manifests, monitor serviceMonitor) {
	t.Helper()
	for _, endpoint := range monitor.Spec.Endpoints {
		var ports []int32
		for _, s := range of[*corev1.Service](m) {
			if !labels.SelectorFromSet(monitor.Spec.Selector.MatchLabels).Matches(labels.Set(s.Labels)) {
				continue
			}
			for _, p := range s.Spec.Ports {
				if p.Name == endpoint.Port {
					ports = append(ports, p.Port)
				}
			}
		}
		service := monitor.Spec.Selector.MatchLabels["app.kubernetes.io/name"]
		if !slices.Equal(ports, []int32{operatorPort(service)}) || endpoint.Path != "/metrics" {
			t.Errorf("the monitor of %s reads %s at ports %v, want /metrics at %d", service, endpoint.Path, ports, operatorPort(service))
		}
	}
}

// operatorPort is where a service answers /health and /metrics: its only port, or
// the gateway's second one.
func operatorPort(service string) int32 {
	return map[string]int32{"gateway": 8081, "partition": 8082, "fanout": 8083, "persistence": 8084}[service]
}

// TestMonitorsAreThereWhenAskedFor also keeps TestSelectorsSelect from checking none.
func TestMonitorsAreThereWhenAskedFor(t *testing.T) {
	if got := len(mustDecode(t, suite, "").monitors); got != 0 {
		t.Errorf("there are %d ServiceMonitors by default, want none: the kind may not be installed", got)
	}
	monitors := mustDecode(t, suite, full(suite)).monitors
	if len(monitors) != len(services()) {
		t.Fatalf("there are %d ServiceMonitors, want one per service", len(monitors))
	}
	for _, monitor := range monitors {
		if l, _ := monitor.Metadata["labels"].(map[string]any); l["release"] != "prometheus" {
			t.Errorf("the labels are %v, want the given one among them", l)
		}
	}
}

// TestImagesAreThoseOfCompose: one name for an image everywhere, the tag is the
// chart's appVersion, and nothing names a registry until the user does.
func TestImagesAreThoseOfCompose(t *testing.T) {
	content, err := os.ReadFile(filepath.Join(root, "docker-compose.yml"))
	if err != nil {
		t.Fatal(err)
	}
	names := regexp.MustCompile(`image: (topgun/[a-z]+):dev`).FindAllStringSubmatch(string(content), -1)
	for service, d := range deployments(mustDecode(t, suite, "")) {
		got := d.Spec.Template.Spec.Containers[0].Image
		name, tag, _ := strings.Cut(got, ":")
		if !slices.ContainsFunc(names, func(n []string) bool { return n[1] == name }) || !strings.HasSuffix(name, "/"+service) {
			t.Errorf("the image of %s is %s, which docker-compose.yml does not have", service, name)
		}
		if want := load(t, service).Metadata.AppVersion; tag != want {
			t.Errorf("the tag of %s is %q, want %q", service, tag, want)
		}
	}
	d := deployments(mustDecode(t, "fanout", "global: {imageRegistry: registry.example.com}\nimage: {tag: x}"))["fanout"]
	if got, want := d.Spec.Template.Spec.Containers[0].Image, "registry.example.com/topgun/fanout:x"; got != want {
		t.Errorf("the image is %q, want %q", got, want)
	}
}

// TestDependenciesAreVendored: a clean checkout has everything that Chart.yaml
// names, in the versions it names, and git keeps it as what it is: a link, so that
// there is no second copy to keep in step.
func TestDependenciesAreVendored(t *testing.T) {
	for _, name := range charts() {
		c := load(t, name)
		if err := c.Validate(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if c.Metadata.APIVersion != "v2" {
			t.Errorf("%s has apiVersion %s, want v2", name, c.Metadata.APIVersion)
		}
		if len(c.Dependencies()) != len(c.Metadata.Dependencies) {
			t.Errorf("%s has %d charts in its folder and names %d", name, len(c.Dependencies()), len(c.Metadata.Dependencies))
		}
		for _, want := range c.Metadata.Dependencies {
			link, err := os.Readlink(filepath.Join(helm, name, "charts", want.Name))
			if err != nil || link != "../../"+want.Name || want.Repository != "file://../"+want.Name {
				t.Errorf("%s: %s is %q from %q (%v), want a link to the chart beside it", name, want.Name, link, want.Repository, err)
			}
			if got := load(t, want.Name).Metadata.Version; got != want.Version {
				t.Errorf("%s wants %s %s, which is %s", name, want.Name, want.Version, got)
			}
		}
	}
	// What git ignores is not in a clean checkout.
	ignored, err := exec.CommandContext(t.Context(), "git", "-C", helm, "-c", "safe.directory=*", "status", "--porcelain", "--ignored", "--", ".").CombinedOutput()
	if err == nil && strings.Contains(string(ignored), "!!") {
		t.Errorf("git ignores parts of the charts:\n%s", ignored)
	}
}
