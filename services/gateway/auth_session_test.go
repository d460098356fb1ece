package gateway

import (
	"bytes"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/topgun-sync/topgun/core/wire"
)

const sessionSecret = "a-test-secret-of-more-than-thirty-two-bytes"

func tokenFor(t testing.TB, user string, expires time.Time) string {
	t.Helper()
	token, err := jwt.NewWithClaims(jwt.SigningMethodHS256, jwt.MapClaims{"sub": user, "exp": expires.Unix()}).
		SignedString([]byte(sessionSecret))
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// withAuth asks for tokens.
func withAuth(more func(*Config)) func(*Config) {
	return func(c *Config) {
		c.Auth.Secret = sessionSecret
		if more != nil {
			more(c)
		}
	}
}

// login dials and authenticates.
func (b *bench) login(t testing.TB, user string) *wsClient {
	t.Helper()
	p := b.dial(t)
	expect[*wire.AuthRequired](p)
	p.send(&wire.Auth{Token: tokenFor(t, user, time.Now().Add(time.Hour))})
	if ack := expect[*wire.AuthAck](p); ack.UserID != user || ack.ProtocolVersion != 1 || ack.DeviceToken == "" {
		t.Fatalf("ack %+v", ack)
	}
	return p
}

// PROTOCOL 3.2, 3.3: everything before AUTH has no effect and no answer; AUTH twice is
// what clients do.
func TestAuthRequired(t *testing.T) {
	b := setup(t, withAuth(nil), nil)
	p := b.dial(t)
	expect[*wire.AuthRequired](p)
	p.send(&wire.DeviceHello{})
	p.send(&wire.OpBatch{Ops: []wire.Op{putOp("1", "m", "k", "v", stamp(1))}})
	p.send(&wire.SyncInit{MapName: "m"})
	p.send(wire.PingAt(1))
	p.payload([]byte{0xc1})
	token := tokenFor(t, "alice", time.Now().Add(time.Hour))
	p.send(&wire.Auth{Token: token})
	p.send(&wire.Auth{Token: token})
	ack := expect[*wire.AuthAck](p)
	if ack.UserID != "alice" {
		t.Fatalf("user %q", ack.UserID)
	}
	p.ping() // the second was not answered
	if r := b.partition.record("m", "k"); r != nil {
		t.Error("an op before AUTH was applied")
	}
	p.send(&wire.OpBatch{Ops: []wire.Op{putOp("1", "m", "k", "v", stamp(1))}})
	expect[*wire.OpAck](p)
}

func TestSecondAuth(t *testing.T) {
	b := setup(t, withAuth(nil), nil)
	p := b.login(t, "alice")
	p.send(&wire.Auth{Token: tokenFor(t, "alice", time.Now().Add(2*time.Hour))})
	if ack := expect[*wire.AuthAck](p); ack.UserID != "alice" {
		t.Fatalf("fresh token: user %q", ack.UserID)
	}
	p.send(&wire.Auth{Token: tokenFor(t, "mallory", time.Now().Add(time.Hour))})
	if e := expect[*wire.ErrorMessage](p); e.Code != 403 {
		t.Fatalf("somebody else: %+v, want 403", e)
	}
	p.send(&wire.Auth{Token: "rubbish"})
	if e := expect[*wire.ErrorMessage](p); e.Code != 401 {
		t.Fatalf("bad token: %+v, want 401", e)
	}
	if infos := b.service.sockets.list(0, 10); len(infos) != 1 || infos[0].userID != "alice" {
		t.Fatalf("sessions %+v, want one of alice", infos)
	}
	p.ping()
}

func TestBadToken(t *testing.T) {
	b := setup(t, withAuth(nil), nil)
	for name, token := range map[string]string{
		"empty":   "",
		"rubbish": "rubbish",
		"expired": tokenFor(t, "alice", time.Now().Add(-time.Hour)),
		"none":    "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhbGljZSIsImV4cCI6OTk5OTk5OTk5OX0.",
	} {
		t.Run(name, func(t *testing.T) {
			p := b.dial(t)
			expect[*wire.AuthRequired](p)
			p.send(&wire.Auth{Token: token})
			code, before := p.closed()
			if code != 4401 || len(before) != 1 {
				t.Fatalf("closed with %d after %d messages, want 4401 after AUTH_FAIL", code, len(before))
			}
			fail, ok := before[0].(*wire.AuthFail)
			if !ok || fail.Code != 401 || fail.Error != "AUTH_FAILED: the token is not valid" {
				t.Errorf("got %+v, want the one text for every cause", before[0])
			}
		})
	}
	if log := b.log.String(); strings.Contains(log, "rubbish") || strings.Contains(log, "eyJ") {
		t.Error("the log has a token")
	}
}

func TestProtocolVersion(t *testing.T) {
	b := setup(t, nil, nil)
	p := b.dial(t)
	p.send(&wire.Auth{Token: "x", ProtocolVersion: 2})
	code, before := p.closed()
	if code != 4400 || len(before) != 1 || !strings.Contains(before[0].(*wire.ErrorMessage).Message, "VERSION_UNSUPPORTED") {
		t.Errorf("closed with %d after %+v, want 4400 after an error that names the version", code, before)
	}
}

// Silence and garbage end after AuthTimeout; somebody who may be logging in has longer.
func TestAuthTimeout(t *testing.T) {
	var clock movedClock
	b := setup(t, withAuth(nil), func(b *bench) { b.service.sockets.now = clock.now })
	silent, garbage, user := b.dial(t), b.dial(t), b.dial(t)
	for _, p := range []*wsClient{silent, garbage, user} {
		expect[*wire.AuthRequired](p)
	}
	user.send(&wire.DeviceHello{})
	user.pong()
	clock.advance(t, b, DefaultConfig().AuthTimeout/2)
	for range 10 {
		garbage.payload([]byte{0xc1})
	}
	garbage.pong()
	clock.advance(t, b, DefaultConfig().AuthTimeout/2+time.Second)
	for name, p := range map[string]*wsClient{"silent": silent, "garbage": garbage} {
		if code, _ := p.closed(); code != 4408 {
			t.Errorf("%s: closed with %d, want 4408", name, code)
		}
	}
	user.send(&wire.Auth{Token: tokenFor(t, "alice", time.Now().Add(time.Hour))})
	expect[*wire.AuthAck](user)
}

// Before authentication a message may be 64 KiB, after it more.
func TestPreAuthLimit(t *testing.T) {
	b := setup(t, withAuth(nil), nil)
	p := b.dial(t)
	expect[*wire.AuthRequired](p)
	p.payload(bytes.Repeat([]byte{0xc1}, 64<<10)) // ignored
	p.raw(withLength64(64<<10 + 1))
	if code, _ := p.closed(); code != 1009 {
		t.Errorf("closed with %d, want 1009", code)
	}
	q := b.login(t, "alice")
	q.payload(bytes.Repeat([]byte{0xc1}, 65<<10))
	expect[*wire.ErrorMessage](q)
}

// movedClock is a clock that a test moves on. Its zero value shows the real time.
type movedClock struct{ ahead atomic.Int64 }

func (c *movedClock) now() time.Time { return time.Now().Add(time.Duration(c.ahead.Load())) }

// advance moves the clock when no session is in the middle of a write or a message:
// those would be found to take too long.
func (c *movedClock) advance(t *testing.T, b *bench, d time.Duration) {
	t.Helper()
	eventually(t, func() bool {
		for _, s := range b.service.sockets.snapshot() {
			s.mu.Lock()
			writing := s.out.writing
			s.mu.Unlock()
			if writing || s.reader.by.Load() != 0 {
				return false
			}
		}
		return true
	})
	c.ahead.Add(int64(d))
}

// SEC-04.
func TestTokenExpires(t *testing.T) {
	var clock movedClock
	b := setup(t, withAuth(func(c *Config) { c.IdleTimeout = 24 * time.Hour }), func(b *bench) { b.service.sockets.now = clock.now })
	p := b.login(t, "alice")
	p.ping()
	clock.advance(t, b, time.Hour+2*time.Minute)
	if code, _ := p.closed(); code != 4401 {
		t.Errorf("closed with %d, want 4401", code)
	}
}

func TestIdle(t *testing.T) {
	var clock movedClock
	b := setup(t, func(c *Config) { c.IdleTimeout = time.Hour }, func(b *bench) { b.service.sockets.now = clock.now })
	silent, alive := b.hello(t), b.hello(t)
	clock.advance(t, b, 40*time.Minute)
	alive.pong() // any frame counts as life
	clock.advance(t, b, 40*time.Minute)
	if code, _ := silent.closed(); code != 1008 {
		t.Errorf("closed with %d, want 1008", code)
	}
	alive.ping()
}
