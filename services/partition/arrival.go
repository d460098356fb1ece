package partition

import (
	"cmp"
	"sync"
	"time"
)

// arrival is when a change was taken in. It never decides who wins; it decides what
// a position has seen (ARCHITECTURE 2).
type arrival struct {
	millis, counter uint64
}

func (a arrival) compare(b arrival) int {
	if c := cmp.Compare(a.millis, b.millis); c != 0 {
		return c
	}
	return cmp.Compare(a.counter, b.counter)
}

func latest(a, b arrival) arrival {
	if a.compare(b) < 0 {
		return b
	}
	return a
}

func earliest(a, b arrival) arrival {
	if b.compare(a) < 0 {
		return b
	}
	return a
}

// ceilingLead is how far above the wall clock a commit's clock ceiling lies: how
// long an idle shard can go on handing out the time as a position without a commit.
const ceilingLead = 5 * time.Second

// arrivalClock gives arrivals to all shards of the process, each once and in rising
// order. One clock for all makes its reading a cut: whatever any shard takes in
// later arrives above it. It may be used concurrently.
type arrivalClock struct {
	mu   sync.Mutex
	last arrival
}

// next gives out an arrival. wall is the wall clock's reading in milliseconds.
func (c *arrivalClock) next(wall uint64) arrival {
	c.mu.Lock()
	defer c.mu.Unlock()
	if wall > c.last.millis {
		c.last = arrival{millis: wall}
	} else {
		c.last.counter++
	}
	return c.last
}

// read returns a position above every arrival given out before and below every one
// given out later.
func (c *arrivalClock) read(wall uint64) arrival {
	c.mu.Lock()
	defer c.mu.Unlock()
	if wall > c.last.millis {
		c.last = arrival{millis: wall}
	}
	return c.last
}

// raise makes every later arrival greater than a.
func (c *arrivalClock) raise(a arrival) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.last = latest(c.last, a)
}

// wallMillis is a time in milliseconds; one before 1970 is 0.
func wallMillis(t time.Time) uint64 { return uint64(max(t.UnixMilli(), 0)) }
