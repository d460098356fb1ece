package e2e

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/topgun-sync/topgun/client"
	"github.com/topgun-sync/topgun/core/wire"
)

// A stopped cluster finishes what it took, tells its clients to come back, and has
// everything when it starts again (UPG-01).
func TestGracefulStop(t *testing.T) {
	stories(t, options{}, func(t *testing.T, c Cluster) {
		const name = "graceful"
		a := open(t, webSocket(gateway(c, 0)), name+"-a")
		m := a.Map(name)
		must(t, m.WaitSynced(within(t, deadline)))
		bystander := dial(t, c, 1).hello()
		for i := range 500 {
			must(t, m.Set(fmt.Sprint(i), i))
		}
		flush(t, a)
		codes := make(chan websocket.StatusCode, 1)
		go func() { codes <- bystander.expectClose() }()
		if took := c.Stop(t); took > 5*time.Second {
			t.Errorf("the slowest process took %v to end; want at most 5 s", took)
		}
		if code := <-codes; code != websocket.StatusServiceRestart {
			t.Errorf("the session was closed with %d; want 1012", code)
		}
		must(t, m.Set("while it was away", 1))
		must(t, m.Delete("7"))
		c.Start(t)
		flush(t, a)
		fresh := open(t, webSocket(gateway(c, 1)), name+"-fresh")
		must(t, fresh.Map(name).WaitSynced(within(t, deadline)))
		if fresh.Map(name).Digest() != m.Digest() {
			t.Errorf("after the restart: %d values; want %d", fresh.Map(name).Len(), m.Len())
		}
		sameRows(t, c, name, m.Digest())
	})
}

const secret = "a secret that is long enough for HS256, surely"

