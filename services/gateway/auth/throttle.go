package auth

import (
	"container/list"
	"context"
	"net/netip"
	"sync"
	"time"
)

const (
	// freeFailures are not slowed: people paste wrong tokens.
	freeFailures = 5
	firstDelay   = 100 * time.Millisecond
	maxDelay     = 5 * time.Second
	// forgetAfter is how long an address must stay quiet to start anew.
	forgetAfter = time.Minute
	// maxAddresses bounds the table; above it the address that failed longest ago
	// is forgotten (RES-01).
	maxAddresses = 4096
)

type addressKey struct{}

// WithAddress gives ctx the address of the client that a token comes from, for the
// slowing down of addresses with many refused tokens.
func WithAddress(ctx context.Context, addr netip.Addr) context.Context {
	return context.WithValue(ctx, addressKey{}, addr)
}

// throttle slows the answers to addresses whose tokens are refused again and again.
type throttle struct {
	now    func() time.Time
	mu     sync.Mutex
	byAddr map[netip.Prefix]*list.Element
	order  *list.List // of *offender, the latest failure first
}

type offender struct {
	prefix   netip.Prefix
	failures int
	last     time.Time
}

func newThrottle(now func() time.Time) *throttle {
	return &throttle{now: now, byAddr: make(map[netip.Prefix]*list.Element), order: list.New()}
}

// wait counts a refused token of the address of ctx and waits as long as the
// answer is to be delayed, or until ctx ends.
func (t *throttle) wait(ctx context.Context) {
	addr, ok := ctx.Value(addressKey{}).(netip.Addr)
	if !ok || !addr.IsValid() {
		return
	}
	if delay := t.failed(addr); delay > 0 {
		sleep(ctx, delay)
	}
}

// failed counts a refused token and returns the delay of its answer.
func (t *throttle) failed(addr netip.Addr) time.Duration {
	prefix := network(addr)
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	element, ok := t.byAddr[prefix]
	if !ok {
		if t.order.Len() >= maxAddresses {
			oldest := t.order.Back()
			delete(t.byAddr, oldest.Value.(*offender).prefix)
			t.order.Remove(oldest)
		}
		element = t.order.PushFront(&offender{prefix: prefix})
		t.byAddr[prefix] = element
	}
	t.order.MoveToFront(element)
	o := element.Value.(*offender)
	if now.Sub(o.last) > forgetAfter {
		o.failures = 0
	}
	o.last = now
	o.failures++
	over := o.failures - freeFailures
	if over <= 0 {
		return 0
	}
	return min(firstDelay<<min(over-1, 10), maxDelay)
}

// network is what one attacker is likely to hold: an IPv4 address, or an IPv6 /64.
func network(addr netip.Addr) netip.Prefix {
	addr = addr.Unmap().WithZone("")
	bits := addr.BitLen()
	if addr.Is6() {
		bits = 64
	}
	prefix, _ := addr.Prefix(bits) // the length always fits
	return prefix
}
