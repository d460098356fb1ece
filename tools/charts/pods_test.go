package charts

import (
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
)

// TestPodsAreConfined is RELIABILITY 5: not root, nothing writable, no capability, no
// credentials of the cluster.
func TestPodsAreConfined(t *testing.T) {
	eachCase(t, func(t *testing.T, _ string, m manifests) {
		t.Helper()
		for service, d := range deployments(m) {
			for _, fault := range unconfined(d) {
				t.Errorf("%s: %s", service, fault)
			}
		}
		for _, account := range of[*corev1.ServiceAccount](m) {
			if account.AutomountServiceAccountToken == nil || *account.AutomountServiceAccountToken {
				t.Errorf("%s hands out its token", account.Name)
			}
		}
	})
}

// unconfined says what a Deployment allows its pods and should not.
func unconfined(d *appsv1.Deployment) []string {
	pod := d.Spec.Template.Spec
	var faults []string
	expect := func(holds bool, fault string) {
		if !holds {
			faults = append(faults, fault)
		}
	}
	is := func(p *bool, want bool) bool { return p != nil && *p == want }
	p := pod.SecurityContext
	expect(p != nil && is(p.RunAsNonRoot, true) && p.RunAsUser != nil && *p.RunAsUser == 65532, "runs as root, or not as the user of the image")
	expect(p != nil && p.SeccompProfile != nil && p.SeccompProfile.Type == corev1.SeccompProfileTypeRuntimeDefault, "has no seccomp profile")
	expect(is(pod.AutomountServiceAccountToken, false), "gets a token of its account")
	expect(pod.ServiceAccountName == d.Name, "has no account of its own")
	expect(is(pod.EnableServiceLinks, false), "gets variables of other services")
	expect(!pod.HostNetwork && !pod.HostPID && !pod.HostIPC, "shares the host's namespaces")
	expect(len(pod.Containers) == 1 && len(pod.InitContainers) == 0, "has other containers")
	for _, v := range pod.Volumes {
		expect(v.Secret != nil && v.Secret.DefaultMode != nil && *v.Secret.DefaultMode == 0o440, "mounts something else than a Secret for its group")
	}
	for _, c := range pod.Containers {
		s := c.SecurityContext
		expect(s != nil && is(s.ReadOnlyRootFilesystem, true), "may write to its image")
		expect(s != nil && is(s.AllowPrivilegeEscalation, false), "may gain privileges")
		expect(s != nil && s.Capabilities != nil && slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) && len(s.Capabilities.Add) == 0, "keeps capabilities")
		for _, mount := range c.VolumeMounts {
			expect(mount.ReadOnly, "may write to "+mount.MountPath)
		}
		_, memory := c.Resources.Limits[corev1.ResourceMemory]
		_, cpu := c.Resources.Requests[corev1.ResourceCPU]
		expect(memory && cpu, "has no limit of memory, or asks for no CPU")
	}
	return faults
}

// TestPortsAndProbesAreTheServices: what the program listens on is what the pod
// declares, what the Service leads to and what the probes ask.
func TestPortsAndProbesAreTheServices(t *testing.T) {
	listeners := map[string]map[string]int32{
		"gateway":     {"listen": 8080, "operator-listen": 8081},
		"partition":   {"listen": 8082},
		"fanout":      {"listen": 8083},
		"persistence": {"listen": 8084},
	}
	eachCase(t, func(t *testing.T, _ string, m manifests) {
		t.Helper()
		for service, d := range deployments(m) {
			c := d.Spec.Template.Spec.Containers[0]
			declared := map[string]int32{}
			for _, p := range c.Ports {
				declared[p.Name] = p.ContainerPort
			}
			if len(declared) != len(listeners[service]) {
				t.Errorf("%s declares ports %v, want %v", service, declared, listeners[service])
			}
			for flag, port := range listeners[service] {
				if want := fmt.Sprintf("--%s=:%d", flag, port); !slices.Contains(c.Args, want) {
					t.Errorf("%s is not given %s", service, want)
				}
			}
			for path, probe := range map[string]*corev1.Probe{
				"/health/live":  c.LivenessProbe,
				"/health/ready": c.ReadinessProbe,
			} {
				if probe == nil || probe.HTTPGet == nil || probe.HTTPGet.Path != path || declared[probe.HTTPGet.Port.StrVal] != operatorPort(service) {
					t.Errorf("a probe of %s does not ask %s on port %d", service, path, operatorPort(service))
				}
			}
			// Ready would end a recovery that takes longer than the probe allows.
			if s := c.StartupProbe; s == nil || s.HTTPGet == nil || s.HTTPGet.Path != "/health/live" || declared[s.HTTPGet.Port.StrVal] != operatorPort(service) ||
				s.PeriodSeconds*s.FailureThreshold < 60 {
				t.Errorf("%s has less than a minute to open its port, or has to be ready by then", service)
			}
			checkServices(t, m, service, declared)
		}
	})
}

