package gateway

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"

	"github.com/topgun-sync/topgun/core/wire"
)

// maxWaitingBatches bounds the batches of a session that came while MaxInFlight were
// being applied.
const maxWaitingBatches = 256

// maxRunningOps bounds the ops of one session that are with the router at once, so that
// the ops of others wait behind few of a session that floods.
const maxRunningOps = 4000

// opLine holds a session's batches of ops that are not answered. The session's mu
// guards it.
//
// Up to MaxInFlight batches are with the router at once. The reading goroutine takes
// on more without waiting, so that a PING behind them is answered at once; only when
// maxWaitingBatches wait, or MaxMessageBytes of them, does it wait too. Then a PING
// waits no longer than ApplyTimeout, which is less than the 15 s after which a client
// gives up (PROTOCOL 2.5).
//
// Batches may be applied in any order: the stamp of an op decides, not its arrival
// (PROTOCOL 22.6), also when stamps are replaced, for the owner remembers the stamps
// that it replaced. Their acks leave in the order of the batches, because lastId
// covers every op before it (ACK-05).
type opLine struct {
	running int
	waiting []*opBatch
	bytes   int
	// tail is closed when every batch so far was carried to the owners, and answered when
	// it is acked; nil if there is no such batch.
	tail, answered chan struct{}
	// runningOps are the ops of the running batches.
	runningOps int
	// skipped says that a batch was refused whole, so that its ids are not known: no
	// lastId may cover them, and acks list their ops from then on (ACK-05).
	skipped bool
	// pressed: the reading goroutine waits for room, or the session is to end. Then
	// batches do not wait for the store, and those that do are hurried.
	pressed bool
	hurry   chan struct{} // closed to end waits for the store; nil while there is none
}

// pressLocked ends waits for the store.
func (l *opLine) pressLocked() {
	l.pressed = true
	if l.hurry != nil {
		close(l.hurry)
		l.hurry = nil
	}
}

// mayRunLocked reports whether a batch may go to the router beside those that run.
func (s *session) mayRunLocked(b *opBatch) bool {
	return s.ops.running == 0 ||
		s.ops.running < s.k.cfg.MaxInFlight && s.ops.runningOps+len(b.ops) <= maxRunningOps
}

func (l *opLine) idle() bool { return l.running == 0 && len(l.waiting) == 0 }

// opBatch is one OP_BATCH or CLIENT_OP on its way.
type opBatch struct {
	ops      []wire.Op
	size     int   // of its frame, which the ops point into
	held     int64 // of the inbound budget
	received time.Time
	timeout  time.Duration // of the write concern
	before   chan struct{} // closed when every earlier batch was carried; nil if all were
	carried  chan struct{} // closed when this one was too
	prev     chan struct{} // closed when every earlier batch is answered; nil if all are
	done     chan struct{} // closed when this one is
}

