package charts

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	chart "helm.sh/helm/v4/pkg/chart/v2"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	chartutil "helm.sh/helm/v4/pkg/chart/v2/util"
	"helm.sh/helm/v4/pkg/engine"
	appsv1 "k8s.io/api/apps/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/yaml"
)

const (
	root = "../.."
	helm = root + "/deploy/helm"
	// release and namespace are what the charts are rendered for.
	release   = "topgun"
	namespace = "sync"
	suite     = "suite"
)

// services are the charts of one service each.
func services() []string { return []string{"fanout", "gateway", "partition", "persistence"} }

// charts are all that can be installed.
func charts() []string { return append(services(), suite) }

// load reads a chart as `helm template` does, with what stands in its charts folder.
func load(t *testing.T, name string) *chart.Chart {
	t.Helper()
	c, err := loader.LoadDir(filepath.Join(helm, name))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// render returns the manifests of a chart with values of its users in YAML. It
// checks them against the schemas first, as Helm does.
func render(t *testing.T, name, values string) (map[string]string, error) {
	t.Helper()
	c := load(t, name)
	var given map[string]any
	if err := yaml.Unmarshal([]byte(values), &given); err != nil {
		t.Fatal(err)
	}
	if err := chartutil.ProcessDependencies(c, given); err != nil {
		return nil, err
	}
	options := common.ReleaseOptions{Name: release, Namespace: namespace, Revision: 1, IsInstall: true}
	all, err := util.ToRenderValues(c, given, options, common.DefaultCapabilities)
	if err != nil {
		return nil, err
	}
	return engine.Engine{Strict: true}.RenderWithContext(t.Context(), c, all)
}

// serviceMonitor is what is used of a kind that is not Kubernetes' own.
type serviceMonitor struct {
	APIVersion string         `json:"apiVersion"`
	Kind       string         `json:"kind"`
	Metadata   map[string]any `json:"metadata"`
	Spec       struct {
		Selector struct {
			MatchLabels map[string]string `json:"matchLabels"`
		} `json:"selector"`
		Endpoints []struct {
			Port     string `json:"port"`
			Path     string `json:"path"`
			Interval string `json:"interval"`
		} `json:"endpoints"`
	} `json:"spec"`
}

// manifests are the decoded objects of a rendered chart.
type manifests struct {
	objects  []runtime.Object
	monitors []serviceMonitor
}

// decode decodes every document strictly: an unknown, misspelt or repeated field is
// an error.
func decode(rendered map[string]string) (manifests, error) {
	decoder := json.NewSerializerWithOptions(json.DefaultMetaFactory, scheme.Scheme, scheme.Scheme,
		json.SerializerOptions{Yaml: true, Strict: true})
	var all manifests
	for _, name := range slices.Sorted(maps.Keys(rendered)) {
		if !strings.HasSuffix(name, ".yaml") {
			continue
		}
		documents := utilyaml.NewYAMLReader(bufio.NewReader(strings.NewReader(rendered[name])))
		for {
			document, err := documents.Read()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return all, fmt.Errorf("%s: %w", name, err)
			}
			if len(bytes.TrimSpace(document)) == 0 {
				continue
			}
			if bytes.Contains(document, []byte("\nkind: ServiceMonitor\n")) {
				var m serviceMonitor
				if err := yaml.UnmarshalStrict(document, &m); err != nil {
					return all, fmt.Errorf("%s: %w", name, err)
				}
				all.monitors = append(all.monitors, m)
				continue
			}
			object, _, err := decoder.Decode(document, nil, nil)
			if err != nil {
				return all, fmt.Errorf("%s: %w\n%s", name, err, document)
			}
			all.objects = append(all.objects, object)
		}
	}
	return all, nil
}

// mustDecode renders and decodes a chart.
func mustDecode(t *testing.T, name, values string) manifests {
	t.Helper()
	rendered, err := render(t, name, values)
	if err != nil {
		t.Fatalf("render %s: %v", name, err)
	}
	all, err := decode(rendered)
	if err != nil {
		t.Fatalf("decode %s: %v", name, err)
	}
	return all
}

