package query_test

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"fmt"
	"math"
	"math/big"
	"slices"
	"strings"
	"testing"
	"unicode/utf16"
	"unicode/utf8"

	"pgregory.net/rapid"

	"github.com/topgun-sync/topgun/core/msgval"
	"github.com/topgun-sync/topgun/core/query"
)

// rank is the order of kinds of PROTOCOL 13.3 → Do.
func rank(v []byte) int {
	h, ok := msgval.ReadHead(v)
	switch {
	case !ok || h.Kind == msgval.NilKind:
		return 4
	case h.Kind == msgval.BoolKind:
		return 0
	case h.Kind <= msgval.FloatKind:
		return 1
	case h.Kind == msgval.StrKind:
		return 2
	}
	return 3
}

// exactly returns a number exactly, and false for NaN.
func exactly(v []byte) (*big.Float, bool) {
	h, _ := msgval.ReadHead(v)
	f := new(big.Float).SetPrec(2000)
	switch h.Kind {
	case msgval.UintKind:
		return f.SetUint64(h.Num), true
	case msgval.IntKind:
		return f.SetInt64(int64(h.Num)), true
	}
	x := math.Float64frombits(h.Num)
	if math.IsNaN(x) {
		return nil, false
	}
	return f.SetFloat64(x), true
}

// naive orders two values of one rank, by another way than the package.
func naive(a, b []byte) int {
	switch rank(a) {
	case 0:
		return cmp.Compare(a[0], b[0])
	case 1:
		x, okX := exactly(a)
		y, okY := exactly(b)
		if !okX || !okY {
			return cmp.Compare(fmt.Sprint(okY), fmt.Sprint(okX)) // NaN comes last
		}
		return x.Cmp(y)
	case 2:
		ha, _ := msgval.ReadHead(a)
		hb, _ := msgval.ReadHead(b)
		return slices.Compare(utf16.Encode([]rune(string(a[ha.Size:]))), utf16.Encode([]rune(string(b[hb.Size:]))))
	}
	return 0
}

// The order is that of PROTOCOL 13.3, exactly for numbers of all sizes, and total.
func TestOrder(t *testing.T) {
	asc, desc := parse(t, `{"sort":{"v":"asc"}}`), parse(t, `{"sort":[{"field":"v","direction":"desc"}]}`)
	rapid.Check(t, func(t *rapid.T) {
		var rows []query.Row
		for i := range 3 {
			v := values.Draw(t, "value")
			r := query.Row{Key: fmt.Sprint(i), Value: mapOf("v", v)}
			if rapid.IntRange(0, 8).Draw(t, "missing") == 0 {
				r.Value = mapOf()
			}
			rows = append(rows, r)
		}
		value := func(r query.Row) []byte {
			if len(r.Value) == 1 {
				return nil
			}
			return r.Value[3:]
		}
		for _, a := range rows {
			for _, b := range rows {
				got := asc.Compare(a, b)
				if got != -asc.Compare(b, a) || (got == 0) != (a.Key == b.Key) {
					t.Fatalf("%x, %x: not antisymmetric", a.Value, b.Value)
				}
				for _, c := range rows {
					if got <= 0 && asc.Compare(b, c) <= 0 && asc.Compare(a, c) > 0 {
						t.Fatalf("%x, %x, %x: not transitive", a.Value, b.Value, c.Value)
					}
				}
				x, y := value(a), value(b)
				if utf8Only := utf8.Valid(x) || rank(x) != 2; !utf8Only || rank(y) == 2 && !utf8.Valid(y[1:]) {
					continue
				}
				want := cmp.Compare(rank(x), rank(y))
				if want == 0 && rank(x) < 3 {
					want = naive(x, y)
				}
				if want != 0 && (got != want || desc.Compare(a, b) != -want) {
					t.Fatalf("%x, %x: %d and descending %d, want %d", x, y, got, desc.Compare(a, b), want)
				}
				if want == 0 && rank(x) < 3 && got != cmp.Compare(a.Key, b.Key) {
					t.Fatalf("%x, %x are equal, so the keys decide", x, y)
				}
			}
		}
	})
}

