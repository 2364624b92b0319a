-- A dead letter that a person gave up stays, with who did it and why: it waits for nobody any more.
ALTER TABLE dead_letters
    ADD COLUMN discarded_at timestamptz,
    ADD COLUMN discarded_by text NOT NULL DEFAULT '',
    ADD COLUMN discard_reason text NOT NULL DEFAULT '';
