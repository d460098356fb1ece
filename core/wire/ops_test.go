package wire_test

import (
	"testing"

	"github.com/topgun-sync/topgun/core/wire"
)

// An id that is an integer is taken as its text: the batch holds other ops.
func TestIntegerIDs(t *testing.T) {
	m, err := wire.DecodeClient(batch(opWith("id", 17), opWith("id", float64(1<<40))), wire.DefaultLimits())
	if err != nil {
		t.Fatal(err)
	}
	ops := m.(*wire.OpBatch).Ops
	if len(ops) != 2 || ops[0].ID != "17" || ops[1].ID != "1099511627776" || ops[0].Err != nil {
		t.Errorf("got %+v", ops)
	}
}
