package query_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/topgun-sync/topgun/core/msgval"
	"github.com/topgun-sync/topgun/core/query"
)

func fromJSON(t testing.TB, text string) []byte {
	t.Helper()
	b, err := msgval.FromJSON([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestMatch(t *testing.T) {
	const value = `{"n":1, "f":1.5, "s":"x", "b":true, "nil":null, "o":{"a":{"b":2}, "l":[1]}, "o.a":"literal", "l":[1,{"k":2}], "":0}`
	for where, want := range map[string]bool{
		`{}`:                          true,
		`{"n":1}`:                     true,
		`{"n":1.0}`:                   true,
		`{"n":1, "s":"x"}`:            true,
		`{"n":1, "s":"y"}`:            false,
		`{"n":"1"}`:                   false,
		`{"n":true}`:                  false,
		`{"f":1.5}`:                   true,
		`{"b":true}`:                  true,
		`{"b":1}`:                     false,
		`{"nil":null}`:                true,
		`{"missing":null}`:            false,
		`{"s.length":1}`:              false,
		`{"o":{"l":[1],"a":{"b":2}}}`: true,
		`{"o":{"a":{"b":2}}}`:         false,
		`{"o.a":"literal"}`:           true,
		`{"o.a":{"b":2}}`:             false,
		`{"o.a.b":2}`:                 true,
		`{"o.a.b.c":2}`:               false,
		`{"o.l":[1]}`:                 true,
		`{"l":[1,{"k":2}]}`:           true,
		`{"l":[{"k":2},1]}`:           false,
		`{"l.0":1}`:                   false,
		`{"":0}`:                      true,
		`{".":0}`:                     false,
	} {
		f, err := query.ParseWhere(fromJSON(t, where))
		if err != nil {
			t.Errorf("%s: %v", where, err)
			continue
		}
		if got := f.Match(fromJSON(t, value)); got != want {
			t.Errorf("%s: %v, want %v", where, got, want)
		}
	}
}

func TestMatchOtherValues(t *testing.T) {
	f, err := query.ParseWhere(fromJSON(t, `{"a":1}`))
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range []string{`null`, `1`, `"a"`, `["a",1]`, `{}`} {
		if f.Match(fromJSON(t, v)) {
			t.Errorf("%s passes", v)
		}
	}
	// Of equal names the last wins, as in every decoder.
	if f.Match([]byte{0x82, 0xa1, 'a', 1, 0xa1, 'a', 2}) || !f.Match([]byte{0x82, 0xa1, 'a', 2, 0xa1, 'a', 1}) {
		t.Error("not the last of equal names")
	}
	if !f.Match([]byte{0x82, 5, 5, 0xa1, 'a', 1}) {
		t.Error("an integer key disturbs")
	}
	for _, where := range [][]byte{nil, {0xc0}, {0x80}} {
		f, err := query.ParseWhere(where)
		if err != nil || !f.Match([]byte{1}) {
			t.Errorf("where %x: %v, or it does not pass everything", where, err)
		}
	}
}

func TestNaNEqualsNothing(t *testing.T) {
	nan := append([]byte{0x81, 0xa1, 'a'}, 0xcb, 0x7f, 0xf8, 0, 0, 0, 0, 0, 0)
	f, err := query.ParseWhere(nan)
	if err != nil || f.Match(nan) {
		t.Errorf("NaN matches, or %v", err)
	}
}

func TestParseWhereErrors(t *testing.T) {
	var many []string
	for i := range 65 {
		many = append(many, fmt.Sprintf(`"f%d":%d`, i, i))
	}
	for _, c := range []struct {
		name  string
		where []byte
		want  error
	}{
		{"65 terms", fromJSON(t, "{"+strings.Join(many, ",")+"}"), query.ErrTooComplex},
		{"an array", []byte{0x90}, query.ErrWhere},
		{"truncated", []byte{0x81}, query.ErrWhere},
		{"trailing byte", []byte{0x80, 0}, query.ErrWhere},
		{"integer key", []byte{0x81, 1, 1}, query.ErrWhere},
		{"operator", fromJSON(t, `{"age":{"$gt":18}}`), query.ErrOperator},
	} {
		if _, err := query.ParseWhere(c.where); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
	if _, err := query.ParseWhere(fromJSON(t, "{"+strings.Join(many[:64], ",")+"}")); err != nil {
		t.Errorf("64 terms: %v", err)
	}
}

// Nothing panics, whatever the clause and the value are.
func FuzzParseWhere(f *testing.F) {
	f.Add([]byte{0x81, 0xa1, 'a', 1}, []byte{0x81, 0xa1, 'a', 1})
	f.Add([]byte{0x81, 0xa3, 'a', '.', 'b', 1}, []byte{0x81, 0xa1, 'a', 0x81, 0xa1, 'b', 1})
	f.Fuzz(func(t *testing.T, where, value []byte) {
		filter, err := query.ParseWhere(where)
		if err != nil {
			return
		}
		filter.Match(value)
	})
}

func BenchmarkMatch(b *testing.B) {
	f, err := query.ParseWhere(fromJSON(b, `{"city":"Berlin","age":30}`))
	if err != nil {
		b.Fatal(err)
	}
	v := fromJSON(b, `{"name":"Alice","age":30,"tags":["a","b"],"city":"Berlin"}`)
	b.ReportAllocs()
	for b.Loop() {
		f.Match(v)
	}
}

func TestMatchAllocatesNothing(t *testing.T) {
	f, err := query.ParseWhere(fromJSON(t, `{"city":"Berlin","age":30}`))
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{`{"age":30,"city":"Berlin"}`, `{"age":31,"city":"Berlin"}`, `{"age":30,"city":"Hamburg"}`, `{"age":"30","city":{"b":1,"a":2}}`, `{"age":30,"city":{"b":1,"a":2}}`} {
		v := fromJSON(t, text)
		if n := testing.AllocsPerRun(100, func() { f.Match(v) }); n != 0 {
			t.Errorf("matching %s allocates %v times", text, n)
		}
	}
}
