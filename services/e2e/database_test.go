package e2e

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"fmt"
	"path/filepath"
	"testing"

	_ "github.com/jackc/pgx/v5/stdlib" // the oracle reads the rows as any Postgres user would
	_ "modernc.org/sqlite"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/services/internal/pgtest"
)

// database is a Postgres server of one cluster, which can be stopped.
type database struct {
	server *pgtest.Server
	url    string
}

func newDatabase(t testing.TB) *database {
	t.Helper()
	server := pgtest.Start(t)
	return &database{server: server, url: server.NewDatabase(t)}
}

func (d *database) rows(t testing.TB, mapName string) map[string]lwwmap.Record {
	t.Helper()
	return readRows(t, "pgx", d.url, "topgun.records", "$1", mapName)
}

func sqliteRows(t testing.TB, dir, mapName string) map[string]lwwmap.Record {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.db"))
	if err != nil || len(files) != 1 {
		t.Fatalf("want one database file in the data folder, found %d", len(files))
	}
	return readRows(t, "sqlite", "file:"+files[0]+"?mode=ro&_pragma=busy_timeout(5000)", "records", "?", mapName)
}

func readRows(t testing.TB, driver, url, table, param, mapName string) map[string]lwwmap.Record {
	t.Helper()
	db, err := sql.Open(driver, url)
	must(t, err)
	defer db.Close()
	query := fmt.Sprintf(`SELECT key, value, millis, counter, node_id, ttl_millis, deleted FROM %s WHERE kind = 0 AND map = %s`, table, param)
	rows, err := db.QueryContext(context.Background(), query, mapName)
	must(t, err)
	defer rows.Close()
	records := make(map[string]lwwmap.Record)
	for rows.Next() {
		var key, node []byte
		var r lwwmap.Record
		var deleted bool
		must(t, rows.Scan(&key, &r.Value, &r.Timestamp.Millis, &r.Timestamp.Counter, &node, &r.TTLMillis, &deleted))
		r.Timestamp.NodeID = string(node)
		if deleted != r.Deleted() {
			t.Errorf("row %q: deleted is %v, and the value has %d bytes", key, deleted, len(r.Value))
		}
		records[string(key)] = r
	}
	must(t, rows.Err())
	return records
}

// digest is the content digest of rows, comparable with that of a client's map.
func digest(records map[string]lwwmap.Record) [sha256.Size]byte {
	var m lwwmap.Map
	for key, r := range records {
		m.Merge(key, r)
	}
	return m.Digest()
}

// sameRows waits until the database holds exactly the given content.
func sameRows(t testing.TB, c Cluster, mapName string, want [sha256.Size]byte) {
	t.Helper()
	eventually(t, deadline, func() error {
		rows := c.Rows(t, mapName)
		if digest(rows) != want {
			return fmt.Errorf("the %d rows of %s differ from the clients' content", len(rows), mapName)
		}
		return nil
	})
}

// stamp makes a stamp for records that tests build by hand.
func stamp(millis, counter uint64, node string) hlc.Timestamp {
	return hlc.Timestamp{Millis: millis, Counter: counter, NodeID: node}
}
