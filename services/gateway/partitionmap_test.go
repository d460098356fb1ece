package gateway

import (
	"strings"
	"testing"

	"github.com/topgun-sync/topgun/core/wire"
)

// PROTOCOL 18: one node owns everything, at the address that the client connected to, and
// the map is always newer than the one that the client has.
func TestPartitionMap(t *testing.T) {
	b := setup(t, nil, nil)
	p := b.hello(t)
	for current, want := range map[uint64]uint64{0: 1, 7: 8, 1 << 53: 1 << 53} {
		p.send(&wire.PartitionMapRequest{CurrentVersion: current})
		m := expect[*wire.PartitionMap](p)
		if m.Version != want || m.WebSocketURL != b.url || m.HTTPURL != "http"+strings.TrimPrefix(b.url, "ws") || m.NodeID == "" || m.GeneratedAt == 0 {
			t.Errorf("current version %d: %+v, want version %d at %s", current, m, want, b.url)
		}
	}
}

func TestPartitionMapPublicURL(t *testing.T) {
	b := setup(t, func(c *Config) { c.PublicURL = "wss://data.example.com/ws" }, nil)
	p := b.hello(t)
	p.send(&wire.PartitionMapRequest{})
	if m := expect[*wire.PartitionMap](p); m.WebSocketURL != "wss://data.example.com/ws" || m.HTTPURL != "https://data.example.com/ws" {
		t.Errorf("%+v", m)
	}
	for _, bad := range []string{"data.example.com", "http://data.example.com", "ws://", "ws://user@host/", "wss://host/?token=x", "://"} {
		cfg := DefaultConfig()
		cfg.PublicURL = bad
		if cfg.Validate() == nil {
			t.Errorf("public url %q is accepted", bad)
		}
	}
}