// Every two of the difficult numbers, and of the difficult texts.
func TestOrderOfAllPairs(t *testing.T) {
	q := parse(t, `{"sort":{"v":"asc"}}`)
	var strs [][]byte
	for _, s := range texts {
		if utf8.ValidString(s) {
			strs = append(strs, msgval.AppendString(nil, s))
		}
	}
	for _, list := range [][][]byte{numbers, strs} {
		for _, x := range list {
			for _, y := range list {
				for _, n := range []int{1, -1} { // what decides where they are equal
					a, b := query.Row{Key: fmt.Sprint(1 + n), Value: mapOf("v", x)}, query.Row{Key: "1", Value: mapOf("v", y)}
					if n < 0 {
						a.Key = "0"
					}
					if got, want := q.Compare(a, b), cmp.Or(naive(x, y), n); got != want {
						t.Errorf("%x, %x: %d, want %d", x, y, got, want)
					}
				}
			}
		}
	}
}

// Comparing with an operator agrees with the order, and equality with the index.
func TestOperatorsAgreeWithOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		x, y := values.Draw(t, "x"), values.Draw(t, "y")
		if rapid.IntRange(0, 3).Draw(t, "numbers") == 0 {
			x, y = rapid.SampledFrom(numbers).Draw(t, "number x"), rapid.SampledFrom(numbers).Draw(t, "number y")
		}
		row := mapOf("v", x)
		holds := func(op string) bool {
			return parseRapid(t, mapOf("predicate", mapOf("op", op, "attribute", "v", "value", y))).Match("k", row)
		}
		eq, lt, gt := holds("eq"), holds("lt"), holds("gt")
		if holds("neq") == eq || holds("lte") != (lt || eq && rank(x) < 3) || holds("gte") != (gt || eq && rank(x) < 3) || lt && gt || eq && (lt || gt) {
			t.Fatalf("%x, %x: eq %v, lt %v, gt %v, and the rest does not fit", x, y, eq, lt, gt)
		}
		isNaN := func(v []byte) bool { _, ok := exactly(v); return rank(v) == 1 && !ok }
		if rank(x) == rank(y) && rank(x) < 3 && !isNaN(x) && !isNaN(y) && (utf8.Valid(x[1:]) && utf8.Valid(y[1:]) || rank(x) != 2) {
			if c := naive(x, y); eq != (c == 0) || lt != (c < 0) || gt != (c > 0) {
				t.Fatalf("%x, %x: eq %v, lt %v, gt %v, want %d", x, y, eq, lt, gt, c)
			}
		} else if (lt || gt) && rank(x) != 2 {
			t.Fatalf("%x, %x: ordered", x, y)
		}
		if in := parseRapid(t, mapOf("predicate", mapOf("op", "in", "attribute", "v", "value", listOf(y)))).Match("k", row); in != eq {
			t.Fatalf("%x in [%x]: %v", x, y, in)
		}
		many := listOf(append(slices.Repeat([][]byte{{1}}, 9), y)...)
		if in := parseRapid(t, mapOf("predicate", mapOf("op", "in", "attribute", "v", "value", many))).Match("k", row); in != (eq || rank(x) == 1 && naive(x, []byte{1}) == 0) {
			t.Fatalf("%x in many and %x: %v, equal %v", x, y, in, eq)
		}
		index := parseRapid(t, mapOf("where", mapOf("v", y))).Equalities()
		form, ok := query.EqualityValue(row, "v")
		if found := ok && len(index) == 1 && bytes.Equal(index[0].Value, form); found != eq {
			t.Fatalf("%x, %x: equal %v, by the index %v", x, y, eq, found)
		}
	})
}

