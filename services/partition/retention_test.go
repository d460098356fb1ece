package partition

import (
	"bytes"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	metricnoop "go.opentelemetry.io/otel/metric/noop"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
	"golang.org/x/sync/semaphore"
	"pgregory.net/rapid"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/msgval"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

func TestRetention_Boundaries(t *testing.T) {
	const hour = 3_600_000
	for name, c := range map[string]struct {
		keep          time.Duration
		wall          uint64
		boundary, end uint64 // end: when it moves on
	}{
		"for ever":         {0, 1 << 40, 0, 0},
		"younger than it":  {time.Hour, hour - 1, 0, hour + hour/10},
		"just as old":      {time.Hour, hour, 0, hour + hour/10},
		"a step":           {time.Hour, hour + hour/10, hour / 10, hour + hour/5},
		"within a step":    {time.Hour, hour + hour/10 + 1, hour / 10, hour + hour/5},
		"before a step":    {time.Hour, hour + hour/5 - 1, hour / 10, hour + hour/5},
		"an hour's steps":  {720 * time.Hour, 1000*hour + 5, 280 * hour, 1001 * hour},
		"the least":        {time.Minute, 1_000_001, 936_000, 1_002_000},
		"an odd retention": {61_001 * time.Millisecond, 1_000_000, 933_300, 1_000_401},
	} {
		r := retentionOf(c.keep)
		if got := r.boundary(c.wall); got != c.boundary {
			t.Errorf("%s: the boundary is %d, want %d", name, got, c.boundary)
		}
		if r == 0 {
			continue
		}
		if got := r.moves(c.boundary); got != c.end || r.boundary(got) <= c.boundary || c.boundary > 0 && r.boundary(got-1) != c.boundary {
			t.Errorf("%s: the boundary moves at %d, want %d", name, got, c.end)
		}
		if r.boundary(c.wall) > r.fence(c.wall) {
			t.Errorf("%s: the fence %d lies below the boundary", name, r.fence(c.wall))
		}
	}
	for keep, ok := range map[time.Duration]bool{0: true, time.Minute: true, time.Minute - 1: false, -1: false, 720 * time.Hour: true} {
		c := DefaultConfig()
		c.NodeID, c.TombstoneRetention = "n", keep
		if err := c.Validate(); (err == nil) != ok {
			t.Errorf("a retention of %s: %v", keep, err)
		}
	}
	if got := DefaultConfig().TombstoneRetention; got != 30*24*time.Hour {
		t.Errorf("the default is %s", got)
	}
}

// yard is one shard without a service; what it logs is read off its lane.
type yard struct {
	rt    rapid.TB
	keep  retention
	wall  uint64
	clock *arrivalClock
	shard *shard

	log      []*typesv1.Change
	state    map[string]*typesv1.Change // what the log says, by identity
	lived    map[string]uint64          // the highest stamp of what was stored
	gone     map[string]uint64          // that of what was forgotten
	boundary uint64                     // the highest there was since the start
}

func newYard(rt rapid.TB, keep time.Duration) *yard {
	y := &yard{rt: rt, keep: retentionOf(keep), wall: 1 << 40, state: make(map[string]*typesv1.Change), gone: make(map[string]uint64), lived: make(map[string]uint64)}
	y.restart(nil, nil)
	return y
}

func identity(c *typesv1.Change) string {
	return fmt.Sprintf("%d %s %s %s", c.GetKind(), c.GetMap(), c.GetKey(), c.GetTag())
}

// loaded makes a shard of stored rows and replayed changes.
func (y *yard) loaded(clock *arrivalClock, rows, replayed []*typesv1.Change) *shard {
	now := func() time.Time { return time.UnixMilli(int64(y.wall)) }
	stats, err := newStats(metricnoop.NewMeterProvider().Meter(""))
	if err != nil {
		y.rt.Fatal(err)
	}
	s := newShard(0, clock, now, stats)
	s.pruner.keep = y.keep
	s.lane = newLane(&mortal{}, 1, now, tracenoop.NewTracerProvider().Tracer(""), semaphore.NewWeighted(64<<20), stats, slog.New(slog.DiscardHandler))
	l := &loader{shards: []*shard{s}, clock: clock}
	for _, c := range slices.Concat(rows, replayed) {
		if err := l.change(c); err != nil {
			y.rt.Fatal(err)
		}
	}
	s.ready()
	s.locks.start(0)
	return s
}

func (y *yard) restart(rows, replayed []*typesv1.Change) {
	y.clock, y.boundary = new(arrivalClock), 0
	y.shard = y.loaded(y.clock, rows, replayed)
	if len(y.log) > 0 { // by the ceiling of the last commit
		y.clock.raise(arrivalFromProto(y.log[len(y.log)-1].GetArrival()))
	}
}

// take moves what the shard handed to its lane into the log.
func (y *yard) take() {
	lane := y.shard.lane
	for _, b := range lane.queue {
		for _, c := range b.shards[0].GetChanges() {
			y.logged(c)
		}
		lane.room.Release(b.held)
		close(b.done)
	}
	lane.queue = nil
}

func (y *yard) logged(c *typesv1.Change) {
	y.log = append(y.log, c)
	id := identity(c)
	if !c.GetPruned() {
		y.state[id] = c
		y.lived[id] = max(y.lived[id], c.GetRecord().GetTimestamp().GetMillis())
		return
	}
	before, boundary := y.state[id], y.shard.pruner.boundary
	stamps := append([]*typesv1.Timestamp{before.GetRecord().GetTimestamp()}, before.GetRestamped()...)
	if before == nil || len(before.GetRecord().GetValue()) > 0 || before.GetArrival().GetMillis() >= boundary || c.GetRecord() != nil {
		y.rt.Fatalf("%v was forgotten by %v at the boundary %d", before, c, boundary)
	}
	for _, stamp := range stamps {
		if y.gone[id] = max(y.gone[id], y.lived[id], stamp.GetMillis()); stamp.GetMillis() >= boundary {
			y.rt.Fatalf("%v was forgotten at the boundary %d", before, boundary)
		}
	}
	delete(y.state, id)
}

// apply merges one op and returns its outcome.
func (y *yard) apply(kind typesv1.Kind, name, key, tag string, r lwwmap.Record) outcome {
	o := op{kind: kind, table: name, key: []byte(key), hash: merkle.Hash(key), record: r}
	id := fmt.Sprintf("%d %s %s %s", kind, name, key, tag)
	if kind == or {
		o.key = joinTag([]byte(key), []byte(tag))
	}
	g := &group{ops: []op{o}, held: 1}
	if !y.shard.lane.room.TryAcquire(1) {
		y.rt.Fatal("no room")
	}
	there := y.state[id] != nil
	y.shard.apply(g)
	y.take()
	got := g.ops[0].outcome
	tooOld := got == rejected && g.ops[0].reason == reasonTooOld
	if tooOld && (there || y.keep == 0) {
		y.rt.Fatalf("an op on a key that holds something was rejected as too old")
	}
	removal := kind == or && r.Deleted() // there is nothing that it could bring back
	if !there && !removal && !tooOld && (got == applied || got == restamped) && r.Timestamp.Millis <= y.gone[id] {
		y.rt.Fatalf("an op stamped %d was %s; what was removed, stamped %d, was forgotten", r.Timestamp.Millis, outcomeNames[got], y.gone[id])
	}
	if recent := y.clock.read(y.wall).millis - uint64(y.keep); tooOld && r.Timestamp.Millis >= recent {
		y.rt.Fatalf("an op stamped %d was rejected as too old at %d", r.Timestamp.Millis, y.wall)
	}
	return got
}

// rest does what is due until nothing is.
func (y *yard) rest() {
	for range 1000 {
		if !y.shard.housekeep() {
			y.rt.Fatal("there is room")
		}
		y.take()
		if !y.shard.pruner.announce && y.shard.nextHousekeeping() > 0 {
			y.check()
			return
		}
	}
	y.rt.Fatal("the shard does not come to rest")
}

// check checks a shard at rest: no tombstone is left that should be forgotten, and
// what is announced is so.
func (y *yard) check() {
	y.boundary = max(y.boundary, y.keep.boundary(y.wall))
	p := &y.shard.pruner
	if p.boundary != y.boundary || p.announced.Load() != y.boundary {
		y.rt.Fatalf("at the boundary %d the shard is at %d, and announces %d", y.boundary, p.boundary, p.announced.Load())
	}
	tombstones := 0
	for id, c := range y.state {
		if c.GetKind() == counter || len(c.GetRecord().GetValue()) > 0 {
			continue
		}
		tombstones++
		stamp := c.GetRecord().GetTimestamp().GetMillis()
		for _, r := range c.GetRestamped() {
			stamp = max(stamp, r.GetMillis())
		}
		if c.GetArrival().GetMillis() < y.boundary && stamp < y.boundary {
			y.rt.Fatalf("the tombstone of %s, arrived %d and stamped %d, is there past the boundary %d", id, c.GetArrival().GetMillis(), stamp, y.boundary)
		}
	}
	if y.keep > 0 && len(p.graves) < tombstones || len(p.graves) > 2*tombstones+minStale+1 {
		y.rt.Fatalf("%d graves for %d tombstones", len(p.graves), tombstones)
	}
}

// alike checks that a shard that was loaded is the one that lived.
func (y *yard) alike(loaded *shard) {
	sorted := func(s *shard) string {
		lines := s.dump()
		slices.SortFunc(lines, bytes.Compare)
		return string(bytes.Join(lines, []byte("\n")))
	}
	if got, want := sorted(loaded), sorted(y.shard); got != want {
		y.rt.Fatalf("loaded:\n%s\nlived:\n%s", got, want)
	}
	if got, want := loaded.records.Load(), y.shard.records.Load(); got != want || got != int64(len(y.state)) {
		y.rt.Fatalf("%d records were loaded, %d lived, the log has %d", got, want, len(y.state))
	}
	for kind, tables := range y.shard.tables {
		if got, want := slices.Sorted(maps.Keys(loaded.tables[kind])), slices.Sorted(maps.Keys(tables)); !slices.Equal(got, want) {
			y.rt.Fatalf("the tables loaded are %v, those that lived %v", got, want)
		}
		for name, t := range tables {
			other := loaded.tables[kind][name]
			for _, combine := range []merkle.Combine{merkle.Mixed, merkle.Plain} {
				if !maps.Equal(maps.Collect(t.leafSums(combine).All()), maps.Collect(other.leafSums(combine).All())) {
					y.rt.Fatalf("the leaves of %q differ from those made from scratch", name)
				}
			}
			if t.tombstones != other.tombstones {
				y.rt.Fatalf("%d tombstones of %q, from scratch %d", t.tombstones, name, other.tombstones)
			}
			end := arrival{millis: 1 << 60}
			got, _ := t.since(arrival{}, end, 1<<20, 1<<30)
			want, _ := other.since(arrival{}, end, 1<<20, 1<<30)
			if fmt.Sprint(got) != fmt.Sprint(want) || len(got) != len(t.records) {
				y.rt.Fatalf("Since of %q gives\n%v, from scratch\n%v", name, got, want)
			}
			if got, want := len(t.inLeaves(0, merkle.LeafCount-1)), len(t.records); got != want {
				y.rt.Fatalf("the leaves of %q list %d records of %d", name, got, want)
			}
		}
	}
}

// stored is a store that took in the changes up to watermark, and of some records
// later ones, in any order, as it is while it is being loaded.
func (y *yard) stored(random *rand.Rand, watermark int) []*typesv1.Change {
	histories := make(map[string][]*typesv1.Change)
	behind := make(map[string]int) // how many of them lie at or below the watermark
	for i, c := range y.log {
		id := identity(c)
		histories[id] = append(histories[id], c)
		if i < watermark {
			behind[id] = len(histories[id])
		}
	}
	var rows []*typesv1.Change
	for id, history := range histories {
		var row *typesv1.Change
		for _, c := range history[:behind[id]+random.IntN(len(history)-behind[id]+1)] {
			switch {
			case c.GetPruned():
				row = nil
			default:
				row = c
			}
		}
		if row != nil {
			rows = append(rows, row)
		}
	}
	random.Shuffle(len(rows), func(i, j int) { rows[i], rows[j] = rows[j], rows[i] })
	return rows
}

// Any history of writes, removals, expiries, pruning and clocks that jump, loaded
// from a store at any watermark and newer in parts, and the log behind it, is the
// state that lived; and no write that a forgotten tombstone would have beaten gets in
// (TMB-01, LOG-06, MRK-03, CRDT-04).
func TestTMB01_WhatWasForgottenStaysAway(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		keep := rapid.SampledFrom([]time.Duration{time.Minute, 3 * time.Minute, 2 * time.Hour, 0}).Draw(rt, "keep")
		y := newYard(rt, keep)
		millis := max(int(keep.Milliseconds()), 1000)
		random := rand.New(rand.NewPCG(1, rapid.Uint64().Draw(rt, "seed")))
		forgotten := 0
		for range rapid.IntRange(1, 60).Draw(rt, "steps") {
			switch rapid.IntRange(0, 9).Draw(rt, "step") {
			case 0, 1, 2, 3, 4, 5:
				r := lwwmap.Record{Timestamp: hlc.Timestamp{NodeID: rapid.SampledFrom([]string{"a", "b"}).Draw(rt, "node")}}
				r.Timestamp.Millis = y.wall + 120_000 - uint64(rapid.IntRange(0, 120_000+2*millis).Draw(rt, "age"))
				if rapid.IntRange(0, 2).Draw(rt, "value") == 0 {
					r.Value = msgval.AppendString(nil, rapid.StringMatching("[a-c]").Draw(rt, "text"))
					if rapid.Bool().Draw(rt, "expires") {
						r.TTLMillis = uint64(rapid.IntRange(1, millis).Draw(rt, "ttl"))
					}
				}
				kind := rapid.SampledFrom([]typesv1.Kind{lww, or}).Draw(rt, "kind")
				tag := ""
				if kind == or {
					tag = fmt.Sprint("t", rapid.IntRange(0, 2).Draw(rt, "tag"))
				}
				y.apply(kind, rapid.SampledFrom([]string{"m", "n"}).Draw(rt, "map"), fmt.Sprint("k", rapid.IntRange(0, 2).Draw(rt, "key")), tag, r)
			case 6, 7:
				y.wall += uint64(rapid.IntRange(0, millis).Draw(rt, "pass"))
				y.rest()
			case 8:
				y.wall += uint64(int64(rapid.SampledFrom([]int{-3_600_000, 3_600_000}).Draw(rt, "jump")))
			case 9:
				watermark := random.IntN(len(y.log) + 1)
				rows := y.stored(random, watermark)
				loaded := y.loaded(new(arrivalClock), rows, y.log[watermark:])
				y.alike(loaded)
				if rapid.Bool().Draw(rt, "restart") {
					y.restart(rows, y.log[watermark:])
				}
			}
			forgotten = max(forgotten, len(y.gone))
		}
		y.alike(y.loaded(new(arrivalClock), nil, y.log))
		y.wall += 2 * uint64(millis)
		y.rest()
		y.alike(y.loaded(new(arrivalClock), nil, y.log))
	})
}

