package partition

import (
	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/ormap"
	"github.com/topgun-sync/topgun/core/pncounter"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
)

// Reasons of rejections: fixed texts, a name and a sentence.
const (
	reasonReused       = "STAMP_REUSED: another value was written with the same timestamp"
	reasonKeyTooLarge  = "KEY_TOO_LARGE: the values under one key of an OR-map must be at most 4 MiB together"
	reasonTooOld       = "TOO_OLD: the key or tag holds nothing, and the write is older than removals are remembered: it may have been removed since"
	reasonTooLarge     = "COUNTER_TOO_LARGE: a counter's sums must be at most 2^53, for each node and in all"
	reasonTooManyNodes = "COUNTER_TOO_MANY_NODES: a counter must have at most 10000 nodes"
)

// table returns a table, which is made if there is none.
func (s *shard) table(kind typesv1.Kind, name string) *table {
	t := s.tables[kind][name]
	if t == nil {
		t = newTable(kind, name)
		s.tables[kind][t.name] = t
	}
	return t
}

// merge decides an op and stores the result.
func (s *shard) merge(o *op, wall uint64, origin string) {
	t := s.tables[o.kind][o.table]
	var e *entry
	if t != nil {
		e = t.records[string(o.key)]
	}
	switch o.kind {
	case or:
		s.mergeTag(o, t, e, wall, origin)
	case counter:
		s.mergeNode(o, t, e, wall)
	default:
		s.mergeKey(o, e, wall, origin)
	}
}

// mergeKey decides an op on an LWW-map (PROTOCOL 5.2, 22.4).
func (s *shard) mergeKey(o *op, e *entry, wall uint64, origin string) {
	var local *lwwmap.Record
	if e != nil {
		r := e.record()
		local = &r
		if repeats(e.originals(), o.record.Timestamp) {
			o.outcome, o.winner = restamped, r
			return
		}
	} else if s.tooOld(o) {
		o.outcome, o.reason = rejected, reasonTooOld
		return
	}
	if tooFarAhead(o.record.Timestamp, wall) {
		s.restamp(o, local, wall)
		return
	}
	s.decided(o, lwwmap.Decide(local, o.record), local, wall, origin)
}

// mergeTag decides an op on one tag of an OR-map (PROTOCOL 6.2, 22.4). A tombstone
// stays for ever, whatever the stamps are; so nothing must be remembered for it, and
// a removal that is stamped too far ahead differs from another only in the stamp that
// is stored.
func (s *shard) mergeTag(o *op, t *table, e *entry, wall uint64, origin string) {
	removal := o.record.Deleted()
	if removal {
		o.record.TTLMillis = 0
	}
	var local *lwwmap.Record
	var known *ormap.Record
	tombstoned := false
	if e != nil {
		r := e.record()
		local, tombstoned = &r, r.Deleted()
		if !tombstoned {
			known = &ormap.Record{Record: r}
		}
	}
	outcome := ormap.Decide(known, tombstoned, ormap.Record{Record: o.record})
	switch ahead := tooFarAhead(o.record.Timestamp, wall); {
	case tombstoned: // Duplicate or Superseded
	case e == nil && !removal && s.tooOld(o):
		o.outcome, o.reason = rejected, reasonTooOld
		return
	case known != nil && !removal && repeats(e.originals(), o.record.Timestamp):
		o.outcome, o.winner = restamped, *local
		return
	case !removal && t.tooLarge(o.key, e, o.record.Value):
		o.outcome, o.reason = rejected, reasonKeyTooLarge
		return
	case ahead && removal:
		r := lwwmap.Record{Timestamp: hlc.Timestamp{Millis: wall, NodeID: s.nodeID}}
		e = s.store(s.table(or, o.table), o.key, o.hash, r, outlived(known, r.Timestamp), wall, "")
		o.outcome, o.winner = restamped, e.record()
		return
	case ahead:
		s.restamp(o, local, wall)
		return
	case removal:
		o.outcome = applied
		s.store(s.table(or, o.table), o.key, o.hash, o.record, outlived(known, o.record.Timestamp), wall, origin)
		return
	}
	s.decided(o, outcome, local, wall, origin)
}

// outlived returns the stamp of an add that a removal with an earlier one ends, zero if
// there is none. The tombstone remembers it, and so stays for as long as the add, sent
// again, would pass the fence: what one clock stamps may be up to the drift ahead of
// what another does.
func outlived(add *ormap.Record, removal hlc.Timestamp) hlc.Timestamp {
	if add == nil || add.Timestamp.Compare(removal) <= 0 {
		return hlc.Timestamp{}
	}
	return add.Timestamp
}

