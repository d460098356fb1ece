-- +goose Up

-- One row per record of every map, tombstones included. The bytes decide; the
-- columns key_text, value_json and expires_at are there for people.
CREATE TABLE records (
    map             TEXT    NOT NULL,
    key             BLOB    NOT NULL,
    key_text        TEXT,              -- the key, null where it is not text
    partition       INTEGER NOT NULL,  -- hash of the key mod 271
    value           BLOB    NOT NULL,  -- one msgpack value, empty for a tombstone
    value_json      TEXT,              -- the value, null where it has no JSON form
    millis          INTEGER NOT NULL,  -- the stamp that decides who wins:
    counter         INTEGER NOT NULL,
    node_id         BLOB    NOT NULL,  -- bytes, since a node id may hold a NUL
    arrival_millis  INTEGER NOT NULL,  -- when the server took it in
    arrival_counter INTEGER NOT NULL,
    deleted         INTEGER NOT NULL,
    ttl_millis      INTEGER NOT NULL,  -- 0 for ever
    expires_at      TEXT,              -- UTC, null for ever
    restamped       TEXT,              -- original stamps from the future, a JSON array
    PRIMARY KEY (partition, map, key) -- Load reads by partition
) STRICT, WITHOUT ROWID;

-- How far each lane of the log is stored; moves with the rows.
CREATE TABLE watermarks (
    history  TEXT    NOT NULL, -- identity of the log
    lane     TEXT    NOT NULL,
    sequence INTEGER NOT NULL, -- of the lane's last stored commit
    number   INTEGER NOT NULL, -- of that commit within the lane
    PRIMARY KEY (history, lane)
) STRICT, WITHOUT ROWID;

-- What an application sees: neither deleted nor expired.
CREATE VIEW entries AS
SELECT map,
       key_text                                             AS key,
       value_json                                           AS value,
       strftime('%Y-%m-%d %H:%M:%f', millis / 1000.0, 'unixepoch') AS written_at,
       CAST(node_id AS TEXT)                                AS written_by,
       expires_at,
       key                                                  AS key_bytes,
       value                                                AS value_bytes
FROM records
WHERE NOT deleted AND (expires_at IS NULL OR expires_at >= strftime('%Y-%m-%d %H:%M:%f', 'now'));
