package query

import (
	"bytes"
	"cmp"
	"math"
	"math/bits"
	"strings"

	"github.com/topgun-sync/topgun/core/msgval"
)

// keyField is the attribute that means the key of a row.
const keyField = "_key"

// attribute names a field of a row.
type attribute struct {
	name string
	path []string // the names between the dots; nil without dots
	key  bool     // the key of the row; a field of that name is out of reach, as it is for the client
}

func newAttribute(name string) attribute {
	a := attribute{name: name, key: name == keyField}
	if strings.Contains(name, ".") {
		a.path = strings.Split(name, ".")
	}
	return a
}

// get returns the field of a row: the one of that very name or, if there is none,
// what the name leads to as a path (PROTOCOL 13.2). It returns nil if there is
// neither. key is the msgpack string of the key.
func (a *attribute) get(key, value []byte) []byte {
	if a.key {
		return key
	}
	v := field(value, a.name)
	if v != nil || a.path == nil {
		return v
	}
	for _, name := range a.path {
		if value = field(value, name); value == nil {
			return nil
		}
	}
	return value
}

// field returns the value of a field of a map, nil if there is none; of equal
// names the last wins. It is most of the time of Match.
func field(value []byte, name string) (found []byte) {
	h, ok := msgval.ReadHead(value)
	if !ok || h.Kind != msgval.MapKind {
		return nil
	}
	rest := value[h.Size:]
	for range h.N {
		n := size(rest)
		m := n + size(rest[n:])
		if n == 0 || m == n {
			return found
		}
		if n == 1+len(name) && rest[0] == 0xa0|byte(len(name)) {
			if string(rest[1:n]) == name {
				found = rest[n:m]
			}
		} else if n > 1+len(name) { // a longer head than needed, or another name
			if s, ok := text(rest[:n]); ok && string(s) == name {
				found = rest[n:m]
			}
		}
		rest = rest[m:]
	}
	return found
}

// size is msgval.Skip, and quicker for what is short: integers up to 127, nil,
// bools, and strings of up to 31 bytes.
func size(b []byte) int {
	if len(b) == 0 {
		return 0
	}
	var n int
	switch c := b[0]; {
	case c <= 0x7f || c == 0xc0 || c == 0xc2 || c == 0xc3:
		n = 1
	case c&0xe0 == 0xa0:
		n = 1 + int(c&0x1f)
	default:
		return msgval.Skip(b)
	}
	if n > len(b) {
		return 0
	}
	return n
}

// pairs yields keys and values of a map, and nothing for any other value.
func pairs(value []byte) func(func(key, value []byte) bool) {
	return func(yield func(key, value []byte) bool) {
		h, ok := msgval.ReadHead(value)
		if !ok || h.Kind != msgval.MapKind {
			return
		}
		rest := value[h.Size:]
		for range h.N {
			n := msgval.Skip(rest)
			m := n + msgval.Skip(rest[n:])
			if n == 0 || m == n || !yield(rest[:n], rest[n:m]) {
				return
			}
			rest = rest[m:]
		}
	}
}

// elements yields the elements of an array, and nothing for any other value.
func elements(value []byte) func(func([]byte) bool) {
	return func(yield func([]byte) bool) {
		h, ok := msgval.ReadHead(value)
		if !ok || h.Kind != msgval.ArrayKind {
			return
		}
		rest := value[h.Size:]
		for range h.N {
			n := msgval.Skip(rest)
			if n == 0 || !yield(rest[:n]) {
				return
			}
			rest = rest[n:]
		}
	}
}

// kindOf returns the kind of a value, and nil for no bytes.
func kindOf(value []byte) msgval.Kind {
	h, _ := msgval.ReadHead(value)
	return h.Kind
}

// text returns the bytes of a string, and false for any other value.
func text(v []byte) ([]byte, bool) {
	h, ok := msgval.ReadHead(v)
	if !ok || h.Kind != msgval.StrKind {
		return nil, false
	}
	return v[h.Size:], true
}

// falsy reports whether JavaScript takes a value for false.
func falsy(value []byte) bool {
	h, ok := msgval.ReadHead(value)
	if !ok {
		return true
	}
	switch h.Kind {
	case msgval.NilKind:
		return true
	case msgval.BoolKind, msgval.UintKind:
		return h.Num == 0
	case msgval.FloatKind:
		f := math.Float64frombits(h.Num)
		return f == 0 || math.IsNaN(f)
	case msgval.StrKind:
		return h.N == 0
	}
	return false
}

// number is the place of a number among all numbers that msgpack knows. Integers
// and floats are compared by what they are, however large; -0 is 0, and NaN comes
// after everything.
type number struct {
	high uint64 // the largest float64 that is not above, as bits that sort like it
	low  uint16 // what an integer has on top of that
}

