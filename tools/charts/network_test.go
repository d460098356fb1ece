package charts

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// endpoint is something that packets come from or go to: a pod, or a host that is
// outside of the cluster and has only an address.
type endpoint struct {
	name      string
	namespace string
	labels    map[string]string
	address   netip.Addr
}

// port is one that somebody may listen on.
type port struct {
	protocol corev1.Protocol
	number   int32
}

// ports are all that are tried between any two endpoints.
func ports() []port {
	all := []port{{corev1.ProtocolUDP, 53}, {corev1.ProtocolUDP, 8080}}
	for _, n := range []int32{53, 80, 443, 4222, 4223, 4317, 5432, 6432, 6222, 8080, 8081, 8082, 8083, 8084, 8222, 8443} {
		all = append(all, port{corev1.ProtocolTCP, n})
	}
	return all
}

// others are everybody around the services, and some who look like one of them.
func others() []endpoint {
	return []endpoint{
		{name: "client", namespace: "ingress", address: netip.MustParseAddr("10.9.0.1")},
		{name: "stranger", namespace: namespace, labels: map[string]string{"app.kubernetes.io/name": "web"}, address: netip.MustParseAddr("10.9.0.2")},
		{name: "gateway of another cluster", namespace: namespace, labels: map[string]string{"app.kubernetes.io/name": "gateway", "app.kubernetes.io/part-of": "other"}, address: netip.MustParseAddr("10.9.0.3")},
		{name: "gateway of another namespace", namespace: "other", labels: map[string]string{"app.kubernetes.io/name": "gateway", "app.kubernetes.io/part-of": release}, address: netip.MustParseAddr("10.9.0.4")},
		{name: "nats", namespace: "nats", labels: map[string]string{"app.kubernetes.io/name": "nats"}, address: netip.MustParseAddr("10.1.0.1")},
		{name: "postgres", namespace: "db", labels: map[string]string{"cnpg.io/podRole": "instance"}, address: netip.MustParseAddr("10.2.0.1")},
		{name: "dns", namespace: "kube-system", labels: map[string]string{"k8s-app": "kube-dns"}, address: netip.MustParseAddr("169.254.20.10")},
		{name: "kube-system", namespace: "kube-system", address: netip.MustParseAddr("10.9.0.5")},
		{name: "operator", namespace: "monitoring", address: netip.MustParseAddr("10.9.0.6")},
		{name: "internet", address: netip.MustParseAddr("203.0.113.9")},
	}
}

// namespaceLabels are those of the namespaces above: the name that Kubernetes gives,
// and the team of the one for operators.
func namespaceLabels(name string) labels.Set {
	set := labels.Set{corev1.LabelMetadataName: name}
	if name == "monitoring" {
		set["team"] = "sre"
	}
	return set
}

func selects(t *testing.T, selector *metav1.LabelSelector, set labels.Set) bool {
	t.Helper()
	s, err := metav1.LabelSelectorAsSelector(selector)
	if err != nil {
		t.Fatal(err)
	}
	return s.Matches(set)
}

// isPeer reports whether e is the peer of a policy in our namespace.
func isPeer(t *testing.T, peer networkingv1.NetworkPolicyPeer, e endpoint) bool {
	t.Helper()
	if peer.IPBlock != nil {
		return netip.MustParsePrefix(peer.IPBlock.CIDR).Contains(e.address)
	}
	if e.namespace == "" {
		return false
	}
	if peer.NamespaceSelector == nil {
		if e.namespace != namespace {
			return false
		}
	} else if !selects(t, peer.NamespaceSelector, namespaceLabels(e.namespace)) {
		return false
	}
	return peer.PodSelector == nil || selects(t, peer.PodSelector, e.labels)
}

// permits reports whether one rule of a policy covers the endpoint and the port.
func permits(t *testing.T, peers []networkingv1.NetworkPolicyPeer, numbers []networkingv1.NetworkPolicyPort, e endpoint, p port) bool {
	t.Helper()
	known := len(peers) == 0 || slices.ContainsFunc(peers, func(peer networkingv1.NetworkPolicyPeer) bool { return isPeer(t, peer, e) })
	open := len(numbers) == 0 || slices.ContainsFunc(numbers, func(n networkingv1.NetworkPolicyPort) bool {
		protocol := corev1.ProtocolTCP
		if n.Protocol != nil {
			protocol = *n.Protocol
		}
		return protocol == p.protocol && (n.Port == nil || n.Port.IntVal == p.number)
	})
	return known && open
}

