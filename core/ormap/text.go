package ormap

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"math"
	"slices"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/topgun-sync/topgun/core/msgval"
)

// value takes in the text of a whole value: of a scalar what String() makes of it,
// of a container its JSON, with the sorted names of its own properties as the
// allow-list that JSON.stringify then applies to every object within.
func (t *text) value(v []byte) {
	h, ok := msgval.ReadHead(v)
	if !ok || h.N > uint64(len(v)) {
		return
	}
	b := v[h.Size:]
	switch h.Kind {
	case msgval.StrKind:
		t.bytes(b[:h.N])
	case msgval.FloatKind:
		t.number(math.Float64frombits(h.Num))
	case msgval.BinKind:
		t.indexed(b[:h.N], allowed{all: true})
	case msgval.ArrayKind:
		t.json(v, allowed{indexes: h.N}, 0)
	case msgval.MapKind:
		names, _ := readPairs(b, h.N)
		t.object(names, allowed{pairs: names, all: true}, 0)
	default:
		t.json(v, allowed{}, 0)
	}
}

// maxDepth ends the recursion for bytes that Check did not accept.
const maxDepth = msgval.MaxDepth

// json takes in the JSON of the value at the start of b and returns what follows it.
func (t *text) json(b []byte, names allowed, depth int) (rest []byte) {
	h, ok := msgval.ReadHead(b)
	if !ok || depth > maxDepth {
		return nil
	}
	b = b[h.Size:]
	if h.N > uint64(len(b)) {
		return nil
	}
	switch h.Kind {
	case msgval.BoolKind:
		t.ascii(strconv.FormatBool(h.Num == 1))
	case msgval.UintKind:
		t.number(float64(h.Num))
	case msgval.IntKind:
		t.number(float64(int64(h.Num)))
	case msgval.FloatKind:
		if f := math.Float64frombits(h.Num); !math.IsNaN(f) && !math.IsInf(f, 0) {
			t.number(f)
		} else {
			t.ascii("null")
		}
	case msgval.StrKind:
		t.quoted(b[:h.N])
		return b[h.N:]
	case msgval.BinKind:
		t.indexed(b[:h.N], names)
		return b[h.N:]
	case msgval.ExtKind:
		t.date(int8(h.Num), b[:h.N])
		return b[h.N:]
	case msgval.ArrayKind:
		t.byte('[')
		for i := range h.N {
			if i > 0 {
				t.byte(',')
			}
			b = t.json(b, names, depth+1)
		}
		t.byte(']')
	case msgval.MapKind:
		pairs, rest := readPairs(b, h.N)
		t.object(pairs, names, depth)
		return rest
	default:
		t.ascii("null")
	}
	return b
}

// allowed is an allow-list of property names.
type allowed struct {
	pairs   []pair // with these names, in the order of CompareTags
	indexes uint64 // instead: the decimal indexes below it
	all     bool   // the object is the one that the list was made of
}

func (a allowed) has(name []byte) bool {
	switch {
	case a.all:
		return true
	case a.indexes > 0:
		n, err := strconv.ParseUint(string(name), 10, 64)
		return err == nil && n < a.indexes && strconv.FormatUint(n, 10) == string(name)
	}
	_, ok := slices.BinarySearchFunc(a.pairs, name, func(p pair, name []byte) int { return compare(p.name, name) })
	return ok
}

// pair is one property of an object; value begins with its bytes.
type pair struct {
	name  []byte
	value []byte
}

// readPairs reads n pairs, in the order of CompareTags, the last of equal names only.
func readPairs(b []byte, n uint64) (pairs []pair, rest []byte) {
	pairs = make([]pair, 0, min(n, uint64(len(b))))
	for range n {
		key := b
		b = b[msgval.Skip(b):]
		pairs = append(pairs, pair{propertyName(key[:len(key)-len(b)]), b})
		b = b[msgval.Skip(b):]
	}
	slices.SortFunc(pairs, func(a, b pair) int {
		if c := compare(a.name, b.name); c != 0 {
			return c
		}
		return cmp.Compare(len(b.value), len(a.value)) // the earlier has more behind it
	})
	kept := pairs[:0]
	for i, p := range pairs {
		if i+1 == len(pairs) || !bytes.Equal(pairs[i+1].name, p.name) {
			kept = append(kept, p)
		}
	}
	return kept, b
}

