package gateway

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/gobwas/ws"
)

const (
	// smallRead is what a waiting session reads into. It holds a PING or an event's
	// worth; who sends more borrows a buffer for the rest.
	smallRead = 512
	// largeRead is the size of the borrowed buffers: several frames per syscall.
	largeRead = 16 << 10
	// directRead is the rest of a payload from which it is read straight into the
	// message, without a buffer in between.
	directRead = 4 << 10
	// firstGrant is allocated on the word of a header. What was announced beyond it
	// is allocated as it arrives, and counts against the gateway's budget.
	firstGrant = 64 << 10
)

var readBuffers = sync.Pool{New: func() any { return new([largeRead]byte) }}

// frameReader takes messages off a WebSocket. It belongs to the session's reading
// goroutine. Framing is checked by gobwas/ws; the size of a message is checked
// against the limit before anything is allocated for it (RES-04).
type frameReader struct {
	conn net.Conn
	// now and patience: a message that has begun must go on arriving, 64 KiB at a
	// time, within patience. by is the deadline as Unix nanoseconds, 0 between
	// messages; the sweeper reads it.
	now      func() time.Time
	patience time.Duration
	by       atomic.Int64
	seen     atomic.Int64 // when something last arrived, Unix nanoseconds
	progress int          // bytes since by was set

	budget *budget
	held   int64 // of the budget, for the message being read

	small   [smallRead]byte
	large   *[largeRead]byte // borrowed while it has unread bytes
	unread  []byte           // in small, in large, or what came with the handshake
	full    bool             // the last read filled its buffer: more is there
	state   ws.State
	message []byte
	head    [ws.MaxHeaderSize]byte
	control [ws.MaxControlFramePayloadSize]byte
}

// peerClosed says that the client sent a close frame, or none and went away.
type peerClosed struct {
	code ws.StatusCode // 1005 if the frame had none, 1006 if there was no frame
}

func (peerClosed) Error() string { return "closed by the client" }

// next returns the next message. The caller owns it, and gives held back to the
// budget when it has no more use for it. control is called for pings and pongs
// that come before it, also amid its fragments; its payload is valid during the
// call. A violation of the protocol returns a closeReason.
func (r *frameReader) next(limit int, control func(op ws.OpCode, payload []byte) error) (message []byte, held int64, err error) {
	for {
		h, err := ws.ReadHeaderBuffer(r, r.head[:0])
		switch {
		case errors.Is(err, ws.ErrHeaderLengthMSB), errors.Is(err, ws.ErrHeaderLengthUnexpected):
			return nil, 0, closeProtocol
		case err != nil:
			return nil, 0, err
		}
		if err := ws.CheckHeader(h, r.state); err != nil {
			return nil, 0, closeProtocol
		}
		if h.OpCode.IsControl() {
			if err := r.readControl(h, control); err != nil {
				return nil, 0, err
			}
			if r.state.Fragmented() {
				continue
			}
			r.pass()
			if err := r.fill(); err != nil { // not amid a message any more
				return nil, 0, err
			}
			continue
		}
		if h.OpCode == ws.OpText {
			return nil, 0, closeText
		}
		if h.Length == 0 && !h.Fin {
			// Says nothing and could come for ever: as cheap and as limited as a ping.
			if err := control(ws.OpContinuation, nil); err != nil {
				return nil, 0, err
			}
		}
		if h.Length > int64(limit-len(r.message)) {
			return nil, 0, closeTooBig
		}
		if err := r.readPayload(int(h.Length), h.Mask); err != nil {
			return nil, 0, err
		}
		if !h.Fin {
			r.state = r.state.Set(ws.StateFragmented)
			continue
		}
		r.state = r.state.Clear(ws.StateFragmented)
		message, held = r.message, r.held
		r.message, r.held = nil, 0
		r.pass()
		return message, held, nil
	}
}

// pass notes that no message is under way.
func (r *frameReader) pass() {
	if r.by.Load() != 0 {
		r.by.Store(0)
	}
}

// release gives back what a message that will never be whole holds.
func (r *frameReader) release() {
	r.budget.give(r.held)
	r.held, r.message, r.unread = 0, nil, nil
	r.lend(false)
}