// A long list is looked up in another way than a short one, with the same result.
func TestLongLists(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		list := rapid.SliceOfN(values, 0, 4).Draw(t, "list")
		row := mapOf("v", listOf(rapid.SliceOfN(rapid.OneOf(values, rapid.Just(listOf()), rapid.SampledFrom(append(list, []byte{1}))), 0, 6).Draw(t, "array")...))
		for _, op := range []string{"containsAll", "containsAny"} {
			var got [2]bool
			for i, l := range [][][]byte{list, slices.Repeat(list, 9)} {
				got[i] = parseRapid(t, mapOf("predicate", mapOf("op", op, "attribute", "v", "value", listOf(l...)))).Match("k", row)
			}
			if got[0] != got[1] {
				t.Fatalf("%x %s %x: %v, by a long list %v", row, op, list, got[0], got[1])
			}
		}
	})
}

func listOf(values ...[]byte) []byte {
	return append(msgval.AppendArrayHeader(nil, len(values)), bytes.Join(values, nil)...)
}

// Reading page by page, each after the cursor of the one before, gives every row
// once, also while the rows at the edges come and go.
func TestPages(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		data := make(map[string][]byte)
		for range rapid.IntRange(0, 40).Draw(t, "rows") {
			data[keys.Draw(t, "key")] = rowValue.Draw(t, "value")
		}
		text := mapOf("sort", oneOf(t, "sort", `{}`, `{"a":"asc"}`, `{"a":"desc","b":"asc"}`, `{"n":"desc"}`, `{"_key":"desc"}`), "limit", rapid.IntRange(1, 7).Draw(t, "limit"))
		churn := rapid.Bool().Draw(t, "churn")
		var order []query.Row
		for key, value := range data {
			order = append(order, query.Row{Key: key, Value: value})
		}
		slices.SortFunc(order, parseRapid(t, text).Compare)

		var got []query.Row
		q := parseRapid(t, text)
		for {
			after, status := q.ResolveCursor("m")
			if status == query.CursorInvalid {
				t.Fatal("the cursor is invalid")
			}
			top := query.NewTop(q, after, q.Limit(), 0)
			for key, value := range data {
				top.Add(key, value)
			}
			rows, more := top.Rows()
			if got = append(got, rows...); len(got) > len(order) {
				t.Fatalf("pages give %q, want %q", got, order)
			}
			if !more {
				break
			}
			last := rows[len(rows)-1]
			q = parseRapid(t, addPair(text, "cursor", msgval.AppendString(nil, q.CursorAt("m", last))))
			if churn { // what was read is of no account any more
				delete(data, last.Key)
				data[last.Key+"!"] = []byte{0xc0}
				if after, _ := q.ResolveCursor("m"); q.After(after, query.Row{Key: last.Key + "!", Value: []byte{0xc0}}) {
					delete(data, last.Key+"!")
				}
			}
		}
		if !slices.EqualFunc(got, order, func(a, b query.Row) bool { return a.Key == b.Key && bytes.Equal(a.Value, b.Value) }) {
			t.Fatalf("pages give %q, want %q", got, order)
		}
	})
}

