package persistence

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/topgun-sync/topgun/services/internal/commitlog"
)

const (
	// maxFollowers bounds those who follow the journal at once.
	maxFollowers = 1000
	// followBytes is how much waits for one follower at most; one that leaves more
	// is ended. What waits is shared among followers.
	followBytes = 8 << 20
	// nearEnd is how many sequences of the log a follower may be behind when it
	// changes from reading the log by itself to being handed what comes.
	nearEnd = 64
)

var (
	// errTooSlow ends a follower that does not take what it is handed.
	errTooSlow = errors.New("the follower is too slow")
	// errReplaced means that the log is not the one that a follower has read.
	errReplaced = errors.New("the log was replaced or has lost commits")
	// errNobody ends the reader when the last follower has left.
	errNobody = errors.New("nobody follows the journal")
	// errTooMany refuses a follower.
	errTooMany = errors.New("too many follow the journal")
)

// live hands what is appended to all who follow the journal. One reader serves
// them, and reads only while there are some.
type live struct {
	// begin wakes the reader.
	begin chan struct{}

	mu        sync.Mutex
	followers map[*follower]struct{}
	// next is the sequence of the stream from which on followers are handed
	// everything; 0 while nothing is read.
	next uint64
	// end ends the reader with a reason; nil while nothing is read.
	end context.CancelCauseFunc
}

func newLive() live {
	return live{begin: make(chan struct{}, 1), followers: make(map[*follower]struct{})}
}

// follower is one who is handed what comes. Its fields are guarded by the lock of
// live.
type follower struct {
	filter journalFilter
	// waiting is what it has not taken, at most followBytes of size.
	waiting []journalEntry
	size    int
	// err is why it is handed nothing more.
	err error
	// told holds a token when waiting or err have changed.
	told chan struct{}
}

// tell wakes the follower; the caller holds the lock of live.
func (f *follower) tell() {
	select {
	case f.told <- struct{}{}:
	default: // it has been told already
	}
}

// offer adds what the follower wants of a commit; false means that it has left too
// much waiting and is ended. The caller holds the lock of live.
func (f *follower) offer(entry commitlog.Entry) bool {
	for e := range entriesOf(entry, 0, f.filter) {
		size := e.size()
		if f.size+size > followBytes && len(f.waiting) > 0 {
			f.err, f.waiting = errTooSlow, nil
			f.tell()
			return false
		}
		f.waiting, f.size = append(f.waiting, e), f.size+size
	}
	if len(f.waiting) > 0 {
		f.tell()
	}
	return true
}

// join adds a follower that has seen everything below next, and returns from which
// sequence on it is handed everything.
func (l *live) join(filter journalFilter, next uint64) (*follower, uint64, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.followers) >= maxFollowers {
		return nil, 0, errTooMany
	}
	f := &follower{filter: filter, told: make(chan struct{}, 1)}
	l.followers[f] = struct{}{}
	if l.next == 0 {
		l.next = next
		select {
		case l.begin <- struct{}{}:
		default:
		}
	}
	return f, l.next, nil
}

func (l *live) leave(f *follower) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.followers, f)
	if len(l.followers) == 0 && l.end != nil {
		l.end(errNobody)
	}
}

// hand gives a commit to those who want of it; false means that nobody follows.
func (l *live) hand(entry commitlog.Entry) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.next = entry.Sequence + 1
	for f := range l.followers {
		if !f.offer(entry) {
			delete(l.followers, f)
		}
	}
	return len(l.followers) > 0
}

// take returns what waits for the follower, or why nothing comes any more.
func (l *live) take(ctx context.Context, f *follower) ([]journalEntry, error) {
	select {
	case <-f.told:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	entries := f.waiting
	f.waiting, f.size = nil, 0
	if len(entries) == 0 {
		return nil, f.err
	}
	if f.err != nil {
		f.tell() // the next call returns it
	}
	return entries, nil
}

// stop ends all followers.
func (l *live) stop(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for f := range l.followers {
		f.err = err
		f.tell()
	}
	clear(l.followers)
	l.next, l.end = 0, nil
}

// reading returns where the reader has to begin, 0 if nobody follows.
func (l *live) reading(end context.CancelCauseFunc) (next uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.followers) == 0 {
		l.next = 0
		return 0
	}
	l.end = end
	return l.next
}

