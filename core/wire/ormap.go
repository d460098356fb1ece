package wire

import (
	"bytes"
	"unicode/utf8"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/msgval"
)

// ORRecord is one record of an OR-map: PROTOCOL 6.1. Record.Value is never empty:
// nil is a value like any other here.
type ORRecord struct {
	Tag    string
	Record lwwmap.Record
}

// OREntry is what is known of one key of an OR-map: the E of PROTOCOL 9.1.
// Entries of one frame with equal tombstones share one slice of them.
type OREntry struct {
	Key        string
	Records    []ORRecord
	Tombstones []string // tags
}

// ORMapMerkleReqBucket is ORMAP_MERKLE_REQ_BUCKET, from a client: PROTOCOL 9.1.
type ORMapMerkleReqBucket struct {
	MapName string
	Path    string // 0 to 3 lowercase hex digits
}

// ORMapPushDiff is ORMAP_PUSH_DIFF, from a client: PROTOCOL 9.2. Its records may
// be anybody's, so their stamps are not held to what clients stamp with.
type ORMapPushDiff struct {
	MapName string
	Entries []OREntry
	// Err says why keys, records or tags were left out of Entries: nothing could
	// name them in an answer, and the rest of the frame must not be lost with them.
	Err *Error
}

// ORMapDiffRequest is ORMAP_DIFF_REQUEST, from a client: PROTOCOL 9.1.
type ORMapDiffRequest struct {
	MapName string
	Keys    []string
}

// ClientApplyAck is CLIENT_APPLY_ACK, from a client: PROTOCOL 9.4.
type ClientApplyAck struct {
	Cursor uint64
}

// ORMapSyncRespRoot is ORMAP_SYNC_RESP_ROOT, from a server: PROTOCOL 9.1.
type ORMapSyncRespRoot struct {
	MapName   string
	RootHash  uint32
	Timestamp hlc.Timestamp
	// FullResync makes the client drop its copy of the map, and its pending
	// operations on it that are older than Timestamp (PROTOCOL 9.4). False is left
	// out.
	FullResync bool
}

// ORMapSyncRespBuckets is ORMAP_SYNC_RESP_BUCKETS, from a server. Which buckets
// it must and must not have says PROTOCOL 9.3.
type ORMapSyncRespBuckets struct {
	MapName string
	Path    string
	Buckets []Bucket
}

// ORMapSyncRespLeaf is ORMAP_SYNC_RESP_LEAF, from a server.
type ORMapSyncRespLeaf struct {
	MapName string
	Path    string
	Entries []OREntry
}

// ORMapDiffResponse is ORMAP_DIFF_RESPONSE, from a server.
type ORMapDiffResponse struct {
	MapName string
	Entries []OREntry
}

// Type implements Message.
func (m *ORMapMerkleReqBucket) Type() string { return "ORMAP_MERKLE_REQ_BUCKET" }

// AppendTo implements Message.
func (m *ORMapMerkleReqBucket) AppendTo(dst []byte) []byte {
	return appendBucketRequest(dst, m.Type(), m.MapName, m.Path)
}

// Type implements Message.
func (m *ORMapPushDiff) Type() string { return "ORMAP_PUSH_DIFF" }

// AppendTo implements Message.
func (m *ORMapPushDiff) AppendTo(dst []byte) []byte {
	dst = appendWrapped(dst, m.Type(), 2)
	dst = appendText(dst, "mapName", m.MapName)
	return appendEntries(dst, m.Entries)
}

// Type implements Message.
func (m *ORMapDiffRequest) Type() string { return "ORMAP_DIFF_REQUEST" }

// AppendTo implements Message.
func (m *ORMapDiffRequest) AppendTo(dst []byte) []byte {
	dst = appendWrapped(dst, m.Type(), 2)
	dst = appendText(dst, "mapName", m.MapName)
	return appendTexts(dst, "keys", m.Keys)
}

// Type implements Message.
func (m *ClientApplyAck) Type() string { return "CLIENT_APPLY_ACK" }

// AppendTo implements Message.
func (m *ClientApplyAck) AppendTo(dst []byte) []byte {
	return appendNumber(appendFlat(dst, m.Type(), 2), "cursor", m.Cursor)
}

