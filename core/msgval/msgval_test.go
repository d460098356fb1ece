package msgval_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/tinylib/msgp/msgp"
	"pgregory.net/rapid"

	"github.com/topgun-sync/topgun/core/msgval"
)

type vectors struct {
	Encode []struct {
		Value                 json.RawMessage
		ClientHex, MinimalHex string
	}
	SpecialValues []struct{ Name, ClientHex string }
	Decode        []struct {
		Name, Hex string
		Decoded   json.RawMessage
		Error     bool
	}
}

func load(t testing.TB) (v vectors) {
	t.Helper()
	data, err := os.ReadFile("testdata/msgpack.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, &v); err != nil {
		t.Fatal(err)
	}
	if len(v.Encode) == 0 || len(v.SpecialValues) == 0 || len(v.Decode) == 0 {
		t.Fatal("the vectors are not what this test reads")
	}
	return v
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func check(t testing.TB, b []byte) {
	t.Helper()
	if rest, err := msgval.Check(b); err != nil || len(rest) != 0 {
		t.Fatalf("Check(%x) = %x, %v", b, rest, err)
	}
}

func TestVectorsEncode(t *testing.T) {
	for _, c := range load(t).Encode {
		client, minimal := unhex(t, c.ClientHex), unhex(t, c.MinimalHex)
		check(t, client)
		check(t, minimal)
		if !msgval.Equal(client, minimal) {
			t.Errorf("%s: client %x and minimal %x differ", c.Value, client, minimal)
		}
		if string(c.Value) == `"-0"` {
			continue // how the vectors write the number -0
		}
		packed, err := msgval.FromJSON(c.Value)
		if err != nil {
			t.Errorf("FromJSON(%s): %v", c.Value, err)
			continue
		}
		if !msgval.Equal(packed, minimal) {
			t.Errorf("FromJSON(%s) = %x, want %x", c.Value, packed, minimal)
		}
		text, ok := msgval.AppendJSON(nil, client)
		var got, want any
		if err := json.Unmarshal(text, &got); !ok || err != nil {
			t.Errorf("AppendJSON(%x) = %s, %v, which reads with %v", client, text, ok, err)
		}
		if err := json.Unmarshal(c.Value, &want); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("AppendJSON(%x) (-want +got):\n%s", client, diff)
		}
	}
}

func TestVectorsSpecialValues(t *testing.T) {
	noJSON := map[string]bool{"NaN": true, "Infinity": true}
	for _, c := range load(t).SpecialValues {
		b := unhex(t, c.ClientHex)
		check(t, b)
		if _, ok := msgval.AppendJSON(nil, b); ok == noJSON[c.Name] {
			t.Errorf("%s: has a JSON form = %v", c.Name, ok)
		}
	}
}

// notJSON are the cases whose result the vectors write in another way than JSON,
// or that a client changes as it decodes: they have to be accepted, no more.
var notJSON = map[string]bool{
	"bin8": true, "bin16": true, "integer map key becomes a string": true,
	"timestamp ext -1 becomes a Date": true, "key __proto__ is renamed": true,
	"duplicate key: last wins":      true, // see TestCanonical
	"uint64 2^53+1 loses precision": true,
	"uint64 max":                    true,
}

func TestVectorsDecode(t *testing.T) {
	for _, c := range load(t).Decode {
		b := unhex(t, c.Hex)
		rest, err := msgval.Check(b)
		if bad := err != nil || len(rest) != 0; bad != c.Error {
			t.Errorf("%s: Check = %x, %v", c.Name, rest, err)
		}
		if c.Error || notJSON[c.Name] {
			continue
		}
		want, err := msgval.FromJSON(c.Decoded)
		if err != nil {
			t.Fatal(err)
		}
		if !msgval.Equal(b, want) {
			t.Errorf("%s: %x is not %s", c.Name, b, c.Decoded)
		}
	}
}

