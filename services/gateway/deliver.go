package gateway

import (
	"github.com/gobwas/ws"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/wire"
)

// kinds is a set of kinds of maps.
type kinds uint8

func setOf(of ...mapKind) (set kinds) {
	for _, k := range of {
		set |= 1 << k
	}
	return set
}

func (set kinds) has(k mapKind) bool { return set&(1<<k) != 0 }

// change is one change of a map, as the fanout stream brings it.
type change struct {
	of      mapKind
	key     string
	tag     string
	record  lwwmap.Record
	arrival hlc.Timestamp
	origin  string
}

// event is the change as a client is told of it. An OR-map's tombstone is that of a tag.
func (c *change) event(name string) wire.Event {
	e := wire.Event{MapName: name, Key: c.key, Record: c.record, HasRecord: true, Tag: c.tag}
	e.EventType = eventType(c.of, c.record)
	e.HasRecord = e.EventType != wire.OpORRemove
	return e
}

// eventType is what a record, or a tag, that became so is called in an event.
func eventType(of mapKind, r lwwmap.Record) wire.OpKind {
	switch {
	case of == kindOR && r.Deleted():
		return wire.OpORRemove
	case of == kindOR:
		return wire.OpORAdd
	case r.Deleted():
		return wire.OpRemove
	default:
		return wire.OpPut
	}
}

// eventOverhead is about what an event's frame takes beside the names, key and value.
const eventOverhead = 224

// delivery is the changes of one commit in one map on their way to sessions. Frames are
// encoded when the first session needs them, and shared by all.
type delivery struct {
	h       *hub
	name    string
	changes []change
	of      kinds               // of the changes
	origins map[string]struct{} // the sessions that made some of them

	whole  []byte // all changes, in as few frames as can be; nil until needed
	frames int    // in whole
	apart  []byte // each change in a frame of its own; nil until needed
	ends   []int  // where each of them ends in apart
}

// deliver hands the changes of one commit to the sessions of their map. They are
// encoded once, and all sessions share the bytes. Most get all of them, in one frame if
// they are several. A session does not get its own changes, nor those of a kind that it
// does not look at, so it gets the runs of single frames between them. Nothing here
// waits for a session.
func (h *hub) deliver(name string, changes []change) {
	h.mu.Lock()
	defer h.mu.Unlock()
	t := h.maps[name]
	if t == nil || len(t.sessions) == 0 || len(changes) == 0 {
		return
	}
	d := &delivery{h: h, name: name, changes: changes, origins: make(map[string]struct{}, 1)}
	for i := range changes {
		d.of |= setOf(changes[i].of)
		if origin := changes[i].origin; origin != "" {
			d.origins[origin] = struct{}{}
		}
	}
	// Writers start after everything is queued, so that one write takes all of it.
	var woken []*session
	for s, looks := range t.sessions {
		if looks&d.of == 0 {
			continue
		}
		s.mu.Lock()
		frames := d.giveLocked(s, t, looks)
		s.mu.Unlock()
		if frames > 0 {
			woken = append(woken, s)
			s.k.meters.delivered(frames)
		}
	}
	for _, s := range woken {
		s.mu.Lock()
		s.startWriterLocked()
		s.mu.Unlock()
	}
}

// giveLocked queues for a session what concerns it, and returns in how many frames;
// s.mu and hub.mu are held.
func (d *delivery) giveLocked(s *session, t *watched, looks kinds) (frames int) {
	_, own := d.origins[s.origin]
	if !own && d.of&^looks == 0 || d.of == setOf(kindCounter) && !d.allOwn(s.origin) {
		if s.deliverLocked(t, d.together()) {
			return d.frames
		}
		return 0
	}
	if d.of == setOf(kindCounter) {
		return 0
	}
	skip := func(i int) bool { return d.changes[i].origin == s.origin || !looks.has(d.changes[i].of) }
	for first := 0; first < len(d.changes); {
		if skip(first) {
			first++
			continue
		}
		last := first
		for last < len(d.changes) && !skip(last) {
			last++
		}
		run, ends := d.single()
		begin := 0
		if first > 0 {
			begin = ends[first-1]
		}
		if s.deliverLocked(t, run[begin:ends[last-1]:ends[last-1]]) {
			frames += last - first
		}
		first = last
	}
	return frames
}

func (d *delivery) allOwn(origin string) bool {
	for i := range d.changes {
		if d.changes[i].origin != origin {
			return false
		}
	}
	return true
}

// size is about what changes take in frames.
func (d *delivery) size(changes []change) (n int) {
	for i := range changes {
		c := &changes[i]
		n += eventOverhead + len(d.name) + len(c.key) + len(c.tag) + len(c.record.Value)
	}
	return n
}

// together returns all changes in as few frames as can be.
func (d *delivery) together() []byte {
	if d.whole != nil {
		return d.whole
	}
	if d.of == setOf(kindCounter) {
		d.append(&d.whole, counterUpdate(d.name, d.changes))
		d.frames = 1
		return d.whole
	}
	if len(d.changes) == 1 {
		d.whole, _ = d.single()
		d.frames = 1
		return d.whole
	}
	d.whole = make([]byte, 0, d.size(d.changes))
	for rest := d.changes; len(rest) > 0; d.frames++ {
		batch := &wire.ServerBatchEvent{Events: make([]wire.Event, 0, len(rest))}
		n := 0
		for size := 0; n < len(rest) && size < pushBytes; n++ {
			size += d.size(rest[n : n+1])
			batch.Events = append(batch.Events, rest[n].event(d.name))
		}
		batch.Timestamp = envelopeTime(&rest[n-1])
		rest = rest[n:]
		d.append(&d.whole, batch)
	}
	return d.whole
}

// single returns each change in a frame of its own, and where each of them ends.
func (d *delivery) single() ([]byte, []int) {
	if d.apart != nil {
		return d.apart, d.ends
	}
	d.apart = make([]byte, 0, d.size(d.changes))
	d.ends = make([]int, len(d.changes))
	for i := range d.changes {
		c := &d.changes[i]
		d.append(&d.apart, &wire.ServerEvent{Event: c.event(d.name), Timestamp: envelopeTime(c)})
		d.ends[i] = len(d.apart)
	}
	return d.apart, d.ends
}

// envelopeTime is the clock reading that a client gets with a change.
func envelopeTime(c *change) hlc.Timestamp {
	return hlc.Timestamp{Millis: c.arrival.Millis, Counter: c.arrival.Counter, NodeID: serverNode}
}

// append adds a frame, by way of the hub's scratch buffer.
func (d *delivery) append(frames *[]byte, m wire.Message) {
	d.h.chunk = m.AppendTo(d.h.chunk[:0])
	*frames = appendFrame(*frames, ws.OpBinary, d.h.chunk)
	if cap(d.h.chunk) > keepEncodeBuffer {
		d.h.chunk = nil
	}
}
