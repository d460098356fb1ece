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

// job is a sync request that waits for a worker.
type job struct {
	kind jobKind
	name string
	// paths of jobBuckets: one; or several leaves with the same parent.
	paths []string
	// since is the lastSyncTimestamp of jobInit.
	since uint64
	// after is closed when the ops that came before the request are answered: what is
	// read for the client then holds its own ops, or its root would differ only
	// because they were on their way. Nil does not wait.
	after <-chan struct{}
}

type jobKind uint8

const (
	jobInit    jobKind = iota // SYNC_INIT: push what arrived, then the root
	jobBuckets                // MERKLE_REQ_BUCKET
	jobRoot                   // an unsolicited root
)

// syncRequested takes a SYNC_INIT.
func (s *session) syncRequested(m *wire.SyncInit) error {
	if err := wire.CheckMapName(m.MapName); err != nil {
		return s.refuse(err)
	}
	s.mu.Lock()
	seen, ok := s.interestLocked(m.MapName)
	if ok {
		seen.synced = true
	}
	after := s.ops.tail
	s.mu.Unlock()
	if !ok {
		return s.decline(tooManyMaps)
	}
	return s.addJob(job{kind: jobInit, name: m.MapName, since: m.LastSyncTimestamp, after: after})
}

// bucketRequested takes a MERKLE_REQ_BUCKET. The map needs no interest: a client may
// look without being told of changes.
func (s *session) bucketRequested(m *wire.MerkleReqBucket) error {
	if err := wire.CheckMapName(m.MapName); err != nil {
		return s.refuse(err)
	}
	if _, _, ok := merkle.LeafRange(m.Path); !ok {
		return s.refuse(&wire.Error{Name: wire.BadMessage, Code: 400, Text: "path: want 0 to 3 lowercase hex digits"})
	}
	return s.addJob(job{kind: jobBuckets, name: m.MapName, paths: []string{strings.Clone(m.Path)}})
}

var tooManyMaps = &wire.Error{
	Name: "TOO_MANY_SUBS", Code: 429, Text: "this connection looks at as many maps as it may; use another one",
}

// interestLocked returns what the session showed for a map, noting that it looks at
// it; s.mu is held. It returns false if the session looks at too many.
func (s *session) interestLocked(name string) (*interest, bool) {
	if seen := s.maps[name]; seen != nil {
		return seen, true
	}
	if len(s.maps) >= s.k.cfg.MaxMaps {
		return nil, false
	}
	if s.maps == nil {
		s.maps = make(map[string]*interest)
	}
	seen := &interest{}
	s.maps[strings.Clone(name)] = seen
	return seen, true
}

// interested notes that an op or a query showed interest in a map. If no SYNC_INIT
// came for it, the client opened it late and will not send one before it connects
// again, so it gets the root unasked, once (PROTOCOL 8.2). A session that looks at too
// many maps gets nothing.
func (s *session) interested(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing != nil {
		return
	}
	seen, ok := s.interestLocked(name)
	if !ok || seen.synced || seen.rooted {
		return
	}
	seen.rooted = true
	s.jobs = append(s.jobs, job{kind: jobRoot, name: name}) // one per map at most
	s.startWorkersLocked()
}

// owe has the session get a root of a map that it may have missed changes of.
func (s *session) owe(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.oweLocked(name)
	if s.out.events == 0 {
		s.startWorkersLocked()
	} // else the writer does when it has written them
}

func (s *session) oweLocked(name string) {
	if s.closing != nil || s.maps[name] == nil {
		return
	}
	if s.owed == nil {
		s.owed = make(map[string]bool)
	}
	s.owed[name] = true
}

// addJob queues a job, waiting while too many do.
func (s *session) addJob(j job) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.jobs) >= maxJobs && s.closing == nil {
		s.room.Wait()
	}
	if s.closing == nil {
		s.jobs = append(s.jobs, j)
		s.startWorkersLocked()
	}
	return nil
}