// checkServices: the Services of a service lead to all of its ports and no others.
func checkServices(t *testing.T, m manifests, service string, declared map[string]int32) {
	t.Helper()
	led := map[string]int32{}
	for _, s := range of[*corev1.Service](m) {
		if s.Labels["app.kubernetes.io/name"] != service {
			continue
		}
		for _, p := range s.Spec.Ports {
			led[p.TargetPort.StrVal] = p.Port
			if p.TargetPort.StrVal == "operator" && s.Spec.Type != "" && s.Spec.Type != corev1.ServiceTypeClusterIP {
				t.Errorf("%s publishes the operator port", s.Name)
			}
		}
	}
	for name, port := range declared {
		if led[name] != port {
			t.Errorf("port %s of %s is %d, its Service says %d", name, service, port, led[name])
		}
	}
	if len(led) != len(declared) {
		t.Errorf("the Services of %s lead to %v, its pods have %v", service, led, declared)
	}
}

// TestAddressesLeadToServices: where a service is told to find another one there is
// a Service with that port, in the suite and in charts that share a cluster's name.
func TestAddressesLeadToServices(t *testing.T) {
	one := mustDecode(t, suite, "")
	var several manifests
	for _, name := range services() {
		several.objects = append(several.objects, mustDecode(t, name, "global: {cluster: topgun}").objects...)
	}
	for what, m := range map[string]manifests{"suite": one, "one by one": several} {
		addresses := map[string]bool{}
		for _, s := range of[*corev1.Service](m) {
			for _, p := range s.Spec.Ports {
				addresses["http://"+net.JoinHostPort(s.Name, strconv.Itoa(int(p.Port)))] = true
			}
		}
		told := 0
		for service, d := range deployments(m) {
			for _, arg := range d.Spec.Template.Spec.Containers[0].Args {
				name, url, _ := strings.Cut(arg, "=")
				if !slices.Contains(services(), strings.TrimPrefix(name, "--")) {
					continue
				}
				told++
				if !addresses[url] || !strings.Contains(url, strings.TrimPrefix(name, "--")) {
					t.Errorf("%s: %s is told %s, where there is nothing", what, service, arg)
				}
			}
		}
		if want := 5; told != want {
			t.Errorf("%s: %d addresses were found, want %d", what, told, want)
		}
	}
}

// TestStopsHaveTheirTime: a service ends within 30 s of SIGTERM (UPG-01), which comes
// after preStop; what serves many goes on serving until it is out of the endpoints.
func TestStopsHaveTheirTime(t *testing.T) {
	eachCase(t, func(t *testing.T, _ string, m manifests) {
		t.Helper()
		for service, d := range deployments(m) {
			pod := d.Spec.Template.Spec
			wait := int64(0)
			if l := pod.Containers[0].Lifecycle; l != nil && l.PreStop != nil && l.PreStop.Sleep != nil {
				wait = l.PreStop.Sleep.Seconds
			}
			if many := service == "gateway" || service == "fanout"; many != (wait > 0) {
				t.Errorf("%s waits %d s before it stops", service, wait)
			}
			if g := pod.TerminationGracePeriodSeconds; g == nil || *g-wait < 30 {
				t.Errorf("%s is killed within 30 s of SIGTERM", service)
			}
		}
	})
}

// TestOneAtATimeOrManySpread: where there is never more than one, the old pod goes
// before the new one comes; where there are many, a roll takes none away.
func TestOneAtATimeOrManySpread(t *testing.T) {
	eachCase(t, func(t *testing.T, _ string, m manifests) {
		t.Helper()
		for service, d := range deployments(m) {
			if service == "partition" || service == "persistence" {
				if d.Spec.Strategy.Type != appsv1.RecreateDeploymentStrategyType {
					t.Errorf("%s rolls by %s, want Recreate", service, d.Spec.Strategy.Type)
				}
				continue
			}
			if r := d.Spec.Strategy.RollingUpdate; r == nil || r.MaxUnavailable.IntValue() != 0 {
				t.Errorf("a roll of %s takes pods away before others are there", service)
			}
			var keys []string
			for _, c := range d.Spec.Template.Spec.TopologySpreadConstraints {
				keys = append(keys, c.TopologyKey)
			}
			if !slices.Equal(keys, []string{corev1.LabelHostname, corev1.LabelTopologyZone}) {
				t.Errorf("%s is spread by %q", service, keys)
			}
		}
	})
}

// TestAutoscalingReplacesReplicas: two that set the number would undo each other.
func TestAutoscalingReplacesReplicas(t *testing.T) {
	for _, service := range []string{"gateway", "fanout"} {
		fixed := mustDecode(t, service, "replicas: 4")
		if r := deployments(fixed)[service].Spec.Replicas; r == nil || *r != 4 || len(of[*autoscalingv2.HorizontalPodAutoscaler](fixed)) != 0 {
			t.Errorf("%s does not have the number of replicas that was asked for", service)
		}
		scaled := mustDecode(t, service, "autoscaling: {enabled: true}")
		scalers := of[*autoscalingv2.HorizontalPodAutoscaler](scaled)
		d := deployments(scaled)[service]
		if len(scalers) != 1 || d.Spec.Replicas != nil || scalers[0].Spec.ScaleTargetRef.Name != d.Name {
			t.Errorf("%s is not scaled by its autoscaler alone", service)
		}
	}
}

// TestAGatewayStaysWithOneFanout: its stream and the calls that steer it go to the
// same pod.
func TestAGatewayStaysWithOneFanout(t *testing.T) {
	for _, s := range of[*corev1.Service](mustDecode(t, "fanout", "")) {
		if s.Spec.SessionAffinity != corev1.ServiceAffinityClientIP {
			t.Errorf("%s sends the calls of one gateway to several pods", s.Name)
		}
	}
}
