package postgres

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"

	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/lock"

	"github.com/topgun-sync/topgun/services/persistence"
)

//go:embed migrations/*.sql
var migrations embed.FS

// versions is goose's table; it lives beside ours and not in public, where a
// careful database lets nobody create anything.
const versions = "topgun.schema_versions"

// ensureSchema brings the schema to this program's version before the first use,
// and says once how durable the server is.
//
// A schema that is up to date is only read, so that a role without the right to
// define tables can run the service. A newer schema is left alone: what it does not
// take from this program it refuses, and nothing is lost meanwhile (UPG-02).
//
// A migration of a large table takes longer than a call may, so it is not the call's:
// it goes on when the caller gives up, and until Close. Broken off and begun again by
// every call it would never end.
func (s *Store) ensureSchema(ctx context.Context) error {
	s.mu.Lock()
	p := s.preparation
	switch {
	case s.prepared:
		s.mu.Unlock()
		return nil
	case s.life.Err() != nil:
		s.mu.Unlock()
		return fmt.Errorf("prepare the schema: %w (closed)", persistence.ErrUnavailable)
	case p == nil:
		p = &preparation{done: make(chan struct{})}
		s.preparation = p
		s.preparing.Go(func() {
			err := s.prepare(s.life)
			s.mu.Lock()
			defer s.mu.Unlock()
			s.preparation, s.prepared = nil, err == nil
			p.err = err
			close(p.done)
		})
	}
	s.mu.Unlock()
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
		return fmt.Errorf("wait for the schema: %w", ctx.Err())
	}
}

// preparation is one look at the schema, for all who wait for it.
type preparation struct {
	done chan struct{}
	err  error // set before done is closed
}

// prepare reads the schema's version and migrates.
func (s *Store) prepare(ctx context.Context) error {
	current, err := s.schemaVersion(ctx)
	if err != nil {
		return classify(ctx, "read the schema's version", err)
	}
	db := stdlib.OpenDBFromPool(s.pool)
	// The handle keeps no connection of its own, so that closing it loses nothing.
	defer func() { _ = db.Close() }()
	provider, err := newProvider(db)
	if err != nil {
		return fmt.Errorf("read the migrations: %w", err)
	}
	sources := provider.ListSources()
	if newest := sources[len(sources)-1].Version; current < newest {
		if err := s.migrate(ctx, provider); err != nil {
			return classify(ctx, "migrate the schema", err)
		}
		s.log.InfoContext(ctx, "schema migrated", "from", current, "to", newest)
	} else if current > newest {
		s.log.WarnContext(ctx, "the schema is newer than this program", "schema", current, "program", newest)
	}
	if err := s.reportDurability(ctx); err != nil {
		return classify(ctx, "read the server's durability settings", err)
	}
	if err := s.reportRights(ctx); err != nil {
		return classify(ctx, "read the role's rights", err)
	}
	return nil
}

// reportRights logs when the role may not delete rows, as roles that were set up for
// the first version of the schema may not: the drain stops at the first tombstone that
// is forgotten.
func (s *Store) reportRights(ctx context.Context) error {
	var may bool
	if err := s.pool.QueryRow(ctx, `SELECT has_table_privilege('topgun.records', 'DELETE')`).Scan(&may); err != nil {
		return err
	}
	if !may {
		s.log.WarnContext(ctx, "the role may not delete rows and needs to: GRANT DELETE ON topgun.records")
	}
	return nil
}

func newProvider(db *sql.DB) (*goose.Provider, error) {
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return nil, err
	}
	// Seconds and tries: a process that waits for another's migration gives up after
	// a minute and its caller tries again; a server that has gone is not waited for.
	locker, err := lock.NewPostgresSessionLocker(lock.WithLockTimeout(1, 60), lock.WithUnlockTimeout(1, 1))
	if err != nil {
		return nil, err
	}
	return goose.NewProvider(goose.DialectPostgres, db, files,
		goose.WithTableName(versions),
		goose.WithSessionLocker(locker),
		goose.WithDisableGlobalRegistry(true))
}

// schemaVersion is the newest migration that the database has, 0 for none.
func (s *Store) schemaVersion(ctx context.Context) (int64, error) {
	var exists bool
	if err := s.pool.QueryRow(ctx, `SELECT to_regclass($1) IS NOT NULL`, versions).Scan(&exists); err != nil || !exists {
		return 0, err
	}
	var version int64
	err := s.pool.QueryRow(ctx, `SELECT coalesce(max(version_id) FILTER (WHERE is_applied), 0) FROM `+versions).Scan(&version)
	return version, err
}

func (s *Store) migrate(ctx context.Context, provider *goose.Provider) error {
	// goose creates its table before it takes its lock, so the schema comes first;
	// of two processes that create it at once one fails with a unique violation.
	_, err := s.pool.Exec(ctx, `CREATE SCHEMA IF NOT EXISTS topgun`)
	if state := sqlState(err); err != nil && state != "23505" && state != "42P06" {
		return err
	}
	if _, err := provider.Up(ctx); err != nil {
		if partial, ok := errors.AsType[*goose.PartialError](err); ok {
			return partial.Err
		}
		return err
	}
	return nil
}

// reportDurability logs settings under which Postgres may lose a transaction that
// it reported as committed (RELIABILITY ACK-09). The log has been trimmed by then.
func (s *Store) reportDurability(ctx context.Context) error {
	rows, err := s.pool.Query(ctx, `
SELECT name, setting FROM pg_settings
WHERE name IN ('fsync', 'full_page_writes', 'synchronous_commit') AND setting = 'off' ORDER BY name`)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var name, setting string
		if err := rows.Scan(&name, &setting); err != nil {
			return err
		}
		s.log.WarnContext(ctx, "Postgres may lose stored records when its machine fails", "setting", name, "value", setting)
	}
	return rows.Err()
}

var _ persistence.Store = (*Store)(nil)
