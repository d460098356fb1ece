package e2e

import (
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/topgun-sync/topgun/client"
	"github.com/topgun-sync/topgun/core/wire"
)

// long makes the fault stories as long as they are meant to be for a release.
var long = os.Getenv("TOPGUN_TEST_LONG") != ""

// writer writes records as fast as they are acknowledged, and knows which were. The
// n-th write is the op with the id n.
type writer struct {
	node   string
	client *client.Client
	m      *client.Map
	done   chan struct{}
	wg     sync.WaitGroup

	mu    sync.Mutex
	limit int           // it writes no more than so many
	acked int           // writes up to this one are acknowledged
	more  chan struct{} // closed and replaced when acked or limit has grown
}

// startWriter opens a client that keeps a few operations in flight until stop.
func startWriter(t testing.TB, url, node, mapName string) *writer {
	t.Helper()
	w := &writer{node: node, done: make(chan struct{}), more: make(chan struct{}), limit: math.MaxInt}
	w.client = open(t, url, node, func(c *client.Config) { c.OnFrame = w.frame })
	w.m = w.client.Map(mapName)
	w.wg.Go(func() {
		for n := 1; ; n++ {
			for {
				w.mu.Lock()
				more, limit := w.more, w.limit
				w.mu.Unlock()
				if n <= limit && w.client.Pending() < 8 {
					break
				}
				select {
				case <-w.done:
					return
				case <-more:
				case <-time.After(10 * time.Millisecond): // an ack may have come before the look
				}
			}
			select {
			case <-w.done:
				return
			default:
			}
			if err := w.write(n); err != nil {
				t.Error(err)
				return
			}
		}
	})
	t.Cleanup(w.stop)
	return w
}

// write makes the n-th write: mostly a key of its own, sometimes a key that all
// writers write, sometimes the deletion of the key before the one before.
func (w *writer) write(n int) error {
	switch n % 10 {
	case 0:
		return w.m.Set(fmt.Sprintf("shared-%d", n%30), fmt.Sprint(w.node, n))
	case 5:
		return w.m.Delete(w.key(n - 2))
	}
	return w.m.Set(w.key(n), n)
}

func (w *writer) key(n int) string { return fmt.Sprintf("%s-%d", w.node, n) }

// lost returns the first write up to n that a replica has not got, or 0.
func (w *writer) lost(m *client.Map, n int) int {
	for k := 1; k <= n; k++ {
		switch k % 10 {
		case 0: // another writer may have written later; the digests tell in the end
		case 5:
			if r, ok := m.Record(w.key(k - 2)); !ok || !r.Deleted() {
				return k
			}
		default:
			if _, ok := m.Record(w.key(k)); !ok {
				return k
			}
		}
	}
	return 0
}

func (w *writer) stop() {
	w.mu.Lock()
	select {
	case <-w.done:
	default:
		close(w.done)
	}
	w.mu.Unlock()
	w.wg.Wait()
}

// frame looks for acks. The ids in an OP_ACK are those of the connection, and on
// every connection the client sends all that is pending, in order: so a numeric
// lastId acknowledges every write up to it.
func (w *writer) frame(f client.Frame) {
	if f.Sent {
		return
	}
	lastID := ""
	if msg, err := wire.DecodeServer(f.Data); err == nil {
		for _, inner := range unpack(msg, len(f.Data)) {
			if ack, ok := inner.Message.(*wire.OpAck); ok {
				lastID = ack.LastID
			}
		}
	} else if resp, err := wire.DecodeSyncResponse(f.Data); err == nil && resp.Ack != nil {
		lastID = resp.Ack.LastID
	}
	var n int
	if _, err := fmt.Sscan(lastID, &n); err == nil {
		w.mu.Lock()
		w.acked = max(w.acked, n)
		w.notify()
		w.mu.Unlock()
	}
}

func (w *writer) notify() {
	close(w.more)
	w.more = make(chan struct{})
}

// allow lets the writer write n records beyond those that are acknowledged.
func (w *writer) allow(n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.limit = w.acked + n
	w.notify()
}

// waitAcked waits until at least n writes are acknowledged and returns how many are.
func (w *writer) waitAcked(t testing.TB, n int) int {
	t.Helper()
	timeout := time.After(2 * startDeadline)
	for {
		w.mu.Lock()
		acked, more := w.acked, w.more
		w.mu.Unlock()
		if acked >= n {
			return acked
		}
		select {
		case <-more:
		case <-timeout:
			_, err := w.client.State()
			t.Fatalf("%d writes acknowledged, waiting for %d; last connection: %v", acked, n, err)
		}
	}
}

func (w *writer) ackedNow() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.acked
}

