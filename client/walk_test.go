package client

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/topgun-sync/topgun/core/merkle"
)

func TestEqualDataMovesNothing(t *testing.T) {
	s := newTestServer(t)
	var f frames
	c := open(t, s.wsURL(), "a", func(c *Config) { c.OnFrame = f.record })
	m := c.Map("m")
	for i := range 1000 {
		must(t, m.Set(fmt.Sprint(i), i))
	}
	must(t, c.Flush(within(t)))
	must(t, m.WaitSynced(within(t))) // the server has nothing left to read of this connection
	c.Offline()
	f.mu.Lock()
	f.sent, f.received = nil, nil
	f.mu.Unlock()
	c.Online()
	must(t, m.WaitSynced(within(t)))
	for _, msg := range f.received {
		switch msg.Type() {
		case "DEVICE_ACK", "SYNC_RESP_ROOT":
		default:
			t.Errorf("received %s", msg.Type())
		}
	}
	if n := f.countSent("MERKLE_REQ_BUCKET"); n != 0 {
		t.Errorf("%d bucket requests", n)
	}
}

func TestWalk(t *testing.T) {
	s := newTestServer(t)
	s.holdBuckets = 1 << 20 // answers wait for the goroutine below, so that requests gather
	for i := range 600 {
		s.putQuietly("m", fmt.Sprint(i), record(t, i, 1000, "other"))
	}
	go func() {
		for t.Context().Err() == nil {
			time.Sleep(5 * time.Millisecond) // how long decides how many gather, nothing else
			s.locked(s.release)
		}
	}()
	c := open(t, s.wsURL(), "a", func(c *Config) { c.Maps = []string{"m"} })
	m := c.Map("m")
	must(t, m.WaitSynced(within(t)))
	if m.Digest() != s.digest("m") {
		t.Fatal("content differs after the walk")
	}
	s.locked(func() {
		if s.mostBusy > maxInFlight || s.mostBusy < 2 {
			t.Errorf("at most %d requests at a time; want several, up to %d", s.mostBusy, maxInFlight)
		}
		seen := map[string]int{}
		for _, a := range s.asked {
			if seen[a.Path]++; seen[a.Path] > 1 && a.Path != "" {
				t.Errorf("path %q asked %d times", a.Path, seen[a.Path])
			}
		}
		if seen[""] != 2 {
			t.Errorf("root asked %d times; want once to begin and once as the proof", seen[""])
		}
	})
}

// A walk asks only for what differs, and ends although the client knows more.
func TestWalkAsksOnlyForDifferences(t *testing.T) {
	s := newTestServer(t)
	c := open(t, s.wsURL(), "a")
	m := c.Map("m")
	for i := range 1000 {
		must(t, m.Set(fmt.Sprint(i), i))
	}
	must(t, c.Flush(within(t)))
	must(t, m.WaitSynced(within(t))) // the server has nothing left to read of this connection
	c.Offline()
	s.putQuietly("m", "only here", record(t, "x", 1000, "other"))
	s.locked(func() {
		s.noAcks = true // what the client has more stays so
		s.asked = nil
	})
	c.Online()
	eventually(t, "the record arrives", func() bool { _, ok := m.Get("only here"); return ok })
	must(t, m.WaitSynced(within(t)))
	leaf := fmt.Sprintf("%08x", merkle.Hash("only here"))[:3]
	var paths []string
	s.locked(func() {
		for _, a := range s.asked {
			paths = append(paths, a.Path)
		}
	})
	if want := []string{"", leaf[:1], leaf[:2], leaf, ""}; !slices.Equal(paths, want) {
		t.Errorf("asked %q; want %q", paths, want)
	}
}

func TestLeafShortcutAndUnsolicitedRoot(t *testing.T) {
	s := newTestServer(t)
	s.leafFor = map[string]bool{"": true}
	for i := range 500 {
		s.putQuietly("m", fmt.Sprint(i), record(t, i, 1000, "other"))
	}
	c := open(t, s.wsURL(), "a")
	m := c.Map("m") // opened late: SYNC_INIT goes out all the same
	must(t, m.WaitSynced(within(t)))
	if m.Digest() != s.digest("m") {
		t.Fatal("content differs")
	}
	s.putQuietly("m", "late", record(t, 1, 1000, "other"))
	s.locked(func() {
		for session := range s.sessions {
			session.send(s.root("m"))
		}
	})
	eventually(t, "an announced root starts a walk", func() bool { _, ok := m.Get("late"); return ok })
}

func TestResetDropsTheMapButNotPendingWrites(t *testing.T) {
	s := newTestServer(t)
	c := open(t, s.wsURL(), "a")
	m := c.Map("m")
	must(t, m.Set("stale", 1))
	must(t, c.Flush(within(t)))
	must(t, m.WaitSynced(within(t))) // the server has nothing left to read of this connection
	c.Offline()
	s.locked(func() {
		s.maps["m"] = new(serverMap) // the server has forgotten the record and its tombstone
		s.reset = map[string]bool{"m": true}
		s.noAcks = true
	})
	must(t, m.Set("mine", 2))
	c.Online()
	eventually(t, "the stale record is dropped", func() bool { _, ok := m.Get("stale"); return !ok })
	if v, _ := m.Get("mine"); v != int64(2) || c.Pending() != 1 {
		t.Errorf("pending write: %v, %d pending", v, c.Pending())
	}
	must(t, m.WaitSynced(within(t)))
}
