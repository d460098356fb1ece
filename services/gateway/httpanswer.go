package gateway

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"strconv"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/wire"
)

// Bounds of one response to POST /sync. What does not fit comes with the next
// request, from the cursor that the response gives.
const (
	maxDeltaRecords   = 1000
	maxDeltaBytes     = 1 << 20 // per map
	maxResponseBytes  = 4 << 20 // of keys and values in all
	defaultQueryLimit = 100
	maxQueryLimit     = 1000
	maxQueryOffset    = 9000
	// historyAttempts bounds how often deltas are read anew because the owners'
	// history changed under them.
	historyAttempts = 3
)

// syncAnswer is the work on one POST /sync request.
type syncAnswer struct {
	s        *Service
	response *wire.SyncResponse
	left     int // bytes of keys and values that still fit
	winners  winners
}

// syncRequest answers a request: ops first, so that the deltas and queries of the
// same answer show them. An error means that the request can never succeed and that
// nothing was applied.
func (s *Service) syncRequest(ctx context.Context, request *wire.SyncRequest) (*wire.SyncResponse, error) {
	ops := distinctOps(request.Operations)
	if len(ops) > s.cfg.MaxOps {
		return nil, &wire.Error{Name: "TOO_MANY_OPS", Code: 413, Text: fmt.Sprintf("send at most %d different operations at once", s.cfg.MaxOps)}
	}
	ctx, span := s.tracer.Start(ctx, "gateway.sync", trace.WithAttributes(
		attribute.Int("topgun.ops", len(ops)), attribute.Int("topgun.maps", len(request.SyncMaps)),
		attribute.Int("topgun.queries", len(request.Queries))))
	defer span.End()

	a := &syncAnswer{s: s, response: &wire.SyncResponse{}, left: maxResponseBytes, winners: make(winners)}
	a.apply(ctx, ops)
	reading, cancel := context.WithTimeout(ctx, s.cfg.ReadTimeout)
	defer cancel()
	a.deltas(reading, request.SyncMaps)
	a.queries(reading, request.Queries)
	for _, search := range request.Searches {
		a.fail(501, "NOT_SUPPORTED: searches are not served", search.SearchID)
	}
	// clientHlc is read by nobody: it could only move our clock.
	a.response.ServerHLC = s.clock()
	return a.response, nil
}

// fail reports what became of one item. context is the map name or the id of the
// item, by which clients find what it is about; a name that breaks the rules of
// names is not repeated.
func (a *syncAnswer) fail(code int, message, context string) {
	a.response.Errors = append(a.response.Errors, wire.SyncError{Code: code, Message: message, Context: context})
}

// distinctOps drops exact repeats: the original client sends every pending op again
// with each write (PROTOCOL 10.3), and its HTTP provider collects the batches
// between two polls. The same id with other content is another op.
func distinctOps(ops []wire.Op) []wire.Op {
	type identity struct {
		id, mapName, key string
		stamp            hlc.Timestamp
	}
	first := make(map[identity]int, len(ops))
	distinct := ops[:0:0]
	for _, op := range ops {
		id := identity{op.ID, op.MapName, op.Key, op.Record.Timestamp}
		if at, ok := first[id]; ok && sameOp(&distinct[at], &op) {
			continue
		} else if !ok {
			first[id] = len(distinct)
		}
		distinct = append(distinct, op)
	}
	return distinct
}

func sameOp(a, b *wire.Op) bool {
	if (a.Err == nil) != (b.Err == nil) || (a.Err != nil && a.Err.Error() != b.Err.Error()) {
		return false
	}
	return a.Kind == b.Kind && a.Tag == b.Tag && a.WriteConcern == b.WriteConcern &&
		a.Record.TTLMillis == b.Record.TTLMillis && bytes.Equal(a.Record.Value, b.Record.Value)
}

// apply has the ops applied and writes the ack.
func (a *syncAnswer) apply(ctx context.Context, ops []wire.Op) {
	if len(ops) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, a.s.cfg.ApplyTimeout)
	defer cancel()
	// No origin: the client has no session here, so no session is spared the event.
	results := a.s.router.Apply(ctx, "", traceParent(ctx), ops)
	a.settle(ctx, ops, results)
	for i, result := range results {
		switch result.status {
		case opSuperseded, opRestamped:
			a.winners.add(&ops[i], result.winner)
		case opUnavailable:
			if !a.failedAlready(result.code) {
				a.fail(result.code, result.reason, "operations")
			}
		}
	}
	a.response.Ack = ackFor(ops, results)
}

// settle waits for the store as far as ops ask for it; a request says no timeout.
func (a *syncAnswer) settle(ctx context.Context, ops []wire.Op, results []opResult) {
	ctx, cancel := context.WithTimeout(ctx, defaultConcern)
	defer cancel()
	a.s.sockets.concerns.settle(ctx, nil, ops, results)
}

// failedAlready keeps a thousand ops with one cause from making a thousand errors.
func (a *syncAnswer) failedAlready(code int) bool {
	for _, e := range a.response.Errors {
		if e.Code == code && e.Context == "operations" {
			return true
		}
	}
	return false
}

// ackFor makes the ack of a request's ops, or nil if it would say nothing.
//
// lastId makes the client forget every op with an id up to it, so it is always a
// decimal number and stays below the first op whose outcome is not known (ACK-05);
// "0" covers nothing. results lists what lastId cannot say: rejected ops, ops that
// did not reach the asked level, and ops whose ids are not numbers.
func ackFor(ops []wire.Op, results []opResult) *wire.SyncAck {
	unknown := uint64(math.MaxUint64) // the least numeric id that must not be covered
	for i, result := range results {
		if id, ok := numericID(ops[i].ID); ok && result.status == opUnavailable {
			unknown = min(unknown, id)
		}
	}
	ack := &wire.SyncAck{LastID: "0"}
	var last uint64
	covered := false
	for i, result := range results {
		if result.status == opUnavailable {
			continue
		}
		id, numeric := numericID(ops[i].ID)
		if numeric && id < unknown {
			covered = true
			last = max(last, id)
		}
		r := wire.OpResult{OpID: ops[i].ID, Success: true, AchievedLevel: result.level}
		if result.status == opRejected {
			r.Success, r.Error = false, result.reason
		} else if asked := ops[i].WriteConcern; !reached(result.level, asked) {
			r.Success, r.Error = false, "LEVEL_NOT_REACHED: the op is applied, at the level that achievedLevel names"
		}
		if ops[i].ID != "" && (!r.Success || !numeric) {
			ack.Results = append(ack.Results, r)
		}
	}
	if covered {
		ack.LastID = strconv.FormatUint(last, 10)
	}
	if !covered && len(ack.Results) == 0 {
		return nil
	}
	return ack
}

// numericID reads an op id as the client's log counts: a decimal number that a
// JavaScript number holds exactly.
func numericID(id string) (uint64, bool) {
	if id == "" || id[0] == '+' {
		return 0, false
	}
	n, err := strconv.ParseUint(id, 10, 64)
	return n, err == nil && n <= 1<<53
}

// reached reports whether an asked level (PROTOCOL 10.7; empty asks for nothing) was
// reached.
func reached(got, asked string) bool {
	if asked == "" {
		return true
	}
	for _, level := range levelNames { // weakest first
		if level == asked {
			return true
		}
		if level == got {
			return false
		}
	}
	return false
}
