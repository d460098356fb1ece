package e2e

import (
	"fmt"
	"testing"

	"github.com/topgun-sync/topgun/client"
	"github.com/topgun-sync/topgun/core/hlc"
)

// TestStories runs the stories that leave the cluster as they find it, apart from
// maps of their own, against one cluster per topology.
func TestStories(t *testing.T) {
	stories(t, options{retention: recordedRetention}, func(t *testing.T, c Cluster) {
		for _, s := range []struct {
			name  string
			story func(t *testing.T, c Cluster)
		}{
			{"two clients one map", twoClientsOneMap},
			{"reconnect with equal data", reconnectWithEqualData},
			{"three of a thousand differ", threeOfAThousandDiffer},
			{"http only", httpOnly},
			{"late arrival over http", lateArrivalOverHTTP},
			{"alternating transports", alternatingTransports},
			{"json body", jsonBody},
			{"same op three times", sameOpThreeTimes},
			{"one broken op in a batch", oneBrokenOpInABatch},
			{"expiry becomes a tombstone", expiryBecomesATombstone},
			{"a stamp an hour ahead", aStampAnHourAhead},
			{"odd keys and values", oddKeysAndValues},
			{"large values", largeValues},
			{"many maps", manyMaps},
			{"OR-maps", orMaps},
			{"live queries", liveQueries},
			{"pages of a query", pagesOfAQuery},
			{"groups of a query", groupsOfAQuery},
			{"bad queries", badQueries},
			{"topics", topics},
			{"counters", counters},
			{"locks", locks},
			{"journal", journal},
			{"partition map", partitionMap},
			{"persisted means in the database", persistedMeansInTheDatabase},
			{"hostile input", hostileInput},
			{"recorded session", func(t *testing.T, c Cluster) { replay(t, c, "session-minimal.json", "") }},
		} {
			t.Run(s.name, func(t *testing.T) {
				t.Parallel()
				s.story(t, c)
			})
		}
	})
}

// Two clients work on one map, online, and offline on the same keys; afterwards
// everybody holds the same, and of each key the later write.
func twoClientsOneMap(t *testing.T, c Cluster) {
	const name = "two_clients"
	var tr traffic
	a := open(t, webSocket(gateway(c, 0)), name+"-a")
	b := open(t, webSocket(gateway(c, 1)), name+"-b", recording(&tr))
	am, bm := a.Map(name), b.Map(name)
	must(t, am.WaitSynced(within(t, deadline)))
	must(t, bm.WaitSynced(within(t, deadline)))

	watch := bm.Watch(within(t, deadline))
	for i := range 20 {
		must(t, am.Set(fmt.Sprint(i), map[string]any{"n": i}))
	}
	must(t, am.Delete("3"))
	seen := map[string]bool{}
	for ch := range watch {
		seen[ch.Key] = true
		if r, _ := bm.Record("3"); len(seen) == 20 && r.Timestamp != (hlc.Timestamp{}) && r.Deleted() {
			break
		}
	}
	if len(seen) != 20 || tr.requests(name) != 0 {
		t.Errorf("%d of 20 writes arrived in real time, %d bucket requests", len(seen), tr.requests(name))
	}

	a.Offline()
	b.Offline()
	for i := range 30 { // keys 10 to 29 are written by both, a few deleted by one
		must(t, am.Set(fmt.Sprint(i), "a"))
	}
	for i := 10; i < 40; i++ {
		must(t, bm.Set(fmt.Sprint(i), "b"))
	}
	must(t, bm.Delete("12"))
	for i := 20; i < 25; i++ {
		must(t, am.Set(fmt.Sprint(i), "a again"))
	}
	want := map[string]hlc.Timestamp{}
	for _, m := range []*client.Map{am, bm} {
		for key, r := range m.Records() {
			if want[key].Compare(r.Timestamp) < 0 {
				want[key] = r.Timestamp
			}
		}
	}
	a.Online()
	b.Online()
	flush(t, a)
	flush(t, b)
	eventually(t, deadline, func() error {
		if am.Digest() != bm.Digest() {
			return fmt.Errorf("the clients' contents differ: %d and %d records", am.Len(), bm.Len())
		}
		return nil
	})
	for key, ts := range want {
		if r, _ := am.Record(key); r.Timestamp != ts {
			t.Errorf("key %s holds the write %v; the later one is %v", key, r.Timestamp, ts)
		}
	}
	if am.Len() != 39 {
		t.Errorf("%d values; want 39", am.Len())
	}

	var fresh traffic
	third := open(t, webSocket(gateway(c, 0)), name+"-c", recording(&fresh))
	cm := third.Map(name)
	must(t, cm.WaitSynced(within(t, deadline)))
	if am.Root() != bm.Root() || am.Root() != cm.Root() || am.Digest() != cm.Digest() {
		t.Error("a client that came later holds other content")
	}
	roots := fresh.roots(name)
	if len(roots) == 0 || roots[len(roots)-1] != am.Root() {
		t.Errorf("the server's roots are %v, the clients' %d", roots, am.Root())
	}
	sameRows(t, c, name, am.Digest())
}
