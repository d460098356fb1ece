package query

import (
	"bytes"
	"math"
	"math/bits"

	"github.com/topgun-sync/topgun/core/msgval"
)

// aggregate is what sum, min, max and avg need of the numbers of one field. Sums
// are exact, so they do not depend on the order of the rows, two can be merged, and
// what was added can be taken away.
type aggregate struct {
	count  uint64    // numbers
	ints   int128    // sum of those that are integers
	floats uint64    // how many are not
	sum    expansion // of those
	inf    [2]uint64 // how many are -Inf and Inf, or so large that they count as such
	min    []byte    // as indexForm returns it; nil without numbers
	max    []byte
}

// maxSummand is the largest float that is summed; larger ones count as infinite, so
// that sums of many do not overflow on the way.
const maxSummand = 0x1p1000

// add takes a field, nil if it is missing. What is no number, and NaN, is left out.
func (a *aggregate) add(v []byte) {
	n, form, ok := summand(v)
	if !ok {
		return
	}
	a.count++
	a.sumUp(form, 1)
	if low, _ := headNumber(a.min); a.min == nil || n.compare(low) < 0 {
		a.min = bytes.Clone(form) // not to hold a whole record
	}
	if high, _ := headNumber(a.max); a.max == nil || n.compare(high) > 0 {
		a.max = bytes.Clone(form)
	}
}

// remove takes away what add took. It returns false if it does not know min or max
// without what it took away.
func (a *aggregate) remove(v []byte) bool {
	n, form, ok := summand(v)
	if !ok {
		return true
	}
	a.count--
	a.sumUp(form, -1)
	low, _ := headNumber(a.min)
	high, _ := headNumber(a.max)
	return n != low && n != high
}

// merge adds another aggregate of the same field.
func (a *aggregate) merge(b *aggregate) {
	a.count += b.count
	a.ints = a.ints.add(b.ints)
	a.floats += b.floats
	for _, f := range b.sum {
		a.sum = a.sum.add(f)
	}
	a.inf[0] += b.inf[0]
	a.inf[1] += b.inf[1]
	for _, v := range [][]byte{b.min, b.max} {
		n, ok := headNumber(v)
		if !ok {
			continue
		}
		if low, _ := headNumber(a.min); a.min == nil || n.compare(low) < 0 {
			a.min = v
		}
		if high, _ := headNumber(a.max); a.max == nil || n.compare(high) > 0 {
			a.max = v
		}
	}
}

// summand returns the number that a field is.
func summand(v []byte) (n number, form []byte, ok bool) {
	if n, ok = headNumber(v); !ok || n.isNaN() {
		return n, nil, false
	}
	form, ok = indexForm(v)
	return n, form, ok
}

func headNumber(v []byte) (number, bool) {
	h, ok := msgval.ReadHead(v)
	if !ok {
		return number{}, false
	}
	return numberOf(h)
}

// sumUp adds a number to the sums, or takes it away with the sign -1.
func (a *aggregate) sumUp(form []byte, sign int) {
	h, _ := msgval.ReadHead(form)
	step := uint64(sign) // to add in two's complement
	if h.Kind != msgval.FloatKind {
		i := int128{lo: h.Num}
		if h.Kind == msgval.IntKind {
			i.hi = math.MaxUint64
		}
		if sign < 0 {
			i = i.negate()
		}
		a.ints = a.ints.add(i)
		return
	}
	a.floats += step
	switch f := math.Float64frombits(h.Num); {
	case f > maxSummand:
		a.inf[1] += step
	case f < -maxSummand:
		a.inf[0] += step
	default:
		a.sum = a.sum.add(f * float64(sign))
	}
}

// total returns the sum as the nearest float.
func (a *aggregate) total() float64 {
	switch {
	case a.inf[0] > 0 && a.inf[1] > 0:
		return math.NaN()
	case a.inf[0] > 0:
		return math.Inf(-1)
	case a.inf[1] > 0:
		return math.Inf(1)
	}
	abs, sign := a.ints, 1.0
	if abs.negative() {
		abs, sign = abs.negate(), -1
	}
	e := append(expansion(nil), a.sum...)
	for _, part := range []float64{float64(abs.hi) * (1 << 64), float64(abs.lo>>32) * (1 << 32), float64(abs.lo & math.MaxUint32)} {
		e = e.add(sign * part)
	}
	return e.round()
}

