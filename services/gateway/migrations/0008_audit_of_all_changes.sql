-- Every call that may change something is recorded, before it is done, and then what came of it. Entries from before are
-- of deeds that were done: they keep their words, such as `key.create`.
ALTER TABLE audit_log
    -- Roles of the caller, as they were then.
    ADD COLUMN roles text[] NOT NULL DEFAULT '{}',
    -- `OK`, or the reason of the error; empty while nobody knows, for ever if the process was killed.
    ADD COLUMN outcome text NOT NULL DEFAULT 'OK';
