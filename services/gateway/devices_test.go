package gateway

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/topgun-sync/topgun/core/wire"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

const testRetention = 30 * 24 * time.Hour

// aged is a gateway whose clock, and its owner's, can be moved on.
type aged struct {
	*bench
	ahead *atomic.Int64
	stuck *atomic.Bool // the owner does not answer Records
}

func setupAged(t *testing.T, period time.Duration) *aged {
	t.Helper()
	ahead, stuck := new(atomic.Int64), new(atomic.Bool)
	now := func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	b := setup(t, nil, func(b *bench) {
		b.partition.now, b.partition.retention = now, uint64(period.Milliseconds())
		b.partition.before = func(ctx context.Context, method string) error {
			if method == "Records" && stuck.Load() {
				<-ctx.Done()
			}
			return ctx.Err()
		}
		b.service.now = now
		b.service.sockets.now = now
	})
	return &aged{bench: b, ahead: ahead, stuck: stuck}
}

func (a *aged) pass(d time.Duration) { a.ahead.Add(int64(d)) }
func (a *aged) millis() uint64       { return uint64(a.partition.now().UnixMilli()) }

// token makes a device token of the gateway's form.
func token(device int) string {
	return fmt.Sprintf("%032x.%s", device, strings.Repeat("ab", deviceSecretBytes))
}

// device connects as a device.
func (a *aged) device(t *testing.T, device int) *wsClient {
	t.Helper()
	p := a.dial(t)
	p.send(&wire.DeviceHello{DeviceToken: token(device)})
	if m := expect[*wire.DeviceAck](p); m.DeviceToken != token(device) {
		t.Fatalf("device %+v", m)
	}
	return p
}

// goQuiet ends a session whose client asked for nothing more for a while.
func (a *aged) goQuiet(p *wsClient) {
	p.t.Helper()
	a.pass(quietTime + time.Second)
	p.ping()
	_ = p.conn.Close()
}

// answered waits until nothing that a sync asked for is still to be sent.
func (a *aged) answered(p *wsClient) {
	p.t.Helper()
	eventually(p.t, func() bool {
		return !slices.ContainsFunc(a.service.sockets.snapshot(), func(s *session) bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.answeringLocked()
		})
	})
}

// leave ends a session after its copies were quiet for long enough to be complete.
func (a *aged) leave(p *wsClient) {
	p.t.Helper()
	open, _ := a.service.sockets.count()
	a.answered(p)
	a.goQuiet(p)
	eventually(p.t, func() bool { n, _ := a.service.sockets.count(); return n < open })
}

// cursors returns what is stored of a device.
func (a *aged) cursors(device int) cursors {
	id, _, _ := strings.Cut(token(device), ".")
	return decodeCursors(a.partition.record(devicesMap, id).GetValue())
}

// TMB-01: a device that was away for longer than tombstones are kept gives up its copy,
// also when its lastSyncTimestamp says otherwise, and what it pushes does not come back.
func TestTMB01_AwayForTooLong(t *testing.T) {
	a := setupAged(t, testRetention)
	a.partition.put("m", "deleted", packed("v"), stamp(a.millis()))
	a.partition.add("m", "deleted", "tag", packed("v"), stamp(a.millis()))
	p := a.device(t, 1)
	p.synced("m", 0)
	p.send(&wire.ORMapSyncInit{MapName: "m", HasClaimedEpoch: true})
	expect[*wire.ORMapDiffResponse](p)
	expect[*wire.ORMapSyncRespRoot](p)
	a.leave(p)
	eventually(t, func() bool { return a.cursors(1) != nil })
	if c := a.cursors(1); len(c) != 3 || c[firstWritten] == 0 || c["m"] == 0 || c[orCursor+"m"] == 0 {
		t.Fatalf("cursors %v", c)
	}

	witness := a.hello(t)
	witness.synced("m", 0)
	witness.send(&wire.ORMapSyncInit{MapName: "m", HasClaimedEpoch: true})
	expect[*wire.ORMapDiffResponse](witness)
	expect[*wire.ORMapSyncRespRoot](witness)
	a.partition.put("m", "deleted", nil, stamp(a.millis()))
	a.partition.add("m", "deleted", "tag", nil, stamp(a.millis()))
	for range 2 {
		expect[*wire.ServerEvent](witness) // so none is under way to who comes later
	}
	a.pass(testRetention + time.Hour)
	a.partition.forget(typesv1.Kind_KIND_LWW, "m", "deleted", "")
	a.partition.forget(typesv1.Kind_KIND_OR, "m", "deleted", "tag")

	c := &orClient{wsClient: a.device(t, 1), name: "m"}
	c.m.Merge("deleted", orRecord("tag", "v", stamp(a.millis()-uint64((testRetention+2*time.Hour).Milliseconds()))))
	recent := a.millis() - 1000 // it was set by a root that nothing followed
	c.send(&wire.SyncInit{MapName: "m", LastSyncTimestamp: recent})
	if m := expect[*wire.SyncResetRequired](c.wsClient); m.MapName != "m" || m.Reason == "" {
		t.Errorf("%+v", m)
	}
	c.synced("m", 0) // what the client says then
	c.init(recent)
	c.settle()
	if c.resyncs != 1 || len(c.m.Keys()) != 0 || c.root.RootHash != 0 {
		t.Errorf("%d resyncs, keys %v", c.resyncs, c.m.Keys())
	}
	if a.partition.tag("m", "deleted", "tag") != nil {
		t.Error("a removed record came back")
	}
}