func (s *session) startWorkersLocked() {
	waiting := len(s.jobs)
	if s.out.events == 0 {
		waiting += len(s.owed)
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
		if !s.waitFor(j.after) {
			continue
		}
		ctx, cancel := context.WithTimeout(s.ctx, s.k.cfg.ReadTimeout)
		var err error
		switch j.kind {
		case jobInit:
			cancel() // a push may take longer; each of its reads is bounded
			err = s.answerInit(j)
		case jobBuckets:
			err = s.answerBuckets(ctx, j)
		case jobRoot:
			err = s.join(j.name)
			if err == nil {
				err = s.sendRoot(ctx, j.name)
			}
		}
		cancel()
		if err != nil && s.ctx.Err() == nil {
			// The client does not ask again before it connects again (PROTOCOL 8).
			s.send(urgent, &wire.ErrorMessage{Code: 503, Message: "UNAVAILABLE: the map cannot be read; connect again"})
			s.beginClose(closeTryLater)
		}
	}
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
			return job{kind: jobRoot, name: name}, true
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
			if next.kind != jobBuckets || next.name != j.name || len(next.paths[0]) != merkle.Depth ||
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

func (s *session) join(name string) error {
	ctx, cancel := context.WithTimeout(s.ctx, s.k.cfg.ReadTimeout)
	defer cancel()
	return s.k.hub.join(ctx, s, name)
}

// answerInit answers a SYNC_INIT: first the records that arrived since the client last
// synced, then the root. A client that merged them finds its root equal and is done,
// after one round trip; if it is not equal, it walks the tree. The tree is the proof
// and time only the shortcut: lastSyncTimestamp says little about a particular map
// (PROTOCOL 22.3), and a wrong one costs bytes, never data.
func (s *session) answerInit(j job) error {
	if err := s.join(j.name); err != nil {
		return err
	}
	// Arrivals may be seconds ahead of the wall clock after a restart; a time further
	// ahead than any of ours explains nothing, and leaves the root alone to speak.
	start := uint64(max(0, s.k.now().UnixMilli()))
	if j.since <= start+uint64(hlc.MaxDrift.Milliseconds()) {
		if err := s.k.pushes.Acquire(s.ctx, 1); err != nil {
			return err
		}
		pushed, err := s.push(j.name, j.since, start)
		s.k.pushes.Release(1)
		if err != nil {
			return err
		}
		if !s.settle(pushed) {
			return context.Canceled
		}
	}
	ctx, cancel := context.WithTimeout(s.ctx, s.k.cfg.ReadTimeout)
	defer cancel()
	return s.sendRoot(ctx, j.name)
}

const (
	// settleBase and settlePerRecord are what a client gets to merge a push before the
	// root follows; maxSettle bounds it. The TypeScript client handles frames in
	// order but awaits its storage between records, so a root right behind the records
	// meets an unfinished tree and starts a walk that fetches them again. Measured with
	// that client: 3 records and a root in one write cost a walk nearly every time. A
	// slower client walks, which costs bytes only.
	settleBase      = 5 * time.Millisecond
	settlePerRecord = 2 * time.Microsecond
	maxSettle       = 500 * time.Millisecond
)

// settle waits while the client merges the records pushed to it; false means that the
// session ended.
func (s *session) settle(records int) bool {
	if records == 0 {
		return true
	}
	timer := time.NewTimer(min(settleBase+time.Duration(records)*settlePerRecord, maxSettle))
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
func (s *session) push(name string, since, start uint64) (pushed int, err error) {
	var after hlc.Timestamp
	if since > 0 {
		after = hlc.Timestamp{Millis: since, Counter: maxCounter}
	}
	for {
		ctx, cancel := context.WithTimeout(s.ctx, s.k.cfg.ReadTimeout)
		p, err := s.k.router.Since(ctx, name, after, pushRecords, pushBytes)
		cancel()
		if err != nil {
			return pushed, err
		}
		if len(p.records) > 0 && !s.sendLeaf(name, "", p.records) {
			return pushed, context.Canceled
		}
		pushed += len(p.records)
		if !p.more || p.covered.Millis > start {
			return pushed, nil
		}
		after = p.covered
	}
}

// sendRoot sends a root that is read after the call.
func (s *session) sendRoot(ctx context.Context, name string) error {
	t, err := s.k.trees.fresh(ctx, name, s.combining())
	if err != nil {
		return err
	}
	s.sendSync(&wire.SyncRespRoot{
		MapName:   name,
		RootHash:  t.Root(),
		Timestamp: hlc.Timestamp{Millis: t.state.nowMillis, NodeID: serverNode},
	})
	return nil
}

// answerBuckets answers a MERKLE_REQ_BUCKET, or several for leaves of one parent. A
// path with nothing below gets an empty answer: silence would leave the client
// waiting.
func (s *session) answerBuckets(ctx context.Context, j job) error {
	if path := j.paths[0]; len(path) < merkle.Depth {
		t, err := s.k.trees.recent(ctx, j.name, s.combining())
		if err != nil {
			return err
		}
		digits, hashes, _ := t.Buckets(path) // the path was checked when it came
		answer := &wire.SyncRespBuckets{MapName: j.name, Path: path, Buckets: make([]wire.Bucket, len(digits))}
		for i := range digits {
			answer.Buckets[i] = wire.Bucket{Digit: digits[i], Hash: hashes[i]}
		}
		s.sendSync(answer)
		return nil
	}
	first, last, _ := merkle.LeafRange(j.paths[0])
	for _, path := range j.paths[1:] {
		leaf, _, _ := merkle.LeafRange(path)
		first, last = min(first, leaf), max(last, leaf)
	}
	records, err := s.k.router.Records(ctx, j.name, first, last)
	if err != nil {
		return err
	}
	byLeaf := make(map[int][]wire.KeyedRecord, len(j.paths))
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
		if !s.sendLeaf(j.name, path, byLeaf[leaf]) {
			return nil
		}
	}
	return nil
}

// sendLeaf sends records in frames of about pushBytes, at least one frame, waiting for
// room before each. It returns false if the session ended meanwhile.
func (s *session) sendLeaf(name, path string, records []wire.KeyedRecord) bool {
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
