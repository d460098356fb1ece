package gateway

import (
	"cmp"
	"context"
	"encoding/hex"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/msgval"
	"github.com/topgun-sync/topgun/core/wire"
)

// Tombstones are forgotten when they are older than the owners' retention R. A client
// whose copy of a map is older than that would keep, or bring back, what was deleted, so
// it must give its copy up (PROTOCOL 8.4, 9.4, 22.5). Its lastSyncTimestamp does not say
// how old the copy is: it is one number for all maps, and set before any record arrived
// (PROTOCOL 22.3). So the server remembers, per device and map, when the copy was last
// known to be complete: a record of the internal map "$devices", which gateways read when
// a device comes and write when it leaves.
//
// A device is who presents a token that names it. Anybody can make up such a token, so
// what is written is bounded: only devices that came with a token and whose copy of some
// map was complete, only newDeviceRate of unknown ones, and none once there are
// maxDevices; the records expire. What is not written, or lost, costs a reset that was
// not needed, or falls back to lastSyncTimestamp.

const (
	devicesMap = "$devices"
	// orCursor begins the cursor of an OR-map, and no name of a map.
	orCursor = "/or/"
	// firstWritten is beside the cursors of a device, and no name of a map: when it became
	// known. A map of a known device that has no cursor was last complete before that, if
	// it ever was.
	firstWritten = "/first"
	// quietTime from the last answer of a sync until the client's last word, without a
	// bucket request in between, says that its copy is as the root: it found it equal, or
	// its walk is over. A client that asks no more because it is gone says nothing either.
	quietTime = 5 * time.Second
	// maxCursorMargin is subtracted from the last word of a client that was told of every
	// change: what was sent to it shortly before may never have arrived.
	maxCursorMargin = time.Minute
	// cursorSteps is the part of R by which a cursor has moved to be worth a write.
	cursorSteps = 20
	// cursorLife is how many R a record of a device lasts.
	cursorLife = 4
	// maxCursors bounds the cursors of a device.
	maxCursors = 1000
	// deviceRound is how often the devices of long sessions are looked at.
	deviceRound = 10 * time.Minute
	// maxDevices, newDeviceRate per second and newDeviceBurst bound the devices that are
	// written, and maxDeviceQueue those that wait for it.
	maxDevices     = 1_000_000
	newDeviceRate  = 20
	newDeviceBurst = 10_000
	maxDeviceQueue = 16_384
)

const (
	deviceIDBytes     = 16
	deviceSecretBytes = 32
)

// identify gives the session a device identity: the one that the token names if it has
// the form of ours, else one of its own. A token is never refused (PROTOCOL 3.2). It
// is no proof of anything: it names a device, unguessably, and grants nothing.
func (s *session) identify(token string) {
	if id, secret, ok := strings.Cut(token, "."); ok && isHex(id, deviceIDBytes) && isHex(secret, deviceSecretBytes) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if id != s.deviceID {
			s.device = &device{presented: true}
		}
		s.deviceID, s.devToken = strings.Clone(id), strings.Clone(token)
		return
	}
	if s.deviceID != "" {
		return
	}
	var random [deviceIDBytes + deviceSecretBytes]byte
	s.k.randomBytes(random[:])
	s.mu.Lock()
	defer s.mu.Unlock()
	s.device = &device{}
	s.deviceID = hex.EncodeToString(random[:deviceIDBytes])
	s.devToken = s.deviceID + "." + hex.EncodeToString(random[deviceIDBytes:])
}

func isHex(text string, bytes int) bool {
	return len(text) == 2*bytes && strings.IndexFunc(text, func(c rune) bool {
		return (c < '0' || c > '9') && (c < 'a' || c > 'f')
	}) < 0
}

// device is what is known of a session's device. The session's mu guards it.
type device struct {
	presented bool          // the client named it, so it may be known
	loading   chan struct{} // closed when cursors were read; nil until they are asked for
	cursors   cursors       // as they were read or written last
}

// cursors say for each map when a copy of it was last known to be complete, in Unix ms.
type cursors map[string]uint64

func cursorName(of mapKind, name string) string {
	if of == kindOR {
		return orCursor + name
	}
	return name
}

// progress is how far a client's copy of a map is. The session's mu guards it.
type progress struct {
	root  int64  // when the reading of the last root began, in Unix nanoseconds; 0: none was sent
	asked int64  // when the root was made, or the client last asked for a bucket
	done  uint64 // when the copy was last known to be complete, in Unix ms
}

