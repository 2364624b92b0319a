-- Checkpoints that a node could not use: they are given up, and the one before takes their place.

ALTER TABLE checkpoints
    -- Why the files cannot be used.
    ADD COLUMN bad_reason text,
    -- How many checkpoints of this step could not be used.
    ADD COLUMN bad_count integer NOT NULL DEFAULT 0;
