-- +goose Up

-- Rows of several kinds, told apart by (partition, map, key, kind, tag). A table's key
-- cannot be changed in place, so the rows are copied, in the order of both trees.
DROP VIEW entries;

CREATE TABLE records_of_all_kinds (
    map             TEXT    NOT NULL,
    key             BLOB    NOT NULL,
    kind            INTEGER NOT NULL,  -- 0 LWW-map, 2 OR-map, 3 counter, 4 lock
    tag             BLOB    NOT NULL,  -- of an OR-map's element; the node of a counter
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
    PRIMARY KEY (partition, map, key, kind, tag) -- Load reads by partition
) STRICT, WITHOUT ROWID;

INSERT INTO records_of_all_kinds
SELECT map, key, 0, x'', key_text, partition, value, value_json, millis, counter, node_id,
       arrival_millis, arrival_counter, deleted, ttl_millis, expires_at, restamped
FROM records
ORDER BY partition, map, key;

DROP TABLE records;
ALTER TABLE records_of_all_kinds RENAME TO records;

-- What an application sees of LWW-maps: neither deleted nor expired.
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
WHERE kind = 0 AND map GLOB '[A-Za-z_]*' AND NOT deleted
  AND (expires_at IS NULL OR expires_at >= strftime('%Y-%m-%d %H:%M:%f', 'now'));

-- What an application sees of OR-maps: the elements of each key.
CREATE VIEW elements AS
SELECT map,
       key_text                                             AS key,
       CAST(tag AS TEXT)                                    AS tag,
       value_json                                           AS value,
       strftime('%Y-%m-%d %H:%M:%f', millis / 1000.0, 'unixepoch') AS written_at,
       CAST(node_id AS TEXT)                                AS written_by,
       expires_at,
       key                                                  AS key_bytes,
       tag                                                  AS tag_bytes,
       value                                                AS value_bytes
FROM records
WHERE kind = 2 AND NOT deleted AND (expires_at IS NULL OR expires_at >= strftime('%Y-%m-%d %H:%M:%f', 'now'));

-- The counters, summed over their nodes.
CREATE VIEW counters AS
SELECT key_text                                             AS name,
       sum(value_json ->> 0) - sum(value_json ->> 1)        AS value,
       sum(value_json ->> 0)                                AS added,
       sum(value_json ->> 1)                                AS taken,
       count(*)                                             AS nodes
FROM records
WHERE kind = 3 AND NOT deleted
GROUP BY key, key_text;
