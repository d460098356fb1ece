package client

import (
	"context"
	"errors"
	"iter"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/merkle"
	"github.com/topgun-sync/topgun/core/msgval"
	"github.com/topgun-sync/topgun/core/wire"
)

// maxValue is the largest value a server takes (RELIABILITY 3).
const maxValue = 256 << 10

// Map is the local replica of one LWW-map. Its methods may be called
// concurrently. Values that it returns must not be changed.
type Map struct {
	client *Client
	name   string
	err    error // why the map cannot be written or synced; nil for a good name

	// The client's lock guards what follows.
	records  map[string]lwwmap.Record
	leaves   merkle.Leaves
	watchers map[*watcher]struct{}

	walk     walk
	initSent bool          // SYNC_INIT went out on this connection
	synced   bool          // the replica has been equal to the server's on this connection
	lastSync uint64        // server time, in ms, up to which it is known to have been in sync
	cursor   hlc.Timestamp // opaque position in the server's changes, for POST /sync
}

// Change is one change of a record of a map.
type Change struct {
	Key string
	// Record is the record after the change; it may be a tombstone.
	Record lwwmap.Record
	// Local is true if this client wrote it.
	Local bool
}

func newMap(c *Client, name string) *Map {
	return &Map{
		client:   c,
		name:     name,
		records:  make(map[string]lwwmap.Record),
		watchers: make(map[*watcher]struct{}),
	}
}

// Name returns the name of the map.
func (m *Map) Name() string { return m.name }

// Get returns the value of a key as nil, bool, int64, uint64, float64, string,
// []byte, []any or map[string]any. It returns false if the key has no value, or
// the value has expired, or it has no such form.
func (m *Map) Get(key string) (any, bool) {
	raw, ok := m.GetRaw(key)
	if !ok {
		return nil, false
	}
	v, err := DecodeValue(raw)
	return v, err == nil
}

// GetRaw returns the value of a key as msgpack.
func (m *Map) GetRaw(key string) ([]byte, bool) {
	m.client.mu.Lock()
	defer m.client.mu.Unlock()
	r, ok := m.records[key]
	if !ok || !r.VisibleAt(m.nowMillis()) {
		return nil, false
	}
	return r.Value, true
}

// Record returns the record of a key, which may be a tombstone or expired.
func (m *Map) Record(key string) (lwwmap.Record, bool) {
	m.client.mu.Lock()
	defer m.client.mu.Unlock()
	r, ok := m.records[key]
	return r, ok
}

// Set writes a value: nil excepted, anything that EncodeValue takes.
func (m *Map) Set(key string, value any) error { return m.SetTTL(key, value, 0) }

// SetTTL writes a value that is visible for ttl from now. 0 means for ever;
// otherwise ttl is at least a millisecond, and rounded down to milliseconds.
func (m *Map) SetTTL(key string, value any, ttl time.Duration) error {
	raw, err := EncodeValue(value)
	if err != nil {
		return err
	}
	return m.setRaw(key, raw, ttl)
}

// SetRaw writes a value that is encoded already: exactly one msgpack value, not
// nil. The map keeps it; the caller must not change it afterwards.
func (m *Map) SetRaw(key string, value []byte) error {
	if rest, err := msgval.Check(value); err != nil {
		return err
	} else if len(rest) != 0 {
		return errors.New("value is followed by other bytes; want exactly one msgpack value")
	}
	return m.setRaw(key, value, 0)
}

func (m *Map) setRaw(key string, value []byte, ttl time.Duration) error {
	switch {
	case len(value) > maxValue:
		return errors.New("value is larger than 256 KiB")
	case isNil(value):
		return errors.New("value is nil, which on the wire is a deletion; use Delete")
	case ttl < 0 || ttl > 0 && ttl < time.Millisecond:
		return errors.New("ttl is neither 0 nor at least a millisecond")
	}
	return m.write(key, wire.OpPut, lwwmap.Record{Value: value, TTLMillis: uint64(ttl.Milliseconds())})
}

// Delete writes a tombstone for the key, whether or not it has a value.
func (m *Map) Delete(key string) error {
	return m.write(key, wire.OpRemove, lwwmap.Record{})
}

func (m *Map) write(key string, kind wire.OpKind, record lwwmap.Record) error {
	if m.err != nil {
		return m.err
	}
	if err := wire.CheckKey(key); err != nil {
		return err
	}
	m.client.mu.Lock()
	defer m.client.mu.Unlock()
	return m.client.write(m, key, kind, record)
}

// All returns the visible values, sorted by key, as they were at the call.
func (m *Map) All() iter.Seq2[string, any] {
	now := m.now()
	records := m.snapshot()
	return func(yield func(string, any) bool) {
		for _, key := range slices.Sorted(maps.Keys(records)) {
			if r := records[key]; r.VisibleAt(now) {
				v, err := DecodeValue(r.Value)
				if err == nil && !yield(key, v) {
					return
				}
			}
		}
	}
}

// Records returns all records, sorted by key, tombstones and expired ones
// included, as they were at the call.
func (m *Map) Records() iter.Seq2[string, lwwmap.Record] {
	records := m.snapshot()
	return func(yield func(string, lwwmap.Record) bool) {
		for _, key := range slices.Sorted(maps.Keys(records)) {
			if !yield(key, records[key]) {
				return
			}
		}
	}
}

// Len returns the number of visible values.
func (m *Map) Len() int {
	m.client.mu.Lock()
	defer m.client.mu.Unlock()
	now := m.nowMillis()
	n := 0
	for _, r := range m.records {
		if r.VisibleAt(now) {
			n++
		}
	}
	return n
}

