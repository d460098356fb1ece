// Package lwwmap is the last-writer-wins map of PROTOCOL section 5: the record,
// the decision which of two records of a key stays, and a map of records in
// memory for clients, tests and models. Servers keep records in their own
// structures and use Decide.
//
// Values are msgpack bytes that Check of package msgval has accepted.
package lwwmap

import (
	"math"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/msgval"
)

// Record is the state of one key.
type Record struct {
	// Value is one msgpack value. Empty means that the key was deleted: the
	// record is a tombstone.
	Value []byte
	// Timestamp decides which record of a key stays.
	Timestamp hlc.Timestamp
	// TTLMillis is for how long after Timestamp.Millis the value is visible; 0
	// means for ever.
	TTLMillis uint64
}

// Deleted reports whether the record is a tombstone.
func (r Record) Deleted() bool { return len(r.Value) == 0 }

// ExpiresAt returns the last millisecond of Unix time at which the value is
// visible. It returns false if the value does not expire or is deleted already.
func (r Record) ExpiresAt() (millis uint64, ok bool) {
	if r.TTLMillis == 0 || r.Deleted() {
		return 0, false
	}
	if r.TTLMillis > math.MaxUint64-r.Timestamp.Millis {
		return math.MaxUint64, true
	}
	return r.Timestamp.Millis + r.TTLMillis, true
}

// VisibleAt reports whether readers see the value at a wall clock time: it is
// not deleted and has not expired (PROTOCOL 5.3).
func (r Record) VisibleAt(nowMillis uint64) bool {
	if r.Deleted() {
		return false
	}
	at, ok := r.ExpiresAt()
	return !ok || at >= nowMillis
}

// expirySuffix makes the node id of the tombstone of an expired record, which
// thereby beats the record and loses to every later write (PROTOCOL 22.5).
const expirySuffix = "-ttl"

// Expire returns the tombstone that takes the place of the record once it has
// expired. Every node computes the same one.
func (r Record) Expire() Record {
	t := r.Timestamp
	t.NodeID += expirySuffix
	return Record{Timestamp: t}
}

// Outcome is what becomes of a record that arrives.
type Outcome int

const (
	// Applied: it takes the place of the local record, whole.
	Applied Outcome = iota
	// Duplicate: it is the local record; nothing changes.
	Duplicate
	// Superseded: the local record has a greater stamp and stays.
	Superseded
	// Conflict: its stamp is that of the local record, its value or ttl is not.
	// The local record stays, as PROTOCOL 5.2 has it; replicas that saw the two
	// in different order differ, so a server refuses such a write.
	Conflict
)

// String returns the name of the outcome.
func (o Outcome) String() string {
	switch o {
	case Applied:
		return "applied"
	case Duplicate:
		return "duplicate"
	case Superseded:
		return "superseded"
	case Conflict:
		return "conflict"
	}
	return "unknown"
}

// Decide says what becomes of a remote record, given the local one, nil if there
// is none. Only stamps decide (PROTOCOL 5.2); values are compared, in canonical
// form, to tell a repetition from a reused stamp.
func Decide(local *Record, remote Record) Outcome {
	if local == nil {
		return Applied
	}
	switch c := remote.Timestamp.Compare(local.Timestamp); {
	case c > 0:
		return Applied
	case c < 0:
		return Superseded
	}
	if local.TTLMillis != remote.TTLMillis || local.Deleted() != remote.Deleted() ||
		!msgval.Equal(local.Value, remote.Value) {
		return Conflict
	}
	return Duplicate
}
