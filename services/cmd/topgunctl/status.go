package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	fanoutv1 "github.com/topgun-sync/topgun/gen/go/topgun/fanout/v1"
	gatewayv1 "github.com/topgun-sync/topgun/gen/go/topgun/gateway/v1"
	partitionv1 "github.com/topgun-sync/topgun/gen/go/topgun/partition/v1"
	persistencev1 "github.com/topgun-sync/topgun/gen/go/topgun/persistence/v1"
	"github.com/topgun-sync/topgun/services/cmd/topgunctl/internal/remote"
)

type statusCommand struct{}

// health is one service's.
type health struct {
	Service string   `json:"service"`
	URL     string   `json:"url"`
	Ready   bool     `json:"ready"`
	Reasons []string `json:"reasons"`
}

type gatewayStatus struct {
	GatewayID string `json:"gatewayId"`
	Sessions  uint32 `json:"sessions"`
	Maps      uint32 `json:"maps"`
	Draining  bool   `json:"draining"`
}

type partitionStatus struct {
	NodeID                   string   `json:"nodeId"`
	Lane                     string   `json:"lane"`
	History                  string   `json:"history"`
	ShardCount               uint32   `json:"shardCount"`
	Shards                   []uint32 `json:"shards"`
	MapVersion               uint64   `json:"mapVersion"`
	Level                    string   `json:"level"`
	TombstoneRetentionMillis uint64   `json:"tombstoneRetentionMillis"`
	PrunedBeforeMillis       uint64   `json:"prunedBeforeMillis"`
}

type watermark struct {
	History  string `json:"history"`
	Lane     string `json:"lane"`
	Sequence uint64 `json:"sequence"`
	Number   uint64 `json:"number"`
}

type persistenceStatus struct {
	Store      string      `json:"store"`
	Records    uint64      `json:"records"`
	Tombstones uint64      `json:"tombstones"`
	LogEnd     uint64      `json:"logEnd"`
	Stored     uint64      `json:"stored"`
	Lag        uint64      `json:"lag"`
	Watermarks []watermark `json:"watermarks"`
}

type fanoutStatus struct {
	Streams uint32 `json:"streams"`
	Maps    uint32 `json:"maps"`
	Queries uint32 `json:"queries"`
	Topics  uint32 `json:"topics"`
}

// status is all of it; what could not be asked is null.
type status struct {
	OK             bool               `json:"ok"`
	Services       []health           `json:"services"`
	Gateway        *gatewayStatus     `json:"gateway"`
	Partitions     []partitionStatus  `json:"partitions"`
	UnservedShards []uint32           `json:"unservedShards"`
	Persistence    *persistenceStatus `json:"persistence"`
	Fanout         *fanoutStatus      `json:"fanout"`
}

// Run prints what could be asked, whatever could not.
func (c *statusCommand) Run(t *terminal) error {
	s := status{OK: true, Partitions: []partitionStatus{}, UnservedShards: []uint32{}}
	for _, at := range t.Endpoints() {
		reasons, err := t.Ready(t.ctx, at)
		if err == nil {
			err = s.ask(t, at)
		}
		if t.ctx.Err() != nil {
			return t.ctx.Err()
		}
		// One that says why it is not ready need not answer more.
		if err != nil && len(reasons) == 0 {
			reasons = []string{strings.TrimPrefix(err.Error(), at.Service+" at "+at.URL+": ")}
		}
		h := health{at.Service, at.URL, len(reasons) == 0, append([]string{}, reasons...)}
		s.OK = s.OK && h.Ready
		s.Services = append(s.Services, h)
	}
	s.unserved()
	s.OK = s.OK && len(s.UnservedShards) == 0
	var err error
	if t.json {
		err = t.printJSON(s)
	} else {
		err = s.print(t)
	}
	if err == nil && !s.OK {
		err = errors.New("not everything is ready")
	}
	return err
}

// ask has one service describe itself.
func (s *status) ask(t *terminal, at remote.Endpoint) error {
	switch at.Service {
	case t.AtGateway.Service:
		d, err := remote.Call(t.ctx, t.Cluster, at, t.Gateway.Describe, &gatewayv1.DescribeRequest{})
		if err != nil {
			return err
		}
		s.Gateway = &gatewayStatus{d.GetGatewayId(), d.GetSessions(), d.GetMaps(), d.GetDraining()}
	case t.AtFanout.Service:
		d, err := remote.Call(t.ctx, t.Cluster, at, t.Fanout.Describe, &fanoutv1.DescribeRequest{})
		if err != nil {
			return err
		}
		s.Fanout = &fanoutStatus{d.GetStreams(), d.GetMaps(), d.GetQueries(), d.GetTopics()}
	case t.AtPersistence.Service:
		return s.askPersistence(t)
	default:
		for _, p := range t.Partitions {
			if p.Endpoint != at {
				continue
			}
			d, err := remote.Call(t.ctx, t.Cluster, at, p.Describe, &partitionv1.DescribeRequest{})
			if err != nil {
				return err
			}
			s.Partitions = append(s.Partitions, partitionStatus{
				d.GetNodeId(), d.GetLane(), d.GetHistory(), d.GetShardCount(), append([]uint32{}, d.GetShards()...),
				d.GetMapVersion(), levelName(d.GetLevel()), d.GetTombstoneRetentionMillis(), d.GetPrunedBeforeMillis(),
			})
		}
	}
	return nil
}

