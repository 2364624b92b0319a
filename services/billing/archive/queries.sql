-- name: get_archive_head()^
-- Reads the place of the newest file in the chain, and its digest.
SELECT position, sha256 FROM archive_files ORDER BY position DESC LIMIT 1;

-- name: add_archive_write(object_key)!
-- Remembers an object that is about to be written.
INSERT INTO archive_writes (object_key)
VALUES (:object_key)
ON CONFLICT (object_key) DO UPDATE SET write_time = now(), abandoned = false;

-- name: end_archive_write(object_key)!
-- Forgets an object that is in the chain, or gone.
DELETE FROM archive_writes WHERE object_key = :object_key;

-- name: add_archive_file(position, object_key, sha256, previous_sha256, size_bytes, event_count, stream, first_time, last_time, organization_ids)!
-- Adds a stored file to the chain, unless somebody else's is at its place.
INSERT INTO archive_files (
    position, object_key, sha256, previous_sha256, size_bytes, event_count, stream, first_time, last_time,
    organization_ids
)
VALUES (
    :position, :object_key, :sha256, :previous_sha256, :size_bytes, :event_count, :stream, :first_time, :last_time,
    :organization_ids
)
ON CONFLICT (position) DO NOTHING;

-- name: list_archive_files(after_position, row_max)
-- Lists files in the order of the chain.
SELECT
    position, object_key, sha256, previous_sha256, size_bytes, event_count, stream, first_time, last_time,
    organization_ids, removed_time
FROM archive_files
WHERE position > :after_position
ORDER BY position
LIMIT :row_max;

-- name: list_archive_beginnings()
-- Says for each stream from when on all that it had is archived and kept.
SELECT stream, coalesce(max(last_time) FILTER (WHERE removed_time IS NOT NULL), min(first_time)) AS begin_time
FROM archive_files
GROUP BY stream;

-- name: finish_archive_write(object_key)!
-- Forgets an object that is in the chain now, unless it is being deleted.
DELETE FROM archive_writes WHERE object_key = :object_key AND NOT abandoned;

-- name: abandon_writes(older_s, row_max)
-- Takes objects whose writer did not come to an end: they may not be added to the chain any more.
UPDATE archive_writes
SET abandoned = true
WHERE object_key IN (
    SELECT object_key
    FROM archive_writes
    WHERE write_time < now() - make_interval(secs => :older_s)
    ORDER BY write_time
    LIMIT :row_max
)
RETURNING object_key;

-- name: list_expired_files(retention_s, row_max)
-- Lists files whose newest event has been kept for long enough.
SELECT position, object_key
FROM archive_files
WHERE removed_time IS NULL AND last_time < now() - make_interval(secs => :retention_s)
ORDER BY last_time
LIMIT :row_max;

-- name: mark_file_removed(position)!
-- Notes that the object of a file was deleted.
UPDATE archive_files SET removed_time = now() WHERE position = :position AND removed_time IS NULL;
