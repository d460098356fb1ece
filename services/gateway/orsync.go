package gateway

import (
	"cmp"
	"context"
	"slices"

	"github.com/gobwas/ws"

	"github.com/topgun-sync/topgun/core/wire"
)

// OR-maps are synchronised like LWW-maps, with two differences (PROTOCOL 9): the client
// pushes too what it finds the server lacks, with ORMAP_PUSH_DIFF, and there are
// tombstones of tags, which no hash covers.
//
// What arrived since a client's last sync is pushed to it as ORMAP_DIFF_RESPONSE and not
// as events: the original client stores its whole set of tombstones after every
// OR_REMOVE, so thousands of them would cost it seconds, and a later merge can never put
// an older record in the place of a newer one. That client neither tells its listeners
// nor stores its tombstones after a merge that only removed something (PROTOCOL 6.2); one
// OR_REMOVE behind the last frame, repeating the last removal, makes it do both.

// orBuckets completes an answer of an OR-map's tree: above the leaves' parents every digit
// is named, 0 for those with nothing below, so that a client that has more descends there;
// a leaf that is missing is one that the client pushes (PROTOCOL 9.3).
func orBuckets(path string, buckets []wire.Bucket) []wire.Bucket {
	if len(path) > 1 {
		return slices.DeleteFunc(buckets, func(b wire.Bucket) bool { return b.Hash == 0 })
	}
	const digits = "0123456789abcdef"
	all := make([]wire.Bucket, len(digits))
	for i := range all {
		all[i].Digit = digits[i]
		at := slices.IndexFunc(buckets, func(b wire.Bucket) bool { return b.Digit == digits[i] })
		if at >= 0 {
			all[i].Hash = buckets[at].Hash
		}
	}
	return all
}

// sortByKey puts what tags hold in the order of entries: by key, then as it was added.
func sortByKey(records []keyed) {
	slices.SortFunc(records, func(a, b keyed) int {
		return cmp.Or(cmp.Compare(a.Key, b.Key), a.Record.Timestamp.Compare(b.Record.Timestamp), cmp.Compare(a.tag, b.tag))
	})
}

// entriesOf takes records, which are sorted by key, for one frame of about pushBytes, at
// least one, and returns the rest. A key that does not fit goes on in the next frame: a
// client adds up what it is told of a key.
func entriesOf(records []keyed) (entries []wire.OREntry, rest []keyed) {
	size := 0
	for size < pushBytes && len(records) > 0 {
		r := &records[0]
		records = records[1:]
		if n := len(entries); n == 0 || entries[n-1].Key != r.Key {
			entries = append(entries, wire.OREntry{Key: r.Key})
			size += eventOverhead + len(r.Key)
		}
		e := &entries[len(entries)-1]
		if r.Record.Deleted() {
			e.Tombstones = append(e.Tombstones, r.tag)
			size += len(r.tag)
		} else {
			e.Records = append(e.Records, wire.ORRecord{Tag: r.tag, Record: r.Record})
			size += eventOverhead + len(r.tag) + len(r.Record.Value)
		}
	}
	return entries, records
}

// sendORLeaf answers a leaf of an OR-map's tree with what its keys hold, the tombstones of
// each key with it, in at least one frame, waiting for room before each. It returns false
// if the session ended meanwhile.
func (s *session) sendORLeaf(name, path string, records []keyed) bool {
	sortByKey(records)
	for {
		leaf := &wire.ORMapSyncRespLeaf{MapName: name, Path: path}
		leaf.Entries, records = entriesOf(records)
		s.invitePushes(1)
		if !s.sendBulk(outLeaf, leaf) {
			return false
		}
		if len(records) == 0 {
			return true
		}
	}
}

// sendDiff has the client merge what tags hold, if there is anything. The client answers
// nothing. It returns false if the session ended meanwhile.
func (s *session) sendDiff(name string, records []keyed) bool {
	sortByKey(records)
	for len(records) > 0 {
		diff := &wire.ORMapDiffResponse{MapName: name}
		diff.Entries, records = entriesOf(records)
		if !s.sendBulk(outLeaf, diff) {
			return false
		}
	}
	return true
}

