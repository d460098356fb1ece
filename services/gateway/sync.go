package gateway

import (
	"context"
	"strings"
	"time"

	"github.com/gobwas/ws"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/wire"
)

const (
	// syncWorkers is how many sync requests of one session are answered at once, so
	// that a large map does not hold up a small one.
	syncWorkers = 2
	// maxJobs bounds the sync requests of one session that wait. A client walking a
	// map asks for all children of a level at once, up to 4,096 (PROTOCOL 8.2); above
	// the bound its reading waits, a PING with it, for as long as answers are stuck
	// behind a client that does not read them.
	maxJobs = 8192
	// pushBytes is about the size of a frame of records: large enough to cost little,
	// small enough that a PONG behind it is not late.
	pushBytes = 128 << 10
	// pushRecords bounds the records of a page, whose overhead pushBytes leaves out.
	pushRecords = 2000
	// leavesAtOnce is how many leaves of one parent are read in one call when a client
	// asked for them in a row, as it does in a cold walk.
	leavesAtOnce = 16
)

// job is a request that waits for a worker.
type job struct {
	kind jobKind
	of   mapKind
	name string
	// paths of jobBuckets: one; or several leaves with the same parent.
	paths []string
	// since is the lastSyncTimestamp of jobInit, and blank says that the client has no
	// record of the map.
	since uint64
	blank bool
	// do is a jobCall.
	do func(ctx context.Context) error
	// after is closed when the ops that came before the request are answered: what is
	// read for the client then holds its own ops, or its root would differ only
	// because they were on their way. Nil does not wait.
	after <-chan struct{}
	// frame is the message that the job keeps, if it does.
	frame inbound
}

// inbound is a message that has arrived: its size, and what it holds of the budget of
// sockets.inbound.
type inbound struct {
	size int
	held int64
}

// keep returns the frame for a job to keep, and leaves nothing of it to give back.
func (f *inbound) keep() inbound {
	kept := *f
	f.held = 0
	return kept
}

type jobKind uint8

const (
	jobInit    jobKind = iota // SYNC_INIT, ORMAP_SYNC_INIT: push what arrived, then the root
	jobBuckets                // MERKLE_REQ_BUCKET, ORMAP_MERKLE_REQ_BUCKET
	jobRoot                   // an unsolicited root, for the first op or query on a map
	jobOwed                   // what changed while changes may have been missed
	jobReset                  // the client is to give up its copy of the map
	jobMerge                  // ORMAP_PUSH_DIFF that wait, see pushes
	jobCall                   // something else that reads the owners
)

// syncRequested takes a SYNC_INIT or ORMAP_SYNC_INIT. blank says that the client has no
// record of the map.
func (s *session) syncRequested(of mapKind, name string, since uint64, blank bool) error {
	if err := wire.CheckMapName(name); err != nil {
		return s.refuse(err)
	}
	s.mu.Lock()
	seen, ok := s.interestLocked(name)
	if ok {
		shown := seen.of(of)
		shown.looks, shown.synced = true, true
	}
	after := s.ops.tail
	s.mu.Unlock()
	if !ok {
		return s.decline(tooManyMaps)
	}
	return s.addJob(job{kind: jobInit, of: of, name: strings.Clone(name), since: since, blank: blank, after: after})
}

// bucketRequested takes a MERKLE_REQ_BUCKET or ORMAP_MERKLE_REQ_BUCKET. It shows that the
// client has the map open: it had a root that it did not ask for, after a query (see
// probe), or looks by itself. From here on the session is told of changes.
func (s *session) bucketRequested(of mapKind, name, path string) error {
	if err := wire.CheckMapName(name); err != nil {
		return s.refuse(err)
	}
	if _, _, ok := merkle.LeafRange(path); !ok {
		return s.refuse(&wire.Error{Name: wire.BadMessage, Code: 400, Text: "path: want 0 to 3 lowercase hex digits"})
	}
	s.mu.Lock()
	if seen, ok := s.interestLocked(name); ok { // else it is answered, and not told of changes
		shown := seen.of(of)
		shown.copied.asked = s.reader.seen.Load()
		shown.looks = true
		shown.rooted = true // or it would not ask
	}
	s.mu.Unlock()
	return s.addJob(job{kind: jobBuckets, of: of, name: strings.Clone(name), paths: []string{strings.Clone(path)}})
}

