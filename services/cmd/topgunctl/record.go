package main

import (
	"cmp"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/msgval"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	typesv1 "github.com/topgun-sync/topgun/gen/go/topgun/types/v1"
	"github.com/topgun-sync/topgun/services/cmd/topgunctl/internal/line"
)

type mapsCommand struct{}

type mapInfo struct {
	Map        string `json:"map"`
	Kind       string `json:"kind"`
	Records    uint64 `json:"records"`
	Tombstones uint64 `json:"tombstones"`
}

// Run lists the maps.
func (c *mapsCommand) Run(t *terminal) error {
	listed, err := t.Maps(t.ctx)
	if err != nil {
		return err
	}
	infos := make([]mapInfo, len(listed))
	for i, m := range listed {
		infos[i] = mapInfo{m.GetName(), line.KindOf(m.GetKind()), m.GetRecords(), m.GetTombstones()}
	}
	slices.SortFunc(infos, func(a, b mapInfo) int { return cmp.Or(cmp.Compare(a.Map, b.Map), cmp.Compare(a.Kind, b.Kind)) })
	if t.json {
		for _, info := range infos {
			if err := t.printJSON(info); err != nil {
				return err
			}
		}
		return nil
	}
	rows := newTable(t.out, "MAP", "KIND", "RECORDS", "TOMBSTONES")
	for _, m := range infos {
		rows.row(m.Map, m.Kind, number(m.Records), number(m.Tombstones))
	}
	return rows.end()
}

// kindsOfName are the kinds that a map's name may mean.
func kindsOfName() []typesv1.Kind {
	return []typesv1.Kind{typesv1.Kind_KIND_LWW, typesv1.Kind_KIND_OR}
}

type getCommand struct {
	Map string `arg:"" help:"The map."`
	Key string `arg:"" help:"The key."`
}

// shown is a record as get shows it.
type shown struct {
	line.Record
	Arrival line.Arrival `json:"arrival"`
	// Expired says that readers see the value no longer.
	Expired bool `json:"expired,omitempty"`
}

func shownOf(c *typesv1.Change) shown {
	s := shown{Record: line.Of(c), Arrival: line.ArrivalOf(c.GetArrival())}
	s.Expired = s.TTLMillis > 0 && !s.Deleted && s.Stamp.Millis+s.TTLMillis < uint64(max(0, time.Now().UnixMilli()))
	return s
}

// Run prints what the key holds.
func (c *getCommand) Run(t *terminal) error {
	var found []shown
	for _, kind := range kindsOfName() {
		changes, err := t.Cluster.Get(t.ctx, kind, c.Map, c.Key)
		if err != nil {
			return err
		}
		slices.SortFunc(changes, func(a, b *typesv1.Change) int {
			return cmp.Or(cmp.Compare(a.GetArrival().GetMillis(), b.GetArrival().GetMillis()),
				cmp.Compare(a.GetArrival().GetCounter(), b.GetArrival().GetCounter()))
		})
		for _, change := range changes {
			found = append(found, shownOf(change))
		}
	}
	if len(found) == 0 {
		return errors.New("the key holds nothing in a map of that name; `topgunctl maps` lists the maps")
	}
	rows := (*table)(nil)
	for i, s := range found {
		switch {
		case t.json:
			if err := t.printJSON(s); err != nil {
				return err
			}
			continue
		case s.Kind == line.KindOf(typesv1.Kind_KIND_LWW): // at most one, and then the first
			fmt.Fprintln(t.out, plain(s.Text())+s.note())
			fmt.Fprintf(t.out, "  stamp %s (%s)\n  arrival %s\n", plain(s.Stamp.String()), at(s.Stamp.Millis), at(s.Arrival.Millis))
			if s.TTLMillis > 0 {
				fmt.Fprintf(t.out, "  ttl %s, until %s\n", span(s.TTLMillis), at(s.Stamp.Millis+s.TTLMillis))
			}
			continue
		case rows == nil:
			rows = newTable(t.out, "TAG", "VALUE", "STAMP", "ARRIVAL", "TTL")
		}
		ttl := "-"
		if found[i].TTLMillis > 0 {
			ttl = span(s.TTLMillis)
		}
		rows.row(s.Tag, cell(s.Text())+s.note(), s.Stamp.String(), at(s.Arrival.Millis), ttl)
	}
	if rows != nil {
		return rows.end()
	}
	return nil
}