// sendRemoval sends the removal of a tag as an event.
func (s *session) sendRemoval(name string, r keyed) {
	s.sendSync(&wire.ServerEvent{Event: wire.Event{MapName: name, EventType: wire.OpORRemove, Key: r.Key, Tag: r.tag}})
}

// sendBulk queues a message on the lane of syncs when there is room. It returns false if
// the session ended meanwhile.
func (s *session) sendBulk(kind int, m wire.Message) bool {
	buf := encodeBuffers.Get().(*[]byte)
	payload := m.AppendTo((*buf)[:0])
	bytes := appendFrame(make([]byte, 0, len(payload)+frameHeader(len(payload))), ws.OpBinary, payload)
	recycle(buf, payload)
	s.k.meters.sentType(kind)
	return s.pushWaiting(bulk, bytes)
}

// diffRequested takes an ORMAP_DIFF_REQUEST.
func (s *session) diffRequested(m *wire.ORMapDiffRequest, frame *inbound) error {
	if err := wire.CheckMapName(m.MapName); err != nil {
		return s.refuse(err)
	}
	return s.addJob(job{kind: jobCall, frame: frame.keep(), do: func(ctx context.Context) error {
		records, err := s.k.router.Get(ctx, kindOR, m.MapName, m.Keys)
		if err != nil {
			return err
		}
		sortByKey(records)
		for {
			diff := &wire.ORMapDiffResponse{MapName: m.MapName}
			diff.Entries, records = entriesOf(records)
			if !s.sendBulk(outLeaf, diff) || len(records) == 0 {
				return nil
			}
		}
	}})
}

// tagKey names a tag of an OR-map.
type tagKey struct{ key, tag string }

// difference returns the ops that bring the server what it lacks of a diff, and the tags
// of the diff's records that were removed. Removals have no stamp yet: the client does not
// say when they were.
func difference(m *wire.ORMapPushDiff, known []keyed) (ops []wire.Op, gone []keyed) {
	held := make(map[tagKey]*keyed, len(known))
	live := make(map[string][]string) // keys by tag, of what is not removed
	for i := range known {
		r := &known[i]
		held[tagKey{r.Key, r.tag}] = r
		if !r.Record.Deleted() {
			live[r.tag] = append(live[r.tag], r.Key)
		}
	}
	removed := func(key, tag string) {
		ops = append(ops, wire.Op{MapName: m.MapName, Key: key, Kind: wire.OpORRemove, Tag: tag})
	}
	var tombstones []string
	for i := range m.Entries {
		e := &m.Entries[i]
		if !sameSlice(e.Tombstones, tombstones) { // entries of one map share theirs
			tombstones = e.Tombstones
			for _, tag := range tombstones {
				for _, key := range live[tag] {
					removed(key, tag)
				}
				delete(live, tag) // once is enough
			}
		}
	}
	for i := range m.Entries {
		e := &m.Entries[i]
		for n := range e.Records {
			r := &e.Records[n]
			at := held[tagKey{e.Key, r.Tag}]
			switch {
			case at == nil:
			case at.Record.Deleted():
				gone = append(gone, keyed{wire.KeyedRecord{Key: e.Key}, r.Tag})
				continue
			case r.Record.Timestamp.Compare(at.Record.Timestamp) <= 0:
				continue
			}
			ops = append(ops, wire.Op{MapName: m.MapName, Key: e.Key, Kind: wire.OpORAdd, Tag: r.Tag, Record: r.Record})
			held[tagKey{e.Key, r.Tag}] = &keyed{wire.KeyedRecord{Key: e.Key, Record: r.Record}, r.Tag} // once is enough
		}
	}
	return ops, gone
}

// sameSlice reports whether two slices are the same memory.
func sameSlice(a, b []string) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0])
}
