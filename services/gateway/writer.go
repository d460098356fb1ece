package gateway

import (
	"encoding/binary"
	"net"
	"slices"
	"sync"

	"github.com/gobwas/ws"

	"github.com/topgun-sync/topgun/core/wire"
)

const (
	// writeBytes and writeFrames bound what one writev carries. A PONG waits for no
	// more than that, and who reads writeBytes within WriteTimeout is not too slow.
	writeBytes  = 256 << 10
	writeFrames = 512
	// replyRoom is how many bytes of replies, and of answers to a sync, may wait
	// before who makes them waits too. It bounds the memory of a slow reader that
	// asks for much; what is made by others (events) has bounds of its own.
	replyRoom = 256 << 10
	// urgentFrames bounds the frames that nobody can wait with. A client that gets
	// there sends pings and reads nothing.
	urgentFrames = 128
	// keepItems is the queue capacity that an idle session keeps.
	keepItems = 8
	// gatherFrames and more live events that wait together travel as one BATCH
	// (PROTOCOL 2.4): a client is woken once for all of them. None above gatherEach is
	// copied for that, and no BATCH is above gatherBytes. Nothing but live events: the
	// original client waits for its storage between the messages of a BATCH, and frames
	// that come behind it overtake them. Merging does not mind; messages of a topic and
	// updates of a query would change places.
	gatherFrames = 3
	gatherEach   = 8 << 10
	gatherBytes  = 60 << 10
)

// lane is a queue of an outbox. A lane is written before the next one.
type lane uint8

const (
	// urgent: PONG, ERROR, and what belongs to authentication.
	urgent lane = iota
	// replies: OP_ACK with what must come before it.
	replies
	// bulk: live events, and what belongs to a sync.
	bulk
)

// frame is one or several finished WebSocket frames. The bytes may be shared with
// other sessions and never change.
type frame struct {
	bytes []byte
	// Of what may be dropped one is set: the map of live events, the query of its
	// results, or that it is a message of a topic.
	events *watched
	query  *querySub
	topic  bool
}

func (f *frame) droppable() bool { return f.events != nil || f.query != nil || f.topic }

// outbox is what waits to be written to one session. The session's mu guards it.
//
// Bounds: urgent by count, above which the session is closed; replies and the sync
// part of bulk by bytes, at which their makers wait; what comes from the fanout stream by
// count and bytes together, above which events and results that wait are dropped and
// their maps owed a fresh root instead, their queries a fresh result. A message of a topic
// that does not fit is lost.
type outbox struct {
	lanes       [bulk + 1][]frame
	replyBytes  int
	syncBytes   int
	events      int // frames of bulk that may be dropped
	eventBytes  int
	urgentBytes int
	// syncing: the write under way holds what belongs to a sync. synced is when the last
	// such write ended, in Unix nanoseconds.
	syncing bool
	synced  int64
	// writing: the writing goroutine runs. It ends when nothing waits.
	writing bool
	// last is the close frame; nothing is taken once it is set.
	last []byte
	// lost: the connection is gone; everything is refused.
	lost bool
}

func (o *outbox) queuedBytes() int {
	return o.urgentBytes + o.replyBytes + o.syncBytes + o.eventBytes
}

// fullLocked reports that n bytes more of what may be dropped do not fit.
func (o *outbox) fullLocked(cfg Config, n int) bool {
	return o.events >= cfg.QueueMessages || o.eventBytes+n > cfg.QueueBytes
}

// shut reports that nothing is taken any more.
func (o *outbox) shut() bool { return o.lost || o.last != nil }

// compile encodes a message as one finished WebSocket frame. Server frames are not
// masked, so that the bytes are the same for every session.
func compile(m wire.Message) []byte {
	buf := encodeBuffers.Get().(*[]byte)
	payload := m.AppendTo((*buf)[:0])
	bytes := appendFrame(make([]byte, 0, len(payload)+frameHeader(len(payload))), ws.OpBinary, payload)
	recycle(buf, payload)
	return bytes
}

// keepEncodeBuffer is the largest scratch buffer that goes back to the pool.
const keepEncodeBuffer = 256 << 10

var encodeBuffers = sync.Pool{New: func() any { return new([]byte) }}

// recycle gives a scratch buffer back to the pool, unless it grew large.
func recycle(buf *[]byte, grown []byte) {
	if cap(grown) <= keepEncodeBuffer {
		*buf = grown
	}
	encodeBuffers.Put(buf)
}

func frameHeader(n int) int { return ws.HeaderSize(ws.Header{Length: int64(n)}) }

// appendFrame appends a finished, unfragmented frame.
func appendFrame(dst []byte, op ws.OpCode, payload []byte) []byte {
	const fin = 0x80
	dst = append(dst, fin|byte(op))
	switch n := len(payload); {
	case n < 126:
		dst = append(dst, byte(n))
	case n <= 0xffff:
		dst = append(dst, 126, byte(n>>8), byte(n))
	default:
		dst = append(dst, 127, 0, 0, 0, 0, byte(n>>24), byte(n>>16), byte(n>>8), byte(n))
	}
	return append(dst, payload...)
}

