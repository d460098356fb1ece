package postgres_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"go.uber.org/goleak"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/services/internal/pgtest"
	"github.com/topgun-sync/topgun/services/persistence"
	"github.com/topgun-sync/topgun/services/persistence/postgres"
	"github.com/topgun-sync/topgun/services/persistence/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestStore(t *testing.T) {
	storetest.Run(t, func(t *testing.T) storetest.Harness {
		url := pgtest.NewDatabase(t)
		return storetest.Harness{
			Open:  func(t *testing.T) persistence.Store { return open(t, url) },
			Break: func(t *testing.T) func() { return shut(t, url) },
		}
	})
}

func open(t testing.TB, url string) *postgres.Store {
	t.Helper()
	store, err := postgres.New(url, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	return store
}

// shut ends all connections to the test's database and allows no more.
func shut(t *testing.T, url string) (heal func()) {
	t.Helper()
	config, err := pgx.ParseConfig(url)
	if err != nil {
		t.Fatal(err)
	}
	name := pgx.Identifier{config.Database}.Sanitize()
	config.Database = "postgres"
	admin := func(statement string) {
		t.Helper()
		// Also from a cleanup, when the test's context has ended.
		conn, err := pgx.ConnectConfig(context.Background(), config)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(context.Background())
		if _, err := conn.Exec(context.Background(), statement); err != nil {
			t.Fatalf("%s: %v", statement, err)
		}
	}
	admin(`ALTER DATABASE ` + name + ` ALLOW_CONNECTIONS false`)
	admin(`SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '` + strings.Trim(name, `"`) + `'`)
	return func() { admin(`ALTER DATABASE ` + name + ` ALLOW_CONNECTIONS true`) }
}

func execute(t *testing.T, url, statement string, args ...any) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	if _, err := conn.Exec(t.Context(), statement, args...); err != nil {
		t.Fatalf("%s: %v", statement, err)
	}
}

func scan(t *testing.T, url, query string, into ...any) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	if err := conn.QueryRow(t.Context(), query).Scan(into...); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
}

func record(key string, value []byte, ttl uint64) persistence.Record {
	return persistence.Record{Identity: persistence.Identity{Map: "todos", Key: key}, State: lwwmap.Record{
		Value: value, Timestamp: hlc.Timestamp{Millis: 1_700_000_000_123, NodeID: "node"}, TTLMillis: ttl,
	}, Arrival: persistence.Arrival{Millis: 1}}
}

func batch(records ...persistence.Record) persistence.Batch {
	return persistence.Batch{History: "history", Records: records, Moves: []persistence.Move{
		{Lane: "lane", To: persistence.Position{Sequence: 1, Number: 1}},
	}}
}

func TestPeopleCanReadEntries(t *testing.T) {
	url := pgtest.NewDatabase(t)
	store := open(t, url)
	defer store.Close()
	if _, err := store.Commit(t.Context(), batch(
		record("milk", []byte("\x82\xa5title\xa4Milk\xa4done\xc2"), 0),
		record("gone", nil, 0),
		record("expired", []byte("\xa1x"), 1000),
		record("lasts", []byte("\xa1x"), 1<<50),
		record("\xff", []byte("\xc4\x01\x00"), 0),
	)); err != nil {
		t.Fatal(err)
	}
	var title, written, by string
	scan(t, url, `SELECT value ->> 'title', (written_at AT TIME ZONE 'UTC')::text, written_by
		FROM topgun.entries WHERE map = 'todos' AND key = 'milk' AND value @> '{"done": false}'`, &title, &written, &by)
	if title != "Milk" || written != "2023-11-14 22:13:20.123" || by != "node" {
		t.Errorf("the entry reads %q %q %q", title, written, by)
	}
	var n, unreadable int
	scan(t, url, `SELECT count(*), count(*) FILTER (WHERE key IS NULL AND value IS NULL) FROM topgun.entries`, &n, &unreadable)
	if n != 3 || unreadable != 1 {
		t.Errorf("there are %d entries, %d of them unreadable; want 3 and 1", n, unreadable)
	}
}