// The add of a clock that is ahead, removed by one that is not, stays away when it is
// sent again as soon as its tombstone is forgotten (TMB-01).
func TestTMB01_ARemovalStampedBeforeTheAdd(t *testing.T) {
	for name, removal := range map[string]uint64{"now": 0, "too far ahead": uint64(time.Hour.Milliseconds())} {
		t.Run(name, func(t *testing.T) {
			y := newYard(t, time.Minute)
			add := lwwmap.Record{Value: []byte{1}, Timestamp: hlc.Timestamp{Millis: y.wall + 55_000, NodeID: "ahead"}}
			y.apply(or, "m", "k", "tag", add)
			y.wall++
			y.apply(or, "m", "k", "tag", lwwmap.Record{Timestamp: hlc.Timestamp{Millis: y.wall + removal, NodeID: "b"}})
			y.restart(nil, y.log)
			for end := y.wall + 200_000; y.wall < end; y.wall += 1000 {
				y.rest()
				if got := y.apply(or, "m", "k", "tag", add); got != superseded && got != rejected {
					t.Fatalf("the add is %s, and the removal forgotten: %d records", outcomeNames[got], y.shard.records.Load())
				}
			}
			if got := y.shard.records.Load(); got != 0 {
				t.Errorf("%d records are left", got)
			}
		})
	}
}

