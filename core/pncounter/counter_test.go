package pncounter_test

import (
	"encoding/json"
	"math"
	"os"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/topgun-sync/topgun/core/msgval"
	"github.com/topgun-sync/topgun/core/pncounter"
)

type state struct {
	Positive, Negative map[string]float64
}

// whole reports whether all sums are integers, as they are here. The client does not
// enforce it, and one vector has others.
func (s state) whole() bool {
	for _, side := range []map[string]float64{s.Positive, s.Negative} {
		for _, n := range side {
			if n != math.Trunc(n) {
				return false
			}
		}
	}
	return true
}

func (s state) into(c *pncounter.Counter) {
	for id, n := range s.Positive {
		c.Merge(id, pncounter.Sides{Positive: uint64(n)})
	}
	for id, n := range s.Negative {
		c.Merge(id, pncounter.Sides{Negative: uint64(n)})
	}
}

func stateOf(c *pncounter.Counter) state {
	s := state{map[string]float64{}, map[string]float64{}}
	for id, sides := range c.All() {
		if sides.Positive > 0 {
			s.Positive[id] = float64(sides.Positive)
		}
		if sides.Negative > 0 {
			s.Negative[id] = float64(sides.Negative)
		}
	}
	return s
}

func TestVectors(t *testing.T) {
	data, err := os.ReadFile("testdata/pncounter.json")
	if err != nil {
		t.Fatal(err)
	}
	var v struct {
		Merge []struct {
			Local, Remote, Merged state
			ValueBefore, Value    float64
		}
		Operations []struct {
			Delta, Value int64
			State        state
		}
	}
	if err := json.Unmarshal(data, &v); err != nil {
		t.Fatal(err)
	}
	if len(v.Merge) == 0 || len(v.Operations) == 0 {
		t.Fatal("the vectors are not what this test reads")
	}
	fractions := 0
	for i, m := range v.Merge {
		if !m.Local.whole() {
			fractions++
			continue
		}
		var c pncounter.Counter
		m.Local.into(&c)
		before := c.Value()
		m.Remote.into(&c)
		if before != int64(m.ValueBefore) || c.Value() != int64(m.Value) {
			t.Errorf("case %d: %d, then %d", i, before, c.Value())
		}
		if diff := cmp.Diff(m.Merged, stateOf(&c)); diff != "" {
			t.Errorf("case %d (-want +got):\n%s", i, diff)
		}
	}
	if fractions != 1 {
		t.Errorf("%d vectors with fractions left out, want 1", fractions)
	}
	var c pncounter.Counter
	for i, o := range v.Operations {
		c.Add("me", o.Delta)
		if diff := cmp.Diff(o.State, stateOf(&c)); diff != "" || c.Value() != o.Value {
			t.Errorf("operation %d: %d (-want +got):\n%s", i, c.Value(), diff)
		}
	}
}

// CRDT-04: replicas merge to the same, in any order and however often.
func TestMergeLaws(t *testing.T) {
	type report struct {
		node  string
		sides pncounter.Sides
	}
	rapid.Check(t, func(t *rapid.T) {
		reports := rapid.SliceOf(rapid.Custom(func(t *rapid.T) report {
			return report{rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "node"), pncounter.Sides{
				Positive: rapid.Uint64Range(0, 9).Draw(t, "positive"), Negative: rapid.Uint64Range(0, 9).Draw(t, "negative"),
			}}
		})).Draw(t, "reports")
		build := func(reports []report) *pncounter.Counter {
			c := new(pncounter.Counter)
			for _, r := range reports {
				c.Merge(r.node, r.sides)
			}
			return c
		}
		want := build(reports)
		got := build(rapid.Permutation(slices.Concat(reports, reports)).Draw(t, "order"))
		if !cmp.Equal(stateOf(want), stateOf(got)) || want.Value() != got.Value() {
			t.Fatal("the order matters")
		}
		for _, r := range reports {
			if want.Merge(r.node, r.sides) != pncounter.Duplicate {
				t.Fatal("not idempotent")
			}
		}
	})
}

func TestBounds(t *testing.T) {
	var c pncounter.Counter
	const most = pncounter.MaxSum
	for i, step := range []struct {
		node  string
		sides pncounter.Sides
		want  pncounter.Outcome
	}{
		{"a", pncounter.Sides{Positive: most + 1}, pncounter.TooLarge},
		{"a", pncounter.Sides{Positive: math.MaxUint64, Negative: math.MaxUint64}, pncounter.TooLarge},
		{"a", pncounter.Sides{Positive: most - 1, Negative: most}, pncounter.Applied},
		{"b", pncounter.Sides{Positive: 2}, pncounter.TooLarge},
		{"b", pncounter.Sides{Positive: 1}, pncounter.Applied},
		{"b", pncounter.Sides{Negative: 1}, pncounter.TooLarge},
		{"c", pncounter.Sides{}, pncounter.Duplicate},
		{"a", pncounter.Sides{Positive: most}, pncounter.TooLarge},
	} {
		if got := c.Merge(step.node, step.sides); got != step.want {
			t.Errorf("step %d: %d, want %d", i, got, step.want)
		}
	}
	if c.Value() != 0 || c.Len() != 2 {
		t.Errorf("the counter is %d of %d nodes", c.Value(), c.Len())
	}
	if _, ok := c.Get("c"); ok {
		t.Error("a node without anything is there")
	}
	if c.Add("a", math.MinInt64) != pncounter.TooLarge || c.Add("a", math.MaxInt64) != pncounter.TooLarge {
		t.Error("too much was added")
	}
	var many pncounter.Counter
	for i := range pncounter.MaxNodes {
		many.Add(string(rune(0x4e00+i)), -1)
	}
	if many.Add("one more", 1) != pncounter.TooManyNodes || many.Add(string(rune(0x4e00)), 1) != pncounter.Applied || many.Value() != 1-pncounter.MaxNodes {
		t.Errorf("the value is %d", many.Value())
	}
}

func TestSides(t *testing.T) {
	s := pncounter.Sides{Positive: 1 << 53, Negative: 7}
	if got, ok := pncounter.ParseSides(s.Append(nil)); !ok || got != s {
		t.Errorf("read %v, wrote %v", got, s)
	}
	for _, bad := range [][]byte{nil, {0x92}, {0x92, 1}, {0x92, 1, 2, 3}, {0x91, 1}, {0x93, 1, 2, 3}, {0x92, 1, 0xff}, {0x92, 1, 0xcb}, msgval.AppendString(nil, "x")} {
		if _, ok := pncounter.ParseSides(bad); ok {
			t.Errorf("ParseSides accepts %x", bad)
		}
	}
}
