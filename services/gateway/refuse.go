package gateway

import (
	"github.com/topgun-sync/topgun/core/wire"
)

// unserved says what is answered to the requests of PROTOCOL 20 that are not served:
// what is not served, or empty where the client expects no answer. A query's root is no
// request for anything: QUERY_SUB came with it, and has its answer (PROTOCOL 12.2).
//
// A request whose answer has a place for an error gets that answer, because its
// caller waits for it, up to 30 s (PROTOCOL 15); all others get ERROR 501. Nothing is
// ever answered with OP_ACK (PROTOCOL 10.4).
var unserved = map[string]string{
	"QUERY_SYNC_INIT":          "",
	"HYBRID_QUERY_SUBSCRIBE":   "hybrid queries are",
	"HYBRID_QUERY_UNSUBSCRIBE": "",
	"SEARCH":                   "full-text search is",
	"SEARCH_SUB":               "full-text search is",
	"SEARCH_UNSUB":             "",
	"VECTOR_SEARCH":            "vector search is",
	"HYBRID_SEARCH":            "hybrid search is",
	"HYBRID_SEARCH_SUB":        "hybrid search is",
	"HYBRID_SEARCH_UNSUB":      "",
	"SQL_QUERY":                "SQL is",
	"ENTRY_PROCESS":            "entry processors are",
	"ENTRY_PROCESS_BATCH":      "entry processors are",
	"REGISTER_RESOLVER":        "conflict resolvers are",
	"UNREGISTER_RESOLVER":      "conflict resolvers are",
	"LIST_RESOLVERS":           "conflict resolvers are",
}

const notSupported = "NOT_SUPPORTED"

// refuseUnserved answers a message that has no handler. A request of the protocol that
// is not served is no fault of the client: it does not count as a bad message.
func (s *session) refuseUnserved(message wire.Message) error {
	m, _ := message.(*wire.Other)
	if m == nil {
		m = new(wire.Other) // of no type
	}
	what, known := unserved[m.TypeName]
	switch {
	case !known:
		return s.refuse(&wire.Error{Name: wire.BadMessage, Code: 400, Text: "type: not one that clients send"})
	case what == "":
		return nil
	}
	text := notSupported + ": " + what + " not served"
	answer, ok := wire.RefusalFor(m, text)
	if !ok {
		answer = &wire.ErrorMessage{Code: 501, Message: text}
	}
	s.send(urgent, answer)
	return nil
}
