package query_test

import (
	"bytes"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/topgun-sync/topgun/core/msgval"
	"github.com/topgun-sync/topgun/core/query"
)

func TestMatch(t *testing.T) {
	const value = `{"n":1, "f":1.5, "s":"Hello World", "b":true, "nil":null, "o":{"a":{"b":2}, "l":[1]}, "o.a":"literal",
		"l":[1,{"k":2},"x"], "":0, "_key":"field", "d":"2024-01-15", "İ":1}`
	for text, want := range map[string]bool{
		`{}`:                                                true,
		`{"where":null}`:                                    true,
		`{"where":{}}`:                                      true,
		`{"where":{"n":1}}`:                                 true,
		`{"where":{"n":1.0}}`:                               true,
		`{"where":{"n":1, "b":true}}`:                       true,
		`{"where":{"n":1, "b":false}}`:                      false,
		`{"where":{"n":"1"}}`:                               false,
		`{"where":{"n":true}}`:                              false,
		`{"where":{"b":1}}`:                                 false,
		`{"where":{"nil":null}}`:                            true,
		`{"where":{"missing":null}}`:                        false,
		`{"where":{"s.length":11}}`:                         false,
		`{"where":{"o.a":"literal"}}`:                       true,
		`{"where":{"o.a":{"b":2}}}`:                         false,
		`{"where":{"o.a.b":2}}`:                             true,
		`{"where":{"o.a.b.c":2}}`:                           false,
		`{"where":{"l.0":1}}`:                               false,
		`{"where":{"":0}}`:                                  true,
		`{"where":{".":0}}`:                                 false,
		`{"where":{"_key":"k1"}}`:                           true,
		`{"where":{"_key":"field"}}`:                        false,
		`{"where":{"o":{"l":[1],"a":{"b":2}}}}`:             true,
		`{"where":{"o":{"a":{"b":2}}}}`:                     false,
		`{"where":{"l":[1,{"k":2},"x"]}}`:                   true,
		`{"where":{"n":{"$gt":0,"$lte":1}}}`:                true,
		`{"where":{"n":{"$gt":1}}}`:                         false,
		`{"where":{"n":{"$gte":1,"$lt":1}}}`:                false,
		`{"where":{"missing":{"$ne":1}}}`:                   true,
		`{"where":{"n":{"$gt":0}},"predicate":{"op":"or"}}`: false,
		`{"where":{"n":2},"predicate":{"op":"and"}}`:        false,

		`{"predicate":{"op":"startsWith","attribute":"s","value":"Hello"}}`:            true,
		`{"predicate":{"op":"startsWith","attribute":"s","value":"hello"}}`:            false,
		`{"predicate":{"op":"endsWith","attribute":"s","value":"World"}}`:              true,
		`{"predicate":{"op":"endsWith","attribute":"s","value":"world"}}`:              false,
		`{"predicate":{"op":"endsWith","attribute":"n","value":"1"}}`:                  false,
		`{"predicate":{"op":"startsWith","attribute":"_key","value":"k"}}`:             true,
		`{"predicate":{"op":"startsWith","attribute":"s"}}`:                            false,
		`{"predicate":{"op":"contains","attribute":"l","value":1.0}}`:                  true,
		`{"predicate":{"op":"contains","attribute":"l","value":{"k":2}}}`:              true,
		`{"predicate":{"op":"contains","attribute":"l","value":"X"}}`:                  false,
		`{"predicate":{"op":"contains","attribute":"o","value":"a"}}`:                  false,
		`{"predicate":{"op":"contains","attribute":"l"}}`:                              false,
		`{"predicate":{"op":"containsAll","attribute":"l","value":[1,"x"]}}`:           true,
		`{"predicate":{"op":"containsAll","attribute":"l","value":[1,"y"]}}`:           false,
		`{"predicate":{"op":"containsAll","attribute":"l","value":[]}}`:                true,
		`{"predicate":{"op":"containsAny","attribute":"l","value":[2,"x"]}}`:           true,
		`{"predicate":{"op":"containsAny","attribute":"l","value":[]}}`:                false,
		`{"predicate":{"op":"containsAny","attribute":"s","value":["WORLD"]}}`:         true,
		`{"predicate":{"op":"between","attribute":"d","value":["2024-01-01","2025"]}}`: true,
		`{"predicate":{"op":"between","attribute":"n","value":["0","2"]}}`:             false,
		`{"predicate":{"op":"gt","attribute":"b","value":false}}`:                      true,
		`{"predicate":{"op":"gt","attribute":"b","value":0}}`:                          false,
		`{"predicate":{"op":"gte","attribute":"o","value":{"a":{"b":2},"l":[1]}}}`:     false,
		`{"predicate":{"op":"eq","attribute":"o.a.b","value":2}}`:                      true,
		`{"predicate":{"op":"regex","attribute":"s","value":"^hello(?i)"}}`:            false,
		`{"predicate":{"op":"not","children":[{"op":"like","attribute":"s"}]}}`:        true,
		`{"predicate":null}`: true,
	} {
		if got := parse(t, text).Match("k1", fromJSON(t, value)); got != want {
			t.Errorf("%s: %v, want %v", text, got, want)
		}
	}
}

