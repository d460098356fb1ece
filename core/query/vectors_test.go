package query_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/topgun-sync/topgun/core/msgval"
	"github.com/topgun-sync/topgun/core/query"
)

func readVectors(t *testing.T, name string, into any) {
	t.Helper()
	b, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, into); err != nil {
		t.Fatal(err)
	}
}

// mapOf returns a msgpack map of the pairs given as name, value, name, value.
func mapOf(pairs ...any) []byte {
	b := msgval.AppendMapHeader(nil, len(pairs)/2)
	for i := 0; i < len(pairs); i += 2 {
		b = msgval.AppendString(b, pairs[i].(string))
		switch v := pairs[i+1].(type) {
		case []byte:
			b = append(b, v...)
		case string:
			b = msgval.AppendString(b, v)
		case int:
			b = msgval.AppendInt(b, int64(v))
		}
	}
	return b
}

// The groups of cases in which we differ from the TypeScript core, on purpose. The
// numbers are positions in predicate.json.
var predicateDifferences = []struct {
	reason string
	cases  []int
}{
	{"arrays and maps are equal by content, not by identity", []int{23, 24, 50, 51}},
	{"a name with dots is a path where no field has it", []int{25, 52}},
	{
		"no coercion between numbers, strings, bools and nil (PROTOCOL 13.2)",
		[]int{62, 64, 76, 83, 93, 95, 105, 106, 107, 109, 114, 116, 139, 146, 167, 168, 170, 171, 177, 178, 248, 254, 256, 258},
	},
	{"of a like pattern only % and _ have a meaning, * and ? are themselves", []int{208, 209, 210}},
	{"RE2 knows (?i)", []int{228}},
	{"contains, containsAll and containsAny look into arrays", []int{283, 294, 306, 307}},
	{"the core has no startsWith", []int{314}},
	{"what cannot be evaluated is an error, not false", []int{311, 312, 313, 316}},
	{"the length of a string and the index of an array are no fields", []int{383, 384}},
}

func TestVectorsPredicate(t *testing.T) {
	var v struct {
		BaseRecord json.RawMessage
		Cases      []struct {
			Predicate json.RawMessage
			Record    json.RawMessage
			Expected  any
		}
	}
	readVectors(t, "predicate.json", &v)
	if len(v.Cases) != 387 {
		t.Fatalf("%d cases, want 387", len(v.Cases))
	}
	differs := make(map[int]string)
	for _, d := range predicateDifferences {
		for _, i := range d.cases {
			differs[i] = d.reason
		}
	}
	for i, c := range v.Cases {
		record := v.BaseRecord
		if c.Record != nil {
			record = c.Record
		}
		got := evaluate(t, c.Predicate, record)
		agrees := got == c.Expected
		if e, ok := c.Expected.(string); ok && strings.HasPrefix(e, "throws") {
			agrees = got == query.BadQuery
		}
		if reason, ok := differs[i]; ok == agrees {
			t.Errorf("case %d: %s on %s: %v, want %v; listed as different: %v %q", i, c.Predicate, record, got, c.Expected, ok, reason)
		}
	}
}

// evaluate returns what a predicate makes of a record, or the name of the error.
func evaluate(t *testing.T, predicate, record json.RawMessage) any {
	t.Helper()
	q, err := query.Parse(mapOf("predicate", fromJSON(t, string(predicate))), nil)
	if err != nil {
		var e *query.Error
		if !errors.As(err, &e) {
			t.Fatalf("%v is no *query.Error", err)
		}
		return e.Name
	}
	again, err := query.Parse(q.Encode(), nil)
	if err != nil || !bytes.Equal(again.Canonical(), q.Canonical()) {
		t.Errorf("%s does not survive Encode: %v", predicate, err)
	}
	value := fromJSON(t, string(record))
	if again != nil && again.Match("k", value) != q.Match("k", value) {
		t.Errorf("%s matches otherwise after Encode", predicate)
	}
	return q.Match("k", value)
}

