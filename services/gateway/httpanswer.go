package gateway

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"math"
	"strconv"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/msgval"
	"github.com/topgun-sync/topgun/core/query"
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
	maxQueryCursor    = 2 << 10
	// queryPage rows of the greatest value size stay below the read limit of a call
	// to an owner.
	queryPage = 100
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

// winners are the records that ops lost against or were stored as, by map and key.
type winners map[string]map[string]lwwmap.Record

func (w winners) add(mapName, key string, record lwwmap.Record) {
	byKey := w[mapName]
	if byKey == nil {
		byKey = make(map[string]lwwmap.Record)
		w[mapName] = byKey
	}
	if known, ok := byKey[key]; !ok || known.Timestamp.Compare(record.Timestamp) < 0 {
		byKey[key] = record
	}
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
	return a.Kind == b.Kind && a.WriteConcern == b.WriteConcern &&
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
	for i, result := range results {
		switch result.status {
		case opSuperseded, opRestamped:
			a.winners.add(ops[i].MapName, ops[i].Key, result.winner)
		case opUnavailable:
			if !a.failedAlready(result.code) {
				a.fail(result.code, result.reason, "operations")
			}
		}
	}
	a.response.Ack = ackFor(ops, results)
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

// deltas answers syncMaps, and delivers the winners.
func (a *syncAnswer) deltas(ctx context.Context, maps []wire.SyncMap) {
	asked := make([]int, 0, len(maps)) // indexes of the maps that can be answered
	seen := make(map[string]bool, len(maps))
	for i, m := range maps {
		if m.Err != nil {
			a.fail(m.Err.Code, m.Err.Error(), "syncMaps["+strconv.Itoa(i)+"]")
		} else if seen[m.MapName] {
			a.fail(400, "TWICE: the map is listed already", m.MapName)
		} else {
			seen[m.MapName] = true
			asked = append(asked, i)
		}
	}
	deltas, left := a.readDeltas(ctx, maps, asked)
	a.left = left
	for n, i := range asked {
		delta := deltas[n]
		if delta == nil {
			a.fail(503, "UNAVAILABLE: the map cannot be read now; ask again", maps[i].MapName)
			if a.winners[maps[i].MapName] == nil {
				continue
			}
			// The cursor stays, so that nothing is skipped.
			delta = &wire.Delta{MapName: maps[i].MapName, ServerSyncTimestamp: maps[i].LastSync, HasMore: true}
		}
		a.addWinners(delta)
		a.response.Deltas = append(a.response.Deltas, *delta)
	}
	// Winners of maps that the client does not sync still have to reach it, or it
	// keeps a value that lost (CLK-05). It echoes the cursor of such a map never;
	// should another client do, zero means everything, which is always right.
	for name := range a.winners {
		delta := &wire.Delta{MapName: name}
		a.addWinners(delta)
		a.response.Deltas = append(a.response.Deltas, *delta)
	}
}

// addWinners adds the winners of the delta's map that the delta does not have.
func (a *syncAnswer) addWinners(delta *wire.Delta) {
	byKey := a.winners[delta.MapName]
	if byKey == nil {
		return
	}
	delete(a.winners, delta.MapName)
	for _, r := range delta.Records {
		if winner, ok := byKey[r.Key]; ok && r.Record.Timestamp.Compare(winner.Timestamp) >= 0 {
			delete(byKey, r.Key)
		}
	}
	for key, winner := range byKey {
		delta.Records = append(delta.Records, deltaRecord(wire.KeyedRecord{Key: key, Record: winner}))
	}
}

func deltaRecord(r wire.KeyedRecord) wire.DeltaRecord {
	event := wire.OpPut
	if r.Record.Deleted() {
		event = wire.OpRemove
	}
	return wire.DeltaRecord{Key: r.Key, Record: r.Record, EventType: event}
}

// readDeltas reads what arrived in the asked maps; nil stands for a map that could
// not be read. It returns the bytes that are left.
//
// A cursor is an arrival together with the history that it counts in, in the place
// of the node id. The owners' answers do not say their history, so it is asked for
// after the reading: had the log been replaced before, arrivals of the new one
// would be taken for arrivals of the old one, and the next request would skip some.
func (a *syncAnswer) readDeltas(ctx context.Context, maps []wire.SyncMap, asked []int) ([]*wire.Delta, int) {
	none := make([]*wire.Delta, len(asked))
	if len(asked) == 0 {
		return none, a.left
	}
	table, err := a.s.router.owners(ctx)
	for range historyAttempts {
		if err != nil {
			break
		}
		left := a.left
		deltas := make([]*wire.Delta, len(asked))
		for n, i := range asked {
			deltas[n] = a.readDelta(ctx, maps[i], table.history, &left)
		}
		history := table.history
		if table, err = a.s.router.learn(ctx); err == nil && table.history == history {
			return deltas, left
		}
	}
	return none, a.left
}

func (a *syncAnswer) readDelta(ctx context.Context, m wire.SyncMap, history string, left *int) *wire.Delta {
	delta := &wire.Delta{MapName: m.MapName, ServerSyncTimestamp: m.LastSync, HasMore: true}
	if *left <= 0 {
		return delta // nothing fits; the cursor stays
	}
	var after hlc.Timestamp
	if m.LastSync.NodeID == history {
		after = hlc.Timestamp{Millis: m.LastSync.Millis, Counter: m.LastSync.Counter}
	}
	p, err := a.s.router.Since(ctx, m.MapName, after, maxDeltaRecords, min(maxDeltaBytes, *left))
	if err != nil {
		return nil
	}
	delta.Records = make([]wire.DeltaRecord, 0, len(p.records))
	for _, r := range p.records {
		*left -= len(r.Key) + len(r.Record.Value)
		delta.Records = append(delta.Records, deltaRecord(r))
	}
	delta.ServerSyncTimestamp = hlc.Timestamp{Millis: p.covered.Millis, Counter: p.covered.Counter, NodeID: history}
	delta.HasMore = p.more
	return delta
}

// queries answers one-shot queries.
func (a *syncAnswer) queries(ctx context.Context, queries []wire.HTTPQuery) {
	for _, q := range queries {
		result, err := a.query(ctx, q)
		var refused *wire.Error
		switch {
		case err == nil:
			a.response.QueryResults = append(a.response.QueryResults, *result)
		case errors.As(err, &refused):
			a.fail(refused.Code, refused.Error(), q.QueryID)
		case errors.Is(err, query.ErrTooComplex):
			a.fail(400, "QUERY_TOO_COMPLEX: filter may have at most 64 fields", q.QueryID)
		case errors.Is(err, errBadQuery):
			a.fail(400, "BAD_QUERY: filter must be a map from field names to values", q.QueryID)
		case errors.Is(err, errUnavailable):
			a.fail(503, "UNAVAILABLE: the map cannot be read now; ask again", q.QueryID)
		default:
			a.s.log.Error("a query was not answered", "error", err)
			a.fail(500, "INTERNAL: the query was not answered", q.QueryID)
		}
	}
}

func (a *syncAnswer) query(ctx context.Context, q wire.HTTPQuery) (*wire.HTTPQueryResult, error) {
	if q.Err != nil {
		return nil, q.Err
	}
	if q.Offset > maxQueryOffset {
		return nil, &wire.Error{Name: "BAD_QUERY", Code: 400, Text: fmt.Sprintf("offset is at most %d; go on with cursor", maxQueryOffset)}
	}
	after := ""
	if q.Cursor != "" {
		key, ok := decodeCursor(q.Cursor, q.MapName, q.Where)
		if !ok {
			return nil, &wire.Error{Name: "BAD_CURSOR", Code: 400, Text: "the cursor is not one of this query's; begin without"}
		}
		after = key
	}
	limit := defaultQueryLimit
	if q.Limit > 0 {
		limit = int(min(q.Limit, maxQueryLimit))
	}
	skip := int(q.Offset)
	result := &wire.HTTPQueryResult{QueryID: q.QueryID, Results: []wire.KeyValue{}}
	full := false
	for more := true; more && !full; {
		var rows []wire.KeyValue
		var err error
		rows, more, err = a.s.router.Query(ctx, q.MapName, q.Where, after, min(limit-len(result.Results)+skip, queryPage))
		if err != nil {
			return nil, err
		}
		if len(rows) == 0 {
			result.HasMore = more
			break
		}
		for n, row := range rows {
			size := len(row.Key) + len(row.Value)
			if skip > 0 {
				skip--
			} else if a.left <= 0 || (size > a.left && len(result.Results) > 0) {
				full, more = true, true
				break
			} else {
				a.left -= size
				result.Results = append(result.Results, row)
			}
			after = row.Key
			if len(result.Results) == limit {
				full = true
				more = more || n < len(rows)-1
				break
			}
		}
		result.HasMore = more
	}
	if result.HasMore {
		result.NextCursor = encodeCursor(after, q.MapName, q.Where)
	}
	return result, nil
}

// cursorVersion begins every cursor, so that the form can change.
const cursorVersion = 1

// A query cursor is base64url of: the version, eight bytes that bind it to map and
// filter, and the last key that was returned. It holds nothing that its owner could
// not ask for, so it carries no signature.
func encodeCursor(lastKey, mapName string, where []byte) string {
	binding := cursorBinding(mapName, where)
	raw := append([]byte{cursorVersion}, binding[:]...)
	return base64.RawURLEncoding.EncodeToString(append(raw, lastKey...))
}

func decodeCursor(cursor, mapName string, where []byte) (lastKey string, ok bool) {
	if len(cursor) > maxQueryCursor {
		return "", false
	}
	raw, err := base64.RawURLEncoding.Strict().DecodeString(cursor)
	binding := cursorBinding(mapName, where)
	if err != nil || len(raw) < 1+len(binding) || raw[0] != cursorVersion || !bytes.Equal(raw[1:1+len(binding)], binding[:]) {
		return "", false
	}
	return string(raw[1+len(binding):]), true
}

// cursorBinding is the same for every encoding of the same filter.
func cursorBinding(mapName string, where []byte) (binding [8]byte) {
	hash := sha256.New()
	fmt.Fprintf(hash, "%d:%s", len(mapName), mapName)
	if len(where) > 0 {
		hash.Write(msgval.Canonical(nil, where))
	}
	copy(binding[:], hash.Sum(nil))
	return binding
}
