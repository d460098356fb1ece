package wire

import (
	"slices"
	"strings"

	"github.com/topgun-sync/topgun/core/msgval"
)

// AppendTo appends the request as msgpack.
func (r *SyncRequest) AppendTo(dst []byte) []byte {
	dst = msgval.AppendMapHeader(dst, pairs(2, r.Operations != nil, r.SyncMaps != nil, r.Queries != nil, r.Searches != nil))
	dst = appendText(dst, "clientId", r.ClientID)
	dst = appendStamp(dst, "clientHlc", r.ClientHLC)
	if r.Operations != nil {
		dst = appendArray(dst, "operations", len(r.Operations))
		for i := range r.Operations {
			dst = r.Operations[i].appendTo(dst)
		}
	}
	if r.SyncMaps != nil {
		dst = appendArray(dst, "syncMaps", len(r.SyncMaps))
		for i := range r.SyncMaps {
			m := &r.SyncMaps[i]
			dst = msgval.AppendMapHeader(dst, pairs(2, m.OR))
			dst = appendText(dst, "mapName", m.MapName)
			dst = appendStamp(dst, "lastSyncTimestamp", m.LastSync)
			if m.OR {
				dst = appendText(dst, "type", typeOR)
			}
		}
	}
	if r.Queries != nil {
		dst = appendArray(dst, "queries", len(r.Queries))
		for i := range r.Queries {
			dst = r.Queries[i].appendTo(dst)
		}
	}
	if r.Searches != nil {
		dst = appendArray(dst, "searches", len(r.Searches))
		for i := range r.Searches {
			dst = msgval.AppendMapHeader(dst, 3)
			dst = appendText(dst, "searchId", r.Searches[i].SearchID)
			dst = appendText(dst, "mapName", r.Searches[i].MapName)
			dst = appendText(dst, "query", r.Searches[i].Query)
		}
	}
	return dst
}

// typeOR is the type of a SyncMap that asks for an OR-map.
const typeOR = "OR"

func (q *HTTPQuery) appendTo(dst []byte) []byte {
	if len(q.Query) > 0 {
		return q.appendQuery(dst)
	}
	dst = msgval.AppendMapHeader(dst, pairs(2, q.Where != nil, q.Limit != 0, q.Offset != 0, q.Cursor != ""))
	dst = appendText(dst, "queryId", q.QueryID)
	dst = appendText(dst, "mapName", q.MapName)
	if q.Where != nil {
		dst = appendRaw(dst, "filter", q.Where)
	}
	return q.appendPage(dst)
}

// appendQuery appends an item with the fields of Query.
func (q *HTTPQuery) appendQuery(dst []byte) []byte {
	fields := reader{data: q.Query}
	n, _ := fields.mapHeader()
	dst = msgval.AppendMapHeader(dst, 2+n)
	dst = appendText(dst, "queryId", q.QueryID)
	dst = appendText(dst, "mapName", q.MapName)
	for range n {
		key, _ := fields.str()
		name := string(key)
		if name == "where" {
			name = "filter"
		}
		dst = appendRaw(dst, name, fields.raw())
	}
	return dst
}

// appendPage appends the fields that say which part of the rows is wanted.
func (q *HTTPQuery) appendPage(dst []byte) []byte {
	if q.Limit != 0 {
		dst = appendNumber(dst, "limit", q.Limit)
	}
	if q.Offset != 0 {
		dst = appendNumber(dst, "offset", q.Offset)
	}
	if q.Cursor != "" {
		dst = appendText(dst, "cursor", q.Cursor)
	}
	return dst
}

