package persistence

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"
	"time"

	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
	"github.com/topgun-sync/topgun/services/internal/commitlog"
)

// The journal is the log, seen as changes of users' maps. The sequence of an entry
// is its commit's sequence in the stream and its place in the commit, so it is the
// same at every reading, whatever else the log holds or no longer holds.
const (
	// placeBits is room for the place: a commit of the largest size holds less than
	// 2^16 changes.
	placeBits = 20

	// maxScan is how long one search of the log may take.
	maxScan = 5 * time.Second
	// maxScans is how many searches run at once, since each may read all of the log;
	// a further one waits for its turn.
	maxScans = 2
	// pageBytes bounds a page; an entry above it travels alone.
	pageBytes = 4 << 20
	// maxSkips is how many stretches without a match are remembered.
	maxSkips = 256
)

// errScanTime means that a search has not come far enough to answer. It is
// remembered how far it came.
var errScanTime = errors.New("the search took too long")

// journalType is what a change did to its key.
type journalType uint8

const (
	journalPut journalType = iota + 1
	journalUpdate
	journalDelete
)

// journalEntry is a change with its place in the journal. The change is shared.
type journalEntry struct {
	sequence uint64
	kind     journalType
	change   *typesv1.Change
}

// size is about how many bytes the entry takes in memory and on the wire.
func (e journalEntry) size() int {
	c := e.change
	return 160 + len(c.GetMap()) + len(c.GetKey()) + len(c.GetTag()) + len(c.GetRecord().GetValue())
}

// journalFilter chooses entries.
type journalFilter struct {
	// mapName is the only map, empty for all.
	mapName string
	// types holds a bit for each type, none for all.
	types uint8
}

func (f journalFilter) takes(kind journalType, mapName string) bool {
	return (f.mapName == "" || f.mapName == mapName) && (f.types == 0 || f.types&(1<<kind) != 0)
}

// journalTypeOf says what a change did, and whether the journal shows it: what
// happened to a key of a user's LWW-map or a tag of a user's OR-map, and not that
// something was forgotten.
func journalTypeOf(change *typesv1.Change) (kind journalType, shown bool) {
	switch change.GetKind() {
	case typesv1.Kind_KIND_UNSPECIFIED, typesv1.Kind_KIND_LWW, typesv1.Kind_KIND_OR:
	default:
		return 0, false
	}
	if change.GetPruned() || !userMap(change.GetMap()) {
		return 0, false
	}
	switch {
	case len(change.GetRecord().GetValue()) == 0:
		return journalDelete, true
	case change.GetReplaced():
		return journalUpdate, true
	default:
		return journalPut, true
	}
}

// userMap tells a user's map from the server's own, by its first letter.
func userMap(name string) bool {
	return name != "" && (name[0] == '_' || 'a' <= name[0]|0x20 && name[0]|0x20 <= 'z')
}

// entriesOf yields what a commit holds for the filter, from a sequence on.
func entriesOf(entry commitlog.Entry, from uint64, filter journalFilter) iter.Seq[journalEntry] {
	return func(yield func(journalEntry) bool) {
		sequence := entry.Sequence << placeBits
		for _, shard := range entry.Commit.GetChanges().GetShards() {
			for _, change := range shard.GetChanges() {
				kind, shown := journalTypeOf(change)
				if shown && sequence >= from && filter.takes(kind, change.GetMap()) &&
					!yield(journalEntry{sequence, kind, change}) {
					return
				}
				sequence++
			}
		}
	}
}

// journal reads the log for those who ask for changes.
type journal struct {
	log Log
	// scans bounds the searches that run at once.
	scans chan struct{}
	live  live

	mu sync.Mutex
	// skips are stretches that were searched in vain by readings that ran out of
	// time, so that asking again goes on. The log only grows at its end, so what was
	// seen stays true.
	skips map[stretch]uint64
}

// stretch begins at from and holds nothing for the filter.
type stretch struct {
	filter journalFilter
	from   uint64
}

func newJournal(log Log) *journal {
	return &journal{
		log:   log,
		scans: make(chan struct{}, maxScans),
		skips: make(map[stretch]uint64),
		live:  newLive(),
	}
}

// skip returns where a search from the stretch's begin has to look first.
func (j *journal) skip(s stretch) uint64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	return max(s.from, j.skips[s])
}

// remember notes that a stretch holds nothing. Of too many an arbitrary one is
// forgotten, which costs its next reader time.
func (j *journal) remember(s stretch, to uint64) {
	if to <= s.from {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if _, known := j.skips[s]; !known && len(j.skips) >= maxSkips {
		for victim := range j.skips {
			delete(j.skips, victim)
			break
		}
	}
	j.skips[s] = to
}

// page is an answer to a reading.
type page struct {
	entries []journalEntry
	// more means that a further entry exists.
	more bool
}

// read returns the first entries from a sequence on, at most limit and about
// pageBytes of them. What the log no longer holds is left out. A search that the
// deadline of ctx or maxScan ends answers with what is certain; if that is nothing it
// returns errScanTime, and the same question asked again goes on where it ended.
func (j *journal) read(ctx context.Context, from uint64, limit int, filter journalFilter) (page, error) {
	select {
	case j.scans <- struct{}{}:
		defer func() { <-j.scans }()
	case <-ctx.Done():
		return page{}, fmt.Errorf("wait for a turn to search the log: %w", ctx.Err())
	}
	budget := maxScan
	if deadline, ok := ctx.Deadline(); ok {
		left := time.Until(deadline)
		budget = min(budget, left-left/8) // the answer needs time as well
	}
	search, cancel := context.WithTimeout(ctx, budget)
	defer cancel()

	var p page
	size := 0
	// Behind the last entry found there is nothing up to at.
	empty := stretch{filter, from}
	for at := j.skip(empty); ; {
		jumped := false
		for entry, err := range j.log.Read(search, at>>placeBits, false) {
			if err != nil {
				if search.Err() == nil || ctx.Err() != nil {
					return page{}, fmt.Errorf("search the log: %w", logError(ctx, err))
				}
				j.remember(empty, at)
				// The last one found proves that there was more to come.
				if last := len(p.entries) - 1; last > 0 {
					return page{p.entries[:last], true}, nil
				}
				return page{}, errScanTime
			}
			for found := range entriesOf(entry, at, filter) {
				if len(p.entries) == limit || len(p.entries) > 0 && size+found.size() > pageBytes {
					p.more = true
					return p, nil
				}
				p.entries = append(p.entries, found)
				size += found.size()
				empty.from, at = found.sequence+1, found.sequence+1
				if next := j.skip(empty); next > at {
					at, jumped = next, true
					break
				}
			}
			if jumped {
				break
			}
			at = max(at, (entry.Sequence+1)<<placeBits)
		}
		if !jumped {
			return p, nil
		}
	}
}

// logError keeps what a caller must be told: its own end, or that the log cannot be
// read.
func logError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return fmt.Errorf("%w: %w", errLog, err)
}
