package partition

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/topgun-sync/topgun/core/msgval"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	persistencev1 "github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
	"github.com/topgun-sync/topgun/services/internal/commitlog"
)

func (w *world) millis() uint64 { return uint64(w.wall.now().UnixMilli()) }

func TestLOG06_ARestartRestoresTheState(t *testing.T) {
	for name, restart := range map[string]func(*world, *node){
		"stop":           func(_ *world, n *node) { n.stop() },
		"kill":           func(_ *world, n *node) { n.kill(0) },
		"kill, stored":   func(w *world, n *node) { w.store.drain(t, w.log, 1000); n.kill(0) },
		"partly stored":  func(w *world, n *node) { w.store.drain(t, w.log, 3); n.kill(0) },
		"stored,trimmed": func(w *world, n *node) { w.store.drain(t, w.log, 1000); w.store.trim(t, w.log); n.stop() },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			n := w.start()
			now := w.millis()
			for i := range 40 {
				n.apply(put(fmt.Sprint("k", i%30), fmt.Sprint("v", i), now+uint64(i), "a"))
			}
			n.apply(put("k1", "", now+100, "a"), put("k2", "later", now+3_600_000, "a"))
			before := n.digest()
			restart(w, n)
			for range 2 { // a second replay changes nothing
				n = w.start()
				if n.digest() != before {
					t.Fatal("the state after the restart differs")
				}
				n.kill(0)
			}
		})
	}
}

func TestARestartKeepsArrivalsRising(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	n.apply(put("a", "1", 1, "x"))
	n.stop()
	w.wall.set(-time.Hour)
	n = w.start()
	n.apply(put("b", "1", 1, "x"))
	all := n.everything("m", 0)
	if len(all) != 2 || string(all[1].GetKey()) != "b" {
		t.Errorf("what was written after the restart does not arrive last: %v", all)
	}
}

// SYN-01: a position that was handed out must lie below what arrives later, although
// the wall clock steps back an hour and the owner changes.
func TestSYN01_APositionSkipsNothingAfterTheClockWentBack(t *testing.T) {
	for name, end := range map[string]func(*node){"stop": func(n *node) { n.stop() }, "kill": func(n *node) { n.kill(0) }} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			n := w.start()
			n.apply(put("before", "1", 1, "x"))
			w.wall.set(3 * time.Second) // below the ceiling of the commit
			resp, err := n.Since(t.Context(), &partitionv1.SinceRequest{Map: "m"})
			if err != nil {
				t.Fatal(err)
			}
			leaves, err := n.Leaves(t.Context(), &partitionv1.LeavesRequest{Map: "m"})
			if err != nil {
				t.Fatal(err)
			}
			w.wall.set(time.Hour) // far above it
			late, err := n.Since(t.Context(), &partitionv1.SinceRequest{Map: "m", After: resp.GetCovered()})
			if err != nil {
				t.Fatal(err)
			}
			if late.GetCovered().GetMillis() > w.millis()-3_500_000 {
				t.Errorf("a position an hour ahead of the last commit's ceiling was handed out")
			}
			end(n)
			w.wall.set(-time.Hour)
			n = w.start()
			n.apply(put("after", "1", 1, "x"))
			for _, position := range []*typesv1.Arrival{resp.GetCovered(), leaves.GetCovered(), late.GetCovered()} {
				resp, err := n.Since(t.Context(), &partitionv1.SinceRequest{Map: "m", After: position})
				if err != nil {
					t.Fatal(err)
				}
				if len(resp.GetChanges()) != 1 || string(resp.GetChanges()[0].GetKey()) != "after" {
					t.Errorf("after the position %v came %v, want the record written later", position, resp.GetChanges())
				}
			}
		})
	}
}

// Restarts in a row do not push the arrival clock ever further ahead.
func TestRestartsDoNotRunTheClockAhead(t *testing.T) {
	w := newWorld(t)
	for range 5 {
		w.start().kill(0)
	}
	n := w.start()
	n.apply(put("k", "v", 1, "x"))
	if ahead := int64(n.everything("m", 0)[0].GetArrival().GetMillis()) - int64(w.millis()); ahead > ceilingLead.Milliseconds() {
		t.Errorf("after five restarts arrivals are %d ms ahead of the wall clock", ahead)
	}
}

