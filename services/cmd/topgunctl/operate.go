package main

import (
	"errors"
	"fmt"
	"strings"
	"time"

	gatewayv1 "github.com/topgun-sync/topgun/gen/go/topgun/gateway/v1"
	"github.com/topgun-sync/topgun/services/cmd/topgunctl/internal/remote"
	"github.com/topgun-sync/topgun/services/cmd/topgunctl/internal/verify"
)

type verifyCommand struct {
	Map string `arg:"" optional:"" help:"Only this map."`
}

// Run compares and prints.
func (c *verifyCommand) Run(t *terminal) error {
	report, err := verify.Run(t.ctx, t.Cluster, c.Map, t.progress("compared").tick)
	if err != nil {
		return err
	}
	if c.Map != "" && len(report.Maps) == 0 {
		return errors.New("there is no map of that name; `topgunctl maps` lists them")
	}
	if t.json {
		err = t.printJSON(report)
	} else {
		err = printReport(t, report)
	}
	if err == nil && !report.Equal {
		err = errors.New("memory, store and leaves differ")
	}
	return err
}

func printReport(t *terminal, report *verify.Report) error {
	rows := newTable(t.out, "MAP", "KIND", "RECORDS", "STORED", "LEAVES", "DIFFERENCES", "CHANGING")
	for _, m := range report.Maps {
		rows.row(m.Map, m.Kind, number(m.Records), number(m.Stored), number(m.Leaves), number(m.Differences), number(m.Changing))
	}
	if err := rows.end(); err != nil || len(report.Differences) == 0 {
		return err
	}
	fmt.Fprintln(t.out)
	rows = newTable(t.out, "MAP", "KIND", "KEY", "WHAT", "IN MEMORY", "IN THE STORE")
	for _, d := range report.Differences {
		key := d.Key
		if d.Tag != "" {
			key += " [" + d.Tag + "]"
		}
		if d.Leaf != nil {
			key = fmt.Sprintf("leaf %03x", *d.Leaf)
		}
		rows.row(d.Map, d.Kind, key, d.What, stateText(d.Memory), stateText(d.Store))
	}
	return rows.end()
}

func stateText(s *verify.State) string {
	switch {
	case s == nil:
		return "-"
	case s.Deleted:
		return s.Stamp.String() + " deleted, arrived " + at(s.Arrival.Millis)
	}
	return fmt.Sprintf("%s value #%08x, arrived %s", s.Stamp, uint32(s.ValueHash), at(s.Arrival.Millis))
}

type sessionCommand struct{}

type session struct {
	ID            uint64   `json:"id"`
	UserID        string   `json:"userId"`
	RemoteAddress string   `json:"remoteAddress"`
	OpenedMillis  uint64   `json:"openedMillis"`
	Maps          []string `json:"maps"`
	QueuedBytes   uint64   `json:"queuedBytes"`
}

// Run lists the sessions.
func (c *sessionCommand) Run(t *terminal) error {
	var rows *table
	if !t.json {
		rows = newTable(t.out, "ID", "USER", "FROM", "OPENED", "QUEUED", "MAPS")
	}
	for from, err := range t.Cluster.Sessions(t.ctx) {
		if err != nil {
			return err
		}
		s := session{
			from.GetId(), from.GetUserId(), from.GetRemoteAddress(), from.GetOpenedMillis(),
			append([]string{}, from.GetMaps()...), from.GetQueuedBytes(),
		}
		if t.json {
			if err := t.printJSON(s); err != nil {
				return err
			}
			continue
		}
		user := s.UserID
		if user == "" {
			user = "-"
		}
		rows.row(number(s.ID), user, s.RemoteAddress, at(s.OpenedMillis), number(s.QueuedBytes), cell(strings.Join(s.Maps, " ")))
	}
	if t.json {
		return nil
	}
	return rows.end()
}

type closeCommand struct {
	ID uint64 `arg:"" help:"The session, from sessions."`
}

// Run closes a session.
func (c *closeCommand) Run(t *terminal) error {
	if c.ID == 0 {
		return usageError("ids of sessions begin at 1")
	}
	r, err := remote.Call(t.ctx, t.Cluster, t.AtGateway, t.Gateway.CloseSession, &gatewayv1.CloseSessionRequest{Id: c.ID})
	if err != nil {
		return err
	}
	if t.json {
		if err := t.printJSON(struct {
			ID     uint64 `json:"id"`
			Closed bool   `json:"closed"`
		}{c.ID, r.GetClosed()}); err != nil {
			return err
		}
	}
	switch {
	case !r.GetClosed():
		return errors.New("there is no session of that id; `topgunctl sessions` lists them")
	case !t.json:
		fmt.Fprintln(t.out, "closed; its client reconnects")
	}
	return nil
}

// maxDrain is the gateway's bound.
const maxDrain = 10 * time.Minute

type drainCommand struct {
	Over time.Duration `default:"0s" placeholder:"TIME" help:"Time over which the sessions are closed, at most 10m; all at once without."`
}

// Run drains the gateway.
func (c *drainCommand) Run(t *terminal) error {
	if c.Over < 0 || c.Over > maxDrain {
		return usageError("--over must be 0s to 10m")
	}
	r, err := remote.CallFor(t.ctx, t.Cluster, t.AtGateway, c.Over, t.Gateway.Drain,
		&gatewayv1.DrainRequest{OverMillis: uint32(c.Over.Milliseconds())})
	if err != nil {
		return err
	}
	if t.json {
		return t.printJSON(struct {
			Closed uint32 `json:"closed"`
		}{r.GetClosed()})
	}
	fmt.Fprintf(t.out, "closed %d sessions; the gateway takes no new ones until it is started again\n", r.GetClosed())
	return nil
}
