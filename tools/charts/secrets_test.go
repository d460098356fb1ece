package charts

import (
	"maps"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// TestSecretsAreReferences: no chart makes a Secret or a ConfigMap, no variable has a
// value that stands in the manifest, and what is secret is not an argument.
func TestSecretsAreReferences(t *testing.T) {
	eachCase(t, func(t *testing.T, _ string, m manifests) {
		t.Helper()
		if len(of[*corev1.Secret](m)) != 0 || len(of[*corev1.ConfigMap](m)) != 0 {
			t.Error("the chart makes a Secret or a ConfigMap; what is secret exists before")
		}
		for service, d := range deployments(m) {
			c := d.Spec.Template.Spec.Containers[0]
			for _, e := range c.Env {
				if e.Value != "" || e.ValueFrom == nil || e.ValueFrom.SecretKeyRef == nil {
					t.Errorf("%s of %s is not from a Secret", e.Name, service)
				}
			}
			if len(c.EnvFrom) != 0 {
				t.Errorf("%s gets variables that nobody named", service)
			}
			for _, arg := range c.Args {
				if strings.HasPrefix(arg, "--postgres") || strings.Contains(arg, "@") {
					t.Errorf("%s has a login among its arguments", service)
				}
			}
		}
	})
}

// TestSecretsArriveWhereTheyAreLookedFor follows each from the values to the program.
func TestSecretsArriveWhereTheyAreLookedFor(t *testing.T) {
	pods := func(values string) map[string]corev1.PodSpec {
		specs := map[string]corev1.PodSpec{}
		for service, d := range deployments(mustDecode(t, suite, values)) {
			specs[service] = d.Spec.Template.Spec
		}
		return specs
	}
	environment := func(pod corev1.PodSpec) map[string]string {
		from := map[string]string{}
		for _, e := range pod.Containers[0].Env {
			from[e.Name] = e.ValueFrom.SecretKeyRef.Name + "/" + e.ValueFrom.SecretKeyRef.Key
		}
		return from
	}

	given := pods("")
	if got, want := environment(given["persistence"]), (map[string]string{"TOPGUN_POSTGRES": "topgun-postgres/url"}); !maps.Equal(got, want) {
		t.Errorf("persistence gets %v, want %v", got, want)
	}
	gateway := given["gateway"]
	if len(gateway.Volumes) != 1 || gateway.Volumes[0].Secret.SecretName != "topgun-jwt" || len(gateway.Containers[0].VolumeMounts) != 1 {
		t.Fatalf("the gateway does not mount topgun-jwt: %v", gateway.Volumes)
	}
	file := gateway.Containers[0].VolumeMounts[0].MountPath + "/" + gateway.Volumes[0].Secret.Items[0].Path
	if !slices.Contains(gateway.Containers[0].Args, "--jwt-secret-file="+file) {
		t.Errorf("the gateway is not told that its secret is %s", file)
	}

	given = pods(full(suite))
	for _, service := range []string{"fanout", "partition", "persistence"} {
		if got := environment(given[service])["TOPGUN_NATS"]; got != "nats-login/nats-url" {
			t.Errorf("%s gets NATS from %q, want nats-login/nats-url", service, got)
		}
		for _, arg := range given[service].Containers[0].Args {
			if strings.HasPrefix(arg, "--nats") {
				t.Errorf("%s gets NATS as an argument as well", service)
			}
		}
	}
	if got := environment(given["persistence"])["TOPGUN_POSTGRES"]; got != "pg-app/uri" {
		t.Errorf("persistence gets Postgres from %q, want pg-app/uri", got)
	}

	// Keys by URL alone: nothing to mount.
	given = pods("gateway: {jwt: {existingSecret: ''}, flags: {jwks-url: 'https://issuer.example.com/keys'}}")
	if gateway := given["gateway"]; len(gateway.Volumes) != 0 || len(gateway.Containers[0].VolumeMounts) != 0 {
		t.Error("the gateway mounts a Secret that nobody named")
	}
}
