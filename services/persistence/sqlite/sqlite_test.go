package sqlite_test

import (
	"database/sql"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/services/persistence"
	"github.com/topgun-sync/topgun/services/persistence/sqlite"
	"github.com/topgun-sync/topgun/services/persistence/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestStore(t *testing.T) {
	storetest.Run(t, func(t *testing.T) storetest.Harness {
		// Characters that a DSN would take for options.
		path := filepath.Join(t.TempDir(), "data ?_pragma=x&#%41.db")
		return storetest.Harness{Open: func(t *testing.T) persistence.Store { return open(t, path) }}
	})
}

func open(t testing.TB, path string) *sqlite.Store {
	t.Helper()
	store, err := sqlite.Open(t.Context(), path)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	return store
}

func batch(records ...persistence.Record) persistence.Batch {
	return persistence.Batch{History: "history", Records: records, Moves: []persistence.Move{
		{Lane: "lane", To: persistence.Position{Sequence: 1, Number: 1}},
	}}
}

// people opens the file as somebody with an SQLite tool would.
func people(t *testing.T, path string) *sql.DB {
	t.Helper()
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func TestPeopleCanReadEntries(t *testing.T) {
	path := filepath.Join(t.TempDir(), "topgun.db")
	store := open(t, path)
	defer store.Close()
	record := func(key string, value []byte, ttl uint64) persistence.Record {
		return persistence.Record{Identity: persistence.Identity{Map: "todos", Key: key}, State: lwwmap.Record{
			Value: value, Timestamp: hlc.Timestamp{Millis: 1_700_000_000_123, NodeID: "node"}, TTLMillis: ttl,
		}, Arrival: persistence.Arrival{Millis: 1}}
	}
	if _, err := store.Commit(t.Context(), batch(
		record("milk", []byte("\x82\xa5title\xa4Milk\xa4done\xc2"), 0),
		record("gone", nil, 0),
		record("expired", []byte("\xa1x"), 1000),
		record("lasts", []byte("\xa1x"), 1<<50),
		record("\xff", []byte("\xc4\x01\x00"), 0),
	)); err != nil {
		t.Fatal(err)
	}
	db := people(t, path)
	var title, written, by string
	err := db.QueryRow(`SELECT value ->> 'title', written_at, written_by FROM entries WHERE map = 'todos' AND key = 'milk'`).Scan(&title, &written, &by)
	if err != nil || title != "Milk" || written != "2023-11-14 22:13:20.123" || by != "node" {
		t.Errorf("the entry reads %q %q %q, %v", title, written, by, err)
	}
	var n, unreadable int
	if err := db.QueryRow(`SELECT count(*), count(*) FILTER (WHERE key IS NULL AND value IS NULL) FROM entries`).Scan(&n, &unreadable); err != nil || n != 3 || unreadable != 1 {
		t.Errorf("there are %d entries, %d of them unreadable, %v; want 3 and 1", n, unreadable, err)
	}
}

// TestPeopleCanReadOtherKinds looks at what is not an LWW-map, and for what is the
// server's own.
func TestPeopleCanReadOtherKinds(t *testing.T) {
	path := filepath.Join(t.TempDir(), "topgun.db")
	store := open(t, path)
	defer store.Close()
	of := func(kind persistence.Kind, mapName, key, tag string, value []byte) persistence.Record {
		return persistence.Record{
			Identity: persistence.Identity{Kind: kind, Map: mapName, Key: key, Tag: tag},
			State:    lwwmap.Record{Value: value, Timestamp: hlc.Timestamp{Millis: 1_700_000_000_123, NodeID: "node"}},
			Arrival:  persistence.Arrival{Millis: 1},
		}
	}
	expired := of(persistence.OR, "tags", "todo", "3:0:a", []byte("\xa4late"))
	expired.State.TTLMillis = 1000
	if _, err := store.Commit(t.Context(), batch(
		of(persistence.LWW, "tags", "todo", "", []byte("\xa3lww")),
		of(persistence.LWW, "$devices", "d", "", []byte("\x80")),
		of(persistence.OR, "tags", "todo", "1:0:a", []byte("\xa3red")),
		of(persistence.OR, "tags", "todo", "2:0:a", nil),
		of(persistence.OR, "tags", "todo", "4:0:a", []byte("\xc0")),
		expired,
		of(persistence.Counter, "+likes", "likes", "a", []byte("\x92\x05\x01")),
		of(persistence.Counter, "+likes", "likes", "b", []byte("\x92\x00\xcf\x00\x1f\xff\xff\xff\xff\xff\xff")),
		of(persistence.Lock, "!locks", "door", "", []byte("\x80")),
	)); err != nil {
		t.Fatal(err)
	}
	db := people(t, path)
	scan := func(query string, into ...any) {
		t.Helper()
		if err := db.QueryRow(query).Scan(into...); err != nil {
			t.Errorf("%s: %v", query, err)
		}
	}
	var entries, elements, nodes int
	var tag, value, added string
	scan(`SELECT count(*) FROM entries`, &entries)
	scan(`SELECT count(*) FROM elements`, &elements)
	scan(`SELECT tag FROM elements WHERE map = 'tags' AND key = 'todo' AND value = '"red"'`, &tag)
	scan(`SELECT value, added, nodes FROM counters WHERE name = 'likes'`, &value, &added, &nodes)
	if entries != 1 || elements != 2 || tag != "1:0:a" {
		t.Errorf("there are %d entries and %d elements, the red one is %q; want 1, 2 and 1:0:a", entries, elements, tag)
	}
	if value != "-9007199254740987" || added != "5" || nodes != 2 {
		t.Errorf("the counter shows %s, added %s, of %d nodes", value, added, nodes)
	}
}

func TestCommitIsDurable(t *testing.T) {
	path := filepath.Join(t.TempDir(), "topgun.db")
	store := open(t, path)
	defer store.Close()
	if _, err := store.Commit(t.Context(), batch()); err != nil {
		t.Fatal(err)
	}
	var mode string
	if err := people(t, path).QueryRow(`PRAGMA journal_mode`).Scan(&mode); err != nil || mode != "wal" {
		t.Errorf("the journal mode is %q, %v; want wal", mode, err)
	}
	// What a kill leaves behind are the files as they are while the store is open.
	killed := filepath.Join(t.TempDir(), "topgun.db")
	for _, suffix := range []string{"", "-wal"} {
		content, err := os.ReadFile(path + suffix)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(killed+suffix, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	after := open(t, killed)
	defer after.Close()
	if marks, err := after.Watermarks(t.Context()); err != nil || len(marks) != 1 {
		t.Errorf("after a kill the watermarks are %v, %v", marks, err)
	}
}

func TestErrorsAreOurs(t *testing.T) {
	dir := t.TempDir()
	if _, err := sqlite.Open(t.Context(), filepath.Join(dir, "missing", "topgun.db")); !errors.Is(err, persistence.ErrUnavailable) {
		t.Errorf("a missing folder gives %v", err)
	}
	garbage := filepath.Join(dir, "garbage.db")
	if err := os.WriteFile(garbage, []byte(strings.Repeat("this is no database", 100)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := sqlite.Open(t.Context(), garbage); !errors.Is(err, persistence.ErrRefused) {
		t.Errorf("a file of something else gives %v", err)
	}

	path := filepath.Join(dir, "topgun.db")
	store := open(t, path)
	defer store.Close()
	// PG-08: a table that is missing is not an empty map.
	if _, err := people(t, path).Exec(`ALTER TABLE records RENAME TO elsewhere`); err != nil {
		t.Fatal(err)
	}
	err := store.Load(t.Context(), []int{1}, func([]persistence.Watermark) error { return nil }, func(persistence.Record) error { return nil })
	if !errors.Is(err, persistence.ErrRefused) || strings.Contains(err.Error(), "no such table") {
		t.Errorf("a missing table gives %v", err)
	}
}