func TestMatchOddMaps(t *testing.T) {
	q := parse(t, `{"where":{"a":1}}`)
	// Of equal names the last wins, as in every decoder.
	if q.Match("", []byte{0x82, 0xa1, 'a', 1, 0xa1, 'a', 2}) || !q.Match("", []byte{0x82, 0xa1, 'a', 2, 0xa1, 'a', 1}) {
		t.Error("not the last of equal names")
	}
	if !q.Match("", []byte{0x82, 5, 5, 0xa1, 'a', 1}) {
		t.Error("an integer key disturbs")
	}
	if !q.Match("", []byte{0xde, 0, 1, 0xd9, 1, 'a', 0xd1, 0, 1}) {
		t.Error("long forms are not read")
	}
	for name, where := range map[string][]byte{
		"fields":    {0x82, 0xa1, 'a', 2, 0xa1, 'a', 1},
		"operators": mapOf("a", []byte{0x82, 0xa3, '$', 'g', 't', 5, 0xa3, '$', 'g', 't', 0}),
	} {
		q, err := query.Parse(mapOf("where", where), nil)
		if err != nil || !q.Match("", mapOf("a", 1)) {
			t.Errorf("%s of a query: not the last of equal names, or %v", name, err)
		}
	}
}

// What cannot be read, or would cost too much, is an error that says why.
func TestParseErrors(t *testing.T) {
	nested := func(n int) string {
		return strings.Repeat(`{"op":"not","children":[`, n-1) + `{"op":"and"}` + strings.Repeat(`]}`, n-1)
	}
	list := func(n int, element string) string {
		return "[" + strings.TrimSuffix(strings.Repeat(element+",", n), ",") + "]"
	}
	fields := func(n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, `,"f%d":1`, i)
		}
		return "{" + b.String()[1:] + "}"
	}
	node := func(op, value string) string {
		return `{"predicate":{"op":"` + op + `","attribute":"a","value":` + value + `}}`
	}
	text := func(n int) string { return `"` + strings.Repeat("x", n) + `"` }
	for _, c := range []struct{ query, want string }{
		{`[]`, query.BadQuery},
		{`{"where":[]}`, query.BadQuery},
		{`{"where":{"a":{"$in":[1]}}}`, query.UnknownOperator},
		{`{"where":{"a":{"$gt":1,"b":2}}}`, query.BadQuery},
		{`{"where":` + fields(256) + `}`, ""},
		{`{"where":` + fields(257) + `}`, query.QueryTooComplex},
		{`{"where":` + fields(255) + `,"predicate":{"op":"and"}}`, ""},
		{`{"where":` + fields(256) + `,"predicate":{"op":"and"}}`, query.QueryTooComplex},
		{`{"predicate":1}`, query.BadQuery},
		{`{"predicate":{}}`, query.BadQuery},
		{`{"predicate":{"op":5}}`, query.BadQuery},
		{`{"predicate":{"op":"eq","attribute":5}}`, query.BadQuery},
		{`{"predicate":{"op":"and","children":5}}`, query.BadQuery},
		{`{"predicate":{"op":"and","children":[5]}}`, query.BadQuery},
		{`{"predicate":{"op":"EQ","attribute":"a"}}`, query.UnknownOperator},
		{`{"predicate":{"op":"match","attribute":"a","query":"x"}}`, query.NotSupported},
		{`{"predicate":{"op":"or","children":[{"op":"eq","attribute":"a","value":1},{"op":"near"}]}}`, query.UnknownOperator},
		{`{"predicate":{"op":"not","children":[{"op":"and"},{"op":"near"}]}}`, query.UnknownOperator},
		{`{"predicate":` + nested(32) + `}`, ""},
		{`{"predicate":` + nested(33) + `}`, query.QueryTooComplex},
		{`{"predicate":{"op":"or","children":` + list(255, `{"op":"and"}`) + `}}`, ""},
		{`{"predicate":{"op":"or","children":` + list(256, `{"op":"and"}`) + `}}`, query.QueryTooComplex},
		{node("in", list(1000, "1")), ""},
		{node("in", list(1001, "1")), query.QueryTooComplex},
		{node("containsAny", list(255, `"x"`)), ""},
		{node("containsAny", list(256, `"x"`)), query.QueryTooComplex},
		{node("like", text(1024)), ""},
		{node("like", text(1025)), query.QueryTooComplex},
		{node("regex", text(800)), ""},
		{node("regex", text(1025)), query.QueryTooComplex},
		{node("regex", `"x{400}"`), ""},
		{node("regex", `"(x{900})(y{900})"`), query.QueryTooComplex},
		{node("regex", `"((a{15}){15})"`), ""},
		{node("regex", `"((a{30}b){30}c){30}"`), query.BadQuery}, // RE2 refuses repetitions of more than 1,000
		{node("regex", `"a{99999}"`), query.BadQuery},
		{node("regex", `"(?=a)"`), query.BadQuery},
		{node("regex", `"(a)\\1"`), query.BadQuery},
		{`{"predicate":{"op":"or","children":` + list(3, `{"op":"regex","attribute":"a","value":"x{400}"}`) + `}}`, query.QueryTooComplex},
		{`{"sort":"a"}`, query.BadQuery},
		{`{"sort":{"a":"up"}}`, query.BadQuery},
		{`{"sort":{"a":1}}`, query.BadQuery},
		{`{"sort":["a"]}`, query.BadQuery},
		{`{"sort":[{"direction":"asc"}]}`, query.BadQuery},
		{`{"sort":` + list(8, `{"field":"a"}`) + `}`, ""},
		{`{"sort":` + list(9, `{"field":"a"}`) + `}`, query.QueryTooComplex},
		{`{"limit":"5"}`, query.BadQuery},
		{`{"offset":[]}`, query.BadQuery},
		{`{"cursor":5}`, query.BadQuery},
		{`{"fields":{}}`, query.BadQuery},
		{`{"fields":[1]}`, query.BadQuery},
		{`{"fields":` + list(65, `"a"`) + `}`, query.QueryTooComplex},
		{`{"groupBy":"a"}`, query.BadQuery},
		{`{"groupBy":` + list(5, `"a"`) + `}`, query.QueryTooComplex},
		{`{"aggregations":"sum"}`, query.BadQuery},
		{`{"aggregations":["sum"]}`, query.BadQuery},
		{`{"aggregations":[{"func":"sum"}]}`, query.BadQuery},
		{`{"aggregations":[{"func":"median","field":"a"}]}`, query.BadQuery},
		{`{"aggregations":[{"func":"count","field":1}]}`, query.BadQuery},
		{`{"aggregations":` + list(17, `{"func":"count"}`) + `}`, query.QueryTooComplex},
		{`{"where":{"a":` + text(256<<10) + `}}`, query.QueryTooComplex},
		{`{"vector":[1,2,3]}`, ""},
	} {
		_, err := query.Parse(fromJSON(t, c.query), nil)
		if got := errorName(err); got != c.want || (err == nil) != (c.want == "") {
			t.Errorf("%.120s: %v, want %q", c.query, err, c.want)
		}
	}
	for _, b := range [][]byte{{0x81}, {0x80, 0}, {0xc1}, mapOf("where", []byte{0x81, 1, 1})} {
		if _, err := query.Parse(b, nil); errorName(err) != query.BadQuery {
			t.Errorf("%x: %v", b, err)
		}
	}
	if _, err := query.Parse(nil, make([]string, 65)); errorName(err) != query.QueryTooComplex {
		t.Errorf("65 fields: %v", err)
	}
}

