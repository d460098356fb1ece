// Package sqlite is a persistence.Store in one SQLite file, the default of the one
// binary.
//
// It owns the file (tables records and watermarks, views for people) and its
// migrations. It promises what every Store does; a commit is on the disk when
// Commit returns. People may open the file with any SQLite tool while the service
// runs: readers do not disturb it, and a writer is waited for.
package sqlite

import (
	"cmp"
	"context"
	"database/sql"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"path/filepath"
	"slices"

	"github.com/pressly/goose/v3"
	driver "modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/services/persistence"
)

//go:embed migrations/*.sql
var migrations embed.FS

// Store is safe for concurrent use.
type Store struct {
	// write has one connection, so that our own commits queue here in order and
	// not on the file's lock.
	write *sql.DB
	// read has a few; in WAL mode they see a snapshot and block nobody.
	read *sql.DB
	// loads bounds the Loads that run at once, so that they never take the last
	// connections from the drain. A further Load waits for its turn.
	loads chan struct{}
}

// The settings of connections. busy_timeout comes first, since switching to WAL
// needs the lock as well; synchronous FULL makes a commit wait for the disk. A
// batch of random keys touches a page for each: with the default cache of 2 MiB
// they would be read again from the file, and with the default checkpoint at 1,000
// pages each commit would write them twice.
const (
	writing = "_pragma=busy_timeout(5000)&_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)" +
		"&_pragma=cache_size(-65536)&_pragma=wal_autocheckpoint(8000)&_txlock=immediate"
	reading = "_pragma=busy_timeout(5000)&_pragma=query_only(1)"
)

// maxLoads is how many Loads run at once.
const maxLoads = 4

// Open opens the file at path, creates it if it is missing (its folder must
// exist), and brings its tables to this program's version.
func Open(ctx context.Context, path string) (*Store, error) {
	write, err := open(path, writing)
	if err != nil {
		return nil, err
	}
	write.SetMaxOpenConns(1)
	if err := migrate(ctx, write); err != nil {
		return nil, errors.Join(err, write.Close())
	}
	read, err := open(path, reading)
	if err != nil {
		return nil, errors.Join(err, write.Close())
	}
	read.SetMaxOpenConns(maxLoads + 2)
	return &Store{write: write, read: read, loads: make(chan struct{}, maxLoads)}, nil
}

func open(path, options string) (*sql.DB, error) {
	absolute, err := filepath.Abs(path)
	if err != nil {
		return nil, errors.New("the path of the SQLite file cannot be made absolute")
	}
	// A URL, so that no character of the path is taken for an option.
	db, err := sql.Open("sqlite", "file:"+(&url.URL{Path: absolute}).EscapedPath()+"?"+options)
	if err != nil {
		return nil, fmt.Errorf("open the SQLite file: %w", persistence.ErrRefused)
	}
	return db, nil
}

func migrate(ctx context.Context, db *sql.DB) error {
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return fmt.Errorf("read the migrations: %w", err)
	}
	provider, err := goose.NewProvider(goose.DialectSQLite3, db, files,
		goose.WithTableName("schema_versions"), goose.WithDisableGlobalRegistry(true))
	if err != nil {
		return fmt.Errorf("read the migrations: %w", err)
	}
	if _, err := provider.Up(ctx); err != nil {
		return classify(ctx, "migrate the SQLite file", err)
	}
	return nil
}

// Close implements persistence.Store.
func (s *Store) Close() error {
	if err := errors.Join(s.read.Close(), s.write.Close()); err != nil {
		return fmt.Errorf("close the SQLite file: %w", persistence.ErrRefused)
	}
	return nil
}

const selectRecords = `
SELECT map, key, kind, tag, value, millis, counter, node_id, ttl_millis, arrival_millis, arrival_counter, coalesce(restamped, '')
FROM records
WHERE partition IN (SELECT value FROM json_each(?))`

// Load implements persistence.Store.
func (s *Store) Load(ctx context.Context, partitions []int, watermarks func([]persistence.Watermark) error, record func(persistence.Record) error) error {
	wanted, err := json.Marshal(partitions)
	if err != nil {
		return fmt.Errorf("load records: %w", err)
	}
	select {
	case s.loads <- struct{}{}:
		defer func() { <-s.loads }()
	case <-ctx.Done():
		return fmt.Errorf("wait for a turn to load: %w", ctx.Err())
	}
	// The snapshot begins with the first read and holds for both queries.
	tx, err := s.read.BeginTx(ctx, nil)
	if err != nil {
		return classify(ctx, "load records", err)
	}
	defer func() { _ = tx.Rollback() }() // read only, nothing to lose

	marks, err := readWatermarks(ctx, tx)
	if err != nil {
		return classify(ctx, "load watermarks", err)
	}
	if err := watermarks(marks); err != nil {
		return err
	}
	rows, err := tx.QueryContext(ctx, selectRecords, string(wanted))
	if err != nil {
		return classify(ctx, "load records", err)
	}
	defer func() { _ = rows.Close() }() // its error shows in rows.Err
	for rows.Next() {
		r, err := scanRecord(rows)
		if err != nil {
			return classify(ctx, "load records", err)
		}
		if err := record(r); err != nil {
			return err
		}
	}
	if err := rows.Err(); err != nil {
		return classify(ctx, "load records", err)
	}
	return nil
}

