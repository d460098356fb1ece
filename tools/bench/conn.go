package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"time"

	"github.com/gobwas/ws"

	"github.com/topgun-sync/topgun/core/wire"
)

// conn is one client connection: a WebSocket and nothing else of a client. It is
// for one goroutine.
type conn struct {
	net.Conn
	read  *bufio.Reader
	frame bytes.Buffer // of the frame that is being written
	body  []byte       // of the last frame read; reused
	// unpacked are the messages of the last frame, a BATCH, that were not asked for yet.
	unpacked []wire.Message

	// bytesIn counts what was read from the socket, frame headers included.
	bytesIn int
}

// answerTimeout is how long the server may be silent before a measurement fails.
const answerTimeout = 30 * time.Second

// dial opens a session without a token.
func dial(ctx context.Context, url string) (*conn, error) {
	nc, early, _, err := ws.Dial(ctx, url)
	if err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	c := &conn{Conn: nc, read: early}
	if early == nil {
		c.read = bufio.NewReaderSize(nc, 64<<10)
	}
	if err := c.send(&wire.DeviceHello{}); err != nil {
		return nil, errors.Join(err, nc.Close())
	}
	for {
		m, err := c.receive()
		if err != nil {
			return nil, errors.Join(fmt.Errorf("say hello: %w", err), nc.Close())
		}
		switch m.(type) {
		case *wire.DeviceAck:
			return c, nil
		case *wire.AuthAck: // sent unasked for older clients
		default:
			return nil, errors.Join(fmt.Errorf("say hello: got %s", m.Type()), nc.Close())
		}
	}
}

// send writes one message.
func (c *conn) send(m wire.Message) error {
	payload := m.AppendTo(nil)
	c.frame.Reset()
	mask := ws.NewMask()
	header := ws.Header{Fin: true, OpCode: ws.OpBinary, Masked: true, Mask: mask, Length: int64(len(payload))}
	if err := ws.WriteHeader(&c.frame, header); err != nil {
		return fmt.Errorf("send %s: %w", m.Type(), err)
	}
	ws.Cipher(payload, mask, 0)
	c.frame.Write(payload)
	if _, err := c.Write(c.frame.Bytes()); err != nil {
		return fmt.Errorf("send %s: %w", m.Type(), err)
	}
	return nil
}

// receive returns the next message. It stays valid until the next call.
func (c *conn) receive() (wire.Message, error) {
	for {
		var m wire.Message
		if len(c.unpacked) > 0 {
			m, c.unpacked = c.unpacked[0], c.unpacked[1:]
		} else {
			var err error
			if m, err = c.readFrame(); err != nil {
				return nil, err
			}
		}
		switch m := m.(type) {
		case *wire.Batch:
			c.unpacked = m.Messages
			continue
		case *wire.ErrorMessage:
			return nil, fmt.Errorf("the server answered ERROR %d %s", m.Code, m.Message)
		case *wire.OpRejected:
			return nil, fmt.Errorf("op %s was rejected: %s", m.OpID, m.Reason)
		}
		return m, nil
	}
}

// readFrame reads the next message from the socket.
func (c *conn) readFrame() (wire.Message, error) {
	if err := c.SetReadDeadline(time.Now().Add(answerTimeout)); err != nil {
		return nil, err
	}
	for {
		header, err := ws.ReadHeader(c.read)
		if err != nil {
			return nil, fmt.Errorf("read a frame: %w", err)
		}
		if int64(cap(c.body)) < header.Length {
			c.body = make([]byte, header.Length)
		}
		c.body = c.body[:header.Length]
		if _, err := io.ReadFull(c.read, c.body); err != nil {
			return nil, fmt.Errorf("read a frame: %w", err)
		}
		c.bytesIn += ws.HeaderSize(header) + len(c.body)
		switch {
		case header.OpCode == ws.OpClose:
			code, reason := ws.ParseCloseFrameData(c.body)
			return nil, fmt.Errorf("the server closed the connection: %d %s", code, reason)
		case header.OpCode.IsControl():
			continue
		case !header.Fin:
			return nil, errors.New("the server fragmented a message; this program does not join them")
		}
		m, err := wire.DecodeServer(c.body)
		if err != nil {
			return nil, fmt.Errorf("decode a frame: %w", err)
		}
		return m, nil
	}
}

// awaitAck reads until an acknowledgement covers op id, and returns the level.
func (c *conn) awaitAck(id uint64) (level string, err error) {
	for {
		m, err := c.receive()
		if err != nil {
			return "", err
		}
		ack, ok := m.(*wire.OpAck)
		if !ok {
			continue // a root that the server sends on its own, an event
		}
		last, err := strconv.ParseUint(ack.LastID, 10, 64)
		if err != nil {
			return "", errors.New("lastId of an acknowledgement is not a decimal number")
		}
		if last >= id {
			return ack.AchievedLevel, nil
		}
	}
}