// append appends the result of an aggregation, nil if there was no number.
func (a *aggregate) append(dst []byte, fn string) []byte {
	switch {
	case a.count == 0:
		return msgval.AppendNil(dst)
	case fn == "min":
		return append(dst, a.min...)
	case fn == "max":
		return append(dst, a.max...)
	case fn == "avg":
		return msgval.AppendFloat(dst, a.total()/float64(a.count))
	case a.floats == 0 && a.ints.hi == 0:
		return msgval.AppendUint(dst, a.ints.lo)
	case a.floats == 0 && a.ints.hi == math.MaxUint64 && a.ints.lo>>63 == 1:
		return msgval.AppendInt(dst, int64(a.ints.lo))
	}
	return msgval.AppendFloat(dst, a.total())
}

// encode appends the state for decodeAggregate.
func (a *aggregate) encode(dst []byte) []byte {
	dst = msgval.AppendArrayHeader(dst, 9)
	for _, n := range []uint64{a.count, a.ints.hi, a.ints.lo, a.floats, a.inf[0], a.inf[1]} {
		dst = msgval.AppendUint(dst, n)
	}
	dst = msgval.AppendArrayHeader(dst, len(a.sum))
	for _, f := range a.sum {
		dst = msgval.AppendFloat(dst, f)
	}
	for _, v := range [][]byte{a.min, a.max} {
		if v == nil {
			dst = msgval.AppendNil(dst)
		} else {
			dst = append(dst, v...)
		}
	}
	return dst
}

// decodeAggregate reads what encode wrote.
func decodeAggregate(b []byte) (a aggregate, ok bool) {
	var parts [9][]byte
	n := 0
	for e := range elements(b) {
		if n == len(parts) {
			return a, false
		}
		parts[n] = e
		n++
	}
	if n != len(parts) {
		return a, false
	}
	for i, p := range []*uint64{&a.count, &a.ints.hi, &a.ints.lo, &a.floats, &a.inf[0], &a.inf[1]} {
		h, _ := msgval.ReadHead(parts[i])
		if h.Kind != msgval.UintKind {
			return a, false
		}
		*p = h.Num
	}
	for e := range elements(parts[6]) {
		h, _ := msgval.ReadHead(e)
		f := math.Float64frombits(h.Num)
		if h.Kind != msgval.FloatKind || len(a.sum) == maxExpansion || math.IsNaN(f) || math.IsInf(f, 0) {
			return a, false
		}
		a.sum = append(a.sum, f)
	}
	for i, p := range []*[]byte{&a.min, &a.max} {
		if isNull(parts[7+i]) {
			continue
		}
		if _, ok := headNumber(parts[7+i]); !ok {
			return a, false
		}
		*p = parts[7+i]
	}
	return a, a.count == 0 == (a.min == nil) && (a.min == nil) == (a.max == nil)
}

// int128 is an integer in two's complement: the sum of any number of rows.
type int128 struct{ hi, lo uint64 }

func (i int128) negative() bool { return i.hi>>63 == 1 }

func (i int128) add(j int128) int128 {
	lo, carry := bits.Add64(i.lo, j.lo, 0)
	hi, _ := bits.Add64(i.hi, j.hi, carry)
	return int128{hi: hi, lo: lo}
}

func (i int128) negate() int128 {
	return int128{hi: ^i.hi, lo: ^i.lo}.add(int128{lo: 1})
}

// expansion is an exact sum of floats: its elements, from small to large, do not
// overlap, so that nothing is rounded away (Shewchuk 1997).
type expansion []float64

// maxExpansion is how many elements an expansion can have: their bits do not
// overlap within the exponents of a float64.
const maxExpansion = 40

// add adds a finite number.
func (e expansion) add(x float64) expansion {
	out := e[:0]
	for _, y := range e {
		if math.Abs(x) < math.Abs(y) {
			x, y = y, x
		}
		sum := x + y
		if rest := y - (sum - x); rest != 0 {
			out = append(out, rest)
		}
		x = sum
	}
	if x != 0 {
		out = append(out, x)
	}
	return out
}

// round returns the float nearest to the sum, as if it had been rounded once.
func (e expansion) round() float64 {
	if len(e) == 0 {
		return 0
	}
	i := len(e) - 1
	sum, rest := e[i], 0.0
	for i > 0 && rest == 0 {
		i--
		x := sum
		sum = x + e[i]
		rest = e[i] - (sum - x)
	}
	// Half way between two floats the sign of what remains decides.
	if i > 0 && (rest < 0 && e[i-1] < 0 || rest > 0 && e[i-1] > 0) {
		twice := 2 * rest
		if x := sum + twice; twice == x-sum {
			sum = x
		}
	}
	return sum
}