// send queues a message on a lane other than bulk, without waiting. Replies are
// bounded by who makes them (see sendReply); too many urgent frames close the session.
func (s *session) send(l lane, m wire.Message) {
	s.k.meters.sent(m)
	s.sendFrame(l, compile(m))
}

func (s *session) sendFrame(l lane, bytes []byte) {
	s.mu.Lock()
	if s.out.shut() {
		s.mu.Unlock()
		return
	}
	if l == urgent && len(s.out.lanes[urgent]) >= urgentFrames {
		s.mu.Unlock()
		s.beginClose(closeSlow)
		return
	}
	s.pushLocked(l, frame{bytes: bytes})
	s.startWriterLocked()
	s.mu.Unlock()
}

// sendReply queues a message on the lane of replies when there is room. It returns
// false if the session ended meanwhile.
func (s *session) sendReply(m wire.Message) bool {
	s.k.meters.sent(m)
	return s.pushWaiting(replies, compile(m))
}

// sendSync queues a message that belongs to a sync when there is room, or drops it if
// the session ended meanwhile.
func (s *session) sendSync(m wire.Message) {
	s.k.meters.sent(m)
	s.pushWaiting(bulk, compile(m))
}

// pushWaiting queues a finished frame on replies or bulk, waiting for room. It returns
// false if the session ended meanwhile.
func (s *session) pushWaiting(l lane, bytes []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	waiting := &s.out.replyBytes
	if l == bulk {
		waiting = &s.out.syncBytes
	}
	for *waiting > 0 && *waiting+len(bytes) > replyRoom && !s.out.shut() {
		s.room.Wait()
	}
	if s.out.shut() {
		return false
	}
	s.pushLocked(l, frame{bytes: bytes})
	s.startWriterLocked()
	return true
}

// deliverLocked queues live events of a map; s.mu is held. The caller starts the
// writer, for many sessions at once. It reports whether there is something to write.
func (s *session) deliverLocked(t *watched, bytes []byte) bool {
	switch {
	case s.out.shut():
		return false
	case s.owed[t.name]:
		return false // a root that is read after this change will speak for it
	}
	// An empty queue takes the events of any one commit, whose size is bounded.
	if s.out.events > 0 && s.out.fullLocked(s.k.cfg, len(bytes)) {
		s.dropFramesLocked(func(f *frame) bool { return f.events != nil || f.query != nil })
		s.oweLocked(t.name)
		return false
	}
	s.pushLocked(bulk, frame{bytes: bytes, events: t})
	return true
}

// dropFramesLocked removes waiting frames that may be dropped; their maps are owed a root,
// their queries a result. These follow once the write that is under way has come to its
// end: as long as it does not, they would only wait with the rest.
func (s *session) dropFramesLocked(which func(*frame) bool) {
	before := s.out.events
	s.out.lanes[bulk] = slices.DeleteFunc(s.out.lanes[bulk], func(f frame) bool {
		if !f.droppable() || !which(&f) {
			return false
		}
		s.countLocked(bulk, f, -1)
		if f.events != nil {
			s.oweLocked(f.events.name)
		}
		if f.query != nil {
			s.oweQueryLocked(f.query)
		}
		return true
	})
	s.k.meters.dropped(before - s.out.events)
}

func (s *session) pushLocked(l lane, f frame) {
	s.out.lanes[l] = append(s.out.lanes[l], f)
	s.countLocked(l, f, 1)
}

func (s *session) countLocked(l lane, f frame, sign int) {
	n := sign * len(f.bytes)
	switch {
	case l == urgent:
		s.out.urgentBytes += n
	case l == replies:
		s.out.replyBytes += n
	case f.droppable():
		s.out.events += sign
		s.out.eventBytes += n
	default:
		s.out.syncBytes += n
	}
}

// startWriterLocked starts the writing goroutine unless it runs.
func (s *session) startWriterLocked() {
	if !s.out.writing && s.spawnLocked(s.write) {
		s.out.writing = true
	}
}

// batch is what one write needs: the frames, and to gather some of them their payloads
// and the bytes of the frames that hold them.
type batch struct {
	bufs  net.Buffers
	loose []bool // beside bufs: a live event
	run   [][]byte
	bytes []byte
}

var writeBatches = sync.Pool{New: func() any { return new(batch) }}

// write writes until nothing waits. It is the only goroutine that writes to the
// connection; it exists only while there is something to write.
func (s *session) write() {
	b := writeBatches.Get().(*batch)
	defer writeBatches.Put(b)
	for {
		last, ok := s.takeFrames(b)
		if !ok {
			break
		}
		bufs := b.gather()
		b.bufs = bufs[:0] // WriteTo moves its own header along the slice
		s.writeBy.Store(s.k.now().Add(s.k.cfg.WriteTimeout).UnixNano())
		var err error
		if len(bufs) == 1 {
			_, err = s.conn.Write(bufs[0])
		} else {
			_, err = bufs.WriteTo(s.conn)
		}
		s.writeBy.Store(0)
		if err != nil {
			s.lose()
			break
		}
		if last {
			s.halfClose()
			break
		}
	}
	clear(b.bufs[:cap(b.bufs)])
	clear(b.run[:cap(b.run)])
	if cap(b.bytes) > keepEncodeBuffer {
		b.bytes = nil
	}
}

