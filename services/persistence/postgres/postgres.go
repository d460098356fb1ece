// Package postgres is a persistence.Store in PostgreSQL.
//
// It owns the schema topgun (tables records and watermarks, views for people) and its
// migrations, which it runs by itself on first use; several processes starting at
// once wait for the one that migrates. It promises what every Store does, reads
// and writes only a server that accepts writes (RELIABILITY PG-08), and hands out
// no text of the driver or the server: those may hold client data or the
// password in the URL. It does not retry: its caller does.
package postgres

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/topgun-sync/topgun/core/hlc"
	"github.com/topgun-sync/topgun/core/lwwmap"
	"github.com/topgun-sync/topgun/services/persistence"
)

// Store is safe for concurrent use.
type Store struct {
	pool *pgxpool.Pool
	log  *slog.Logger
	// loads bounds the Loads that run at once, so that they never take the last
	// connections from the drain. A further Load waits for its turn.
	loads chan struct{}
	// life ends with Close.
	life context.Context
	end  context.CancelFunc
	// preparing is waited for by Close.
	preparing sync.WaitGroup

	mu sync.Mutex
	// prepared is set once the schema is known to be there.
	prepared bool
	// preparation is under way; nil while none is.
	preparation *preparation
}

// defaultConnections is the pool's size when the URL says nothing.
const defaultConnections = 8

// New returns a store on the database that url names. It does not connect: the
// database may be away, and each call tries again.
func New(url string, log *slog.Logger) (*Store, error) {
	config, err := pgxpool.ParseConfig(url)
	if err != nil {
		// The parser's text repeats parts of the URL.
		return nil, errors.New("the connection URL of Postgres cannot be read: want postgres://user:password@host:port/database")
	}
	if !strings.Contains(url, "pool_max_conns") {
		config.MaxConns = defaultConnections
	}
	config.MaxConns = max(config.MaxConns, 3)
	if config.ConnConfig.ConnectTimeout == 0 {
		config.ConnConfig.ConnectTimeout = 5 * time.Second
	}
	if config.ConnConfig.ValidateConnect == nil {
		// A standby may lack rows whose watermark a partition has already seen.
		config.ConnConfig.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
	}
	config.ConnConfig.RuntimeParams["application_name"] = "topgun-persistence"
	// NewWithConfig connects in the background only; MinConns is 0 unless asked for.
	pool, err := pgxpool.NewWithConfig(context.Background(), config)
	if err != nil {
		return nil, errors.New("the connection settings of Postgres are not usable")
	}
	s := &Store{pool: pool, log: log, loads: make(chan struct{}, config.MaxConns-2)}
	s.life, s.end = context.WithCancel(context.Background())
	return s, nil
}

// Close implements persistence.Store.
func (s *Store) Close() error {
	s.mu.Lock()
	s.end()
	s.mu.Unlock()
	s.preparing.Wait()
	s.pool.Close()
	return nil
}

const selectWatermarks = `SELECT history, lane, sequence, number FROM topgun.watermarks`

const selectRecords = `
SELECT map, key, kind, tag, value, millis, counter, node_id, ttl_millis, arrival_millis, arrival_counter, coalesce(restamped, '')
FROM topgun.records
WHERE partition = ANY($1)`

// Load implements persistence.Store.
func (s *Store) Load(ctx context.Context, partitions []int, watermarks func([]persistence.Watermark) error, record func(persistence.Record) error) error {
	select {
	case s.loads <- struct{}{}:
		defer func() { <-s.loads }()
	case <-ctx.Done():
		return fmt.Errorf("wait for a turn to load: %w", ctx.Err())
	}
	if err := s.ensureSchema(ctx); err != nil {
		return err
	}
	// One snapshot for both queries: were the records older than the watermarks,
	// the replay would miss what lies between (RELIABILITY PG-05).
	tx, err := s.pool.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly})
	if err != nil {
		return classify(ctx, "load records", err)
	}
	defer rollback(ctx, tx)

	marks, err := readWatermarks(ctx, tx)
	if err != nil {
		return classify(ctx, "load watermarks", err)
	}
	if err := watermarks(marks); err != nil {
		return err
	}
	wanted := make([]int16, len(partitions))
	for i, partition := range partitions {
		wanted[i] = int16(partition)
	}
	reading, stop := context.WithCancel(ctx)
	rows, err := tx.Query(reading, selectRecords, wanted)
	if err != nil {
		stop()
		return classify(ctx, "load records", err)
	}
	// Close reads what is left, which may be millions of records after a caller went
	// away; stop first, and it gives the connection up instead.
	defer rows.Close()
	defer stop()
	for rows.Next() {
		r, err := scanRecord(rows)
		if err != nil {
			return classify(ctx, "load records", err)
		}
		if err := record(r); err != nil {
			return err
		}
	}
	if err := rows.Err(); err != nil {
		return classify(ctx, "load records", err)
	}
	return nil
}

