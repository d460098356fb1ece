package gateway

import (
	"net/http"
	"strings"

	"github.com/topgun-sync/topgun/core/wire"
)

// Clients in cluster mode ask which node owns which partition, and connect to it. They are
// told of one node, the gateway, that owns all of them: it knows the owners, and a client
// that does not leaves no connection to a node that is gone (PROTOCOL 18.3).

// partitionNode is the one node that clients are told of. It is the same at every gateway,
// so that a client which comes to another one keeps its connection.
const partitionNode = "topgun"

// maxVersion keeps versions within what a JavaScript number holds.
const maxVersion = 1 << 53

// partitionMap answers a PARTITION_MAP_REQUEST. Its version is always above the one that
// the client has: a client takes no other, and its request would wait 5 s for one.
func (s *session) partitionMap(current uint64) *wire.PartitionMap {
	return &wire.PartitionMap{
		Version:      min(current, maxVersion-1) + 1,
		NodeID:       partitionNode,
		WebSocketURL: s.at,
		HTTPURL:      httpURL(s.at),
		GeneratedAt:  uint64(max(0, s.k.now().UnixMilli())),
	}
}

// endpoint is the address that a client connects to: the configured one, or that which it
// did connect to, as it wrote it. A client keeps its connection only if it is the same.
func (k *sockets) endpoint(r *http.Request) string {
	if k.cfg.PublicURL != "" {
		return k.cfg.PublicURL
	}
	scheme := "ws://"
	if r.TLS != nil {
		scheme = "wss://"
	}
	return strings.Clone(scheme + r.Host + strings.TrimSuffix(r.URL.Path, "/"))
}

// httpURL is the base of POST /sync for a WebSocket's address.
func httpURL(endpoint string) string {
	return "http" + strings.TrimPrefix(endpoint, "ws")
}
