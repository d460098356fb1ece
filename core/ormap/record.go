// Package ormap is the multi-value map of PROTOCOL section 6: the record of a tag,
// the decision what becomes of an add or a removal, the hashes of its Merkle tree
// (PROTOCOL 7.5), and a map in memory for clients, tests and models. Servers keep
// records in their own structures and use Decide and the hashes.
//
// Values are msgpack bytes that Check of package msgval has accepted.
package ormap

import (
	"cmp"
	"unicode/utf8"

	"github.com/topgun-sync/topgun/core/lwwmap"
)

// Record is what a key holds under one tag. With a value it is an add; without one
// it is the tombstone of the tag.
type Record struct {
	// Tag tells the record apart from the others of its key; opaque.
	Tag string
	// Record is the value with its stamp and ttl. A value of nil is one byte, 0xc0.
	lwwmap.Record
}

// Decide says what becomes of a remote record, given what there is of its tag: the
// local record, nil if there is none, and whether the tag has a tombstone. A
// tombstone stays for ever and takes in no second one (Duplicate); an add below it is
// Superseded. A tag that is removed before it was added is Applied: the add may
// still come. Of two adds the greater stamp stays, as in lwwmap.Decide.
func Decide(local *Record, tombstoned bool, remote Record) lwwmap.Outcome {
	switch {
	case remote.Deleted() && tombstoned:
		return lwwmap.Duplicate
	case remote.Deleted():
		return lwwmap.Applied
	case tombstoned:
		return lwwmap.Superseded
	case local == nil:
		return lwwmap.Applied
	}
	return lwwmap.Decide(&local.Record, remote.Record)
}

// CompareTags orders tags, and the keys of values, by their UTF-16 code units, as
// JavaScript sorts strings. Bytes that are not UTF-8 count as U+FFFD each.
func CompareTags(a, b string) int { return compare(a, b) }

func compare[T string | []byte](a, b T) int {
	for i := 0; i < len(a) && i < len(b); i++ {
		if a[i] >= utf8.RuneSelf || b[i] >= utf8.RuneSelf {
			return compareUTF16(string(a[i:]), string(b[i:]))
		}
		if a[i] != b[i] {
			return cmp.Compare(a[i], b[i])
		}
	}
	return cmp.Compare(len(a), len(b))
}

// compareUTF16 compares strings of which all that is before is equal ASCII.
func compareUTF16(a, b string) int {
	for a != "" && b != "" {
		x, n := utf8.DecodeRuneInString(a)
		y, m := utf8.DecodeRuneInString(b)
		if x != y {
			// Surrogates, of which the characters beyond U+FFFF are made, lie below
			// the private use area and what follows it.
			if high, other := x > 0xffff, y > 0xffff; high != other && max(min(x, y), 0xd800) > 0xdfff {
				if high {
					return -1
				}
				return 1
			}
			return cmp.Compare(x, y)
		}
		a, b = a[n:], b[m:]
	}
	return cmp.Compare(len(a), len(b))
}
