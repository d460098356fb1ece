package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	"github.com/topgun-sync/topgun/services/cmd/topgunctl/internal/line"
)

type exportCommand struct {
	Maps       []string `arg:"" name:"map" help:"The maps; of each the LWW-map and the OR-map of the name."`
	Tombstones bool     `help:"Write what was deleted as well."`
}

// Run writes a line per record. Records are read in the order of arrival: one that
// changes meanwhile comes twice, the later state last, and import ends with that.
func (c *exportCommand) Run(t *terminal) error {
	listed, err := t.Cluster.Maps(t.ctx)
	if err != nil {
		return err
	}
	for _, name := range c.Maps {
		if !slices.ContainsFunc(listed, func(m *partitionv1.MapInfo) bool { return m.GetName() == name }) {
			return errors.New("there is no map of that name: " + plain(name) + "; `topgunctl maps` lists them")
		}
	}
	out := bufio.NewWriterSize(t.out, 64<<10)
	written, progress := uint64(0), t.progress("exported")
	for _, m := range listed {
		if !slices.Contains(c.Maps, m.GetName()) {
			continue
		}
		var text bytes.Buffer
		for change, err := range t.Since(t.ctx, m.GetKind(), m.GetName()) {
			if err != nil {
				return errors.Join(fmt.Errorf("after %d records: %w", written, err), out.Flush())
			}
			if len(change.GetRecord().GetValue()) == 0 && !c.Tombstones {
				continue
			}
			text.Reset()
			if err := line.Append(&text, line.Of(change)); err != nil {
				return fmt.Errorf("write JSON: %w", err)
			}
			if _, err := out.Write(text.Bytes()); err != nil {
				return fmt.Errorf("after %d records: %w", written, err)
			}
			written++
			progress.tick(written)
		}
	}
	if err := out.Flush(); err != nil {
		return fmt.Errorf("after %d records: %w", written, err)
	}
	fmt.Fprintf(t.err, "exported %d records\n", written)
	return nil
}

const (
	// batchOps and batchBytes bound one Apply.
	batchOps   = 1000
	batchBytes = 4 << 20
	// maxLine bounds a line: a value of 256 KiB, all of it escaped, and a key.
	maxLine = 4 << 20
)

type importCommand struct {
	File string `arg:"" optional:"" default:"-" help:"The file; standard input without, or with -."`
}

// imported counts what became of the lines.
type imported struct {
	Lines      uint64 `json:"lines"`
	Applied    uint64 `json:"applied"`
	Duplicate  uint64 `json:"duplicate"`
	Superseded uint64 `json:"superseded"`
	Restamped  uint64 `json:"restamped"`
	Rejected   uint64 `json:"rejected"`
	// Reasons are those of the rejections, and how often.
	Reasons map[string]uint64 `json:"reasons,omitempty"`
	// FirstRejected is the number of the first rejected line.
	FirstRejected uint64 `json:"firstRejected,omitempty"`
}

// Run merges the lines in batches. It stops at the first line that is no record; what
// came before is merged then, and the file may be imported again.
func (c *importCommand) Run(t *terminal) error {
	if _, err := t.Shards(t.ctx); err != nil { // before anything is read
		return err
	}
	in := t.in
	if c.File != "-" {
		file, err := os.Open(c.File)
		if err != nil {
			return err
		}
		defer func() { _ = file.Close() }()
		in = file
	}
	counts := &imported{Reasons: make(map[string]uint64)}
	err := counts.read(t, in)
	if t.json {
		err = errors.Join(err, t.printJSON(counts))
	} else {
		err = errors.Join(err, counts.print(t))
	}
	if err == nil && counts.Rejected > 0 {
		err = errors.New("not every line was taken")
	}
	return err
}

func (n *imported) read(t *terminal, in io.Reader) error {
	lines := bufio.NewScanner(in)
	lines.Buffer(make([]byte, 64<<10), maxLine)
	progress := t.progress("imported")
	var batch []*partitionv1.Op
	var at []uint64 // the line of each op
	size, current := 0, uint64(0)
	flush := func() error {
		if len(batch) == 0 {
			return nil
		}
		if err := n.apply(t, batch, at); err != nil {
			return fmt.Errorf("lines %d to %d may not have been taken, import the file again: %w", at[0], at[len(at)-1], err)
		}
		progress.tick(n.Lines)
		batch, at, size = batch[:0], at[:0], 0
		return nil
	}
	for lines.Scan() {
		current++
		text := bytes.TrimSpace(lines.Bytes())
		if len(text) == 0 {
			continue
		}
		op, err := line.Parse(text)
		if err != nil {
			return errors.Join(flush(), fmt.Errorf("line %d: %w", current, err))
		}
		batch, at = append(batch, op), append(at, current)
		size += len(text)
		if len(batch) == batchOps || size >= batchBytes {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	if err := lines.Err(); err != nil {
		return errors.Join(flush(), fmt.Errorf("line %d: %w", current+1, err))
	}
	return flush()
}

// apply merges a batch and counts.
func (n *imported) apply(t *terminal, ops []*partitionv1.Op, at []uint64) error {
	results, err := t.Apply(t.ctx, ops)
	if err != nil {
		return err
	}
	for i, r := range results {
		n.Lines++
		switch r.GetOutcome() {
		case partitionv1.Outcome_OUTCOME_APPLIED:
			n.Applied++
		case partitionv1.Outcome_OUTCOME_DUPLICATE:
			n.Duplicate++
		case partitionv1.Outcome_OUTCOME_SUPERSEDED:
			n.Superseded++
		case partitionv1.Outcome_OUTCOME_RESTAMPED:
			n.Restamped++
		default:
			if n.Rejected++; n.Rejected == 1 {
				n.FirstRejected = at[i]
			}
			n.Reasons[r.GetReason()]++
		}
	}
	return nil
}

func (n *imported) print(t *terminal) error {
	rows := newTable(t.out, "LINES", "APPLIED", "DUPLICATE", "SUPERSEDED", "RESTAMPED", "REJECTED")
	rows.row(number(n.Lines), number(n.Applied), number(n.Duplicate), number(n.Superseded), number(n.Restamped), number(n.Rejected))
	if err := rows.end(); err != nil {
		return err
	}
	if n.Rejected == 0 {
		return nil
	}
	fmt.Fprintf(t.out, "the first rejected line is %d\n", n.FirstRejected)
	old := false
	for reason, times := range n.Reasons {
		fmt.Fprintf(t.out, "%d times: %s\n", times, plain(reason))
		old = old || strings.HasPrefix(reason, "TOO_OLD")
	}
	if old {
		fmt.Fprintln(t.out, "records older than the server's tombstone retention are taken only while it runs with --tombstone-retention 0s")
	}
	return nil
}