// owe has the session be told anew of a map or counter that it may have missed changes
// of.
func (s *session) owe(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.oweLocked(name)
	if s.out.events == 0 {
		s.startWorkersLocked()
	} // else the writer does when it has written them
}

func (s *session) oweLocked(name string) {
	if s.closing != nil || !s.watchesLocked(name) {
		return
	}
	if s.owed == nil {
		s.owed = make(map[string]bool)
	}
	s.owed[name] = true
}

// watchesLocked reports whether the session looks at a name, as the hub has it.
func (s *session) watchesLocked(name string) bool {
	if counter, ok := counterOf(name); ok {
		_, watches := s.counters[counter]
		return watches
	}
	return s.maps[name] != nil
}

// addJob queues a job, waiting while too many do, or those that wait keep too much.
func (s *session) addJob(j job) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.closing == nil && (len(s.jobs) >= maxJobs ||
		j.frame.size > 0 && s.jobBytes > 0 && s.jobBytes+j.frame.size > s.k.cfg.MaxMessageBytes) {
		s.room.Wait()
	}
	if s.closing != nil {
		s.k.inbound.give(j.frame.held)
		return nil
	}
	s.jobBytes += j.frame.size
	s.jobs = append(s.jobs, j)
	s.startWorkersLocked()
	return nil
}

// doneLocked gives back what a job kept.
func (s *session) doneLocked(j job) {
	s.jobBytes -= j.frame.size
	s.k.inbound.give(j.frame.held)
	if j.frame.size > 0 {
		s.room.Broadcast()
	}
}

// dropJobsLocked drops the jobs that wait.
func (s *session) dropJobsLocked() {
	for _, j := range s.jobs {
		s.doneLocked(j)
	}
	s.jobs = nil
}

func (s *session) startWorkersLocked() {
	waiting := len(s.jobs)
	if s.out.events == 0 {
		waiting += len(s.owed) + len(s.owedQueries)
	}
	if waiting > 0 && s.workers < syncWorkers && s.spawnLocked(s.work) {
		s.workers++
	}
}

// work does jobs until none waits.
func (s *session) work() {
	for {
		j, ok := s.nextJob()
		if !ok {
			return
		}
		var err error
		if s.waitFor(j.after) {
			err = s.do(j)
		}
		s.mu.Lock()
		s.doneLocked(j)
		s.mu.Unlock()
		if err != nil && s.ctx.Err() == nil {
			// The client does not ask again before it connects again (PROTOCOL 8).
			s.send(urgent, &wire.ErrorMessage{Code: 503, Message: "UNAVAILABLE: the map cannot be read; connect again"})
			s.beginClose(closeTryLater)
		}
	}
}

func (s *session) do(j job) error {
	switch j.kind {
	case jobInit:
		return s.answerInit(j) // a push may take long; each of its reads is bounded
	case jobMerge:
		return s.mergePushes() // waits for ops first
	}
	ctx, cancel := context.WithTimeout(s.ctx, s.k.cfg.ReadTimeout)
	defer cancel()
	switch j.kind {
	case jobBuckets:
		if err := s.joinFirst(j.name, j.of); err != nil {
			return err
		}
		return s.answerBuckets(ctx, j)
	case jobRoot:
		if err := s.join(j.name, setOf(j.of)); err != nil {
			return err
		}
		return s.sendRoot(ctx, j.of, j.name)
	case jobOwed:
		return s.tellAnew(ctx, j.name)
	case jobReset:
		return s.sendReset(ctx, j.of, j.name)
	default:
		return j.do(ctx)
	}
}