// Type implements Message.
func (m *ORMapSyncRespRoot) Type() string { return "ORMAP_SYNC_RESP_ROOT" }

// AppendTo implements Message.
func (m *ORMapSyncRespRoot) AppendTo(dst []byte) []byte {
	dst = appendWrapped(dst, m.Type(), pairs(3, m.FullResync))
	dst = appendText(dst, "mapName", m.MapName)
	dst = appendNumber(dst, "rootHash", uint64(m.RootHash))
	dst = appendStamp(dst, "timestamp", m.Timestamp)
	if m.FullResync {
		dst = appendFlag(dst, "fullResync", true)
	}
	return dst
}

// Type implements Message.
func (m *ORMapSyncRespBuckets) Type() string { return "ORMAP_SYNC_RESP_BUCKETS" }

// AppendTo implements Message.
func (m *ORMapSyncRespBuckets) AppendTo(dst []byte) []byte {
	return appendBuckets(dst, m.Type(), m.MapName, m.Path, m.Buckets)
}

// Type implements Message.
func (m *ORMapSyncRespLeaf) Type() string { return "ORMAP_SYNC_RESP_LEAF" }

// AppendTo implements Message.
func (m *ORMapSyncRespLeaf) AppendTo(dst []byte) []byte {
	dst = appendWrapped(dst, m.Type(), 3)
	dst = appendText(dst, "mapName", m.MapName)
	dst = appendText(dst, "path", m.Path)
	return appendEntries(dst, m.Entries)
}

// Type implements Message.
func (m *ORMapDiffResponse) Type() string { return "ORMAP_DIFF_RESPONSE" }

// AppendTo implements Message.
func (m *ORMapDiffResponse) AppendTo(dst []byte) []byte {
	dst = appendWrapped(dst, m.Type(), 2)
	dst = appendText(dst, "mapName", m.MapName)
	return appendEntries(dst, m.Entries)
}

func appendEntries(dst []byte, entries []OREntry) []byte {
	dst = appendArray(dst, "entries", len(entries))
	for i := range entries {
		e := &entries[i]
		dst = msgval.AppendMapHeader(dst, 3)
		dst = appendText(dst, "key", e.Key)
		dst = appendArray(dst, "records", len(e.Records))
		for j := range e.Records {
			dst = appendORRecord(dst, e.Records[j].Tag, e.Records[j].Record)
		}
		dst = appendTexts(dst, "tombstones", e.Tombstones)
	}
	return dst
}

func appendORRecord(dst []byte, tag string, r lwwmap.Record) []byte {
	dst = msgval.AppendMapHeader(dst, pairs(3, hasTTL(r)))
	dst = appendRecordPairs(dst, r)
	return appendText(dst, "tag", tag)
}

func (d *decoder) orMapMerkleReqBucket() (Message, *Error) {
	m := new(ORMapMerkleReqBucket)
	return m, d.bucketRequest(&m.MapName, &m.Path)
}

func (d *decoder) orMapPushDiff() (Message, *Error) {
	m := new(ORMapPushDiff)
	err := d.fields("payload", func(key []byte) (err *Error) {
		switch string(key) {
		case "mapName":
			return d.readMapName(&m.MapName)
		case "entries":
			m.Entries, m.Err, err = d.pushedEntries()
			return err
		}
		d.skip()
		return nil
	})
	if err == nil {
		err = CheckMapName(m.MapName)
	}
	return m, err
}

func (d *decoder) orMapDiffRequest() (Message, *Error) {
	m := new(ORMapDiffRequest)
	err := d.fields("payload", func(key []byte) (err *Error) {
		switch string(key) {
		case "mapName":
			return d.readMapName(&m.MapName)
		case "keys":
			m.Keys, err = d.diffKeys()
			return err
		}
		d.skip()
		return nil
	})
	if err == nil {
		err = CheckMapName(m.MapName)
	}
	return m, err
}

func (d *decoder) diffKeys() ([]string, *Error) {
	n, ok := d.arrayHeader()
	switch {
	case !ok:
		return nil, badMessage("keys must be an array of strings")
	case n > d.lim.MaxDiffKeys:
		return nil, &Error{Name: TooManyOps, Code: 413, Text: "keys has too many elements; ask for them in parts"}
	}
	keys := make([]string, n)
	for i := range keys {
		key, ok := d.str()
		if !ok {
			return nil, badMessage("keys must be an array of strings")
		}
		if err := CheckKey(alias(key)); err != nil {
			return nil, err
		}
		keys[i] = string(key)
	}
	return keys, nil
}

