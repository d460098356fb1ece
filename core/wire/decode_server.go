package wire

import (
	"encoding/binary"
	"math"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/msgval"
)

// DecodeServer reads a frame that a server sent. It accepts any bytes. The
// messages of a BATCH are decoded too. Types that have no struct are *Other.
func DecodeServer(frame []byte) (Message, error) {
	m, err := decodeServer(frame, true)
	if err != nil {
		return nil, err
	}
	return m, nil
}

func decodeServer(frame []byte, batchAllowed bool) (Message, *Error) {
	d := decoder{lim: serverLimits()}
	env, err := d.openFrame(frame)
	if err != nil {
		return nil, err
	}
	switch string(env.typ) {
	case "AUTH_REQUIRED":
		return new(AuthRequired), nil
	case "AUTH_ACK":
		return d.authAck()
	case "AUTH_FAIL":
		return d.authFail()
	case "DEVICE_ACK":
		return d.deviceAck()
	case "PONG":
		return d.pong()
	case typeBatch:
		if !batchAllowed {
			return nil, badMessage("a BATCH must not be within a BATCH")
		}
		return d.batch()
	case "ERROR":
		return payload(&d, env, d.errorMessage)
	case "SYNC_RESP_ROOT":
		return payload(&d, env, d.syncRespRoot)
	case "SYNC_RESP_BUCKETS":
		return payload(&d, env, d.syncRespBuckets)
	case "SYNC_RESP_LEAF":
		return payload(&d, env, d.syncRespLeaf)
	case "SYNC_RESET_REQUIRED":
		return payload(&d, env, d.syncResetRequired)
	case "OP_ACK":
		m := new(OpAck)
		return timestamped(&d, env, m, &m.Timestamp, func() *Error { return d.opAck(m) })
	case "OP_REJECTED":
		return payload(&d, env, d.opRejected)
	case "SERVER_EVENT":
		m := new(ServerEvent)
		return timestamped(&d, env, m, &m.Timestamp, func() *Error { return d.event(&m.Event) })
	case "SERVER_BATCH_EVENT":
		m := new(ServerBatchEvent)
		return timestamped(&d, env, m, &m.Timestamp, func() *Error { return d.batchEvent(m) })
	case "QUERY_RESP":
		return payload(&d, env, d.queryResp)
	case typeQueryUpdate:
		return payload(&d, env, d.queryUpdate)
	case "GC_PRUNE":
		return payload(&d, env, d.gcPrune)
	}
	return d.serverShared(env, frame)
}

// serverShared decodes what is of OR-maps, topics, counters, locks, the journal
// and the cluster mode.
func (d *decoder) serverShared(env envelope, frame []byte) (Message, *Error) {
	switch string(env.typ) {
	case "ORMAP_SYNC_RESP_ROOT":
		return payload(d, env, d.orMapSyncRespRoot)
	case "ORMAP_SYNC_RESP_BUCKETS":
		return payload(d, env, d.orMapSyncRespBuckets)
	case "ORMAP_SYNC_RESP_LEAF":
		return payload(d, env, d.orMapSyncRespLeaf)
	case "ORMAP_DIFF_RESPONSE":
		return payload(d, env, d.orMapDiffResponse)
	case "TOPIC_MESSAGE":
		return payload(d, env, d.topicMessage)
	case "COUNTER_RESPONSE":
		m := new(CounterResponse)
		return payload(d, env, func() (Message, *Error) { return m, d.counter(&m.Name, &m.State) })
	case "COUNTER_UPDATE":
		m := new(CounterUpdate)
		return payload(d, env, func() (Message, *Error) { return m, d.counter(&m.Name, &m.State) })
	case "LOCK_GRANTED":
		return payload(d, env, d.lockGranted)
	case "LOCK_RELEASED":
		return payload(d, env, d.lockReleased)
	case "JOURNAL_READ_RESPONSE":
		return d.journalReadResponse()
	case "JOURNAL_EVENT":
		return d.journalEvent()
	case typePartitionMap:
		outside := *d
		if m, err := payload(d, env, d.partitionMap); m != nil || err != nil {
			return m, err
		}
		return outside.other(env, frame)
	}
	return d.other(env, frame)
}

// timestamped decodes the payload into m by decode, and the stamp of the
// envelope (PROTOCOL 2.8). A timestamp that is no stamp is ignored, as the
// TypeScript client does.
func timestamped(d *decoder, env envelope, m Message, into *hlc.Timestamp, decode func() *Error) (Message, *Error) {
	if env.timestamp.data != nil {
		d.reader = env.timestamp
		if t, err := d.stamp(); err == nil {
			*into = t
		}
	}
	return payload(d, env, func() (Message, *Error) { return m, decode() })
}

