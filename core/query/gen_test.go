package query_test

import (
	"fmt"
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/topgun-sync/topgun/core/msgval"
	"github.com/topgun-sync/topgun/core/query"
)

func parse(t testing.TB, text string) *query.Query {
	t.Helper()
	q, err := query.Parse(fromJSON(t, text), nil)
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return q
}

func fromJSON(t testing.TB, text string) []byte {
	t.Helper()
	b, err := msgval.FromJSON([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// numbers are those around which comparing goes wrong.
var numbers = func() (list [][]byte) {
	for _, u := range []uint64{0, 1, 2, 31, 200, 70_000, 1<<53 - 1, 1 << 53, 1<<53 + 1, 1 << 60, 1<<60 + 1, math.MaxInt64, 1 << 63, math.MaxUint64 - 1, math.MaxUint64} {
		list = append(list, msgval.AppendUint(nil, u))
	}
	for _, i := range []int64{-1, -2, -33, -1 << 53, -1<<53 - 1, -1 << 60, -1<<60 - 1, math.MinInt64 + 1, math.MinInt64} {
		list = append(list, msgval.AppendInt(nil, i))
	}
	for _, f := range []float64{0, math.Copysign(0, -1), 1, 1.5, -1, -1.5, 0.1, 1 << 53, 1 << 60, 1 << 63, 1 << 64, -1 << 60, -1 << 63, 1e300, -1e300, math.MaxFloat64, math.SmallestNonzeroFloat64, math.Inf(1), math.Inf(-1), math.NaN()} {
		list = append(list, msgval.AppendFloat(nil, f))
	}
	return append(list, []byte{0xca, 0x3f, 0x80, 0, 0}, []byte{0xd3, 0, 0, 0, 0, 0, 0, 0, 1}) // 1 as float32 and as int64
}()

var texts = []string{"", "a", "A", "b", "ab", "a\x00", "a\x00b", "\x00", "ß", "é", "\ue000", "\uffff", "😀", "𐀀", "10", "9", "a😀", "a\uffff", "\xff"}

// scalars yields every kind of value without containers.
var scalars = rapid.Custom(func(t *rapid.T) []byte {
	switch rapid.IntRange(0, 6).Draw(t, "kind") {
	case 0:
		return msgval.AppendNil(nil)
	case 1:
		return msgval.AppendBool(nil, rapid.Bool().Draw(t, "bool"))
	case 2, 3:
		return slices.Clone(rapid.SampledFrom(numbers).Draw(t, "number"))
	case 4:
		return msgval.AppendString(nil, rapid.SampledFrom(texts).Draw(t, "text"))
	case 5:
		return msgval.AppendBin(nil, []byte(rapid.SampledFrom(texts).Draw(t, "bin")))
	}
	return append([]byte{0xc7, 2, byte(rapid.IntRange(0, 255).Draw(t, "type"))}, "xy"...)
})

// values yields every kind of value.
var values = rapid.Custom(func(t *rapid.T) []byte {
	n := rapid.IntRange(0, 2).Draw(t, "elements")
	switch rapid.IntRange(0, 5).Draw(t, "shape") {
	case 0:
		b := msgval.AppendArrayHeader(nil, n)
		for range n {
			b = append(b, scalars.Draw(t, "element")...)
		}
		return b
	case 1:
		b := msgval.AppendMapHeader(nil, n)
		for i := range n {
			b = msgval.AppendString(b, string(rune('a'+i)))
			b = append(b, scalars.Draw(t, "field")...)
		}
		return b
	}
	return scalars.Draw(t, "scalar")
})

// rowValue yields a record with some of the fields a, b, g and n, and now and then
// no map.
var rowValue = rapid.Custom(func(t *rapid.T) []byte {
	if rapid.IntRange(0, 15).Draw(t, "odd") == 0 {
		return values.Draw(t, "value")
	}
	var pairs []any
	if rapid.IntRange(0, 3).Draw(t, "a?") > 0 {
		pairs = append(pairs, "a", values.Draw(t, "a"))
	}
	if rapid.IntRange(0, 3).Draw(t, "b?") > 0 {
		pairs = append(pairs, "b", rapid.IntRange(0, 4).Draw(t, "b"))
	}
	if rapid.IntRange(0, 3).Draw(t, "g?") > 0 {
		pairs = append(pairs, "g", rapid.SampledFrom([]string{"x", "y", "z"}).Draw(t, "g"))
	}
	if rapid.IntRange(0, 3).Draw(t, "n?") > 0 {
		pairs = append(pairs, "n", slices.Clone(rapid.SampledFrom(numbers).Draw(t, "n")))
	}
	return mapOf(pairs...)
})

var keys = rapid.Custom(func(t *rapid.T) string {
	return fmt.Sprintf("k%02d", rapid.IntRange(0, 30).Draw(t, "key"))
})

// queries yields queries over what rowValue yields.
var queries = rapid.Custom(func(t *rapid.T) []byte {
	var pairs []any
	switch rapid.IntRange(0, 5).Draw(t, "filter") {
	case 0:
		pairs = append(pairs, "where", mapOf("b", rapid.IntRange(0, 4).Draw(t, "b")))
	case 1:
		pairs = append(pairs, "where", mapOf("b", mapOf("$lt", 4)))
	case 2:
		pairs = append(pairs, "predicate", mapOf("op", "neq", "attribute", "g", "value", "x"))
	case 3:
		pairs = append(pairs, "predicate", mapOf("op", "lt", "attribute", "_key", "value", "k20"))
	}
	if rapid.IntRange(0, 2).Draw(t, "groups?") == 0 {
		pairs = append(pairs, "aggregations", oneOf(t, "aggregations",
			`[]`, `[{"func":"sum","field":"n"},{"func":"count"}]`, `[{"func":"min","field":"n"},{"func":"max","field":"n"},{"func":"avg","field":"b"}]`))
		pairs = append(pairs, "groupBy", oneOf(t, "groupBy", `["g"]`, `["g","b"]`, `["a"]`, `[]`))
	} else {
		pairs = append(pairs, "fields", oneOf(t, "fields", `[]`, `["b"]`, `["n","b","g"]`))
	}
	pairs = append(pairs, "sort", oneOf(t, "sort", `{}`, `{"b":"asc"}`, `{"b":"desc"}`, `[{"field":"a","direction":"desc"},{"field":"b"}]`,
		`{"n":"asc"}`, `{"_key":"desc"}`, `{"g":"desc","_key":"desc"}`, `{"__count":"desc"}`, `{"__sum_n":"asc"}`))
	if rapid.Bool().Draw(t, "limit?") {
		pairs = append(pairs, "limit", rapid.IntRange(0, 6).Draw(t, "limit"))
	}
	if rapid.IntRange(0, 2).Draw(t, "offset?") == 0 {
		pairs = append(pairs, "offset", rapid.IntRange(0, 5).Draw(t, "offset"))
	}
	return mapOf(pairs...)
})

func oneOf(t *rapid.T, name string, texts ...string) []byte {
	b, err := msgval.FromJSON([]byte(rapid.SampledFrom(texts).Draw(t, name)))
	if err != nil {
		t.Fatal(err)
	}
	return b
}