func (r *frameReader) readControl(h ws.Header, control func(op ws.OpCode, payload []byte) error) error {
	payload := r.control[:h.Length]
	if _, err := io.ReadFull(r, payload); err != nil {
		return err
	}
	ws.Cipher(payload, h.Mask, 0)
	if h.OpCode != ws.OpClose {
		return control(h.OpCode, payload)
	}
	if len(payload) == 0 {
		return peerClosed{ws.StatusNoStatusRcvd}
	}
	code, reason := ws.ParseCloseFrameData(payload)
	if len(payload) < 2 || ws.CheckCloseFrameData(code, reason) != nil {
		if len(payload) >= 2 && !utf8.ValidString(reason) {
			return closeBadPayload
		}
		return closeProtocol
	}
	return peerClosed{code}
}

// readPayload appends n payload bytes to the message.
func (r *frameReader) readPayload(n int, mask [4]byte) error {
	offset := 0
	for offset < n {
		start := len(r.message)
		if start == cap(r.message) || start == 0 {
			if err := r.grow(n - offset); err != nil {
				return err
			}
		}
		piece := r.message[start:min(cap(r.message), start+n-offset)]
		if _, err := io.ReadFull(r, piece); err != nil {
			return err
		}
		ws.Cipher(piece, mask, offset)
		offset += len(piece)
		r.message = r.message[:start+len(piece)]
	}
	return nil
}

// grow makes room for up to n more bytes of the message: all of them while it is
// small, then as much again as has arrived.
func (r *frameReader) grow(n int) error {
	have := len(r.message)
	room := have + min(n, max(firstGrant, have))
	if room > firstGrant {
		extra := int64(room) - r.held
		if !r.budget.take(extra) {
			return closeBusy
		}
		r.held += extra
	}
	grown := make([]byte, have, room)
	copy(grown, r.message)
	r.message = grown
	return nil
}

// fill waits until something has arrived. It is where an idle session waits.
func (r *frameReader) fill() error {
	if len(r.unread) > 0 {
		return nil
	}
	r.lend(false)
	n, err := r.conn.Read(r.small[:])
	if n == 0 {
		return lostBy(err)
	}
	r.took()
	r.full = n == len(r.small)
	r.unread = r.small[:n]
	return nil
}

// Read serves the header and payload reads of a message that has begun from what has
// arrived, and waits for more only when all of it is taken.
func (r *frameReader) Read(p []byte) (int, error) {
	if len(r.unread) == 0 {
		if len(p) >= directRead {
			r.full = false
			r.lend(false)
			return r.wait(p)
		}
		into := r.small[:]
		if r.lend(r.full || len(p) > smallRead); r.large != nil {
			into = r.large[:]
		}
		n, err := r.wait(into)
		if n == 0 {
			return 0, err
		}
		r.full = n == len(into)
		r.unread = into[:n]
	}
	n := copy(p, r.unread)
	r.unread = r.unread[n:]
	return n, nil
}

// lend borrows the large buffer or gives it back.
func (r *frameReader) lend(want bool) {
	if want == (r.large != nil) {
		return
	}
	if want {
		r.large = readBuffers.Get().(*[largeRead]byte)
		return
	}
	readBuffers.Put(r.large)
	r.large = nil
}

// wait reads from the connection amid a message, keeping its deadline.
func (r *frameReader) wait(p []byte) (int, error) {
	if r.by.Load() == 0 {
		r.by.Store(r.now().Add(r.patience).UnixNano())
		r.progress = 0
	}
	n, err := r.conn.Read(p)
	if n == 0 {
		return 0, lostBy(err)
	}
	now := r.took()
	if r.progress += n; r.progress >= firstGrant {
		r.by.Store(now.Add(r.patience).UnixNano())
		r.progress = 0
	}
	return n, nil
}

// took notes that something arrived.
func (r *frameReader) took() time.Time {
	now := r.now()
	r.seen.Store(now.UnixNano())
	return now
}

// lostBy is the end of a connection that a read of nothing found.
func lostBy(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return peerClosed{ws.StatusAbnormalClosure}
	}
	return err
}