// A device whose first session was not noted, since it had no token yet, and that comes
// often and opens a map of then rarely: how often it came says nothing about that map.
func TestTMB01_AMapThatIsOpenedRarely(t *testing.T) {
	a := setupAged(t, testRetention)
	often := a.device(t, 1)
	often.synced("often", 0)
	a.leave(often)
	eventually(t, func() bool { return a.cursors(1) != nil })
	a.pass(testRetention + time.Hour)
	recent := a.millis() - 1000 // lastSyncTimestamp is one number for all maps
	p := a.device(t, 1)
	p.send(&wire.SyncInit{MapName: "rarely", LastSyncTimestamp: recent})
	expect[*wire.SyncResetRequired](p)
}

// A gateway that has heard of no owner yet waits for what they say of tombstones.
func TestTMB01_AGatewayThatJustStarted(t *testing.T) {
	a := setupAged(t, testRetention)
	p := a.device(t, 1)
	r := a.service.router
	r.mu.Lock()
	r.last, r.table = nil, nil
	r.mu.Unlock()
	p.send(&wire.SyncInit{MapName: "m", LastSyncTimestamp: a.millis() - 2*uint64(testRetention.Milliseconds())})
	expect[*wire.SyncResetRequired](p)
}

// Whether a client was away too long is read from the device where it is known, and from
// lastSyncTimestamp where it is not.
func TestResets(t *testing.T) {
	day := 24 * time.Hour
	for name, c := range map[string]struct {
		period time.Duration
		known  bool          // the device synced the map before
		away   time.Duration // since then
		since  time.Duration // how old the lastSyncTimestamp is; 0: never synced
		reset  bool
	}{
		"for ever":                {0, false, 0, 400 * day, false},
		"never synced":            {testRetention, false, 0, 0, false},
		"unknown and recent":      {testRetention, false, 0, 29 * day, false},
		"unknown and old":         {testRetention, false, 0, 31 * day, true},
		"known and recent":        {testRetention, true, 29 * day, 300 * day, false},
		"known and old":           {testRetention, true, 31 * day, time.Minute, true},
		"known, and never synced": {testRetention, true, 31 * day, 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			a := setupAged(t, c.period)
			if c.known {
				p := a.device(t, 7)
				p.synced("m", 0)
				a.leave(p)
				eventually(t, func() bool { return a.cursors(7) != nil })
			}
			a.pass(c.away)
			var since uint64
			if c.since > 0 {
				since = a.millis() - uint64(c.since.Milliseconds())
			}
			p := a.device(t, 7)
			p.send(&wire.SyncInit{MapName: "m", LastSyncTimestamp: since})
			_, reset := p.recv().(*wire.SyncResetRequired)
			if reset != c.reset {
				t.Errorf("reset %t", reset)
			}
		})
	}
}

// An op that is too old is rejected with 410, and its client gives up its copy, once.
func TestTooOldOps(t *testing.T) {
	a := setupAged(t, testRetention)
	p := a.hello(t)
	old := stamp(a.millis() - uint64((testRetention + time.Hour).Milliseconds()))
	for i := range 2 {
		p.send(&wire.OpBatch{Ops: []wire.Op{
			putOp(fmt.Sprint(4*i+1), "m", "k", "v", old), addOp(fmt.Sprint(4*i+2), "m", "k", "t", "v", old),
		}})
		for range 2 {
			if m := expect[*wire.OpRejected](p); m.Code != 410 || !strings.HasPrefix(m.Reason, "TOO_OLD: ") {
				t.Errorf("%+v", m)
			}
		}
		expect[*wire.OpAck](p)
		if i > 0 {
			break
		}
		// The roots of maps opened late, and the resets.
		seen := map[string]int{}
		for range 4 {
			switch m := p.recv().(type) {
			case *wire.SyncRespRoot:
				seen["root"]++
			case *wire.ORMapSyncRespRoot:
				seen[fmt.Sprint("or root ", m.FullResync)]++
			case *wire.SyncResetRequired:
				seen["reset"]++
			default:
				t.Fatalf("got %T", m)
			}
		}
		if seen["root"] != 1 || seen["reset"] != 1 || seen["or root true"] != 1 || seen["or root false"] != 1 {
			t.Errorf("%v", seen)
		}
	}
	p.ping()
}