// numberOf returns the number that a head says, and false if it says something
// else.
func numberOf(h msgval.Head) (n number, ok bool) {
	switch h.Kind {
	case msgval.UintKind:
		// Of 64 bits the first 53 are the float, and the rest is left.
		shift := max(bits.Len64(h.Num)-53, 0)
		floor := h.Num >> shift << shift
		return number{high: sortable(float64(floor)), low: uint16(h.Num - floor)}, true
	case msgval.IntKind:
		abs := -h.Num
		shift := max(bits.Len64(abs)-53, 0)
		ceil := abs >> shift << shift
		if ceil != abs {
			ceil += 1 << shift
		}
		return number{high: sortable(-float64(ceil)), low: uint16(ceil - abs)}, true
	case msgval.FloatKind:
		f := math.Float64frombits(h.Num)
		if math.IsNaN(f) {
			return number{high: math.MaxUint64}, true
		}
		return number{high: sortable(f + 0)}, true // -0 + 0 is 0
	}
	return number{}, false
}

// sortable returns bits that sort as unsigned integers like the floats.
func sortable(f float64) uint64 {
	b := math.Float64bits(f)
	if b>>63 == 1 {
		return ^b
	}
	return b | 1<<63
}

func (n number) isNaN() bool { return n.high == math.MaxUint64 }

func (n number) compare(o number) int {
	return cmp.Or(cmp.Compare(n.high, o.high), cmp.Compare(n.low, o.low))
}

// operand is a value of the query, made ready for comparing.
type operand struct {
	raw  []byte // canonical; nil if the query has none
	kind msgval.Kind
	str  []byte
	num  number
	isN  bool // it is a number
}

func newOperand(value []byte) operand {
	if value == nil {
		return operand{}
	}
	o := operand{raw: msgval.Canonical(nil, value)}
	h, _ := msgval.ReadHead(o.raw)
	o.kind = h.Kind
	o.num, o.isN = numberOf(h)
	o.str, _ = text(o.raw)
	return o
}

// equal reports whether a field, nil if it is missing, is equal to the operand.
// Numbers are equal by value, containers by content; NaN is equal to nothing, and
// no operand to a missing field only.
func (o *operand) equal(v []byte) bool {
	if o.raw == nil || v == nil {
		return o.raw == nil && v == nil
	}
	switch {
	case o.kind == msgval.StrKind:
		s, ok := text(v)
		return ok && bytes.Equal(s, o.str)
	case o.isN:
		h, _ := msgval.ReadHead(v)
		n, ok := numberOf(h)
		return ok && n == o.num && !n.isNaN()
	case o.kind <= msgval.BoolKind:
		return v[0] == o.raw[0]
	}
	return msgval.Equal(v, o.raw)
}

// compare orders a field against the operand. It returns false unless both are
// numbers, both strings or both bools (PROTOCOL 13.2).
func (o *operand) compare(v []byte) (c int, ok bool) {
	if v == nil || o.raw == nil {
		return 0, false
	}
	h, _ := msgval.ReadHead(v)
	switch {
	case o.isN:
		n, ok := numberOf(h)
		return n.compare(o.num), ok && !n.isNaN() && !o.num.isNaN()
	case h.Kind != o.kind:
		return 0, false
	case o.kind == msgval.StrKind:
		return compareText(v[h.Size:], o.str), true
	case o.kind == msgval.BoolKind:
		return cmp.Compare(v[0], o.raw[0]), true
	}
	return 0, false
}

// indexForm returns one form for all values that are equal to an operand, and
// false for NaN. The bytes alias v where they can.
func indexForm(v []byte) ([]byte, bool) {
	h, _ := msgval.ReadHead(v)
	switch h.Kind {
	case msgval.NilKind, msgval.BoolKind:
		return v, true
	case msgval.UintKind, msgval.IntKind:
		if h.Size == 1 {
			return v, true
		}
	case msgval.StrKind:
		if minimal := h.N <= 31 && h.Size == 1 || h.N > 31 && h.N <= math.MaxUint8 && h.Size == 2; minimal {
			return v, true
		}
	case msgval.FloatKind:
		f := math.Float64frombits(h.Num)
		switch {
		case math.IsNaN(f):
			return nil, false
		case f != math.Trunc(f):
		case f >= 0 && f < 1<<64:
			return msgval.AppendUint(nil, uint64(f)), true
		case f < 0 && f >= -1<<63:
			return msgval.AppendInt(nil, int64(f)), true
		}
	}
	return msgval.Canonical(nil, v), true
}