func TestCursorIsBound(t *testing.T) {
	base := `{"where":{"a":1},"sort":{"b":"asc"}}`
	cursor := parse(t, base).CursorAt("m", query.Row{Key: "k", Value: fromJSON(t, `{"a":1,"b":2}`)})
	for _, c := range []struct {
		query, mapName, cursor string
		want                   query.CursorStatus
	}{
		{base, "m", "", query.CursorNone},
		{base, "m", cursor, query.CursorValid},
		{`{"where":{"a":1},"sort":[{"field":"b"}],"limit":5,"fields":["a"]}`, "m", cursor, query.CursorValid},
		{base, "n", cursor, query.CursorInvalid},
		{`{"where":{"a":2},"sort":{"b":"asc"}}`, "m", cursor, query.CursorInvalid},
		{`{"where":{"a":1},"sort":{"b":"desc"}}`, "m", cursor, query.CursorInvalid},
		{`{"where":{"a":1},"sort":{"b":"asc"},"predicate":{"op":"and"}}`, "m", cursor, query.CursorInvalid},
		{`{"where":{"a":1},"sort":{"b":"asc"},"groupBy":["b"]}`, "m", cursor, query.CursorInvalid},
		{base, "m", "not base64!", query.CursorInvalid},
		{base, "m", "AAAA", query.CursorInvalid},
		{base, "m", cursor + "A", query.CursorInvalid},
		{base, "m", cursor[:len(cursor)-2], query.CursorInvalid},
	} {
		q := parse(t, c.query)
		if c.cursor != "" {
			q = parseWith(t, fromJSON(t, c.query), c.cursor)
		}
		if position, status := q.ResolveCursor(c.mapName); status != c.want || (position != nil) != (status == query.CursorValid) {
			t.Errorf("%s on %s with %q: %v, want %v", c.query, c.mapName, c.cursor, status, c.want)
		}
	}
	raw, err := base64.RawURLEncoding.DecodeString(cursor)
	if err != nil {
		t.Fatal(err)
	}
	for i := range raw {
		tampered := slices.Clone(raw)
		tampered[i] ^= 1
		if _, status := parseWith(t, fromJSON(t, base), base64.RawURLEncoding.EncodeToString(tampered)).ResolveCursor("m"); status != query.CursorInvalid {
			t.Errorf("byte %d of a cursor changed: %v", i, status)
		}
	}
}

func parseWith(t *testing.T, text []byte, cursor string) *query.Query {
	t.Helper()
	q, err := query.Parse(addPair(text, "cursor", msgval.AppendString(nil, cursor)), nil)
	if err != nil {
		t.Fatal(err)
	}
	return q
}

// A position has a bound, however large the fields are.
func TestPositionIsBounded(t *testing.T) {
	q := parse(t, `{"sort":{"a":"asc","b":"asc","c":"desc"}}`)
	huge := strings.Repeat("\x00", 100_000)
	list := msgval.AppendArrayHeader(nil, 100_000)
	list = append(list, bytes.Repeat([]byte{1}, 100_000)...)
	r := query.Row{Key: "k", Value: mapOf("a", huge, "b", list, "c", msgval.AppendBin(nil, []byte(huge)))}
	if n := len(q.Position(r)); n > 7000 {
		t.Errorf("a position of %d bytes", n)
	}
}

func TestTopKeepsBytes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		q := parseRapid(t, mapOf())
		most, maxBytes := rapid.IntRange(1, 10).Draw(t, "most"), rapid.IntRange(0, 60).Draw(t, "maxBytes")
		var rows []query.Row
		for i, size := range rapid.SliceOfN(rapid.IntRange(0, 30), 0, 15).Draw(t, "sizes") {
			rows = append(rows, query.Row{Key: fmt.Sprintf("%02d", i), Value: msgval.AppendString(nil, strings.Repeat("x", size))})
		}
		n, size := 0, 0
		for _, r := range rows {
			if size += len(r.Key) + len(r.Value); n == most || n > 0 && maxBytes > 0 && size > maxBytes {
				break
			}
			n++
		}
		top := query.NewTop(q, nil, most, maxBytes)
		for _, r := range rapid.Permutation(rows).Draw(t, "order") {
			top.Add(r.Key, r.Value)
		}
		for range 2 { // Rows does not change what it is asked for
			got, more := top.Rows()
			if more != (n < len(rows)) || !slices.EqualFunc(got, rows[:n], func(a, b query.Row) bool { return a.Key == b.Key }) {
				t.Fatalf("%d rows, more %v; want %d of %d", len(got), more, n, len(rows))
			}
		}
	})
}
