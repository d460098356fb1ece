package wire

import (
	"errors"
	"math"
	"unsafe"

	"github.com/topgun-sync/topgun/core/msgval"
)

// envelopeDepth is how many containers lie around a value at most, in any frame
// or body.
const envelopeDepth = 8

// maxInteger is the largest integer of the protocol: JavaScript holds every
// integer up to it.
const maxInteger = 1 << 53

// reader reads a frame that scan has accepted, value by value. What it is asked
// to read is there; of its checks only those of kinds can fail. It moves a number
// rather than a slice, because that costs the garbage collector nothing.
type reader struct {
	data []byte
	pos  int // where the next value begins

	// The last map name and node id, to share the copies of equal ones.
	mapName, nodeID string
}

// scan checks that data is exactly one msgpack value and is a map, and returns a
// reader before it and the shape of data.
func scan(data []byte) (r reader, shape msgval.Shape, err *Error) {
	size, shape, scanErr := msgval.Scan(data, msgval.MaxDepth+envelopeDepth)
	switch {
	case errors.Is(scanErr, msgval.ErrTooDeep):
		return r, shape, badMessage("containers are nested too deeply; at most 128 are allowed in a value")
	case errors.Is(scanErr, msgval.ErrReserved):
		return r, shape, badMessage("the reserved byte 0xc1 is no msgpack")
	case scanErr != nil:
		return r, shape, badMessage("the msgpack is truncated")
	case size != len(data):
		return r, shape, badMessage("bytes follow the msgpack value; want exactly one")
	}
	return reader{data: data}, shape, nil
}

// rest returns what was not read.
func (r *reader) rest() []byte { return r.data[r.pos:] }

// skip reads over a value.
func (r *reader) skip() { r.pos += msgval.Skip(r.rest()) }

// raw reads a value as its bytes.
func (r *reader) raw() []byte {
	from := r.pos
	r.skip()
	return r.since(from)
}

// orNil reads a value as its bytes, and nil as none.
func (r *reader) orNil() []byte {
	if r.isNil() {
		return nil
	}
	return r.raw()
}

// since returns the bytes that were read since the reader was at from.
func (r *reader) since(from int) []byte { return r.data[from:r.pos:r.pos] }

// mapHeader reads the head of a map and returns the number of pairs. If the
// value is no map it reads over it and returns false.
func (r *reader) mapHeader() (int, bool) { return r.container(msgval.MapKind) }

// arrayHeader reads the head of an array as mapHeader does.
func (r *reader) arrayHeader() (int, bool) { return r.container(msgval.ArrayKind) }

func (r *reader) container(kind msgval.Kind) (int, bool) {
	h, ok := msgval.ReadHead(r.rest())
	if !ok || h.Kind != kind {
		r.skip()
		return 0, false
	}
	r.pos += h.Size
	return int(h.N), true
}

// str reads a string as its bytes. If the value is no string it reads over it
// and returns false.
func (r *reader) str() ([]byte, bool) {
	from := r.pos
	// Names of fields and most of what is in them is short.
	if c := r.data[from]; c&0xe0 == 0xa0 {
		r.pos += 1 + int(c&0x1f)
		return r.since(from + 1), true
	}
	h, _ := msgval.ReadHead(r.rest())
	if h.Kind != msgval.StrKind {
		r.skip()
		return nil, false
	}
	r.pos += h.Size + int(h.N)
	return r.since(from + h.Size), true
}

// atNil reports whether the next value is nil.
func (r *reader) atNil() bool { return r.data[r.pos] == 0xc0 }

// isNil reports whether the next value is nil, and reads it if so.
func (r *reader) isNil() bool {
	if !r.atNil() {
		return false
	}
	r.pos++
	return true
}

// bool reads a bool as str reads a string.
func (r *reader) bool() (v, ok bool) {
	switch c := r.data[r.pos]; c {
	case 0xc2, 0xc3:
		r.pos++
		return c == 0xc3, true
	}
	r.skip()
	return false, false
}

// integer reads an integer from 0 to 2^53, in any numeric form. It returns false
// for every other value.
func (r *reader) integer() (uint64, bool) {
	f, isFloat, n, ok := r.number()
	if ok && isFloat {
		if math.Signbit(f) || f != math.Trunc(f) || f > maxInteger { // false for NaN
			return 0, false
		}
		return uint64(f), f == f
	}
	return n, ok && n <= maxInteger
}

// number reads a number: a float, or an integer that is not negative. It returns
// false for every other value.
func (r *reader) number() (f float64, isFloat bool, n uint64, ok bool) {
	h, _ := msgval.ReadHead(r.rest())
	switch h.Kind {
	case msgval.UintKind:
		r.pos += h.Size
		return 0, false, h.Num, true
	case msgval.FloatKind:
		r.pos += h.Size
		return math.Float64frombits(h.Num), true, 0, true
	}
	r.skip()
	return 0, false, 0, false
}

// internMapName returns the string with these bytes.
func (r *reader) internMapName(b []byte) string {
	if string(b) != r.mapName {
		r.mapName = string(b)
	}
	return r.mapName
}

// internNodeID returns the string with these bytes.
func (r *reader) internNodeID(b []byte) string {
	if string(b) != r.nodeID {
		r.nodeID = string(b)
	}
	return r.nodeID
}

// alias returns the string that shares b's memory. The frame is not changed
// while a message is in use: see the package comment.
func alias(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) } //nolint:gosec // G103: read-only view of bytes that live as long as it

// fields reads a map as an envelope: each key must be a string. visit is called
// with the reader before each value, and must read exactly that value. Of equal
// keys all are visited; so the last one wins. If the value is no map, or a key
// is no string, fields returns the error; the rest of the map is then unread.
func (r *reader) fields(what string, visit func(key []byte) *Error) *Error {
	n, ok := r.mapHeader()
	if !ok {
		return badMessage(what + " must be a map")
	}
	for range n {
		key, ok := r.str()
		if !ok {
			return badMessage("the keys of " + what + " must be strings")
		}
		if err := visit(key); err != nil {
			return err
		}
	}
	return nil
}
