-- The bytes of a job's files, by which large ones are validated beside small ones; 0 of a job that was made before.
ALTER TABLE jobs ADD COLUMN dataset_bytes bigint NOT NULL DEFAULT 0;
