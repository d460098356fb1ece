package wire

import (
	"encoding/binary"
	"math"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/msgval"
)

// pairs counts the pairs of a map of which some are left out.
func pairs(always int, optional ...bool) int {
	for _, present := range optional {
		if present {
			always++
		}
	}
	return always
}

// appendFlat begins a frame whose fields lie next to its type, of n pairs with
// the type.
func appendFlat(dst []byte, typ string, n int) []byte {
	dst = msgval.AppendMapHeader(dst, n)
	return appendText(dst, "type", typ)
}

// appendWrapped begins a frame whose n fields lie in its payload.
func appendWrapped(dst []byte, typ string, n int) []byte {
	dst = appendFlat(dst, typ, 2)
	return appendMap(dst, "payload", n)
}

func appendText(dst []byte, key, v string) []byte {
	return msgval.AppendString(msgval.AppendString(dst, key), v)
}

func appendNumber(dst []byte, key string, v uint64) []byte {
	return msgval.AppendUint(msgval.AppendString(dst, key), v)
}

func appendFlag(dst []byte, key string, v bool) []byte {
	return msgval.AppendBool(msgval.AppendString(dst, key), v)
}

func appendMap(dst []byte, key string, n int) []byte {
	return msgval.AppendMapHeader(msgval.AppendString(dst, key), n)
}

func appendArray(dst []byte, key string, n int) []byte {
	return msgval.AppendArrayHeader(msgval.AppendString(dst, key), n)
}

func appendTexts(dst []byte, key string, list []string) []byte {
	dst = appendArray(dst, key, len(list))
	for _, s := range list {
		dst = msgval.AppendString(dst, s)
	}
	return dst
}

// appendRaw appends a value that is msgpack already; empty stands for nil.
func appendRaw(dst []byte, key string, v []byte) []byte {
	dst = msgval.AppendString(dst, key)
	if len(v) == 0 {
		return msgval.AppendNil(dst)
	}
	return append(dst, v...)
}

func appendStamp(dst []byte, key string, t hlc.Timestamp) []byte {
	dst = appendMap(dst, key, 3)
	dst = appendNumber(dst, "millis", t.Millis)
	dst = appendNumber(dst, "counter", t.Counter)
	return appendText(dst, "nodeId", t.NodeID)
}

// appendRecord appends a record under its key "record".
func appendRecord(dst []byte, r lwwmap.Record) []byte {
	return appendRecordPairs(appendMap(dst, "record", pairs(2, hasTTL(r))), r)
}

func appendRecordPairs(dst []byte, r lwwmap.Record) []byte {
	dst = appendRaw(dst, "value", r.Value)
	dst = appendStamp(dst, "timestamp", r.Timestamp)
	if hasTTL(r) {
		dst = appendNumber(dst, "ttlMs", r.TTLMillis)
	}
	return dst
}

func hasTTL(r lwwmap.Record) bool { return r.TTLMillis != 0 && !r.Deleted() }

// Type implements Message.
func (m *Auth) Type() string { return "AUTH" }

// AppendTo implements Message.
func (m *Auth) AppendTo(dst []byte) []byte {
	dst = appendFlat(dst, m.Type(), pairs(2, m.DeviceToken != "", m.ProtocolVersion != 0))
	dst = appendText(dst, "token", m.Token)
	if m.DeviceToken != "" {
		dst = appendText(dst, "deviceToken", m.DeviceToken)
	}
	if m.ProtocolVersion != 0 {
		dst = appendNumber(dst, "protocolVersion", m.ProtocolVersion)
	}
	return dst
}

// Type implements Message.
func (m *DeviceHello) Type() string { return "DEVICE_HELLO" }

// AppendTo implements Message.
func (m *DeviceHello) AppendTo(dst []byte) []byte {
	dst = appendFlat(dst, m.Type(), pairs(1, m.DeviceToken != ""))
	if m.DeviceToken != "" {
		dst = appendText(dst, "deviceToken", m.DeviceToken)
	}
	return dst
}

// Type implements Message.
func (m *Ping) Type() string { return "PING" }

// AppendTo implements Message.
func (m *Ping) AppendTo(dst []byte) []byte {
	dst = appendFlat(dst, m.Type(), pairs(1, m.Timestamp != nil))
	if m.Timestamp != nil {
		dst = appendRaw(dst, "timestamp", m.Timestamp)
	}
	return dst
}

// Type implements Message.
func (m *SyncInit) Type() string { return "SYNC_INIT" }