func TestCheckRefuses(t *testing.T) {
	deep := func(n int, head byte) []byte { return append(bytes.Repeat([]byte{head}, n), 0xc0) }
	for _, c := range []struct {
		name string
		b    []byte
		want error
	}{
		{"empty", nil, msgval.ErrTruncated},
		{"4 G of array", []byte{0xdd, 0xff, 0xff, 0xff, 0xff}, msgval.ErrTruncated},
		{"4 G of map", []byte{0xdf, 0xff, 0xff, 0xff, 0xff}, msgval.ErrTruncated},
		{"4 G of str", []byte{0xdb, 0xff, 0xff, 0xff, 0xff}, msgval.ErrTruncated},
		{"4 G of bin", []byte{0xc6, 0xff, 0xff, 0xff, 0xff}, msgval.ErrTruncated},
		{"4 G of ext", []byte{0xc9, 0xff, 0xff, 0xff, 0xff, 0}, msgval.ErrTruncated},
		{"map with half a pair", []byte{0x81, 0xa1, 'a'}, msgval.ErrTruncated},
		{"ext without type", []byte{0xd4}, msgval.ErrTruncated},
		{"head without its number", []byte{0xcf, 1, 2}, msgval.ErrTruncated},
		{"0xc1", []byte{0xc1}, msgval.ErrReserved},
		{"0xc1 within", []byte{0x92, 1, 0xc1}, msgval.ErrReserved},
		{"100000 arrays", deep(100000, 0x91), msgval.ErrTooDeep},
		{"129 arrays", deep(129, 0x91), msgval.ErrTooDeep},
		{"129 maps as keys", deep(129, 0x81), msgval.ErrTruncated},
	} {
		if _, err := msgval.Check(c.b); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
		if n := testing.AllocsPerRun(10, func() { msgval.Check(c.b) }); n != 0 {
			t.Errorf("%s: Check allocates %v times", c.name, n)
		}
	}
	check(t, deep(128, 0x91))
	if size, shape, err := msgval.Scan(append(deep(140, 0x91), 7), 140); size != 141 || shape.Depth != 140 || shape.Foreign || err != nil {
		t.Errorf("Scan = %d, %+v, %v", size, shape, err)
	}
	for _, c := range []struct {
		value   []byte
		foreign bool
	}{
		{[]byte{0xd6, 0xff, 0, 0, 0, 1}, false}, // a timestamp
		{[]byte{0xc7, 12, 0xff, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1}, false},
		{[]byte{0xd4, 5, 0}, true},
		{[]byte{0x91, 0x81, 0xa1, 'k', 0xc7, 0, 5}, true},
		{[]byte{0xa1, 0xd4}, false}, // in a string
	} {
		if _, shape, err := msgval.Scan(c.value, 128); shape.Foreign != c.foreign || err != nil {
			t.Errorf("Scan(% x) = %+v, %v; want foreign %v", c.value, shape, err, c.foreign)
		}
	}
}

