package gateway

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"github.com/topgun-sync/topgun/services/gateway/auth"
)

// Config holds the gateway's settings. DefaultConfig gives every limit its
// documented default; Validate says what is wrong with a changed one.
type Config struct {
	// GatewayID names the gateway to fanout, to operators and in the origins of its
	// sessions: 1 to 128 of [a-z0-9-].
	GatewayID string
	// Listen is the address of the client port, host:port. The gateway does not
	// open it; the address decides whether serving without authentication is safe
	// enough to be the default.
	Listen string
	// PublicURL is the address of the WebSocket as clients write it, ws:// or wss://, for
	// clients in cluster mode that ask for one; empty means the one that each of them
	// connected to. Behind a proxy that ends TLS it must be set.
	PublicURL string
	// NoAuth serves everybody as anonymous although no key is configured. Without
	// it, and without a key, only a loopback Listen address is accepted.
	NoAuth bool
	// Auth says how tokens are checked; its zero value asks for none.
	Auth auth.Config
	// AllowedOrigins lists the exact origins (scheme://host[:port]) of web pages
	// that may connect, besides pages of the same host and of loopback addresses.
	// "*" alone allows every origin.
	AllowedOrigins []string

	// MaxMessageBytes bounds one WebSocket message of an authenticated session.
	// Clients send all pending ops in one frame, so a small bound turns a slow
	// ack into an endless reconnect (PROTOCOL 2.7).
	MaxMessageBytes int
	// MaxPreAuthMessageBytes bounds one message before authentication.
	MaxPreAuthMessageBytes int
	// MaxBodyBytes bounds the body of POST /sync before and after decompression.
	MaxBodyBytes int
	// MaxSyncBytes bounds the bodies of all POST /sync requests in flight together.
	MaxSyncBytes int64
	// MaxOps bounds the distinct ops of one batch.
	MaxOps int
	// MaxMaps bounds the maps that one session looks at. A client asks for all of its
	// maps when it connects.
	MaxMaps int
	// MaxSubscriptions bounds the live queries, and the topics, of one session;
	// also the maps, and the queries, of one POST /sync.
	MaxSubscriptions int
	// MaxInFlight bounds the requests of one session that are being answered.
	MaxInFlight int
	// MaxSessions bounds the open sessions of this gateway. Keep it below the
	// descriptor limit of the process.
	MaxSessions int
	// MaxSessionsPerAddress bounds the open sessions of one client address.
	MaxSessionsPerAddress int
	// QueueMessages and QueueBytes bound what waits to be written to one session.
	QueueMessages int
	QueueBytes    int

	// AuthTimeout is how long a session may take to authenticate.
	AuthTimeout time.Duration
	// LoginTimeout replaces AuthTimeout once a client said DEVICE_HELLO: it may be
	// waiting for its user to log in (PROTOCOL 3.3).
	LoginTimeout time.Duration
	// IdleTimeout ends a session that sent nothing for so long.
	IdleTimeout time.Duration
	// BodyTimeout is how long the body of POST /sync may take to arrive.
	BodyTimeout time.Duration
	// WriteTimeout is how long one write to a client may take.
	WriteTimeout time.Duration
	// ApplyTimeout is how long ops wait for their owner before the client is told
	// to send them again.
	ApplyTimeout time.Duration
	// ReadTimeout is how long a read from the owners may take, retries included.
	ReadTimeout time.Duration
	// DrainTimeout bounds the orderly end of sessions when the gateway stops.
	DrainTimeout time.Duration

	// CallsPerOwner is how many Apply calls to one owner are in flight at once;
	// what arrives meanwhile joins the next one.
	CallsPerOwner int
	// QueueOps and QueueOpBytes bound the ops that wait for all owners or are in
	// flight to them; an op above the bound waits for room.
	QueueOps     int
	QueueOpBytes int64
}

// DefaultConfig returns the configuration with every documented default. Listen
// is the loopback address that the one binary uses.
func DefaultConfig() Config {
	return Config{
		GatewayID:              "gateway",
		Listen:                 "127.0.0.1:8080",
		MaxMessageBytes:        16 << 20,
		MaxPreAuthMessageBytes: 64 << 10,
		MaxBodyBytes:           16 << 20,
		MaxSyncBytes:           256 << 20,
		MaxOps:                 1000,
		MaxMaps:                1000,
		MaxSubscriptions:       256,
		MaxInFlight:            32,
		MaxSessions:            50_000,
		MaxSessionsPerAddress:  10_000,
		QueueMessages:          256,
		QueueBytes:             1 << 20,
		AuthTimeout:            10 * time.Second,
		LoginTimeout:           30 * time.Second,
		IdleTimeout:            60 * time.Second,
		BodyTimeout:            15 * time.Second,
		WriteTimeout:           10 * time.Second,
		ApplyTimeout:           10 * time.Second,
		ReadTimeout:            10 * time.Second,
		DrainTimeout:           10 * time.Second,
		CallsPerOwner:          2,
		QueueOps:               100_000,
		QueueOpBytes:           256 << 20,
	}
}

