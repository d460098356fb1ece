package main

import (
	"fmt"
	"strconv"
	"strings"

	persistencev1 "github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1"
	"github.com/topgun-sync/topgun/services/cmd/topgunctl/internal/line"
)

type watchCommand struct {
	Map  string `arg:"" help:"The map."`
	Key  string `arg:"" optional:"" help:"Only this key."`
	From uint64 `placeholder:"SEQUENCE" help:"First position in the journal to show, as far as it is kept; only what comes now without. 1 is the beginning."`
}

// change is an entry of the journal.
type change struct {
	// Sequence is a string, since it is beyond what JavaScript's numbers hold.
	Sequence string `json:"sequence"`
	Type     string `json:"type"`
	line.Record
	Arrival line.Arrival `json:"arrival"`
}

// Run prints changes until ctx ends, which is no failure.
func (c *watchCommand) Run(t *terminal) error {
	opened := func() {
		if !t.json {
			fmt.Fprintln(t.err, "watching; interrupt to end")
		}
	}
	var last uint64
	for entry, err := range t.Journal(t.ctx, c.Map, c.From, opened) {
		switch {
		case t.ctx.Err() != nil:
			return nil
		case err != nil && last > 0:
			return fmt.Errorf("%w; go on with --from %d", err, last+1)
		case err != nil:
			return err
		}
		last = entry.GetSequence()
		if c.Key != "" && c.Key != string(entry.GetChange().GetKey()) {
			continue
		}
		if err := t.printChange(entry); err != nil {
			return err
		}
	}
	return nil
}

func (t *terminal) printChange(entry *persistencev1.JournalEntry) error {
	c := change{
		Sequence: strconv.FormatUint(entry.GetSequence(), 10),
		Type:     strings.TrimPrefix(entry.GetType().String(), "JOURNAL_TYPE_"),
		Record:   line.Of(entry.GetChange()),
		Arrival:  line.ArrivalOf(entry.GetChange().GetArrival()),
	}
	if t.json {
		return t.printJSON(c)
	}
	key := plain(c.Key)
	if c.Tag != "" {
		key += " [" + plain(c.Tag) + "]"
	}
	_, err := fmt.Fprintf(t.out, "%s %s %-6s %s %s  (%s)\n", c.Sequence, at(c.Arrival.Millis), c.Type, key,
		plain(cell(c.Text())), plain(c.Stamp.String()))
	return err
}
