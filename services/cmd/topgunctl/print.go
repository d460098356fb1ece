package main

import (
	"bytes"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/topgun-sync/topgun/services/cmd/topgunctl/internal/line"
)

// printJSON prints v as one line.
func (t *terminal) printJSON(v any) error {
	var text bytes.Buffer
	if err := line.Append(&text, v); err != nil {
		return fmt.Errorf("write JSON: %w", err)
	}
	_, err := t.out.Write(text.Bytes())
	return err
}

// table prints rows in columns; the first has their names.
type table struct {
	w *tabwriter.Writer
}

func newTable(out io.Writer, columns ...string) *table {
	t := &table{tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)}
	t.row(columns...)
	return t
}

func (t *table) row(cells ...string) {
	for i, cell := range cells {
		cells[i] = plain(cell)
	}
	_, _ = io.WriteString(t.w, strings.Join(cells, "\t")+"\n") // Flush returns the error
}

func (t *table) end() error { return t.w.Flush() }

// plain keeps a client's text from drawing on the terminal.
func plain(s string) string {
	if strings.IndexFunc(s, func(r rune) bool { return !strconv.IsPrint(r) }) < 0 {
		return s
	}
	quoted := strconv.Quote(s)
	return quoted[1 : len(quoted)-1]
}

// maxCell is how much of a value a table shows.
const maxCell = 100

func cell(value string) string {
	runes := []rune(value)
	if len(runes) <= maxCell {
		return value
	}
	return string(runes[:maxCell]) + "…"
}

func number(n uint64) string { return strconv.FormatUint(n, 10) }

// at is a time for people, with what is lost in a date.
func at(millis uint64) string {
	if millis > 1<<53 {
		return number(millis)
	}
	return time.UnixMilli(int64(millis)).UTC().Format("2006-01-02T15:04:05.000Z")
}

func span(millis uint64) string { return (time.Duration(millis) * time.Millisecond).String() }

// progress writes a line to standard error now and then while something long goes on.
type progress struct {
	t    *terminal
	what string
	last time.Time
}

// progressPause is between two lines.
const progressPause = 2 * time.Second

func (t *terminal) progress(what string) *progress { return &progress{t, what, time.Now()} }

func (p *progress) tick(n uint64) {
	if now := time.Now(); now.Sub(p.last) >= progressPause {
		p.last = now
		fmt.Fprintf(p.t.err, "%s %d records\n", p.what, n)
	}
}