// AppendTo implements Message.
func (m *SyncInit) AppendTo(dst []byte) []byte {
	dst = appendFlat(dst, m.Type(), 3)
	dst = appendText(dst, "mapName", m.MapName)
	return appendNumber(dst, "lastSyncTimestamp", m.LastSyncTimestamp)
}

// Type implements Message.
func (m *MerkleReqBucket) Type() string { return "MERKLE_REQ_BUCKET" }

// AppendTo implements Message.
func (m *MerkleReqBucket) AppendTo(dst []byte) []byte {
	return appendBucketRequest(dst, m.Type(), m.MapName, m.Path)
}

func appendBucketRequest(dst []byte, typ, mapName, path string) []byte {
	dst = appendWrapped(dst, typ, 2)
	dst = appendText(dst, "mapName", mapName)
	return appendText(dst, "path", path)
}

// Type implements Message.
func (m *OpBatch) Type() string { return "OP_BATCH" }

// AppendTo implements Message.
func (m *OpBatch) AppendTo(dst []byte) []byte {
	dst = appendWrapped(dst, m.Type(), pairs(1, m.WriteConcern != "", m.TimeoutMillis != 0))
	dst = appendArray(dst, "ops", len(m.Ops))
	for i := range m.Ops {
		dst = m.Ops[i].appendTo(dst)
	}
	if m.WriteConcern != "" {
		dst = appendText(dst, "writeConcern", m.WriteConcern)
	}
	if m.TimeoutMillis != 0 {
		dst = appendNumber(dst, "timeout", m.TimeoutMillis)
	}
	return dst
}

func (op *Op) appendTo(dst []byte) []byte {
	// An OR_REMOVE has a tag in place of a record.
	dst = msgval.AppendMapHeader(dst, pairs(7, op.WriteConcern != ""))
	dst = appendText(dst, "mapName", op.MapName)
	dst = appendText(dst, "opType", op.Kind.String())
	dst = appendText(dst, "key", op.Key)
	switch op.Kind {
	case OpORRemove:
		dst = appendText(dst, "orTag", op.Tag)
	case OpORAdd:
		dst = appendORRecord(msgval.AppendString(dst, "orRecord"), op.Tag, op.Record)
	default:
		dst = appendRecord(dst, op.Record)
	}
	dst = appendStamp(dst, "timestamp", op.Record.Timestamp)
	dst = appendFlag(dst, "synced", false)
	dst = appendText(dst, "id", op.ID)
	if op.WriteConcern != "" {
		dst = appendText(dst, "writeConcern", op.WriteConcern)
	}
	return dst
}

// Type implements Message.
func (m *QuerySub) Type() string { return "QUERY_SUB" }

// AppendTo implements Message.
func (m *QuerySub) AppendTo(dst []byte) []byte {
	dst = appendWrapped(dst, m.Type(), pairs(3, m.Fields != nil))
	dst = appendText(dst, "queryId", m.QueryID)
	dst = appendText(dst, "mapName", m.MapName)
	dst = msgval.AppendString(dst, "query")
	if m.Query == nil {
		dst = msgval.AppendMapHeader(dst, 0)
	} else {
		dst = append(dst, m.Query...)
	}
	if m.Fields != nil {
		dst = appendTexts(dst, "fields", m.Fields)
	}
	return dst
}

// Type implements Message.
func (m *QueryUnsub) Type() string { return "QUERY_UNSUB" }

// AppendTo implements Message.
func (m *QueryUnsub) AppendTo(dst []byte) []byte {
	return appendText(appendWrapped(dst, m.Type(), 1), "queryId", m.QueryID)
}

// Type implements Message.
func (m *ORMapSyncInit) Type() string { return "ORMAP_SYNC_INIT" }

// AppendTo implements Message.
func (m *ORMapSyncInit) AppendTo(dst []byte) []byte {
	dst = appendFlat(dst, m.Type(), pairs(5, m.HasClaimedEpoch))
	dst = appendText(dst, "mapName", m.MapName)
	dst = appendNumber(dst, "rootHash", uint64(m.RootHash))
	dst = appendMap(dst, "bucketHashes", len(m.BucketHashes))
	for _, digit := range "0123456789abcdef" { // in a fixed order
		if h, ok := m.BucketHashes[string(digit)]; ok {
			dst = appendNumber(dst, string(digit), uint64(h))
		}
	}
	dst = appendNumber(dst, "lastSyncTimestamp", m.LastSyncTimestamp)
	if m.HasClaimedEpoch {
		dst = appendNumber(dst, "claimedEpoch", m.ClaimedEpoch)
	}
	return dst
}

// Type implements Message.
func (m *Other) Type() string { return m.TypeName }

