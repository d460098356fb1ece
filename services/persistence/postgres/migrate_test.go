package postgres_test

import (
	"context"
	"database/sql"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	_ "github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/keyspace"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/services/internal/pgtest"
	"github.com/topgun-sync/topgun/services/persistence"
)

// version1 brings a database to the first version of the schema, with two rows and a
// watermark as that version's program wrote them.
func version1(t *testing.T, url string) {
	t.Helper()
	db, err := sql.Open("pgx", url)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.ExecContext(t.Context(), `CREATE SCHEMA topgun`); err != nil {
		t.Fatal(err)
	}
	provider, err := goose.NewProvider(goose.DialectPostgres, db, os.DirFS("migrations"), goose.WithTableName("topgun.schema_versions"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := provider.UpTo(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	for _, statement := range []string{
		storeVersion1,
		`INSERT INTO topgun.watermarks VALUES ('history', 'lane', 10, 5)`,
	} {
		if _, err := db.ExecContext(t.Context(), statement); err != nil {
			t.Fatal(err)
		}
	}
}

// storeVersion1 is how the program of the first version stores.
const storeVersion1 = `
INSERT INTO topgun.records AS r
       (map, key, key_text, partition, value, value_json, millis, counter, node_id,
        arrival_millis, arrival_counter, deleted, ttl_millis, expires_at, restamped)
VALUES ('todos', 'a', 'a', 101, '\xa178', '"x"', 1700000000123, 1, 'node', 7, 2, false, 0, null, '["9:0:liar"]'),
       ('todos', 'b', 'b', 128, '', null, 1700000000124, 1, 'node', 8, 0, true, 0, null, null)
ON CONFLICT (map, key) DO UPDATE SET value = excluded.value`

// wantMigrated wants what version1 stored, and the store to go on.
func wantMigrated(t *testing.T, url string) {
	t.Helper()
	if keyspace.Partition("a") != 101 || keyspace.Partition("b") != 128 {
		t.Fatalf("the keys are in partitions %d and %d", keyspace.Partition("a"), keyspace.Partition("b"))
	}
	store := open(t, url)
	defer store.Close()
	want := []persistence.Record{
		{
			Identity: persistence.Identity{Map: "todos", Key: "a"},
			State:    lwwmap.Record{Value: []byte("\xa1x"), Timestamp: hlc.Timestamp{Millis: 1_700_000_000_123, Counter: 1, NodeID: "node"}},
			Arrival:  persistence.Arrival{Millis: 7, Counter: 2}, Restamped: []hlc.Timestamp{{Millis: 9, NodeID: "liar"}},
		},
		{
			Identity: persistence.Identity{Map: "todos", Key: "b"},
			State:    lwwmap.Record{Timestamp: hlc.Timestamp{Millis: 1_700_000_000_124, Counter: 1, NodeID: "node"}},
			Arrival:  persistence.Arrival{Millis: 8},
		},
	}
	var got []persistence.Record
	var marks []persistence.Watermark
	err := store.Load(t.Context(), []int{101, 128},
		func(m []persistence.Watermark) error { marks = m; return nil },
		func(r persistence.Record) error { got = append(got, r); return nil })
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(got, func(a, b persistence.Record) int { return a.Compare(b.Identity) })
	if !slices.EqualFunc(got, want, func(a, b persistence.Record) bool {
		return a.Identity == b.Identity && string(a.State.Value) == string(b.State.Value) &&
			a.State.Timestamp == b.State.Timestamp && a.Arrival == b.Arrival && slices.Equal(a.Restamped, b.Restamped)
	}) {
		t.Errorf("after the migration the store holds %v", got)
	}
	at := persistence.Position{Sequence: 10, Number: 5}
	if len(marks) != 1 || marks[0] != (persistence.Watermark{History: "history", Lane: "lane", Position: at}) {
		t.Errorf("after the migration the watermarks are %v", marks)
	}
	element := want[0]
	element.Identity = persistence.Identity{Kind: persistence.OR, Map: "todos", Key: "a", Tag: "tag"}
	newer := want[0]
	newer.Arrival.Millis = 9
	batch := persistence.Batch{History: "history", Records: []persistence.Record{element, newer}, Moves: []persistence.Move{
		{Lane: "lane", From: at, To: persistence.Position{Sequence: 11, Number: 6}},
	}}
	if changed, err := store.Commit(t.Context(), batch); err != nil || changed != 2 {
		t.Errorf("after the migration a commit changes %d rows, %v", changed, err)
	}
}

func TestMigratesVersion1(t *testing.T) {
	t.Parallel()
	url := pgtest.NewDatabase(t)
	version1(t, url)
	execute(t, url, `CREATE ROLE reader_of_entries`)
	t.Cleanup(func() {
		db, err := sql.Open("pgx", url)
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		if _, err := db.ExecContext(context.Background(), `DROP OWNED BY reader_of_entries; DROP ROLE reader_of_entries`); err != nil {
			t.Error(err)
		}
	})
	execute(t, url, `GRANT SELECT ON topgun.entries TO reader_of_entries`)
	wantMigrated(t, url)
	var entries, valid int
	var may bool
	scan(t, url, `SELECT count(*) FROM topgun.entries WHERE key = 'a' AND value = '"x"'`, &entries)
	scan(t, url, `SELECT has_table_privilege('reader_of_entries', 'topgun.entries', 'SELECT')`, &may)
	scan(t, url, `SELECT count(*) FROM pg_index WHERE indrelid = 'topgun.records'::regclass AND indisvalid`, &valid)
	if entries != 1 || !may || valid != 2 {
		t.Errorf("entries shows %d rows, its reader may read: %t, the table has %d indexes; want 1, true, 2", entries, may, valid)
	}
	// The program of the version before stores nothing any more, and says why.
	db, err := sql.Open("pgx", url)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.ExecContext(t.Context(), storeVersion1); err == nil || !strings.Contains(err.Error(), "42P10") {
		t.Errorf("the program of version 1 stores: %v", err)
	}
}

// TestMigrationGoesOn breaks the migration off behind each of its statements
// (RELIABILITY UPG-03).
func TestMigrationGoesOn(t *testing.T) {
	t.Parallel()
	content, err := os.ReadFile("migrations/00002_kinds.sql")
	if err != nil {
		t.Fatal(err)
	}
	statements := strings.SplitAfter(string(content), ";\n")
	statements = statements[:len(statements)-1]
	if len(statements) != 7 {
		t.Fatalf("the migration has %d statements", len(statements))
	}
	for done := 1; done <= len(statements); done++ {
		url := pgtest.NewDatabase(t)
		version1(t, url)
		for _, statement := range statements[:done] {
			execute(t, url, statement)
		}
		wantMigrated(t, url)
	}
}

// TestAMigrationOutlastsItsCallers gives up two calls during a migration that cannot go
// on: were it broken off with each, one that takes longer than a call would never end.
func TestAMigrationOutlastsItsCallers(t *testing.T) {
	t.Parallel()
	url := pgtest.NewDatabase(t)
	version1(t, url)
	db, err := sql.Open("pgx", url)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	reader, err := db.BeginTx(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = reader.Rollback() }()
	if _, err := reader.ExecContext(t.Context(), `LOCK TABLE topgun.records IN ACCESS SHARE MODE`); err != nil {
		t.Fatal(err)
	}
	store := open(t, url)
	defer store.Close()
	migrating := func() (pid int) {
		for pid == 0 {
			scan(t, url, `SELECT coalesce(max(pid), 0) FROM pg_locks
				WHERE NOT granted AND relation = 'topgun.records'::regclass AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`, &pid)
		}
		return pid
	}
	giveUp := func(hold func()) {
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { _, err := store.Watermarks(ctx); ended <- err }()
		hold()
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("a call that was given up: %v", err)
		}
	}
	first := 0
	giveUp(func() { first = migrating() })
	giveUp(func() {
		if second := migrating(); second != first {
			t.Errorf("the migration began again: backend %d, then %d", first, second)
		}
	})
	if err := reader.Rollback(); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Watermarks(t.Context()); err != nil {
		t.Error(err)
	}
}