// rooted notes that the root of a tree is being sent.
func (s *session) rooted(of mapKind, name string, t *tree) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if seen := s.maps[name]; seen != nil {
		p := &seen.of(of).copied
		p.root, p.asked = t.began.UnixNano(), s.k.now().UnixNano()
	}
}

// awayTooLong reports whether the client of a SYNC_INIT was away for longer than
// tombstones are kept.
func (s *session) awayTooLong(ctx context.Context, j job) bool {
	if j.since == 0 || j.blank {
		return false
	}
	kept, err := s.k.router.knownRetention(ctx)
	if err != nil || kept.period == 0 {
		return false // without owners the reads that follow fail as well
	}
	last := j.since
	known := s.cursors(ctx)
	if cursor, ok := known[cursorName(j.of, j.name)]; ok {
		last = cursor
	} else if first, ok := known[firstWritten]; ok {
		last = min(last, first)
	}
	limit := s.k.now().Add(-kept.period).UnixMilli()
	return limit > 0 && last < uint64(limit)
}

// cursors returns what is known of the session's device, reading it the first time.
func (s *session) cursors(ctx context.Context) cursors {
	s.mu.Lock()
	d, id := s.device, s.deviceID
	if d == nil || !d.presented {
		s.mu.Unlock()
		return nil
	}
	if loading := d.loading; loading != nil {
		s.mu.Unlock()
		select {
		case <-loading:
		case <-ctx.Done():
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		return d.cursors
	}
	loading := make(chan struct{})
	d.loading = loading
	s.mu.Unlock()
	defer close(loading)
	read, err := s.k.devices.read(ctx, []string{id})
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		d.loading = nil // the next map tries again; reading this one will fail as well
		return nil
	}
	d.cursors = read[id]
	return d.cursors
}

// pruneFirst has a client that synced before some tombstones were forgotten forget them
// too, before it compares roots: with them its root would differ for ever (PROTOCOL 22.5).
// A client that synced when the boundary was as high as it is was told then.
func (s *session) pruneFirst(since uint64) {
	kept := s.k.router.retention()
	known := kept.pruned + uint64(kept.period.Milliseconds()) + pruneLag(kept.period)
	if since == 0 || kept.pruned == 0 || since > known {
		return
	}
	s.mu.Lock()
	told := s.prunedTo >= kept.pruned
	s.prunedTo = max(s.prunedTo, kept.pruned)
	s.mu.Unlock()
	if !told {
		s.sendSync(gcPrune(kept.pruned))
	}
}

// pruneLag is how long, in ms, it may take until a boundary that time has reached is told
// to clients. One that is told later costs a client that synced in between a walk.
func pruneLag(period time.Duration) uint64 {
	return uint64(min(5*time.Minute, period/20).Milliseconds())
}

func gcPrune(before uint64) *wire.GCPrune {
	return &wire.GCPrune{OlderThan: hlc.Timestamp{Millis: before}}
}

// resetOnce has the session give up its copy of a map, once.
func (s *session) resetOnce(name string, of mapKind) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing != nil {
		return
	}
	seen, ok := s.interestLocked(name)
	if !ok || seen.of(of).reset {
		return
	}
	seen.of(of).reset = true
	s.jobs = append(s.jobs, job{kind: jobReset, of: of, name: strings.Clone(name)}) // one per map at most
	s.startWorkersLocked()
}

// sendReset has the client give up its copy of a map and fetch it anew.
func (s *session) sendReset(ctx context.Context, of mapKind, name string) error {
	s.mu.Lock()
	if seen := s.maps[name]; seen != nil {
		seen.of(of).copied = progress{}
	}
	s.mu.Unlock()
	if of != kindOR {
		s.sendSync(&wire.SyncResetRequired{
			MapName: name, Reason: "TOO_OLD: this copy is older than deletions are remembered; fetch the map anew",
		})
		return nil
	}
	t, err := s.k.trees.fresh(ctx, of, name, s.combining())
	if err != nil {
		return err
	}
	s.rooted(of, name, t)
	s.sendSync(&wire.ORMapSyncRespRoot{
		MapName: name, RootHash: t.Root(), FullResync: true,
		Timestamp: hlc.Timestamp{Millis: t.state.nowMillis, NodeID: serverNode},
	})
	return nil
}

