package cli

import (
	"time"

	"github.com/topgun-sync/topgun/services/partition"
	"github.com/topgun-sync/topgun/services/persistence"
)

// Tombstones says how long deletions are remembered.
type Tombstones struct {
	TombstoneRetention time.Duration `name:"tombstone-retention" default:"720h" env:"TOPGUN_TOMBSTONE_RETENTION" placeholder:"TIME" help:"How long a deletion is remembered (default ${default}); 0s for ever. A client that was away for longer starts over."`
}

// Apply sets the partition's configuration.
func (f Tombstones) Apply(config *partition.Config) {
	config.TombstoneRetention = f.TombstoneRetention
}

// Journal says how much of the log is kept for those who read the past.
type Journal struct {
	JournalAge   time.Duration `name:"journal-age" default:"24h" env:"TOPGUN_JOURNAL_AGE" placeholder:"TIME" help:"How long changes can be read from the journal (default ${default})."`
	JournalBytes int64         `name:"journal-bytes" default:"67108864" env:"TOPGUN_JOURNAL_BYTES" placeholder:"BYTES" help:"How much of the log the journal may keep (default ${default})."`
}

// Apply sets the persistence service's configuration.
func (f Journal) Apply(config *persistence.Config) {
	config.JournalAge, config.JournalBytes = f.JournalAge, f.JournalBytes
}
