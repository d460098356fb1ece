package main

import (
	"strings"
	"testing"
	"testing/fstest"
)

func TestRun(t *testing.T) {
	t.Parallel()
	const (
		head = "# Invariants\n\nNAKED entries allowed: 1\n\n| id | statement | code | tests | status |\n| --- | --- | --- | --- | --- |\n"
		good = "| ACK-01 | An ack is true. | `a/lane.go` | `TestAck`, `TestAck/sub` | held |\n"
	)
	for _, c := range []struct {
		name, text string
		// want is part of the error; empty means that the catalogue is right.
		want string
	}{
		{"right", head + good + "| ACK-02 | Two. | `a/lane.go` | | NAKED |\n| OWN-01 | Three. | | | later |\n", ""},
		{"missing test", head + "| ACK-01 | One. | `a/lane.go` | `TestGone` | held |\n", "cites TestGone"},
		{"test in a comment only", head + "| ACK-01 | One. | `a/lane.go` | `TestCommented` | held |\n", "cites TestCommented"},
		{"missing file", head + "| ACK-01 | One. | `a/gone.go` | `TestAck` | held |\n", "names a/gone.go"},
		{"held without a test", head + "| ACK-01 | One. | `a/lane.go` | | held |\n", "cites no test"},
		{"held without code", head + "| ACK-01 | One. | | `TestAck` | held |\n", "names no code"},
		{"too many naked", head + "| ACK-01 | One. | | | NAKED |\n| ACK-02 | Two. | | | NAKED |\n", "2 entries are NAKED, 1 are allowed"},
		{"twice", head + good + good, "twice"},
		{"unknown status", head + "| ACK-01 | One. | | | soon |\n", `status "soon"`},
		{"a cell too few", head + "| ACK-01 | One. | `TestAck` | held |\n", "4 cells"},
		{"no allowance", good, "NAKED entries allowed"},
		{"no entries", head, "no entries"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			_, err := run(fstest.MapFS{
				"README.md":      {Data: []byte("It holds: `TestAck/sub`.\n")},
				"INVARIANTS.md":  {Data: []byte(c.text)},
				"a/lane.go":      {Data: []byte("package a\n")},
				"a/lane_test.go": {Data: []byte("package a\n\nfunc TestAck() {}\n\n// func TestCommented() {}\n")},
			})
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want an error with %q", err, c.want)
			}
		})
	}
}

func TestRunReadsTheReadme(t *testing.T) {
	t.Parallel()
	_, err := run(fstest.MapFS{
		"README.md":      {Data: []byte("It holds: `TestGone`.\n")},
		"INVARIANTS.md":  {Data: []byte("NAKED entries allowed: 1\n| ACK-01 | One. | | | NAKED |\n")},
		"a/lane_test.go": {Data: []byte("package a\n")},
	})
	if err == nil || !strings.Contains(err.Error(), "README.md cites TestGone") {
		t.Errorf("got %v, want that README.md cites TestGone", err)
	}
}
