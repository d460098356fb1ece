package wire

import (
	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/core/msgval"
)

// Message is one frame of either direction. Messages are used by pointer:
// DecodeClient and DecodeServer return *Auth, *OpBatch and so on.
type Message interface {
	// Type is the value of the frame's field "type".
	Type() string
	// AppendTo appends the frame, in minimal msgpack.
	AppendTo(dst []byte) []byte
}

// Auth is AUTH, from a client: PROTOCOL 3.1.
type Auth struct {
	Token           string // empty: none
	DeviceToken     string // empty: none
	ProtocolVersion uint64 // 0: not said
}

// DeviceHello is DEVICE_HELLO, from a client that has no token: PROTOCOL 3.1.
type DeviceHello struct {
	DeviceToken string // empty: none
}

// Ping is PING, from a client: PROTOCOL 2.5.
type Ping struct {
	// Timestamp is a msgpack number, the client's wall clock in ms, or nil if
	// the frame has none. See PingAt.
	Timestamp []byte
}

// SyncInit is SYNC_INIT, from a client: PROTOCOL 8.1.
type SyncInit struct {
	MapName           string
	LastSyncTimestamp uint64 // Unix ms; 0: never synced
}

// MerkleReqBucket is MERKLE_REQ_BUCKET, from a client: PROTOCOL 8.1.
type MerkleReqBucket struct {
	MapName string
	Path    string // 0 to 3 lowercase hex digits
}

// OpBatch is OP_BATCH, from a client: PROTOCOL 10.2. A CLIENT_OP is decoded to an
// OpBatch of one operation.
type OpBatch struct {
	Ops           []Op
	WriteConcern  string // one of the levels of PROTOCOL 10.7, or empty: not said
	TimeoutMillis uint64 // 0: not said
}

// OpKind says what an operation does. The zero value is not valid.
type OpKind uint8

// The kinds of operations: PROTOCOL 10.1.
const (
	OpPut OpKind = iota + 1
	OpRemove
	OpORAdd
	OpORRemove
)

// String returns the name on the wire.
func (k OpKind) String() string {
	switch k {
	case OpPut:
		return "PUT"
	case OpRemove:
		return "REMOVE"
	case OpORAdd:
		return "OR_ADD"
	case OpORRemove:
		return "OR_REMOVE"
	}
	return "INVALID"
}

// Op is one operation: PROTOCOL 10.1.
type Op struct {
	ID      string
	MapName string
	Key     string
	Kind    OpKind
	// Record is what OpPut and OpRemove write. Of OpORAdd it holds value, stamp and
	// ttl, and the value is never empty: nil is one too. Of OpORRemove it holds
	// the stamp of the removal.
	Record lwwmap.Record
	// Tag is the tag that an OR kind adds or removes.
	Tag          string
	WriteConcern string // as in OpBatch, for this operation
	// Err says why this operation must be refused. ID is known; other fields are
	// as far as they could be read.
	Err *Error
}

// QuerySub is QUERY_SUB, from a client: PROTOCOL 12.1.
type QuerySub struct {
	QueryID string
	MapName string
	Query   []byte   // the msgpack map Q of PROTOCOL 12.1
	Fields  []string // the projection beside the query; Query may have one too
	// Err says why the query must be refused. QueryID is known.
	Err *Error
}

// QueryUnsub is QUERY_UNSUB, from a client.
type QueryUnsub struct {
	QueryID string
}

// ORMapSyncInit is ORMAP_SYNC_INIT, from a client: PROTOCOL 9.1. It is evidence
// of how the client combines hashes (PROTOCOL 7.7).
type ORMapSyncInit struct {
	MapName           string
	RootHash          uint32
	BucketHashes      map[string]uint32 // hex digit to hash
	LastSyncTimestamp uint64
	ClaimedEpoch      uint64
	HasClaimedEpoch   bool
}

// Other is a frame that has no struct: of a type that is not served, or of no
// known type. It holds what a refusal has to name; what the frame does not
// have is empty.
type Other struct {
	TypeName       string
	RequestID      string
	QueryID        string
	SubscriptionID string
	ID             string
	MapName        string
	Frame          []byte // the whole frame
}

// AuthRequired is AUTH_REQUIRED, from a server: PROTOCOL 3.1.
type AuthRequired struct{}

// AuthAck is AUTH_ACK, from a server. Empty and 0 fields are left out.
type AuthAck struct {
	ProtocolVersion uint64
	UserID          string
	DeviceID        string
	DeviceToken     string
}

// AuthFail is AUTH_FAIL, from a server. Empty and 0 fields are left out.
type AuthFail struct {
	Error string
	Code  int
}

// DeviceAck is DEVICE_ACK, from a server. Empty fields are left out.
type DeviceAck struct {
	DeviceID    string
	DeviceToken string
}