// The bounds of what servers send. They are wide, since a client that refuses a
// frame of its server can do nothing but lose it.
const maxServerText = 1 << 20

// serverLimits returns what a client holds its server to.
func serverLimits() Limits {
	lim := DefaultLimits()
	lim.MaxCounterNodes = math.MaxInt // the size of the frame is bound enough
	return lim
}

func (d *decoder) serverText(field string, into *string) *Error {
	return d.text(field, maxServerText, into)
}

// status reads the field code, which is HTTP-like, or nil, which is 0.
func (d *decoder) status(into *int) *Error {
	var n uint64
	err := d.count("code", &n)
	if err == nil && n > 1<<31-1 {
		return badMessage("code is too large")
	}
	*into = int(n)
	return err
}

func (d *decoder) authAck() (Message, *Error) {
	m := new(AuthAck)
	err := d.fields("a frame", func(key []byte) *Error {
		switch string(key) {
		case "protocolVersion":
			return d.count("protocolVersion", &m.ProtocolVersion)
		case "userId":
			return d.serverText("userId", &m.UserID)
		case "deviceId":
			return d.serverText("deviceId", &m.DeviceID)
		case "deviceToken":
			return d.serverText("deviceToken", &m.DeviceToken)
		}
		d.skip()
		return nil
	})
	return m, err
}

func (d *decoder) authFail() (Message, *Error) {
	m := new(AuthFail)
	err := d.fields("a frame", func(key []byte) *Error {
		switch string(key) {
		case "error":
			return d.serverText("error", &m.Error)
		case "code":
			return d.status(&m.Code)
		}
		d.skip()
		return nil
	})
	return m, err
}

func (d *decoder) deviceAck() (Message, *Error) {
	m := new(DeviceAck)
	err := d.fields("a frame", func(key []byte) *Error {
		switch string(key) {
		case "deviceId":
			return d.serverText("deviceId", &m.DeviceID)
		case "deviceToken":
			return d.serverText("deviceToken", &m.DeviceToken)
		}
		d.skip()
		return nil
	})
	return m, err
}

func (d *decoder) pong() (Message, *Error) {
	m := new(Pong)
	err := d.fields("a frame", func(key []byte) *Error {
		switch string(key) {
		case "timestamp":
			from := d.pos
			if _, _, _, ok := d.number(); !ok {
				return badMessage("timestamp must be a number")
			}
			m.Timestamp = d.since(from)
			return nil
		case "serverTime":
			return d.count("serverTime", &m.ServerTime)
		}
		d.skip()
		return nil
	})
	return m, err
}

// batch reads data: a count, and for each message its length and its bytes, all
// numbers being little-endian uint32 (PROTOCOL 2.4).
func (d *decoder) batch() (Message, *Error) {
	var data []byte
	err := d.fields("a frame", func(key []byte) *Error {
		if string(key) != "data" {
			d.skip()
			return nil
		}
		v := d.raw()
		h, _ := msgval.ReadHead(v)
		if h.Kind != msgval.BinKind {
			return badMessage("data must be a byte string")
		}
		data = v[h.Size:]
		return nil
	})
	if err != nil {
		return nil, err
	}
	lies := badMessage("the counts and lengths in data do not fit its size")
	if len(data) < 4 {
		return nil, lies
	}
	const smallest = 4 + 1 // a length and a byte
	count := uint64(binary.LittleEndian.Uint32(data))
	data = data[4:]
	if count*smallest > uint64(len(data)) {
		return nil, lies
	}
	m := &Batch{Messages: make([]Message, 0, count)}
	for range count {
		if len(data) < 4 {
			return nil, lies
		}
		size := uint64(binary.LittleEndian.Uint32(data))
		data = data[4:]
		if size > uint64(len(data)) {
			return nil, lies
		}
		inner, err := decodeServer(data[:size:size], false)
		if err != nil {
			return nil, err
		}
		m.Messages = append(m.Messages, inner)
		data = data[size:]
	}
	if len(data) != 0 {
		return nil, lies
	}
	return m, nil
}

func (d *decoder) errorMessage() (Message, *Error) {
	m := new(ErrorMessage)
	err := d.fields("payload", func(key []byte) *Error {
		switch string(key) {
		case "code":
			return d.status(&m.Code)
		case "message":
			return d.serverText("message", &m.Message)
		case "details":
			m.Details = d.orNil()
			return nil
		}
		d.skip()
		return nil
	})
	return m, err
}

