package persistence_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	connect "connectrpc.com/connect/v2"

	logv1 "github.com/topgun-sync/topgun/gen/go/topgun/log/v1"
	persistencev1 "github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1/persistencev1connect"
	"github.com/topgun-sync/topgun/services/persistence"
	"github.com/topgun-sync/topgun/services/persistence/memstore"
)

// followMarks follows until the test ends.
func followMarks(t *testing.T, client persistencev1connect.PersistenceServiceClient) persistencev1connect.PersistenceServiceFollowWatermarksClientStream {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := client.FollowWatermarks(ctx, &persistencev1.FollowWatermarksRequest{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = stream.Close() // it was ended
	})
	return stream
}

// wantMarks receives once and wants the lanes named.
func wantMarks(t *testing.T, stream persistencev1connect.PersistenceServiceFollowWatermarksClientStream, want map[string]uint64) {
	t.Helper()
	response, err := stream.Receive()
	if err != nil {
		t.Fatalf("receive: %v", err)
	}
	got := make(map[string]uint64)
	for _, mark := range response.GetWatermarks() {
		got[mark.GetHistory()+"/"+mark.GetLane()] = mark.GetSequence()
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("received %v, want %v", got, want)
	}
}

func TestFollowWatermarks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, store := newFakeLog(), newFakeStore()
		store.down = persistence.ErrUnavailable
		log.append("a", change("x", "1", 1))
		service, stop := start(t, config(), persistence.Deps{Store: store, Log: log})
		client := dial(service)
		early := followMarks(t, client)
		time.Sleep(time.Second)
		store.set(func() {
			store.down = nil
			// Or it may hear of both at once.
			store.before = func(persistence.Batch) error { time.Sleep(time.Second); return nil }
		})
		// It hears of the store once the store was read, and then of what moves.
		wantMarks(t, early, map[string]uint64{})
		wantMarks(t, early, map[string]uint64{"history/a": 1})
		store.set(func() { store.before = nil })
		log.append("b", change("y", "1", 2))
		wantMarks(t, early, map[string]uint64{"history/b": 2})
		// One that comes later hears of all first.
		late := followMarks(t, client)
		wantMarks(t, late, map[string]uint64{"history/a": 1, "history/b": 2})
		// One that does not listen misses steps and not the latest, of every lane.
		for i := range uint64(20) {
			log.append("a", change("x", fmt.Sprint(i), i+3))
			time.Sleep(time.Second)
		}
		log.append("b", change("y", "2", 30))
		time.Sleep(time.Second)
		told := map[string]uint64{}
		steps := 0
		for ; told["a"] < 22 || told["b"] < 23; steps++ {
			response, err := late.Receive()
			if err != nil {
				t.Fatalf("receive: %v", err)
			}
			for _, mark := range response.GetWatermarks() {
				told[mark.GetLane()] = mark.GetSequence()
			}
		}
		if steps > 5 {
			t.Errorf("a follower that did not listen was told %d times", steps)
		}
		stop()
		for {
			if _, err := late.Receive(); err != nil {
				if connect.CodeOf(err) != connect.CodeUnavailable {
					t.Errorf("when the service stops, following ends with %v", err)
				}
				break
			}
		}
	})
}

// TestFollowersHearAtOnce wants a commit on an idle system to be stored and told with
// no more delay than the store takes.
func TestFollowersHearAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, store := newFakeLog(), newFakeStore()
		const takes = 2 * time.Millisecond
		store.before = func(persistence.Batch) error { time.Sleep(takes); return nil }
		service, _ := start(t, config(), persistence.Deps{Store: store, Log: log})
		stream := followMarks(t, dial(service))
		wantMarks(t, stream, map[string]uint64{})
		for i := range uint64(20) {
			time.Sleep(20 * time.Millisecond)
			begin := time.Now()
			log.append("a", change("x", "1", i+1))
			wantMarks(t, stream, map[string]uint64{"history/a": i + 1})
			if took := time.Since(begin); took > takes {
				t.Errorf("commit %d was told of after %v", i+1, took)
			}
		}
	})
}

// TestFollowersHearOfTheWayBack restores a backup that knows less.
func TestFollowersHearOfTheWayBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, store := newFakeLog(), newFakeStore()
		service, _ := start(t, config(), persistence.Deps{Store: store, Log: log})
		stream := followMarks(t, dial(service))
		wantMarks(t, stream, map[string]uint64{})
		log.append("a", change("x", "1", 1))
		wantMarks(t, stream, map[string]uint64{"history/a": 1})
		log.append("b", change("x", "2", 2))
		wantMarks(t, stream, map[string]uint64{"history/b": 2})
		backup := memstore.New()
		if _, err := backup.Commit(t.Context(), store.stored()[0]); err != nil {
			t.Fatal(err)
		}
		store.set(func() {
			store.Store = backup
			store.before = func(persistence.Batch) error { time.Sleep(time.Second); return nil }
		})
		wantMarks(t, stream, map[string]uint64{"history/b": 0})
		wantMarks(t, stream, map[string]uint64{"history/b": 2})
	})
}

func TestFollowersOfAHaltedDrainEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, store := newFakeLog(), newFakeStore()
		service, _ := start(t, config(), persistence.Deps{Store: store, Log: log})
		client := dial(service)
		stream := followMarks(t, client)
		wantMarks(t, stream, map[string]uint64{})
		log.append("a", change("x", "1", 1))
		log.put(&logv1.Commit{Version: 9, Lane: "a"}, nil)
		wantMarks(t, stream, map[string]uint64{"history/a": 1})
		if _, err := stream.Receive(); connect.CodeOf(err) != connect.CodeFailedPrecondition {
			t.Errorf("following a halted drain ends with %v", err)
		}
		// One that comes later still hears how far it went.
		stream = followMarks(t, client)
		wantMarks(t, stream, map[string]uint64{"history/a": 1})
		if _, err := stream.Receive(); connect.CodeOf(err) != connect.CodeFailedPrecondition {
			t.Errorf("following a halted drain ends with %v", err)
		}
	})
}

var errDown = errors.New("no responders")