// Pong is PONG, from a server: PROTOCOL 2.5.
type Pong struct {
	Timestamp  []byte // that of the Ping, byte for byte
	ServerTime uint64 // Unix ms
}

// ErrorMessage is ERROR, from a server: PROTOCOL 19.1.
type ErrorMessage struct {
	Code    int
	Message string
	Details []byte // one msgpack value; nil: left out
}

// SyncRespRoot is SYNC_RESP_ROOT, from a server: PROTOCOL 8.1.
type SyncRespRoot struct {
	MapName   string
	RootHash  uint32
	Timestamp hlc.Timestamp
}

// Bucket is one child of a node of a Merkle tree.
type Bucket struct {
	Digit byte // lowercase hex digit as ASCII
	Hash  uint32
}

// SyncRespBuckets is SYNC_RESP_BUCKETS, from a server.
type SyncRespBuckets struct {
	MapName string
	Path    string
	Buckets []Bucket
}

// KeyedRecord is a record with its key.
type KeyedRecord struct {
	Key    string
	Record lwwmap.Record
}

// SyncRespLeaf is SYNC_RESP_LEAF, from a server. See LeafWriter for a way to
// write one without a slice of records.
type SyncRespLeaf struct {
	MapName string
	Path    string
	Records []KeyedRecord
}

// SyncResetRequired is SYNC_RESET_REQUIRED, from a server: PROTOCOL 8.4.
type SyncResetRequired struct {
	MapName string
	Reason  string
}

// OpResult is the fate of one operation in an OpAck.
type OpResult struct {
	OpID          string
	Success       bool
	AchievedLevel string // empty: left out
	Error         string // empty: left out
}

// OpAck is OP_ACK, from a server: PROTOCOL 10.4. LastID must be a decimal number;
// any other makes clients drop everything that is pending.
type OpAck struct {
	LastID        string
	AchievedLevel string // empty: left out
	Results       []OpResult
	Timestamp     hlc.Timestamp // of the envelope (PROTOCOL 2.8); zero: left out
}

// OpRejected is OP_REJECTED, from a server: PROTOCOL 10.5.
type OpRejected struct {
	OpID   string
	Reason string
	Code   int // 0: left out
}

// Event is one change of a map as PROTOCOL 11.1 has it.
type Event struct {
	MapName   string
	EventType OpKind
	Key       string
	// Record is the record after the change. OpORAdd has always one; OpORRemove
	// has none, and a REMOVE of some servers has none either: then HasRecord is
	// false.
	Record    lwwmap.Record
	HasRecord bool
	// Tag is the tag that an OR kind adds or removes.
	Tag string
}

// GCPrune is GC_PRUNE, from a server: clients forget older tombstones of all
// maps (PROTOCOL 11.4).
type GCPrune struct {
	OlderThan hlc.Timestamp
}

// ServerEvent is SERVER_EVENT, from a server.
type ServerEvent struct {
	Event
	Timestamp hlc.Timestamp // of the envelope (PROTOCOL 2.8); zero: left out
}

// ServerBatchEvent is SERVER_BATCH_EVENT, from a server.
type ServerBatchEvent struct {
	Events    []Event
	Timestamp hlc.Timestamp // of the envelope; zero: left out
}

// KeyValue is one row of a query's result.
type KeyValue struct {
	Key   string
	Value []byte // one msgpack value; empty stands for nil
}

// QueryResp is QUERY_RESP, from a server: PROTOCOL 12.1.
type QueryResp struct {
	QueryID    string
	Results    []KeyValue
	NextCursor string // empty: left out
	HasMore    bool   // false: left out
	// CursorStatus is "valid", "expired", "invalid" or "none"; empty: left out.
	CursorStatus string
	Error        string // empty: left out
	Code         string // empty: left out
}

// QueryUpdate is QUERY_UPDATE, from a server: PROTOCOL 12.3. See
// AppendQueryUpdateTail for a way to encode one for many sessions.
type QueryUpdate struct {
	QueryID    string
	Key        string
	Value      []byte // one msgpack value; empty stands for nil
	ChangeType string // ENTER, UPDATE or LEAVE
}

// Batch is BATCH, from a server: several messages in one frame (PROTOCOL 2.4).
// See AppendBatch for a way to wrap frames that are encoded already.
type Batch struct {
	Messages []Message
}

// PingAt returns a Ping with a client's wall clock time in Unix ms.
func PingAt(millis uint64) *Ping {
	return &Ping{Timestamp: msgval.AppendUint(nil, millis)}
}

// Millis returns the echoed timestamp, and false if it is no time
// that a clock could have been read as.
func (m *Pong) Millis() (uint64, bool) {
	if len(m.Timestamp) == 0 {
		return 0, false
	}
	r := reader{data: m.Timestamp}
	return r.integer()
}