func TestLOG04_AReplacedLogIsRefused(t *testing.T) {
	w := newWorld(t)
	w.store.records = map[string]*typesv1.Change{"m\x00k": {
		Map: "m", Key: []byte("k"), Arrival: &typesv1.Arrival{Millis: 5},
		Record: &typesv1.Record{Value: msgval.AppendString(nil, "v"), Timestamp: &typesv1.Timestamp{Millis: 1, NodeId: "a"}},
	}}
	w.store.watermarks = map[string]*persistencev1.Watermark{"x": {History: "another", Lane: "x", Sequence: 10, Number: 3}}
	n, _ := w.begin(w.config())
	if err := n.wait(); !errors.Is(err, ErrLogReplaced) {
		t.Fatalf("Run: %v, want ErrLogReplaced", err)
	}
	if n.Ready() == nil {
		t.Error("ready on a replaced log")
	}
	config := w.config()
	config.AcceptLogLoss = true
	n, logger := w.begin(config)
	<-logger.ready
	if got := len(n.everything("m", 0)); got != 1 {
		t.Errorf("%d records, want the stored one", got)
	}
}

// wait returns what Run returned; a service that goes on although it must not fails
// the test.
func (n *node) wait() error {
	n.world.t.Helper()
	select {
	case err := <-n.ended:
		n.ended <- err
		return err
	case <-time.After(time.Minute):
		n.world.t.Fatal("Run goes on")
		return nil
	}
}

func TestLOG04_ALogThatWentBackIsRefused(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	n.apply(put("k", "v", 1, "a"))
	w.store.drain(t, w.log, 1000)
	n.stop()
	for _, mark := range w.store.watermarks {
		mark.Sequence += 100
		mark.Number += 100
	}
	n, _ = w.begin(w.config())
	if err := n.wait(); !errors.Is(err, ErrLogWentBack) {
		t.Errorf("Run: %v, want ErrLogWentBack", err)
	}
}

func TestPG06_AStoreThatLostTrimmedCommitsIsRefused(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	for i := range 5 {
		n.apply(put("k", "v", uint64(i+1), "a"))
	}
	w.store.drain(t, w.log, 2)
	old := w.store.watermarks
	w.store.watermarks = nil
	restored := &fakeStore{records: w.store.records, watermarks: old}
	whole := &fakeStore{}
	whole.drain(t, w.log, 1000)
	whole.trim(t, w.log)
	w.store = restored
	n.kill(0)
	n, _ = w.begin(w.config())
	if err := n.wait(); !errors.Is(err, ErrStoreBehind) {
		t.Errorf("Run: %v, want ErrStoreBehind", err)
	}
	if restored.loads != maxHoles {
		t.Errorf("loaded %d times, want %d", restored.loads, maxHoles)
	}
}

// The store drains and trims between the answer to Load and the replay.
func TestATrimDuringTheLoadIsLoadedAgain(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	for i := range 5 {
		n.apply(put(fmt.Sprint("k", i), "v", 1, "a"))
	}
	w.store.drain(t, w.log, 2)
	before := n.digest()
	n.kill(0)
	once := false
	w.store.loading = func() error {
		if !once {
			once = true
			w.store.drain(t, w.log, 1000)
			w.store.trim(t, w.log)
		}
		return nil
	}
	n = w.start()
	if n.digest() != before {
		t.Error("the state differs")
	}
	if w.store.loads != 3 {
		t.Errorf("loaded %d times, want 1 at first and 2 now", w.store.loads)
	}
}

func TestPG08_AStoreThatFailsIsNotAnEmptyMap(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	n.apply(put("k", "v", 1, "a"))
	n.stop()
	fails := 2
	asked := make(chan struct{}, 10)
	w.store.loading = func() error {
		asked <- struct{}{}
		if fails--; fails >= 0 {
			return errors.New("the database is away")
		}
		return nil
	}
	n, logger := w.begin(w.config())
	<-asked
	if n.Ready() == nil {
		t.Error("ready while loading")
	}
	if _, err := n.Since(t.Context(), &partitionv1.SinceRequest{Map: "m"}); err == nil {
		t.Error("a read was answered while loading")
	}
	if _, err := n.tryApply(t.Context(), put("k", "w", 2, "a")); err == nil || err.Error() != "refused: REFUSAL_UNAVAILABLE" {
		t.Errorf("apply while loading: %v", err)
	}
	<-logger.ready
	if got := len(n.everything("m", 0)); got != 1 {
		t.Errorf("%d records", got)
	}
}

func TestStopWhileLoadingEndsRun(t *testing.T) {
	w := newWorld(t)
	asked := make(chan struct{}, 100)
	w.store.loading = func() error { asked <- struct{}{}; return errors.New("away") }
	n, _ := w.begin(w.config())
	<-asked
	if err := n.stop(); err != nil {
		t.Errorf("Run: %v", err)
	}
}