// AppendTo appends the frame as it was decoded.
func (m *Other) AppendTo(dst []byte) []byte { return append(dst, m.Frame...) }

// Type implements Message.
func (m *AuthRequired) Type() string { return "AUTH_REQUIRED" }

// AppendTo implements Message.
func (m *AuthRequired) AppendTo(dst []byte) []byte { return appendFlat(dst, m.Type(), 1) }

// Type implements Message.
func (m *AuthAck) Type() string { return "AUTH_ACK" }

// AppendTo implements Message.
func (m *AuthAck) AppendTo(dst []byte) []byte {
	dst = appendFlat(dst, m.Type(), pairs(1, m.ProtocolVersion != 0, m.UserID != "", m.DeviceID != "", m.DeviceToken != ""))
	if m.ProtocolVersion != 0 {
		dst = appendNumber(dst, "protocolVersion", m.ProtocolVersion)
	}
	if m.UserID != "" {
		dst = appendText(dst, "userId", m.UserID)
	}
	return appendDevice(dst, m.DeviceID, m.DeviceToken)
}

func appendDevice(dst []byte, id, token string) []byte {
	if id != "" {
		dst = appendText(dst, "deviceId", id)
	}
	if token != "" {
		dst = appendText(dst, "deviceToken", token)
	}
	return dst
}

// Type implements Message.
func (m *AuthFail) Type() string { return "AUTH_FAIL" }

// AppendTo implements Message.
func (m *AuthFail) AppendTo(dst []byte) []byte {
	dst = appendFlat(dst, m.Type(), pairs(1, m.Error != "", m.Code != 0))
	if m.Error != "" {
		dst = appendText(dst, "error", m.Error)
	}
	if m.Code != 0 {
		dst = appendNumber(dst, "code", uint64(m.Code))
	}
	return dst
}

// Type implements Message.
func (m *DeviceAck) Type() string { return "DEVICE_ACK" }

// AppendTo implements Message.
func (m *DeviceAck) AppendTo(dst []byte) []byte {
	dst = appendFlat(dst, m.Type(), pairs(1, m.DeviceID != "", m.DeviceToken != ""))
	return appendDevice(dst, m.DeviceID, m.DeviceToken)
}

// Type implements Message.
func (m *Pong) Type() string { return "PONG" }

// AppendTo implements Message.
func (m *Pong) AppendTo(dst []byte) []byte {
	dst = appendFlat(dst, m.Type(), pairs(2, m.Timestamp != nil))
	if m.Timestamp != nil {
		dst = appendRaw(dst, "timestamp", m.Timestamp)
	}
	return appendNumber(dst, "serverTime", m.ServerTime)
}

// Type implements Message.
func (m *ErrorMessage) Type() string { return "ERROR" }

// AppendTo implements Message.
func (m *ErrorMessage) AppendTo(dst []byte) []byte {
	dst = appendWrapped(dst, m.Type(), pairs(2, m.Details != nil))
	dst = appendNumber(dst, "code", uint64(m.Code))
	dst = appendText(dst, "message", m.Message)
	if m.Details != nil {
		dst = appendRaw(dst, "details", m.Details)
	}
	return dst
}

// Type implements Message.
func (m *SyncRespRoot) Type() string { return "SYNC_RESP_ROOT" }

// AppendTo implements Message.
func (m *SyncRespRoot) AppendTo(dst []byte) []byte {
	dst = appendWrapped(dst, m.Type(), 3)
	dst = appendText(dst, "mapName", m.MapName)
	dst = appendNumber(dst, "rootHash", uint64(m.RootHash))
	return appendStamp(dst, "timestamp", m.Timestamp)
}

// Type implements Message.
func (m *SyncRespBuckets) Type() string { return "SYNC_RESP_BUCKETS" }

// AppendTo implements Message.
func (m *SyncRespBuckets) AppendTo(dst []byte) []byte {
	return appendBuckets(dst, m.Type(), m.MapName, m.Path, m.Buckets)
}

func appendBuckets(dst []byte, typ, mapName, path string, buckets []Bucket) []byte {
	dst = appendWrapped(dst, typ, 3)
	dst = appendText(dst, "mapName", mapName)
	dst = appendText(dst, "path", path)
	dst = appendMap(dst, "buckets", len(buckets))
	for _, b := range buckets {
		dst = append(dst, 0xa1, b.Digit) // a string of one byte
		dst = msgval.AppendUint(dst, uint64(b.Hash))
	}
	return dst
}

// Type implements Message.
func (m *SyncRespLeaf) Type() string { return typeSyncRespLeaf }