// submit takes a batch of ops. Its size is that of the frame.
func (s *session) submit(m *wire.OpBatch, size int, held int64) error {
	if len(m.Ops) == 0 {
		s.k.inbound.give(held)
		return nil // nothing to do, and no id that an ack could name
	}
	for i := range m.Ops {
		m.Ops[i].WriteConcern = cmp.Or(m.Ops[i].WriteConcern, m.WriteConcern)
	}
	b := &opBatch{
		ops: m.Ops, size: size, held: held, received: time.Unix(0, s.reader.seen.Load()),
		timeout: concernTimeout(m.TimeoutMillis), carried: make(chan struct{}), done: make(chan struct{}),
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.closing == nil && (len(s.ops.waiting) >= maxWaitingBatches ||
		(s.ops.bytes > 0 && s.ops.bytes+size > s.k.cfg.MaxMessageBytes)) {
		s.ops.pressLocked() // else a PING behind the batch could wait for a minute
		s.room.Wait()
	}
	s.ops.pressed = s.leaving
	if s.closing != nil || s.leaving {
		s.k.inbound.give(held)
		return nil // the client sends it again over its next connection
	}
	b.prev, s.ops.answered = s.ops.answered, b.done
	b.before, s.ops.tail = s.ops.tail, b.carried
	s.ops.bytes += size
	if len(s.ops.waiting) == 0 && s.mayRunLocked(b) {
		s.startBatchLocked(b)
	} else {
		s.ops.waiting = append(s.ops.waiting, b)
	}
	return nil
}

// levelRank orders the levels of PROTOCOL 10.7, which wire has checked; empty asks for
// nothing.
func levelRank(level string) int { return max(0, slices.Index(levelNames[:], level)) }

func (s *session) startBatchLocked(b *opBatch) {
	s.ops.running++
	s.ops.runningOps += len(b.ops)
	if !s.spawnLocked(func() { s.apply(b) }) {
		s.finishLocked(b)
	}
}

// apply carries a batch to the owners and answers it. It goes on when the connection
// is lost: the ops were sent, and the client may never come back to send them again.
func (s *session) apply(b *opBatch) {
	ctx, cancel := context.WithTimeout(s.k.base, s.k.cfg.ApplyTimeout)
	ctx, span := s.k.tracer.Start(ctx, "gateway.op_batch", trace.WithTimestamp(b.received),
		trace.WithSpanKind(trace.SpanKindServer), trace.WithAttributes(attribute.Int("topgun.ops", len(b.ops))))
	results := s.k.router.Apply(ctx, s.origin, traceParent(ctx), b.ops)
	cancel()
	if b.before != nil {
		<-b.before // its batch has a deadline of its own
	}
	s.mu.Lock()
	s.carriedLocked(b)
	s.mu.Unlock()
	s.settle(b, results)
	if b.prev != nil {
		<-b.prev // its batch has a deadline of its own
	}
	answered := s.answer(b, results)
	span.SetAttributes(attribute.Bool("topgun.answered", answered))
	s.k.meters.acked(s.k.now().Sub(b.received))
	span.End()

	s.mu.Lock()
	s.finishLocked(b)
	leave := s.leaving && s.ops.idle()
	s.mu.Unlock()
	if leave {
		s.beginClose(closeRestart)
	}
	if answered {
		s.wroteTo(b.ops, results)
	}
}

// settle waits for the store as far as ops of the batch ask for it: no longer than the
// batch's timeout from its arrival, or than its acks have a reader, and not while the
// session's line is full.
func (s *session) settle(b *opBatch, results []opResult) {
	if !slices.ContainsFunc(b.ops, func(op wire.Op) bool { return op.WriteConcern == levelPersisted }) {
		return
	}
	s.mu.Lock()
	if s.ops.pressed || s.leaving {
		s.mu.Unlock()
		return
	}
	if s.ops.hurry == nil {
		s.ops.hurry = make(chan struct{})
	}
	hurry := s.ops.hurry
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(s.ctx, b.timeout-s.k.now().Sub(b.received))
	defer cancel()
	s.k.concerns.settle(ctx, hurry, b.ops, results)
}

// finishLocked ends a batch that was started, and starts the next one. Once the session
// closes, those that wait end too: nothing of them was sent, and they cannot be acked.
func (s *session) finishLocked(b *opBatch) {
	s.ops.running--
	s.ops.runningOps -= len(b.ops)
	s.endLocked(b)
	for len(s.ops.waiting) > 0 && (s.closing != nil || s.mayRunLocked(s.ops.waiting[0])) {
		next := s.ops.waiting[0]
		s.ops.waiting[0] = nil
		s.ops.waiting = s.ops.waiting[1:]
		if s.closing != nil {
			s.endLocked(next)
			continue
		}
		s.startBatchLocked(next)
	}
	if len(s.ops.waiting) == 0 {
		s.ops.waiting = nil
	}
	s.room.Broadcast()
}

func (s *session) endLocked(b *opBatch) {
	s.ops.bytes -= b.size
	s.k.inbound.give(b.held)
	s.carriedLocked(b)
	if s.ops.answered == b.done {
		s.ops.answered = nil
	}
	close(b.done)
}

// carriedLocked notes that a batch, and every earlier one, was carried to the owners, or
// never will be.
func (s *session) carriedLocked(b *opBatch) {
	if b.carried == nil {
		return
	}
	if s.ops.tail == b.carried {
		s.ops.tail = nil
	}
	close(b.carried)
	b.carried = nil
}

// answer sends what a batch's results call for, and reports whether the batch is done
// with. Every earlier batch is answered, or the session closes: then nothing is sent any
// more, so that no ack follows a batch that got none.
//
// What the writer must know comes before the ack, because the ack makes the client
// forget its ops: the winner for an op that lost or got another stamp (PROTOCOL 22.4),
// and OP_REJECTED for one that can never be applied, which the ack covers, or it would
// block the client's log for ever (PROTOCOL 10.5).
//
// Ops that could not be applied are never covered. What is done before the first of
// them is acked, then the client is told to connect again, which makes it send the
// rest again; it would not do so by itself.
//
// The level that was reached is known with the receipts, and from the store for ops that
// ask for PERSISTED; a client that asked for more is told which it got (ACK-03). What is
// applied and did not get there in time is covered: sending it again would not help.
func (s *session) answer(b *opBatch, results []opResult) bool {
	done := slices.IndexFunc(results, func(r opResult) bool { return r.status == opUnavailable })
	if done < 0 {
		return s.acknowledge(b.ops, results)
	}
	if done > 0 && coverable(b.ops[:done], b.ops[done:]) {
		s.acknowledge(b.ops[:done], results[:done])
	}
	r := &results[done]
	message := r.reason
	if r.retryAfter > 0 {
		message = fmt.Sprintf("%s (retry after %d ms)", message, r.retryAfter.Milliseconds())
	}
	s.send(replies, &wire.ErrorMessage{Code: r.code, Message: message})
	s.beginClose(closeTryLater)
	return false
}

// coverable reports whether a lastId for the ops that are done covers none of the
// others. Ids rise in the batches of a correct client.
func coverable(done, undone []wire.Op) bool {
	var highest uint64
	for i := range done {
		id, ok := decimalID(done[i].ID)
		if !ok {
			return false
		}
		highest = max(highest, id)
	}
	for i := range undone {
		if id, ok := decimalID(undone[i].ID); !ok || id <= highest {
			return false
		}
	}
	return true
}

// maxIDDigits keeps ids within what a JavaScript number holds exactly: a client would
// round a longer one, and an ack could cover its neighbours.
const maxIDDigits = 15

// decimalID reads an id that a lastId can name.
func decimalID(id string) (n uint64, ok bool) {
	if len(id) == 0 || len(id) > maxIDDigits {
		return 0, false
	}
	for i := range len(id) {
		c := id[i]
		if c < '0' || c > '9' {
			return 0, false
		}
		n = 10*n + uint64(c-'0')
	}
	return n, true
}

// acknowledge sends the answers to ops that are done, the ack last. It returns false
// if the session ended meanwhile.
func (s *session) acknowledge(ops []wire.Op, results []opResult) bool {
	ack := &wire.OpAck{LastID: ops[len(ops)-1].ID}
	s.mu.Lock()
	perOp := s.ops.skipped
	s.mu.Unlock()
	if perOp {
		ack.LastID = "0"
	}
	for i := range ops {
		op, r := &ops[i], &results[i]
		if _, ok := decimalID(op.ID); !ok {
			perOp = true
			ack.LastID = "0" // any text would make the client drop everything (PROTOCOL 10.4)
		}
		perOp = perOp || levelRank(op.WriteConcern) > levelRank(levelApplied) // who asks for much wants to know
		switch r.status {
		case opRejected:
			if !s.sendReply(&wire.OpRejected{OpID: op.ID, Reason: r.reason, Code: r.code}) {
				return false
			}
			continue
		case opSuperseded, opRestamped:
			if !s.sendReply(winnerEvent(op, r)) {
				return false
			}
		}
		if r.arrival.Compare(ack.Timestamp) > 0 {
			ack.Timestamp = r.arrival
		}
		if ack.AchievedLevel == "" || levelRank(r.level) < levelRank(ack.AchievedLevel) {
			ack.AchievedLevel = r.level
		}
		perOp = perOp || levelRank(op.WriteConcern) > levelRank(r.level)
	}
	if !ack.Timestamp.IsZero() {
		ack.Timestamp.NodeID = serverNode
	}
	if perOp {
		// With results a client looks up every op there, so all are listed.
		ack.Results = make([]wire.OpResult, len(ops))
		for i := range ops {
			ack.Results[i] = resultOf(&ops[i], &results[i])
		}
	}
	return s.sendReply(ack)
}

func resultOf(op *wire.Op, r *opResult) wire.OpResult {
	result := wire.OpResult{OpID: op.ID, Success: true, AchievedLevel: r.level}
	switch {
	case r.status == opRejected:
		result.Success, result.Error = false, r.reason
	case levelRank(op.WriteConcern) > levelRank(r.level):
		result.Success = false
		result.Error = "LEVEL_NOT_REACHED: the op is kept at level " + r.level + ", not at the one asked for"
	}
	return result
}

// winnerEvent tells a writer what its key, or tag, holds instead of what it wrote.
func winnerEvent(op *wire.Op, r *opResult) *wire.ServerEvent {
	c := change{of: kindOf(op), key: op.Key, tag: op.Tag, record: r.winner}
	return &wire.ServerEvent{Event: c.event(op.MapName)}
}

// wroteTo notes that answered ops showed interest in maps, and has the client give up its
// copy of those whose deletions are forgotten: an op was too old, so its copy is too.
func (s *session) wroteTo(ops []wire.Op, results []opResult) {
	last, lastOf := "", kindLWW
	for i := range ops {
		op := &ops[i]
		if op.Err != nil {
			continue
		}
		of := kindOf(op)
		if op.MapName != last || of != lastOf {
			last, lastOf = op.MapName, of
			s.wrote(last, of)
		}
		if results[i].code == codeTooOld {
			s.resetOnce(op.MapName, of)
		}
	}
}
