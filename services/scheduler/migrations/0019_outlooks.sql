-- What settings come to on their data: sequences of a file, and the outlook of a job as an encoded message.
ALTER TABLE dataset_analyses
    -- 0 in what earlier versions counted.
    ADD COLUMN row_count bigint NOT NULL DEFAULT 0,
    ADD COLUMN packed_sequence_count bigint NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN outlook bytea;
