package commitlog

import (
	"testing"
	"time"
)

// TestExpired appends commits whose sizes differ much, so that a cut by bytes is not
// one by number.
func TestExpired(t *testing.T) {
	l := open(t, connect(t), testConfig())
	want := func(what string, before time.Time, keep int64, want uint64) {
		t.Helper()
		got, err := l.Expired(t.Context(), before, keep)
		if err != nil || got != want {
			t.Errorf("%s: expired below %d, %v; want %d", what, got, err, want)
		}
	}
	long, all := time.Now().Add(-time.Hour), int64(1<<30)
	want("an empty log", time.Now(), 0, 0)
	a, b := openLane(t, l, "a"), openLane(t, l, "b")
	appendTo(t, a, claimCommit())
	for range 10 {
		appendTo(t, a, changes("k", 100_000)) // 2 to 11
	}
	appendTo(t, b, claimCommit()) // 12
	for range 50 {
		appendTo(t, b, changes("k", 1000)) // 13 to 62
	}
	want("nothing", long, all, 1)
	want("all but the last, by age", time.Now().Add(time.Hour), all, 62)
	want("all but the last, by size", long, 0, 62)
	want("a few large ones", long, 800_000, 4)
	// A commit of 1,000 bytes takes some 1,180 in the stream.
	want("some small ones", long, 30_000, 37)
	// The bound is exact: what is counted is what the stream says it takes.
	last, err := l.stream.GetMsg(t.Context(), 62)
	if err != nil {
		t.Fatal(err)
	}
	size := int64(len(last.Subject) + messageBytes + len(last.Data))
	for key := range last.Header {
		size += int64(len(key) + len(last.Header.Get(key)) + 4)
	}
	want("all but the last, to the byte", long, size, 62)
	want("all but two, by one byte", long, size+1, 61)

	if err := l.Trim(t.Context(), "a", 12); err != nil {
		t.Fatal(err)
	}
	// Lane a's last commit stays, and is looked at again.
	want("after a trim", long, 100_000, 11)
	want("after a trim, by size", long, 30_000, 37)
	middle, err := l.stream.GetMsg(t.Context(), 40)
	if err != nil {
		t.Fatal(err)
	}
	want("by age", middle.Time, all, 40)
}

// TestExpiredLeavesRoom asks to keep more than the log holds.
func TestExpiredLeavesRoom(t *testing.T) {
	config := testConfig()
	config.MaxBytes = 4 << 20
	l := open(t, connect(t), config)
	a := openLane(t, l, "a")
	for range 30 {
		appendTo(t, a, changes("k", 100_000))
	}
	got, err := l.Expired(t.Context(), time.Now().Add(-time.Hour), 1<<40)
	if err != nil || got < 20 || got > 22 {
		t.Errorf("3 MB of a log of 4 MiB expired below %d, %v; want 21", got, err)
	}
}