// TestPeopleCanReadOtherKinds looks at what is not an LWW-map, and for what is the
// server's own.
func TestPeopleCanReadOtherKinds(t *testing.T) {
	url := pgtest.NewDatabase(t)
	store := open(t, url)
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
	var entries, elements, nodes int
	var tag, value, added string
	scan(t, url, `SELECT count(*) FROM topgun.entries`, &entries)
	scan(t, url, `SELECT count(*) FROM topgun.elements`, &elements)
	scan(t, url, `SELECT tag FROM topgun.elements WHERE map = 'tags' AND key = 'todo' AND value = '"red"'`, &tag)
	scan(t, url, `SELECT value::text, added::text, nodes FROM topgun.counters WHERE name = 'likes'`, &value, &added, &nodes)
	if entries != 1 || elements != 2 || tag != "1:0:a" {
		t.Errorf("there are %d entries and %d elements, the red one is %q; want 1, 2 and 1:0:a", entries, elements, tag)
	}
	if value != "-9007199254740987" || added != "5" || nodes != 2 {
		t.Errorf("the counter shows %s, added %s, of %d nodes", value, added, nodes)
	}
}

// TestUnreadableFormDoesNotBlock makes the readable column refuse everything: the
// batch must be stored all the same.
func TestUnreadableFormDoesNotBlock(t *testing.T) {
	url := pgtest.NewDatabase(t)
	store := open(t, url)
	defer store.Close()
	if _, err := store.Watermarks(t.Context()); err != nil {
		t.Fatal(err)
	}
	execute(t, url, `CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN IF NEW.value_json IS NOT NULL THEN RAISE SQLSTATE '22P05'; END IF; RETURN NEW; END $$`)
	execute(t, url, `CREATE TRIGGER refuse BEFORE INSERT ON topgun.records FOR EACH ROW EXECUTE FUNCTION refuse()`)
	if changed, err := store.Commit(t.Context(), batch(record("a", []byte("\xa1x"), 0))); err != nil || changed != 1 {
		t.Errorf("the commit changed %d rows, %v", changed, err)
	}
}

func TestManyMigrateAtOnce(t *testing.T) {
	url := pgtest.NewDatabase(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			store := open(t, url)
			defer store.Close()
			if _, err := store.Watermarks(t.Context()); err != nil {
				t.Errorf("the first use: %v", err)
			}
		})
	}
	wg.Wait()
	var versions, runs int
	scan(t, url, `SELECT count(DISTINCT version_id), count(*) FROM topgun.schema_versions WHERE version_id > 0`, &versions, &runs)
	if versions != 2 || runs != 2 {
		t.Errorf("%d migrations ran %d times", versions, runs)
	}
}