// AppendTo implements Message.
func (m *SyncRespLeaf) AppendTo(dst []byte) []byte {
	w := BeginLeaf(dst, m.MapName, m.Path)
	for i := range m.Records {
		w.Add(m.Records[i].Key, m.Records[i].Record)
	}
	return w.End()
}

// Type implements Message.
func (m *SyncResetRequired) Type() string { return "SYNC_RESET_REQUIRED" }

// AppendTo implements Message.
func (m *SyncResetRequired) AppendTo(dst []byte) []byte {
	dst = appendWrapped(dst, m.Type(), 2)
	dst = appendText(dst, "mapName", m.MapName)
	return appendText(dst, "reason", m.Reason)
}

// appendTimestamped begins a wrapped frame that may have a timestamp in its
// envelope: it lies before the payload, so that the payload is last.
func appendTimestamped(dst []byte, typ string, t hlc.Timestamp, n int) []byte {
	dst = appendFlat(dst, typ, pairs(2, !t.IsZero()))
	if !t.IsZero() {
		dst = appendStamp(dst, "timestamp", t)
	}
	return appendMap(dst, "payload", n)
}

// Type implements Message.
func (m *OpAck) Type() string { return "OP_ACK" }

// AppendTo implements Message.
func (m *OpAck) AppendTo(dst []byte) []byte {
	dst = appendTimestamped(dst, m.Type(), m.Timestamp, pairs(1, m.AchievedLevel != "", m.Results != nil))
	dst = appendText(dst, "lastId", m.LastID)
	if m.AchievedLevel != "" {
		dst = appendText(dst, "achievedLevel", m.AchievedLevel)
	}
	if m.Results != nil {
		dst = appendOpResults(dst, m.Results)
	}
	return dst
}

func appendOpResults(dst []byte, results []OpResult) []byte {
	dst = appendArray(dst, "results", len(results))
	for i := range results {
		r := &results[i]
		dst = msgval.AppendMapHeader(dst, pairs(2, r.AchievedLevel != "", r.Error != ""))
		dst = appendText(dst, "opId", r.OpID)
		dst = appendFlag(dst, "success", r.Success)
		if r.AchievedLevel != "" {
			dst = appendText(dst, "achievedLevel", r.AchievedLevel)
		}
		if r.Error != "" {
			dst = appendText(dst, "error", r.Error)
		}
	}
	return dst
}

// Type implements Message.
func (m *OpRejected) Type() string { return "OP_REJECTED" }

// AppendTo implements Message.
func (m *OpRejected) AppendTo(dst []byte) []byte {
	dst = appendWrapped(dst, m.Type(), pairs(2, m.Code != 0))
	dst = appendText(dst, "opId", m.OpID)
	dst = appendText(dst, "reason", m.Reason)
	if m.Code != 0 {
		dst = appendNumber(dst, "code", uint64(m.Code))
	}
	return dst
}

// Type implements Message.
func (m *ServerEvent) Type() string { return "SERVER_EVENT" }

// AppendTo implements Message.
func (m *ServerEvent) AppendTo(dst []byte) []byte {
	dst = appendTimestamped(dst, m.Type(), m.Timestamp, m.Event.pairs())
	return m.Event.appendPairs(dst)
}

// Type implements Message.
func (m *ServerBatchEvent) Type() string { return "SERVER_BATCH_EVENT" }

// AppendTo implements Message.
func (m *ServerBatchEvent) AppendTo(dst []byte) []byte {
	dst = appendTimestamped(dst, m.Type(), m.Timestamp, 1)
	dst = appendArray(dst, "events", len(m.Events))
	for i := range m.Events {
		e := &m.Events[i]
		dst = e.appendPairs(msgval.AppendMapHeader(dst, e.pairs()))
	}
	return dst
}

// pairs counts the fields: an OR_REMOVE has a tag in place of a record.
func (e *Event) pairs() int { return pairs(3, e.HasRecord || e.EventType == OpORRemove) }

func (e *Event) appendPairs(dst []byte) []byte {
	dst = appendText(dst, "mapName", e.MapName)
	dst = appendText(dst, "eventType", e.EventType.String())
	dst = appendText(dst, "key", e.Key)
	switch {
	case e.EventType == OpORRemove:
		return appendText(dst, "orTag", e.Tag)
	case !e.HasRecord:
		return dst
	case e.EventType == OpORAdd:
		return appendORRecord(msgval.AppendString(dst, "orRecord"), e.Tag, e.Record)
	}
	return appendRecord(dst, e.Record)
}

// Type implements Message.
func (m *GCPrune) Type() string { return "GC_PRUNE" }

// AppendTo implements Message.
func (m *GCPrune) AppendTo(dst []byte) []byte {
	return appendStamp(appendWrapped(dst, m.Type(), 1), "olderThan", m.OlderThan)
}