func (s shown) note() string {
	if s.Expired {
		return " (expired)"
	}
	return ""
}

type putCommand struct {
	Map   string        `arg:"" help:"The LWW-map."`
	Key   string        `arg:"" help:"The key."`
	Value string        `arg:"" name:"json" help:"The value as JSON: a string needs its quotes."`
	TTL   time.Duration `name:"ttl" placeholder:"TIME" help:"How long the value is visible; for ever without."`
}

// Run writes the value.
func (c *putCommand) Run(t *terminal) error {
	value, err := msgval.FromJSON([]byte(c.Value))
	if err != nil {
		return usageError("the value: " + err.Error() + `; a string needs its quotes: '"text"'`)
	}
	if c.TTL < 0 || c.TTL%time.Millisecond != 0 {
		return usageError("--ttl must be whole milliseconds, for example 90s")
	}
	return t.write(c.Map, c.Key, &typesv1.Record{Value: value, TtlMillis: uint64(c.TTL.Milliseconds())})
}

type deleteCommand struct {
	Map string `arg:"" help:"The LWW-map."`
	Key string `arg:"" help:"The key."`
}

// Run writes a tombstone.
func (c *deleteCommand) Run(t *terminal) error {
	return t.write(c.Map, c.Key, &typesv1.Record{})
}

// outcome is what became of a write.
type outcome struct {
	Map     string     `json:"map"`
	Key     string     `json:"key"`
	Outcome string     `json:"outcome"`
	Level   string     `json:"level"`
	Stamp   line.Stamp `json:"stamp"`
	// Winner is what the key holds, where that is not what was written.
	Winner *line.Record `json:"winner,omitempty"`
	Reason string       `json:"reason,omitempty"`
}

// write merges a record of ours, stamped now, and says what became of it.
func (t *terminal) write(name, key string, record *typesv1.Record) error {
	clock := hlc.NewClock("topgunctl-"+strings.ToLower(rand.Text()[:10]), time.Now)
	record.Timestamp = line.Stamp(clock.Now()).Proto()
	results, err := t.Apply(t.ctx, []*partitionv1.Op{{Map: name, Key: []byte(key), Record: record}})
	if err != nil {
		return err
	}
	r := results[0]
	o := outcome{
		Map: name, Key: key, Outcome: outcomeName(r.GetOutcome()), Level: levelName(r.Level),
		Stamp: line.StampOf(record.GetTimestamp()), Reason: r.GetReason(),
	}
	if r.GetWinner() != nil {
		winner := line.Of(&typesv1.Change{Map: name, Key: []byte(key), Record: r.GetWinner()})
		o.Winner = &winner
	}
	failed := r.GetOutcome() == partitionv1.Outcome_OUTCOME_SUPERSEDED || r.GetOutcome() == partitionv1.Outcome_OUTCOME_REJECTED
	if failed {
		o.Level = "" // nothing of it is anywhere
	}
	if t.json {
		err = t.printJSON(o)
	} else {
		err = o.print(t)
	}
	if err == nil && failed {
		err = errors.New("the key was not changed")
	}
	return err
}

func (o outcome) print(t *terminal) error {
	text := map[string]string{
		"APPLIED":    "applied, as " + plain(o.Stamp.String()),
		"DUPLICATE":  "the same record was there already",
		"SUPERSEDED": "superseded: the key holds a record with a greater stamp",
		"RESTAMPED":  "applied with a stamp of the server's: this machine's clock is ahead",
		"REJECTED":   "rejected: " + o.Reason,
	}[o.Outcome]
	if o.Level != "" {
		text += "; level " + o.Level
	}
	if o.Winner != nil {
		text += fmt.Sprintf("\nit holds %s, as %s (%s)", plain(cell(o.Winner.Text())), plain(o.Winner.Stamp.String()), at(o.Winner.Stamp.Millis))
	}
	_, err := fmt.Fprintln(t.out, text)
	return err
}

func outcomeName(o partitionv1.Outcome) string { return strings.TrimPrefix(o.String(), "OUTCOME_") }