// tellAnew sends what makes up for changes of a name that the session may have missed: a
// root of each map of that name that it looks at, or the state of a counter.
func (s *session) tellAnew(ctx context.Context, name string) error {
	if counter, ok := counterOf(name); ok {
		return s.sendCounter(ctx, counter)
	}
	s.mu.Lock()
	var looks kinds
	if seen := s.maps[name]; seen != nil {
		looks = seen.kinds()
	}
	s.mu.Unlock()
	if err := s.join(name, looks); err != nil {
		return err
	}
	for _, of := range []mapKind{kindLWW, kindOR} {
		if looks.has(of) {
			if err := s.sendRoot(ctx, of, name); err != nil {
				return err
			}
		}
	}
	return nil
}

// nextJob takes the next job. When there is none it returns false, and the goroutine
// that called it is no longer a worker.
func (s *session) nextJob() (job, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing != nil {
		s.workers--
		return job{}, false
	}
	if s.out.events == 0 {
		for name := range s.owed {
			// No longer owed before it is read: a change from here on is delivered,
			// one from before is in the root.
			delete(s.owed, name)
			return job{kind: jobOwed, name: name}, true
		}
		if subs := s.takeOwedQueriesLocked(); len(subs) > 0 {
			return job{kind: jobCall, do: func(context.Context) error {
				s.k.hub.queries.refresh(subs)
				return nil
			}}, true
		}
	}
	if len(s.jobs) == 0 {
		s.jobs, s.workers = nil, s.workers-1
		return job{}, false
	}
	j := s.jobs[0]
	n := 1
	if j.kind == jobBuckets && len(j.paths[0]) == merkle.Depth {
		parent := j.paths[0][:merkle.Depth-1]
		for ; n < len(s.jobs) && n < leavesAtOnce; n++ {
			next := s.jobs[n]
			if next.kind != jobBuckets || next.of != j.of || next.name != j.name || len(next.paths[0]) != merkle.Depth ||
				!strings.HasPrefix(next.paths[0], parent) {
				break
			}
			j.paths = append(j.paths, next.paths[0])
		}
	}
	clear(s.jobs[:n])
	s.jobs = s.jobs[n:]
	s.room.Broadcast()
	s.startWorkersLocked()
	return j, true
}

// waitFor waits until done is closed; false means that the session ended first.
func (s *session) waitFor(done <-chan struct{}) bool {
	if done == nil {
		return true
	}
	select {
	case <-done:
		return true
	case <-s.ctx.Done():
		return false
	}
}

func (s *session) join(name string, of kinds) error {
	ctx, cancel := context.WithTimeout(s.ctx, s.k.cfg.ReadTimeout)
	defer cancel()
	if err := s.k.hub.join(ctx, s, name, of); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if seen := s.maps[name]; seen != nil {
		seen.lww.joined = seen.lww.joined || of.has(kindLWW)
		seen.or.joined = seen.or.joined || of.has(kindOR)
	}
	return nil
}

// joinFirst has the session told of the changes of a map whose buckets it asks for,
// before they are read.
func (s *session) joinFirst(name string, of mapKind) error {
	s.mu.Lock()
	seen := s.maps[name]
	joined := seen == nil || seen.of(of).joined
	s.mu.Unlock()
	if joined {
		return nil
	}
	return s.join(name, setOf(of))
}