// A pushed record that is too old brings a resync, and is not stored.
func TestTooOldPush(t *testing.T) {
	a := setupAged(t, testRetention)
	c := &orClient{wsClient: a.hello(t), name: "m"}
	c.init(0)
	c.settle()
	c.m.Merge("k", orRecord("t", "v", stamp(a.millis()-uint64((testRetention+time.Hour).Milliseconds()))))
	c.push([]string{"k"})
	eventually(t, func() bool { c.settle(); return c.resyncs == 1 && len(c.m.Keys()) == 0 })
	if a.partition.tag("m", "k", "t") != nil {
		t.Error("the record was stored")
	}
}

// PROTOCOL 11.4: clients forget the tombstones that the owners forgot; those that come
// later before their roots are compared, unless they were told before.
func TestGCPrune(t *testing.T) {
	a := setupAged(t, testRetention)
	p := a.hello(t)
	p.synced("m", 0)
	boundary := a.millis() - uint64(testRetention.Milliseconds())
	a.partition.pruned.Store(boundary - 1) // was so before, as far as the gateway knows
	eventually(t, func() bool { return a.service.router.retention().pruned == boundary-1 })
	asked := a.partition.called("Describe")
	eventually(t, func() bool { return a.partition.called("Describe") > asked })
	a.partition.pruned.Store(boundary)
	if m := expect[*wire.GCPrune](p); m.OlderThan.Millis != boundary || m.OlderThan.NodeID != "" {
		t.Errorf("%+v", m)
	}
	p.synced("n", 1<<50) // once is enough

	late := a.hello(t)
	late.send(&wire.SyncInit{MapName: "m", LastSyncTimestamp: a.millis() - 1000})
	if m := expect[*wire.GCPrune](late); m.OlderThan.Millis != boundary {
		t.Errorf("%+v", m)
	}
	expect[*wire.SyncRespRoot](late)
	late.synced("n", a.millis()-1000)
	late.ping()

	fresh := a.hello(t)
	fresh.synced("m", 0) // has no tombstones
	told := a.hello(t)
	told.synced("m", a.millis()+uint64(2*time.Hour.Milliseconds()))
	for _, p := range []*wsClient{p, fresh, told} {
		p.ping()
	}
}

// Only a device that came with a token and has a complete copy is written, and only so
// many unknown ones (TMB-03).
func TestDevicesAreBounded(t *testing.T) {
	a := setupAged(t, testRetention)
	stored := func() int {
		a.partition.mu.Lock()
		defer a.partition.mu.Unlock()
		return len(a.partition.maps[devicesMap])
	}
	minted := a.hello(t)
	minted.synced("m", 0)
	a.leave(minted)
	idle := a.device(t, 1)
	a.leave(idle)
	walking := a.device(t, 2)
	walking.synced("m", 0)
	a.pass(quietTime + time.Second)
	walking.send(&wire.MerkleReqBucket{MapName: "m"}) // it is not done
	expect[*wire.SyncRespBuckets](walking)
	_ = walking.conn.Close()
	eventually(t, func() bool { n, _ := a.service.sockets.count(); return n == 0 })
	devices := a.service.sockets.devices
	devices.flush(t.Context())
	if n := stored(); n != 0 {
		t.Errorf("%d devices stored", n)
	}

	for _, c := range []struct {
		tokens float64
		want   int
	}{{0, 0}, {3, 3}, {10, 13}} {
		devices.mu.Lock()
		devices.tokens, devices.filled = c.tokens, a.partition.now().Add(time.Hour)
		devices.mu.Unlock()
		for i := range 10 {
			devices.add(fmt.Sprintf("%032x", 100*int(c.tokens)+i), cursors{"m": a.millis()})
		}
		devices.flush(t.Context())
		if n := stored(); n != c.want {
			t.Errorf("%d devices stored with room for %v, want %d", n, c.tokens, c.want)
		}
	}
}