// Tombstones in great number are forgotten in pieces, and with them the tables.
func TestTMB03_ManyTombstonesAreForgottenInPieces(t *testing.T) {
	y := newYard(t, time.Hour)
	const count = 3*maxPrunes + 7
	for i := range count {
		y.wall++
		y.apply(lww, "m", fmt.Sprint("k", i), "", lwwmap.Record{Timestamp: hlc.Timestamp{Millis: y.wall, NodeID: "a"}})
		y.apply(or, "m", "k", fmt.Sprint("t", i), lwwmap.Record{Timestamp: hlc.Timestamp{Millis: y.wall, NodeID: "a"}})
	}
	y.rest()
	if got := y.shard.records.Load(); got != 2*count {
		t.Fatalf("%d records before their time is over, want %d", got, 2*count)
	}
	y.wall += uint64(2 * time.Hour.Milliseconds())
	goes, announced := 0, y.shard.pruner.announced.Load()
	for ; y.shard.records.Load() > 0; goes++ {
		before := len(y.log)
		if wait := y.shard.nextHousekeeping(); wait != 0 {
			t.Fatalf("the shard would wait for %s", wait)
		}
		y.shard.housekeep()
		y.shard.housekeep()
		if y.shard.pruner.announced.Load() != announced {
			t.Fatal("it is announced that tombstones are forgotten, and that is not in the log yet")
		}
		y.take()
		if got := len(y.log) - before; got > 2*maxPrunes || got == 0 {
			t.Fatalf("%d tombstones in two goes", got)
		}
		y.alike(y.loaded(new(arrivalClock), nil, y.log))
	}
	if want := (2*count + 2*maxPrunes - 1) / (2 * maxPrunes); goes != want {
		t.Errorf("%d pairs of goes, want %d", goes, want)
	}
	if y.rest(); len(y.shard.tables[lww])+len(y.shard.tables[or]) > 0 || len(y.shard.pruner.graves) > 0 {
		t.Error("tables or graves are left")
	}
}