// allowed reports whether policies let a connection through, as Kubernetes defines
// it: who is selected by a policy of that direction may do only what one of them
// permits, who is selected by none may do everything.
func allowed(t *testing.T, policies []*networkingv1.NetworkPolicy, from, to endpoint, p port) bool {
	t.Helper()
	direction := func(e, other endpoint, d networkingv1.PolicyType) bool {
		closed, open := false, false
		for _, policy := range policies {
			if e.namespace != policy.Namespace || !slices.Contains(policy.Spec.PolicyTypes, d) || !selects(t, &policy.Spec.PodSelector, e.labels) {
				continue
			}
			closed = true
			if d == networkingv1.PolicyTypeIngress {
				for _, rule := range policy.Spec.Ingress {
					open = open || permits(t, rule.From, rule.Ports, other, p)
				}
				continue
			}
			for _, rule := range policy.Spec.Egress {
				open = open || permits(t, rule.To, rule.Ports, other, p)
			}
		}
		return !closed || open
	}
	return direction(from, to, networkingv1.PolicyTypeEgress) && direction(to, from, networkingv1.PolicyTypeIngress)
}

// edges are all connections that the policies of m let through and that one of the
// services takes part in, as "from -> to TCP/1".
func edges(t *testing.T, m manifests) []string {
	t.Helper()
	all := others()
	ours := map[string]bool{}
	for service, d := range deployments(m) {
		all = append(all, endpoint{name: service, namespace: d.Namespace, labels: d.Spec.Template.Labels, address: netip.MustParseAddr("10.9.1.1")})
		ours[service] = true
	}
	policies := of[*networkingv1.NetworkPolicy](m)
	var found []string
	for _, from := range all {
		for _, to := range all {
			if from.name == to.name || !ours[from.name] && !ours[to.name] {
				continue
			}
			for _, p := range ports() {
				if allowed(t, policies, from, to, p) {
					found = append(found, fmt.Sprintf("%s -> %s %s/%d", from.name, to.name, p.protocol, p.number))
				}
			}
		}
	}
	slices.Sort(found)
	return found
}

// architecture are the edges of ARCHITECTURE 3 between the services, and with the log
// and the database on the given ports; operators, and names of hosts.
func architecture(nats, postgres int) []string {
	want := []string{
		"gateway -> partition TCP/8082", "gateway -> fanout TCP/8083", "gateway -> persistence TCP/8084",
		"fanout -> partition TCP/8082", fmt.Sprintf("fanout -> nats TCP/%d", nats),
		"partition -> persistence TCP/8084", fmt.Sprintf("partition -> nats TCP/%d", nats),
		fmt.Sprintf("persistence -> nats TCP/%d", nats), fmt.Sprintf("persistence -> postgres TCP/%d", postgres),
	}
	for _, service := range services() {
		want = append(want,
			fmt.Sprintf("operator -> %s TCP/%d", service, operatorPort(service)),
			service+" -> dns UDP/53", service+" -> dns TCP/53")
	}
	return want
}

func compareEdges(t *testing.T, got, want []string) {
	t.Helper()
	slices.Sort(want)
	for _, edge := range got {
		if !slices.Contains(want, edge) {
			t.Errorf("open and not needed: %s", edge)
		}
	}
	for _, edge := range want {
		if !slices.Contains(got, edge) {
			t.Errorf("needed and closed: %s", edge)
		}
	}
}

// TestNetworkPoliciesAreTheArchitecture tries every pair of endpoints on every port.
func TestNetworkPoliciesAreTheArchitecture(t *testing.T) {
	want := architecture(4222, 5432)
	for _, e := range others() {
		want = append(want, e.name+" -> gateway TCP/8080")
	}
	compareEdges(t, edges(t, mustDecode(t, suite, "")), want)
}

// TestNetworkPoliciesFollowTheValues: clients, NATS, Postgres, DNS and operators as
// given; where traces and keys are fetched or sent over the network, that too.
func TestNetworkPoliciesFollowTheValues(t *testing.T) {
	want := architecture(4223, 6432)
	want = append(want, "client -> gateway TCP/8080")
	for _, service := range services() {
		want = append(want, service+" -> operator TCP/4317")
	}
	for _, e := range others() {
		want = append(want, "gateway -> "+e.name+" TCP/8443")
	}
	compareEdges(t, edges(t, mustDecode(t, suite, full(suite))), want)

	// Without a port in the URL it is the one of its scheme.
	got := edges(t, mustDecode(t, suite, "gateway: {flags: {jwks-url: 'https://issuer.example.com/keys'}}"))
	if !slices.Contains(got, "gateway -> internet TCP/443") {
		t.Error("the gateway cannot fetch keys by https")
	}
}

// TestWithoutNetworkPoliciesEverythingIsOpen is the negative control of the two above.
func TestWithoutNetworkPoliciesEverythingIsOpen(t *testing.T) {
	m := mustDecode(t, suite, "global: {networkPolicy: {enabled: false}}")
	if n := len(of[*networkingv1.NetworkPolicy](m)); n != 0 {
		t.Fatalf("there are %d policies, want none", n)
	}
	n := len(services())
	if got, want := len(edges(t, m)), (n*(n-1)+2*n*len(others()))*len(ports()); got != want {
		t.Errorf("%d edges are open, want all %d", got, want)
	}
}
