package fanout_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	"github.com/topgun-sync/topgun/services/fanout"
)

// The promise, against everything at once: each event published while its map is
// watched is delivered, or a Gap of the map comes after it was published, within
// 5 s of the last fault.
func TestPromiseUnderFaults(t *testing.T) {
	for seed := range uint64(200) {
		synctest.Test(t, func(t *testing.T) { promise(t, seed) })
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

func promise(t *testing.T, seed uint64) {
	const mapCount, shardCount = 3, 2
	random := rand.New(rand.NewPCG(seed, 7))
	config := fanout.DefaultConfig()
	config.QueueEvents = mapCount + random.IntN(8) // so that the Gaps fit
	config.MaxPositions = 1 + random.IntN(8)
	r := open(t, config, fanout.Deps{})
	loss := random.Float64() * 0.5
	lossy := true
	r.bus.DropIf(func(proto.Message) bool { return lossy && random.Float64() < loss })

	lanes := [shardCount]int{}
	sequences := [shardCount]map[string]uint64{{}, {}}
	type obligation struct {
		event string // as text, with its lane
		at    int    // messages received when it was published
	}
	g := r.subscribe("g")
	var mu sync.Mutex
	var journal []string
	received := func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(journal)
	}
	reading := make(chan struct{}, 1)
	go func() { // reads when told to, one message at a time or on and on
		for range reading {
			message, err := g.stream.Receive()
			if err != nil {
				return
			}
			s := text(message)
			if e := message.GetEvent(); e != nil {
				s += "/" + e.GetLane()
			}
			mu.Lock()
			journal = append(journal, s)
			mu.Unlock()
		}
	}()
	defer close(reading)
	watched := map[string]bool{}
	owed := map[string][]obligation{}
	lane := func(shard int) string { return fmt.Sprintf("lane-%d-%d", shard, lanes[shard]) }
	publish := func(name string, shard int) {
		sequences[shard][name]++
		e := &fanoutv1.Event{Map: name, Shard: uint32(shard), Lane: lane(shard), Sequence: sequences[shard][name]}
		if watched[name] {
			owed[name] = append(owed[name], obligation{fmt.Sprintf("%s/%d/%d/%s", name, shard, e.GetSequence(), e.GetLane()), len(received())})
		}
		if err := r.bus.PublishEvent(context.Background(), e); err != nil {
			t.Fatal(err)
		}
	}
	beat := func() {
		for shard := range shardCount {
			r.heartbeat(uint32(shard), lane(shard), sequences[shard])
		}
	}
	drain := func() {
		for {
			before := len(received())
			select {
			case reading <- struct{}{}:
			default:
			}
			synctest.Wait()
			if len(received()) == before {
				return
			}
		}
	}
	beat()
	lossy = false
	beat() // the service has heard of every shard
	lossy = true
	for range 300 {
		name := fmt.Sprint("m", random.IntN(mapCount))
		switch n := random.IntN(100); {
		case n < 50:
			publish(name, random.IntN(shardCount))
		case n < 60:
			if !watched[name] {
				g.watch(name)
				watched[name] = true
			}
		case n < 63:
			g.unwatch(name)
			delete(watched, name)
			delete(owed, name)
		case n < 70:
			time.Sleep(time.Second)
			beat()
		case n < 71:
			shard := random.IntN(shardCount)
			lanes[shard]++
			sequences[shard] = map[string]uint64{}
		case n < 80:
			drain()
		case n < 90:
			synctest.Wait()
		default:
			select {
			case reading <- struct{}{}:
			default:
			}
		}
	}
	lossy = false
	for range 5 {
		time.Sleep(time.Second)
		beat()
	}
	drain()
	got := received()
	for name, obligations := range owed {
		for _, o := range obligations {
			if !slices.Contains(got, o.event) && !slices.Contains(got[o.at:], "gap "+name) {
				t.Errorf("%s was neither delivered nor covered by a gap", o.event)
			}
		}
	}
}