// Validate reports the first setting that cannot work, and what would.
func (c Config) Validate() error {
	if !validGatewayID(c.GatewayID) {
		return errors.New("gateway id: use 1 to 128 of a-z, 0-9 and -")
	}
	host, _, err := net.SplitHostPort(c.Listen)
	if err != nil {
		return errors.New("listen address: want host:port, for example 127.0.0.1:8080")
	}
	if err := checkPublicURL(c.PublicURL); err != nil {
		return err
	}
	if !c.NoAuth && !c.Auth.Configured() && !loopbackHost(host) {
		return errors.New("no token key is configured and the listen address is not loopback: " +
			"set a JWT secret, public key or JWKS URL, listen on 127.0.0.1, or say no-auth to serve everybody")
	}
	if c.NoAuth && c.Auth.Configured() {
		return errors.New("no-auth and a token key contradict each other: remove one")
	}
	if err := c.Auth.Validate(); err != nil {
		return fmt.Errorf("auth: %w", err)
	}
	if _, err := newOrigins(c.AllowedOrigins, loopbackHost(host)); err != nil {
		return err
	}
	for _, n := range []struct {
		name  string
		value int64
		least int64
	}{
		{"max message bytes", int64(c.MaxMessageBytes), 1 << 10},
		{"max pre-auth message bytes", int64(c.MaxPreAuthMessageBytes), auth.MaxTokenBytes},
		{"max body bytes", int64(c.MaxBodyBytes), 1 << 10},
		{"max sync bytes", c.MaxSyncBytes, int64(c.MaxBodyBytes)},
		{"max ops", int64(c.MaxOps), 1},
		{"max maps", int64(c.MaxMaps), 1},
		{"max subscriptions", int64(c.MaxSubscriptions), 1},
		{"max in flight", int64(c.MaxInFlight), 1},
		{"max sessions", int64(c.MaxSessions), 1},
		{"max sessions per address", int64(c.MaxSessionsPerAddress), 1},
		{"queue messages", int64(c.QueueMessages), 1},
		{"queue bytes", int64(c.QueueBytes), 1 << 10},
		{"auth timeout", int64(c.AuthTimeout), 1},
		{"login timeout", int64(c.LoginTimeout), int64(c.AuthTimeout)},
		{"idle timeout", int64(c.IdleTimeout), 1},
		{"body timeout", int64(c.BodyTimeout), 1},
		{"write timeout", int64(c.WriteTimeout), 1},
		{"apply timeout", int64(c.ApplyTimeout), 1},
		{"read timeout", int64(c.ReadTimeout), 1},
		{"drain timeout", int64(c.DrainTimeout), 1},
		{"calls per owner", int64(c.CallsPerOwner), 1},
		{"queue ops", int64(c.QueueOps), int64(c.MaxOps)},
		{"queue op bytes", c.QueueOpBytes, int64(max(c.MaxMessageBytes, c.MaxBodyBytes))},
	} {
		if n.value < n.least {
			return fmt.Errorf("%s: must be at least %d", n.name, n.least)
		}
	}
	if c.MaxOps > maxCallOps {
		return fmt.Errorf("max ops: must be at most %d, the most that one call to an owner carries", maxCallOps)
	}
	return nil
}

func checkPublicURL(text string) error {
	if text == "" {
		return nil
	}
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "ws" && u.Scheme != "wss" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return errors.New("public url: want ws:// or wss:// and a host, for example wss://data.example.com/ws")
	}
	return nil
}

func validGatewayID(id string) bool {
	if len(id) < 1 || len(id) > 128 {
		return false
	}
	return strings.IndexFunc(id, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-'
	}) < 0
}

// loopbackHost reports whether a host, as it stands in an address or an origin
// without its port, is this machine.
func loopbackHost(host string) bool {
	host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	if strings.EqualFold(host, "localhost") {
		return true
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.Unmap().IsLoopback()
}