func (d *decoder) clientApplyAck() (Message, *Error) {
	m := new(ClientApplyAck)
	err := d.fields("a frame", func(key []byte) *Error {
		if string(key) == "cursor" {
			return d.count("cursor", &m.Cursor)
		}
		d.skip()
		return nil
	})
	return m, err
}

func (d *decoder) orMapSyncRespRoot() (Message, *Error) {
	m := new(ORMapSyncRespRoot)
	stamped := false
	err := d.fields("payload", func(key []byte) (err *Error) {
		switch string(key) {
		case "mapName":
			return d.readMapName(&m.MapName)
		case "rootHash":
			return d.hash("rootHash", &m.RootHash)
		case "timestamp":
			stamped = true
			m.Timestamp, err = d.stamp()
			return err
		case "fullResync":
			return d.flag("fullResync", &m.FullResync)
		}
		d.skip()
		return nil
	})
	if err == nil && !stamped {
		err = noStamp()
	}
	return m, err
}

func (d *decoder) orMapSyncRespBuckets() (Message, *Error) {
	m := new(ORMapSyncRespBuckets)
	return m, d.bucketResponse((*SyncRespBuckets)(m))
}

func (d *decoder) orMapSyncRespLeaf() (Message, *Error) {
	m := new(ORMapSyncRespLeaf)
	err := d.fields("payload", func(key []byte) (err *Error) {
		switch string(key) {
		case "mapName":
			return d.readMapName(&m.MapName)
		case "path":
			return d.serverText("path", &m.Path)
		case "entries":
			m.Entries, err = d.serverEntries()
			return err
		}
		d.skip()
		return nil
	})
	return m, err
}

func (d *decoder) orMapDiffResponse() (Message, *Error) {
	m := new(ORMapDiffResponse)
	err := d.fields("payload", func(key []byte) (err *Error) {
		switch string(key) {
		case "mapName":
			return d.readMapName(&m.MapName)
		case "entries":
			m.Entries, err = d.serverEntries()
			return err
		}
		d.skip()
		return nil
	})
	return m, err
}

// entryState is what is known while entries of an OR-map are read.
type entryState struct {
	// pushed says that a client sent them. What must not be stored is left out then,
	// and refused is the first reason; leftOut counts keys and records.
	pushed  bool
	refused *Error
	leftOut int
	// The last list of tombstones, as its bytes and as tags. The TypeScript client
	// repeats all tombstones of the map in every entry.
	raw  []byte
	tags []string
}

// maxLeftOut bounds the keys and records that a client may push in vain in one
// frame: telling what is wrong with one costs more than sending it.
const maxLeftOut = 1000

// leaveOut notes why a key or a record is left out.
func (s *entryState) leaveOut(err *Error) *Error {
	if s.refused == nil {
		s.refused = err
	}
	if s.leftOut++; s.leftOut > maxLeftOut {
		return s.refused
	}
	return nil
}

// pushedEntries reads entries that a client sent, and returns why some of them
// are left out.
func (d *decoder) pushedEntries() (list []OREntry, refused, err *Error) {
	s := entryState{pushed: true}
	list, err = d.entries(&s)
	return list, s.refused, err
}

// serverEntries reads entries that a server sent.
func (d *decoder) serverEntries() ([]OREntry, *Error) {
	return d.entries(new(entryState))
}

func (d *decoder) entries(s *entryState) ([]OREntry, *Error) {
	n, ok := d.arrayHeader()
	if !ok {
		return nil, badMessage("entries must be an array")
	}
	const smallest = 1 + 4 + 2 // a map of a key of one byte
	list := make([]OREntry, 0, min(n, len(d.rest())/smallest))
	for range n {
		entry, keep, err := d.entry(s)
		if err != nil {
			return nil, err
		}
		if keep {
			list = append(list, entry)
		}
	}
	return list, nil
}