func TestCanonical(t *testing.T) {
	float := func(f float64) []byte { return msgval.AppendFloat(nil, f) }
	for _, c := range []struct {
		name     string
		in, want []byte
	}{
		{"no value", nil, nil},
		{"long head", []byte{0xdf, 0, 0, 0, 1, 0xd9, 1, 'a', 0xcf, 0, 0, 0, 0, 0, 0, 0, 5}, []byte{0x81, 0xa1, 'a', 5}},
		{"positive int64", []byte{0xd3, 0, 0, 0, 0, 0, 0, 0, 5}, []byte{5}},
		{"integral float", float(-3), []byte{0xfd}},
		{"-0", float(math.Copysign(0, -1)), []byte{0}},
		{"2^53", float(1 << 53), msgval.AppendUint(nil, 1<<53)},
		{"above 2^53", float(1 << 54), float(1 << 54)},
		{"float32", []byte{0xca, 0x3f, 0xc0, 0, 0}, float(1.5)},
		{"NaN with a payload", float(math.Float64frombits(0xfff8000000000001)), float(math.Float64frombits(0x7ff8000000000000))},
		{"keys", []byte{0x82, 0xa1, 'b', 1, 0xa1, 'a', 2}, []byte{0x82, 0xa1, 'a', 2, 0xa1, 'b', 1}},
		{"equal keys", []byte{0x83, 0xa1, 'a', 1, 0xa1, 'b', 2, 0xd9, 1, 'a', 3}, []byte{0x82, 0xa1, 'a', 3, 0xa1, 'b', 2}},
		{"bin is no str", []byte{0xc4, 1, 'a'}, []byte{0xc4, 1, 'a'}},
		{"ext", []byte{0xc7, 4, 9, 1, 2, 3, 4}, []byte{0xd6, 9, 1, 2, 3, 4}},
		{"broken UTF-8", []byte{0xa3, 0xed, 0xa0, 0xbd}, []byte{0xa3, 0xed, 0xa0, 0xbd}},
	} {
		got := msgval.Canonical([]byte("before"), c.in)
		if want := append([]byte("before"), c.want...); !bytes.Equal(got, want) {
			t.Errorf("%s: %x, want %x", c.name, got, want)
		}
	}
	// More equal pairs than the short header holds are few in the end.
	many := []byte{0xdc + 2, 0, 20}
	for i := range byte(20) {
		many = append(many, 0xa1, 'a', i)
	}
	if got, want := msgval.Canonical(nil, many), []byte{0x81, 0xa1, 'a', 19}; !bytes.Equal(got, want) {
		t.Errorf("20 equal keys: %x, want %x", got, want)
	}
}

// Heads are as another library writes them, at the lengths where they change.
func TestAppend(t *testing.T) {
	for _, n := range []int{0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 255, 256, 65535, 65536, 70000} {
		b := bytes.Repeat([]byte{'x'}, n)
		ext, err := msgp.AppendExtension(nil, &msgp.RawExtension{Type: 9, Data: b})
		if err != nil {
			t.Fatal(err)
		}
		for name, c := range map[string]struct{ got, want []byte }{
			"str":   {msgval.AppendString(nil, string(b)), msgp.AppendString(nil, string(b))},
			"bin":   {msgval.AppendBin(nil, b), msgp.AppendBytes(nil, b)},
			"array": {msgval.AppendArrayHeader(nil, n), msgp.AppendArrayHeader(nil, uint32(n))},
			"map":   {msgval.AppendMapHeader(nil, n), msgp.AppendMapHeader(nil, uint32(n))},
			"ext":   {msgval.Canonical(nil, ext), ext},
		} {
			if name == "ext" && (n == 255 || n == 65535) {
				c.want = c.got // the other library takes a longer head than it needs
			}
			if !bytes.Equal(c.got, c.want) {
				t.Errorf("%s of %d: %.20x, want %.20x", name, n, c.got, c.want)
			}
		}
	}
	for _, v := range []int64{0, 127, 128, 255, 256, 65535, 65536, math.MaxUint32, math.MaxUint32 + 1, math.MaxInt64, -1, -32, -33, -128, -129, -32768, -32769, math.MinInt32, math.MinInt32 - 1, math.MinInt64} {
		want := msgp.AppendInt64(nil, v)
		if v >= 0 {
			want = msgp.AppendUint64(nil, uint64(v))
		}
		if got := msgval.AppendInt(nil, v); !bytes.Equal(got, want) {
			t.Errorf("AppendInt(%d) = %x, want %x", v, got, want)
		}
	}
}

