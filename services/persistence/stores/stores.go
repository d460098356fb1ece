// Package stores opens the store that a configuration names. It owns nothing; it
// is apart from package persistence because the stores implement that package's
// seam.
package stores

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/topgun-sync/topgun/services/persistence"
	"github.com/topgun-sync/topgun/services/persistence/memstore"
	"github.com/topgun-sync/topgun/services/persistence/postgres"
	"github.com/topgun-sync/topgun/services/persistence/sqlite"
)

// Open returns the store that config names; the caller closes it. A Postgres that
// is away is no error: the store tries again at every call. A SQLite file is
// opened at once, since one that cannot be opened takes an operator.
func Open(ctx context.Context, config persistence.Config, log *slog.Logger) (persistence.Store, error) {
	switch config.Store {
	case persistence.StorePostgres:
		return postgres.New(config.PostgresURL, log)
	case persistence.StoreSQLite:
		return sqlite.Open(ctx, config.SQLitePath)
	case persistence.StoreMemory:
		return memstore.New(), nil
	default:
		return nil, fmt.Errorf("the store must be %s, %s or %s",
			persistence.StorePostgres, persistence.StoreSQLite, persistence.StoreMemory)
	}
}
