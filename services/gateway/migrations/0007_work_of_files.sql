-- How much work reading a file is, as bytes of JSON that take about as long. Of files from before it is their size.
ALTER TABLE files ADD COLUMN work_bytes bigint NOT NULL DEFAULT 0 CHECK (work_bytes >= 0);