// genValue draws a value in some encoding, and builds what an independent
// decoder would see in it.
func genValue(depth int) *rapid.Generator[[]byte] {
	return rapid.Custom(func(t *rapid.T) []byte {
		kinds := 9
		if depth == 0 {
			kinds = 7
		}
		switch rapid.IntRange(0, kinds-1).Draw(t, "kind") {
		case 0:
			return []byte{0xc0}
		case 1:
			return msgval.AppendBool(nil, rapid.Bool().Draw(t, "bool"))
		case 2:
			return msgval.AppendInt(nil, rapid.Int64().Draw(t, "int"))
		case 3:
			return binary.BigEndian.AppendUint64([]byte{0xcf}, rapid.Uint64().Draw(t, "uint"))
		case 4:
			return msgval.AppendFloat(nil, rapid.Float64().Draw(t, "float"))
		case 5:
			s := rapid.String().Draw(t, "str")
			if rapid.Bool().Draw(t, "long head") {
				return append(binary.BigEndian.AppendUint32([]byte{0xdb}, uint32(len(s))), s...)
			}
			return msgval.AppendString(nil, s)
		case 6:
			return msgval.AppendFloat(nil, float64(rapid.IntRange(-5, 5).Draw(t, "integral")))
		case 7:
			list := rapid.SliceOfN(genValue(depth-1), 0, 5).Draw(t, "array")
			return slices.Concat(msgval.AppendArrayHeader(nil, len(list)), slices.Concat(list...))
		default:
			n := rapid.IntRange(0, 5).Draw(t, "pairs")
			out := msgval.AppendMapHeader(nil, n)
			if rapid.Bool().Draw(t, "map16") {
				out = []byte{0xde, 0, byte(n)}
			}
			for range n {
				out = msgval.AppendString(out, rapid.SampledFrom([]string{"a", "b", "bb", "é"}).Draw(t, "key"))
				out = append(out, genValue(depth-1).Draw(t, "value")...)
			}
			return out
		}
	})
}

// CRDT-06: the canonical form is a value that means the same, is its own
// canonical form, and does not depend on the order of the pairs.
func TestCanonicalLaws(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v := genValue(3).Draw(t, "value")
		canon := msgval.Canonical(nil, v)
		if rest, err := msgval.Check(canon); err != nil || len(rest) != 0 {
			t.Fatalf("Canonical(%x) = %x: %v", v, canon, err)
		}
		if again := msgval.Canonical(nil, canon); !bytes.Equal(again, canon) {
			t.Fatalf("canonical of canonical %x is %x", canon, again)
		}
		if !msgval.Equal(v, canon) {
			t.Fatalf("%x is not equal to its canonical form %x", v, canon)
		}
		w := genValue(2).Draw(t, "another value")
		if got, want := msgval.Equal(v, w), bytes.Equal(canon, msgval.Canonical(nil, w)); got != want {
			t.Fatalf("Equal(%x, %x) = %v, their canonical forms say %v", v, w, got, want)
		}
		// An independent decoder sees the same.
		if diff := cmp.Diff(meaning(t, v), meaning(t, canon)); diff != "" {
			t.Fatalf("%x (-value +canonical):\n%s", v, diff)
		}
	})
}

// meaning decodes a value with another library, numbers being made comparable.
func meaning(t *rapid.T, v []byte) any {
	out, rest, err := msgp.ReadIntfBytes(v)
	if err != nil || len(rest) != 0 {
		t.Fatalf("msgp reads %x with %v", v, err)
	}
	var norm func(v any) any
	norm = func(v any) any {
		switch v := v.(type) {
		case int64:
			return fmt.Sprint("int ", v)
		case uint64:
			return fmt.Sprint("int ", v)
		case float64:
			if v == math.Trunc(v) && math.Abs(v) <= 1<<53 {
				return fmt.Sprint("int ", int64(v))
			}
			return fmt.Sprint("float ", v)
		case []any:
			for i := range v {
				v[i] = norm(v[i])
			}
		case map[string]any:
			for k := range v {
				v[k] = norm(v[k])
			}
		}
		return v
	}
	return norm(out)
}

func TestJSONLaws(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v := genValue(3).Draw(t, "value")
		text, ok := msgval.AppendJSON(nil, v)
		if !ok {
			return
		}
		back, err := msgval.FromJSON(text)
		if err != nil {
			t.Fatalf("FromJSON(%s): %v", text, err)
		}
		if !msgval.Equal(v, back) {
			t.Fatalf("%x became %s became %x", v, text, back)
		}
	})
}