// answerInit answers a SYNC_INIT or ORMAP_SYNC_INIT: first the records that arrived since
// the client last synced, then the root. A client that merged them finds its root equal and is done,
// after one round trip; if it is not equal, it walks the tree. The tree is the proof
// and time only the shortcut: lastSyncTimestamp says little about a particular map
// (PROTOCOL 22.3), and a wrong one costs bytes, never data. A client that was away longer
// than tombstones are kept gets neither: it must give up its copy (PROTOCOL 22.5).
func (s *session) answerInit(j job) error {
	if err := s.join(j.name, setOf(j.of)); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(s.ctx, s.k.cfg.ReadTimeout)
	defer cancel()
	if s.awayTooLong(ctx, j) {
		return s.sendReset(ctx, j.of, j.name)
	}
	s.pruneFirst(j.since)
	// Arrivals may be seconds ahead of the wall clock after a restart; a time further
	// ahead than any of ours explains nothing, and leaves the root alone to speak.
	start := uint64(max(0, s.k.now().UnixMilli()))
	if j.since <= start+uint64(hlc.MaxDrift.Milliseconds()) {
		if err := s.k.pushes.Acquire(s.ctx, 1); err != nil {
			return err
		}
		pushed, err := s.push(j, start)
		s.k.pushes.Release(1)
		if err != nil {
			return err
		}
		if !s.letMerge(pushed) {
			return context.Canceled
		}
	}
	ctx, cancel = context.WithTimeout(s.ctx, s.k.cfg.ReadTimeout)
	defer cancel()
	return s.sendRoot(ctx, j.of, j.name)
}

const (
	// mergeBase and mergePerRecord are what a client gets to merge a push before the
	// root follows; maxMerge bounds it. The TypeScript client handles frames in
	// order but awaits its storage between records, so a root right behind the records
	// meets an unfinished tree and starts a walk that fetches them again. Measured with
	// that client: 3 records and a root in one write cost a walk nearly every time. A
	// slower client walks, which costs bytes only.
	mergeBase      = 5 * time.Millisecond
	mergePerRecord = 2 * time.Microsecond
	maxMerge       = 500 * time.Millisecond
)

// letMerge waits while the client merges the records pushed to it; false means that the
// session ended.
func (s *session) letMerge(records int) bool {
	if records == 0 {
		return true
	}
	timer := time.NewTimer(min(mergeBase+time.Duration(records)*mergePerRecord, maxMerge))
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-s.ctx.Done():
		return false
	}
}

// maxCounter is above every counter of an arrival within a millisecond.
const maxCounter = 1 << 53

// push sends the records that arrived after a time, 0 meaning all, up to the time at
// which the push began: what arrives later comes as an event. It returns how many.
func (s *session) push(j job, start uint64) (pushed int, err error) {
	var after hlc.Timestamp
	if j.since > 0 && !j.blank { // a client that has nothing gets all, however it came by its time
		after = hlc.Timestamp{Millis: j.since, Counter: maxCounter}
	}
	removed := keyed{}
	for {
		ctx, cancel := context.WithTimeout(s.ctx, s.k.cfg.ReadTimeout)
		p, err := s.k.router.Since(ctx, j.of, j.name, after, pushRecords, pushBytes)
		cancel()
		if err != nil {
			return pushed, err
		}
		sent := true
		if j.of == kindOR {
			sent = s.sendDiff(j.name, p.records)
			for _, r := range p.records {
				if r.Record.Deleted() {
					removed = r
				}
			}
		} else if len(p.records) > 0 {
			sent = s.sendLeaf(j.name, "", p.records)
		}
		if !sent {
			return pushed, context.Canceled
		}
		pushed += len(p.records)
		if !p.more || p.covered.Millis > start {
			if removed.tag != "" {
				s.sendRemoval(j.name, removed)
			}
			return pushed, nil
		}
		after = p.covered
	}
}

// sendRoot sends a root that is read after the call.
func (s *session) sendRoot(ctx context.Context, of mapKind, name string) error {
	t, err := s.k.trees.fresh(ctx, of, name, s.combining())
	if err != nil {
		return err
	}
	s.rooted(of, name, t)
	now := hlc.Timestamp{Millis: t.state.nowMillis, NodeID: serverNode}
	if of == kindOR {
		s.sendSync(&wire.ORMapSyncRespRoot{MapName: name, RootHash: t.Root(), Timestamp: now})
	} else {
		s.sendSync(&wire.SyncRespRoot{MapName: name, RootHash: t.Root(), Timestamp: now})
	}
	return nil
}