func scanRecord(rows pgx.Rows) (persistence.Record, error) {
	var (
		r                          persistence.Record
		kind                       int16
		key, tag, value, node      []byte
		millis, counter, ttl       int64
		arrivalMillis, arrivalStep int64
		restamped                  string
	)
	if err := rows.Scan(&r.Map, &key, &kind, &tag, &value, &millis, &counter, &node, &ttl, &arrivalMillis, &arrivalStep, &restamped); err != nil {
		return r, err
	}
	r.Key, r.Kind, r.Tag = string(key), persistence.Kind(kind), string(tag)
	r.State = lwwmap.Record{
		Value:     value,
		Timestamp: hlc.Timestamp{Millis: uint64(millis), Counter: uint64(counter), NodeID: string(node)},
		TTLMillis: uint64(ttl),
	}
	r.Arrival = persistence.Arrival{Millis: uint64(arrivalMillis), Counter: uint64(arrivalStep)}
	var err error
	r.Restamped, err = persistence.DecodeRestamped(restamped)
	return r, err
}

// Watermarks implements persistence.Store.
func (s *Store) Watermarks(ctx context.Context) ([]persistence.Watermark, error) {
	if err := s.ensureSchema(ctx); err != nil {
		return nil, err
	}
	marks, err := readWatermarks(ctx, s.pool)
	if err != nil {
		return nil, classify(ctx, "read watermarks", err)
	}
	return marks, nil
}

type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

func readWatermarks(ctx context.Context, q querier) ([]persistence.Watermark, error) {
	rows, err := q.Query(ctx, selectWatermarks)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (persistence.Watermark, error) {
		var (
			mark             persistence.Watermark
			sequence, number int64
		)
		err := row.Scan(&mark.History, &mark.Lane, &sequence, &number)
		mark.Position = persistence.Position{Sequence: uint64(sequence), Number: uint64(number)}
		return mark, err
	})
}

// Stats implements persistence.Store.
func (s *Store) Stats(ctx context.Context) (persistence.Stats, error) {
	if err := s.ensureSchema(ctx); err != nil {
		return persistence.Stats{}, err
	}
	var records, tombstones int64
	err := s.pool.QueryRow(ctx, `SELECT count(*), count(*) FILTER (WHERE deleted) FROM topgun.records`).Scan(&records, &tombstones)
	if err != nil {
		return persistence.Stats{}, classify(ctx, "count records", err)
	}
	return persistence.Stats{Records: uint64(records), Tombstones: uint64(tombstones)}, nil
}

// The watermarks move by compare-and-set: each statement must hit every lane it
// names (RELIABILITY PG-07).
const (
	moveWatermarks = `
UPDATE topgun.watermarks AS w
SET sequence = m.sequence, number = m.number
FROM unnest($2::text[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[])
     AS m (lane, old_sequence, old_number, sequence, number)
WHERE w.history = $1 AND w.lane = m.lane AND w.sequence = m.old_sequence AND w.number = m.old_number`

	startWatermarks = `
INSERT INTO topgun.watermarks (history, lane, sequence, number)
SELECT $1, m.lane, m.sequence, m.number
FROM unnest($2::text[], $3::bigint[], $4::bigint[]) AS m (lane, sequence, number)
ON CONFLICT (history, lane) DO NOTHING`
)

// upsertRecords replaces a row by the rule of persistence.Record.Replaces.
const upsertRecords = `
INSERT INTO topgun.records AS r
       (map, key, kind, tag, key_text, partition, value, value_json, millis, counter, node_id,
        arrival_millis, arrival_counter, deleted, ttl_millis, expires_at, restamped)
SELECT n.map, n.key, n.kind, n.tag, n.key_text, n.partition, n.value, n.value_json::jsonb, n.millis, n.counter, n.node_id,
       n.arrival_millis, n.arrival_counter, length(n.value) = 0, n.ttl_millis, n.expires_at, n.restamped
FROM unnest($1::text[], $2::bytea[], $3::text[], $4::smallint[], $5::bytea[], $6::text[], $7::bigint[], $8::bigint[],
            $9::bytea[], $10::bigint[], $11::bigint[], $12::bigint[], $13::timestamptz[], $14::text[],
            $15::smallint[], $16::bytea[])
     AS n (map, key, key_text, partition, value, value_json, millis, counter,
           node_id, arrival_millis, arrival_counter, ttl_millis, expires_at, restamped, kind, tag)
ON CONFLICT (map, key, kind, tag) DO UPDATE SET
       value = excluded.value, value_json = excluded.value_json,
       millis = excluded.millis, counter = excluded.counter, node_id = excluded.node_id,
       arrival_millis = excluded.arrival_millis, arrival_counter = excluded.arrival_counter,
       deleted = excluded.deleted, ttl_millis = excluded.ttl_millis,
       expires_at = excluded.expires_at, restamped = excluded.restamped
WHERE (excluded.arrival_millis, excluded.arrival_counter) > (r.arrival_millis, r.arrival_counter)
  AND (r.kind <> 0 OR (excluded.millis, excluded.counter, excluded.node_id) >= (r.millis, r.counter, r.node_id))`