// complete returns, for the maps of a session whose copy is known to have been complete at
// some time, when that was last.
func (s *session) complete(period time.Duration) cursors {
	s.mu.Lock()
	names := slices.Collect(maps.Keys(s.maps))
	s.mu.Unlock()
	steady := make(map[string]bool, len(names))
	for _, name := range names {
		steady[name] = s.k.hub.steady(name)
	}
	margin := min(maxCursorMargin, period/cursorSteps).Milliseconds()
	word := s.reader.seen.Load()
	heard := max(0, word/int64(time.Millisecond)-margin)
	found := make(cursors)
	s.mu.Lock()
	defer s.mu.Unlock()
	answered := !s.cut && (s.closing != nil || !s.answeringLocked())
	told := !s.behind && s.out.events == 0
	for name, seen := range s.maps {
		for _, of := range []mapKind{kindLWW, kindOR} {
			p := &seen.of(of).copied
			if p.root != 0 && answered && word-max(p.asked, s.out.synced) >= int64(quietTime) {
				at := p.root / int64(time.Millisecond)
				if told && steady[name] && !s.owed[name] {
					at = max(at, heard)
				}
				p.done = max(p.done, uint64(max(0, at)))
			}
			if p.done > 0 {
				found[cursorName(of, name)] = p.done
			}
		}
	}
	return found
}

// answeringLocked reports whether something that a sync asked for is still to be sent.
func (s *session) answeringLocked() bool {
	return len(s.jobs) > 0 || s.workers > 0 || s.out.syncBytes > 0 || s.out.syncing
}

// moved reports whether some cursor is so far above the known one that it is worth a
// write.
func (c cursors) moved(known cursors, period time.Duration) bool {
	step := uint64(period.Milliseconds() / cursorSteps)
	for name, at := range c {
		if have, ok := known[name]; !ok || at > have+step {
			return true
		}
	}
	return false
}

// merge adds the newer cursors of another; two sessions of a device share its copies. The
// newest stay when there are too many.
func (c cursors) merge(other cursors) cursors {
	merged := make(cursors, len(c)+len(other))
	maps.Copy(merged, c)
	for name, at := range other {
		merged[name] = max(merged[name], at)
	}
	if len(merged) > maxCursors {
		names := slices.SortedFunc(maps.Keys(merged), func(a, b string) int { return cmp.Compare(merged[a], merged[b]) })
		names = slices.DeleteFunc(names, func(name string) bool { return name == firstWritten })
		for _, name := range names[:len(merged)-maxCursors] {
			delete(merged, name)
		}
	}
	return merged
}

// encode makes the value of a device's record: a msgpack map from names to times.
func (c cursors) encode() []byte {
	value := msgval.AppendMapHeader(nil, len(c))
	for _, name := range slices.Sorted(maps.Keys(c)) {
		value = msgval.AppendUint(msgval.AppendString(value, name), c[name])
	}
	return value
}

func decodeCursors(value []byte) cursors {
	head, ok := msgval.ReadHead(value)
	if !ok || head.Kind != msgval.MapKind || head.Values() > 2*maxCursors {
		return nil
	}
	c := make(cursors)
	rest := value[head.Size:]
	for range head.Values() / 2 {
		name, ok := msgval.ReadHead(rest)
		if !ok || name.Kind != msgval.StrKind || name.N > uint64(len(rest)-name.Size) {
			return nil
		}
		text := string(rest[name.Size : name.Size+int(name.N)])
		rest = rest[name.Size+int(name.N):]
		at, ok := msgval.ReadHead(rest)
		if !ok || at.Kind != msgval.UintKind {
			return nil
		}
		c[text] = at.Num
		rest = rest[at.Size:]
	}
	return c
}

// devices writes what is known of devices.
type devices struct {
	k    *sockets
	kick chan struct{} // something is in queue

	mu    sync.Mutex
	queue map[string]cursors // by device
	busy  chan struct{}      // closed when all is written; nil while nothing is queued

	// Of the writing goroutine alone.
	tokens float64 // of newDeviceRate
	filled time.Time
}

func newDevices(k *sockets) *devices {
	return &devices{k: k, kick: make(chan struct{}, 1), queue: make(map[string]cursors), tokens: newDeviceBurst}
}

// look queues a session's device if its cursors moved. It is called when the session
// ends, and now and then before.
func (d *devices) look(s *session) {
	period := d.k.router.retention().period
	if period == 0 {
		return
	}
	s.mu.Lock()
	id, known := s.deviceID, s.device
	s.mu.Unlock()
	if known == nil || !known.presented {
		return // it may never come again
	}
	found := s.complete(period)
	s.mu.Lock()
	moved := found.moved(known.cursors, period)
	if moved {
		known.cursors = known.cursors.merge(found)
	}
	s.mu.Unlock()
	if moved {
		d.add(id, found)
	}
}

func (d *devices) add(id string, found cursors) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.queue[id] == nil && len(d.queue) >= maxDeviceQueue {
		return
	}
	if d.busy == nil {
		d.busy = make(chan struct{})
	}
	d.queue[id] = d.queue[id].merge(found)
	notify(d.kick)
}

