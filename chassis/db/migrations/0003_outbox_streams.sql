-- The relay claims each stream's events apart: a stream that is full must not stand before the others.
ALTER TABLE outbox ADD COLUMN family text NOT NULL GENERATED ALWAYS AS (split_part(subject, '.', 1)) STORED;
DROP INDEX outbox_waiting;
CREATE INDEX outbox_waiting ON outbox (family, created_at, id) WHERE published_at IS NULL;