// fail ends the reader, and with it all followers.
func (l *live) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.end != nil {
		l.end(err)
	}
}

// run reads the log whenever somebody follows it, until ctx ends.
func (j *journal) run(ctx context.Context) {
	for {
		select {
		case <-j.live.begin:
			for j.feed(ctx) {
			}
		case <-ctx.Done():
			j.live.stop(errStopping)
			return
		}
	}
}

// feed hands out what is appended until nobody follows, or until the log cannot be
// read, which ends all followers. It returns true to be called again at once.
func (j *journal) feed(ctx context.Context) (again bool) {
	reading, end := context.WithCancelCause(ctx)
	defer end(nil)
	next := j.live.reading(end)
	if next == 0 {
		return false
	}
	for entry, err := range j.log.Read(reading, next, true) {
		switch cause := context.Cause(reading); {
		case err == nil && entry.Sequence < next:
			j.live.stop(errReplaced)
			return false
		case err == nil:
			if !j.live.hand(entry) {
				return true
			}
			next = entry.Sequence + 1
		case ctx.Err() != nil:
			j.live.stop(errStopping)
			return false
		case errors.Is(cause, errNobody):
			return true // somebody may have come since
		case cause != nil:
			j.live.stop(cause)
			return false
		default:
			j.live.stop(fmt.Errorf("%w: %w", errLog, err))
			return false
		}
	}
	j.live.stop(errLog)
	return false
}

// follow sends what the log holds from a sequence on, and then what is appended, in
// order, without gap and without repetition; nothing is sent first, which says that
// all that is appended from then on will come. From 0 means only that.
//
//	log: ──────────────────┬───────────────┬──────────▶
//	     read by itself ──▶│ its end ──▶   │ handed by live
//	                     nearly there    joined
//
// While it reads by itself the log waits for a slow receiver, though what is trimmed
// meanwhile is left out. What it is handed waits up to followBytes, then errTooSlow
// ends it: whoever receives asks again from the last sequence on.
func (j *journal) follow(ctx context.Context, from uint64, filter journalFilter, send func([]journalEntry) error) error {
	last, err := j.log.LastSequence(ctx)
	if err != nil {
		return logError(ctx, err)
	}
	if from == 0 {
		from = (last + 1) << placeBits
	}
	if from>>placeBits > last+1 {
		return errReplaced
	}
	if err := send(nil); err != nil {
		return err
	}
	for {
		if from, err = j.past(ctx, from, last+1, filter, send); err != nil {
			return err
		}
		before := last
		if last, err = j.log.LastSequence(ctx); err != nil {
			return logError(ctx, err)
		}
		if last < before {
			return errReplaced
		}
		if last-before <= nearEnd {
			break
		}
	}
	f, joined, err := j.live.join(filter, from>>placeBits)
	if err != nil {
		return err
	}
	defer j.live.leave(f)
	if from, err = j.past(ctx, from, joined, filter, send); err != nil {
		return err
	}
	for {
		entries, err := j.live.take(ctx, f)
		if err != nil {
			return err
		}
		// Whoever read before may have seen more than what is handed at first.
		seen := slices.IndexFunc(entries, func(e journalEntry) bool { return e.sequence >= from })
		if seen < 0 {
			continue
		}
		if err := send(entries[seen:]); err != nil {
			return err
		}
	}
}

// past sends what the log holds from a sequence on and below a sequence of the
// stream, and returns from where on the rest is missing.
func (j *journal) past(ctx context.Context, from, below uint64, filter journalFilter, send func([]journalEntry) error) (uint64, error) {
	if from>>placeBits >= below {
		return from, nil
	}
	var chunk []journalEntry
	size := 0
	for entry, err := range j.log.Read(ctx, from>>placeBits, false) {
		if err != nil {
			return 0, logError(ctx, err)
		}
		if entry.Sequence >= below {
			break
		}
		for e := range entriesOf(entry, from, filter) {
			chunk, size = append(chunk, e), size+e.size()
		}
		if size >= chunkBytes {
			if err := send(chunk); err != nil {
				return 0, err
			}
			chunk, size = nil, 0
		}
	}
	if len(chunk) > 0 {
		if err := send(chunk); err != nil {
			return 0, err
		}
	}
	return below << placeBits, nil
}