func (s *status) askPersistence(t *terminal) error {
	d, err := remote.Call(t.ctx, t.Cluster, t.AtPersistence, t.Persistence.Describe, &persistencev1.DescribeRequest{})
	if err != nil {
		return err
	}
	s.Persistence = &persistenceStatus{
		Store: d.GetStore(), Records: d.GetRecords(), Tombstones: d.GetTombstones(),
		LogEnd: d.GetSequence() + d.GetLag(), Stored: d.GetSequence(), Lag: d.GetLag(), Watermarks: []watermark{},
	}
	marks, err := remote.Call(t.ctx, t.Cluster, t.AtPersistence, t.Persistence.Watermarks, &persistencev1.WatermarksRequest{})
	if err != nil {
		return err
	}
	for _, w := range marks.GetWatermarks() {
		s.Persistence.Watermarks = append(s.Persistence.Watermarks,
			watermark{w.GetHistory(), w.GetLane(), w.GetSequence(), w.GetNumber()})
	}
	return nil
}

// unserved finds the shards without a node, once a node said how many there are.
func (s *status) unserved() {
	if len(s.Partitions) == 0 {
		return
	}
	for shard := range s.Partitions[0].ShardCount {
		served := slices.ContainsFunc(s.Partitions, func(p partitionStatus) bool { return slices.Contains(p.Shards, shard) })
		if !served {
			s.UnservedShards = append(s.UnservedShards, shard)
		}
	}
}

func (s *status) print(t *terminal) error {
	services := newTable(t.out, "SERVICE", "ADDRESS", "STATE")
	for _, h := range s.Services {
		state := "ready"
		if !h.Ready {
			state = "NOT READY: " + strings.Join(h.Reasons, "; ")
		}
		services.row(h.Service, h.URL, state)
	}
	if err := services.end(); err != nil {
		return err
	}
	facts := newTable(t.out, "")
	fact := func(name, format string, a ...any) { facts.row(name, fmt.Sprintf(format, a...)) }
	if g := s.Gateway; g != nil {
		state := ""
		if g.Draining {
			state = ", DRAINING: it takes no new ones"
		}
		fact("gateway "+g.GatewayID, "%d sessions, %d maps watched%s", g.Sessions, g.Maps, state)
	}
	for _, p := range s.Partitions {
		name := "partition " + p.NodeID
		fact(name, "shards %s of %d, map version %d", ranges(p.Shards), p.ShardCount, p.MapVersion)
		fact("", "an answered write is %s", p.Level)
		fact("", "lane %s, history %s", p.Lane, p.History)
		kept := "for ever"
		if p.TombstoneRetentionMillis > 0 {
			kept = "for " + span(p.TombstoneRetentionMillis)
		}
		if p.PrunedBeforeMillis > 0 {
			kept += ", gone before " + at(p.PrunedBeforeMillis)
		}
		fact("", "tombstones kept %s", kept)
	}
	if len(s.UnservedShards) > 0 {
		fact("UNSERVED", "shards %s", ranges(s.UnservedShards))
	}
	if p := s.Persistence; p != nil {
		fact("store "+p.Store, "%d records, %d of them tombstones", p.Records, p.Tombstones)
		fact("", "log ends at %d, stored up to %d, %d behind", p.LogEnd, p.Stored, p.Lag)
		for _, w := range p.Watermarks {
			fact("", "lane %s stored up to %d, its commit %d", w.Lane, w.Sequence, w.Number)
		}
	}
	if f := s.Fanout; f != nil {
		fact("fanout", "%d streams, %d maps, %d live queries, %d topics", f.Streams, f.Maps, f.Queries, f.Topics)
	}
	return facts.end()
}

// ranges writes ascending numbers short: 0-3 7.
func ranges(numbers []uint32) string {
	var parts []string
	for i := 0; i < len(numbers); {
		j := i
		for j+1 < len(numbers) && numbers[j+1] == numbers[j]+1 {
			j++
		}
		part := strconv.Itoa(int(numbers[i]))
		if j > i {
			part += "-" + strconv.Itoa(int(numbers[j]))
		}
		parts = append(parts, part)
		i = j + 1
	}
	if len(parts) == 0 {
		return "none"
	}
	return strings.Join(parts, " ")
}

func levelName(l partitionv1.Level) string { return strings.TrimPrefix(l.String(), "LEVEL_") }
