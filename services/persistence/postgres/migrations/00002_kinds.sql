-- +goose NO TRANSACTION
-- +goose Up

-- Rows of several kinds, told apart by (map, key, kind, tag). Reads and writes go on
-- meanwhile; each statement may run again after the migration was broken off, and the
-- only long one, building the index, holds up neither.

-- kind is 0 for an LWW-map, 2 for an OR-map, 3 for a counter, 4 for a lock; tag is that
-- of an OR-map's element, or the node of a counter. With constant defaults this touches
-- no row.
ALTER TABLE topgun.records
    ADD COLUMN IF NOT EXISTS kind smallint NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS tag bytea NOT NULL DEFAULT '';

-- A build that was broken off leaves an index that is not valid.
DROP INDEX CONCURRENTLY IF EXISTS topgun.records_by_identity;
CREATE UNIQUE INDEX CONCURRENTLY records_by_identity ON topgun.records (map, key, kind, tag);

-- From here on a program of the version before can store nothing, which is right: it
-- would take an element of an OR-map for the value of a key.
ALTER TABLE topgun.records
    DROP CONSTRAINT IF EXISTS records_pkey,
    DROP CONSTRAINT IF EXISTS records_identity,
    ADD CONSTRAINT records_identity PRIMARY KEY USING INDEX records_by_identity;

-- What an application sees of LWW-maps: neither deleted nor expired.
CREATE OR REPLACE VIEW topgun.entries AS
SELECT map,
       key_text                        AS key,
       value_json                      AS value,
       to_timestamp(millis / 1000.0)   AS written_at,
       encode(node_id, 'escape')       AS written_by,
       expires_at,
       key                             AS key_bytes,
       value                           AS value_bytes
FROM topgun.records
WHERE kind = 0 AND map ~ '^[A-Za-z_]' AND NOT deleted AND (expires_at IS NULL OR expires_at >= now());

-- What an application sees of OR-maps: the elements of each key.
CREATE OR REPLACE VIEW topgun.elements AS
SELECT map,
       key_text                        AS key,
       encode(tag, 'escape')           AS tag,
       value_json                      AS value,
       to_timestamp(millis / 1000.0)   AS written_at,
       encode(node_id, 'escape')       AS written_by,
       expires_at,
       key                             AS key_bytes,
       tag                             AS tag_bytes,
       value                           AS value_bytes
FROM topgun.records
WHERE kind = 2 AND NOT deleted AND (expires_at IS NULL OR expires_at >= now());

-- The counters, summed over their nodes.
CREATE OR REPLACE VIEW topgun.counters AS
SELECT key_text                                                            AS name,
       sum((value_json ->> 0)::numeric) - sum((value_json ->> 1)::numeric) AS value,
       sum((value_json ->> 0)::numeric)                                    AS added,
       sum((value_json ->> 1)::numeric)                                    AS taken,
       count(*)                                                            AS nodes
FROM topgun.records
WHERE kind = 3 AND NOT deleted
GROUP BY key, key_text;