// deletePruned forgets what arrived before it was pruned.
const deletePruned = `
DELETE FROM topgun.records AS r
USING unnest($1::text[], $2::bytea[], $3::smallint[], $4::bytea[], $5::bigint[], $6::bigint[])
      AS p (map, key, kind, tag, arrival_millis, arrival_counter)
WHERE r.map = p.map AND r.key = p.key AND r.kind = p.kind AND r.tag = p.tag
  AND (r.arrival_millis, r.arrival_counter) < (p.arrival_millis, p.arrival_counter)`

// Commit implements persistence.Store.
func (s *Store) Commit(ctx context.Context, batch persistence.Batch) (int, error) {
	if err := batch.Check(); err != nil {
		return 0, fmt.Errorf("commit batch: %w", err)
	}
	if err := s.ensureSchema(ctx); err != nil {
		return 0, err
	}
	columns, err := columnsOf(batch.Records)
	if err != nil {
		return 0, fmt.Errorf("commit batch: %w", err)
	}
	changed, err := s.commit(ctx, batch, columns)
	if state := sqlState(err); strings.HasPrefix(state, "22") || strings.HasPrefix(state, "54") {
		// Data exception, or a limit exceeded: only the readable columns can be the
		// cause, since bytes and numbers always fit. They are a courtesy, and must
		// not hold up the log.
		s.log.WarnContext(ctx, "storing a batch without its readable columns", "sqlstate", state, "records", len(batch.Records))
		clear(columns.keyTexts)
		clear(columns.valueJSON)
		changed, err = s.commit(ctx, batch, columns)
	}
	if err != nil {
		return 0, classify(ctx, "commit batch", err)
	}
	return changed, nil
}

func (s *Store) commit(ctx context.Context, batch persistence.Batch, c *columns) (int, error) {
	tx, err := s.pool.Begin(ctx)
	if err != nil {
		return 0, err
	}
	defer rollback(ctx, tx)

	var statements pgx.Batch
	conflict := false
	hits := func(want int) func(pgconn.CommandTag) error {
		return func(tag pgconn.CommandTag) error {
			conflict = conflict || tag.RowsAffected() != int64(want)
			return nil
		}
	}
	var started, moved moves
	for _, move := range batch.Moves {
		if move.From == (persistence.Position{}) {
			started.add(move)
		} else {
			moved.add(move)
		}
	}
	if len(started.lanes) > 0 {
		statements.Queue(startWatermarks, batch.History, started.lanes, started.sequences, started.numbers).
			Exec(hits(len(started.lanes)))
	}
	if len(moved.lanes) > 0 {
		statements.Queue(moveWatermarks, batch.History, moved.lanes, moved.oldSequences, moved.oldNumbers, moved.sequences, moved.numbers).
			Exec(hits(len(moved.lanes)))
	}
	changed := 0
	count := func(tag pgconn.CommandTag) error {
		changed += int(tag.RowsAffected())
		return nil
	}
	if len(batch.Pruned) > 0 {
		p := prunedColumnsOf(batch.Pruned)
		statements.Queue(deletePruned, p.maps, p.keys, p.kinds, p.tags, p.arrivalMillis, p.arrivalCounters).Exec(count)
	}
	if len(batch.Records) > 0 {
		statements.Queue(upsertRecords, c.maps, c.keys, c.keyTexts, c.partitions, c.values, c.valueJSON, c.millis, c.counters,
			c.nodes, c.arrivalMillis, c.arrivalCounters, c.ttls, c.expires, c.restamped, c.kinds, c.tags).
			Exec(count)
	}
	if err := tx.SendBatch(ctx, &statements).Close(); err != nil {
		return 0, err
	}
	if conflict {
		return 0, persistence.ErrConflict
	}
	if err := tx.Commit(ctx); err != nil {
		return 0, err
	}
	return changed, nil
}