// entry reads an entry, and reports whether it can be kept.
func (d *decoder) entry(s *entryState) (entry OREntry, keep bool, err *Error) {
	var keyErr *Error
	hasKey := false
	err = d.fields("an element of entries", func(key []byte) (err *Error) {
		switch string(key) {
		case "key":
			hasKey = true
			entry.Key, keyErr, err = d.entryKey(s)
		case "records":
			entry.Records, err = d.orRecords(s)
		case "tombstones":
			entry.Tombstones, err = d.tombstones(s)
		default:
			d.skip()
		}
		return err
	})
	switch {
	case err != nil:
		return entry, false, err
	case !hasKey:
		return entry, false, badMessage("the key of an entry is missing; want a string")
	case keyErr != nil:
		return entry, false, s.leaveOut(keyErr)
	}
	return entry, true, nil
}

// entryKey reads the key of an entry, and returns why the entry must not be
// stored.
func (d *decoder) entryKey(s *entryState) (key string, refused, err *Error) {
	b, ok := d.str()
	switch {
	case !ok:
		return "", nil, badMessage("the key of an entry must be a string")
	case s.pushed:
		refused = CheckKey(alias(b))
	case len(b) > maxServerText:
		return "", nil, badMessage("the key of an entry is too long")
	}
	if refused != nil {
		return "", refused, nil
	}
	return string(b), nil, nil
}

// orRecords reads the records of an entry, or nil, which is none.
func (d *decoder) orRecords(s *entryState) ([]ORRecord, *Error) {
	if d.isNil() {
		return nil, nil
	}
	n, ok := d.arrayHeader()
	if !ok {
		return nil, badMessage("records must be an array")
	}
	const smallest = 1 + 10 + 26 + 4 + 2 // a map of a stamp and a tag
	list := make([]ORRecord, 0, min(n, len(d.rest())/smallest))
	for range n {
		var raw rawRecord
		err := d.record(&raw, orRecord)
		if err == nil && s.pushed {
			err = d.checkPushed(&raw)
		}
		if err == nil {
			list = append(list, ORRecord{Tag: string(raw.tag), Record: raw.Record})
			continue
		}
		if s.pushed {
			err = s.leaveOut(err)
		}
		if err != nil {
			return nil, err
		}
	}
	return list, nil
}

// checkPushed returns why a record that a client holds must not be stored.
func (d *decoder) checkPushed(r *rawRecord) *Error {
	if err := checkStoredNodeID(r.Timestamp.NodeID); err != nil {
		return err
	}
	if err := d.checkTag(r.tag); err != nil {
		return err
	}
	return d.checkValue(r.Value)
}

// tombstones reads an array of tags, or nil, which is none. The tags share one
// copy of the array's bytes, since there may be very many.
func (d *decoder) tombstones(s *entryState) ([]string, *Error) {
	from := d.pos
	raw := d.raw()
	if s.raw != nil && bytes.Equal(raw, s.raw) {
		return s.tags, nil
	}
	s.raw, s.tags = nil, nil
	if raw[0] == 0xc0 {
		return nil, nil
	}
	d.pos = from
	n, ok := d.arrayHeader()
	if !ok {
		return nil, badMessage("tombstones must be an array of strings")
	}
	text := string(raw)
	const smallest = 2 // the bytes of a tag that can be kept
	tags := make([]string, 0, min(n, len(raw)/smallest))
	for range n {
		tag, ok := d.str()
		if !ok {
			return nil, badMessage("tombstones must be an array of strings")
		}
		if s.pushed && !d.validTag(tag) {
			if s.refused == nil {
				s.refused = badTag()
			}
			continue
		}
		end := d.pos - from
		tags = append(tags, text[end-len(tag):end])
	}
	s.raw, s.tags = raw, tags
	return tags, nil
}

// checkTag returns why a client must not use this tag, or nil: it is a part of
// the identity of what is stored, and is sent back in msgpack or JSON.
func (d *decoder) checkTag(tag []byte) *Error {
	if !d.validTag(tag) {
		return badTag()
	}
	return nil
}

func (d *decoder) validTag(tag []byte) bool {
	return 0 < len(tag) && len(tag) <= d.lim.MaxTagBytes && bytes.IndexByte(tag, 0) < 0 && utf8.Valid(tag)
}

func badTag() *Error { return badMessage("a tag is 1 to 256 bytes of UTF-8 without NUL") }
