package gateway

import (
	"context"
	"slices"

	"github.com/topgun-sync/topgun/core/wire"
)

const (
	// maxWaitingPushes bounds the pushed diffs of a session that wait to be merged, and so
	// those that are merged in one read. Above it, or above MaxMessageBytes of them, the
	// session's reading waits.
	maxWaitingPushes = 64
	// pushesPerBuckets is how many pushes an answer with the children of a node can cause:
	// one for each leaf that the client has and the server lacks (PROTOCOL 9.3).
	pushesPerBuckets = 16
)

// pushes holds the pushed diffs of a session that are not merged. The session's mu guards
// it. One job of the session merges them, in the order in which they came; those of one
// map that follow one another are merged together, because a read of what the server
// holds of a key costs the same for one record of a diff as for a hundred.
type pushes struct {
	waiting []pushed
	bytes   int // of the frames that wait and that are being merged
	merging bool
	// invited are the pushes that the client may send in answer to what it was sent. A
	// walk causes thousands; they count towards no flood limit, as what they answer was
	// paced by the session's reading and writing.
	invited int
}

// pushed is an ORMAP_PUSH_DIFF that waits.
type pushed struct {
	diff  *wire.ORMapPushDiff
	frame inbound
	after <-chan struct{} // as in job
}

// invitePushes notes that a frame is about to be sent that the client answers with up to
// n pushes.
func (s *session) invitePushes(n int) {
	s.mu.Lock()
	s.pushes.invited += n
	s.mu.Unlock()
}

// diffPushed takes an ORMAP_PUSH_DIFF: what a client holds of keys that its tree shows to
// differ. It waits while too many do.
func (s *session) diffPushed(m *wire.ORMapPushDiff, frame *inbound) error {
	s.mu.Lock()
	invited := s.pushes.invited > 0
	if invited {
		s.pushes.invited--
	}
	s.mu.Unlock()
	if !invited && !s.allow() {
		return s.flooded()
	}
	if err := wire.CheckMapName(m.MapName); err != nil {
		return s.refuse(err)
	}
	if m.Err != nil {
		if len(m.Entries) == 0 {
			return s.refuse(m.Err)
		}
		s.send(urgent, &wire.ErrorMessage{Code: m.Err.Code, Message: m.Err.Error()})
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.closing == nil && (len(s.pushes.waiting) >= maxWaitingPushes ||
		s.pushes.bytes > 0 && s.pushes.bytes+frame.size > s.k.cfg.MaxMessageBytes) {
		s.room.Wait()
	}
	if s.closing != nil {
		return nil
	}
	s.pushes.bytes += frame.size
	s.pushes.waiting = append(s.pushes.waiting, pushed{diff: m, frame: frame.keep(), after: s.ops.tail})
	s.startMergingLocked()
	return nil
}

// startMergingLocked queues the job that merges what waits, if anything does and nothing
// is being merged. It is one job at most, so it needs no room among the others.
func (s *session) startMergingLocked() {
	if s.pushes.merging || len(s.pushes.waiting) == 0 || s.closing != nil {
		return
	}
	s.pushes.merging = true
	s.jobs = append(s.jobs, job{kind: jobMerge})
	s.startWorkersLocked()
}

// dropPushesLocked drops the pushed diffs that wait.
func (s *session) dropPushesLocked() {
	s.mergedLocked(s.pushes.waiting)
	s.pushes.waiting = nil
}

// mergedLocked gives back what pushed diffs kept.
func (s *session) mergedLocked(done []pushed) {
	for i := range done {
		s.pushes.bytes -= done[i].frame.size
		s.k.inbound.give(done[i].frame.held)
	}
	s.room.Broadcast()
}

// mergePushes merges the pushed diffs that have waited longest and are of one map. What
// waits behind them has its turn after the other jobs of the session.
func (s *session) mergePushes() error {
	s.mu.Lock()
	taken, rest := s.pushes.waiting, []pushed(nil)
	for i := range taken {
		if taken[i].diff.MapName != taken[0].diff.MapName {
			taken, rest = taken[:i:i], taken[i:]
			break
		}
	}
	s.pushes.waiting = rest
	s.room.Broadcast()
	s.mu.Unlock()

	var err error
	if n := len(taken); n > 0 && s.waitFor(taken[n-1].after) { // each after covers those before
		together := &wire.ORMapPushDiff{MapName: taken[0].diff.MapName}
		for i := range taken {
			together.Entries = append(together.Entries, taken[i].diff.Entries...)
		}
		ctx, cancel := context.WithTimeout(s.ctx, s.k.cfg.ReadTimeout)
		err = s.merge(ctx, together)
		cancel()
	}

	s.mu.Lock()
	defer s.mu.Unlock()
	s.mergedLocked(taken)
	s.pushes.merging = false
	if err == nil {
		s.startMergingLocked()
	}
	return err
}

// merge merges a diff. A client pushes all records of a key and the tombstones of
// its whole map, whether they are news or not, so only what the server does not know
// becomes an op, and comes to the other clients as an event. Nothing is answered, unless
// the client still holds what was removed: it did not ask for the leaf, so it would keep it.
func (s *session) merge(ctx context.Context, m *wire.ORMapPushDiff) error {
	keys := make([]string, 0, len(m.Entries))
	for i := range m.Entries {
		keys = append(keys, m.Entries[i].Key)
	}
	slices.Sort(keys)
	known, err := s.k.router.Get(ctx, kindOR, m.MapName, slices.Compact(keys))
	if err != nil {
		return err
	}
	ops, gone := difference(m, known)
	removal := s.k.clock()
	for i := range ops {
		if ops[i].Kind == wire.OpORRemove {
			ops[i].Record.Timestamp = removal
		}
	}
	tooOld := false
	for page := range slices.Chunk(ops, maxRunningOps) {
		if s.ctx.Err() != nil {
			return s.ctx.Err() // the client pushes the rest over its next connection
		}
		apply, cancel := context.WithTimeout(s.k.base, s.k.cfg.ApplyTimeout)
		results := s.k.router.Apply(apply, s.origin, "", page)
		cancel()
		for i := range results {
			switch {
			case results[i].status == opUnavailable:
				return errUnavailable // the client connects again, and pushes again
			case results[i].code == codeTooOld:
				tooOld = true
			case results[i].status == opSuperseded && results[i].winner.Deleted():
				gone = append(gone, keyed{wire.KeyedRecord{Key: page[i].Key}, page[i].Tag})
			}
		}
	}
	if tooOld {
		s.resetOnce(m.MapName, kindOR)
		return nil
	}
	if len(gone) > 0 && s.sendDiff(m.MapName, gone) {
		s.sendRemoval(m.MapName, gone[len(gone)-1])
	}
	return nil
}
