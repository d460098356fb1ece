package query_test

import (
	"bytes"
	"maps"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/topgun-sync/topgun/core/msgval"
	"github.com/topgun-sync/topgun/core/query"
)

// model is a map and a client that watches a query of it.
type model struct {
	q       *query.Query
	maxRows int
	live    *query.Live
	data    map[string][]byte
	client  map[string][]byte
}

// matching returns what the query makes of the map, before offset and limit.
func (m *model) matching(after []byte) (rows []query.Row) {
	for key, value := range m.data {
		if r := (query.Row{Key: key, Value: value}); m.q.Match(key, value) && m.q.After(after, r) {
			rows = append(rows, r)
		}
	}
	slices.SortFunc(rows, m.q.Compare)
	return rows
}

// read answers the question of Live.
func (m *model) read() (rows []query.Row, more bool) {
	rows = m.matching(m.live.After())
	n := min(m.live.Want(), len(rows))
	return rows[:n], n < len(rows)
}

// window returns what a client must see, and whether others follow.
func (m *model) window(t *rapid.T) (rows []query.Row, more bool) {
	after, _ := m.q.ResolveCursor("m")
	if m.q.Grouped() {
		groups := query.NewGroups(m.q)
		for _, r := range m.matching(nil) {
			if err := groups.Add(r.Key, r.Value); err != nil {
				t.Fatal(err)
			}
		}
		return groups.Rows(after)
	}
	rows = m.matching(after)
	hi := m.maxRows - m.maxRows/8
	if m.q.Limit() > 0 {
		hi = min(hi, m.q.Offset()+m.q.Limit())
	}
	more = len(rows) > hi
	rows = rows[:min(hi, len(rows))]
	rows = slices.Clone(rows[min(m.q.Offset(), len(rows)):])
	for i := range rows {
		rows[i].Value = m.q.Project(nil, rows[i].Value)
	}
	return rows, more
}

// show applies updates to what the client has.
func (m *model) show(t *rapid.T, updates []query.Update) {
	entered := false
	seen := make(map[string]bool)
	for _, u := range updates {
		_, has := m.client[u.Row.Key]
		switch {
		case seen[u.Row.Key]:
			t.Fatalf("two updates of %s at once: %v", u.Row.Key, updates)
		case u.Type == query.ChangeLeave && entered:
			t.Fatalf("a row leaves after another has entered: %v", updates)
		case has == (u.Type == query.ChangeEnter), (u.Type == query.ChangeLeave) != (u.Row.Value == nil):
			t.Fatalf("update %v of a row that the client has: %v", u, has)
		}
		seen[u.Row.Key] = true
		if u.Type == query.ChangeLeave {
			delete(m.client, u.Row.Key)
			continue
		}
		entered = entered || u.Type == query.ChangeEnter
		m.client[u.Row.Key] = u.Row.Value
	}
}

// check compares what the client sees, and what Window says, with what the query
// makes of the map.
func (m *model) check(t *rapid.T) {
	if m.live.Overflow() {
		return
	}
	want, more := m.window(t)
	got, gotMore, cursor := m.live.Window()
	if !slices.EqualFunc(got, want, func(a, b query.Row) bool { return a.Key == b.Key && bytes.Equal(a.Value, b.Value) }) {
		t.Fatalf("window %q, want %q", got, want)
	}
	if more && !gotMore || gotMore && len(got) > 0 && cursor == "" {
		t.Fatalf("more %v, want %v, cursor %q", gotMore, more, cursor)
	}
	shown := make(map[string][]byte)
	for _, r := range want {
		shown[r.Key] = r.Value
	}
	if n := len(slices.Collect(m.live.Keys())); n != m.live.Len() || n < len(got) && !m.q.Grouped() {
		t.Fatalf("%d keys of %d rows, %d shown", n, m.live.Len(), len(got))
	}
	for key := range m.live.Keys() {
		if value := m.data[key]; !m.live.Holds(key) || value == nil || !m.q.Match(key, value) {
			t.Fatalf("%s is kept and does not match", key)
		}
	}
	if !maps.EqualFunc(m.client, shown, bytes.Equal) {
		t.Fatalf("the client has %q, want %q", m.client, shown)
	}
}

// Whatever happens to a map, a client that applies the updates sees what the query
// makes of the map.
func TestLiveModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := &model{data: make(map[string][]byte), client: make(map[string][]byte), maxRows: rapid.IntRange(1, 40).Draw(t, "maxRows")}
		for range rapid.IntRange(0, 40).Draw(t, "rows") {
			m.data[keys.Draw(t, "key")] = rowValue.Draw(t, "value")
		}
		text := queries.Draw(t, "query")
		m.q = withCursor(t, m, text)
		m.live = query.NewLive(m.q, "m", m.maxRows)
		m.fill()
		m.check(t)
		lazy := rapid.Bool().Draw(t, "lazy")
		for range rapid.IntRange(1, 60).Draw(t, "ops") {
			m.step(t, lazy)
			m.check(t)
		}
	})
}

// step changes one row and refills when it is asked to, or, being lazy, when the
// client would notice.
func (m *model) step(t *rapid.T, lazy bool) {
	key := keys.Draw(t, "key")
	if len(m.client) > 0 && rapid.Bool().Draw(t, "shown") {
		key = rapid.SampledFrom(slices.Sorted(maps.Keys(m.client))).Draw(t, "key")
	}
	var value []byte
	if rapid.IntRange(0, 2).Draw(t, "remove") == 0 {
		delete(m.data, key)
	} else {
		value = rowValue.Draw(t, "value")
		m.data[key] = value
	}
	updates, refill := m.live.Apply(key, value)
	m.show(t, updates)
	if again, _ := m.live.Apply(key, value); len(again) > 0 {
		t.Fatalf("the same row once more makes %v", again)
	}
	if refill && (m.live.Overflow() || !lazy || !m.enough(t)) {
		m.fill()
	}
}