// propertyName is the property that a client makes of a map key.
func propertyName(key []byte) []byte {
	h, ok := msgval.ReadHead(key)
	if !ok || h.Kind != msgval.StrKind {
		return []byte(ValueString(key))
	}
	s := key[h.Size:]
	if !utf8.Valid(s) {
		return []byte(string([]rune(string(s)))) // U+FFFD for each byte, as a client decodes it
	}
	return s
}

func (t *text) object(pairs []pair, names allowed, depth int) {
	within := names
	within.all = false
	t.byte('{')
	first := true
	for _, p := range pairs {
		if !names.has(p.name) {
			continue
		}
		if !first {
			t.byte(',')
		}
		first = false
		t.quoted(p.name)
		t.byte(':')
		t.json(p.value, within, depth+1)
	}
	t.byte('}')
}

// indexed takes in a byte string, which a client holds as an object whose properties
// are indexes. They come in the order of strings, so 10 before 2.
func (t *text) indexed(b []byte, names allowed) {
	t.byte('{')
	first := true
	var prefix func(i int)
	prefix = func(i int) {
		if i >= len(b) {
			return
		}
		var digits [20]byte
		if name := strconv.AppendInt(digits[:0], int64(i), 10); names.has(name) {
			if !first {
				t.byte(',')
			}
			first = false
			t.byte('"')
			t.bytes(name)
			t.ascii(`":`)
			t.uint(uint64(b[i]))
		}
		if i > 0 {
			for digit := range 10 {
				prefix(10*i + digit)
			}
		}
	}
	for i := range 10 {
		prefix(i)
	}
	t.byte('}')
}

// number takes in a number as JavaScript prints it.
func (t *text) number(f float64) {
	switch {
	case math.IsNaN(f):
		t.ascii("NaN")
		return
	case math.IsInf(f, 0):
		if f < 0 {
			t.byte('-')
		}
		t.ascii("Infinity")
		return
	case f == 0: // also -0
		t.byte('0')
		return
	}
	var digits [32]byte
	if a := math.Abs(f); 1e-6 <= a && a < 1e21 {
		t.bytes(strconv.AppendFloat(digits[:0], f, 'f', -1, 64))
		return
	}
	s := strconv.AppendFloat(digits[:0], f, 'e', -1, 64)
	if n := len(s); s[n-2] == '0' && s[n-3] == '-' { // e-07
		s = append(s[:n-2], s[n-1])
	}
	t.bytes(s)
}

// quoted takes in a JSON string.
func (t *text) quoted(s []byte) {
	const hex = "0123456789abcdef"
	t.byte('"')
	plain := 0 // where the run of characters begins that stand for themselves
	for i, c := range s {
		if c >= 0x20 && c != '"' && c != '\\' {
			continue
		}
		t.bytes(s[plain:i])
		plain = i + 1
		t.byte('\\')
		switch c {
		case '"', '\\':
			t.byte(c)
		case '\b':
			t.byte('b')
		case '\f':
			t.byte('f')
		case '\n':
			t.byte('n')
		case '\r':
			t.byte('r')
		case '\t':
			t.byte('t')
		default:
			t.ascii("u00")
			t.byte(hex[c>>4])
			t.byte(hex[c&15])
		}
	}
	t.bytes(s[plain:])
	t.byte('"')
}

// date takes in an extension: a timestamp is a Date for the client, whose JSON is
// its time; it knows no others.
func (t *text) date(kind int8, b []byte) {
	var seconds int64
	var nanos uint32
	switch {
	case kind == -1 && len(b) == 4:
		seconds = int64(binary.BigEndian.Uint32(b))
	case kind == -1 && len(b) == 8:
		n := binary.BigEndian.Uint64(b)
		seconds, nanos = int64(n&(1<<34-1)), uint32(n>>34)
	case kind == -1 && len(b) == 12:
		nanos, seconds = binary.BigEndian.Uint32(b), int64(binary.BigEndian.Uint64(b[4:]))
	default:
		t.ascii("{}")
		return
	}
	const lastSecond = 253402300799 // of the year 9999
	if seconds < -62167219200 || seconds > lastSecond {
		t.ascii("null")
		return
	}
	t.byte('"')
	t.ascii(time.Unix(seconds, int64(nanos)).UTC().Format("2006-01-02T15:04:05.000Z"))
	t.byte('"')
}