// What the builder functions of the client send is understood, or refused for the
// reason that it needs a full text index.
func TestVectorsBuilders(t *testing.T) {
	var v struct {
		Builders []struct {
			Call string
			Node json.RawMessage
		}
	}
	readVectors(t, "predicate.json", &v)
	for _, b := range v.Builders {
		_, err := query.Parse(mapOf("predicate", fromJSON(t, string(b.Node))), nil)
		if full := strings.Contains(b.Call, "atch"); full != (errorName(err) == query.NotSupported) || !full && err != nil {
			t.Errorf("%s: %v", b.Call, err)
		}
	}
}

func errorName(err error) string {
	var e *query.Error
	if errors.As(err, &e) {
		return e.Name
	}
	return ""
}

// The sorts of sort.json in which the order of the server is another than what the
// client displays. It sorts what it gets once more, so this shows in pages only.
var sortDifferences = map[string]string{
	"nulls, missing and mixed types compare as equal or coerce (JS < >)": "numbers come before strings, and those before nil and missing",
	"mixed desc": "the reverse of that",
}

func TestVectorsSort(t *testing.T) {
	var v struct {
		QueryHandle []struct {
			Name  string
			Rows  [][2]json.RawMessage
			Sort  json.RawMessage
			Limit json.RawMessage
			Order []string
		}
	}
	readVectors(t, "sort.json", &v)
	for _, c := range v.QueryHandle {
		q := msgval.AppendMapHeader(nil, 2)
		q = append(msgval.AppendString(q, "sort"), orNil(t, c.Sort)...)
		q = append(msgval.AppendString(q, "limit"), orNil(t, c.Limit)...)
		parsed, err := query.Parse(q, nil)
		if err != nil {
			t.Errorf("%s: %v", c.Name, err)
			continue
		}
		limit := parsed.Limit()
		if limit == 0 {
			limit = len(c.Rows)
		}
		top := query.NewTop(parsed, nil, limit, 0)
		for _, r := range c.Rows {
			key, err := strconv.Unquote(string(r[0]))
			if err != nil {
				t.Fatal(err)
			}
			top.Add(key, fromJSON(t, string(r[1])))
		}
		var order []string
		rows, _ := top.Rows()
		for _, r := range rows {
			order = append(order, r.Key)
		}
		if reason, ok := sortDifferences[c.Name]; slices.Equal(order, c.Order) == ok {
			t.Errorf("%s: %v, want %v; listed as different: %v %s", c.Name, order, c.Order, ok, reason)
		}
	}
}

func orNil(t *testing.T, text json.RawMessage) []byte {
	t.Helper()
	if text == nil {
		return []byte{0xc0}
	}
	return fromJSON(t, string(text))
}

// Comparisons of two values of the same type are those of JavaScript.
func TestVectorsRelational(t *testing.T) {
	var v struct {
		JSRelational [][4]json.RawMessage
	}
	readVectors(t, "sort.json", &v)
	compared := 0
	for _, c := range v.JSRelational {
		a, b := fromJSON(t, string(c[0])), fromJSON(t, string(c[1]))
		sameType := false
		for _, class := range []string{`"`, "0123456789-", "tf"} {
			sameType = sameType || strings.ContainsAny(string(c[0][:1]), class) && strings.ContainsAny(string(c[1][:1]), class)
		}
		for i, op := range []string{"lt", "gt"} {
			q, err := query.Parse(mapOf("predicate", mapOf("op", op, "attribute", "v", "value", b)), nil)
			if err != nil {
				t.Fatal(err)
			}
			want := sameType && string(c[2+i]) == "true"
			if got := q.Match("k", mapOf("v", a)); got != want {
				t.Errorf("%s %s %s: %v, want %v", c[0], op, c[1], got, want)
			}
			compared++
		}
	}
	if compared != 420 {
		t.Errorf("%d comparisons, want 420", compared)
	}
}