// fill reads the map and gives the client the window as a whole.
func (m *model) fill() {
	m.live.Reset(m.read())
	rows, _, _ := m.live.Window()
	m.client = make(map[string][]byte)
	for _, r := range rows {
		m.client[r.Key] = r.Value
	}
}

// enough reports whether the window is complete without a refill.
func (m *model) enough(t *rapid.T) bool {
	got, _, _ := m.live.Window()
	want, _ := m.window(t)
	return len(got) == len(want)
}

// withCursor parses a query, with a cursor into the map now and then.
func withCursor(t *rapid.T, m *model, text []byte) *query.Query {
	m.q = parseRapid(t, text)
	if !rapid.Bool().Draw(t, "cursor?") {
		return m.q
	}
	m.live = query.NewLive(m.q, "m", 1000)
	m.live.Reset(m.read())
	rows, _, _ := m.live.Window()
	if len(rows) == 0 {
		return m.q
	}
	at := rapid.SampledFrom(rows).Draw(t, "row")
	if !m.q.Grouped() {
		at.Value = m.data[at.Key]
	}
	return parseRapid(t, addPair(text, "cursor", msgval.AppendString(nil, m.q.CursorAt("m", at))))
}

// addPair adds a pair to a map of less than 15.
func addPair(m []byte, name string, value []byte) []byte {
	m = slices.Clone(m)
	m[0]++
	return append(msgval.AppendString(m, name), value...)
}

func parseRapid(t *rapid.T, text []byte) *query.Query {
	q, err := query.Parse(text, nil)
	if err != nil {
		t.Fatal(err)
	}
	return q
}

// A row that is pushed out leaves before the one that pushes it enters, and a row
// that only moves is an update.
func TestLiveTopN(t *testing.T) {
	q := parse(t, `{"sort":{"n":"desc"},"limit":2}`)
	l := query.NewLive(q, "m", 100)
	row := func(key string, n int) query.Row { return query.Row{Key: key, Value: mapOf("n", n)} }
	l.Reset([]query.Row{row("a", 9), row("b", 8), row("c", 7)}, false)
	for _, step := range []struct {
		key  string
		n    int // 0: remove
		want string
	}{
		{"d", 6, ""},
		{"e", 10, "-b +e"},
		{"e", 11, "=e"},
		{"e", 9, "=e"}, // behind a, still shown
		{"e", 1, "-e +b"},
		{"a", 0, "-a +c"},
		{"c", 7, ""},
		{"b", 5, "-b +d"},
		{"c", 6, "=c"},
	} {
		var value []byte
		if step.n > 0 {
			value = mapOf("n", step.n)
		}
		updates, refill := l.Apply(step.key, value)
		got := ""
		for _, u := range updates {
			got += " " + map[query.ChangeType]string{query.ChangeEnter: "+", query.ChangeUpdate: "=", query.ChangeLeave: "-"}[u.Type] + u.Row.Key
		}
		if got != "" {
			got = got[1:]
		}
		if got != step.want || refill {
			t.Errorf("%s=%d: %q, want %q; refill %v", step.key, step.n, got, step.want, refill)
		}
	}
}

// An answer that had to be cut short does not ask for more at every change.
func TestLiveCutShort(t *testing.T) {
	q := parse(t, `{}`)
	l := query.NewLive(q, "m", 1000)
	var rows []query.Row
	for i := range 100 {
		rows = append(rows, query.Row{Key: string([]byte{'a' + byte(i/10), '0' + byte(i%10)}), Value: []byte{1}})
	}
	l.Reset(rows, true)
	refills := 0
	for _, r := range rows[:20] {
		if _, refill := l.Apply(r.Key, nil); refill {
			refills++
		}
	}
	if refills == 0 || refills > 10 {
		t.Errorf("%d refills asked for while 20 of 100 rows went", refills)
	}
	if updates, _ := l.Apply("z", []byte{1}); len(updates) > 0 {
		t.Error("a row from beyond what is known is shown")
	}
}

// A row from beyond what is known asks for a refill if the window has room for it.
func TestLiveRefillsForUnknownRows(t *testing.T) {
	l := query.NewLive(parse(t, `{}`), "m", 2)
	l.Reset([]query.Row{{Key: "a", Value: []byte{1}}, {Key: "b", Value: []byte{1}}}, true)
	if updates, refill := l.Apply("b", nil); len(updates) != 1 || !refill {
		t.Errorf("a row left: %v, refill %v", updates, refill)
	}
	if updates, refill := l.Apply("c", []byte{1}); len(updates) != 0 || !refill {
		t.Errorf("a row that may or may not be the next: %v, refill %v", updates, refill)
	}
}

func TestLiveBytes(t *testing.T) {
	for _, text := range []string{`{"limit":2}`, `{"groupBy":["g"]}`} {
		l := query.NewLive(parse(t, text), "m", 10)
		if l.Bytes() != 0 {
			t.Errorf("%s: empty, it takes %d", text, l.Bytes())
		}
		for _, key := range []string{"a", "b", "c"} {
			l.Apply(key, mapOf("g", key, "text", string(make([]byte, 1000))))
		}
		if n := l.Bytes(); n < 3000 || n > 6000 {
			t.Errorf("%s: three rows of 1,000 bytes take %d", text, n)
		}
		for _, key := range []string{"a", "b", "c"} {
			l.Apply(key, nil)
		}
		if l.Bytes() != 0 {
			t.Errorf("%s: all is gone, %d bytes are left", text, l.Bytes())
		}
	}
}