func TestAppendJSON(t *testing.T) {
	str := func(s string) []byte { return msgval.AppendString(nil, s) }
	for _, c := range []struct {
		name string
		in   []byte
		want string // empty: none
	}{
		{"escapes", str("\"\\\n\x1f</>\u2028é"), "\"\\\"\\\\\\u000a\\u001f</>\u2028é\""},
		{"all of a uint64", msgval.AppendUint(nil, math.MaxUint64), "18446744073709551615"},
		{"integral float", msgval.AppendFloat(nil, 1700000000000), "1700000000000"},
		{"large float", msgval.AppendFloat(nil, 1<<60), "1.152921504606847e+18"},
		{"NUL", msgval.AppendString(nil, "a\x00"), `"a\u0000"`},
		{"broken UTF-8", str("\xed\xa0\xbd"), ""},
		{"bin", []byte{0xc4, 0}, ""},
		{"ext", []byte{0xd4, 0xff, 0}, ""},
		{"NaN within", append([]byte{0x91}, msgval.AppendFloat(nil, math.NaN())...), ""},
		{"infinity", msgval.AppendFloat(nil, math.Inf(-1)), ""},
		{"integer key", []byte{0x81, 5, 1}, ""},
		{"equal keys", []byte{0x82, 0xa1, 'a', 1, 0xa1, 'a', 1}, ""},
		{"nothing", nil, ""},
		{"two values", []byte{1, 2}, ""},
	} {
		got, ok := msgval.AppendJSON([]byte("x"), c.in)
		if ok != (c.want != "") || string(got) != "x"+c.want {
			t.Errorf("%s: %s, %v, want %s", c.name, got, ok, c.want)
		}
	}
}

func TestFromJSON(t *testing.T) {
	for _, c := range []struct {
		in   string
		want string // hex; empty: an error
	}{
		{` {"a": [1, -1, 1.0, true, null]} `, "81a16195" + "01ff" + "cb3ff0000000000000" + "c3c0"},
		{"18446744073709551615", "cfffffffffffffffff"},
		{"18446744073709551616", ""},
		{"-9223372036854775809", ""},
		{"18446744073709551616.0", "cb43f0000000000000"},
		{`"\ud83d"`, "a3efbfbd"},
		{"{}", "80"},
		{strings.Repeat("[", 128) + strings.Repeat("]", 128), strings.Repeat("91", 127) + "90"},
		{strings.Repeat("[", 129) + strings.Repeat("]", 129), ""},
		{strings.Repeat("[", 100000), ""},
		{"", ""},
		{"[1", ""},
		{"1 2", ""},
		{"[1]]", ""},
		{"{1:2}", ""},
		{"1e999", ""},
		{"\"\xff\"", ""},
		{"nul", ""},
		{"[,]", ""},
	} {
		got, err := msgval.FromJSON([]byte(c.in))
		if c.want == "" {
			if !errors.Is(err, msgval.ErrJSON) {
				t.Errorf("FromJSON(%.20q) = %x, %v, want ErrJSON", c.in, got, err)
			}
			continue
		}
		if err != nil || hex.EncodeToString(got) != c.want {
			t.Errorf("FromJSON(%.20q) = %x, %v, want %s", c.in, got, err, c.want)
		}
	}
}

func TestNoAllocations(t *testing.T) {
	v := load(t).Encode
	last := unhex(t, v[len(v)-1].ClientHex)
	small := []byte{0x82, 0xa1, 'a', 1, 0xa1, 'b', 0xcb, 0x3f, 0xf8, 0, 0, 0, 0, 0, 0}
	buf := make([]byte, 0, 1024)
	for name, f := range map[string]func(){
		"Check":     func() { msgval.Check(last) },
		"Skip":      func() { msgval.Skip(last) },
		"Canonical": func() { msgval.Canonical(buf, small) },
		"JSON":      func() { msgval.AppendJSON(buf, small) },
	} {
		if n := testing.AllocsPerRun(100, f); n != 0 {
			t.Errorf("%s allocates %v times", name, n)
		}
	}
}

func seeds(f *testing.F) {
	v := load(f)
	for _, c := range v.Encode {
		f.Add(unhex(f, c.ClientHex))
		f.Add(unhex(f, c.MinimalHex))
	}
	for _, c := range v.SpecialValues {
		f.Add(unhex(f, c.ClientHex))
	}
	for _, c := range v.Decode {
		f.Add(unhex(f, c.Hex))
	}
	f.Add([]byte{0x82, 0xa1, 'b', 1, 0xa1, 'a', 0x92, 0xc4, 0, 0xd4, 1, 2})
	f.Add([]byte{0xdd, 0xff, 0xff, 0xff, 0xff})
}

