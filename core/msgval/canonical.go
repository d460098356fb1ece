package msgval

import (
	"bytes"
	"math"
	"slices"
)

// maxSafe is the largest integer below which every integer is a float64.
const maxSafe = 1 << 53

// Canonical appends the canonical form of a value to dst. Values that mean the
// same to a client have one canonical form: headers are minimal, integral floats
// within ±2^53 are integers (so -0 is 0), other floats are float64 and every NaN
// is the same one, map pairs are sorted by the bytes of their canonical keys,
// and of equal keys the last pair is kept. Strings, byte strings and extensions
// stay apart and keep their bytes. A value without bytes appends nothing.
func Canonical(dst, value []byte) []byte {
	dst, _ = canonical(dst, value, 0)
	return dst
}

// canonical appends the canonical form of the value at the start of b and
// returns what follows. Depth is bounded by Check; for unchecked bytes it stops
// at the same bound.
func canonical(dst, b []byte, depth int) (out, rest []byte) {
	h, ok := ReadHead(b)
	if !ok || depth > maxScanDepth {
		return dst, nil
	}
	b = b[h.Size:]
	if !h.Kind.Container() {
		if h.N > uint64(len(b)) {
			return dst, nil
		}
		return canonicalScalar(dst, h, b[:h.N]), b[h.N:]
	}
	if h.Values() > uint64(len(b)) {
		return dst, nil
	}
	if h.Kind == MapKind {
		return canonicalMap(dst, b, int(h.N), depth)
	}
	dst = AppendArrayHeader(dst, int(h.N))
	for range h.N {
		dst, b = canonical(dst, b, depth+1)
	}
	return dst, b
}

// canonicalScalar appends the canonical form of a value that is no container,
// given its head and the bytes after it.
func canonicalScalar(dst []byte, h Head, b []byte) []byte {
	switch h.Kind {
	case BoolKind:
		return AppendBool(dst, h.Num == 1)
	case UintKind:
		return AppendUint(dst, h.Num)
	case IntKind:
		return AppendInt(dst, int64(h.Num))
	case FloatKind:
		f := math.Float64frombits(h.Num)
		switch {
		case f == math.Trunc(f) && math.Abs(f) <= maxSafe:
			return AppendInt(dst, int64(f))
		case math.IsNaN(f):
			return AppendFloat(dst, math.Float64frombits(0x7ff8000000000000))
		}
		return AppendFloat(dst, f)
	case StrKind:
		return append(appendStrHeader(dst, len(b)), b...)
	case BinKind:
		return AppendBin(dst, b)
	case ExtKind:
		return appendExt(dst, byte(h.Num), b)
	}
	return AppendNil(dst)
}

// span is a canonical pair within a buffer: its key begins at start, its value
// at value, and it ends at end.
type span struct{ start, value, end int }

func canonicalMap(dst, b []byte, n, depth int) (out, rest []byte) {
	// The pairs are written behind dst, sorted by reference, and copied into
	// place only if they do not lie in order already.
	base := len(dst)
	dst = AppendMapHeader(dst, n)
	first := len(dst)
	var few [16]span
	pairs := few[:0]
	sorted := true
	for range n {
		s := span{start: len(dst)}
		dst, b = canonical(dst, b, depth+1)
		s.value = len(dst)
		dst, b = canonical(dst, b, depth+1)
		s.end = len(dst)
		if len(pairs) > 0 {
			last := pairs[len(pairs)-1]
			if bytes.Compare(dst[last.start:last.value], dst[s.start:s.value]) >= 0 {
				sorted = false
			}
		}
		pairs = append(pairs, s)
	}
	if sorted {
		return dst, b
	}
	unsorted := append([]byte(nil), dst[first:]...)
	key := func(s span) []byte { return unsorted[s.start-first : s.value-first] }
	slices.SortStableFunc(pairs, func(x, y span) int { return bytes.Compare(key(x), key(y)) })
	kept := pairs[:0]
	for i, s := range pairs {
		if i+1 < len(pairs) && bytes.Equal(key(s), key(pairs[i+1])) {
			continue // the last of equal keys wins
		}
		kept = append(kept, s)
	}
	dst = AppendMapHeader(dst[:base], len(kept))
	for _, s := range kept {
		dst = append(dst, unsorted[s.start-first:s.end-first]...)
	}
	return dst, b
}

// Equal reports whether two values have the same canonical form. It does not
// allocate unless both are containers that differ byte for byte.
func Equal(a, b []byte) bool {
	if bytes.Equal(a, b) {
		return true
	}
	x, okX := ReadHead(a)
	y, okY := ReadHead(b)
	switch {
	case !okX || !okY:
		return false
	case x.Kind.Container() || y.Kind.Container():
		return x.Kind == y.Kind &&
			bytes.Equal(Canonical(make([]byte, 0, len(a)), a), Canonical(make([]byte, 0, len(b)), b))
	case x.Kind >= StrKind || y.Kind >= StrKind:
		return x.Kind == y.Kind && x.Num == y.Num && bytes.Equal(a[x.Size:], b[y.Size:])
	}
	var bufX, bufY [16]byte
	return bytes.Equal(canonicalScalar(bufX[:0], x, nil), canonicalScalar(bufY[:0], y, nil))
}
