package query_test

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"math/big"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/topgun-sync/topgun/core/msgval"
	"github.com/topgun-sync/topgun/core/query"
)

func TestGroups(t *testing.T) {
	for _, c := range []struct {
		query string
		want  []string
	}{
		{
			`{"groupBy":["city"],"aggregations":[{"func":"sum","field":"n"},{"func":"count"},{"func":"min","field":"n"},{"func":"max","field":"n"},{"func":"avg","field":"n"}]}`,
			[]string{
				`1: {"city":1,"__key":"1","__count":2,"__sum_n":0.75,"__min_n":-0.5,"__max_n":1.25,"__avg_n":0.375}`,
				`Berlin: {"city":"Berlin","__key":"Berlin","__count":2,"__sum_n":3,"__min_n":1,"__max_n":2,"__avg_n":1.5}`,
				`Rome: {"city":"Rome","__key":"Rome","__count":1,"__sum_n":null,"__min_n":null,"__max_n":null,"__avg_n":null}`,
				`null: {"city":null,"__key":"null","__count":2,"__sum_n":5,"__min_n":5,"__max_n":5,"__avg_n":5}`,
			},
		},
		{`{"groupBy":["city","t"],"sort":{"__count":"desc"},"limit":1,"offset":3}`, []string{`Rome,true: {"city":"Rome","t":true,"__key":"Rome,true","__count":1}`}},
		{`{"aggregations":[{"func":"sum","field":"n"}],"where":{"city":"Berlin"}}`, []string{`: {"__key":"","__count":2,"__sum_n":3}`}},
		{`{"aggregations":[{"func":"sum","field":"n"}],"where":{"city":"Oslo"}}`, nil},
		{`{"groupBy":["_key"],"where":{"city":"Rome"}}`, []string{`"3": {"_key":"3","__key":"\"3\"","__count":1}`}},
		{`{"groupBy":["o.k"],"aggregations":[{"func":"max","field":"o.v"}],"where":{"city":"Rome"}}`, []string{`x: {"o.k":"x","__key":"x","__count":1,"__max_o.v":7}`}},
	} {
		q := parse(t, c.query)
		groups := query.NewGroups(q)
		for i, text := range []string{
			`{"city":"Berlin","n":1}`, `{"city":"Berlin","n":2.0}`, `{"city":"Rome","n":"3","t":true,"o":{"k":"x","v":7}}`,
			`{"city":1,"n":1.25}`, `{"city":1.0,"n":-0.5}`, `{"n":5}`, `{"city":null}`,
		} {
			if key, value := fmt.Sprint(i+1), fromJSON(t, text); q.Match(key, value) {
				if err := groups.Add(key, value); err != nil {
					t.Fatal(err)
				}
			}
		}
		var got []string
		rows, _ := groups.Rows(nil)
		for _, r := range rows {
			text, ok := msgval.AppendJSON(nil, r.Value)
			got = append(got, fmt.Sprintf("%s: %s", r.Key, text))
			if !ok {
				t.Errorf("%s: group %x is no JSON", c.query, r.Value)
			}
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s:\n%s\nwant\n%s", c.query, got, c.want)
		}
	}
}

