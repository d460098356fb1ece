package e2e

import (
	"strings"
	"testing"
	"time"

	"github.com/topgun-sync/topgun/core/wire"
)

func levels(ack *wire.OpAck) map[string]wire.OpResult {
	byID := map[string]wire.OpResult{}
	for _, r := range ack.Results {
		byID[r.OpID] = r
	}
	return byID
}

// An ack at PERSISTED comes when the row is in the database (ACK-03).
func persistedMeansInTheDatabase(t *testing.T, c Cluster) {
	const name = "persisted"
	conn := dial(t, c, 0).hello()
	for i := range 10 {
		key := string(rune('a' + i))
		conn.send(&wire.OpBatch{
			Ops:          []wire.Op{put("1", name, key, i, stamp(now(), uint64(i), name))},
			WriteConcern: "PERSISTED", TimeoutMillis: 30_000,
		})
		ack := expect[*wire.OpAck](conn)
		rows := c.Rows(t, name)
		if r := levels(ack)["1"]; !r.Success || r.AchievedLevel != "PERSISTED" || ack.LastID != "1" {
			t.Fatalf("ack %+v; want PERSISTED", ack)
		}
		if _, stored := rows[key]; !stored {
			t.Fatalf("op %d was acknowledged as PERSISTED and is not in the database", i)
		}
	}
	// The log of the tests has one replica, so nobody can promise three.
	conn.send(&wire.OpBatch{Ops: []wire.Op{put("2", name, "never", 1, stamp(now(), 0, name))}, WriteConcern: "REPLICATED"})
	ack := expect[*wire.OpAck](conn)
	if r := levels(ack)["2"]; r.Success || !strings.Contains(r.Error, "replica") || ack.LastID != "2" {
		t.Errorf("ack %+v; want a refusal that speaks of replicas, covered", ack)
	}
	if _, stored := c.Rows(t, name)["never"]; stored {
		t.Error("a refused op was applied")
	}
	// Of one batch each op has its own.
	ops := []wire.Op{put("3", name, "x", 1, stamp(now(), 0, name)), put("4", name, "y", 1, stamp(now(), 1, name))}
	ops[0].WriteConcern, ops[1].WriteConcern = "PERSISTED", "MEMORY"
	conn.send(&wire.OpBatch{Ops: ops})
	by := levels(expect[*wire.OpAck](conn))
	if by["3"].AchievedLevel != "PERSISTED" || !by["4"].Success {
		t.Errorf("results %+v", by)
	}
	resp := postSync(t, gateway(c, 1), &wire.SyncRequest{Operations: []wire.Op{
		{ID: "5", MapName: name, Key: "z", Kind: wire.OpPut, WriteConcern: "PERSISTED", Record: put("5", name, "z", 1, stamp(now(), 2, name)).Record},
	}})
	if resp.Ack == nil || resp.Ack.LastID != "5" || c.Rows(t, name)["z"].Timestamp.IsZero() {
		t.Errorf("over HTTP: ack %+v", resp.Ack)
	}
}

// TestPG04_PersistedIsNotClaimedWithoutTheDatabase: while Postgres is away an op that
// asks for PERSISTED is applied, and its answer says that it got no further.
func TestPG04_PersistedIsNotClaimedWithoutTheDatabase(t *testing.T) {
	stories(t, options{postgres: true}, func(t *testing.T, c Cluster) {
		const name = "without_database"
		conn := dial(t, c, 0).hello()
		conn.send(&wire.OpBatch{Ops: []wire.Op{put("1", name, "a", 1, stamp(now(), 0, name))}, WriteConcern: "PERSISTED", TimeoutMillis: 30_000})
		if r := levels(expect[*wire.OpAck](conn))["1"]; r.AchievedLevel != "PERSISTED" {
			t.Fatalf("with the database: %+v", r)
		}
		c.Database().server.Stop(t)
		began := time.Now()
		conn.send(&wire.OpBatch{Ops: []wire.Op{put("2", name, "b", 2, stamp(now(), 0, name))}, WriteConcern: "PERSISTED", TimeoutMillis: 1000})
		ack := expect[*wire.OpAck](conn)
		if r := levels(ack)["2"]; r.Success || r.AchievedLevel != "APPLIED" {
			t.Errorf("without the database: %+v; want a failure at APPLIED", r)
		}
		if waited := time.Since(began); waited < 900*time.Millisecond {
			t.Errorf("answered after %v; the op asked for a second", waited)
		}
		c.Database().server.Start(t)
		conn.send(&wire.OpBatch{Ops: []wire.Op{put("3", name, "c", 3, stamp(now(), 0, name))}, WriteConcern: "PERSISTED", TimeoutMillis: 60_000})
		if r := levels(expect[*wire.OpAck](conn))["3"]; r.AchievedLevel != "PERSISTED" {
			t.Errorf("with the database again: %+v", r)
		}
		if rows := c.Rows(t, name); len(rows) != 3 {
			t.Errorf("%d rows; want all three writes", len(rows))
		}
	})
}