func (d *decoder) syncRespRoot() (Message, *Error) {
	m := new(SyncRespRoot)
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
		}
		d.skip()
		return nil
	})
	if err == nil && !stamped {
		err = noStamp()
	}
	return m, err
}

func (d *decoder) syncRespBuckets() (Message, *Error) {
	m := new(SyncRespBuckets)
	return m, d.bucketResponse(m)
}

func (d *decoder) bucketResponse(m *SyncRespBuckets) *Error {
	return d.fields("payload", func(key []byte) *Error {
		switch string(key) {
		case "mapName":
			return d.readMapName(&m.MapName)
		case "path":
			return d.serverText("path", &m.Path)
		case "buckets":
			m.Buckets = nil
			return d.fields("buckets", func(digit []byte) *Error {
				if len(digit) != 1 || !hexDigit(digit[0]) {
					return badMessage("the keys of buckets must be lowercase hex digits")
				}
				b := Bucket{Digit: digit[0]}
				err := d.hash("buckets", &b.Hash)
				// Of equal digits the last wins; there are 16 at most.
				for i := range m.Buckets {
					if m.Buckets[i].Digit == b.Digit {
						m.Buckets[i] = b
						return err
					}
				}
				m.Buckets = append(m.Buckets, b)
				return err
			})
		}
		d.skip()
		return nil
	})
}

func hexDigit(c byte) bool { return '0' <= c && c <= '9' || 'a' <= c && c <= 'f' }

// array reads an array of maps. each is called with every index after the array
// has been made, and reads one element.
func array[T any](d *decoder, field string, each func(*T) *Error) ([]T, *Error) {
	n, ok := d.arrayHeader()
	if !ok {
		return nil, badMessage(field + " must be an array")
	}
	// An element announced is a byte of the frame at least, but an element here
	// is larger: what is not there must not be paid for in advance.
	var list []T
	for range n {
		var e T
		if err := each(&e); err != nil {
			return nil, err
		}
		list = append(list, e)
	}
	return list, nil
}

func (d *decoder) syncRespLeaf() (Message, *Error) {
	m := new(SyncRespLeaf)
	err := d.fields("payload", func(key []byte) (err *Error) {
		switch string(key) {
		case "mapName":
			return d.readMapName(&m.MapName)
		case "path":
			return d.serverText("path", &m.Path)
		case "records":
			m.Records, err = array(d, "records", d.keyedRecord)
			return err
		}
		d.skip()
		return nil
	})
	return m, err
}

func (d *decoder) keyedRecord(into *KeyedRecord) *Error {
	has := false
	err := d.fields("an element of records", func(key []byte) *Error {
		switch string(key) {
		case "key":
			return d.serverText("key", &into.Key)
		case "record":
			has = true
			return d.serverRecord(&into.Record)
		}
		d.skip()
		return nil
	})
	if err == nil && !has {
		err = badMessage("record is missing; want a map")
	}
	return err
}

func (d *decoder) syncResetRequired() (Message, *Error) {
	m := new(SyncResetRequired)
	err := d.fields("payload", func(key []byte) *Error {
		switch string(key) {
		case "mapName":
			return d.readMapName(&m.MapName)
		case "reason":
			return d.serverText("reason", &m.Reason)
		}
		d.skip()
		return nil
	})
	return m, err
}

func (d *decoder) opAck(m *OpAck) *Error {
	return d.fields("payload", func(key []byte) (err *Error) {
		switch string(key) {
		case "lastId":
			return d.serverText("lastId", &m.LastID)
		case "achievedLevel":
			return d.serverText("achievedLevel", &m.AchievedLevel)
		case "results":
			m.Results, err = d.opResults()
			return err
		}
		d.skip()
		return nil
	})
}

// opResults reads the results of an acknowledgement, or nil, which is none.
func (d *decoder) opResults() ([]OpResult, *Error) {
	if d.isNil() {
		return nil, nil
	}
	return array(d, "results", func(r *OpResult) *Error {
		return d.fields("an element of results", func(key []byte) *Error {
			switch string(key) {
			case "opId":
				return d.serverText("opId", &r.OpID)
			case "success":
				v, ok := d.bool()
				r.Success = v
				if !ok {
					return badMessage("success must be a bool")
				}
				return nil
			case "achievedLevel":
				return d.serverText("achievedLevel", &r.AchievedLevel)
			case "error":
				return d.serverText("error", &r.Error)
			}
			d.skip()
			return nil
		})
	})
}

