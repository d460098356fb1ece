package wire

import (
	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
)

// SyncRequest is the body of POST /sync: PROTOCOL 17.1.
type SyncRequest struct {
	ClientID   string
	ClientHLC  hlc.Timestamp // zero: not said
	Operations []Op
	SyncMaps   []SyncMap
	Queries    []HTTPQuery
	Searches   []HTTPSearch
}

// SyncMap asks for the changes of a map.
type SyncMap struct {
	MapName string
	// OR asks for the OR-map of this name: the field type is "OR". The protocol has
	// no such field, and without it the LWW-map is meant.
	OR bool
	// LastSync is the cursor of the last response, opaque to the client; the
	// zero stamp asks for everything.
	LastSync hlc.Timestamp
	// Err says why this map must be refused.
	Err *Error
}

// HTTPQuery is a query that is answered once.
type HTTPQuery struct {
	QueryID string
	MapName string
	// Query is the msgpack map Q of PROTOCOL 12.1 that the item amounts to: its filter
	// (as where), predicate, sort, fields, groupBy, aggregations, limit, offset and
	// cursor, as far as it has them; nil: none of them. It does not alias the frame.
	// When it is encoded, the fields below count only if Query is nil.
	Query  []byte
	Where  []byte // msgpack map, the filter; nil: all records
	Limit  uint64 // 0: not said
	Offset uint64
	Cursor string
	// Err says why this query must be refused. QueryID is known.
	Err *Error
}

// HTTPSearch is a search that is answered once. No search is served; the ids are
// for the refusal.
type HTTPSearch struct {
	SearchID string
	MapName  string
	Query    string
}

// SyncResponse is the answer to POST /sync: PROTOCOL 17.2.
type SyncResponse struct {
	ServerHLC     hlc.Timestamp
	Ack           *SyncAck
	Deltas        []Delta
	ORDeltas      []ORDelta // orDeltas, which the protocol does not have
	QueryResults  []HTTPQueryResult
	SearchResults []HTTPSearchResult
	Errors        []SyncError
}

// SyncAck acknowledges operations as OpAck does.
type SyncAck struct {
	LastID  string
	Results []OpResult
}

// Delta is the changes of one map since its cursor.
type Delta struct {
	MapName string
	Records []DeltaRecord
	// ServerSyncTimestamp is the next cursor.
	ServerSyncTimestamp hlc.Timestamp
	// HasMore says that the next request with this cursor brings more at once.
	// The TypeScript client does not look at it.
	HasMore bool
}

// DeltaRecord is one changed record.
type DeltaRecord struct {
	Key       string
	Record    lwwmap.Record
	EventType OpKind // OpPut or OpRemove; 0 when encoded: by the record
}

// ORDelta is the changes of one OR-map since its cursor, for clients that asked
// with SyncMap.OR. It has the entries that changed, merged by the client as those
// of a leaf are (PROTOCOL 6.2); the other fields are those of Delta.
type ORDelta struct {
	MapName             string
	Entries             []OREntry
	ServerSyncTimestamp hlc.Timestamp
	HasMore             bool
}

// HTTPQueryResult answers an HTTPQuery.
type HTTPQueryResult struct {
	QueryID    string
	Results    []KeyValue
	HasMore    bool
	NextCursor string // empty: left out
}

// HTTPSearchResult answers an HTTPSearch.
type HTTPSearchResult struct {
	SearchID string
	Results  []KeyValue
}

// SyncError is the failure of one item of the request.
type SyncError struct {
	Code    int
	Message string
	Context string // what it is about: a map name or an id; empty: left out
}