// answerBuckets answers a bucket request, or several for leaves of one parent. A path
// with nothing below gets an empty answer: silence would leave the client waiting.
func (s *session) answerBuckets(ctx context.Context, j job) error {
	if path := j.paths[0]; len(path) < merkle.Depth {
		t, err := s.k.trees.recent(ctx, j.of, j.name, s.combining())
		if err != nil {
			return err
		}
		digits, hashes, _ := t.Buckets(path) // the path was checked when it came
		buckets := make([]wire.Bucket, len(digits))
		for i := range digits {
			buckets[i] = wire.Bucket{Digit: digits[i], Hash: hashes[i]}
		}
		if j.of == kindOR {
			s.invitePushes(pushesPerBuckets)
			s.sendSync(&wire.ORMapSyncRespBuckets{MapName: j.name, Path: path, Buckets: orBuckets(path, buckets)})
		} else {
			s.sendSync(&wire.SyncRespBuckets{MapName: j.name, Path: path, Buckets: buckets})
		}
		return nil
	}
	first, last, _ := merkle.LeafRange(j.paths[0])
	for _, path := range j.paths[1:] {
		leaf, _, _ := merkle.LeafRange(path)
		first, last = min(first, leaf), max(last, leaf)
	}
	records, err := s.k.router.Records(ctx, j.of, j.name, first, last)
	if err != nil {
		return err
	}
	byLeaf := make(map[int][]keyed, len(j.paths))
	if len(j.paths) == 1 {
		byLeaf[first] = records
	} else {
		for _, r := range records {
			leaf := merkle.Leaf(merkle.Hash(r.Key))
			byLeaf[leaf] = append(byLeaf[leaf], r)
		}
	}
	for _, path := range j.paths {
		leaf, _, _ := merkle.LeafRange(path)
		send := s.sendLeaf
		if j.of == kindOR {
			send = s.sendORLeaf
		}
		if !send(j.name, path, byLeaf[leaf]) {
			return nil
		}
	}
	return nil
}

// sendLeaf sends records in frames of about pushBytes, at least one frame, waiting for
// room before each. It returns false if the session ended meanwhile.
func (s *session) sendLeaf(name, path string, records []keyed) bool {
	for {
		buf := encodeBuffers.Get().(*[]byte)
		w := wire.BeginLeaf((*buf)[:0], name, path)
		n := 0
		for n < len(records) && w.Size() < pushBytes {
			w.Add(records[n].Key, records[n].Record)
			n++
		}
		payload := w.End()
		bytes := appendFrame(make([]byte, 0, len(payload)+frameHeader(len(payload))), ws.OpBinary, payload)
		recycle(buf, payload)
		s.k.meters.sentType(outLeaf)
		if !s.pushWaiting(bulk, bytes) {
			return false
		}
		if records = records[n:]; len(records) == 0 {
			return true
		}
	}
}

// combining is the rule by which the client combines hashes, as far as the session
// knows (PROTOCOL 7.7).
func (s *session) combining() merkle.Combine {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.combine
}

// learnCombine looks for evidence in an ORMAP_SYNC_INIT: the client's root over the
// hashes of its children shows how it combines them. A wrong guess costs a full walk
// and converges (PROTOCOL 7.7).
func (s *session) learnCombine(m *wire.ORMapSyncInit) {
	if m.HasClaimedEpoch {
		s.certainlyMixed()
		return
	}
	var plain, mixed uint32
	for _, h := range m.BucketHashes {
		plain += h
		mixed += merkle.Mix(h)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.mixed && m.RootHash == plain && m.RootHash != mixed {
		s.combine = merkle.Plain
	}
}
