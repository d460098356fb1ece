package wire

import (
	"slices"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/msgval"
)

// DecodeSyncRequest reads a msgpack body. It accepts any bytes. An empty body is
// an empty request.
func DecodeSyncRequest(body []byte, lim Limits) (*SyncRequest, error) {
	if len(body) == 0 {
		return new(SyncRequest), nil
	}
	d := decoder{lim: lim}
	if err := d.open(body); err != nil {
		return nil, err
	}
	r, err := d.syncRequest()
	if err != nil {
		return nil, err
	}
	return r, nil
}

// DecodeSyncRequestJSON reads a JSON body with the same fields.
func DecodeSyncRequestJSON(body []byte, lim Limits) (*SyncRequest, error) {
	if len(body) == 0 {
		return new(SyncRequest), nil
	}
	packed, err := msgval.FromJSON(body)
	if err != nil {
		return nil, badMessage("the body must be one JSON text, nested at most 128 deep")
	}
	return DecodeSyncRequest(packed, lim)
}

func (d *decoder) syncRequest() (*SyncRequest, *Error) {
	r := new(SyncRequest)
	err := d.fields("the body", func(key []byte) (err *Error) {
		switch string(key) {
		case "clientId":
			return d.text("clientId", maxID, &r.ClientID)
		case "clientHlc":
			if r.ClientHLC = (hlc.Timestamp{}); !d.isNil() {
				r.ClientHLC, err = d.stamp()
			}
		case "operations":
			if r.Operations = nil; !d.isNil() {
				r.Operations, err = d.ops("operations")
			}
		case "syncMaps":
			r.SyncMaps, err = items(d, "syncMaps", d.syncMap)
		case "queries":
			r.Queries, err = items(d, "queries", d.httpQuery)
		case "searches":
			r.Searches, err = items(d, "searches", d.httpSearch)
		default:
			d.skip()
		}
		return err
	})
	return r, err
}

// items reads an array of at most MaxQueries elements, or nil, which is none.
func items[T any](d *decoder, field string, each func(*T) *Error) ([]T, *Error) {
	if d.isNil() {
		return nil, nil
	}
	if h, _ := msgval.ReadHead(d.rest()); h.Kind == msgval.ArrayKind && h.N > uint64(d.lim.MaxQueries) {
		return nil, &Error{Name: QueryTooComplex, Code: 413, Text: field + " has too many elements"}
	}
	return array(d, field, each)
}

func (d *decoder) syncMap(m *SyncMap) *Error {
	var typeErr, stampErr *Error
	err := d.fields("an element of syncMaps", func(key []byte) *Error {
		switch string(key) {
		case "mapName":
			return d.readMapName(&m.MapName)
		case "lastSyncTimestamp":
			if m.LastSync, stampErr = (hlc.Timestamp{}), nil; !d.isNil() {
				m.LastSync, stampErr = d.stamp()
			}
			return nil
		case "type":
			m.OR, typeErr = d.mapType()
			return nil
		}
		d.skip()
		return nil
	})
	switch {
	case typeErr != nil:
		m.Err = typeErr
	case stampErr != nil:
		m.Err = stampErr
	default:
		m.Err = CheckMapName(m.MapName)
	}
	return err
}

// mapType reads which map of a name is meant, or nil, which is the LWW-map.
func (d *decoder) mapType() (or bool, err *Error) {
	if d.isNil() {
		return false, nil
	}
	s, _ := d.str()
	if or = string(s) == typeOR; !or && string(s) != "LWW" {
		return false, badMessage("the type of a map must be OR or LWW")
	}
	return or, nil
}