// Root returns the root hash of the replica's Merkle tree (PROTOCOL 7). Equal
// maps have equal roots; the converse holds but for 32-bit collisions, see Digest.
func (m *Map) Root() uint32 {
	m.client.mu.Lock()
	defer m.client.mu.Unlock()
	return merkle.NewTree(&m.leaves, merkle.Mixed).Root()
}

// Digest returns the SHA-256 of the content: keys, values, stamps, tombstones.
func (m *Map) Digest() [32]byte {
	var content lwwmap.Map
	for key, r := range m.snapshot() {
		content.Merge(key, r)
	}
	return content.Digest()
}

// WaitSynced waits until the replica has been equal to the server's on the
// current connection, apart from writes the server has not taken yet.
func (m *Map) WaitSynced(ctx context.Context) error {
	if m.err != nil {
		return m.err
	}
	return m.client.await(ctx, func() bool { return m.synced })
}

func (m *Map) now() uint64 {
	m.client.mu.Lock()
	defer m.client.mu.Unlock()
	return m.nowMillis()
}

func (m *Map) nowMillis() uint64 {
	return uint64(max(0, m.client.cfg.Now().UnixMilli()))
}

func (m *Map) snapshot() map[string]lwwmap.Record {
	m.client.mu.Lock()
	defer m.client.mu.Unlock()
	return maps.Clone(m.records)
}

// What follows is called with the client's lock held.

// put stores a record, whatever was there.
func (m *Map) put(key string, r lwwmap.Record, local bool) {
	m.forget(key)
	m.records[key] = r
	m.leaves.Add(leafOf(key), merkle.ItemHash(key, r.Timestamp), merkle.Mixed)
	for w := range m.watchers {
		w.add(Change{Key: key, Record: r, Local: local})
	}
}

// forget drops the record of a key as if it had never been there.
func (m *Map) forget(key string) {
	if old, ok := m.records[key]; ok {
		m.leaves.Remove(leafOf(key), merkle.ItemHash(key, old.Timestamp), merkle.Mixed)
		delete(m.records, key)
	}
}

func leafOf(key string) int { return merkle.Leaf(merkle.Hash(key)) }

// merge takes in a record of the server (PROTOCOL 5.2) and reports whether the
// map has changed. The record may alias a frame.
func (m *Map) merge(key string, r lwwmap.Record) bool {
	m.client.observe(r.Timestamp)
	var local *lwwmap.Record
	if l, ok := m.records[key]; ok {
		local = &l
	}
	if lwwmap.Decide(local, r) != lwwmap.Applied {
		return false
	}
	r.Value = slices.Clone(r.Value)
	m.put(key, r, false)
	return true
}

// event takes in a record that the server sent as an event. Where a merge takes
// the later stamp, an event may also carry an earlier one that the server gave to
// a write of ours which was stamped too far ahead; it is adopted, or the replicas
// would differ until real time has caught up (PROTOCOL 5.2, 22.4).
//
// The original client adopts whatever has an equal value. That is too much: an
// event of another client's earlier write of the same value would put our later
// one back, which the server keeps. Only a write of this client that is further
// ahead than a server allows can have been restamped, and a sync afterwards
// proves the guess.
func (m *Map) event(key string, r lwwmap.Record) {
	if m.merge(key, r) {
		return
	}
	local := m.records[key]
	drift := uint64(hlc.MaxDrift.Milliseconds())
	if local.Timestamp.NodeID != m.client.cfg.NodeID ||
		local.Timestamp.Millis <= saturatingAdd(r.Timestamp.Millis, drift) ||
		!equalValues(local, r) {
		return
	}
	r.Value = local.Value
	m.put(key, r, false)
	m.resync()
}

// undo takes back a local write that the server refused. What the server has is
// fetched by the sync that follows.
func (m *Map) undo(key string, written lwwmap.Record) {
	if m.records[key].Timestamp == written.Timestamp {
		m.forget(key)
	}
	m.resync()
}

// reset drops everything but the writes that the server has not answered
// (PROTOCOL 8.4).
func (m *Map) reset() {
	clear(m.records)
	m.leaves = merkle.Leaves{}
	m.lastSync = 0
	for _, op := range m.client.ops.pending {
		if op.MapName == m.name {
			m.put(op.Key, op.Record, true)
		}
	}
	m.resync()
}

// resync makes the connection sync the map from the start.
func (m *Map) resync() {
	m.initSent = false
	m.synced = false
	m.walk = walk{}
	m.cursor = hlc.Timestamp{}
	m.client.wakeUp()
}

// disconnected forgets what belongs to a connection. The cursor of POST /sync
// does not: it is good on any connection.
func (m *Map) disconnected() {
	m.initSent = false
	m.synced = false
	m.walk = walk{}
}

// syncedAt records that the replica was equal to the server's at a server time,
// in milliseconds.
func (m *Map) syncedAt(millis uint64) {
	m.lastSync = max(m.lastSync, millis)
	if !m.synced {
		m.synced = true
		m.client.notify()
	}
}

// stillSynced records the server's time of a later message. A map that was equal
// before has had every event since, but for those on their way; servers allow for
// them, and a wrong time costs a walk, never data.
func (m *Map) stillSynced(at hlc.Timestamp) {
	if m.synced {
		m.lastSync = max(m.lastSync, at.Millis)
	}
}

func equalValues(a, b lwwmap.Record) bool {
	if a.Deleted() || b.Deleted() {
		return a.Deleted() == b.Deleted()
	}
	return msgval.Equal(a.Value, b.Value)
}

func saturatingAdd(a, b uint64) uint64 {
	if a > math.MaxUint64-b {
		return math.MaxUint64
	}
	return a + b
}