// One key written and removed again and again has one tombstone, and about as much is
// remembered of it.
func TestTMB03_ChurnIsBounded(t *testing.T) {
	y := newYard(t, time.Hour)
	for range 3000 {
		y.wall++
		r := lwwmap.Record{Timestamp: hlc.Timestamp{Millis: y.wall, NodeID: "a"}}
		y.apply(lww, "m", "k", "", r)
		r.Value, r.Timestamp.Counter = []byte{0xc0}, 1
		y.apply(lww, "m", "k", "", r)
		if got := len(y.shard.pruner.graves); got > minStale+1 {
			t.Fatalf("%d graves of one key", got)
		}
	}
}

func TestTMB01_AnOldWriteOnNothingIsRejected(t *testing.T) {
	y := newYard(t, time.Hour)
	old := lwwmap.Record{Value: []byte{0xc0}, Timestamp: hlc.Timestamp{Millis: y.wall - uint64(time.Hour.Milliseconds()) - 1, NodeID: "a"}}
	limit := old
	limit.Timestamp.Millis++
	removal := lwwmap.Record{Timestamp: old.Timestamp}
	for name, c := range map[string]struct {
		kind   typesv1.Kind
		record lwwmap.Record
		want   outcome
	}{
		"an old write": {lww, old, rejected}, "at the limit": {lww, limit, applied}, "an old removal": {lww, removal, rejected},
		"an old add": {or, old, rejected}, "an add at the limit": {or, limit, applied}, "an old removal of a tag": {or, removal, applied},
	} {
		if got := y.apply(c.kind, "m", name, "t", c.record); got != c.want {
			t.Errorf("%s on nothing: %s, want %s", name, outcomeNames[got], outcomeNames[c.want])
		}
		if c.want == applied {
			again := old
			again.Timestamp.NodeID = "0"
			if got := y.apply(c.kind, "m", name, "t", again); got == rejected || got == applied && c.kind == lww {
				t.Errorf("%s: an old write on something: %s", name, outcomeNames[got])
			}
		}
	}
	y.keep, y.shard.pruner.keep, y.shard.fence = 0, 0, 0
	if got := y.apply(lww, "m", "for ever", "", old); got != applied {
		t.Errorf("an old write where tombstones are kept for ever: %s", outcomeNames[got])
	}
}

