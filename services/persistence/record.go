package persistence

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/keyspace"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/msgval"
)

// Arrival is when a shard took a change in: strictly increasing within the
// shard, also across owners (ARCHITECTURE 2).
type Arrival struct {
	// Millis are milliseconds since the Unix epoch by the owner's clock.
	Millis uint64
	// Counter counts within the millisecond.
	Counter uint64
}

// Compare orders arrivals by time.
func (a Arrival) Compare(b Arrival) int {
	return cmp.Or(cmp.Compare(a.Millis, b.Millis), cmp.Compare(a.Counter, b.Counter))
}

// Kind says what a record is about, and so when it takes the place of a stored one.
// The numbers are stored.
type Kind uint8

const (
	// LWW is a key of an LWW-map.
	LWW Kind = 0
	// OR is a tag below a key of an OR-map.
	OR Kind = 2
	// Counter is what one node added to and took from a counter.
	Counter Kind = 3
	// Lock is what the shard logged of a lock last.
	Lock Kind = 4
)

// Identity names a record. Records of several kinds may share map and key.
type Identity struct {
	// Kind is what the record is about.
	Kind Kind
	// Map is the name of the map.
	Map string
	// Key is the key: any bytes.
	Key string
	// Tag is the tag of an OR-map's element or the node of a counter: any bytes,
	// and none with other kinds.
	Tag string
}

// Partition is the partition of the identity: the key alone decides.
func (id Identity) Partition() int { return keyspace.Partition(id.Key) }

// Compare orders identities in some order that is the same everywhere, map first.
func (id Identity) Compare(other Identity) int {
	return cmp.Or(strings.Compare(id.Map, other.Map), strings.Compare(id.Key, other.Key),
		cmp.Compare(id.Kind, other.Kind), strings.Compare(id.Tag, other.Tag))
}

// Pruned says that a tombstone was forgotten: what is stored under the identity and
// arrived before it goes.
type Pruned struct {
	Identity
	// Arrival is when the shard forgot it.
	Arrival Arrival
}

// Record is the stored state of one identity.
type Record struct {
	Identity
	// State is value, stamp and time to live. Its value is shared, not copied.
	State lwwmap.Record
	// Arrival is when the shard took the state in.
	Arrival Arrival
	// Restamped are the original stamps of ops that were too far in the future
	// (PROTOCOL 22.4). Usually empty.
	Restamped []hlc.Timestamp
}

// Replaces reports whether the record may take the place of a stored one of the
// same identity: it arrived later and, in an LWW-map, its stamp is not older.
//
// The arrival alone orders the log, so a record that is delivered again, or late
// by another drainer, is recognised by it. The stamp says who won in an LWW-map; a
// shard never logs a loser, so a later arrival with an older stamp can only be a
// fault, and keeping the newer stamp is what keeps a delete deleted (RELIABILITY
// PG-02, CRDT-04). Equal stamps pass: a shard logs the same state again when only
// the remembered original stamps grew. With the other kinds the stamp does not
// decide: a tombstone beats a younger add, and counters merge by their sums.
func (r Record) Replaces(stored Record) bool {
	return r.Arrival.Compare(stored.Arrival) > 0 &&
		(r.Kind != LWW || r.State.Timestamp.Compare(stored.State.Timestamp) >= 0)
}

// KeyText is the key as text, for people; ok is false when it is not text that a
// database can hold.
func (r Record) KeyText() (text string, ok bool) {
	return r.Key, utf8.ValidString(r.Key) && !strings.Contains(r.Key, "\x00")
}

// ValueJSON appends the value as JSON, for people; ok is false when it has no
// JSON form, and then dst is returned as it was.
func (r Record) ValueJSON(dst []byte) (text []byte, ok bool) {
	if r.State.Deleted() {
		return dst, false
	}
	if rest, err := msgval.Check(r.State.Value); err != nil || len(rest) > 0 {
		return dst, false
	}
	if text, ok = msgval.AppendJSON(dst, r.State.Value); !ok || escapesNUL(text[len(dst):]) {
		return dst, false
	}
	return text, true
}

// escapesNUL reports whether JSON text holds a NUL, which Postgres' jsonb refuses.
func escapesNUL(text []byte) bool {
	for {
		i := bytes.IndexByte(text, '\\')
		if i < 0 {
			return false
		}
		if bytes.HasPrefix(text[i:], []byte(`\u0000`)) {
			return true
		}
		text = text[i+2:] // what is escaped may be a backslash
	}
}

// Size is about how many bytes the record holds in memory.
func (r Record) Size() int {
	size := 144 + len(r.Map) + len(r.Key) + len(r.Tag) + len(r.State.Value) + len(r.State.Timestamp.NodeID)
	for _, stamp := range r.Restamped {
		size += 32 + len(stamp.NodeID)
	}
	return size
}

// ExpiresAt is when the record stops being visible, for people; ok is false when
// it never does.
func (r Record) ExpiresAt() (at time.Time, ok bool) {
	millis, ok := r.State.ExpiresAt()
	if !ok {
		return time.Time{}, false
	}
	return time.UnixMilli(int64(min(millis, lastMillis))).UTC(), true
}

// lastMillis is the end of the year 9999, the last that every database can show.
const lastMillis = 253402300799999

// EncodeRestamped writes stamps as a JSON array of "millis:counter:node", empty
// for none. It is text, not a column type, since a node id may hold a NUL, which
// JSON text escapes and jsonb refuses.
func EncodeRestamped(stamps []hlc.Timestamp) (string, error) {
	if len(stamps) == 0 {
		return "", nil
	}
	texts := make([]string, len(stamps))
	for i, stamp := range stamps {
		texts[i] = stamp.String()
	}
	text, err := json.Marshal(texts)
	if err != nil {
		return "", fmt.Errorf("encode original stamps: %w", err)
	}
	return string(text), nil
}

// DecodeRestamped is the inverse of EncodeRestamped. Text that it cannot read was
// written by somebody else: ErrRefused.
func DecodeRestamped(text string) ([]hlc.Timestamp, error) {
	if text == "" {
		return nil, nil
	}
	var texts []string
	if err := json.Unmarshal([]byte(text), &texts); err != nil {
		return nil, fmt.Errorf("%w: the original stamps of a stored record are not a JSON array of strings", ErrRefused)
	}
	stamps := make([]hlc.Timestamp, len(texts))
	for i, text := range texts {
		stamp, err := hlc.Parse(text)
		if err != nil {
			return nil, fmt.Errorf("%w: an original stamp of a stored record is not millis:counter:node", ErrRefused)
		}
		stamps[i] = stamp
	}
	return stamps, nil
}
