package wire

// Error says what is wrong with a frame, a body or an operation. Its Text is
// fixed for each cause and holds nothing of the input, so it can be sent to
// clients and logged as it is.
type Error struct {
	Name string // what programs look at, e.g. BadMessage
	Code int    // PROTOCOL 19.1
	Text string // for people: what was wrong and what would be right
	// OpsLost says that the frame held operations and none of them was decoded, so
	// their ids are not known.
	OpsLost bool
}

// The names of errors: RELIABILITY 4.
const (
	BadMessage      = "BAD_MESSAGE"
	BadKey          = "BAD_KEY"
	BadName         = "BAD_NAME"
	BadTimestamp    = "BAD_TIMESTAMP"
	BadTTL          = "BAD_TTL"
	ReservedName    = "RESERVED_NAME"
	TooManyOps      = "TOO_MANY_OPS"
	ValueTooLarge   = "VALUE_TOO_LARGE"
	ValueTooDeep    = "VALUE_TOO_DEEP"
	QueryTooComplex = "QUERY_TOO_COMPLEX"
)

// Error returns "NAME: text".
func (e *Error) Error() string { return e.Name + ": " + e.Text }

func badMessage(text string) *Error { return &Error{Name: BadMessage, Code: 400, Text: text} }

// Limits bounds what the decoders of a server accept. All are inclusive.
type Limits struct {
	MaxOps          int // operations in a batch
	MaxValueBytes   int // encoded size of a value
	MaxTokenBytes   int // AUTH token
	MaxQueryBytes   int // encoded size of a query
	MaxQueries      int // queries, maps and searches in one /sync request, each
	MaxTagBytes     int // tag of an OR record
	MaxTopicBytes   int // encoded size of what is published on a topic
	MaxCounterNodes int // nodes in the state of a counter
	MaxDiffKeys     int // keys in an ORMAP_DIFF_REQUEST
}

// DefaultLimits returns the limits of RELIABILITY 3.
func DefaultLimits() Limits {
	return Limits{
		MaxOps:          1000,
		MaxValueBytes:   256 << 10,
		MaxTokenBytes:   8 << 10,
		MaxQueryBytes:   64 << 10,
		MaxQueries:      256,
		MaxTagBytes:     256,
		MaxTopicBytes:   256 << 10,
		MaxCounterNodes: 10_000,
		MaxDiffKeys:     1000,
	}
}