// rollback ends a transaction that was not committed. Its outcome does not
// matter: a connection that cannot roll back is closed, which does the same.
func rollback(ctx context.Context, tx pgx.Tx) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	_ = tx.Rollback(ctx)
}

type moves struct {
	lanes                                        []string
	oldSequences, oldNumbers, sequences, numbers []int64
}

func (m *moves) add(move persistence.Move) {
	m.lanes = append(m.lanes, move.Lane)
	m.oldSequences = append(m.oldSequences, int64(move.From.Sequence))
	m.oldNumbers = append(m.oldNumbers, int64(move.From.Number))
	m.sequences = append(m.sequences, int64(move.To.Sequence))
	m.numbers = append(m.numbers, int64(move.To.Number))
}

// identities are the columns that name a row.
type identities struct {
	maps  []string
	keys  [][]byte
	kinds []int16
	tags  [][]byte
}

func newIdentities(n int) identities {
	return identities{maps: make([]string, n), keys: make([][]byte, n), kinds: make([]int16, n), tags: make([][]byte, n)}
}

func (ids *identities) set(i int, id persistence.Identity) {
	ids.maps[i], ids.keys[i], ids.kinds[i], ids.tags[i] = id.Map, []byte(id.Key), int16(id.Kind), []byte(id.Tag)
}

// columns are the records of a batch, column by column, as unnest takes them.
type columns struct {
	identities
	keyTexts                       []*string
	partitions                     []int16
	values                         [][]byte
	valueJSON                      []*string
	millis, counters               []int64
	nodes                          [][]byte
	arrivalMillis, arrivalCounters []int64
	ttls                           []int64
	expires                        []*time.Time
	restamped                      []*string
}

// prunedColumns are what a batch forgets.
type prunedColumns struct {
	identities
	arrivalMillis, arrivalCounters []int64
}

// prunedColumnsOf sorts as columnsOf does.
func prunedColumnsOf(pruned []persistence.Pruned) prunedColumns {
	sorted := slices.SortedFunc(slices.Values(pruned), func(a, b persistence.Pruned) int { return a.Compare(b.Identity) })
	n := len(sorted)
	c := prunedColumns{identities: newIdentities(n), arrivalMillis: make([]int64, n), arrivalCounters: make([]int64, n)}
	for i, p := range sorted {
		c.set(i, p.Identity)
		c.arrivalMillis[i], c.arrivalCounters[i] = int64(p.Arrival.Millis), int64(p.Arrival.Counter)
	}
	return c
}

// columnsOf sorts by identity, so that two transactions lock rows in the same order
// and cannot deadlock.
func columnsOf(records []persistence.Record) (*columns, error) {
	sorted := slices.SortedFunc(slices.Values(records), func(a, b persistence.Record) int { return a.Compare(b.Identity) })
	n := len(sorted)
	c := &columns{
		identities: newIdentities(n), keyTexts: make([]*string, n), partitions: make([]int16, n),
		values: make([][]byte, n), valueJSON: make([]*string, n), millis: make([]int64, n), counters: make([]int64, n),
		nodes: make([][]byte, n), arrivalMillis: make([]int64, n), arrivalCounters: make([]int64, n),
		ttls: make([]int64, n), expires: make([]*time.Time, n), restamped: make([]*string, n),
	}
	var buffer []byte
	for i, r := range sorted {
		c.set(i, r.Identity)
		if text, ok := r.KeyText(); ok {
			c.keyTexts[i] = &text
		}
		c.partitions[i] = int16(r.Partition())
		c.values[i] = r.State.Value
		if c.values[i] == nil {
			c.values[i] = []byte{} // nil would be NULL
		}
		if text, ok := r.ValueJSON(buffer[:0]); ok {
			json := string(text)
			c.valueJSON[i] = &json
			buffer = text
		}
		c.millis[i] = int64(r.State.Timestamp.Millis)
		c.counters[i] = int64(r.State.Timestamp.Counter)
		c.nodes[i] = []byte(r.State.Timestamp.NodeID)
		c.arrivalMillis[i] = int64(r.Arrival.Millis)
		c.arrivalCounters[i] = int64(r.Arrival.Counter)
		c.ttls[i] = int64(r.State.TTLMillis)
		if at, ok := r.ExpiresAt(); ok {
			c.expires[i] = &at
		}
		text, err := persistence.EncodeRestamped(r.Restamped)
		if err != nil {
			return nil, err
		}
		if text != "" {
			c.restamped[i] = &text
		}
	}
	return c, nil
}
