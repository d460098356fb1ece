-- +goose Up

-- One row per record of every map, tombstones included. The bytes decide; the
-- columns key_text, value_json and expires_at are there for people.
CREATE TABLE topgun.records (
    map             text COLLATE "C" NOT NULL,
    key             bytea    NOT NULL,
    key_text        text,               -- the key, null where it is not text
    partition       smallint NOT NULL,  -- hash of the key mod 271
    value           bytea    NOT NULL,  -- one msgpack value, empty for a tombstone
    value_json      jsonb,              -- the value, null where it has no JSON form
    millis          bigint   NOT NULL,  -- the stamp that decides who wins:
    counter         bigint   NOT NULL,
    node_id         bytea    NOT NULL,  -- bytes, since a node id may hold a NUL
    arrival_millis  bigint   NOT NULL,  -- when the server took it in
    arrival_counter bigint   NOT NULL,
    deleted         boolean  NOT NULL,
    ttl_millis      bigint   NOT NULL,  -- 0 for ever
    expires_at      timestamptz,        -- null for ever
    restamped       text,               -- original stamps from the future, a JSON array
    PRIMARY KEY (map, key)
) WITH (fillfactor = 85); -- room for updates in place: no index holds a column that changes

-- Load reads by partition.
CREATE INDEX records_by_partition ON topgun.records (partition);

-- How far each lane of the log is stored; moves with the rows.
CREATE TABLE topgun.watermarks (
    history  text COLLATE "C" NOT NULL, -- identity of the log
    lane     text COLLATE "C" NOT NULL,
    sequence bigint NOT NULL,           -- of the lane's last stored commit
    number   bigint NOT NULL,           -- of that commit within the lane
    PRIMARY KEY (history, lane)
);

-- What an application sees: neither deleted nor expired.
CREATE VIEW topgun.entries AS
SELECT map,
       key_text                        AS key,
       value_json                      AS value,
       to_timestamp(millis / 1000.0)   AS written_at,
       encode(node_id, 'escape')       AS written_by,
       expires_at,
       key                             AS key_bytes,
       value                           AS value_bytes
FROM topgun.records
WHERE NOT deleted AND (expires_at IS NULL OR expires_at >= now());
