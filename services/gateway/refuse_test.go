package gateway

import (
	"strings"
	"testing"

	"github.com/topgun-sync/topgun/core/msgval"
)

// request makes a frame of a type with a wrapped payload and every id there is.
func request(typeName string) []byte {
	ids := []string{"requestId", "queryId", "subscriptionId", "id", "name", "topic", "mapName", "sql", "query"}
	b := msgval.AppendMapHeader(nil, 2+len(ids))
	b = append(append(b, packed("type")...), packed(typeName)...)
	b = msgval.AppendMapHeader(append(b, packed("payload")...), len(ids))
	for _, id := range ids {
		b = append(append(b, packed(id)...), packed("x-"+id)...)
	}
	for _, id := range ids {
		b = append(append(b, packed(id)...), packed("x-"+id)...)
	}
	return b
}

// Every request of PROTOCOL 20 that is not served is answered at once, so that nobody
// waits for a timeout, and none of it counts as a bad message.
func TestUnservedRequests(t *testing.T) {
	b := setup(t, nil, nil)
	p := b.hello(t)
	answers := map[string]string{
		"SEARCH": "SEARCH_RESP", "SEARCH_SUB": "SEARCH_RESP",
		"VECTOR_SEARCH": "VECTOR_SEARCH_RESP",
		"HYBRID_SEARCH": "HYBRID_SEARCH_RESP", "HYBRID_SEARCH_SUB": "HYBRID_SEARCH_RESP",
		"SQL_QUERY":     "SQL_QUERY_RESP",
		"ENTRY_PROCESS": "ENTRY_PROCESS_RESPONSE", "ENTRY_PROCESS_BATCH": "ENTRY_PROCESS_BATCH_RESPONSE",
		"REGISTER_RESOLVER": "REGISTER_RESOLVER_RESPONSE", "UNREGISTER_RESOLVER": "UNREGISTER_RESOLVER_RESPONSE",
		"LIST_RESOLVERS": "LIST_RESOLVERS_RESPONSE",
	}
	for typeName, what := range unserved {
		p.payload(request(typeName))
		if what == "" {
			p.ping() // no answer
			continue
		}
		_, frame, err := p.frame()
		if err != nil {
			t.Fatal(err)
		}
		want := answers[typeName]
		if want == "" {
			want = "ERROR"
		}
		if got := typeOf(t, frame); got != want {
			t.Errorf("%s: answered with %s, want %s", typeName, got, want)
		}
		if !strings.Contains(string(frame), "NOT_SUPPORTED") || strings.Contains(string(frame), "OP_ACK") {
			t.Errorf("%s: answered with %q", typeName, frame)
		}
	}
	p.ping()
}

// typeOf reads the type of a frame, which comes first.
func typeOf(t *testing.T, frame []byte) string {
	t.Helper()
	const key = "\xa4type"
	if len(frame) < 8 || string(frame[1:6]) != key {
		t.Fatalf("frame %q does not begin with its type", frame)
	}
	if n := frame[6]; n&0xe0 == 0xa0 {
		return string(frame[7 : 7+int(n&0x1f)])
	}
	return string(frame[8 : 8+int(frame[7])])
}