// mergeNode decides what a counter's node reports of itself (PROTOCOL 14.2). Whoever
// reports it needs the merged state too, so no session is left out of the event.
func (s *shard) mergeNode(o *op, t *table, e *entry, wall uint64) {
	var local, total pncounter.Sides
	nodes := 0
	if t != nil {
		nodes, total = len(t.records), t.total
	}
	if e != nil {
		local, _ = pncounter.ParseSides(e.value)
	}
	remote, _ := pncounter.ParseSides(o.record.Value)
	merged, outcome := pncounter.Decide(local, e != nil, nodes, total, remote)
	switch outcome {
	case pncounter.Applied:
		o.outcome = applied
		// The stamp plays no part in the merge. It is the wall clock's, as of records
		// that are stamped here otherwise.
		r := lwwmap.Record{Value: merged.Append(nil), Timestamp: hlc.Timestamp{Millis: wall, NodeID: s.nodeID}}
		s.store(s.table(counter, o.table), o.key, o.hash, r, hlc.Timestamp{}, wall, "")
	case pncounter.Duplicate:
		o.outcome = duplicate
	case pncounter.TooLarge:
		o.outcome, o.reason = rejected, reasonTooLarge
	case pncounter.TooManyNodes:
		o.outcome, o.reason = rejected, reasonTooManyNodes
	}
}

func tooFarAhead(stamp hlc.Timestamp, wall uint64) bool {
	return stamp.Millis > wall+uint64(hlc.MaxDrift.Milliseconds())
}

// decided does what was decided about an op.
func (s *shard) decided(o *op, outcome lwwmap.Outcome, local *lwwmap.Record, wall uint64, origin string) {
	switch outcome {
	case lwwmap.Applied:
		o.outcome = applied
		s.store(s.table(o.kind, o.table), o.key, o.hash, o.record, hlc.Timestamp{}, wall, origin)
	case lwwmap.Duplicate:
		o.outcome = duplicate
	case lwwmap.Superseded:
		o.outcome, o.winner = superseded, *local
	case lwwmap.Conflict:
		o.outcome, o.reason = rejected, reasonReused
	}
}

// restamp takes in an op whose stamp lies too far in the future under a stamp of
// the shard's own. The stamp is the wall clock's, not the arrival's, which may be
// ahead after the wall clock was set back (CLK-02, CLK-03). Win or lose, the record
// remembers the original, so that the op sent again later does not win then.
func (s *shard) restamp(o *op, local *lwwmap.Record, wall uint64) {
	original := o.record.Timestamp
	r := o.record
	r.Timestamp = hlc.Timestamp{Millis: wall, NodeID: s.nodeID}
	if local != nil && local.Timestamp.Millis == wall && local.Timestamp.NodeID == s.nodeID && r.Timestamp.Counter <= local.Timestamp.Counter {
		r.Timestamp.Counter = local.Timestamp.Counter + 1
	}
	if local != nil && lwwmap.Decide(local, r) != lwwmap.Applied {
		r = *local
	}
	e := s.store(s.table(o.kind, o.table), o.key, o.hash, r, original, wall, "")
	o.outcome, o.winner = restamped, e.record()
}

// store makes a record the state of a key, or of a tag or node, under an arrival of
// its own, and notes the change for the lane.
func (s *shard) store(t *table, key []byte, hash uint32, r lwwmap.Record, original hlc.Timestamp, wall uint64, origin string) *entry {
	var known []hlc.Timestamp
	replaced := false
	before := t.records[string(key)]
	if before != nil {
		known, replaced = before.originals(), len(before.value) > 0
	} else {
		s.records.Add(1)
	}
	if s.lastNode.Value() != r.Timestamp.NodeID {
		s.lastNode = intern(r.Timestamp.NodeID)
	}
	r.Value = keepValue(r.Value)
	e := t.put(key, hash, r, s.lastNode, s.clock.next(wall), remember(known, original, r.Timestamp))
	t.arrived(e, before != nil)
	s.expiry.schedule(t, e)
	if len(e.value) == 0 {
		s.pruner.bury(t, e)
	}
	c := t.change(e)
	c.origin, c.replaced = origin, replaced
	s.changes = append(s.changes, c)
	return e
}