// Sums are exact, whatever the order of the rows and however they are distributed
// over partial results.
func TestAggregatesAreExact(t *testing.T) {
	q := parse(t, `{"aggregations":[{"func":"sum","field":"n"},{"func":"avg","field":"n"},{"func":"min","field":"n"},{"func":"max","field":"n"}]}`)
	rapid.Check(t, func(t *rapid.T) {
		parts := []*query.Groups{query.NewGroups(q), query.NewGroups(q), query.NewGroups(q)}
		live := query.NewLive(q, "m", 1000)
		sum, floats, n, infinite := new(big.Float).SetPrec(4000), false, 0, 0.0
		for i, v := range rapid.SliceOfN(rapid.SampledFrom(numbers), 0, 30).Draw(t, "numbers") {
			if f, ok := exactly(v); ok {
				n++
				switch {
				case math.Abs(asFloat(f)) > 0x1p1000:
					infinite += math.Copysign(math.Inf(1), asFloat(f))
				case f.IsInf():
				default:
					sum.Add(sum, f)
				}
				floats = floats || !f.IsInt() || asFloat(f) >= 1<<64 || asFloat(f) < -1<<63
			}
			row := mapOf("n", v)
			if err := parts[rapid.IntRange(0, 2).Draw(t, "part")].Add("k", row); err != nil {
				t.Fatal(err)
			}
			live.Apply(fmt.Sprint(i), row)
		}
		whole := query.NewGroups(q)
		for _, p := range parts {
			for _, r := range p.Partials() {
				if err := whole.Merge(r); err != nil {
					t.Fatal(err)
				}
			}
		}
		rows, _ := whole.Rows(nil)
		shown, _, _ := live.Window()
		if len(rows) != len(shown) || len(rows) == 1 && !bytes.Equal(rows[0].Value, shown[0].Value) {
			t.Fatalf("merged %q, live %q", rows, shown)
		}
		if n == 0 {
			return
		}
		got, _ := query.EqualityValue(rows[0].Value, "__sum_n")
		want := asFloat(sum)
		if infinite != 0 {
			want = infinite
		}
		if i, accuracy := sum.Int(nil); !floats && accuracy == big.Exact && (i.IsInt64() || i.IsUint64()) {
			if x, ok := exactly(got); !ok || x.Cmp(sum) != 0 {
				t.Fatalf("sum %x, want %v", got, i)
			}
		} else if x, ok := exactly(got); infinite == infinite && (!ok || asFloat(x) != want) {
			t.Fatalf("sum %x, want %v", got, want)
		}
	})
}

func asFloat(f *big.Float) float64 {
	x, _ := f.Float64()
	return x
}

// A sum half way between two floats is rounded to the side of what is left.
func TestSumsAreRoundedOnce(t *testing.T) {
	for _, tiny := range []float64{math.SmallestNonzeroFloat64, -math.SmallestNonzeroFloat64} {
		groups := query.NewGroups(parse(t, `{"aggregations":[{"func":"sum","field":"n"}]}`))
		for _, v := range [][]byte{msgval.AppendUint(nil, 1<<53), {1}, msgval.AppendFloat(nil, tiny)} {
			if err := groups.Add("k", mapOf("n", v)); err != nil {
				t.Fatal(err)
			}
		}
		want := float64(1 << 53)
		if tiny > 0 {
			want += 2
		}
		rows, _ := groups.Rows(nil)
		if !bytes.HasSuffix(rows[0].Value, msgval.AppendFloat(nil, want)) {
			t.Errorf("2^53 + 1 + %v: %x, want %v", tiny, rows[0].Value, want)
		}
	}
}