// of returns the objects of one type.
func of[T runtime.Object](m manifests) []T {
	var found []T
	for _, object := range m.objects {
		if o, ok := object.(T); ok {
			found = append(found, o)
		}
	}
	return found
}

// deployments are the Deployments of a chart by the name of the service.
func deployments(m manifests) map[string]*appsv1.Deployment {
	found := map[string]*appsv1.Deployment{}
	for _, d := range of[*appsv1.Deployment](m) {
		found[d.Labels["app.kubernetes.io/name"]] = d
	}
	return found
}

// full are values that set everything that can be set, for each chart of a service.
func full(name string) string {
	values := fullShared
	switch name {
	case "gateway":
		values += fullGateway + fullMany
	case "partition":
		values += fullPartition
	case "persistence":
		values += fullPersistence
	case "fanout":
		values += fullFanout + fullMany
	case suite:
		values = fullGlobal
		for _, s := range services() {
			own := strings.TrimPrefix(full(s), fullGlobal)
			values += s + ":\n  " + strings.ReplaceAll(strings.TrimSpace(own), "\n", "\n  ") + "\n"
		}
	}
	return values
}

const (
	fullGlobal = `
global:
  cluster: blue
  imageRegistry: registry.example.com:5000/mirror/
  imagePullSecrets: [{name: pull}]
  nats:
    existingSecret: nats-login
    key: nats-url
    port: 4223
    peers: [{ipBlock: {cidr: 10.1.0.0/16}}]
  networkPolicy:
    enabled: true
    operatorPeers: [{namespaceSelector: {matchExpressions: [{key: team, operator: In, values: [ops, sre]}]}}]
    dnsPeers: [{ipBlock: {cidr: 169.254.20.10/32}}]
`
	fullShared = fullGlobal + `
image: {repository: mirror/of-it, tag: "1.2", digest: "sha256:0123456789012345678901234567890123456789012345678901234567890123", pullPolicy: Always}
resources: {requests: {cpu: 2, memory: 2Gi}, limits: {cpu: "3", memory: 3Gi}}
startupSeconds: 90
podDisruptionBudget: {maxUnavailable: 50%}
serviceMonitor: {enabled: true, interval: 15s, labels: {release: prometheus}}
podAnnotations: {example.com/a: "1", example.com/b: "true"}
nodeSelector: {disk: ssd}
tolerations: [{key: dedicated, operator: Equal, value: sync, effect: NoSchedule}]
affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: zone, operator: Exists}]}]}}}
priorityClassName: high
`
	fullMany = `
replicas: 3
autoscaling: {enabled: true, minReplicas: 3, maxReplicas: 9, cpuUtilization: 50}
preStopSeconds: 7
`
	fullGateway = `
flags:
  partition: http://partition.elsewhere:1
  fanout: http://fanout.elsewhere:2
  persistence: http://persistence.elsewhere:3
  public-url: wss://sync.example.com/ws
  jwks-url: https://issuer.example.com:8443/keys
  jwt-issuer: https://issuer.example.com/
  jwt-audience: sync
  no-auth: true
  allow-origin: ["https://a.example.com", "https://b.example.com"]
  log-level: debug
  otlp-endpoint: http://collector.monitoring:4317
jwt: {existingSecret: keys, key: public.pem}
clients: {peers: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ingress}}}]}
service: {type: LoadBalancer, annotations: {example.com/balancer: internal}}
`
	fullLog = `
  shards: 32
  log-max-bytes: 17179869184
  log-replicas: 3
  log-level: debug
  otlp-endpoint: http://collector.monitoring:4317
`
	fullPartition = `
replicas: 0
flags:
  persistence: http://persistence.elsewhere:3
  node-id: one
  accept-log-loss: true
  tombstone-retention: 1h30m
` + fullLog
	fullPersistence = `
replicas: 0
postgres: {existingSecret: pg-app, key: uri, port: 6432, peers: [{ipBlock: {cidr: 10.2.0.0/16}}]}
flags:
  journal-age: 48h
  journal-bytes: 1073741824
` + fullLog
	fullFanout = `
flags:
  partition: http://partition.elsewhere:1
  log-level: debug
  otlp-endpoint: http://collector.monitoring:4317
`
)
