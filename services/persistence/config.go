package persistence

import (
	"errors"
	"fmt"
	"time"
)

// The kinds of store that Config.Store names.
const (
	StorePostgres = "postgres"
	StoreSQLite   = "sqlite"
	StoreMemory   = "memory"
)

// Config sets the service. DefaultConfig gives the values that suit everybody.
type Config struct {
	// Store is the kind of store: postgres, sqlite or memory.
	Store string
	// PostgresURL is the connection URL of the primary, for the store postgres.
	// It may hold a password and is never logged.
	PostgresURL string
	// SQLitePath is the database file, for the store sqlite. Its folder must exist.
	SQLitePath string

	// BatchChanges is how many coalesced changes close a batch. A batch exceeds it
	// by less than one commit.
	BatchChanges int
	// BatchBytes is how many bytes of changes close a batch. A batch exceeds it by
	// less than one commit.
	BatchBytes int
	// BatchDelay is how long a commit waits at most for others to share its
	// transaction. It waits less while transactions are quick, and after a quiet time
	// not at all.
	BatchDelay time.Duration
	// StoreTimeout is how long one transaction may take before it is given up and
	// tried again.
	StoreTimeout time.Duration

	// TrimEvery is how long the service waits at least before it trims a lane of
	// the log again.
	TrimEvery time.Duration
	// TrimAge is how long a commit has been stored at least before it is trimmed.
	// A partition that loads reads the store first and the log afterwards, so it
	// must be longer than any Load.
	TrimAge time.Duration

	// JournalAge and JournalBytes are for how long and how much of the log is kept
	// behind the store for those who read the journal, whichever ends first; 0 of
	// either keeps nothing for them. The log itself takes a share of its own size at
	// most (commitlog.Log.Expired).
	JournalAge   time.Duration
	JournalBytes int64
}

// DefaultConfig returns the settings of a cluster; the store must still be chosen.
func DefaultConfig() Config {
	return Config{
		// The log keeps what is acked, so a batch may be large: more changes of a key
		// are written once, and more rows share a page, an index and an fsync, which is
		// CPU that the acks get. Small enough that a Load reads little from the log.
		BatchChanges: 10_000,
		BatchBytes:   8 << 20,
		BatchDelay:   100 * time.Millisecond,
		StoreTimeout: 30 * time.Second,
		TrimEvery:    30 * time.Second,
		TrimAge:      2 * time.Minute,
		JournalAge:   24 * time.Hour,
		// More makes the broker's start and a search of the journal take seconds.
		JournalBytes: 64 << 20,
	}
}

// Validate reports what is wrong with the settings.
func (c Config) Validate() error {
	var errs []error
	switch c.Store {
	case StorePostgres:
		if c.PostgresURL == "" {
			errs = append(errs, errors.New("store postgres needs a connection URL"))
		}
	case StoreSQLite:
		if c.SQLitePath == "" {
			errs = append(errs, errors.New("store sqlite needs the path of its file"))
		}
	case StoreMemory:
	default:
		errs = append(errs, fmt.Errorf("the store must be %s, %s or %s", StorePostgres, StoreSQLite, StoreMemory))
	}
	if c.BatchChanges < 1 || c.BatchChanges > 100_000 {
		errs = append(errs, errors.New("batch changes must be 1 to 100000"))
	}
	if c.BatchBytes < 1 || c.BatchBytes > 64<<20 {
		errs = append(errs, errors.New("batch bytes must be 1 B to 64 MiB"))
	}
	if c.BatchDelay < 0 || c.BatchDelay > time.Minute {
		errs = append(errs, errors.New("batch delay must be 0 to 1 minute"))
	}
	if c.StoreTimeout <= 0 {
		errs = append(errs, errors.New("store timeout must be above 0"))
	}
	if c.TrimEvery <= 0 || c.TrimAge <= 0 {
		errs = append(errs, errors.New("trim every and trim age must be above 0"))
	}
	if c.JournalAge < 0 || c.JournalBytes < 0 {
		errs = append(errs, errors.New("journal age and journal bytes must not be below 0"))
	}
	return errors.Join(errs...)
}
