package ormap

import (
	"iter"
	"strconv"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/merkle"
)

// ItemHash is the hash of one key (PROTOCOL 7.5), given its live records in the
// order of CompareTags. A key without any has no item, and its hash counts as 0.
func ItemHash(key string, records iter.Seq[Record]) uint32 {
	h, some := BeginItem(key), false
	for r := range records {
		h, some = ExtendItem(h, r), true
	}
	if !some {
		return 0
	}
	return h
}

// BeginItem is the hash of a key's item before its first record.
func BeginItem(key string) uint32 { return merkle.Extend(merkle.Hash("key:"), key) }

// ExtendItem continues the hash of an item with its next record, so that a caller
// which keeps the hash after each record need not begin anew. It reads the value
// once, and sorts the keys of the maps in it.
func ExtendItem(h uint32, r Record) uint32 {
	t := text{hash: h}
	t.byte('|')
	t.hash = merkle.Extend(t.hash, r.Tag)
	t.byte(':')
	t.value(r.Value)
	t.byte(':')
	t.stamp(r.Timestamp)
	if r.TTLMillis != 0 {
		t.ascii(":ttl=")
		t.uint(r.TTLMillis)
	}
	return t.hash
}

// ValueString is V, the text of a value that is hashed (PROTOCOL 7.5).
func ValueString(value []byte) string {
	t := text{keep: true}
	t.value(value)
	return string(t.kept)
}

// text takes in the string that a client would build, piece by piece, and hashes it:
// there may be megabytes of it.
type text struct {
	hash uint32
	keep bool // the text in kept, instead of hashing it
	kept []byte
}

func (t *text) byte(c byte) {
	if t.keep {
		t.kept = append(t.kept, c)
		return
	}
	t.hash = merkle.ExtendByte(t.hash, c)
}

func (t *text) ascii(s string) {
	if t.keep {
		t.kept = append(t.kept, s...)
		return
	}
	t.hash = merkle.Extend(t.hash, s)
}

// bytes takes in whole characters of UTF-8.
func (t *text) bytes(s []byte) {
	if t.keep {
		t.kept = append(t.kept, s...)
		return
	}
	t.hash = merkle.Extend(t.hash, s)
}

func (t *text) uint(n uint64) {
	var digits [20]byte
	t.bytes(strconv.AppendUint(digits[:0], n, 10))
}

func (t *text) stamp(stamp hlc.Timestamp) {
	t.uint(stamp.Millis)
	t.byte(':')
	t.uint(stamp.Counter)
	t.byte(':')
	t.ascii(stamp.NodeID)
}
