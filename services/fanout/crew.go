package fanout

import (
	"context"
	"sync"
)

// crew owns the goroutines that work for live queries: one for each map that has
// something to evaluate at the moment, and a bounded number that read maps.
type crew struct {
	mu     sync.Mutex
	open   bool
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	// readers counts the goroutines that read, at most maxReaders; waiting is what they
	// do next, at most one entry for each map.
	readers, maxReaders int
	waiting             []func(context.Context)
}

func (c *crew) start(ctx context.Context, maxReaders int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ctx, c.cancel = context.WithCancel(ctx)
	c.open, c.maxReaders = true, maxReaders
}

// stop ends the work and waits for all of it. What waits is not done.
func (c *crew) stop() {
	c.mu.Lock()
	c.open, c.waiting = false, nil
	c.cancel()
	c.mu.Unlock()
	c.wg.Wait()
}

// run does work in a goroutine of its own, or not at all after stop. Work must end
// soon after its context.
func (c *crew) run(work func(context.Context)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open {
		c.wg.Go(func() { work(c.ctx) })
	}
}

// read is run for reads: first come, first served.
func (c *crew) read(read func(context.Context)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case !c.open:
	case c.readers < c.maxReaders:
		c.readers++
		c.wg.Go(func() {
			for next := read; next != nil; next = c.nextRead() {
				next(c.ctx)
			}
		})
	default:
		c.waiting = append(c.waiting, read)
	}
}

// nextRead returns what a reader does next; with nil it has to end.
func (c *crew) nextRead() func(context.Context) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.waiting) == 0 {
		c.readers--
		c.waiting = nil
		return nil
	}
	next := c.waiting[0]
	c.waiting[0] = nil
	c.waiting = c.waiting[1:]
	return next
}