// A device is written again when a cursor moved by more than R/20, and never back.
func TestCursorsMove(t *testing.T) {
	a := setupAged(t, testRetention)
	p := a.device(t, 1)
	p.synced("m", 0)
	a.leave(p)
	eventually(t, func() bool { return a.cursors(1) != nil })
	first := a.cursors(1)["m"]
	visit := func(pause time.Duration) uint64 {
		a.pass(pause)
		p := a.device(t, 1)
		p.synced("m", a.millis())
		p.synced("n", 0)
		a.leave(p)
		a.service.sockets.devices.flush(t.Context())
		return a.cursors(1)["m"]
	}
	if got := visit(time.Hour); got < first || a.cursors(1)["n"] == 0 {
		t.Errorf("a map more: m at %d, %v", got, a.cursors(1))
	}
	second := a.cursors(1)["m"]
	if got := visit(time.Hour); got != second {
		t.Errorf("moved from %d to %d after an hour", second, got)
	}
	if got := visit(48 * time.Hour); got < second+uint64((47*time.Hour).Milliseconds()) {
		t.Errorf("moved from %d to %d after two days", second, got)
	}
	id, _, _ := strings.Cut(token(1), ".")
	last := a.cursors(1)["m"]
	a.pass(time.Second) // the record needs a stamp of its own
	a.service.sockets.devices.add(id, cursors{"m": 5, "o": a.millis()})
	a.service.sockets.devices.flush(t.Context())
	if c := a.cursors(1); c["m"] != last || c["o"] == 0 {
		t.Errorf("cursors %v", c)
	}
	if ttl := a.partition.record(devicesMap, id).GetTtlMillis(); ttl != uint64(cursorLife*testRetention.Milliseconds()) {
		t.Errorf("ttl %d", ttl)
	}
}

// A session that is told of every change stays complete; one that missed some does not.
func TestCompleteWhileTold(t *testing.T) {
	a := setupAged(t, testRetention)
	p := a.device(t, 1)
	p.synced("m", 0)
	s := a.service.sockets.snapshot()[0]
	at := func() uint64 { return s.complete(testRetention)["m"] }
	if got := at(); got != 0 {
		t.Errorf("complete at %d right after the root", got)
	}
	a.answered(p)
	var rooted uint64
	for range 4 { // PINGs keep the session alive
		a.pass(quietTime + 25*time.Second)
		p.ping()
		if rooted == 0 {
			rooted = at()
		}
	}
	if got := at(); got <= rooted || got > a.millis()-uint64(maxCursorMargin.Milliseconds()) {
		t.Errorf("complete at %d, now %d", got, a.millis())
	}
	s.mu.Lock()
	s.behind = true
	s.mu.Unlock()
	before := at()
	a.pass(30 * time.Second)
	p.ping()
	if got := at(); got != before {
		t.Errorf("moved from %d to %d although changes were missed", before, got)
	}
}

func TestCursorsCodec(t *testing.T) {
	want := cursors{"m": 5, orCursor + "m": 1 << 45, "n": 0}
	got := decodeCursors(want.encode())
	if len(got) != 3 || got["m"] != 5 || got[orCursor+"m"] != 1<<45 {
		t.Errorf("%v", got)
	}
	for _, bad := range [][]byte{nil, {0xc0}, {0x81, 0xa1}, {0x81, 0xa1, 'm'}, {0x81, 0xa1, 'm', 0xc0}, {0x81, 0xdb, 0xff, 0xff, 0xff, 0xff}, {0xdf, 0xff, 0xff, 0xff, 0xff}} {
		if c := decodeCursors(bad); len(c) != 0 {
			t.Errorf("% x became %v", bad, c)
		}
	}
	many := cursors{}
	for i := range maxCursors + 10 {
		many[fmt.Sprint("m", i)] = uint64(i + 1)
	}
	if merged := (cursors{"new": 1 << 40}).merge(many); len(merged) != maxCursors || merged["new"] == 0 || merged["m5"] != 0 {
		t.Errorf("%d cursors, new %d", len(merged), merged["new"])
	}
}

func TestRetentionOfSeveralOwners(t *testing.T) {
	describe := func(period, pruned uint64) *partitionv1.DescribeResponse {
		return &partitionv1.DescribeResponse{TombstoneRetentionMillis: period, PrunedBeforeMillis: pruned}
	}
	k := retention{}.and(describe(5000, 70), true).and(describe(3000, 90), false).and(describe(0, 80), false)
	if k.period != 3*time.Second || k.pruned != 70 {
		t.Errorf("%+v", k)
	}
	if k := (retention{}).and(describe(1<<63, 0), true); k.period < 0 || cursorLife*k.period < 0 {
		t.Errorf("%+v", k)
	}
}