func TestWindowOfQuery(t *testing.T) {
	for text, want := range map[string][2]int{
		`{}`:                                  {0, 0},
		`{"limit":5,"offset":2}`:              {5, 2},
		`{"limit":5.0,"offset":-1}`:           {5, 0},
		`{"limit":1.5}`:                       {0, 0},
		`{"limit":null}`:                      {0, 0},
		`{"limit":1e300}`:                     {1 << 30, 0},
		`{"limit":5,"offset":2,"cursor":"x"}`: {5, 0},
	} {
		if q := parse(t, text); q.Limit() != want[0] || q.Offset() != want[1] {
			t.Errorf("%s: limit %d, offset %d, want %v", text, q.Limit(), q.Offset(), want)
		}
	}
}

// Two spellings of one query have one canonical form, and other queries another.
func TestCanonical(t *testing.T) {
	same := []string{
		`{"where":{"a":1,"b":{"x":1,"y":2}},"sort":{"a":"asc","b":"desc"},"limit":5,"groupBy":[],"offset":0,"cursor":""}`,
		`{"limit":5.0,"sort":[{"field":"a"},{"direction":"desc","field":"b"}],"where":{"b":{"y":2.0,"x":1},"a":1.0},"predicate":null,"other":1}`,
	}
	a, b := parse(t, same[0]), parse(t, same[1])
	if !bytes.Equal(a.Canonical(), b.Canonical()) {
		t.Errorf("%x\n%x", a.Canonical(), b.Canonical())
	}
	seen := make(map[string]string)
	for _, text := range []string{
		`{}`, `{"where":{"a":1}}`, `{"where":{"a":"1"}}`, `{"where":{"a":{"$gt":1}}}`, `{"where":{"a":{"$gt":1,"$lt":5}}}`,
		`{"predicate":{"op":"eq","attribute":"a","value":1}}`, `{"predicate":{"op":"eq","attribute":"a"}}`, `{"predicate":{"op":"and"}}`,
		`{"predicate":{"op":"and","children":[{"op":"isNull","attribute":"a"}]}}`, `{"sort":{"a":"asc"}}`, `{"sort":{"a":"desc"}}`,
		`{"sort":{"a":"asc","b":"asc"}}`, `{"sort":{"b":"asc","a":"asc"}}`, `{"limit":1}`, `{"offset":1}`, `{"cursor":"1"}`, `{"fields":["a"]}`,
		`{"groupBy":["a"]}`, `{"aggregations":[{"func":"count"}]}`, `{"aggregations":[{"func":"sum","field":"a"}]}`,
	} {
		q := parse(t, text)
		if other, ok := seen[string(q.Canonical())]; ok {
			t.Errorf("%s and %s are the same", text, other)
		}
		seen[string(q.Canonical())] = text
		if again, err := query.Parse(q.Encode(), nil); err != nil || !bytes.Equal(again.Canonical(), q.Canonical()) {
			t.Errorf("%s does not survive Encode: %v", text, err)
		}
	}
}

