package gateway

import (
	"github.com/topgun-sync/topgun/core/wire"
)

// unserved says what is answered to the requests of PROTOCOL 20 that are not served:
// what is not served, or empty where the client expects no answer.
//
// A request whose answer has a place for an error gets that answer, because its
// caller waits for it, up to 30 s (PROTOCOL 15); all others get ERROR 501. A
// LOCK_REQUEST gets no LOCK_RELEASED, which the client would read as "acquired"
// (PROTOCOL 14.3). Nothing is ever answered with OP_ACK (PROTOCOL 10.4).
var unserved = map[string]string{
	"QUERY_SYNC_INIT":          "",
	"QUERY_UNSUB":              "",
	"HYBRID_QUERY_SUBSCRIBE":   "hybrid queries are",
	"HYBRID_QUERY_UNSUBSCRIBE": "",
	"TOPIC_SUB":                "topics are",
	"TOPIC_UNSUB":              "",
	"TOPIC_PUB":                "topics are",
	"COUNTER_REQUEST":          "counters are",
	"COUNTER_SYNC":             "counters are",
	"LOCK_REQUEST":             "locks are",
	"LOCK_RELEASE":             "locks are",
	"SEARCH":                   "full-text search is",
	"SEARCH_SUB":               "full-text search is",
	"SEARCH_UNSUB":             "",
	"VECTOR_SEARCH":            "vector search is",
	"HYBRID_SEARCH":            "hybrid search is",
	"HYBRID_SEARCH_SUB":        "hybrid search is",
	"HYBRID_SEARCH_UNSUB":      "",
	"SQL_QUERY":                "SQL is",
	"JOURNAL_READ":             "the event journal is",
	"JOURNAL_SUBSCRIBE":        "the event journal is",
	"JOURNAL_UNSUBSCRIBE":      "",
	"ENTRY_PROCESS":            "entry processors are",
	"ENTRY_PROCESS_BATCH":      "entry processors are",
	"REGISTER_RESOLVER":        "conflict resolvers are",
	"UNREGISTER_RESOLVER":      "conflict resolvers are",
	"LIST_RESOLVERS":           "conflict resolvers are",
	"ORMAP_SYNC_INIT":          "OR-maps are",
	"ORMAP_MERKLE_REQ_BUCKET":  "OR-maps are",
	"ORMAP_PUSH_DIFF":          "OR-maps are",
	"ORMAP_DIFF_REQUEST":       "OR-maps are",
	"CLIENT_APPLY_ACK":         "",
	"PARTITION_MAP_REQUEST":    "the cluster mode of clients is",
}

const notSupported = "NOT_SUPPORTED"

// refuseUnserved answers a message that has no handler. A request of the protocol that
// is not served is no fault of the client: it does not count as a bad message.
func (s *session) refuseUnserved(message wire.Message) error {
	switch m := message.(type) {
	case *wire.QuerySub:
		text := notSupported + ": live queries are not served"
		code := notSupported
		status := 501
		if m.Err != nil {
			text, code, status = m.Err.Error(), m.Err.Name, m.Err.Code
		} else if wire.CheckMapName(m.MapName) == nil {
			s.interested(m.MapName)
		}
		// Live queries ignore the error of a response, so it goes to the log as well
		// (PROTOCOL 12.2).
		s.send(urgent, &wire.QueryResp{QueryID: m.QueryID, Error: text, Code: code})
		s.send(urgent, &wire.ErrorMessage{Code: status, Message: text})
		return nil
	case *wire.QueryUnsub:
		return nil
	case *wire.ORMapSyncInit:
		s.learnCombine(m)
		s.send(urgent, &wire.ErrorMessage{Code: 501, Message: notSupported + ": OR-maps are not served"})
		return nil
	case *wire.Other:
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
	return s.refuse(&wire.Error{Name: wire.BadMessage, Code: 400, Text: "type: not one that clients send"})
}
