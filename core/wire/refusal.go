package wire

import "github.com/topgun-sync/topgun/core/msgval"

// Refused is the typed refusal of a request that is not served: see RefusalFor.
// The response has the shape that its waiting call in the client reads (PROTOCOL
// 15, 16), empty but for the error.
type Refused struct {
	typ     string
	wrapped bool
	idKey   string // the field that tells the client which call it is, and its value
	id      string
	empty   []string // fields that are empty arrays
	maps    []string // fields that are empty maps
	zero    []string // fields that are 0
	no      []string // fields that are false
	code    string
	text    string
}

// RefusalFor returns the answer that makes the client's waiting call fail with
// the text at once. It returns false if the protocol has no such answer for the
// type; then an ErrorMessage with code 501 is all there is.
func RefusalFor(o *Other, text string) (Message, bool) {
	r := &Refused{text: text, idKey: "requestId", id: o.RequestID}
	switch o.TypeName {
	case "SEARCH", "SEARCH_SUB":
		r.typ, r.wrapped = "SEARCH_RESP", true
		r.empty, r.zero = []string{"results"}, []string{"totalCount"}
	case "HYBRID_SEARCH", "HYBRID_SEARCH_SUB":
		r.typ, r.wrapped = "HYBRID_SEARCH_RESP", true
		r.empty, r.zero = []string{"results"}, []string{"searchTimeMs"}
	case "VECTOR_SEARCH":
		r.typ, r.wrapped = "VECTOR_SEARCH_RESP", true
		r.idKey, r.id = "id", o.ID
		r.empty, r.zero = []string{"results"}, []string{"totalCandidates", "searchTimeMs"}
	case "SQL_QUERY":
		r.typ, r.wrapped = "SQL_QUERY_RESP", true
		r.idKey, r.id = "queryId", o.QueryID
		r.empty, r.code = []string{"columns", "rows"}, "FEATURE_DISABLED"
	case "ENTRY_PROCESS":
		r.typ, r.no = "ENTRY_PROCESS_RESPONSE", []string{"success"}
	case "ENTRY_PROCESS_BATCH":
		r.typ, r.maps = "ENTRY_PROCESS_BATCH_RESPONSE", []string{"results"}
	case "REGISTER_RESOLVER", "UNREGISTER_RESOLVER":
		r.typ, r.no = o.TypeName+"_RESPONSE", []string{"success"}
	case "LIST_RESOLVERS":
		r.typ, r.empty = "LIST_RESOLVERS_RESPONSE", []string{"resolvers"}
	default:
		return nil, false
	}
	if r.id == "" {
		// A subscription is answered under its own id (PROTOCOL 15.1).
		r.id = o.SubscriptionID
	}
	if r.id == "" {
		return nil, false // nobody could tell which call this answers
	}
	return r, true
}

// Type implements Message.
func (m *Refused) Type() string { return m.typ }

// AppendTo implements Message.
func (m *Refused) AppendTo(dst []byte) []byte {
	n := pairs(2+len(m.empty)+len(m.maps)+len(m.zero)+len(m.no), m.code != "")
	if m.wrapped {
		dst = appendWrapped(dst, m.typ, n)
	} else {
		dst = appendFlat(dst, m.typ, n+1)
	}
	dst = appendText(dst, m.idKey, m.id)
	for _, key := range m.empty {
		dst = appendArray(dst, key, 0)
	}
	for _, key := range m.maps {
		dst = appendMap(dst, key, 0)
	}
	for _, key := range m.zero {
		dst = msgval.AppendUint(msgval.AppendString(dst, key), 0)
	}
	for _, key := range m.no {
		dst = appendFlag(dst, key, false)
	}
	dst = appendText(dst, "error", m.text)
	if m.code != "" {
		dst = appendText(dst, "code", m.code)
	}
	return dst
}