// The service prunes by itself, says so, and a restart finds the same; counters and
// locks stay.
func TestTMB02_TheServiceForgetsAndSaysSo(t *testing.T) {
	w := newWorld(t)
	config := w.config()
	config.TombstoneRetention = time.Minute
	n, logger := w.begin(config)
	<-logger.ready
	now := w.millis()
	n.apply(put("live", "v", now, "a"), put("gone", "", now, "a"), put("gone2", "", now, "a"))
	n.mustAcquire("lock", "s", 0)
	w.store.drain(t, w.log, 1000)
	if d, err := n.Describe(t.Context(), nil); err != nil || d.GetTombstoneRetentionMillis() != 60_000 || d.GetPrunedBeforeMillis() > now {
		t.Fatalf("Describe: %v, %v", d, err)
	}
	w.wall.set(2 * time.Minute)
	// Shards look when an op comes; by themselves they do within half a minute.
	for i := range 20 {
		n.apply(put(fmt.Sprint("later", i), "v", w.millis(), "a"))
	}
	for range time.Tick(time.Millisecond) { // nothing else tells what a shard does by its timer
		d, err := n.Describe(t.Context(), &partitionv1.DescribeRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if d.GetPrunedBeforeMillis() > now {
			break
		}
	}
	if got := len(n.everything("m", 0)); got != 21 {
		t.Errorf("%d records, want those that are not tombstones: 21", got)
	}
	for _, e := range n.events.all() {
		for _, c := range e.GetChanges() {
			if c.GetPruned() {
				t.Error("an event says that a tombstone was forgotten")
			}
		}
	}
	if got := n.apply(put("gone", "back", now, "b"))[0]; got.GetOutcome() != partitionv1.Outcome_OUTCOME_REJECTED {
		t.Errorf("an op from before the removal: %v", got)
	}
	before := n.digest()
	n.kill(0)
	n, logger = w.begin(config)
	<-logger.ready
	if n.digest() != before {
		t.Error("the restart changed the state")
	}
}