func scanRecord(rows *sql.Rows) (persistence.Record, error) {
	var (
		r         persistence.Record
		restamped string
		value     []byte
		stamp     hlc.Timestamp
	)
	if err := rows.Scan(&r.Map, &r.Key, &r.Kind, &r.Tag, &value, &stamp.Millis, &stamp.Counter, &stamp.NodeID,
		&r.State.TTLMillis, &r.Arrival.Millis, &r.Arrival.Counter, &restamped); err != nil {
		return r, err
	}
	r.State = lwwmap.Record{Value: value, Timestamp: stamp, TTLMillis: r.State.TTLMillis}
	var err error
	r.Restamped, err = persistence.DecodeRestamped(restamped)
	return r, err
}

// Watermarks implements persistence.Store.
func (s *Store) Watermarks(ctx context.Context) ([]persistence.Watermark, error) {
	marks, err := readWatermarks(ctx, s.read)
	if err != nil {
		return nil, classify(ctx, "read watermarks", err)
	}
	return marks, nil
}

type querier interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

func readWatermarks(ctx context.Context, q querier) (marks []persistence.Watermark, err error) {
	rows, err := q.QueryContext(ctx, `SELECT history, lane, sequence, number FROM watermarks`)
	if err != nil {
		return nil, err
	}
	defer func() { _ = rows.Close() }() // its error shows in rows.Err
	for rows.Next() {
		var mark persistence.Watermark
		if err := rows.Scan(&mark.History, &mark.Lane, &mark.Sequence, &mark.Number); err != nil {
			return nil, err
		}
		marks = append(marks, mark)
	}
	return marks, rows.Err()
}

// Stats implements persistence.Store.
func (s *Store) Stats(ctx context.Context) (persistence.Stats, error) {
	var stats persistence.Stats
	err := s.read.QueryRowContext(ctx, `SELECT count(*), count(*) FILTER (WHERE deleted) FROM records`).
		Scan(&stats.Records, &stats.Tombstones)
	if err != nil {
		return persistence.Stats{}, classify(ctx, "count records", err)
	}
	return stats, nil
}

// The watermarks move by compare-and-set (RELIABILITY PG-07).
const (
	moveWatermark = `
UPDATE watermarks SET sequence = ?, number = ?
WHERE history = ? AND lane = ? AND sequence = ? AND number = ?`

	startWatermark = `
INSERT INTO watermarks (sequence, number, history, lane) VALUES (?, ?, ?, ?)
ON CONFLICT (history, lane) DO NOTHING`
)

// upsertRecord replaces a row by the rule of persistence.Record.Replaces. SQLite
// compares blobs bytewise, as the protocol compares node ids.
const upsertRecord = `
INSERT INTO records AS r
       (map, key, kind, tag, key_text, partition, value, value_json, millis, counter, node_id,
        arrival_millis, arrival_counter, deleted, ttl_millis, expires_at, restamped)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (partition, map, key, kind, tag) DO UPDATE SET
       value = excluded.value, value_json = excluded.value_json,
       millis = excluded.millis, counter = excluded.counter, node_id = excluded.node_id,
       arrival_millis = excluded.arrival_millis, arrival_counter = excluded.arrival_counter,
       deleted = excluded.deleted, ttl_millis = excluded.ttl_millis,
       expires_at = excluded.expires_at, restamped = excluded.restamped
WHERE (excluded.arrival_millis, excluded.arrival_counter) > (r.arrival_millis, r.arrival_counter)
  AND (r.kind <> 0 OR (excluded.millis, excluded.counter, excluded.node_id) >= (r.millis, r.counter, r.node_id))`

// deletePruned forgets what arrived before it was pruned.
const deletePruned = `
DELETE FROM records
WHERE partition = ? AND map = ? AND key = ? AND kind = ? AND tag = ?
  AND (arrival_millis, arrival_counter) < (?, ?)`

// Commit implements persistence.Store.
func (s *Store) Commit(ctx context.Context, batch persistence.Batch) (int, error) {
	if err := batch.Check(); err != nil {
		return 0, fmt.Errorf("commit batch: %w", err)
	}
	tx, err := s.write.BeginTx(ctx, nil)
	if err != nil {
		return 0, classify(ctx, "commit batch", err)
	}
	changed, err := apply(ctx, tx, batch)
	if err == nil {
		err = tx.Commit()
	}
	if err != nil {
		_ = tx.Rollback() // the first error is the one that tells
		return 0, classify(ctx, "commit batch", err)
	}
	return changed, nil
}

