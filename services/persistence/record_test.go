package persistence

import (
	"testing"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/msgval"
)

// Postgres' jsonb refuses a NUL; what merely looks like its escape is kept.
func TestValueJSONHoldsNoNUL(t *testing.T) {
	for text, want := range map[string]bool{
		"plain": true, "\x00": false, "a\x00b": false, `\u0000`: true, `\\u0000`: true, "\\\x00": false, `\`: true, "\x01\\": true,
	} {
		record := Record{State: lwwmap.Record{Value: msgval.AppendString(nil, text), Timestamp: hlc.Timestamp{Millis: 1, NodeID: "a"}}}
		if got, ok := record.ValueJSON(nil); ok != want {
			t.Errorf("%q: %s, %t", text, got, ok)
		}
	}
}