func (d *decoder) opRejected() (Message, *Error) {
	m := new(OpRejected)
	err := d.fields("payload", func(key []byte) *Error {
		switch string(key) {
		case "opId":
			return d.serverText("opId", &m.OpID)
		case "reason":
			return d.serverText("reason", &m.Reason)
		case "code":
			return d.status(&m.Code)
		}
		d.skip()
		return nil
	})
	return m, err
}

func (d *decoder) batchEvent(m *ServerBatchEvent) *Error {
	return d.fields("payload", func(key []byte) (err *Error) {
		if string(key) == "events" {
			m.Events, err = array(d, "events", d.event)
			return err
		}
		d.skip()
		return nil
	})
}

func (d *decoder) event(m *Event) *Error {
	var or rawRecord
	var orTag string
	hasOR := false
	err := d.fields("an event", func(key []byte) *Error {
		switch string(key) {
		case "mapName":
			return d.readMapName(&m.MapName)
		case "eventType":
			kind, err := d.bytes("eventType")
			m.EventType = kindOf(kind)
			return err
		case "key":
			return d.serverText("key", &m.Key)
		case "record":
			m.Record = lwwmap.Record{}
			m.HasRecord = !d.isNil()
			if !m.HasRecord {
				return nil
			}
			return d.serverRecord(&m.Record)
		case "orRecord":
			if hasOR = !d.isNil(); !hasOR {
				return nil
			}
			return d.record(&or, orRecord)
		case "orTag":
			return d.serverText("orTag", &orTag)
		}
		d.skip()
		return nil
	})
	switch {
	case err != nil:
		return err
	case m.EventType == 0:
		return badMessage("eventType must be PUT, REMOVE, OR_ADD or OR_REMOVE")
	case m.EventType == OpORAdd:
		if !hasOR {
			return badMessage("orRecord is missing; want a map")
		}
		m.Record, m.HasRecord, m.Tag = or.Record, true, string(or.tag)
	case m.EventType == OpORRemove:
		if orTag == "" {
			return badMessage("orTag is missing; want the tag of the record to remove")
		}
		m.Record, m.HasRecord, m.Tag = lwwmap.Record{}, false, orTag
	}
	return nil
}

func (d *decoder) gcPrune() (Message, *Error) {
	m := new(GCPrune)
	stamped := false
	err := d.fields("payload", func(key []byte) (err *Error) {
		if string(key) == "olderThan" {
			stamped = true
			m.OlderThan, err = d.stamp()
			return err
		}
		d.skip()
		return nil
	})
	if err == nil && !stamped {
		err = badMessage("olderThan is missing; want a map of millis, counter and nodeId")
	}
	return m, err
}

func (d *decoder) queryResp() (Message, *Error) {
	m := new(QueryResp)
	err := d.fields("payload", func(key []byte) (err *Error) {
		switch string(key) {
		case "queryId":
			return d.serverText("queryId", &m.QueryID)
		case "results":
			m.Results, err = array(d, "results", d.keyValue)
			return err
		case "nextCursor":
			return d.serverText("nextCursor", &m.NextCursor)
		case "hasMore":
			return d.flag("hasMore", &m.HasMore)
		case "cursorStatus":
			return d.serverText("cursorStatus", &m.CursorStatus)
		case "error":
			return d.serverText("error", &m.Error)
		case "code":
			return d.serverText("code", &m.Code)
		}
		d.skip()
		return nil
	})
	return m, err
}

func (d *decoder) queryUpdate() (Message, *Error) {
	m := new(QueryUpdate)
	err := d.fields("payload", func(key []byte) *Error {
		switch string(key) {
		case "queryId":
			return d.serverText("queryId", &m.QueryID)
		case "key":
			return d.serverText("key", &m.Key)
		case "value":
			m.Value = d.orNil()
			return nil
		case "changeType":
			return d.serverText("changeType", &m.ChangeType)
		}
		d.skip()
		return nil
	})
	if err == nil && m.ChangeType != "ENTER" && m.ChangeType != "UPDATE" && m.ChangeType != "LEAVE" {
		err = badMessage("changeType must be ENTER, UPDATE or LEAVE")
	}
	return m, err
}

// flag reads a bool, or nil, which is false.
func (d *decoder) flag(field string, into *bool) *Error {
	*into = false
	if d.isNil() {
		return nil
	}
	v, ok := d.bool()
	if !ok {
		return badMessage(field + " must be a bool")
	}
	*into = v
	return nil
}

func (d *decoder) keyValue(into *KeyValue) *Error {
	return d.fields("an element of results", func(key []byte) *Error {
		switch string(key) {
		case "key":
			return d.serverText("key", &into.Key)
		case "value":
			into.Value = d.orNil()
			return nil
		}
		d.skip()
		return nil
	})
}
