// Package msgval works on values as the msgpack bytes they travel and are stored
// in: it checks them, compares them, and turns them into their canonical and
// their JSON form. It builds no trees of Go values.
//
// Scan and Check accept any bytes. They use a fixed amount of memory whatever
// the bytes announce, and do not recurse. The other functions expect bytes that
// Check has accepted; given others they may return nonsense, but do not panic.
package msgval

import (
	"encoding/binary"
	"errors"
)

// MaxDepth is how deep containers may be nested in a value. A scalar has depth
// 0, an empty array depth 1.
const MaxDepth = 128

// What Check finds wrong.
var (
	// ErrTruncated means that the bytes end before the value does, or that a
	// length announces more than there are bytes.
	ErrTruncated = errors.New("msgpack value is truncated")
	// ErrTooDeep means that containers are nested deeper than allowed.
	ErrTooDeep = errors.New("msgpack value is nested deeper than 128 containers")
	// ErrReserved means that the value holds the byte 0xc1, which begins nothing.
	ErrReserved = errors.New("msgpack value holds the reserved byte 0xc1")
)

// maxScanDepth bounds what Scan can be asked for: a frame holds a value of
// MaxDepth and its own containers around it.
const maxScanDepth = MaxDepth + 32

// Check checks that b begins with one well-formed msgpack value nested at most
// MaxDepth deep, and returns what follows it. Map keys may be of any type and
// strings need not be UTF-8. It does not allocate.
func Check(b []byte) (rest []byte, err error) {
	size, _, err := Scan(b, MaxDepth)
	if err != nil {
		return nil, err
	}
	return b[size:], nil
}

// Shape is what Scan finds on its way through a value.
type Shape struct {
	// Depth is how deep it is nested.
	Depth int
	// Foreign says that some extension in it is not the timestamp of the msgpack
	// specification, type -1, the only one that every client can read.
	Foreign bool
}

// timestampExt is the type byte of the timestamp extension.
const timestampExt = 0xff

// Scan is Check with another limit of depth, at most MaxDepth+32. It returns the
// size of the value and its shape.
func Scan(b []byte, maxDepth int) (size int, shape Shape, err error) {
	maxDepth = min(maxDepth, maxScanDepth)
	var outer [maxScanDepth]int // values still to come in each container around
	level, left, pos := 0, 1, 0 // left: values still to come in the innermost one
	for {
		if pos == len(b) {
			return 0, Shape{}, ErrTruncated
		}
		left--
		switch n := shortSize(b[pos]); {
		case n > 0:
			pos += n
			if pos > len(b) {
				return 0, Shape{}, ErrTruncated
			}
		case b[pos] == 0xc1:
			return 0, Shape{}, ErrReserved
		default:
			h, ok := ReadHead(b[pos:])
			if !ok {
				return 0, Shape{}, ErrTruncated
			}
			pos += h.Size
			// A value takes a byte at least. Comparing before counting keeps
			// the numbers small on any platform.
			if h.Values() > uint64(len(b)-pos) {
				return 0, Shape{}, ErrTruncated
			}
			if !h.Kind.Container() {
				shape.Foreign = shape.Foreign || h.Kind == ExtKind && h.Num != timestampExt
				pos += int(h.N)
				break
			}
			if level == maxDepth {
				return 0, Shape{}, ErrTooDeep
			}
			outer[level] = left
			level++
			shape.Depth = max(shape.Depth, level)
			left = int(h.Values())
		}
		for left == 0 {
			if level == 0 {
				return pos, shape, nil
			}
			level--
			left = outer[level]
		}
	}
}

// shortSize returns the size of a value that its first byte tells, 0 if it does
// not: of nil, bools, short integers and short strings, most of what there is.
func shortSize(c byte) int {
	switch {
	case c <= 0x7f || c >= 0xe0 || c == 0xc0 || c == 0xc2 || c == 0xc3:
		return 1
	case c&0xe0 == 0xa0:
		return 1 + int(c&0x1f)
	}
	return 0
}

// Skip returns the size of the value at the start of b, which Check has
// accepted. It returns 0 if there is no such value.
func Skip(b []byte) int {
	pos := 0
	for left := uint64(1); left > 0; left-- {
		if pos >= len(b) {
			return 0
		}
		if n := shortSize(b[pos]); n > 0 {
			pos += n
			continue
		}
		h, ok := ReadHead(b[pos:])
		if !ok || h.Values() > uint64(len(b)-pos-h.Size) {
			return 0
		}
		pos += h.Size
		if h.Kind.Container() {
			left += h.Values()
		} else {
			pos += int(h.N)
		}
	}
	if pos > len(b) {
		return 0
	}
	return pos
}