// Type implements Message.
func (m *QueryResp) Type() string { return "QUERY_RESP" }

// AppendTo implements Message.
func (m *QueryResp) AppendTo(dst []byte) []byte {
	dst = appendWrapped(dst, m.Type(), pairs(2, m.NextCursor != "", m.HasMore, m.CursorStatus != "", m.Error != "", m.Code != ""))
	dst = appendText(dst, "queryId", m.QueryID)
	dst = appendRows(dst, m.Results)
	if m.NextCursor != "" {
		dst = appendText(dst, "nextCursor", m.NextCursor)
	}
	if m.HasMore {
		dst = appendFlag(dst, "hasMore", true)
	}
	if m.CursorStatus != "" {
		dst = appendText(dst, "cursorStatus", m.CursorStatus)
	}
	if m.Error != "" {
		dst = appendText(dst, "error", m.Error)
	}
	if m.Code != "" {
		dst = appendText(dst, "code", m.Code)
	}
	return dst
}

// Type implements Message.
func (m *QueryUpdate) Type() string { return typeQueryUpdate }

// AppendTo implements Message.
func (m *QueryUpdate) AppendTo(dst []byte) []byte {
	return AppendQueryUpdateTail(appendQueryUpdateHead(dst, m.QueryID), m.Key, m.Value, m.ChangeType)
}

const typeQueryUpdate = "QUERY_UPDATE"

// AppendQueryUpdateTail appends what a QUERY_UPDATE is but for the id of the
// query: the same for every session that has the query. AppendQueryUpdate makes
// frames of it. An empty value stands for nil.
func AppendQueryUpdateTail(dst []byte, key string, value []byte, changeType string) []byte {
	dst = appendText(dst, "key", key)
	dst = appendRaw(dst, "value", value)
	return appendText(dst, "changeType", changeType)
}

// AppendQueryUpdate appends a QUERY_UPDATE frame with a tail that
// AppendQueryUpdateTail made.
func AppendQueryUpdate(dst []byte, queryID string, tail []byte) []byte {
	return append(appendQueryUpdateHead(dst, queryID), tail...)
}

func appendQueryUpdateHead(dst []byte, queryID string) []byte {
	return appendText(appendWrapped(dst, typeQueryUpdate, 4), "queryId", queryID)
}

// appendRows appends the rows of a query's result.
func appendRows(dst []byte, rows []KeyValue) []byte {
	dst = appendArray(dst, "results", len(rows))
	for i := range rows {
		dst = msgval.AppendMapHeader(dst, 2)
		dst = appendText(dst, "key", rows[i].Key)
		dst = appendRaw(dst, "value", rows[i].Value)
	}
	return dst
}

// Type implements Message.
func (m *Batch) Type() string { return typeBatch }

// AppendTo implements Message.
func (m *Batch) AppendTo(dst []byte) []byte {
	data := binary.LittleEndian.AppendUint32(nil, uint32(len(m.Messages)))
	for _, inner := range m.Messages {
		at := len(data)
		data = inner.AppendTo(append(data, 0, 0, 0, 0))
		binary.LittleEndian.PutUint32(data[at:], uint32(len(data)-at-4))
	}
	dst = appendBatchHead(dst, len(m.Messages))
	return msgval.AppendBin(msgval.AppendString(dst, "data"), data)
}

func appendBatchHead(dst []byte, count int) []byte {
	return appendNumber(appendFlat(dst, typeBatch, 3), "count", uint64(count))
}

const typeBatch = "BATCH"

// AppendBatch appends a BATCH frame of frames that are encoded already: PROTOCOL
// 2.4. None of them may be a BATCH.
func AppendBatch(dst []byte, frames ...[]byte) []byte {
	size := 4
	for _, f := range frames {
		size += 4 + len(f)
	}
	dst = appendBatchHead(dst, len(frames))
	dst = appendBinHeader(msgval.AppendString(dst, "data"), size)
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(frames)))
	for _, f := range frames {
		dst = binary.LittleEndian.AppendUint32(dst, uint32(len(f)))
		dst = append(dst, f...)
	}
	return dst
}

// appendBinHeader appends the head of a byte string of n bytes.
func appendBinHeader(dst []byte, n int) []byte {
	switch {
	case n <= math.MaxUint8:
		return append(dst, 0xc4, byte(n))
	case n <= math.MaxUint16:
		return append(dst, 0xc5, byte(n>>8), byte(n))
	}
	return binary.BigEndian.AppendUint32(append(dst, 0xc6), uint32(n))
}
