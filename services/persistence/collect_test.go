package persistence

import (
	"testing"
	"time"

	logv1 "github.com/topgun-sync/topgun/gen/go/topgun/log/v1"
	"github.com/topgun-sync/topgun/services/internal/commitlog"
)

// TestEndlessBacklogIsCut collects from a queue that is never found empty, and
// whose commits never fill a batch: time alone must end the batch.
func TestEndlessBacklogIsCut(t *testing.T) {
	const waiting = 100_000
	items := make(chan item, waiting)
	for n := range uint64(waiting) {
		items <- item{entry: commitlog.Entry{Sequence: n + 1, Lane: "a", Commit: &logv1.Commit{
			Version: 1, Lane: "a", Number: n + 1, Body: &logv1.Commit_Claim{},
		}}}
	}
	s := &Service{config: Config{BatchChanges: 1000, BatchBytes: 1 << 20, BatchDelay: time.Nanosecond}}
	b, err := s.collect(t.Context(), items, time.Now(), 0)
	if err != nil || b.commits == 0 || b.commits == waiting {
		t.Errorf("the batch took %d of %d commits, %v", b.commits, waiting, err)
	}
}
