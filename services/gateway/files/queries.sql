-- name: add_file(file_id, project_id, display_name, purpose, state, size_bytes, sha256, format, line_count, error_count, errors, features, create_time, work_bytes)!
-- Stores the description of an uploaded file.
INSERT INTO files (
    file_id, project_id, display_name, purpose, state, size_bytes, sha256, format, line_count, error_count, errors,
    features, create_time, work_bytes
)
VALUES (
    :file_id, :project_id, :display_name, :purpose, :state, :size_bytes, :sha256, :format, :line_count, :error_count,
    :errors, :features, :create_time, :work_bytes
);

-- name: get_file(project_id, file_id)^
-- One file of the project that is not deleted.
SELECT
    file_id, project_id, display_name, purpose, state, size_bytes, sha256, format, line_count, error_count, errors,
    features, create_time, work_bytes
FROM files
WHERE project_id = :project_id AND file_id = :file_id AND delete_time IS NULL;

-- name: list_files(project_id, before_id, limit)
-- Files of the project before one id, newest first; an empty id starts at the newest.
SELECT
    file_id, project_id, display_name, purpose, state, size_bytes, sha256, format, line_count, error_count, errors,
    features, create_time, work_bytes
FROM files
WHERE project_id = :project_id AND delete_time IS NULL AND (:before_id::text = '' OR file_id < :before_id)
ORDER BY file_id DESC
LIMIT :limit;

-- name: delete_file(project_id, file_id, delete_time)!
-- Marks a file as deleted; its row stays for a while as the record that it was here.
UPDATE files
SET delete_time = :delete_time
WHERE project_id = :project_id AND file_id = :file_id AND delete_time IS NULL;

-- name: prune_files(retention_s, batch_max)!
-- Deletes a bounded batch of records of files that were deleted long ago, and whose bytes are gone.
DELETE FROM files
WHERE file_id IN (
    SELECT file_id
    FROM files
    WHERE
        delete_time < now() - make_interval(secs => :retention_s)
        AND NOT EXISTS (
            SELECT FROM removals WHERE artifact_key = 'files/' || files.project_id || '/' || files.file_id
        )
    ORDER BY delete_time
    LIMIT :batch_max
    FOR UPDATE SKIP LOCKED
);

-- name: lock_storage(project_id)$
-- Makes uploads of the project that want to reserve wait until the transaction ends.
SELECT project_id FROM projects WHERE project_id = :project_id FOR NO KEY UPDATE;

-- name: get_storage(project_id)^
-- What the project stores and has reserved by the database's clock, and what an operator allows it.
SELECT
    projects.stored_bytes_max,
    projects.stored_files_max,
    (stored.size_bytes + reserved.size_bytes)::bigint AS size_bytes,
    stored.file_count + reserved.file_count AS file_count
FROM
    projects,
    LATERAL (
        SELECT coalesce(sum(size_bytes), 0) AS size_bytes, count(*) AS file_count
        FROM files
        WHERE files.project_id = projects.project_id AND delete_time IS NULL
    ) AS stored,
    LATERAL (
        SELECT coalesce(sum(reserved_bytes), 0) AS size_bytes, count(*) AS file_count
        FROM removals
        WHERE removals.project_id = projects.project_id AND claim_time IS NULL AND due_time > now()
    ) AS reserved
WHERE projects.project_id = :project_id;

-- name: set_quota(project_id, stored_bytes_max, stored_files_max)!
-- What the project may store from now on; NULL is what the settings say.
UPDATE projects
SET stored_bytes_max = :stored_bytes_max, stored_files_max = :stored_files_max
WHERE project_id = :project_id;

-- name: add_reservation(artifact_key, delay_s, project_id, reserved_bytes)!
-- Notes the bytes of an upload before they come: they go after a while unless it ends well, and are reserved until then.
INSERT INTO removals (artifact_key, due_time, project_id, reserved_bytes)
VALUES (:artifact_key, now() + make_interval(secs => :delay_s), :project_id, :reserved_bytes);

-- name: grow_reservation(artifact_key, reserved_bytes)!
-- Reserves more for an upload; no row updated means that its time is over.
UPDATE removals
SET reserved_bytes = :reserved_bytes
WHERE artifact_key = :artifact_key AND claim_time IS NULL AND due_time > now();

-- name: add_removal(artifact_key, delay_s)!
-- Notes bytes that are to go after a while, by the database's clock.
INSERT INTO removals (artifact_key, due_time)
VALUES (:artifact_key, now() + make_interval(secs => :delay_s))
ON CONFLICT (artifact_key) DO UPDATE SET due_time = excluded.due_time;

-- name: take_back_removal(artifact_key)!
-- Keeps the bytes after all; no row deleted means that their time is over, and a sweep may have removed them.
DELETE FROM removals WHERE artifact_key = :artifact_key AND claim_time IS NULL AND due_time > now();

-- name: claim_removal(artifact_key)!
-- Claims one removal before its time; no row updated means that it was taken back or claimed elsewhere.
UPDATE removals
SET due_time = now(), claim_time = now()
WHERE artifact_key = :artifact_key AND claim_time IS NULL;

-- name: postpone_removals(artifact_keys, delay_s)!
-- Gives claimed removals back: their bytes are needed for longer.
UPDATE removals
SET due_time = now() + make_interval(secs => :delay_s), claim_time = NULL
WHERE artifact_key = ANY(:artifact_keys::text[]);

-- name: finish_removal(artifact_key)!
-- Forgets a removal whose bytes are gone.
DELETE FROM removals WHERE artifact_key = :artifact_key;

-- name: claim_removals(claim_s, limit)
-- Claims removals whose time has come; a claim that was not finished for long may be taken over.
UPDATE removals
SET claim_time = now()
WHERE artifact_key IN (
    SELECT artifact_key
    FROM removals
    WHERE due_time <= now() AND (claim_time IS NULL OR claim_time < now() - make_interval(secs => :claim_s))
    ORDER BY due_time
    LIMIT :limit
    FOR UPDATE SKIP LOCKED
)
RETURNING artifact_key, project_id IS NULL AS was_file;