func TestProject(t *testing.T) {
	const value = `{"a":1,"b":{"c":2,"d":3},"e":null}`
	for _, c := range []struct {
		query  string
		fields []string
		want   string
	}{
		{`{}`, nil, value},
		{`{"fields":["a"]}`, nil, `{"a":1}`},
		{`{"fields":["e","x","a","a"]}`, nil, `{"e":null,"a":1}`},
		{`{"fields":["b.c"]}`, nil, `{"b.c":2}`},
		{`{"fields":["a"]}`, []string{"e"}, `{"e":null}`},
		{`{"fields":["x"]}`, nil, `{}`},
	} {
		q, err := query.Parse(fromJSON(t, c.query), c.fields)
		if err != nil {
			t.Fatal(err)
		}
		if got := q.Project(nil, fromJSON(t, value)); !bytes.Equal(got, fromJSON(t, c.want)) {
			t.Errorf("%s and %q: %x, want %s", c.query, c.fields, got, c.want)
		}
		if got := q.Project(nil, []byte{0x91, 1}); !bytes.Equal(got, []byte{0x91, 1}) {
			t.Errorf("%s: an array becomes %x", c.query, got)
		}
	}
}

func TestEqualities(t *testing.T) {
	q := parse(t, `{"where":{"a":1.0,"b":{"$gt":1},"_key":"k"},"predicate":{"op":"and","children":[
		{"op":"eq","attribute":"c.d","value":"x"}, {"op":"or","children":[{"op":"eq","attribute":"e","value":1}]},
		{"op":"not","children":[{"op":"eq","attribute":"f","value":1}]}, {"op":"eq","attribute":"g"}, {"op":"neq","attribute":"h","value":1},
		{"op":"and","children":[{"op":"eq","attribute":"i","value":[1]}]}]}}`)
	var got []string
	for _, e := range q.Equalities() {
		got = append(got, fmt.Sprintf("%s=%x", e.Field, e.Value))
	}
	if want := []string{"a=01", "c.d=a178", "i=9101"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if v, ok := query.EqualityValue(fromJSON(t, `{"c":{"d":"x"}}`), "c.d"); !ok || string(v) != "\xa1x" {
		t.Errorf("by a path: %x, %v", v, ok)
	}
	if v, ok := query.EqualityValue(fromJSON(t, `{"c":{"d":"x"}}`), "d"); ok {
		t.Errorf("a missing field: %x", v)
	}
}

// Like matches what the regular expression matches that it stands for.
func TestLike(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pattern := rapid.StringOfN(rapid.SampledFrom([]rune("aAb%%_\n*é.")), 0, 8, -1).Draw(t, "pattern")
		text := rapid.StringOfN(rapid.SampledFrom([]rune("aAbBÉ\n\r*.")), 0, 10, -1).Draw(t, "text")
		expr := regexp.QuoteMeta(pattern)
		expr = strings.ReplaceAll(expr, "%", `[^\n\r\x{2028}\x{2029}]*`)
		expr = strings.ReplaceAll(expr, "_", `[^\n\r\x{2028}\x{2029}]`)
		want := regexp.MustCompile(`(?i)\A` + expr + `\z`).MatchString(text)
		q := parseRapid(t, mapOf("predicate", mapOf("op", "like", "attribute", "s", "value", pattern)))
		if got := q.Match("k", mapOf("s", text)); got != want {
			t.Fatalf("%q like %q: %v, want %v", text, pattern, got, want)
		}
	})
}

