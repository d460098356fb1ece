package main

import (
	"strings"
	"testing"
)

func TestResults(t *testing.T) {
	t.Parallel()
	var r results
	for _, v := range []float64{3, 1, 2} {
		r.add("write", "acked", "ops/s", v*1000)
		r.add("write", "p99", "ms", v/100)
	}
	r.add("sync", "time", "s", 0)
	if got := r.rows[0]; got.Median != 2000 || got.Least != 1000 || got.Most != 3000 {
		t.Errorf("got %+v, want median 2000 of 1000 to 3000", got)
	}
	var out strings.Builder
	if err := r.write(&out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"[1000 – 3000]", "[0.0100 – 0.0300]", "[0 – 0]"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the table has no %q:\n%s", want, out.String())
		}
	}
	if n := strings.Count(out.String(), "write"); n != 1 {
		t.Errorf("the scenario stands there %d times, want once:\n%s", n, out.String())
	}
}

func TestQuantile(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		values  []float64
		q, want float64
	}{
		{nil, 0.5, 0},
		{[]float64{7}, 0.99, 7},
		{[]float64{4, 1, 3, 2}, 0.5, 2},
		{[]float64{4, 1, 3, 2}, 1, 4},
	} {
		if got := quantile(c.values, c.q); got != c.want {
			t.Errorf("quantile(%v, %v) = %v, want %v", c.values, c.q, got, c.want)
		}
	}
}
