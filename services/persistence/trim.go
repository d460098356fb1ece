package persistence

import (
	"context"
	"math"
	"time"
)

// watchEvery is how often the log's end is read for the lag that metrics show.
const watchEvery = 5 * time.Second

// watch reads the log's end now and then, checks that the store has not gone
// back, and trims the log.
func (s *Service) watch(ctx context.Context) {
	ticker := time.NewTicker(min(watchEvery, s.config.TrimEvery))
	defer ticker.Stop()
	trim := trimmer{samples: make(map[string][]sample), trimmed: make(map[string]uint64)}
	var last time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		attempt, cancel := context.WithTimeout(ctx, s.config.StoreTimeout)
		// Read first, so that a batch in between makes no difference.
		stored := s.storedSequence()
		// An error is reported by the drain, which meets it as well.
		if end, err := s.log.LastSequence(attempt); err == nil {
			s.mu.Lock()
			s.end = end
			s.mu.Unlock()
			if end < stored {
				// The next round reads both and halts (RELIABILITY LOG-04).
				s.restartDrain()
				s.journal.live.fail(errReplaced)
			}
		}
		if now := s.now(); now.Sub(last) >= s.config.TrimEvery {
			last = now
			s.look(attempt, now, &trim)
		}
		cancel()
	}
}

// look reads the store's watermarks and trims what has been stored long enough.
// They are read anew, and not taken from the drain, because only what the store
// holds at present may leave the log: a database that was restored from a backup
// needs the rest again (RELIABILITY PG-06, LOG-03).
func (s *Service) look(ctx context.Context, now time.Time, trim *trimmer) {
	if s.Ready() != nil {
		return
	}
	// Before the store is read, so that a batch in between makes no difference.
	s.mu.Lock()
	known := s.marks
	s.mu.Unlock()
	all, err := s.store.Watermarks(ctx)
	if err != nil {
		return // the drain meets the same and reports it
	}
	marks := make(map[string]Position)
	for _, mark := range all {
		if mark.History == s.log.History() {
			marks[mark.Lane] = mark.Position
		}
	}
	for lane, position := range known {
		if marks[lane].Sequence < position.Sequence {
			trim.forget()
			s.restartDrain()
			return
		}
	}
	kept, err := s.journalFrom(ctx, now)
	if err != nil {
		if ctx.Err() == nil {
			s.logger.WarnContext(ctx, "find what of the log may go", "error", err)
		}
		return
	}
	for lane, upTo := range trim.due(now, marks, s.config.TrimAge, kept) {
		err := s.log.Trim(ctx, lane, upTo)
		if ctx.Err() != nil {
			return // the rest has its turn next time
		}
		if err != nil {
			s.logger.WarnContext(ctx, "trim the log", "lane", lane, "error", err)
			continue
		}
		trim.trimmed[lane] = upTo
	}
}

// journalFrom is the sequence from which on the log is kept for those who read the
// journal.
func (s *Service) journalFrom(ctx context.Context, now time.Time) (uint64, error) {
	if s.config.JournalAge == 0 || s.config.JournalBytes == 0 {
		return math.MaxUint64, nil
	}
	// The rest of the time is for trimming what was found.
	search, cancel := context.WithTimeout(ctx, s.config.StoreTimeout/2)
	defer cancel()
	return s.log.Expired(search, now.Add(-s.config.JournalAge), s.config.JournalBytes)
}

// restartDrain makes the drain start again from what store and log say.
func (s *Service) restartDrain() {
	select {
	case s.wentBack <- struct{}{}:
	default: // it has been told already
	}
}

// sample is a watermark at the time when it was seen in the store.
type sample struct {
	at       time.Time
	sequence uint64
}

// trimmer remembers watermarks until they are old enough to trim up to. A
// partition that loads reads the watermarks first and the log from there later;
// what lies above must still be there.
type trimmer struct {
	// samples of a lane, oldest first; at most TrimAge/TrimEvery and two.
	samples map[string][]sample
	// trimmed is up to where a lane was trimmed.
	trimmed map[string]uint64
}

// forget drops the samples, since the store no longer holds what they saw.
func (t *trimmer) forget() { clear(t.samples) }

// due takes the store's watermarks and returns up to where lanes may be trimmed:
// what has been stored for the age, and lies below the sequence kept.
func (t *trimmer) due(now time.Time, marks map[string]Position, age time.Duration, kept uint64) map[string]uint64 {
	due := make(map[string]uint64)
	for lane, position := range marks {
		samples := t.samples[lane]
		if n := len(samples); n > 0 && samples[n-1].sequence > position.Sequence {
			samples = nil // they saw what the store no longer holds
		}
		if n := len(samples); n == 0 || samples[n-1].sequence != position.Sequence {
			samples = append(samples, sample{now, position.Sequence})
		}
		old := 0
		for old < len(samples) && now.Sub(samples[old].at) >= age {
			old++
		}
		if old > 0 {
			if upTo := min(samples[old-1].sequence, kept); upTo > t.trimmed[lane] {
				due[lane] = upTo
			}
			samples = samples[old-1:]
		}
		t.samples[lane] = samples
	}
	return due
}
