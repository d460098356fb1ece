package gateway

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/topgun-sync/topgun/core/msgval"
	"github.com/topgun-sync/topgun/core/wire"
)

// rowsOf is what a client shows of its queries, by queryId and key.
type rowsOf struct {
	mu   sync.Mutex
	rows map[string]map[string]string
}

// take applies a message as the original client does (PROTOCOL 12.2, 12.3).
func (r *rowsOf) take(m wire.Message) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch m := m.(type) {
	case *wire.QueryResp:
		if _, known := r.rows[m.QueryID]; !known {
			return
		}
		rows := make(map[string]string, len(m.Results))
		for _, row := range m.Results {
			rows[row.Key] = string(row.Value)
		}
		r.rows[m.QueryID] = rows
	case *wire.QueryUpdate:
		rows := r.rows[m.QueryID]
		switch {
		case rows == nil:
		case m.ChangeType == "LEAVE":
			delete(rows, m.Key)
		default:
			rows[m.Key] = string(m.Value)
		}
	}
}

// Whatever sessions subscribe to, give up and replace while the map changes and streams
// are lost, in the end every query shows what the map holds.
func TestQueriesConverge(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	b := setup(t, func(c *Config) { c.QueueMessages = 8 }, nil)
	texts := []string{`{}`, `{"where":{"g":0}}`, `{"where":{"g":1}}`, `{"sort":[{"field":"n","direction":"desc"}]}`}
	passes := []func(g uint64) bool{
		func(uint64) bool { return true }, func(g uint64) bool { return g == 0 },
		func(g uint64) bool { return g == 1 }, func(uint64) bool { return true },
	}
	type client struct {
		*wsClient
		shown   rowsOf
		queries map[string]int // queryId → index of its text
	}
	var clients []*client
	var wg sync.WaitGroup
	for range 5 {
		c := &client{wsClient: b.hello(t), shown: rowsOf{rows: map[string]map[string]string{}}, queries: map[string]int{}}
		clients = append(clients, c)
		wg.Go(func() {
			for {
				m := c.tryRecv()
				if m == nil {
					return
				}
				c.shown.take(m)
			}
		})
	}
	truth := map[string][]byte{}
	group := map[string]uint64{}
	put := func(key string, g, n uint64) {
		v := msgval.AppendUint(msgval.AppendString(msgval.AppendMapHeader(nil, 2), "g"), g)
		v = msgval.AppendUint(msgval.AppendString(v, "n"), n)
		truth[key], group[key] = v, g
		b.partition.put("m", key, v, stamp(n))
	}
	for step := range uint64(600) {
		c := clients[random.IntN(len(clients))]
		id := fmt.Sprint("q", random.IntN(4))
		switch key := fmt.Sprint("k", random.IntN(20)); random.IntN(12) {
		case 0, 1, 2:
			which := random.IntN(len(texts))
			c.queries[id] = which
			c.shown.mu.Lock()
			c.shown.rows[id] = map[string]string{}
			c.shown.mu.Unlock()
			c.send(&wire.QuerySub{QueryID: id, MapName: "m", Query: q(t, texts[which])})
		case 3:
			delete(c.queries, id)
			c.shown.mu.Lock()
			delete(c.shown.rows, id)
			c.shown.mu.Unlock()
			c.send(&wire.QueryUnsub{QueryID: id})
		case 4:
			delete(truth, key)
			b.partition.put("m", key, nil, stamp(step+1))
		case 5:
			if random.IntN(10) == 0 {
				b.fanout.cut()
			}
		case 6:
			b.fanout.again()
		default:
			put(key, uint64(random.IntN(2)), step+1)
		}
	}
	for _, c := range clients {
		eventually(t, func() bool {
			c.shown.mu.Lock()
			defer c.shown.mu.Unlock()
			for id, which := range c.queries {
				want := map[string]string{}
				for key, v := range truth {
					if passes[which](group[key]) {
						want[key] = string(v)
					}
				}
				if !maps.Equal(c.shown.rows[id], want) {
					return false
				}
			}
			return true
		})
	}
	b.stop()
	wg.Wait()
}
