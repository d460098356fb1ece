package charts

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
)

// TestSchemasRefuse: each of these is an error before anything is installed, and the
// error names the value.
func TestSchemasRefuse(t *testing.T) {
	type refusal struct{ chart, values, named string }
	var all []refusal
	for _, chart := range charts() {
		all = append(all,
			refusal{chart, "unknown: 1", "unknown"},
			refusal{chart, "global: {nats: {ulr: nats://x:1}}", "ulr"},
			refusal{chart, "global: {nats: {url: 'http://nats:4222'}}", "url"},
			refusal{chart, "global: {nats: {url: 'nats://user:password@nats:4222'}}", "url"},
			refusal{chart, "global: {nats: {peers: []}}", "peers"},
			refusal{chart, "global: {networkPolicy: {operatorPeers: []}}", "operatorPeers"},
			refusal{chart, "global: {cluster: Not_A_Name}", "cluster"},
		)
	}
	for _, service := range services() {
		all = append(all,
			refusal{service, "flags: {listen: ':1'}", "listen"},
			refusal{service, "flags: {log-level: loud}", "log-level"},
			refusal{service, "flags: {logLevel: info}", "logLevel"},
			refusal{service, "image: {name: x}", "name"},
			refusal{service, "image: {digest: latest}", "digest"},
			refusal{service, "startupSeconds: 7", "startupSeconds"},
			refusal{service, "replicas: many", "replicas"},
			refusal{suite, service + ": {unknown: 1}", "unknown"},
			refusal{suite, service + ": {flags: {log-level: loud}}", "log-level"},
		)
	}
	for _, single := range []string{"partition", "persistence"} {
		all = append(all,
			refusal{single, "replicas: 2", "replicas"},
			refusal{single, "autoscaling: {enabled: true}", "autoscaling"},
			refusal{suite, single + ": {replicas: 2}", "replicas"},
			refusal{single, "flags: {log-max-bytes: 8Gi}", "log-max-bytes"},
		)
	}
	all = append(all,
		refusal{"partition", "flags: {tombstone-retention: 30d}", "tombstone-retention"},
		refusal{"partition", "flags: {node-id: 'a b'}", "node-id"},
		refusal{"persistence", "postgres: {existingSecret: ''}", "existingSecret"},
		refusal{"persistence", "postgres: {url: 'postgres://user:password@host/db'}", "url"},
		refusal{"persistence", "flags: {postgres: 'postgres://user:password@host/db'}", "postgres"},
		refusal{"gateway", "jwt: {secret: abc}", "secret"},
		refusal{"gateway", "jwt: {key: ../../etc/passwd}", "key"},
		refusal{"gateway", "jwt: {existingSecret: ''}", "existingSecret"},
		refusal{"gateway", "service: {type: ExternalName}", "type"},
		refusal{"gateway", "flags: {public-url: 'https://x'}", "public-url"},
	)
	for _, r := range all {
		_, err := render(t, r.chart, r.values)
		if err == nil || !strings.Contains(err.Error(), r.named) {
			t.Errorf("%s with %q: got %v, want an error that names %s", r.chart, r.values, err, r.named)
		}
	}
}

// TestSchemasAreStrict: every object whose properties are listed refuses others, in
// all schemas, and values.yaml shows everything that can be set.
func TestSchemasAreStrict(t *testing.T) {
	for _, name := range charts() {
		c := load(t, name)
		var schema map[string]any
		if err := json.Unmarshal(c.Schema, &schema); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		// The conditions of the gateway are no descriptions of objects.
		delete(schema, "anyOf")
		objects := 0
		var walk func(path string, schema, values any)
		walk = func(path string, schema, values any) {
			s, _ := schema.(map[string]any)
			properties, _ := s["properties"].(map[string]any)
			if properties == nil {
				return
			}
			objects++
			if s["additionalProperties"] != false {
				t.Errorf("%s takes any name in %s", name, path)
			}
			v, shown := values.(map[string]any)
			for _, property := range slices.Sorted(maps.Keys(properties)) {
				at := path + "." + property
				if _, there := v[property]; shown && !there && !slices.Contains(append(services(), "library"), property) {
					t.Errorf("%s: values.yaml does not show %s", name, at)
				}
				walk(at, properties[property], v[property])
			}
		}
		walk(name, schema, c.Values)
		if objects < 4 {
			t.Errorf("%s: %d objects were looked at, which cannot be all", name, objects)
		}
	}
}

// TestOneReplicaIsSaidWhy: who reads the values learns the reason.
func TestOneReplicaIsSaidWhy(t *testing.T) {
	for _, name := range []string{"partition", "persistence"} {
		var schema struct {
			Properties struct {
				Replicas struct {
					Maximum     int    `json:"maximum"`
					Description string `json:"description"`
				} `json:"replicas"`
			} `json:"properties"`
		}
		if err := json.Unmarshal(load(t, name).Schema, &schema); err != nil {
			t.Fatal(err)
		}
		if r := schema.Properties.Replicas; r.Maximum != 1 || !strings.HasPrefix(r.Description, "More than one is refused: ") {
			t.Errorf("%s: the schema says %q of at most %d replicas", name, r.Description, r.Maximum)
		}
	}
}

// TestSharedValuesAreEqual: the global values are in every chart, so that each can be
// installed alone; their defaults and their schema must be the same in all.
func TestSharedValuesAreEqual(t *testing.T) {
	shared := func(name string) (defaults, schema string) {
		c := load(t, name)
		var s struct {
			Properties struct {
				Global map[string]any `json:"global"`
			} `json:"properties"`
		}
		if err := json.Unmarshal(c.Schema, &s); err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(c.Values["global"]), fmt.Sprint(s.Properties.Global)
	}
	defaults, schema := shared(suite)
	for _, name := range services() {
		d, s := shared(name)
		if d != defaults {
			t.Errorf("the global values of %s are\n%s, those of the suite\n%s", name, d, defaults)
		}
		if s != schema {
			t.Errorf("the schema of the global values of %s is\n%s, that of the suite\n%s", name, s, schema)
		}
	}
}