func TestGroupsAreBounded(t *testing.T) {
	q := parse(t, `{"groupBy":["n"]}`)
	groups, other := query.NewGroups(q), query.NewGroups(q)
	for i := range query.MaxGroups {
		if err := groups.Add("k", mapOf("n", i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := groups.Add("k", mapOf("n", 5)); err != nil {
		t.Errorf("a group that is there: %v", err)
	}
	if err := groups.Add("k", mapOf("n", -1)); !errors.Is(err, query.ErrTooManyGroups) {
		t.Errorf("one group more: %v", err)
	}
	if err := other.Add("k", mapOf("n", -1)); err != nil {
		t.Fatal(err)
	}
	if err := groups.Merge(other.Partials()[0]); !errors.Is(err, query.ErrTooManyGroups) {
		t.Errorf("one group more by merging: %v", err)
	}
}

// The key of a group is short and tells groups apart, whatever they are of.
func TestGroupKeys(t *testing.T) {
	q := parse(t, `{"groupBy":["a","b"]}`)
	rapid.Check(t, func(t *rapid.T) {
		x := [2][]byte{values.Draw(t, "a"), values.Draw(t, "b")}
		y := [2][]byte{values.Draw(t, "a"), values.Draw(t, "b")}
		groups := query.NewGroups(q)
		for _, v := range [][2][]byte{x, y} {
			if err := groups.Add("k", mapOf("a", v[0], "b", v[1])); err != nil {
				t.Fatal(err)
			}
		}
		same := true
		for i := range x {
			// NaN is equal to nothing, and yet one group.
			same = same && (bytes.Equal(msgval.Canonical(nil, x[i]), msgval.Canonical(nil, y[i])) || rank(x[i]) == 1 && rank(y[i]) == 1 && naive(x[i], y[i]) == 0)
		}
		rows, _ := groups.Rows(nil)
		if (len(rows) == 1) != same {
			t.Fatalf("%x and %x make %d groups", x, y, len(rows))
		}
	})
	groups := query.NewGroups(q)
	if err := groups.Add("k", mapOf("a", string(make([]byte, 10_000)), "b", 1)); err != nil {
		t.Fatal(err)
	}
	if rows, _ := groups.Rows(nil); len(rows[0].Key) != 65 {
		t.Errorf("a key of %d bytes", len(rows[0].Key))
	}
}

func TestMergeRefusesOtherBytes(t *testing.T) {
	q := parse(t, `{"groupBy":["g"],"aggregations":[{"func":"sum","field":"n"}]}`)
	groups := query.NewGroups(q)
	if err := groups.Add("k", fromJSON(t, `{"g":1,"n":2.5}`)); err != nil {
		t.Fatal(err)
	}
	good := groups.Partials()[0]
	for _, text := range []string{
		`null`, `[]`, `[[1],1]`, `[[1],1,[]]`, `[[],1,[[1,0,2,0,0,0,[],1,1]]]`, `[[1],-1,[[1,0,2,0,0,0,[],1,1]]]`,
		`[[1],1,[[1,0,2,0,0,0,[],null,1]]]`, `[[1],1,[[1,0,2,0,0,0,["x"],1,1]]]`, `[[1],1,[[1,0,2,0,0,0,[],"1",1]]]`, `[[1],1,[[1,0,2,0,0,0,[],1,1,1]]]`,
	} {
		if err := groups.Merge(query.Row{Key: good.Key, Value: fromJSON(t, text)}); !errors.Is(err, query.ErrPartial) {
			t.Errorf("%s: %v", text, err)
		}
	}
	for n := range good.Value {
		if err := groups.Merge(query.Row{Key: good.Key, Value: good.Value[:n]}); !errors.Is(err, query.ErrPartial) {
			t.Errorf("%d of %d bytes: %v", n, len(good.Value), err)
		}
	}
	if rows, _ := groups.Rows(nil); len(rows) != 1 || !bytes.Equal(rows[0].Value, mapOf("g", 1, "__key", "1", "__count", 1, "__sum_n", msgval.AppendFloat(nil, 2.5))) {
		t.Errorf("what was refused has changed the groups: %q", rows)
	}
}

// Groups that differ have keys that differ.
func TestGroupKeysAreDistinct(t *testing.T) {
	t.Parallel()
	q := parse(t, `{"groupBy":["a","b"]}`)
	values := []string{`null`, `true`, `1`, `"1"`, `"true"`, `"null"`, `"x"`, `"x,y"`, `"y"`, `""`, `"\"x\""`, `"#"`, `["x"]`, `"[\"x\"]"`}
	groups := query.NewGroups(q)
	for _, a := range values {
		for _, b := range values {
			if err := groups.Add("k", fromJSON(t, `{"a":`+a+`,"b":`+b+`}`)); err != nil {
				t.Fatal(err)
			}
		}
	}
	keys := make(map[string]bool)
	rows, _ := groups.Rows(nil)
	for _, row := range rows {
		keys[row.Key] = true
	}
	if want := len(values) * len(values); len(rows) != want || len(keys) != want {
		t.Errorf("%d groups with %d keys; want %d", len(rows), len(keys), want)
	}
}