func (d *decoder) httpQuery(q *HTTPQuery) *Error {
	var whereErr, countErr *Error
	var parts [len(queryParts)][]byte
	err := d.fields("an element of queries", func(key []byte) *Error {
		switch string(key) {
		case "queryId":
			return d.text("queryId", maxID, &q.QueryID)
		case "mapName":
			return d.readMapName(&q.MapName)
		case "filter":
			q.Where, whereErr = d.query("filter")
		case "limit":
			countErr = d.count("limit", &q.Limit)
		case "offset":
			countErr = d.count("offset", &q.Offset)
		case "cursor":
			return d.text("cursor", d.lim.MaxQueryBytes, &q.Cursor)
		default:
			if i := slices.Index(queryParts[:], string(key)); i >= 0 {
				parts[i] = d.orNil()
			} else {
				d.skip()
			}
		}
		return nil
	})
	switch {
	case err != nil:
		return err
	case !validID(q.QueryID):
		return badMessage("queryId must be a string of " + idRule)
	case whereErr != nil:
		q.Err = whereErr
	case countErr != nil:
		q.Err = countErr
	default:
		if q.Err = CheckMapName(q.MapName); q.Err == nil {
			q.Query, q.Err = d.queryOf(q, parts)
		}
	}
	return nil
}

// queryParts are the fields that an item of queries shares with the map Q of
// PROTOCOL 12.1 and that are passed on as they are. The filter is where in Q.
var queryParts = [...]string{"predicate", "sort", "fields", "groupBy", "aggregations"}

// queryOf builds the map Q that the item amounts to, nil for an empty one.
func (d *decoder) queryOf(q *HTTPQuery, parts [len(queryParts)][]byte) ([]byte, *Error) {
	n := pairs(0, q.Where != nil, q.Limit != 0, q.Offset != 0, q.Cursor != "")
	size := len(q.Where) + len(q.Cursor)
	for _, part := range parts {
		n += pairs(0, part != nil)
		size += len(part)
	}
	if n == 0 {
		return nil, nil
	}
	if size > d.lim.MaxQueryBytes { // not worth a copy
		return nil, queryTooComplex()
	}
	const names = 128 // what the names of the fields take, about
	b := msgval.AppendMapHeader(make([]byte, 0, size+names), n)
	if q.Where != nil {
		b = appendRaw(b, "where", q.Where)
	}
	for i, part := range parts {
		if part != nil {
			b = appendRaw(b, queryParts[i], part)
		}
	}
	b = q.appendPage(b)
	if len(b) > d.lim.MaxQueryBytes || d.tooDeep(b) {
		return nil, queryTooComplex()
	}
	return b, nil
}

func (d *decoder) httpSearch(s *HTTPSearch) *Error {
	return d.fields("an element of searches", func(key []byte) *Error {
		switch string(key) {
		case "searchId":
			return d.text("searchId", maxID, &s.SearchID)
		case "mapName":
			return d.readMapName(&s.MapName)
		case "query":
			return d.text("query", d.lim.MaxQueryBytes, &s.Query)
		}
		d.skip()
		return nil
	})
}

// DecodeSyncResponse reads a msgpack response, for clients. It accepts any
// bytes.
func DecodeSyncResponse(body []byte) (*SyncResponse, error) {
	d := decoder{lim: serverLimits()}
	if err := d.open(body); err != nil {
		return nil, err
	}
	r, err := d.syncResponse()
	if err != nil {
		return nil, err
	}
	return r, nil
}

func (d *decoder) syncResponse() (*SyncResponse, *Error) {
	r := new(SyncResponse)
	stamped := false
	err := d.fields("the body", func(key []byte) (err *Error) {
		if string(key) != "serverHlc" && d.isNil() {
			return nil
		}
		switch string(key) {
		case "serverHlc":
			stamped = true
			r.ServerHLC, err = d.stamp()
		case "ack":
			r.Ack = new(SyncAck)
			err = d.syncAck(r.Ack)
		case "deltas":
			r.Deltas, err = array(d, "deltas", d.delta)
		case "orDeltas":
			r.ORDeltas, err = array(d, "orDeltas", d.orDelta)
		case "queryResults":
			r.QueryResults, err = array(d, "queryResults", d.httpQueryResult)
		case "searchResults":
			r.SearchResults, err = array(d, "searchResults", d.httpSearchResult)
		case "errors":
			r.Errors, err = array(d, "errors", d.syncError)
		default:
			d.skip()
		}
		return err
	})
	if err == nil && !stamped {
		err = badMessage("serverHlc is missing; want a map of millis, counter and nodeId")
	}
	return r, err
}