func TestOWN01_ASecondOwnerFencesTheFirst(t *testing.T) {
	w := newWorld(t)
	first := w.start()
	first.apply(put("k", "1", 1, "a"))
	second := w.start()
	if _, err := first.tryApply(t.Context(), put("k", "2", 2, "a")); err == nil {
		t.Fatal("the first owner acknowledged an op after it had lost its shards")
	}
	if err := first.wait(); !errors.Is(err, ErrFenced) {
		t.Errorf("Run: %v, want ErrFenced", err)
	}
	if _, err := first.tryApply(t.Context(), put("k", "3", 3, "a")); err == nil || err.Error() != "refused: REFUSAL_NOT_OWNER" {
		t.Errorf("apply at a fenced node: %v", err)
	}
	if _, err := first.Leaves(t.Context(), &partitionv1.LeavesRequest{Map: "m"}); err == nil {
		t.Error("a fenced node answered a read")
	}
	if d, err := first.Describe(t.Context(), nil); err != nil || len(d.GetShards()) != 0 {
		t.Errorf("a fenced node says it serves %v, %v", d.GetShards(), err)
	}
	if got := outcomeWords(second.apply(put("k", "2", 2, "a"))); got != "APPLIED" {
		t.Errorf("at the second owner: %s", got)
	}
	if first.deps.Log.Shards() != shardCount {
		t.Error("shards")
	}
}

// An owner without writes notices by itself.
func TestOWN01_AnIdleOwnerNoticesThatItWasFenced(t *testing.T) {
	w := newWorld(t)
	first := w.start()
	w.start()
	if err := first.wait(); !errors.Is(err, ErrFenced) {
		t.Errorf("Run: %v, want ErrFenced", err)
	}
}

func TestUPG01_AGracefulStopReleasesAndSeals(t *testing.T) {
	w := newWorld(t)
	n := w.start()
	n.apply(put("k", "v", 1, "a"))
	if err := n.stop(); err != nil {
		t.Fatal(err)
	}
	var bodies []string
	for entry, err := range w.log.Read(t.Context(), 1, false) {
		if err != nil {
			t.Fatal(err)
		}
		bodies = append(bodies, fmt.Sprintf("%T", entry.Commit.GetBody()))
	}
	want := "[*logv1.Commit_Claim *logv1.Commit_Changes *logv1.Commit_Release *logv1.Commit_Seal]"
	if got := fmt.Sprint(bodies); got != want {
		t.Errorf("the lane is %s, want %s", got, want)
	}
	if _, err := n.tryApply(t.Context(), put("k", "w", 2, "a")); err == nil {
		t.Error("a stopped node took an op")
	}
}

func TestLOG07_AnUnreadableLogStopsTheStart(t *testing.T) {
	w := newWorld(t)
	w.store.records = map[string]*typesv1.Change{"x": {Map: "m"}}
	n, _ := w.begin(w.config())
	if err := n.wait(); !errors.Is(err, ErrUnreadable) {
		t.Errorf("Run: %v, want ErrUnreadable", err)
	}
}

func TestACK04_AFullLogRefusesBeforeMerging(t *testing.T) {
	w := newWorldOf(t, commitlog.Config{Stream: "TOPGUN_LOG", MaxBytes: 2 * commitlog.MaxCommitBytes, Replicas: 1, Shards: shardCount})
	n := w.start()
	big := string(make([]byte, 200<<10))
	var stuck uint64
	for stuck = 1; n.Ready() == nil; {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		_, err := n.tryApply(ctx, put("k", big, stuck, "a"))
		cancel()
		if err == nil {
			stuck++
		} // else it is merged, and waits for the log
	}
	before := n.stats.ops[applied].Load()
	if _, err := n.tryApply(t.Context(), put("k", "small", stuck+1, "a")); err == nil || err.Error() != "refused: REFUSAL_OVERLOADED" {
		t.Errorf("apply with a full log: %v", err)
	}
	if n.stats.ops[applied].Load() != before {
		t.Error("a refused op was merged")
	}
	w.store.drain(t, w.log, 1000)
	w.store.trim(t, w.log)
	// A read waits until the stuck batch is logged.
	all := n.everything("m", 0)
	if len(all) != 1 || all[0].GetRecord().GetTimestamp().GetMillis() != stuck {
		t.Errorf("after the drain: %d records, the first at %d, want %d", len(all), all[0].GetRecord().GetTimestamp().GetMillis(), stuck)
	}
	n.apply(put("k", "small", stuck+1, "a"))
	if err := n.Ready(); err != nil {
		t.Errorf("after the drain: %v", err)
	}
}
