package wire_test

import (
	"bytes"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/topgun-sync/topgun/core/msgval"
	"github.com/topgun-sync/topgun/core/wire"
)

func wrapped(typ string, fields ...any) []byte {
	return pack(nil, pairs{"type", typ, "payload", pairs(fields)})
}

func flat(typ string, fields ...any) []byte {
	return pack(nil, append(pairs{"type", typ}, fields...))
}

func TestResourceNames(t *testing.T) {
	for _, good := range []string{"a", "news/2024:x-y_z.q", "7", "/", "-", strings.Repeat("n", 256), "a.b", "$x"[1:]} {
		if err := wire.CheckResourceName(good); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
	for _, bad := range []string{"", "a..b", "..", "a b", "a*", "a>", "$x", "+x", "!locks", "a\x00", "ä", "a\n", strings.Repeat("n", 257)} {
		if err := wire.CheckResourceName(bad); err == nil || err.Name != wire.BadName {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// What is wrong with these is an error of the frame: no answer could name them.
func TestResourceErrors(t *testing.T) {
	long := strings.Repeat("n", 300)
	state := func(s any) []byte { return wrapped("COUNTER_SYNC", "name", "likes", "state", s) }
	for _, c := range []struct {
		name  string
		frame []byte
		want  string
	}{
		{"TOPIC_SUB without topic", wrapped("TOPIC_SUB"), wire.BadName},
		{"TOPIC_SUB of a wildcard", wrapped("TOPIC_SUB", "topic", "a.*"), wire.BadName},
		{"TOPIC_SUB of a number", wrapped("TOPIC_SUB", "topic", 5), wire.BadMessage},
		{"TOPIC_SUB of a long name", wrapped("TOPIC_SUB", "topic", long), wire.BadName},
		{"TOPIC_UNSUB of nothing", wrapped("TOPIC_UNSUB", "topic", ""), wire.BadName},
		{"TOPIC_PUB to ..", wrapped("TOPIC_PUB", "topic", "..", "data", 1), wire.BadName},
		{"TOPIC_PUB of much", wrapped("TOPIC_PUB", "topic", "t", "data", strings.Repeat("d", 256<<10)), wire.ValueTooLarge},
		{"TOPIC_PUB of an extension", wrapped("TOPIC_PUB", "topic", "t", "data", raw([]byte{0xd4, 5, 0})), wire.BadMessage},
		{"TOPIC_PUB of depth", wrapped("TOPIC_PUB", "topic", "t", "data", raw(append(bytes.Repeat([]byte{0x91}, 129), 0xc0))), wire.ValueTooDeep},
		{"COUNTER_REQUEST of nothing", wrapped("COUNTER_REQUEST"), wire.BadName},
		{"COUNTER_SYNC of a bad name", wrapped("COUNTER_SYNC", "name", "a b", "state", pairs{}), wire.BadName},
		{"COUNTER_SYNC without state", wrapped("COUNTER_SYNC", "name", "likes"), wire.BadMessage},
		{"a state that is nil", state(nil), wire.BadMessage},
		{"a side that is an array", state(pairs{"p", []any{}}), wire.BadMessage},
		{"a count of -1", state(pairs{"positive", pairs{"a", -1}}), wire.BadMessage},
		{"a count of -1.0", state(pairs{"positive", pairs{"a", -1.0}}), wire.BadMessage},
		{"a count of 1.5", state(pairs{"negative", pairs{"a", 1.5}}), wire.BadMessage},
		{"a count of NaN", state(pairs{"p", pairs{"a", math.NaN()}}), wire.BadMessage},
		{"a count of Inf", state(pairs{"n", pairs{"a", math.Inf(1)}}), wire.BadMessage},
		{"a count above 2^53", state(pairs{"n", pairs{"a", float64(1<<53 + 2)}}), wire.BadMessage},
		{"a count of 2^64-1", state(pairs{"n", pairs{"a", uint64(math.MaxUint64)}}), wire.BadMessage},
		{"a count of text", state(pairs{"n", pairs{"a", "1"}}), wire.BadMessage},
		{"a node without name", state(pairs{"p", pairs{"", 1}}), wire.BadMessage},
		{"a node of 129 bytes", state(pairs{"p", pairs{strings.Repeat("n", 129), 1}}), wire.BadMessage},
		{"a node that is not UTF-8", state(pairs{"p", pairs{"\xff", 1}}), wire.BadMessage},
		{"a node that is a number", state(pairs{"p", pairs{5, 1}}), wire.BadMessage},
		{"a node that is reserved", state(pairs{"p", pairs{"__proto__", 1}}), wire.ReservedName},
		{"LOCK_REQUEST without id", wrapped("LOCK_REQUEST", "name", "l", "ttl", 1), wire.BadMessage},
		{"LOCK_REQUEST with a long id", wrapped("LOCK_REQUEST", "requestId", long, "name", "l", "ttl", 1), wire.BadMessage},
		{"LOCK_RELEASE with a number as id", wrapped("LOCK_RELEASE", "requestId", 5, "name", "l"), wire.BadMessage},
		{"JOURNAL_READ without id", flat("JOURNAL_READ", "fromSequence", "0"), wire.BadMessage},
		{"JOURNAL_SUBSCRIBE without id", flat("JOURNAL_SUBSCRIBE"), wire.BadMessage},
		{"JOURNAL_UNSUBSCRIBE without id", flat("JOURNAL_UNSUBSCRIBE"), wire.BadMessage},
		{"PARTITION_MAP_REQUEST of version -1", wrapped("PARTITION_MAP_REQUEST", "currentVersion", -1), wire.BadMessage},
		{"PARTITION_MAP_REQUEST of text", pack(nil, pairs{"type", "PARTITION_MAP_REQUEST", "payload", "x"}), wire.BadMessage},
	} {
		m, err := wire.DecodeClient(c.frame, wire.DefaultLimits())
		if errName(err) != c.want {
			t.Errorf("%s: %v, %v, want %s", c.name, m, err, c.want)
		}
	}
	_, err := wire.DecodeClient(state(pairs{"p", pairs{"a", -1}}), wire.DefaultLimits())
	if got, want := err.Error(), "BAD_MESSAGE: positive and negative must map nodes to integers from 0 to 2^53"; got != want {
		t.Errorf("Error() = %q, want %q", got, want)
	}
}

func TestTopics(t *testing.T) {
	if m := decodeAs[*wire.TopicPub](t, wrapped("TOPIC_PUB", "topic", "t", "data", strings.Repeat("d", 256<<10-5))); len(m.Data) != 256<<10 {
		t.Errorf("%d bytes, want 256 KiB", len(m.Data))
	}
	for _, frame := range [][]byte{wrapped("TOPIC_PUB", "topic", "t"), wrapped("TOPIC_PUB", "topic", "t", "data", nil)} {
		m := decodeAs[*wire.TopicPub](t, frame)
		if m.Data != nil || show(m.AppendTo(nil)) != `{"type":"TOPIC_PUB","payload":{"topic":"t","data":null}}` {
			t.Errorf("nothing published: %x, %s", m.Data, show(m.AppendTo(nil)))
		}
	}
	if m := decodeAs[*wire.TopicPub](t, wrapped("TOPIC_PUB", "topic", "t", "data", raw(append(bytes.Repeat([]byte{0x91}, 128), 0xc0)))); len(m.Data) != 129 {
		t.Errorf("%d bytes, want 129", len(m.Data))
	}
	m := &wire.TopicMessage{Topic: "t", Timestamp: 5}
	if again, err := wire.DecodeServer(m.AppendTo(nil)); err != nil || !cmp.Equal(again, wire.Message(m)) {
		t.Errorf("%v, %v", again, err)
	}
}

// Both spellings are read, and the larger of what is said twice counts.
func TestCounters(t *testing.T) {
	for _, c := range []struct {
		name  string
		state pairs
		want  []wire.CounterNode
	}{
		{"nothing", pairs{}, nil},
		{"nils", pairs{"positive", nil, "negative", nil, "p", nil, "n", nil}, nil},
		{"long", pairs{"positive", pairs{"b", 1, "a", 2.0}, "negative", pairs{"a", 3}}, []wire.CounterNode{{"a", 2, 3}, {"b", 1, 0}}},
		{"short", pairs{"n", pairs{"a", 3}, "p", pairs{"b", 1}}, []wire.CounterNode{{"a", 0, 3}, {"b", 1, 0}}},
		{"both", pairs{"positive", pairs{"a", 5, "b", 1}, "p", pairs{"a", 4, "b", 2}, "n", pairs{"a", 1}}, []wire.CounterNode{{"a", 5, 1}, {"b", 2, 0}}},
		{"a node twice", pairs{"p", pairs{"a", 5, "a", 4}}, []wire.CounterNode{{"a", 5, 0}}},
		{"a node that counted nothing", pairs{"p", pairs{"a", 0}, "n", pairs{"a", 0, "b", 1}}, []wire.CounterNode{{"b", 0, 1}}},
		{"2^53", pairs{"p", pairs{"a", float64(1 << 53)}}, []wire.CounterNode{{"a", 1 << 53, 0}}},
	} {
		m := decodeAs[*wire.CounterSync](t, wrapped("COUNTER_SYNC", "name", "likes", "state", c.state))
		if len(m.State.Nodes) != len(c.want) || !slices.Equal(m.State.Nodes, c.want) {
			t.Errorf("%s: %v, want %v", c.name, m.State.Nodes, c.want)
		}
	}
	many := func(n int) pairs {
		var side pairs
		for i := range n {
			side = append(side, fmt.Sprint("node", i), 1)
		}
		return side
	}
	sync := func(state pairs) ([]wire.CounterNode, error) {
		m, err := wire.DecodeClient(wrapped("COUNTER_SYNC", "name", "likes", "state", state), wire.DefaultLimits())
		if err != nil {
			return nil, err
		}
		return m.(*wire.CounterSync).State.Nodes, nil
	}
	most := many(10_000)
	if nodes, err := sync(pairs{"positive", most, "negative", most, "p", most, "n", most}); err != nil || len(nodes) != 10_000 {
		t.Errorf("10,000 nodes: %d, %v", len(nodes), err)
	}
	if _, err := sync(pairs{"positive", many(10_001)}); errName(err) != wire.ValueTooLarge {
		t.Errorf("10,001 nodes: %v", err)
	}
	if _, err := sync(pairs{"positive", most, "negative", pairs{"another", 1}}); errName(err) != wire.ValueTooLarge {
		t.Errorf("10,001 nodes on two sides: %v", err)
	}
	// A counter of more has so many clients; they must be able to read it.
	if m, err := wire.DecodeServer(wrapped("COUNTER_UPDATE", "name", "likes", "state", pairs{"p", many(10_001)})); err != nil || len(m.(*wire.CounterUpdate).State.Nodes) != 10_001 {
		t.Errorf("10,001 nodes from a server: %v", err)
	}
}

func TestLocks(t *testing.T) {
	const day = 24 * 3600 * 1000
	request := func(fields ...any) []byte {
		return wrapped("LOCK_REQUEST", append([]any{"requestId", "r"}, fields...)...)
	}
	for _, c := range []struct {
		name  string
		frame []byte
		ttl   uint64
		want  string
	}{
		{"1 ms", request("name", "l", "ttl", 1), 1, ""},
		{"a day", request("name", "l", "ttl", float64(day)), day, ""},
		{"a fraction", request("name", "l", "ttl", 1500.7), 1500, ""},
		{"below 1 ms", request("name", "l", "ttl", 0.25), 1, ""},
		{"no ttl", request("name", "l"), 0, wire.BadTTL},
		{"nil", request("name", "l", "ttl", nil), 0, wire.BadTTL},
		{"0", request("name", "l", "ttl", 0), 0, wire.BadTTL},
		{"-1", request("name", "l", "ttl", -1), 0, wire.BadTTL},
		{"-1.0", request("name", "l", "ttl", -1.0), 0, wire.BadTTL},
		{"NaN", request("name", "l", "ttl", math.NaN()), 0, wire.BadTTL},
		{"Inf", request("name", "l", "ttl", math.Inf(1)), 0, wire.BadTTL},
		{"text", request("name", "l", "ttl", "1"), 0, wire.BadTTL},
		{"more than a day", request("name", "l", "ttl", day+1), 0, wire.BadTTL},
		{"no name", request("ttl", 1), 1, wire.BadName},
		{"a bad name", request("name", "a b", "ttl", 1), 1, wire.BadName},
		{"a number as name", request("name", 5, "ttl", 1), 1, wire.BadMessage},
		{"the last of equal fields", request("name", 5, "name", "l", "ttl", 0, "ttl", 1), 1, ""},
	} {
		m := decodeAs[*wire.LockRequest](t, c.frame)
		if name(m.Err) != c.want || m.RequestID != "r" || m.TTLMillis != c.ttl {
			t.Errorf("%s: %+v, want %d and %q", c.name, m, c.ttl, c.want)
		}
	}
	release := func(fields ...any) []byte {
		return wrapped("LOCK_RELEASE", append([]any{"requestId", "r"}, fields...)...)
	}
	for _, c := range []struct {
		name  string
		frame []byte
		token uint64
		want  string
	}{
		{"a large token", release("name", "l", "fencingToken", 1.7e15), 1.7e15, ""},
		{"no token", release("name", "l"), 0, ""},
		{"a fraction", release("name", "l", "fencingToken", 1.5), 0, wire.BadMessage},
		{"-1", release("name", "l", "fencingToken", -1), 0, wire.BadMessage},
		{"a bad name", release("name", "..", "fencingToken", 1), 1, wire.BadName},
	} {
		m := decodeAs[*wire.LockRelease](t, c.frame)
		if name(m.Err) != c.want || m.RequestID != "r" || m.FencingToken != c.token {
			t.Errorf("%s: %+v, want %d and %q", c.name, m, c.token, c.want)
		}
	}
}

func TestJournal(t *testing.T) {
	read := func(fields ...any) []byte {
		return flat("JOURNAL_READ", append([]any{"requestId", "r"}, fields...)...)
	}
	for _, c := range []struct {
		from any
		want uint64
		err  string
	}{
		{"0", 0, ""},
		{"5", 5, ""},
		{"9223372036854775807", math.MaxInt64, ""},
		{nil, 0, ""},
		{7, 7, ""},
		{7.0, 7, ""},
		{"9223372036854775808", 0, wire.BadMessage},
		{"99999999999999999999999", 0, wire.BadMessage},
		{"", 0, wire.BadMessage},
		{"-1", 0, wire.BadMessage},
		{"+1", 0, wire.BadMessage},
		{"1_0", 0, wire.BadMessage},
		{"0x10", 0, wire.BadMessage},
		{" 1", 0, wire.BadMessage},
		{1.5, 0, wire.BadMessage},
		{-1, 0, wire.BadMessage},
		{true, 0, wire.BadMessage},
	} {
		m := decodeAs[*wire.JournalRead](t, read("fromSequence", c.from, "limit", 3))
		if name(m.Err) != c.err || m.FromSequence != c.want || m.RequestID != "r" {
			t.Errorf("from %v: %+v, want %d and %q", c.from, m, c.want, c.err)
		}
		s := decodeAs[*wire.JournalSubscribe](t, flat("JOURNAL_SUBSCRIBE", "requestId", "r", "fromSequence", c.from))
		if name(s.Err) != c.err || s.FromSequence != c.want || s.HasFrom != (c.from != nil) {
			t.Errorf("subscribe from %v: %+v, want %d and %q", c.from, s, c.want, c.err)
		}
	}
	for _, c := range []struct {
		name   string
		fields []any
		want   string
	}{
		{"a limit of -1", []any{"limit", -1}, wire.BadMessage},
		{"a limit of text", []any{"limit", "1"}, wire.BadMessage},
		{"an internal map", []any{"mapName", "$devices"}, wire.BadName},
		{"a map that is a number", []any{"mapName", 5}, wire.BadMessage},
		{"a map that is nil", []any{"mapName", nil}, ""},
		{"no map", nil, ""},
	} {
		if m := decodeAs[*wire.JournalRead](t, read(c.fields...)); name(m.Err) != c.want {
			t.Errorf("%s: %v, want %q", c.name, m.Err, c.want)
		}
	}
	for _, c := range []struct {
		name  string
		types any
		want  []string
		err   string
	}{
		{"nil", nil, nil, ""},
		{"none", []any{}, []string{}, ""},
		{"all", []any{"PUT", "UPDATE", "DELETE"}, []string{"PUT", "UPDATE", "DELETE"}, ""},
		{"one many times", slices.Repeat([]any{"PUT"}, 1000), []string{"PUT"}, ""},
		{"an unknown one", []any{"PUT", "CLEAR"}, nil, wire.BadMessage},
		{"a number", []any{5}, nil, wire.BadMessage},
		{"text", "PUT", nil, wire.BadMessage},
	} {
		m := decodeAs[*wire.JournalSubscribe](t, flat("JOURNAL_SUBSCRIBE", "requestId", "r", "types", c.types))
		if name(m.Err) != c.err || !cmp.Equal(m.Types, c.want) {
			t.Errorf("%s: %v, %v, want %v and %q", c.name, m.Types, m.Err, c.want, c.err)
		}
	}
	if m := decodeAs[*wire.JournalSubscribe](t, flat("JOURNAL_SUBSCRIBE", "requestId", "r", "mapName", "a b")); name(m.Err) != wire.BadName {
		t.Errorf("a bad map: %v", m.Err)
	}
	for _, m := range []wire.Message{
		&wire.JournalReadResponse{RequestID: "r", Error: "no", HasMore: true},
		&wire.JournalEvent{Event: wire.JournalEntry{Sequence: math.MaxInt64, Type: "PUT", MapName: "m", Key: "k", Value: []byte{0xc0}, NodeID: "a", Tag: "1:0:a"}},
		&wire.JournalEvent{Event: wire.JournalEntry{Sequence: 1, Type: "DELETE", MapName: "m", Key: "k"}},
	} {
		if again, err := wire.DecodeServer(m.AppendTo(nil)); err != nil || !cmp.Equal(again, m) {
			t.Errorf("%v (-want +got):\n%s", err, cmp.Diff(m, again))
		}
	}
	event := pairs{"sequence", "1", "type", "PUT", "mapName", "m", "key", "k", "timestamp", goodStamp, "nodeId", "a"}
	for name, frame := range map[string][]byte{
		"no event":          flat("JOURNAL_EVENT"),
		"an event of text":  flat("JOURNAL_EVENT", "event", "x"),
		"an unknown type":   flat("JOURNAL_EVENT", "event", append(event[:len(event):len(event)], "type", "CLEAR")),
		"no stamp":          flat("JOURNAL_EVENT", "event", pairs{"sequence", "1", "type", "PUT"}),
		"a bad sequence":    flat("JOURNAL_EVENT", "event", append(event[:len(event):len(event)], "sequence", "x")),
		"events of nothing": flat("JOURNAL_READ_RESPONSE", "requestId", "r", "events", []any{pairs{}}),
	} {
		if m, err := wire.DecodeServer(frame); errName(err) != wire.BadMessage {
			t.Errorf("%s: %v, %v", name, m, err)
		}
	}
	if m, err := wire.DecodeServer(flat("JOURNAL_EVENT", "event", append(event[:len(event):len(event)], "metadata", []any{1}))); err != nil || m.(*wire.JournalEvent).Event.Tag != "" {
		t.Errorf("metadata of another kind: %v, %v", m, err)
	}
}

// One node has every partition, each once.
func TestPartitionMap(t *testing.T) {
	m := &wire.PartitionMap{Version: 3, NodeID: "gateway", WebSocketURL: "wss://a.example/ws", HTTPURL: "https://a.example", GeneratedAt: 5}
	frame := m.AppendTo(nil)
	if again, err := wire.DecodeServer(frame); err != nil || !cmp.Equal(again, wire.Message(m)) {
		t.Errorf("%v, %v", again, err)
	}
	text := show(frame)
	for id := range 271 {
		if want := fmt.Sprintf(`{"partitionId":%d,"ownerNodeId":"gateway","backupNodeIds":[]}`, id); strings.Count(text, want) != 1 {
			t.Errorf("partition %d is there %d times", id, strings.Count(text, want))
		}
	}
	if n := strings.Count(text, "partitionId"); n != 271 {
		t.Errorf("%d partitions, want 271", n)
	}
	for _, frame := range [][]byte{flat("PARTITION_MAP_REQUEST"), flat("PARTITION_MAP_REQUEST", "payload", nil), wrapped("PARTITION_MAP_REQUEST")} {
		if m := decodeAs[*wire.PartitionMapRequest](t, frame); m.CurrentVersion != 0 {
			t.Errorf("CurrentVersion = %d", m.CurrentVersion)
		}
	}
	node := pairs{"nodeId", "n", "endpoints", pairs{"websocket", "ws://n"}, "status", "ACTIVE"}
	several := wrapped("PARTITION_MAP", "version", 1, "nodes", []any{node, node})
	if m, err := wire.DecodeServer(several); err != nil || m.Type() != "PARTITION_MAP" || !bytes.Equal(m.(*wire.Other).Frame, several) {
		t.Errorf("a map of two nodes: %v, %v", m, err)
	}
	if m, err := wire.DecodeServer(wrapped("PARTITION_MAP", "nodes", 5)); errName(err) != wire.BadMessage {
		t.Errorf("nodes that are a number: %v, %v", m, err)
	}
}

// sizes returns the numbers from first to last.
func sizes(first, last int) (list []int) {
	for n := first; n <= last; n++ {
		list = append(list, n)
	}
	return list
}

// A tail serves every session, and a batch wraps frames as they are.
func TestSharedEncodings(t *testing.T) {
	for _, m := range []*wire.QueryUpdate{
		{QueryID: "q", Key: "k", Value: pack(nil, pairs{"n", 1}), ChangeType: "ENTER"},
		{QueryID: strings.Repeat("q", 100), Key: "k", ChangeType: "LEAVE"},
	} {
		tail := wire.AppendQueryUpdateTail([]byte("before"), m.Key, m.Value, m.ChangeType)[6:]
		frame := wire.AppendQueryUpdate([]byte("before"), m.QueryID, tail)
		if !bytes.Equal(frame[6:], m.AppendTo(nil)) {
			t.Errorf("%x, want %x", frame[6:], m.AppendTo(nil))
		}
		if again, err := wire.DecodeServer(frame[6:]); err != nil || !cmp.Equal(again, wire.Message(m)) {
			t.Errorf("%v, %v", again, err)
		}
	}
	if m, err := wire.DecodeServer(wrapped("QUERY_UPDATE", "queryId", "q", "key", "k", "changeType", "MOVE")); errName(err) != wire.BadMessage {
		t.Errorf("an unknown change: %v, %v", m, err)
	}
	// The sizes lie around those where heads grow.
	for _, size := range slices.Concat(sizes(0, 260), sizes(1<<16-120, 1<<16)) {
		pub := &wire.TopicMessage{Topic: "t", Data: msgval.AppendString(nil, strings.Repeat("d", size))}
		pong := &wire.Pong{ServerTime: 5}
		got := wire.AppendBatch([]byte("before"), pub.AppendTo(nil), pong.AppendTo(nil))
		want := (&wire.Batch{Messages: []wire.Message{pub, pong}}).AppendTo([]byte("before"))
		if !bytes.Equal(got, want) {
			t.Errorf("%d bytes: the batch differs from that of its messages", size)
		}
		if m, err := wire.DecodeServer(got[6:]); err != nil || len(m.(*wire.Batch).Messages) != 2 {
			t.Errorf("%d bytes: %v, %v", size, m, err)
		}
	}
	if got, want := wire.AppendBatch(nil), (&wire.Batch{}).AppendTo(nil); !bytes.Equal(got, want) {
		t.Errorf("an empty batch: %x, want %x", got, want)
	}
}