// token makes a JWT for a user that expires at a time.
func token(user string, expires time.Time) string {
	part := func(v any) string {
		text, err := json.Marshal(v)
		if err != nil {
			panic(err)
		}
		return base64.RawURLEncoding.EncodeToString(text)
	}
	signed := part(map[string]any{"alg": "HS256", "typ": "JWT"}) + "." +
		part(map[string]any{"sub": user, "exp": expires.Unix()})
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write([]byte(signed))
	return signed + "." + base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

// leeway is how long after its exp a token is still good (PROTOCOL 3.4).
const leeway = 60 * time.Second

// A cluster that demands tokens lets nobody else do anything, ends sessions whose
// token has expired, and serves recorded sessions of the original client.
func TestTokenRequired(t *testing.T) {
	stories(t, options{jwtSecret: secret, retention: recordedRetention}, func(t *testing.T, c Cluster) {
		good := token("user-1", time.Now().Add(time.Hour))

		t.Run("recorded session", func(t *testing.T) {
			t.Parallel()
			replay(t, c, "session-minimal-jwt.json", good)
		})

		t.Run("op before AUTH", func(t *testing.T) {
			t.Parallel()
			const name = "before_auth"
			early := dial(t, c, 0)
			if _, ok := early.next().(*wire.AuthRequired); !ok {
				t.Fatal("want AUTH_REQUIRED at connect")
			}
			early.send(&wire.OpBatch{Ops: []wire.Op{put("1", name, "k", 1, stamp(now(), 0, "early"))}})
			for _, m := range []wire.Message{
				&wire.SyncInit{MapName: name}, &wire.MerkleReqBucket{MapName: name},
				&wire.ORMapSyncInit{MapName: name}, &wire.ORMapMerkleReqBucket{MapName: name}, &wire.ORMapDiffRequest{MapName: name, Keys: []string{"k"}},
				&wire.ORMapPushDiff{MapName: name, Entries: []wire.OREntry{{Key: "k", Records: []wire.ORRecord{{
					Tag: "t", Record: put("", name, "k", 1, stamp(now(), 0, "early")).Record,
				}}}}},
				&wire.QuerySub{QueryID: "q", MapName: name}, &wire.TopicSub{Topic: name}, &wire.TopicPub{Topic: name, Data: encode(1)},
				&wire.CounterRequest{Name: name}, &wire.CounterSync{Name: name, State: countOf("early", 1, 0)},
				&wire.LockRequest{RequestID: "l", Name: name, TTLMillis: 60_000}, &wire.LockRelease{RequestID: "l", Name: name, FencingToken: 1},
				&wire.JournalRead{RequestID: "j", Limit: 1}, &wire.JournalSubscribe{RequestID: "s"}, &wire.PartitionMapRequest{},
			} {
				early.send(m)
			}
			early.send(&wire.Auth{Token: good})
			if ack, ok := early.next().(*wire.AuthAck); !ok || ack.UserID != "user-1" {
				t.Errorf("got %+v; want AUTH_ACK for user-1 and nothing before", ack)
			}
			early.send(&wire.SyncInit{MapName: name})
			if root := expect[*wire.SyncRespRoot](early); root.RootHash != 0 {
				t.Error("the op before AUTH had an effect")
			}
			early.send(&wire.ORMapSyncInit{MapName: name})
			if root := expect[*wire.ORMapSyncRespRoot](early); root.RootHash != 0 {
				t.Error("the diff pushed before AUTH had an effect")
			}
			early.send(&wire.CounterRequest{Name: name})
			if counter := expect[*wire.CounterResponse](early); len(counter.State.Nodes) != 0 {
				t.Error("the counter counted before AUTH")
			}
			other := dial(t, c, 1)
			other.send(&wire.Auth{Token: good})
			expect[*wire.AuthAck](other)
			other.acquire(name, "free", time.Minute) // nobody has it
			early.send(&wire.Auth{Token: token("somebody else", time.Now().Add(time.Hour))})
			if msg, ok := early.next().(*wire.ErrorMessage); !ok || msg.Code != 403 {
				t.Errorf("a second AUTH as somebody else is answered %+v", msg)
			}
		})

		t.Run("wrong tokens", func(t *testing.T) {
			t.Parallel()
			for what, bad := range map[string]string{
				"not a token":  "abc",
				"expired":      token("user-1", time.Now().Add(-leeway-10*time.Second)),
				"other secret": good[:len(good)-4] + "AAAA",
				"alg none":     base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`)) + "." + base64.RawURLEncoding.EncodeToString([]byte(`{"sub":"user-1","exp":99999999999}`)) + ".",
			} {
				conn := dial(t, c, 1)
				conn.send(&wire.Auth{Token: bad})
				expect[*wire.AuthFail](conn)
				if code := conn.expectClose(); code != 4401 {
					t.Errorf("%s: closed with %d; want 4401", what, code)
				}
			}
			status, _ := post(t, gateway(c, 0)+"/sync", "application/x-msgpack", (&wire.SyncRequest{ClientID: "x"}).AppendTo(nil))
			if status != 401 {
				t.Errorf("POST /sync without a token: status %d; want 401", status)
			}
		})

		t.Run("expiry closes the session", func(t *testing.T) {
			t.Parallel()
			conn := dial(t, c, 0)
			conn.send(&wire.Auth{Token: token("user-1", time.Now().Add(6*time.Second-leeway))})
			expect[*wire.AuthAck](conn)
			if code := conn.expectClose(); code != 4401 {
				t.Errorf("closed with %d; want 4401", code)
			}
		})

		t.Run("the SDK fetches a fresh token", func(t *testing.T) {
			t.Parallel()
			const name = "fresh_token"
			var mu sync.Mutex
			asked := 0
			next := func(c *client.Config) {
				c.Token = client.StaticToken(good)
			}
			expiring := open(t, webSocket(gateway(c, 1)), name+"-a", next, func(c *client.Config) {
				c.Token = tokenSource(&mu, &asked, token("user-1", time.Now().Add(3*time.Second-leeway)), good)
			})
			other := open(t, gateway(c, 0), name+"-b", next)
			must(t, expiring.Map(name).Set("1", 1))
			flush(t, expiring)
			eventually(t, deadline, func() error {
				mu.Lock()
				defer mu.Unlock()
				if asked < 2 {
					return fmt.Errorf("asked for a token %d times", asked)
				}
				return nil
			})
			must(t, expiring.Map(name).Set("2", 2))
			flush(t, expiring)
			eventually(t, deadline, func() error {
				if n := other.Map(name).Len(); n != 2 {
					return fmt.Errorf("the other client has %d of 2 values", n)
				}
				return nil
			})
		})
	})
}

// tokenSource gives the first token once and the other afterwards.
func tokenSource(mu *sync.Mutex, asked *int, first, then string) func(context.Context) (string, error) {
	return func(context.Context) (string, error) {
		mu.Lock()
		defer mu.Unlock()
		if *asked++; *asked == 1 {
			return first, nil
		}
		return then, nil
	}
}