// AppendTo appends the response as msgpack.
func (r *SyncResponse) AppendTo(dst []byte) []byte {
	dst = msgval.AppendMapHeader(dst, pairs(1, r.Ack != nil, r.Deltas != nil, r.ORDeltas != nil, r.QueryResults != nil, r.SearchResults != nil, r.Errors != nil))
	dst = appendStamp(dst, "serverHlc", r.ServerHLC)
	if r.Ack != nil {
		dst = appendMap(dst, "ack", pairs(1, r.Ack.Results != nil))
		dst = appendText(dst, "lastId", r.Ack.LastID)
		if r.Ack.Results != nil {
			dst = appendOpResults(dst, r.Ack.Results)
		}
	}
	if r.Deltas != nil {
		dst = appendArray(dst, "deltas", len(r.Deltas))
		for i := range r.Deltas {
			dst = r.Deltas[i].appendTo(dst)
		}
	}
	if r.ORDeltas != nil {
		dst = appendArray(dst, "orDeltas", len(r.ORDeltas))
		for i := range r.ORDeltas {
			dst = r.ORDeltas[i].appendTo(dst)
		}
	}
	if r.QueryResults != nil {
		dst = appendArray(dst, "queryResults", len(r.QueryResults))
		for i := range r.QueryResults {
			dst = r.QueryResults[i].appendTo(dst)
		}
	}
	if r.SearchResults != nil {
		dst = appendArray(dst, "searchResults", len(r.SearchResults))
		for i := range r.SearchResults {
			dst = msgval.AppendMapHeader(dst, 2)
			dst = appendText(dst, "searchId", r.SearchResults[i].SearchID)
			dst = appendRows(dst, r.SearchResults[i].Results)
		}
	}
	if r.Errors != nil {
		dst = appendArray(dst, "errors", len(r.Errors))
		for i := range r.Errors {
			dst = r.Errors[i].appendTo(dst)
		}
	}
	return dst
}

func (m *Delta) appendTo(dst []byte) []byte {
	dst = msgval.AppendMapHeader(dst, pairs(3, m.HasMore))
	dst = appendText(dst, "mapName", m.MapName)
	dst = appendArray(dst, "records", len(m.Records))
	for i := range m.Records {
		r := &m.Records[i]
		kind := r.EventType
		if kind == 0 {
			kind = kindOfRecord(r.Record)
		}
		dst = msgval.AppendMapHeader(dst, 3)
		dst = appendText(dst, "key", r.Key)
		dst = appendRecord(dst, r.Record)
		dst = appendText(dst, "eventType", kind.String())
	}
	dst = appendStamp(dst, "serverSyncTimestamp", m.ServerSyncTimestamp)
	if m.HasMore {
		dst = appendFlag(dst, "hasMore", true)
	}
	return dst
}

func (m *ORDelta) appendTo(dst []byte) []byte {
	dst = msgval.AppendMapHeader(dst, pairs(3, m.HasMore))
	dst = appendText(dst, "mapName", m.MapName)
	dst = appendEntries(dst, m.Entries)
	dst = appendStamp(dst, "serverSyncTimestamp", m.ServerSyncTimestamp)
	if m.HasMore {
		dst = appendFlag(dst, "hasMore", true)
	}
	return dst
}

func (m *HTTPQueryResult) appendTo(dst []byte) []byte {
	dst = msgval.AppendMapHeader(dst, pairs(3, m.NextCursor != ""))
	dst = appendText(dst, "queryId", m.QueryID)
	dst = appendRows(dst, m.Results)
	dst = appendFlag(dst, "hasMore", m.HasMore)
	if m.NextCursor != "" {
		dst = appendText(dst, "nextCursor", m.NextCursor)
	}
	return dst
}

func (e *SyncError) appendTo(dst []byte) []byte {
	dst = msgval.AppendMapHeader(dst, pairs(2, e.Context != ""))
	dst = appendNumber(dst, "code", uint64(e.Code))
	dst = appendText(dst, "message", e.Message)
	if e.Context != "" {
		dst = appendText(dst, "context", e.Context)
	}
	return dst
}

