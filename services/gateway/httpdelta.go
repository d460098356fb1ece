package gateway

import (
	"context"
	"strconv"
	"time"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/wire"
)

// mapName names one of the two maps that may have a name.
type mapName struct {
	of   mapKind
	name string
}

// winners are the records that ops lost against or were stored as, by map and by key or
// tag.
type winners map[mapName]map[tagKey]lwwmap.Record

func (w winners) add(op *wire.Op, record lwwmap.Record) {
	m, at := mapName{kindOf(op), op.MapName}, tagKey{op.Key, op.Tag}
	byKey := w[m]
	if byKey == nil {
		byKey = make(map[tagKey]lwwmap.Record)
		w[m] = byKey
	}
	if known, ok := byKey[at]; !ok || beats(m.of, record, known) {
		byKey[at] = record
	}
}

// beats reports whether a record is later than another: the tombstone of an OR-map's tag
// always is.
func beats(of mapKind, a, b lwwmap.Record) bool {
	if of == kindOR && a.Deleted() != b.Deleted() {
		return a.Deleted()
	}
	return a.Timestamp.Compare(b.Timestamp) > 0
}

// mapDelta is what arrived in a map after a cursor.
type mapDelta struct {
	records []keyed
	cursor  hlc.Timestamp
	more    bool
}

// deltas answers syncMaps, and delivers the winners.
func (a *syncAnswer) deltas(ctx context.Context, maps []wire.SyncMap) {
	asked := make([]int, 0, len(maps)) // indexes of the maps that can be answered
	seen := make(map[mapName]bool, len(maps))
	for i := range maps {
		m := syncedMap(&maps[i])
		switch {
		case maps[i].Err != nil:
			a.fail(maps[i].Err.Code, maps[i].Err.Error(), "syncMaps["+strconv.Itoa(i)+"]")
		case seen[m]:
			a.fail(400, "TWICE: the map is listed already", m.name)
		default:
			seen[m] = true
			asked = append(asked, i)
		}
	}
	deltas, left := a.readDeltas(ctx, maps, asked)
	a.left = left
	for n, i := range asked {
		m, delta := syncedMap(&maps[i]), deltas[n]
		if delta == nil {
			a.fail(503, "UNAVAILABLE: the map cannot be read now; ask again", m.name)
			if a.winners[m] == nil {
				continue
			}
			// The cursor stays, so that nothing is skipped.
			delta = &mapDelta{cursor: maps[i].LastSync, more: true}
		}
		a.addDelta(m, delta)
	}
	// Winners of maps that the client does not sync still have to reach it, or it
	// keeps a value that lost (CLK-05). It echoes the cursor of such a map never;
	// should another client do, zero means everything, which is always right.
	for m := range a.winners {
		a.addDelta(m, &mapDelta{})
	}
}

func syncedMap(m *wire.SyncMap) mapName {
	if m.OR {
		return mapName{kindOR, m.MapName}
	}
	return mapName{kindLWW, m.MapName}
}

// addDelta adds a delta to the response, with the winners of its map that it does not
// have.
func (a *syncAnswer) addDelta(m mapName, delta *mapDelta) {
	byKey := a.winners[m]
	delete(a.winners, m)
	for i := range delta.records {
		r := &delta.records[i]
		at := tagKey{r.Key, r.tag}
		if winner, ok := byKey[at]; ok && !beats(m.of, winner, r.Record) {
			delete(byKey, at)
		}
	}
	records := delta.records
	for at, winner := range byKey {
		records = append(records, keyed{wire.KeyedRecord{Key: at.key, Record: winner}, at.tag})
	}
	if m.of == kindOR {
		or := wire.ORDelta{MapName: m.name, Entries: []wire.OREntry{}, ServerSyncTimestamp: delta.cursor, HasMore: delta.more}
		sortByKey(records)
		for len(records) > 0 {
			var entries []wire.OREntry
			entries, records = entriesOf(records)
			or.Entries = append(or.Entries, entries...)
		}
		a.response.ORDeltas = append(a.response.ORDeltas, or)
		return
	}
	lww := wire.Delta{
		MapName: m.name, Records: make([]wire.DeltaRecord, 0, len(records)),
		ServerSyncTimestamp: delta.cursor, HasMore: delta.more,
	}
	for i := range records {
		r := &records[i]
		lww.Records = append(lww.Records, wire.DeltaRecord{
			Key: r.Key, Record: r.Record, EventType: eventType(kindLWW, r.Record),
		})
	}
	a.response.Deltas = append(a.response.Deltas, lww)
}

// readDeltas reads what arrived in the asked maps; nil stands for a map that could
// not be read. It returns the bytes that are left.
//
// A cursor is an arrival together with the history that it counts in, in the place
// of the node id. The owners' answers do not say their history, so it is asked for
// after the reading: had the log been replaced before, arrivals of the new one
// would be taken for arrivals of the old one, and the next request would skip some.
func (a *syncAnswer) readDeltas(ctx context.Context, maps []wire.SyncMap, asked []int) ([]*mapDelta, int) {
	none := make([]*mapDelta, len(asked))
	if len(asked) == 0 {
		return none, a.left
	}
	table, err := a.s.router.owners(ctx)
	for range historyAttempts {
		if err != nil {
			break
		}
		left := a.left
		deltas := make([]*mapDelta, len(asked))
		for n, i := range asked {
			deltas[n] = a.readDelta(ctx, maps[i], table, &left)
		}
		before := table
		if table, err = a.s.router.learn(ctx); err != nil || table.history != before.history {
			continue
		}
		for _, i := range asked {
			if maps[i].LastSync.NodeID == before.history && a.tooOld(maps[i].LastSync, before.kept) {
				a.fail(codeTooOld, "TOO_OLD: the cursor is older than deletions are remembered, so the delta "+
					"begins anew; forget what is not in it and the ones that follow", maps[i].MapName)
			}
		}
		return deltas, left
	}
	return none, a.left
}

// tooOld reports whether deletions after a cursor may be forgotten (PROTOCOL 22.5).
func (a *syncAnswer) tooOld(cursor hlc.Timestamp, kept retention) bool {
	if kept.period == 0 || cursor.Millis == 0 {
		return false
	}
	return time.UnixMilli(int64(min(cursor.Millis, maxVersion))).Before(a.s.now().Add(-kept.period))
}

func (a *syncAnswer) readDelta(ctx context.Context, m wire.SyncMap, table *ownerTable, left *int) *mapDelta {
	if *left <= 0 {
		return &mapDelta{cursor: m.LastSync, more: true} // nothing fits; the cursor stays
	}
	var after hlc.Timestamp
	if m.LastSync.NodeID == table.history && !a.tooOld(m.LastSync, table.kept) {
		after = hlc.Timestamp{Millis: m.LastSync.Millis, Counter: m.LastSync.Counter}
	}
	p, err := a.s.router.Since(ctx, syncedMap(&m).of, m.MapName, after, maxDeltaRecords, min(maxDeltaBytes, *left))
	if err != nil {
		return nil
	}
	for i := range p.records {
		*left -= len(p.records[i].Key) + len(p.records[i].tag) + len(p.records[i].Record.Value)
	}
	return &mapDelta{
		records: p.records, more: p.more,
		cursor: hlc.Timestamp{Millis: p.covered.Millis, Counter: p.covered.Counter, NodeID: table.history},
	}
}
