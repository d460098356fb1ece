package e2e

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/tinylib/msgp/msgp"

	"github.com/topgun-sync/topgun/core/wire"
)

// recorded is a file of testdata: what the original TypeScript client and a server
// said to each other. PROTOCOL 23 explains the exchange.
type recorded struct {
	Frames []struct {
		Client string         `json:"client"`
		Dir    string         `json:"dir"`
		JSON   map[string]any `json:"json"`
		Hex    string         `json:"hex"`
	} `json:"frames"`
}

// recordedRetention suits the recorded sessions, which are old and so are their stamps.
const recordedRetention = 100 * 365 * 24 * time.Hour

// replay sends what the recorded clients sent, byte for byte, and expects what the
// recorded server answered, per client and in order, apart from clocks and ids.
// Beyond that the server may push leaves and stamp envelopes, and nothing else. A
// token, if given, takes the place of the recorded one.
func replay(t *testing.T, c Cluster, file, token string) {
	text, err := os.ReadFile(filepath.Join("testdata", file))
	must(t, err)
	var session recorded
	must(t, json.Unmarshal(text, &session))

	clients := map[string]*conn{}
	for i, f := range session.Frames {
		client := clients[f.Client]
		if client == nil {
			// All at one gateway: what one of them has seen the gateway has passed on,
			// so that a client that comes later is not told again.
			client = dial(t, c, 0)
			clients[f.Client] = client
		}
		where := fmt.Sprintf("frame %d, %s %s %v", i, f.Client, f.Dir, f.JSON["type"])
		if f.Dir == "client->server" {
			frame, err := hex.DecodeString(f.Hex)
			must(t, err)
			if f.JSON["type"] == "AUTH" {
				frame = (&wire.Auth{Token: token}).AppendTo(nil)
			}
			client.sendBytes(frame)
			continue
		}
		want := normalise(f.JSON)
		for {
			got := client.nextJSON()
			if reflect.DeepEqual(got, want) {
				break
			}
			if got["type"] != "SYNC_RESP_LEAF" {
				t.Fatalf("%s:\n got %v\nwant %v", where, got, want)
			}
		}
	}
	for name, client := range clients {
		client.send(wire.PingAt(now()))
		for {
			got := client.nextJSON()
			if got["type"] == "PONG" {
				break
			}
			if got["type"] != "SYNC_RESP_LEAF" {
				t.Errorf("%s got more than was recorded: %v", name, got)
			}
		}
	}
}

// nextJSON returns the next message as its JSON would be.
func (c *conn) nextJSON() map[string]any {
	c.t.Helper()
	if len(c.packed) == 0 {
		kind, data, err := c.ws.Read(within(c.t, deadline))
		if err != nil {
			c.t.Fatal(err)
		}
		if kind != websocket.MessageBinary {
			c.t.Fatal("a text frame")
		}
		c.packed = [][]byte{data}
	}
	data := c.packed[0]
	c.packed = c.packed[1:]
	v, rest, err := msgp.ReadIntfBytes(data)
	if err != nil || len(rest) != 0 {
		c.t.Fatalf("frame is not one msgpack value: %v", err)
	}
	if batch, ok := v.(map[string]any); ok && batch["type"] == "BATCH" {
		// Counts and lengths are 32 bits, the least byte first (PROTOCOL 2.4).
		inner := batch["data"].([]byte)[4:]
		for len(inner) > 0 {
			size := binary.LittleEndian.Uint32(inner)
			c.packed = append(c.packed, inner[4:4+size])
			inner = inner[4+size:]
		}
		return c.nextJSON()
	}
	text, err := json.Marshal(v) // as float64, like the recording
	must(c.t, err)
	var frame map[string]any
	must(c.t, json.Unmarshal(text, &frame))
	return normalise(frame)
}

// normalise masks what differs from run to run: the server's own clock, and the
// identities that it gives out.
func normalise(frame map[string]any) map[string]any {
	if _, ok := frame["timestamp"].(map[string]any); ok {
		delete(frame, "timestamp")
	}
	for _, id := range []string{"deviceId", "deviceToken", "userId"} {
		delete(frame, id) // optional
	}
	if payload, ok := frame["payload"].(map[string]any); ok && frame["type"] == "SYNC_RESP_ROOT" {
		for field := range payload["timestamp"].(map[string]any) {
			payload["timestamp"].(map[string]any)[field] = "masked"
		}
	}
	return frame
}
