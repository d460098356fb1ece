// Package hlc is the hybrid logical clock of PROTOCOL section 4: the stamps that
// decide which of two writes wins, their total order, their text form, and the
// clock that makes them.
//
// It promises that a Clock never repeats or goes back, whatever the wall clock
// does. It does not bound what it is fed: a server must refuse or replace stamps
// that lie more than MaxDrift ahead before it calls Update (PROTOCOL 22.4).
package hlc

import (
	"cmp"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// MaxDrift is how far a stamp may lie ahead of the server's wall clock before
// the server stores the record under a stamp of its own (PROTOCOL 22.4).
const MaxDrift = 60 * time.Second

// maxCounter is the largest counter a Clock gives out: the largest integer that
// every JavaScript client reads exactly. Beyond it the clock goes on in the next
// millisecond.
const maxCounter = 1<<53 - 1

// ErrSyntax is wrapped by every error of Parse.
var ErrSyntax = errors.New("a timestamp is <millis>:<counter>:<node id> in plain decimal")

// Timestamp is one reading of a hybrid logical clock. The zero value is older
// than every stamp a clock gives out.
type Timestamp struct {
	// Millis is Unix time in milliseconds.
	Millis uint64
	// Counter tells apart the stamps of one node within one millisecond.
	Counter uint64
	// NodeID names the clock. It holds no ':'.
	NodeID string
}

// Compare orders stamps by Millis, then Counter, then the bytes of NodeID
// (PROTOCOL 4.4). It returns -1, 0 or 1. Zero means the same write.
func (t Timestamp) Compare(u Timestamp) int {
	if t.Millis != u.Millis {
		return cmp.Compare(t.Millis, u.Millis)
	}
	if t.Counter != u.Counter {
		return cmp.Compare(t.Counter, u.Counter)
	}
	return strings.Compare(t.NodeID, u.NodeID)
}

// IsZero reports whether t is the zero Timestamp.
func (t Timestamp) IsZero() bool { return t == Timestamp{} }

// String returns "millis:counter:node" (PROTOCOL 4.1), the form that is hashed
// and that Parse reads.
func (t Timestamp) String() string {
	b := make([]byte, 0, 42+len(t.NodeID))
	return string(t.AppendTo(b))
}

// AppendTo appends the form of String to dst.
func (t Timestamp) AppendTo(dst []byte) []byte {
	dst = strconv.AppendUint(dst, t.Millis, 10)
	dst = append(dst, ':')
	dst = strconv.AppendUint(dst, t.Counter, 10)
	dst = append(dst, ':')
	return append(dst, t.NodeID...)
}

// Parse reads the form of String. It is strict: exactly three parts, numbers in
// plain decimal without sign or leading zeros, so that every accepted text is
// what String returns for the result. The node id may be empty only in the zero
// stamp, "0:0:".
func Parse(s string) (Timestamp, error) {
	millis, rest, ok1 := strings.Cut(s, ":")
	counter, node, ok2 := strings.Cut(rest, ":")
	if !ok1 || !ok2 || strings.Contains(node, ":") {
		return Timestamp{}, fmt.Errorf("not three parts: %w", ErrSyntax)
	}
	m, ok := parseUint(millis)
	if !ok {
		return Timestamp{}, fmt.Errorf("millis is not a number: %w", ErrSyntax)
	}
	c, ok := parseUint(counter)
	if !ok {
		return Timestamp{}, fmt.Errorf("counter is not a number: %w", ErrSyntax)
	}
	if node == "" && (m != 0 || c != 0) {
		return Timestamp{}, fmt.Errorf("node id is empty: %w", ErrSyntax)
	}
	return Timestamp{Millis: m, Counter: c, NodeID: node}, nil
}

func parseUint(s string) (uint64, bool) {
	if s == "" || s[0] == '+' || len(s) > 1 && s[0] == '0' {
		return 0, false
	}
	n, err := strconv.ParseUint(s, 10, 64)
	return n, err == nil
}

// Clock gives out strictly increasing stamps of one node. It is not safe for
// concurrent use.
type Clock struct {
	nodeID          string
	wall            func() time.Time
	millis, counter uint64
}

// NewClock returns a clock of the given node that reads wall time from wall. To
// go on after a restart, Update it with the highest stamp it is known to have
// given out.
func NewClock(nodeID string, wall func() time.Time) *Clock {
	return &Clock{nodeID: nodeID, wall: wall}
}

// Now returns a stamp greater than every stamp the clock gave out or was updated
// with.
func (c *Clock) Now() Timestamp {
	if w := c.wallMillis(); w > c.millis {
		c.millis, c.counter = w, 0
	} else {
		c.increment()
	}
	return c.Last()
}

// Update moves the clock past a stamp that was received, by the table of
// PROTOCOL 4.2. It trusts the stamp: see MaxDrift.
func (c *Clock) Update(remote Timestamp) {
	m := max(c.millis, c.wallMillis(), remote.Millis)
	switch {
	case m == c.millis && m == remote.Millis:
		c.counter = max(c.counter, remote.Counter)
		c.increment()
	case m == c.millis:
		c.increment()
	case m == remote.Millis:
		c.millis, c.counter = m, remote.Counter
		c.increment()
	default:
		c.millis, c.counter = m, 0
	}
}

// Last returns the clock's state as a stamp, without advancing it.
func (c *Clock) Last() Timestamp {
	return Timestamp{Millis: c.millis, Counter: c.counter, NodeID: c.nodeID}
}

// increment advances the counter. It rolls into the next millisecond rather than
// reach a number that JavaScript cannot hold or wrap around.
func (c *Clock) increment() {
	if c.counter >= maxCounter {
		c.millis, c.counter = c.millis+1, 0
		return
	}
	c.counter++
}

// wallMillis reads the wall clock; a clock set before 1970 reads 0.
func (c *Clock) wallMillis() uint64 {
	return uint64(max(c.wall().UnixMilli(), 0))
}