// Every acknowledged write is there after a process was killed in the moment of an
// ack, whichever it was, sometimes two at once, again and again (ACK-01, ACK-02, OWN-06, PG-05).
func TestAckThenKill(t *testing.T) {
	stories(t, options{}, func(t *testing.T, c Cluster) {
		const name = "crash"
		kills := 50
		if long {
			kills = 200
		}
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		random := rand.New(rand.NewPCG(seed, 0))
		var writers []*writer
		for i := range len(c.URLs()) {
			writers = append(writers, startWriter(t, webSocket(gateway(c, i)), fmt.Sprintf("%s-ws-%d", name, i), name))
		}
		writers = append(writers, startWriter(t, gateway(c, 0), name+"-http", name))
		for kill := range kills {
			victims := c.Roles()
			if c.Database() != nil {
				victims = append(victims, "postgres")
			}
			random.Shuffle(len(victims), func(i, j int) { victims[i], victims[j] = victims[j], victims[i] })
			victims = victims[:min(len(victims), 1+kill%3/2)] // every third time two at once
			leader := writers[random.IntN(len(writers))]
			for _, w := range writers { // enough for the whole round, not for the whole disk
				w.allow(60)
			}
			leader.waitAcked(t, leader.ackedNow()+1+random.IntN(40))
			// What is acknowledged up to here must survive; what is acknowledged
			// until the process is gone may be counted as well, or not.
			acked := make([]int, len(writers))
			for i, w := range writers {
				acked[i] = w.ackedNow()
			}
			began := time.Now()
			for _, role := range victims {
				if role == "postgres" {
					c.Database().server.Stop(t)
				} else {
					c.Kill(role)
				}
			}
			if slices.Contains(victims, "postgres") {
				c.Database().server.Start(t)
			}
			c.Restart(t, slices.DeleteFunc(slices.Clone(victims), func(role string) bool { return role == "postgres" })...)
			restarted := time.Since(began)

			fresh := open(t, webSocket(gateway(c, kill)), fmt.Sprintf("%s-fresh-%d", name, kill))
			fm := fresh.Map(name)
			if err := fm.WaitSynced(within(t, 2*startDeadline)); err != nil {
				_, last := fresh.State()
				t.Fatalf("kill %d of %v: a fresh client cannot sync: %v; %v", kill, victims, err, last)
			}
			for i, w := range writers {
				if k := w.lost(fm, acked[i]); k > 0 {
					t.Fatalf("kill %d of %v: acknowledged write %d of %s is lost (acknowledged: %d)", kill, victims, k, w.node, acked[i])
				}
			}
			fresh.Close()
			t.Logf("kill %d: %v, %v until it listened, %v until a fresh client had all %d records",
				kill, victims, restarted.Round(time.Millisecond), time.Since(began).Round(time.Millisecond), fm.Len())
		}
		for _, w := range writers {
			w.stop()
			flush(t, w.client)
		}
		fresh := open(t, webSocket(gateway(c, 0)), name+"-last")
		must(t, fresh.Map(name).WaitSynced(within(t, deadline)))
		for _, w := range writers {
			eventually(t, deadline, func() error {
				if w.m.Digest() != fresh.Map(name).Digest() {
					return fmt.Errorf("a writer holds %d values, a fresh client %d", w.m.Len(), fresh.Map(name).Len())
				}
				return nil
			})
		}
		t.Logf("%d kills, %d records", kills, fresh.Map(name).Len())
		sameRows(t, c, name, fresh.Map(name).Digest())
	})
}

// While Postgres is away writes go on; afterwards it holds what memory holds (PG-04).
func TestPostgresAway(t *testing.T) {
	stories(t, options{postgres: true}, func(t *testing.T, c Cluster) {
		const name = "postgres_away"
		const away = 30 * time.Second
		w := startWriter(t, webSocket(gateway(c, 0)), name, name)
		w.waitAcked(t, 100)
		c.Database().server.Stop(t)
		before := w.ackedNow()
		for end := time.Now().Add(away); time.Now().Before(end) || w.ackedNow() < before+100; {
			w.waitAcked(t, w.ackedNow()+1)
		}
		c.Database().server.Start(t)
		w.waitAcked(t, w.ackedNow()+50)
		w.stop()
		flush(t, w.client)
		fresh := open(t, webSocket(gateway(c, 1)), name+"-fresh")
		must(t, fresh.Map(name).WaitSynced(within(t, deadline)))
		if fresh.Map(name).Digest() != w.m.Digest() {
			t.Error("a fresh client holds other content than the writer")
		}
		t.Logf("%d writes, %d of them while Postgres was away", w.ackedNow(), w.ackedNow()-before)
		sameRows(t, c, name, fresh.Map(name).Digest())
	})
}
