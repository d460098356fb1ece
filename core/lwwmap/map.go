package lwwmap

import (
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"iter"
	"maps"
	"slices"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/msgval"
)

// Map is a map of records, tombstones included. The zero value is empty and
// ready. It keeps the values that it is given; neither side may change them. It
// is not safe for concurrent use.
type Map struct {
	records map[string]Record
}

// Len returns the number of records, tombstones included.
func (m *Map) Len() int { return len(m.records) }

// Get returns the record of a key, which may be a tombstone or expired.
func (m *Map) Get(key string) (Record, bool) {
	r, ok := m.records[key]
	return r, ok
}

// Merge takes in a record that another replica has, if it wins, and says what
// became of it. The caller feeds the stamp to its clock.
func (m *Map) Merge(key string, remote Record) Outcome {
	var local *Record
	if r, ok := m.records[key]; ok {
		local = &r
	}
	o := Decide(local, remote)
	if o == Applied {
		m.put(key, remote)
	}
	return o
}

// Set writes a value at the clock's next stamp, visible for ttlMillis, or for
// ever if that is 0. It returns the record.
func (m *Map) Set(clock *hlc.Clock, key string, value []byte, ttlMillis uint64) Record {
	r := Record{Value: value, Timestamp: clock.Now(), TTLMillis: ttlMillis}
	m.put(key, r)
	return r
}

// Remove writes a tombstone at the clock's next stamp and returns it.
func (m *Map) Remove(clock *hlc.Clock, key string) Record {
	r := Record{Timestamp: clock.Now()}
	m.put(key, r)
	return r
}

func (m *Map) put(key string, r Record) {
	if m.records == nil {
		m.records = make(map[string]Record)
	}
	m.records[key] = r
}

// All yields keys and records in the order of the bytes of the keys. The map
// must not be changed meanwhile.
func (m *Map) All() iter.Seq2[string, Record] {
	return func(yield func(string, Record) bool) {
		for _, key := range slices.Sorted(maps.Keys(m.records)) {
			if !yield(key, m.records[key]) {
				return
			}
		}
	}
}

// Leaves returns the leaf sums of the map, computed from all its records.
func (m *Map) Leaves(c merkle.Combine) *merkle.Leaves {
	l := new(merkle.Leaves)
	for key, r := range m.records {
		h := merkle.Hash(key)
		l.Add(merkle.Leaf(h), merkle.ItemHashOf(h, r.Timestamp), c)
	}
	return l
}

// Prune drops the tombstones with a stamp strictly below olderThan (PROTOCOL
// 5.4) and returns how many there were.
func (m *Map) Prune(olderThan hlc.Timestamp) int {
	before := len(m.records)
	maps.DeleteFunc(m.records, func(_ string, r Record) bool {
		return r.Deleted() && r.Timestamp.Compare(olderThan) < 0
	})
	return before - len(m.records)
}

// Digest returns a hash of the content that is equal on two replicas exactly if
// they hold the same records, whatever they did to get there. It is the SHA-256
// of, for each record in the order of the bytes of the keys: the key, the
// canonical value (nothing for a tombstone), the stamp's millis, counter and
// node id, the ttl. Strings and values are preceded by their length in bytes;
// lengths and numbers are 8 bytes, big-endian.
func (m *Map) Digest() [sha256.Size]byte {
	d := digester{h: sha256.New()}
	for key, r := range m.All() {
		d.bytes([]byte(key))
		d.value = msgval.Canonical(d.value[:0], r.Value)
		d.bytes(d.value)
		d.number(r.Timestamp.Millis)
		d.number(r.Timestamp.Counter)
		d.bytes([]byte(r.Timestamp.NodeID))
		d.number(r.TTLMillis)
	}
	return [sha256.Size]byte(d.h.Sum(nil))
}

type digester struct {
	h     hash.Hash
	value []byte
}

func (d *digester) number(n uint64) {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], n)
	d.h.Write(b[:])
}

func (d *digester) bytes(b []byte) {
	d.number(uint64(len(b)))
	d.h.Write(b)
}