// gather wraps runs of small live events in BATCH frames and returns what is to be
// written. It works in place; the frames that it makes are good until the next call.
func (b *batch) gather() net.Buffers {
	if len(b.bufs) < gatherFrames {
		return b.bufs
	}
	b.bytes, b.run = b.bytes[:0], b.run[:0]
	out, size := b.bufs[:0], 0
	flush := func(next int) {
		if n := len(b.run); n < gatherFrames {
			out = append(out, b.bufs[next-n:next]...)
		} else {
			at := len(b.bytes)
			b.bytes = append(b.bytes, binaryFrame, 126, 0, 0)
			b.bytes = wire.AppendBatch(b.bytes, b.run...)
			binary.BigEndian.PutUint16(b.bytes[at+2:], uint16(len(b.bytes)-at-4)) // see minGather and gatherBytes
			out = append(out, b.bytes[at:len(b.bytes):len(b.bytes)])
		}
		b.run, size = b.run[:0], 0
	}
	for i, frame := range b.bufs {
		var payload []byte
		if b.loose[i] {
			payload = singlePayload(frame)
		}
		if payload == nil || size+len(payload) > gatherBytes {
			flush(i)
		}
		if payload == nil {
			out = append(out, frame)
			continue
		}
		b.run = append(b.run, payload)
		size += len(payload) + 4
	}
	flush(len(b.bufs))
	return out
}

// binaryFrame begins every frame that appendFrame makes of a message.
const binaryFrame = 0x80 | byte(ws.OpBinary)

// singlePayload returns the payload of a small binary frame; nil if it is not small, or
// several.
func singlePayload(frame []byte) []byte {
	if len(frame) < minGather || len(frame) > gatherEach || frame[0] != binaryFrame {
		return nil
	}
	n, head := int(frame[1]), 2
	if n == 126 {
		n, head = int(binary.BigEndian.Uint16(frame[2:])), 4
	}
	if len(frame) != head+n {
		return nil
	}
	return frame[head:]
}

// minGather keeps a BATCH of three above the 125 bytes of the shortest header. No event
// is smaller.
const minGather = 36

// takeFrames takes what the next writev carries into b, in the order of the lanes. last
// says that the close frame is among it. When nothing waits it returns false, and the
// goroutine that called it is no longer the writer.
func (s *session) takeFrames(b *batch) (last, ok bool) {
	bufs, loose := b.bufs[:0], b.loose[:0]
	defer func() { b.bufs, b.loose = bufs, loose }()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.out.lost {
		s.out.writing = false
		return false, false
	}
	if s.out.syncing {
		s.out.synced = s.k.now().UnixNano()
	}
	size, syncBytes := 0, s.out.syncBytes
	for l := range s.out.lanes {
		queue := s.out.lanes[l]
		n := 0
		for ; n < len(queue) && len(bufs) < writeFrames && size < writeBytes; n++ {
			bufs, loose = append(bufs, queue[n].bytes), append(loose, queue[n].events != nil)
			size += len(queue[n].bytes)
			s.countLocked(lane(l), queue[n], -1)
		}
		if queue = slices.Delete(queue, 0, n); len(queue) == 0 && cap(queue) > keepItems {
			queue = nil
		}
		s.out.lanes[l] = queue
	}
	if size > 0 {
		s.room.Broadcast()
	}
	s.out.syncing = s.out.syncBytes < syncBytes
	if s.out.events == 0 && len(s.owed)+len(s.owedQueries) > 0 {
		s.startWorkersLocked() // drained: what is owed can be sent
	}
	if s.out.last != nil && len(bufs) < writeFrames && size < writeBytes {
		bufs, loose = append(bufs, s.out.last), append(loose, false)
		return true, true
	}
	if len(bufs) == 0 {
		s.out.writing = false
		return false, false
	}
	return false, true
}

// halfClose ends our side of the connection after the close frame, so that the
// client sees its end at once and ends its own side; the reading goroutine waits
// for that.
func (s *session) halfClose() {
	s.mu.Lock()
	s.out.writing = false
	s.out.lost = true
	s.room.Broadcast()
	s.mu.Unlock()
	if c, ok := s.conn.(interface{ CloseWrite() error }); ok {
		_ = c.CloseWrite() // the close frame said it already
	}
}

// lose ends a session whose connection does not take what is written.
func (s *session) lose() {
	s.mu.Lock()
	s.cut = s.cut || s.out.syncing
	s.out.writing = false
	s.out.lost = true
	s.room.Broadcast()
	s.mu.Unlock()
	s.beginClose(closeLost)
	_ = s.conn.Close() // wakes the reading goroutine
}
