package pgtest_test

import (
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/topgun-sync/topgun/services/internal/pgtest"
)

func count(t *testing.T, url, query string) int {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatalf("connect: %v", err)
	}
	defer conn.Close(t.Context())
	var n int
	if err := conn.QueryRow(t.Context(), query).Scan(&n); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return n
}

func TestDatabasesAreApart(t *testing.T) {
	t.Parallel()
	one, two := pgtest.NewDatabase(t), pgtest.NewDatabase(t)
	count(t, one, "WITH made AS (SELECT 1) SELECT count(*) FROM made")
	conn, err := pgx.Connect(t.Context(), one)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	if _, err := conn.Exec(t.Context(), "CREATE TABLE here (n int)"); err != nil {
		t.Fatal(err)
	}
	if n := count(t, two, "SELECT count(*) FROM pg_tables WHERE tablename = 'here'"); n != 0 {
		t.Errorf("the second database shows %d tables of the first", n)
	}
}

func TestStopAndStartKeepData(t *testing.T) {
	t.Parallel()
	server := pgtest.Start(t, pgtest.WithFsync())
	url := server.NewDatabase(t)
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(t.Context(), "CREATE TABLE kept AS SELECT 7 AS n"); err != nil {
		t.Fatal(err)
	}
	server.Stop(t)
	if err := conn.Ping(t.Context()); err == nil {
		t.Error("a connection outlived the server")
	}
	_ = conn.Close(t.Context())
	if _, err := pgx.Connect(t.Context(), url); err == nil {
		t.Error("a stopped server accepts connections")
	}
	server.Start(t)
	if n := count(t, url, "SELECT n FROM kept"); n != 7 {
		t.Errorf("the row has %d after the restart, want 7", n)
	}
}
