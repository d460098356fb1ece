package query

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"

	"github.com/topgun-sync/topgun/core/msgval"
)

// The order of rows is that of bytes that are made of a row: for each sort field
// its kind and its value, then the key. These bytes are what Position returns, so
// a position is compared with rows without the row that it was taken from.

// maxOrdered is how many bytes of a text, a byte string or a container count for
// the order. It bounds positions and cursors; what is equal so far is ordered by
// what follows in the query and by key.
const maxOrdered = 1024

// The kinds in ascending order (PROTOCOL 13.3 → Do). 0 and 255 are never first, so
// that a descending field is the complement of an ascending one.
const (
	orderBool byte = iota + 1
	orderNumber
	orderText
	orderBin
	orderExt
	orderArray
	orderMap
	orderNone // nil and missing
)

// sortField is one field of the order.
type sortField struct {
	attr attribute
	desc bool
}

// utf16Order maps bytes of UTF-8 so that strings of the mapped bytes are ordered
// like the UTF-16 code units of JavaScript: the surrogate pairs, which begin with
// 0xf0 to 0xf4 in UTF-8, come before U+E000 to U+FFFF, with 0xee and 0xef.
func utf16Order(c byte) byte {
	switch {
	case c < 0xee || c > 0xf4:
		return c
	case c < 0xf0:
		return c + 5
	}
	return c - 2
}

// compareText orders strings by UTF-16 code units, as JavaScript does.
func compareText(a, b []byte) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			if utf16Order(a[i]) < utf16Order(b[i]) {
				return -1
			}
			return 1
		}
	}
	return len(a) - len(b)
}

// appendOrder appends the bytes that order a row.
func (q *Query) appendOrder(dst []byte, key string, value []byte) []byte {
	for i := range q.sort {
		s := &q.sort[i]
		start := len(dst)
		if s.attr.key {
			dst = appendEnd(appendEscaped(dst, key))
		} else {
			dst = appendValueOrder(dst, s.attr.get(nil, value))
		}
		if s.desc {
			for i, b := range dst[start:] {
				dst[start+i] = ^b
			}
		}
		if s.attr.key {
			return dst
		}
	}
	return appendEscaped(dst, key)
}

// appendValueOrder appends the bytes that order a field, nil if it is missing.
func appendValueOrder(dst, v []byte) []byte {
	h, ok := msgval.ReadHead(v)
	if !ok {
		return append(dst, orderNone)
	}
	switch h.Kind {
	case msgval.NilKind:
		return append(dst, orderNone)
	case msgval.BoolKind:
		return append(dst, orderBool, byte(h.Num)+1)
	case msgval.StrKind:
		return appendEnd(appendEscaped(append(dst, orderText), first(v[h.Size:])))
	case msgval.BinKind:
		return appendEnd(appendEscaped(append(dst, orderBin), first(v[h.Size:])))
	case msgval.ExtKind:
		return appendEnd(appendEscaped(append(dst, orderExt, byte(h.Num)), first(v[h.Size:])))
	case msgval.ArrayKind:
		return appendEnd(appendEscaped(append(dst, orderArray), first(msgval.Canonical(nil, v))))
	case msgval.MapKind:
		return appendEnd(appendEscaped(append(dst, orderMap), first(msgval.Canonical(nil, v))))
	}
	n, _ := numberOf(h)
	dst = binary.BigEndian.AppendUint64(append(dst, orderNumber), n.high)
	return binary.BigEndian.AppendUint16(dst, n.low)
}

func first(b []byte) []byte { return b[:min(len(b), maxOrdered)] }

// appendEscaped appends bytes in the order of UTF-16 so that appendEnd can mark
// their end.
func appendEscaped[T string | []byte](dst []byte, s T) []byte {
	for i := range len(s) {
		c := utf16Order(s[i])
		dst = append(dst, c)
		if c == 0 {
			dst = append(dst, 0xff)
		}
	}
	return dst
}

// appendEnd ends what appendEscaped wrote: what goes on comes later.
func appendEnd(dst []byte) []byte { return append(dst, 0, 1) }

// Compare orders two rows, or two groups, by the sort fields of the query and then
// by key (PROTOCOL 13.3 → Do): bools, numbers, strings, everything else, and last
// what is nil or missing; a descending field turns that round. Strings are ordered
// by UTF-16 code units and by their first 1,024 bytes, keys by all. It is a total
// order.
func (q *Query) Compare(a, b Row) int {
	var bufA, bufB [128]byte
	return bytes.Compare(q.appendOrder(bufA[:0], a.Key, a.Value), q.appendOrder(bufB[:0], b.Key, b.Value))
}

// Position returns the place of a row, or a group, in the order of the query. It
// stays right when rows, and that row, come and go.
func (q *Query) Position(r Row) []byte { return q.appendOrder(nil, r.Key, r.Value) }

// After reports whether a row comes after a position. Everything comes after the
// empty position.
func (q *Query) After(position []byte, r Row) bool {
	if len(position) == 0 {
		return true
	}
	var buf [128]byte
	return bytes.Compare(q.appendOrder(buf[:0], r.Key, r.Value), position) > 0
}

// CursorStatus is what became of a cursor.
type CursorStatus uint8

// The states of a cursor.
const (
	CursorNone    CursorStatus = iota // the query has none
	CursorValid                       // the page begins after its position
	CursorInvalid                     // not a cursor of this query; the first page is meant
)

// CursorAt returns the cursor of the page after a row, or a group. It can be used
// with the same map, where, predicate, sort and groups only; limit and fields may
// differ. It holds nothing but the position and does not expire.
func (q *Query) CursorAt(mapName string, r Row) string {
	position := q.Position(r)
	return base64.RawURLEncoding.EncodeToString(append(q.seal(mapName, position), position...))
}

// ResolveCursor returns the position of the query's cursor.
func (q *Query) ResolveCursor(mapName string) (position []byte, status CursorStatus) {
	if q.cursor == "" {
		return nil, CursorNone
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(q.cursor)
	if err != nil || len(b) <= sealSize {
		return nil, CursorInvalid
	}
	position = b[sealSize:]
	if !bytes.Equal(b[:sealSize], q.seal(mapName, position)) {
		return nil, CursorInvalid
	}
	return position, CursorValid
}

const sealSize = 16

// seal binds a position to the map and to what makes the order and the rows of the
// query. It keeps no secret: who forges a cursor gets another page of the same
// query.
func (q *Query) seal(mapName string, position []byte) []byte {
	h := sha256.New()
	for _, part := range [][]byte{[]byte(mapName), q.identity, position} {
		h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(part))))
		h.Write(part)
	}
	return h.Sum(nil)[:sealSize]
}
