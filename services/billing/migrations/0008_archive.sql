-- The files of the archive of usage events, as a chain: each file names the digest of the one before it, and so does
-- its row. What the ledger was booked from can be read again from them, and a file that was changed or lost is found.
CREATE TABLE archive_files (
    position bigint PRIMARY KEY CHECK (position > 0),
    object_key text NOT NULL UNIQUE,
    sha256 bytea NOT NULL CHECK (octet_length(sha256) = 32),
    previous_sha256 bytea NOT NULL CHECK (octet_length(previous_sha256) = 32),
    size_bytes bigint NOT NULL,
    event_count integer NOT NULL,
    stream text NOT NULL,
    -- When the bus took the first and the last of the events.
    first_time timestamptz NOT NULL,
    last_time timestamptz NOT NULL,
    -- Whose usage is in it, so that one organization can be verified without reading everybody's files.
    organization_ids text[] NOT NULL,
    -- When the object was deleted, because it was kept long enough. The row stays, so that the chain does.
    removed_time timestamptz
);
CREATE INDEX archive_files_kept ON archive_files (last_time) WHERE removed_time IS NULL;

-- Objects that are about to be written or deleted. What a process that dies leaves half done is found by its row.
CREATE TABLE archive_writes (
    object_key text PRIMARY KEY,
    write_time timestamptz NOT NULL DEFAULT now(),
    -- Its object is being deleted: its writer, should it still live, may not add it to the chain any more.
    abandoned boolean NOT NULL DEFAULT false
);

CREATE FUNCTION refuse_archive_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.removed_time IS NOT NULL OR NEW.removed_time IS NULL
        OR (to_jsonb(OLD) - 'removed_time') <> (to_jsonb(NEW) - 'removed_time') THEN
        RAISE EXCEPTION 'archive_files are immutable' USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER archive_files_immutable BEFORE UPDATE ON archive_files
FOR EACH ROW EXECUTE FUNCTION refuse_archive_change();
CREATE TRIGGER archive_files_kept BEFORE DELETE OR TRUNCATE ON archive_files
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
REVOKE DELETE, TRUNCATE ON archive_files FROM CURRENT_USER;