func TestLikeUnits(t *testing.T) {
	for _, c := range []struct {
		text, pattern string
		want          bool
	}{
		{"😀", "__", true},
		{"😀", "_", false},
		{"\xed\xa0\xbd", "_", true}, // an unpaired surrogate, as encoders write it
		{"\xff\xfe", "__", true},
		{"ſ", "s", false}, // JavaScript folds nothing into ASCII
		{"\u212a", "k", false},
		{"ı", "I", false},
		{"ΣΑΣ", "σασ", true},
		{"a\u2028b", "a%b", false},
	} {
		q, err := query.Parse(mapOf("predicate", mapOf("op", "like", "attribute", "s", "value", c.pattern)), nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := q.Match("k", mapOf("s", c.text)); got != c.want {
			t.Errorf("%q like %q: %v", c.text, c.pattern, got)
		}
	}
}

// Patterns made to be slow are not.
func TestPatternsAreLinear(t *testing.T) {
	value := mapOf("s", strings.Repeat("a", 100_000))
	for _, c := range [][2]string{
		{"like", strings.Repeat("%a", 200) + "%b"},
		{"like", "%" + strings.Repeat("a", 500) + "b%"},
		{"regex", "(a+)+b"},
		{"regex", "(a|aa)+$b"},
		{"contains", strings.Repeat("a", 50_000) + "b"},
	} {
		q, err := query.Parse(mapOf("predicate", mapOf("op", c[0], "attribute", "s", "value", c[1])), nil)
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if q.Match("k", value) {
			t.Errorf("%s %.20s matches", c[0], c[1])
		}
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("%s %.20s took %v", c[0], c[1], took)
		}
	}
}