// TestRoleWithoutDDL runs the service as a role that may only read and write rows,
// once somebody else has migrated.
func TestRoleWithoutDDL(t *testing.T) {
	url := pgtest.NewDatabase(t)
	owner := open(t, url)
	defer owner.Close()
	if _, err := owner.Watermarks(t.Context()); err != nil {
		t.Fatal(err)
	}
	config, err := pgx.ParseConfig(url)
	if err != nil {
		t.Fatal(err)
	}
	role := config.Database + "_role"
	execute(t, url, `CREATE ROLE `+role+` LOGIN`)
	t.Cleanup(func() {
		conn, err := pgx.Connect(context.Background(), url)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(context.Background())
		if _, err := conn.Exec(context.Background(), `DROP OWNED BY `+role+`; DROP ROLE `+role); err != nil {
			t.Error(err)
		}
	})
	execute(t, url, `GRANT USAGE ON SCHEMA topgun TO `+role)
	execute(t, url, `GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA topgun TO `+role)
	var log bytes.Buffer
	store, err := postgres.New(strings.Replace(url, "postgres@", role+"@", 1), slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	stored := record("a", []byte("\xa1x"), 0)
	if _, err := store.Commit(t.Context(), batch(stored)); err != nil {
		t.Errorf("commit: %v", err)
	}
	// The right to delete is missed, by name, and then used.
	if !strings.Contains(log.String(), "GRANT DELETE ON topgun.records") {
		t.Errorf("the log does not name the right that is missing:\n%s", log.String())
	}
	forget := persistence.Batch{
		History: "other", Moves: batch().Moves,
		Pruned: []persistence.Pruned{{Identity: stored.Identity, Arrival: persistence.Arrival{Millis: 2}}},
	}
	if _, err := store.Commit(t.Context(), forget); !errors.Is(err, persistence.ErrRefused) {
		t.Errorf("without the right to delete the commit returns %v", err)
	}
	execute(t, url, `GRANT DELETE ON topgun.records TO `+role)
	if changed, err := store.Commit(t.Context(), forget); err != nil || changed != 1 {
		t.Errorf("with the right to delete the commit changes %d rows, %v", changed, err)
	}
}

func TestErrorsAreOurs(t *testing.T) {
	var log bytes.Buffer
	logger := slog.New(slog.NewTextHandler(&log, nil))
	if _, err := postgres.New("postgres://user:s3cret@host:port/db", logger); err == nil || strings.Contains(err.Error(), "s3cret") || strings.Contains(err.Error(), "host:port/db") && strings.Contains(err.Error(), "user:s3cret") {
		t.Errorf("a broken URL gives %v", err)
	}
	nowhere, err := postgres.New("postgres://user:s3cret@127.0.0.1:1/db", logger)
	if err != nil {
		t.Fatal(err)
	}
	defer nowhere.Close()
	_, err = nowhere.Watermarks(t.Context())
	if !errors.Is(err, persistence.ErrUnavailable) || strings.Contains(fmt.Sprintf("%+v", err), "s3cret") || strings.Contains(err.Error(), "127.0.0.1") {
		t.Errorf("no server gives %v", err)
	}

	url := pgtest.NewDatabase(t)
	store, err := postgres.New(url, logger)
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	if _, err := store.Watermarks(t.Context()); err != nil {
		t.Fatal(err)
	}
	// PG-08: a table that is missing is not an empty map, and a standby is not asked.
	execute(t, url, `ALTER TABLE topgun.records RENAME TO elsewhere`)
	err = store.Load(t.Context(), []int{1}, func([]persistence.Watermark) error { return nil }, func(persistence.Record) error { return nil })
	if !errors.Is(err, persistence.ErrRefused) || strings.Contains(err.Error(), "does not exist") {
		t.Errorf("a missing table gives %v", err)
	}
	config, err := pgx.ParseConfig(url)
	if err != nil {
		t.Fatal(err)
	}
	execute(t, url, `ALTER DATABASE `+config.Database+` SET default_transaction_read_only = on`)
	standby, err := postgres.New(url, logger)
	if err != nil {
		t.Fatal(err)
	}
	defer standby.Close()
	if _, err := standby.Watermarks(t.Context()); !errors.Is(err, persistence.ErrUnavailable) {
		t.Errorf("a server that does not accept writes gives %v", err)
	}
	if strings.Contains(log.String(), "s3cret") {
		t.Error("the log holds the password")
	}
}

// TestWeakServerIsNamed wants a line in the log for each setting under which the
// server may lose what it confirmed (ACK-09). The tests' own cluster has such.
func TestWeakServerIsNamed(t *testing.T) {
	url := pgtest.NewDatabase(t)
	var log bytes.Buffer
	store, err := postgres.New(url+"&synchronous_commit=off", slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	if _, err := store.Watermarks(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(log.String(), "setting=synchronous_commit") {
		t.Errorf("the log does not name the setting:\n%s", log.String())
	}
}