func (d *decoder) syncAck(a *SyncAck) *Error {
	return d.fields("ack", func(key []byte) (err *Error) {
		switch string(key) {
		case "lastId":
			return d.serverText("lastId", &a.LastID)
		case "results":
			a.Results, err = d.opResults()
			return err
		}
		d.skip()
		return nil
	})
}

func (d *decoder) delta(m *Delta) *Error {
	return d.fields("an element of deltas", func(key []byte) (err *Error) {
		switch string(key) {
		case "mapName":
			return d.readMapName(&m.MapName)
		case "records":
			m.Records, err = array(d, "records", d.deltaRecord)
			return err
		case "serverSyncTimestamp":
			m.ServerSyncTimestamp, err = d.stamp()
			return err
		case "hasMore":
			return d.flag("hasMore", &m.HasMore)
		}
		d.skip()
		return nil
	})
}

func (d *decoder) orDelta(m *ORDelta) *Error {
	return d.fields("an element of orDeltas", func(key []byte) (err *Error) {
		switch string(key) {
		case "mapName":
			return d.readMapName(&m.MapName)
		case "entries":
			m.Entries, err = d.serverEntries()
			return err
		case "serverSyncTimestamp":
			m.ServerSyncTimestamp, err = d.stamp()
			return err
		case "hasMore":
			return d.flag("hasMore", &m.HasMore)
		}
		d.skip()
		return nil
	})
}

func (d *decoder) deltaRecord(m *DeltaRecord) *Error {
	has := false
	err := d.fields("an element of records", func(key []byte) *Error {
		switch string(key) {
		case "key":
			return d.serverText("key", &m.Key)
		case "record":
			has = true
			return d.serverRecord(&m.Record)
		case "eventType":
			kind, err := d.bytes("eventType")
			m.EventType = kindOf(kind)
			return err
		}
		d.skip()
		return nil
	})
	if err == nil && !has {
		err = badMessage("record is missing; want a map")
	}
	if m.EventType == 0 {
		m.EventType = kindOfRecord(m.Record)
	}
	return err
}

// kindOfRecord returns the kind of the change that left this record.
func kindOfRecord(r lwwmap.Record) OpKind {
	if r.Deleted() {
		return OpRemove
	}
	return OpPut
}

func (d *decoder) httpQueryResult(m *HTTPQueryResult) *Error {
	return d.fields("an element of queryResults", func(key []byte) (err *Error) {
		switch string(key) {
		case "queryId":
			return d.serverText("queryId", &m.QueryID)
		case "results":
			m.Results, err = array(d, "results", d.keyValue)
			return err
		case "hasMore":
			return d.flag("hasMore", &m.HasMore)
		case "nextCursor":
			return d.serverText("nextCursor", &m.NextCursor)
		}
		d.skip()
		return nil
	})
}

func (d *decoder) httpSearchResult(m *HTTPSearchResult) *Error {
	return d.fields("an element of searchResults", func(key []byte) (err *Error) {
		switch string(key) {
		case "searchId":
			return d.serverText("searchId", &m.SearchID)
		case "results":
			m.Results, err = array(d, "results", d.keyValue)
			return err
		}
		d.skip()
		return nil
	})
}

func (d *decoder) syncError(m *SyncError) *Error {
	return d.fields("an element of errors", func(key []byte) *Error {
		switch string(key) {
		case "code":
			return d.status(&m.Code)
		case "message":
			return d.serverText("message", &m.Message)
		case "context":
			return d.serverText("context", &m.Context)
		}
		d.skip()
		return nil
	})
}