// Kind is what a value is.
type Kind uint8

// The kinds of values.
const (
	NilKind Kind = iota
	BoolKind
	UintKind  // an integer that is not negative; Head.Num is it
	IntKind   // a negative integer; Head.Num is it in two's complement
	FloatKind // Head.Num is the bits of the float64
	StrKind
	BinKind
	ExtKind // Head.Num is the type byte
	ArrayKind
	MapKind
)

// Container reports whether other values lie within.
func (k Kind) Container() bool { return k >= ArrayKind }

// Head is what the first bytes of a value say.
type Head struct {
	Kind Kind
	Size int    // bytes of the head itself
	N    uint64 // str, bin, ext: bytes that follow; array, map: elements or pairs
	Num  uint64 // bool: 1 for true; numbers and ext: see Kind
}

// Values returns how many values follow the head of a container.
func (h Head) Values() uint64 {
	if h.Kind == MapKind {
		return 2 * h.N
	}
	return h.N
}

// ReadHead reads the head of the value at the start of b. It returns false if b
// is too short for the head or begins with 0xc1. Whether what the head announces
// is there is for the caller to know, from Check.
func ReadHead(b []byte) (Head, bool) {
	if len(b) == 0 {
		return Head{}, false
	}
	c := b[0]
	switch {
	case c <= 0x7f:
		return Head{Kind: UintKind, Size: 1, Num: uint64(c)}, true
	case c <= 0x8f:
		return Head{Kind: MapKind, Size: 1, N: uint64(c & 0x0f)}, true
	case c <= 0x9f:
		return Head{Kind: ArrayKind, Size: 1, N: uint64(c & 0x0f)}, true
	case c <= 0xbf:
		return Head{Kind: StrKind, Size: 1, N: uint64(c & 0x1f)}, true
	case c >= 0xe0:
		return Head{Kind: IntKind, Size: 1, Num: uint64(int64(int8(c)))}, true
	}
	switch c {
	case 0xc0:
		return Head{Kind: NilKind, Size: 1}, true
	case 0xc1:
		return Head{}, false
	case 0xc2, 0xc3:
		return Head{Kind: BoolKind, Size: 1, Num: uint64(c & 1)}, true
	}
	f := &forms[c-0xc4]
	if len(b) <= f.bytes {
		return Head{}, false
	}
	var n uint64
	switch f.bytes {
	case 1:
		n = uint64(b[1])
	case 2:
		n = uint64(binary.BigEndian.Uint16(b[1:]))
	case 4:
		n = uint64(binary.BigEndian.Uint32(b[1:]))
	case 8:
		n = binary.BigEndian.Uint64(b[1:])
	}
	h := Head{Kind: f.kind, Size: 1 + f.bytes}
	switch f.kind {
	case UintKind:
		h.Num = n
	case IntKind:
		shift := 64 - 8*f.bytes
		h.Num = uint64(int64(n<<shift) >> shift)
		if int64(h.Num) >= 0 {
			h.Kind = UintKind
		}
	case FloatKind:
		h.Num = n
		if f.bytes == 4 {
			h.Num = widen(uint32(n))
		}
	case ExtKind:
		h.N = n
		if f.fixed > 0 {
			h.N = uint64(f.fixed)
		}
		if len(b) <= h.Size {
			return Head{}, false
		}
		h.Num = uint64(b[h.Size])
		h.Size++
	default:
		h.N = n
	}
	return h, true
}

// forms describes the head bytes 0xc4 to 0xdf: the kind, how many bytes of
// number follow, and the fixed size of an extension.
var forms = [...]struct {
	kind  Kind
	bytes int
	fixed int
}{
	{BinKind, 1, 0},
	{BinKind, 2, 0},
	{BinKind, 4, 0},
	{ExtKind, 1, 0},
	{ExtKind, 2, 0},
	{ExtKind, 4, 0},
	{FloatKind, 4, 0},
	{FloatKind, 8, 0},
	{UintKind, 1, 0},
	{UintKind, 2, 0},
	{UintKind, 4, 0},
	{UintKind, 8, 0},
	{IntKind, 1, 0},
	{IntKind, 2, 0},
	{IntKind, 4, 0},
	{IntKind, 8, 0},
	{ExtKind, 0, 1},
	{ExtKind, 0, 2},
	{ExtKind, 0, 4},
	{ExtKind, 0, 8},
	{ExtKind, 0, 16},
	{StrKind, 1, 0},
	{StrKind, 2, 0},
	{StrKind, 4, 0},
	{ArrayKind, 2, 0},
	{ArrayKind, 4, 0},
	{MapKind, 2, 0},
	{MapKind, 4, 0},
}