// Check agrees with Skip, and with an independent decoder about where a value
// ends.
func FuzzCheck(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		rest, err := msgval.Check(b)
		theirs, theirErr := msgp.Skip(b)
		if err != nil {
			if theirErr == nil && !errors.Is(err, msgval.ErrTooDeep) {
				t.Errorf("Check(%x): %v; msgp accepts it", b, err)
			}
			return
		}
		if theirErr != nil || len(theirs) != len(rest) {
			t.Errorf("Check(%x) leaves %d bytes; msgp %d, %v", b, len(rest), len(theirs), theirErr)
		}
		if n := msgval.Skip(b); n != len(b)-len(rest) {
			t.Errorf("Skip(%x) = %d, want %d", b, n, len(b)-len(rest))
		}
	})
}

// Canonical makes of a checked value another one, which it leaves alone; it
// survives everything else.
func FuzzCanonical(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		canon := msgval.Canonical(nil, b)
		rest, err := msgval.Check(b)
		if err != nil {
			return
		}
		v := b[:len(b)-len(rest)]
		if after, err := msgval.Check(canon); err != nil || len(after) != 0 {
			t.Fatalf("Canonical(%x) = %x: %v", v, canon, err)
		}
		if again := msgval.Canonical(nil, canon); !bytes.Equal(again, canon) {
			t.Errorf("canonical of canonical %x is %x", canon, again)
		}
		if !msgval.Equal(v, canon) {
			t.Errorf("%x is not equal to its canonical form", v)
		}
	})
}

// What AppendJSON writes is JSON and reads back as the same value.
func FuzzAppendJSON(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		text, ok := msgval.AppendJSON(nil, b)
		if !ok {
			return
		}
		if rest, err := msgval.Check(b); errors.Is(err, msgval.ErrTooDeep) {
			return
		} else if err != nil || len(rest) != 0 {
			t.Fatalf("AppendJSON accepts %x: %v", b, err)
		}
		if !json.Valid(text) {
			t.Fatalf("AppendJSON(%x) = %s", b, text)
		}
		back, err := msgval.FromJSON(text)
		if err != nil || !msgval.Equal(b, back) {
			t.Errorf("%x became %s became %x, %v", b, text, back, err)
		}
	})
}

// FromJSON accepts JSON only, and what it returns has the JSON form again.
func FuzzFromJSON(f *testing.F) {
	for _, c := range load(f).Encode {
		f.Add([]byte(c.Value))
	}
	f.Add([]byte(`{"a":{"a":1},"a":[1e5,-0,"\u0000\ud83d"]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		b, err := msgval.FromJSON(text)
		if err != nil {
			return
		}
		if !json.Valid(text) {
			t.Fatalf("FromJSON accepts %q", text)
		}
		if rest, err := msgval.Check(b); err != nil || len(rest) != 0 {
			t.Fatalf("FromJSON(%q) = %x: %v", text, b, err)
		}
		again, ok := msgval.AppendJSON(nil, b)
		if !ok {
			return // NUL, equal keys
		}
		if back, err := msgval.FromJSON(again); err != nil || !msgval.Equal(b, back) {
			t.Errorf("%q became %s became %x, %v", text, again, back, err)
		}
	})
}

func BenchmarkCheck(b *testing.B) {
	v := load(b).Encode
	value := unhex(b, v[len(v)-1].ClientHex)
	b.SetBytes(int64(len(value)))
	for b.Loop() {
		msgval.Check(value)
	}
}

func BenchmarkCanonical(b *testing.B) {
	v := load(b).Encode
	value := unhex(b, v[len(v)-1].ClientHex)
	buf := make([]byte, 0, 4096)
	b.SetBytes(int64(len(value)))
	for b.Loop() {
		msgval.Canonical(buf, value)
	}
}
