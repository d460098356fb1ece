package line

import (
	"bytes"
	"math"
	"strings"
	"testing"

	"github.com/topgun-sync/topgun/core/msgval"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

func change(value []byte) *typesv1.Change {
	return &typesv1.Change{
		Map: "todos", Key: []byte("k<ä"), Tag: "t&1", Kind: typesv1.Kind_KIND_OR,
		Record: &typesv1.Record{Value: value, Timestamp: &typesv1.Timestamp{Millis: 1 << 53, Counter: 7, NodeId: "n"}, TtlMillis: 5},
	}
}

func TestWhatIsWrittenReadsBackEqual(t *testing.T) {
	for name, value := range map[string][]byte{
		"a tombstone":     nil,
		"null":            msgval.AppendNil(nil),
		"a large integer": msgval.AppendUint(nil, math.MaxUint64),
		"a fraction":      msgval.AppendFloat(nil, 0.1),
		"HTML":            msgval.AppendString(nil, "<a href='&'> \x00 \u2028"),
		"an empty map":    msgval.AppendMapHeader(nil, 0),
		"bytes":           msgval.AppendBin(nil, []byte{0, 255}),
		"NaN":             msgval.AppendFloat(nil, math.NaN()),
		"bad UTF-8":       msgval.AppendString(nil, "\xff"),
		"a whole float":   msgval.AppendFloat(nil, 3),
		"minus zero":      msgval.AppendFloat(nil, math.Copysign(0, -1)),
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			if err := Append(&out, Of(change(value))); err != nil {
				t.Fatal(err)
			}
			if strings.Contains(out.String(), `\u003c`) {
				t.Errorf("escaped for HTML: %s", &out)
			}
			op, err := Parse(out.Bytes())
			if err != nil {
				t.Fatalf("%s: %v", &out, err)
			}
			got := op.GetRecord().GetValue()
			if len(value) == 0 != (len(got) == 0) || len(value) > 0 && !msgval.Equal(got, value) {
				t.Errorf("%s: value %x, want %x", &out, got, value)
			}
			if op.GetMap() != "todos" || string(op.GetKey()) != "k<ä" || op.GetTag() != "t&1" || op.GetKind() != typesv1.Kind_KIND_OR ||
				StampOf(op.GetRecord().GetTimestamp()).String() != "9007199254740992:7:n" || op.GetRecord().GetTtlMillis() != 5 {
				t.Errorf("%v", op)
			}
		})
	}
}

func TestALineThatIsWrongSaysWhatWouldBeRight(t *testing.T) {
	for text, want := range map[string]string{
		`{"map":"m"`: "want one JSON object",
		`[]`:         "want one JSON object",
		`{"map":"m","kind":"lww","key":"k","value":1,"ttl":5}`:                 `unknown field "ttl"`,
		`{"map":"m","kind":"lww","key":"k","value":1} {}`:                      "on a line",
		`{"map":"m","kind":"LWW","key":"k","value":1}`:                         "kind must be",
		`{"map":"m","kind":"lww","key":"k"}`:                                   "exactly one of",
		`{"map":"m","kind":"lww","key":"k","value":1,"deleted":true}`:          "exactly one of",
		`{"map":"m","kind":"lww","key":"k","value":1e999}`:                     "value",
		`{"map":"m","kind":"lww","key":"k","value":1,"stamp":{"millis":-1}}`:   "millis",
		`{"map":"m","kind":"lww","key":"k","value":1,"stamp":{"millis":"12"}}`: "millis",
	} {
		if op, err := Parse([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, %v; want %q", text, op, err, want)
		}
	}
}
