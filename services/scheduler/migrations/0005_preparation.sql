-- Counts of a dataset hold for the code that counted them: a changed rule of rendering or tokenising never quotes by old ones.

ALTER TABLE nodes
    -- The code that counts datasets on this node.
    ADD COLUMN preparation_version text NOT NULL DEFAULT '';
ALTER TABLE dataset_analyses
    ADD COLUMN preparation_version text NOT NULL DEFAULT '',
    -- How fast the file was read, rendered and tokenised.
    ADD COLUMN rows_per_second double precision NOT NULL DEFAULT 0,
    DROP CONSTRAINT dataset_analyses_pkey,
    ADD PRIMARY KEY (file_sha256, base_revision, sequence_tokens_max, train_on_inputs, preparation_version);
