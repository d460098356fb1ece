package gateway

import (
	"context"
	"errors"
	"sync"
	"time"

	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	"github.com/topgun-sync/topgun/gen/go/topgun/partition/v1/partitionv1connect"
)

// unit is the ops of one caller for one shard; it travels whole.
type unit struct {
	ctx     context.Context // of the caller; when it has ended nobody waits any more
	ops     *partitionv1.ShardOps
	indexes []int // of the ops in the caller's batch
	bytes   int64
	grant   *admission
	answers chan<- *unit

	// Set before the unit is answered: the receipt, or nil when the outcome is unknown.
	receipt *partitionv1.ShardReceipt
}

// line is what the order of ops is kept within: one session and one shard.
type line struct {
	origin string
	shard  uint32
}

func (u *unit) line() line { return line{u.ops.Origin, u.ops.Shard} }

func (u *unit) answer(receipt *partitionv1.ShardReceipt) {
	u.receipt = receipt
	u.grant.done()
	u.answers <- u
}

// fill writes the results of the unit's ops. It returns the ops that must be sent
// again, and how long to wait before.
func (u *unit) fill(results []opResult) (again []int, hint time.Duration) {
	if u.receipt == nil {
		return u.indexes, 0
	}
	if u.receipt.Refusal != partitionv1.Refusal_REFUSAL_UNSPECIFIED {
		hint = time.Duration(u.receipt.RetryAfterMillis) * time.Millisecond
		if u.receipt.Refusal == partitionv1.Refusal_REFUSAL_OVERLOADED {
			for _, i := range u.indexes {
				results[i] = opResult{code: 429, reason: reasonOverloaded, retryAfter: hint}
			}
		}
		return u.indexes, hint
	}
	level, arrival := levelName(u.receipt.Level), arrivalFromProto(u.receipt.Arrival)
	for n, i := range u.indexes {
		results[i] = resultFromProto(u.receipt.Receipts[n], level, arrival)
		results[i].lane, results[i].sequence = u.receipt.Lane, u.receipt.Sequence
	}
	return nil, 0
}

// peer is one partition process that ops are sent to.
type peer struct {
	router *router
	index  int // in router.peers
	client partitionv1connect.PartitionServiceClient

	mu    sync.Mutex
	queue []*unit // bounded by the router's admissions
	calls int     // in flight
	// busy holds the lines of the units in flight. What follows on a busy line waits
	// for the answer, as two calls may overtake each other.
	busy map[line]bool
}

// add queues a unit, and begins a call when fewer than allowed are in flight.
func (p *peer) add(u *unit) {
	p.mu.Lock()
	p.queue = append(p.queue, u)
	begin := p.calls < p.router.limits.callsPerOwner
	if begin {
		p.calls++
	}
	p.mu.Unlock()
	if begin && !p.router.start(p.pump) {
		p.pump() // its calls fail at once
	}
}

// pump makes calls until the queue is empty.
func (p *peer) pump() {
	for {
		units := p.take()
		if units == nil {
			return
		}
		p.call(units)
		p.mu.Lock()
		for _, u := range units {
			delete(p.busy, u.line())
		}
		p.mu.Unlock()
	}
}

// take removes what the next call carries, or ends the pump: in the same critical
// section, so that a unit added meanwhile begins another. Units that wait behind a
// busy line are taken by the pump that made it busy, when its call has ended.
func (p *peer) take() []*unit {
	p.mu.Lock()
	defer p.mu.Unlock()
	var units, rest []*unit
	var ops int
	var bytes int64
	for i, u := range p.queue {
		if p.busy[u.line()] {
			rest = append(rest, u)
			continue
		}
		if len(units) > 0 && (ops+len(u.ops.Ops) > maxCallOps || bytes+u.bytes > maxCallBytes) {
			rest = append(rest, p.queue[i:]...)
			break
		}
		units = append(units, u)
		ops += len(u.ops.Ops)
		bytes += u.bytes
	}
	p.queue = rest
	if len(units) == 0 {
		p.calls--
		return nil
	}
	for _, u := range units {
		// Without a session there is no order to keep: requests of POST /sync are
		// answered one by one.
		if u.ops.Origin != "" {
			p.busy[u.line()] = true
		}
	}
	return units
}

// call sends units and answers each of them.
func (p *peer) call(units []*unit) {
	request := &partitionv1.ApplyRequest{Shards: make([]*partitionv1.ShardOps, 0, len(units))}
	live := units[:0:0]
	for _, u := range units {
		if u.ctx.Err() != nil {
			u.answer(nil)
			continue
		}
		live = append(live, u)
		request.Shards = append(request.Shards, u.ops)
	}
	if len(live) == 0 {
		return
	}
	// A call carries ops of many callers, so it does not end with any of them.
	ctx, cancel := context.WithTimeout(p.router.base, p.router.limits.callTimeout)
	defer cancel()
	response, err := p.client.Apply(ctx, request)
	if err == nil {
		err = checkApplyResponse(request, response)
	}
	if err != nil {
		if p.router.base.Err() == nil {
			p.router.log.Warn("ops are sent again: their owner did not answer", "ops", countOps(request), "error", err)
		}
		for _, u := range live {
			u.answer(nil)
		}
		return
	}
	p.router.heard(response.MapVersion)
	for i, u := range live {
		u.answer(response.Shards[i])
	}
}

func countOps(request *partitionv1.ApplyRequest) (n int) {
	for _, shard := range request.Shards {
		n += len(shard.Ops)
	}
	return n
}

// checkApplyResponse makes sure that every op has its answer, so that nothing is
// acknowledged by mistake (ACK-01).
func checkApplyResponse(request *partitionv1.ApplyRequest, response *partitionv1.ApplyResponse) error {
	if len(response.Shards) != len(request.Shards) {
		return errors.New("owner answered another number of shards than it was sent")
	}
	for i, receipt := range response.Shards {
		if receipt.Refusal == partitionv1.Refusal_REFUSAL_UNSPECIFIED && len(receipt.Receipts) != len(request.Shards[i].Ops) {
			return errors.New("owner answered another number of ops than it was sent")
		}
		if receipt.Refusal != partitionv1.Refusal_REFUSAL_UNSPECIFIED {
			continue
		}
		for _, r := range receipt.Receipts {
			if r.Outcome < partitionv1.Outcome_OUTCOME_APPLIED || r.Outcome > partitionv1.Outcome_OUTCOME_REJECTED {
				return errors.New("owner answered an op with an outcome that is not known here")
			}
		}
	}
	return nil
}
