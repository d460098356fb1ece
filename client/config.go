package client

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	mrand "math/rand/v2"
	"net/url"
	"strings"
	"time"
	"unicode/utf8"
)

// Config says how a Client behaves. The zero value of every field but URL has a
// meaning.
type Config struct {
	// URL of the server: ws:// or wss:// for a WebSocket session, used as it is
	// (PROTOCOL 2.1); http:// or https:// for polling, to which "/sync" is
	// appended. Required.
	URL string
	// NodeID names this replica in the stamps of its writes: 1 to 128 bytes of
	// UTF-8 without ':', and never shared by two replicas (PROTOCOL 4.4). Empty
	// means a random UUID.
	NodeID string
	// Token returns the token for one attempt to authenticate. It is called
	// before every connect, so that it may refresh an expired token. Nil means
	// that the client introduces itself without one.
	Token func(ctx context.Context) (string, error)
	// Maps are opened before the first connect.
	Maps []string
	// MaxPending bounds the operations that wait for an acknowledgement. A write
	// beyond it is refused with ErrBacklog. 0 means 100,000.
	MaxPending int
	// RetryMin and RetryMax bound the delay before a reconnect: it doubles from
	// one to the other and is multiplied by a random factor from 0.5 to 1.5. 0
	// means 1 s and 30 s (PROTOCOL 2.6).
	RetryMin, RetryMax time.Duration
	// PollInterval is the pause between two polls when there is nothing to send.
	// It concerns http:// and https:// only. 0 means 5 s (PROTOCOL 17.2.1).
	PollInterval time.Duration
	// OnReject is told about every operation that the server refused for good.
	// It is called by the connection's goroutine and must not wait for the
	// client. May be nil.
	OnReject func(Rejection)
	// OnFrame sees every frame, or body of /sync, as it is on the wire. Data is
	// valid during the call only. It is called by the goroutines of the
	// connection, sent and received frames concurrently. May be nil.
	OnFrame func(Frame)
	// Logger gets one line per connect, disconnect and refusal. Nil is silent.
	Logger *slog.Logger
	// Now is the wall clock. Nil means time.Now.
	Now func() time.Time
	// Jitter returns random numbers from 0 up to 1, for the delay of reconnects.
	// Nil means math/rand.
	Jitter func() float64

	timing timing
}

// timing holds what PROTOCOL fixes; tests of this package make it shorter.
type timing struct {
	ping    time.Duration // between two PINGs
	silence time.Duration // without any frame until the connection is given up
	connect time.Duration // for the upgrade, and for the answer to AUTH
	grace   time.Duration // of silence after DEVICE_HELLO until the session goes ahead
	request time.Duration // for one POST /sync
}

// Rejection says that the server refused an operation for good. The operation
// has left the log, and the local record goes back to the server's.
type Rejection struct {
	OpID uint64
	Map  string
	Key  string
	// Code is the number of PROTOCOL 19, or 0 if the server gave none.
	Code int
	// Reason is the server's text.
	Reason string
}

// Frame is one WebSocket message, or one body of POST /sync.
type Frame struct {
	// Sent is true for what the client sent.
	Sent bool
	Data []byte
}

// StaticToken returns a source for Config.Token that always gives token.
func StaticToken(token string) func(context.Context) (string, error) {
	return func(context.Context) (string, error) { return token, nil }
}

// Validate says what is wrong with the configuration, if anything.
func (c Config) Validate() error {
	u, err := url.Parse(c.URL)
	if err != nil {
		return errors.New("client config: URL is not a URL; want ws://, wss://, http:// or https://")
	}
	switch u.Scheme {
	case "ws", "wss", "http", "https":
	default:
		return fmt.Errorf("client config: URL has the scheme %q; want ws, wss, http or https", u.Scheme)
	}
	if u.Host == "" {
		return errors.New("client config: URL names no host")
	}
	if len(c.NodeID) > 128 || strings.Contains(c.NodeID, ":") || !utf8.ValidString(c.NodeID) {
		return errors.New("client config: NodeID must be up to 128 bytes of UTF-8 without ':'")
	}
	if c.MaxPending < 0 {
		return errors.New("client config: MaxPending must not be negative")
	}
	if c.RetryMin < 0 || c.RetryMax < c.RetryMin {
		return errors.New("client config: want 0 <= RetryMin <= RetryMax")
	}
	if c.PollInterval < 0 {
		return errors.New("client config: PollInterval must not be negative")
	}
	return nil
}

func (c Config) withDefaults() Config {
	if c.NodeID == "" {
		c.NodeID = newNodeID()
	}
	if c.MaxPending == 0 {
		c.MaxPending = 100_000
	}
	if c.RetryMax == 0 {
		c.RetryMin, c.RetryMax = time.Second, 30*time.Second
	}
	if c.PollInterval == 0 {
		c.PollInterval = 5 * time.Second
	}
	if c.OnReject == nil {
		c.OnReject = func(Rejection) {}
	}
	if c.OnFrame == nil {
		c.OnFrame = func(Frame) {}
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Jitter == nil {
		c.Jitter = mrand.Float64
	}
	if c.timing == (timing{}) {
		c.timing = timing{
			ping:    5 * time.Second,
			silence: 15 * time.Second,
			connect: 5 * time.Second,
			grace:   500 * time.Millisecond,
			request: 30 * time.Second,
		}
	}
	return c
}

// newNodeID returns a random UUID (version 4), the form of the original client.
func newNodeID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	h := hex.EncodeToString(b[:])
	return strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-")
}

// retryDelay returns the pause before the attempt-th reconnect, from 0.
func (c Config) retryDelay(attempt int) time.Duration {
	d := c.RetryMax
	if attempt < 30 && c.RetryMin<<attempt < c.RetryMax {
		d = c.RetryMin << attempt
	}
	return time.Duration(float64(d) * (0.5 + c.Jitter()))
}