// Nothing panics, whatever query and value are, and what was parsed survives Encode.
func FuzzParse(f *testing.F) {
	for _, text := range []string{
		`{"where":{"a":1,"b.c":{"$gt":1}},"sort":{"a":"asc","_key":"desc"},"limit":5,"offset":1,"fields":["a"]}`,
		`{"predicate":{"op":"and","children":[{"op":"in","attribute":"a","value":[1,2,3,4,5,6,7,8,9]},{"op":"like","attribute":"a","value":"%x_"},{"op":"regex","attribute":"a","value":"x+"}]}}`,
		`{"predicate":{"op":"not","children":[{"op":"between","attribute":"_key","value":["a","b"]},{"op":"containsAll","attribute":"a","value":["x",1]}]}}`,
		`{"groupBy":["a","b"],"aggregations":[{"func":"sum","field":"a"},{"func":"max","field":"b"}],"cursor":"AAAA"}`,
	} {
		f.Add(fromJSON(f, text), fromJSON(f, `{"a":1,"b":{"c":[1,"x"]}}`), fromJSON(f, `{"a":"x","b":2.5}`))
	}
	f.Fuzz(func(t *testing.T, text, x, y []byte) {
		q, err := query.Parse(text, nil)
		if err != nil {
			if errorName(err) == "" {
				t.Fatalf("%v is no *query.Error", err)
			}
			return
		}
		again, err := query.Parse(q.Encode(), nil)
		if err != nil || !bytes.Equal(again.Canonical(), q.Canonical()) {
			t.Fatalf("%x does not survive Encode: %v", text, err)
		}
		live := query.NewLive(q, "m", 10)
		for i, v := range [][]byte{x, y} {
			if rest, err := msgval.Check(v); err != nil || len(rest) > 0 {
				continue
			}
			key := fmt.Sprint(i)
			if q.Match(key, v) != again.Match(key, v) {
				t.Fatalf("%x matches %x otherwise after Encode", text, v)
			}
			live.Apply(key, v)
		}
		live.Window()
	})
}

func TestMatchAllocatesNothing(t *testing.T) {
	for _, text := range []string{
		`{"where":{"owner":"alice"}}`, `{"where":{"city":"Berlin","age":30}}`, `{"predicate":{"op":"gt","attribute":"age","value":18.5}}`,
		`{"predicate":{"op":"like","attribute":"name","value":"%li%"}}`, `{"predicate":{"op":"contains","attribute":"name","value":"LI"}}`,
		`{"predicate":{"op":"containsAny","attribute":"tags","value":["a","z"]}}`, `{"where":{"o.p":1}}`,
		`{"predicate":{"op":"in","attribute":"age","value":[1,2,3,4,5,6,7,8,9,10,30]}}`,
	} {
		q := parse(t, text)
		v := fromJSON(t, `{"name":"Alice","age":30,"tags":["a","b"],"city":"Berlin","owner":"alice","o":{"p":1}}`)
		if !q.Match("k1", v) {
			t.Errorf("%s does not match", text)
		}
		if n := testing.AllocsPerRun(100, func() { q.Match("k1", v) }); n != 0 {
			t.Errorf("%s allocates %v times", text, n)
		}
	}
	q, other := parse(t, `{"where":{"owner":"bob"},"sort":{"age":"desc"}}`), fromJSON(t, `{"name":"Alice","age":30,"owner":"alice"}`)
	live := query.NewLive(q, "m", 100)
	a, b := query.Row{Key: "a", Value: other}, query.Row{Key: "b", Value: other}
	if n := testing.AllocsPerRun(100, func() { q.Compare(a, b); live.Apply("k", other) }); n != 0 {
		t.Errorf("comparing, and applying a row that does not match, allocates %v times", n)
	}
}
