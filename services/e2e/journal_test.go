package e2e

import (
	"fmt"
	"testing"

	"github.com/topgun-sync/topgun/core/wire"
)

func typesOf(entries []wire.JournalEntry) (types string) {
	for _, e := range entries {
		types += fmt.Sprintf("%s:%s ", e.Type, e.Key)
	}
	return types
}

// The journal tells what happened in a map, in order, live and from the past, at
// every gateway.
func journal(t *testing.T, c Cluster) {
	const name = "journal_story"
	base := now()
	reader := dial(t, c, 1).hello()
	l := reader.listen()
	reader.send(&wire.JournalSubscribe{RequestID: "live", MapName: name})
	read := func(id string, from, limit uint64) *wire.JournalReadResponse {
		reader.send(&wire.JournalRead{RequestID: id, FromSequence: from, Limit: limit, MapName: name})
		return await(t, l, func(m *wire.JournalReadResponse) bool { return m.RequestID == id })
	}
	read("in force", 0, 1)
	remove := wire.Op{MapName: name, Key: "a", Kind: wire.OpRemove}
	remove.Record.Timestamp = stamp(base, 2, name)
	for _, op := range []wire.Op{
		put("", name, "a", 1, stamp(base, 0, name)),
		put("", name, "a", 2, stamp(base, 1, name)),
		remove,
		put("", name, "a", 3, stamp(base, 3, name)),
		put("", name+"_other", "a", 3, stamp(base, 3, name)),
	} {
		write(t, c, 0, op)
	}
	const want = "PUT:a UPDATE:a DELETE:a PUT:a "
	eventually(t, deadline, func() error {
		if n := len(received[*wire.JournalEvent](l)); n < 4 {
			return fmt.Errorf("%d of 4 events", n)
		}
		return nil
	})
	var live []wire.JournalEntry
	for _, m := range received[*wire.JournalEvent](l) {
		live = append(live, m.Event)
	}
	if got := typesOf(live); got != want {
		t.Errorf("live: %s; want %s", got, want)
	}
	all := read("all", 0, 10)
	if got := typesOf(all.Events); got != want || all.HasMore {
		t.Fatalf("read: %s, more %v; want %s", got, all.HasMore, want)
	}
	for i, e := range all.Events {
		if e.Sequence != live[i].Sequence || i > 0 && e.Sequence <= all.Events[i-1].Sequence {
			t.Errorf("entry %d has sequence %d, live %d", i, e.Sequence, live[i].Sequence)
		}
	}
	page := read("page", all.Events[1].Sequence, 2)
	if got := typesOf(page.Events); got != "UPDATE:a DELETE:a " || !page.HasMore {
		t.Errorf("page: %s, more %v", got, page.HasMore)
	}
	// Who subscribes from a sequence gets the past first.
	other := dial(t, c, 0).hello()
	ol := other.listen()
	other.send(&wire.JournalSubscribe{RequestID: "past", MapName: name, FromSequence: all.Events[2].Sequence, HasFrom: true})
	write(t, c, 0, put("", name, "b", 1, stamp(base, 4, name)))
	eventually(t, deadline, func() error {
		var got []wire.JournalEntry
		for _, m := range received[*wire.JournalEvent](ol) {
			got = append(got, m.Event)
		}
		if types := typesOf(got); types != "DELETE:a PUT:a PUT:b " {
			return fmt.Errorf("from the past: %s", types)
		}
		return nil
	})
}

// A client of the cluster mode is told that the gateway owns everything.
func partitionMap(t *testing.T, c Cluster) {
	conn := dial(t, c, 0).hello()
	conn.send(&wire.PartitionMapRequest{})
	m := expect[*wire.PartitionMap](conn)
	if m.WebSocketURL != webSocket(gateway(c, 0)) && m.WebSocketURL+"/ws" != webSocket(gateway(c, 0)) {
		t.Errorf("endpoint %s; want that of the gateway, %s", m.WebSocketURL, webSocket(gateway(c, 0)))
	}
}
