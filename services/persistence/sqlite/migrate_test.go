package sqlite_test

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/pressly/goose/v3"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/services/persistence"
)

// storeVersion1 is how the program of the first version stores.
const storeVersion1 = `
INSERT INTO records AS r
       (map, key, key_text, partition, value, value_json, millis, counter, node_id,
        arrival_millis, arrival_counter, deleted, ttl_millis, expires_at, restamped)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (partition, map, key) DO UPDATE SET value = excluded.value`

// TestMigratesVersion1 opens a file that the first version wrote.
func TestMigratesVersion1(t *testing.T) {
	path := filepath.Join(t.TempDir(), "topgun.db")
	db := people(t, path)
	provider, err := goose.NewProvider(goose.DialectSQLite3, db, os.DirFS("migrations"), goose.WithTableName("schema_versions"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := provider.UpTo(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	var want []persistence.Record
	for i, key := range []string{"a", "b", "\xff", ""} {
		r := persistence.Record{
			Identity:  persistence.Identity{Map: "todos", Key: key},
			State:     lwwmap.Record{Value: []byte("\xa1x"), Timestamp: hlc.Timestamp{Millis: 1_700_000_000_123, Counter: uint64(i), NodeID: "a\x00b"}, TTLMillis: 1 << 50},
			Arrival:   persistence.Arrival{Millis: uint64(7 + i), Counter: 2},
			Restamped: []hlc.Timestamp{{Millis: 9, NodeID: "liar"}},
		}
		want = append(want, r)
		if _, err := db.Exec(storeVersion1, r.Map, []byte(key), key, r.Partition(), r.State.Value, `"x"`,
			int64(r.State.Timestamp.Millis), i, []byte("a\x00b"), 7+i, 2, false, int64(1)<<50, "9999-01-01 00:00:00.000", `["9:0:liar"]`); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := db.Exec(`INSERT INTO watermarks VALUES ('history', 'lane', 10, 5)`); err != nil {
		t.Fatal(err)
	}

	store := open(t, path)
	defer store.Close()
	var got []persistence.Record
	var marks []persistence.Watermark
	var all []int
	for partition := range 271 {
		all = append(all, partition)
	}
	if err := store.Load(t.Context(), all,
		func(m []persistence.Watermark) error { marks = m; return nil },
		func(r persistence.Record) error { got = append(got, r); return nil }); err != nil {
		t.Fatal(err)
	}
	byIdentity := func(a, b persistence.Record) int { return a.Compare(b.Identity) }
	slices.SortFunc(got, byIdentity)
	slices.SortFunc(want, byIdentity)
	if !slices.EqualFunc(got, want, func(a, b persistence.Record) bool {
		return a.Identity == b.Identity && string(a.State.Value) == string(b.State.Value) && a.State.TTLMillis == b.State.TTLMillis &&
			a.State.Timestamp == b.State.Timestamp && a.Arrival == b.Arrival && slices.Equal(a.Restamped, b.Restamped)
	}) {
		t.Errorf("after the migration the store holds %v, want %v", got, want)
	}
	at := persistence.Position{Sequence: 10, Number: 5}
	if len(marks) != 1 || marks[0] != (persistence.Watermark{History: "history", Lane: "lane", Position: at}) {
		t.Errorf("after the migration the watermarks are %v", marks)
	}
	element := want[1]
	element.Identity = persistence.Identity{Kind: persistence.OR, Map: "todos", Key: "a", Tag: "tag"}
	newer := want[1]
	newer.Arrival.Millis = 99
	if changed, err := store.Commit(t.Context(), persistence.Batch{
		History: "history", Records: []persistence.Record{element, newer},
		Moves: []persistence.Move{{Lane: "lane", From: at, To: persistence.Position{Sequence: 11, Number: 6}}},
	}); err != nil || changed != 2 {
		t.Errorf("after the migration a commit changes %d rows, %v", changed, err)
	}
	var entries int
	if err := people(t, path).QueryRow(`SELECT count(*) FROM entries WHERE value = '"x"'`).Scan(&entries); err != nil || entries != len(want) {
		t.Errorf("entries shows %d rows, %v", entries, err)
	}
	// The program of the version before stores nothing any more.
	if _, err := people(t, path).Exec(storeVersion1, "todos", []byte("a"), "a", 1, []byte{}, nil, 1, 1, []byte("n"), 99, 9, true, 0, nil, nil); err == nil {
		t.Error("the program of version 1 still stores")
	}
}