func apply(ctx context.Context, tx *sql.Tx, batch persistence.Batch) (changed int, err error) {
	for _, move := range batch.Moves {
		query, args := moveWatermark, []any{move.To.Sequence, move.To.Number, batch.History, move.Lane, move.From.Sequence, move.From.Number}
		if move.From == (persistence.Position{}) {
			query, args = startWatermark, args[:4]
		}
		result, err := tx.ExecContext(ctx, query, args...)
		if err != nil {
			return 0, err
		}
		hit, err := result.RowsAffected()
		if err != nil {
			return 0, err
		}
		if hit == 0 {
			return 0, persistence.ErrConflict
		}
	}
	pruned := sorted(batch.Pruned, func(p persistence.Pruned) persistence.Identity { return p.Identity })
	forgotten, err := each(ctx, tx, deletePruned, pruned, prunedArguments)
	if err != nil {
		return 0, err
	}
	records := sorted(batch.Records, func(r persistence.Record) persistence.Identity { return r.Identity })
	stored, err := each(ctx, tx, upsertRecord, records, recordArguments)
	return forgotten + stored, err
}

// each runs a statement for each row and returns how many it changed.
func each[T any](ctx context.Context, tx *sql.Tx, query string, rows []row[T], arguments func(row[T]) ([]any, error)) (changed int, err error) {
	if len(rows) == 0 {
		return 0, nil
	}
	statement, err := tx.PrepareContext(ctx, query)
	if err != nil {
		return 0, err
	}
	defer func() { _ = statement.Close() }() // ends with the transaction anyway
	// A row takes microseconds: between rows is often enough to look whether the time is
	// over, while the driver would start a goroutine for each to watch for it.
	uninterrupted := context.WithoutCancel(ctx)
	for _, r := range rows {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		args, err := arguments(r)
		if err != nil {
			return 0, err
		}
		result, err := statement.ExecContext(uninterrupted, args...)
		if err != nil {
			return 0, err
		}
		hit, err := result.RowsAffected()
		if err != nil {
			return 0, err
		}
		changed += int(hit)
	}
	return changed, nil
}

// row is a record, or what was forgotten of one, with its partition, which is a hash
// and worth taking once.
type row[T any] struct {
	of        T
	id        persistence.Identity
	partition int
}

// sorted puts rows in the tree's order, in which they are written page by page.
func sorted[T any](all []T, identity func(T) persistence.Identity) []row[T] {
	rows := make([]row[T], len(all))
	for i, r := range all {
		id := identity(r)
		rows[i] = row[T]{r, id, id.Partition()}
	}
	slices.SortFunc(rows, func(a, b row[T]) int {
		return cmp.Or(cmp.Compare(a.partition, b.partition), a.id.Compare(b.id))
	})
	return rows
}

// prunedArguments are the values of deletePruned.
func prunedArguments(r row[persistence.Pruned]) ([]any, error) {
	p := r.of
	return []any{
		r.partition, p.Map, []byte(p.Key), int64(p.Kind), []byte(p.Tag),
		int64(p.Arrival.Millis), int64(p.Arrival.Counter),
	}, nil
}

// recordArguments are the values of upsertRecord.
func recordArguments(row row[persistence.Record]) ([]any, error) {
	r := row.of
	var keyText, valueJSON, expires, restamped any
	if text, ok := r.KeyText(); ok {
		keyText = text
	}
	if text, ok := r.ValueJSON(nil); ok {
		valueJSON = string(text)
	}
	if at, ok := r.ExpiresAt(); ok {
		expires = at.Format("2006-01-02 15:04:05.000")
	}
	text, err := persistence.EncodeRestamped(r.Restamped)
	if err != nil {
		return nil, err
	}
	if text != "" {
		restamped = text
	}
	value := r.State.Value
	if value == nil {
		value = []byte{} // nil would be NULL
	}
	stamp := r.State.Timestamp
	return []any{
		r.Map, []byte(r.Key), int64(r.Kind), []byte(r.Tag), keyText, row.partition, value, valueJSON,
		int64(stamp.Millis), int64(stamp.Counter), []byte(stamp.NodeID),
		int64(r.Arrival.Millis), int64(r.Arrival.Counter),
		r.State.Deleted(), int64(r.State.TTLMillis), expires, restamped,
	}, nil
}

// classify turns an error of the driver into one of the Store's, without its text.
func classify(ctx context.Context, doing string, err error) error {
	if errors.Is(err, persistence.ErrConflict) || errors.Is(err, persistence.ErrRefused) {
		return fmt.Errorf("%s: %w", doing, err)
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%s: %w", doing, ctx.Err())
	}
	failure, ok := errors.AsType[*driver.Error](err)
	if !ok {
		return fmt.Errorf("%s: %w", doing, persistence.ErrRefused)
	}
	// The low byte is the primary code; the rest says where it happened.
	switch code := failure.Code() & 0xff; code {
	case sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_INTERRUPT,
		sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN:
		return fmt.Errorf("%s: %w (SQLite result %d)", doing, persistence.ErrUnavailable, code)
	default:
		return fmt.Errorf("%s: %w (SQLite result %d)", doing, persistence.ErrRefused, code)
	}
}

var _ persistence.Store = (*Store)(nil)
