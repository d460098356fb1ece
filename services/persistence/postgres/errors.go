package postgres

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/topgun-sync/topgun/services/persistence"
)

// sqlState is the error code that the server gave, or empty.
func sqlState(err error) string {
	if pgErr, ok := errors.AsType[*pgconn.PgError](err); ok {
		return pgErr.Code
	}
	return ""
}

// away lists the codes of a server that cannot work at present, by class or in
// full (PostgreSQL documentation, appendix A).
var away = []string{
	"08",    // connection exception
	"53",    // insufficient resources: connections, memory, disk
	"57",    // operator intervention: shutdown, starting up, cancelled
	"58",    // system error
	"25006", // read-only transaction: the server has become a standby
	"55000", // not in a state to do it: connections to the database are switched off
}

// classify turns an error of the driver into one of the Store's, without its text.
func classify(ctx context.Context, doing string, err error) error {
	if errors.Is(err, persistence.ErrConflict) || errors.Is(err, persistence.ErrRefused) {
		return fmt.Errorf("%s: %w", doing, err)
	}
	state := sqlState(err)
	if state == "" {
		if ctx.Err() != nil {
			return fmt.Errorf("%s: %w", doing, ctx.Err())
		}
		return fmt.Errorf("%s: %w (no connection)", doing, persistence.ErrUnavailable)
	}
	switch {
	case state == "40001" || state == "40P01":
		// Serialization failure or deadlock: only another drainer can be the cause.
		return fmt.Errorf("%s: %w", doing, persistence.ErrConflict)
	case slices.Contains(away, state[:2]) || slices.Contains(away, state):
		if ctx.Err() != nil {
			return fmt.Errorf("%s: %w", doing, ctx.Err())
		}
		return fmt.Errorf("%s: %w (SQLSTATE %s)", doing, persistence.ErrUnavailable, state)
	default:
		return fmt.Errorf("%s: %w (SQLSTATE %s)", doing, persistence.ErrRefused, state)
	}
}