// AppendJSON appends the response as JSON. A record or row that has no JSON form
// is left out, and an entry of errors with code 406 and its map or query as
// context says so.
func (r *SyncResponse) AppendJSON(dst []byte) []byte {
	if out, ok := msgval.AppendJSON(dst, r.AppendTo(nil)); ok {
		return out
	}
	if out, ok := msgval.AppendJSON(dst, r.jsonable().AppendTo(nil)); ok {
		return out
	}
	// What is left are texts that the caller made up of something else than what
	// the decoders accept.
	last := SyncResponse{ServerHLC: r.ServerHLC, Errors: []SyncError{{Code: 406, Message: noJSON}}}
	last.ServerHLC.NodeID = plainText(last.ServerHLC.NodeID)
	out, _ := msgval.AppendJSON(dst, last.AppendTo(nil))
	return out
}

const noJSON = "a value has no JSON form; ask for application/x-msgpack"

// plainText returns s without what has no JSON form.
func plainText(s string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(s, "\ufffd"), "\x00", "\ufffd")
}

// jsonable returns what of the response has a JSON form.
func (r *SyncResponse) jsonable() *SyncResponse {
	c := *r
	c.Errors = slices.Clone(r.Errors)
	for i := range c.Errors {
		c.Errors[i].Context = plainText(c.Errors[i].Context)
	}
	leftOut := func(context string) {
		c.Errors = append(c.Errors, SyncError{Code: 406, Message: noJSON, Context: context})
	}
	c.Deltas = slices.Clone(r.Deltas)
	for i := range c.Deltas {
		d := &c.Deltas[i]
		d.Records = slices.DeleteFunc(slices.Clone(d.Records), func(r DeltaRecord) bool {
			return !hasJSON(r.Key, r.Record.Value)
		})
		if len(d.Records) < len(r.Deltas[i].Records) {
			leftOut(d.MapName)
		}
	}
	c.ORDeltas = slices.Clone(r.ORDeltas)
	for i := range c.ORDeltas {
		if d := &c.ORDeltas[i]; d.jsonable() {
			leftOut(d.MapName)
		}
	}
	rows := func(context string, rows []KeyValue) []KeyValue {
		kept := slices.DeleteFunc(slices.Clone(rows), func(r KeyValue) bool { return !hasJSON(r.Key, r.Value) })
		if len(kept) < len(rows) {
			leftOut(context)
		}
		return kept
	}
	c.QueryResults = slices.Clone(r.QueryResults)
	for i := range c.QueryResults {
		q := &c.QueryResults[i]
		q.Results = rows(q.QueryID, q.Results)
	}
	c.SearchResults = slices.Clone(r.SearchResults)
	for i := range c.SearchResults {
		s := &c.SearchResults[i]
		s.Results = rows(s.SearchID, s.Results)
	}
	return &c
}

// jsonable replaces the entries by what of them has a JSON form, and reports
// whether something is left out.
func (m *ORDelta) jsonable() (leftOut bool) {
	all := m.Entries
	m.Entries = make([]OREntry, 0, len(all))
	for _, e := range all {
		if CheckKey(e.Key) != nil {
			leftOut = true
			continue
		}
		kept := OREntry{
			Key: e.Key,
			Records: slices.DeleteFunc(slices.Clone(e.Records), func(r ORRecord) bool {
				return !plain(r.Tag) || !hasJSON(e.Key, r.Record.Value)
			}),
			Tombstones: slices.DeleteFunc(slices.Clone(e.Tombstones), func(tag string) bool { return !plain(tag) }),
		}
		leftOut = leftOut || len(kept.Records) < len(e.Records) || len(kept.Tombstones) < len(e.Tombstones)
		m.Entries = append(m.Entries, kept)
	}
	return leftOut
}

// plain reports whether s has a JSON form.
func plain(s string) bool { return plainText(s) == s }

// hasJSON reports whether a key and a value have a JSON form.
func hasJSON(key string, value []byte) bool {
	if CheckKey(key) != nil {
		return false
	}
	if len(value) == 0 {
		return true
	}
	_, ok := msgval.AppendJSON(nil, value)
	return ok
}