// run writes what is queued until ctx ends.
func (d *devices) run(ctx context.Context) {
	ticker := time.NewTicker(deviceRound)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			for _, s := range d.k.snapshot() {
				d.look(s)
			}
			continue
		case <-d.kick:
		}
		for more := true; more; {
			more = d.writeSome(ctx)
		}
	}
}

// flush waits until everything queued is written, or ctx ends.
func (d *devices) flush(ctx context.Context) {
	d.mu.Lock()
	busy := d.busy
	d.mu.Unlock()
	if busy == nil {
		return
	}
	select {
	case <-busy:
	case <-ctx.Done():
	}
}

// writeSome writes some queued devices, and reports whether there are more.
func (d *devices) writeSome(ctx context.Context) bool {
	d.mu.Lock()
	batch := make(map[string]cursors, getKeys)
	for id, found := range d.queue {
		if len(batch) == getKeys {
			break
		}
		batch[id] = found
		delete(d.queue, id)
	}
	d.mu.Unlock()
	if err := d.write(ctx, batch); err != nil && ctx.Err() == nil {
		d.k.log.Warn("how far devices are was not noted", "devices", len(batch), "error", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.queue) > 0 {
		return ctx.Err() == nil
	}
	if d.busy != nil {
		close(d.busy)
		d.busy = nil
	}
	return false
}

func (d *devices) read(ctx context.Context, ids []string) (map[string]cursors, error) {
	records, err := d.k.router.Get(ctx, kindLWW, devicesMap, ids)
	if err != nil {
		return nil, err
	}
	found := make(map[string]cursors, len(records))
	for i := range records {
		if !records[i].Record.Deleted() {
			found[records[i].Key] = decodeCursors(records[i].Record.Value)
		}
	}
	return found, nil
}

func (d *devices) write(ctx context.Context, batch map[string]cursors) error {
	if len(batch) == 0 {
		return nil
	}
	period := d.k.router.retention().period
	if period == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, d.k.cfg.ApplyTimeout)
	defer cancel()
	known, err := d.read(ctx, slices.Collect(maps.Keys(batch)))
	if err != nil {
		return err
	}
	room := 0
	if len(known) < len(batch) {
		if room, err = d.roomFor(ctx, len(batch)-len(known)); err != nil {
			return err
		}
	}
	now := d.k.clock()
	ops := make([]wire.Op, 0, len(batch))
	for id, found := range batch {
		have, ok := known[id]
		if !ok {
			if room == 0 {
				continue
			}
			room--
			have = cursors{firstWritten: now.Millis}
		} else if !found.moved(have, period) {
			continue
		}
		ops = append(ops, wire.Op{
			MapName: devicesMap, Key: id, Kind: wire.OpPut,
			Record: lwwmap.Record{
				Value: have.merge(found).encode(), Timestamp: now, TTLMillis: uint64(cursorLife * period.Milliseconds()),
			},
		})
	}
	for _, result := range d.k.router.Apply(ctx, "", "", ops) {
		if result.status == opUnavailable || result.status == opRejected {
			return fixedError(result.reason)
		}
	}
	return nil
}

// roomFor returns how many of n unknown devices may be written now.
func (d *devices) roomFor(ctx context.Context, n int) (int, error) {
	state, err := d.k.router.Leaves(ctx, kindLWW, devicesMap, merkle.Mixed)
	if err != nil {
		return 0, err
	}
	if state.records >= maxDevices {
		return 0, nil
	}
	now := d.k.now()
	if passed := now.Sub(d.filled); passed > 0 {
		d.tokens = min(newDeviceBurst, d.tokens+passed.Seconds()*newDeviceRate)
		d.filled = now
	}
	n = min(n, int(d.tokens))
	d.tokens -= float64(n)
	return n, nil
}

// prune has every session forget tombstones from before a time.
func (k *sockets) prune(before uint64) {
	bytes := compile(gcPrune(before))
	for _, s := range k.snapshot() {
		s.mu.Lock()
		if s.ready && !s.out.shut() && s.prunedTo < before {
			s.prunedTo = before
			k.meters.sentType(outOther)
			s.pushLocked(bulk, frame{bytes: bytes})
			s.startWriterLocked()
		}
		s.mu.Unlock()
	}
}

// clock is a reading of the gateway's clock.
func (k *sockets) clock() hlc.Timestamp {
	return hlc.Timestamp{Millis: uint64(max(k.now().UnixMilli(), 0)), NodeID: serverNode}
}
