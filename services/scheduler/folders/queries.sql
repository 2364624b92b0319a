-- name: claim_folders(stage, retention_s, node, claim, claim_s, page_size)
-- Takes folders at this stage whose time has come and that no other node holds.
UPDATE job_folders
SET claim = :claim, claimed_by = :node, claimed_until = now() + make_interval(secs => :claim_s)
WHERE job_id IN (
    SELECT job_id
    FROM job_folders
    WHERE
        stage = :stage
        AND ended_at < now() - make_interval(secs => :retention_s)
        AND (claimed_until IS NULL OR claimed_until < now())
    ORDER BY ended_at
    LIMIT :page_size
    FOR UPDATE SKIP LOCKED
)
RETURNING project_id, job_id;

-- name: give_up_checkpoints(job_ids)!
-- Gives up what nobody asked to keep of ended jobs, but for the last checkpoint of one that shipped it as its model.
UPDATE checkpoints
SET obsolete_at = now()
FROM jobs
WHERE
    jobs.job_id = ANY(:job_ids::text[])
    AND jobs.end_time IS NOT NULL
    AND checkpoints.job_id = jobs.job_id
    AND checkpoints.obsolete_at IS NULL
    AND NOT checkpoints.asked
    AND NOT (
        jobs.state = 'SUCCEEDED'
        AND jobs.output_artifact IS NULL
        AND checkpoints.step = (
            SELECT max(newest.step)
            FROM checkpoints AS newest
            WHERE newest.job_id = jobs.job_id AND newest.obsolete_at IS NULL
        )
    );

-- name: list_kept(job_ids)
-- What stays of each job: its model, and its kept checkpoints.
SELECT
    jobs.job_id,
    jobs.output_artifact,
    array(
        SELECT checkpoints.artifact
        FROM checkpoints
        WHERE checkpoints.job_id = jobs.job_id AND checkpoints.obsolete_at IS NULL
        ORDER BY checkpoints.step
    ) AS checkpoints
FROM jobs
WHERE jobs.job_id = ANY(:job_ids::text[]);

-- name: note_deleted_model(project_id, job_id, delete_time)!
-- Notes on a job that its model was deleted; no row when that is known already.
UPDATE jobs
SET model_delete_time = :delete_time, update_time = greatest(update_time, :delete_time)
WHERE project_id = :project_id AND job_id = :job_id AND model_delete_time IS NULL;

-- name: add_deleted_model(project_id, job_id)!
-- Notes that the files of a deleted model are to be removed.
INSERT INTO deleted_models (job_id, project_id) VALUES (:job_id, :project_id) ON CONFLICT (job_id) DO NOTHING;

-- name: claim_deleted_models(retention_s, node, claim, claim_s, page_size)
-- Takes models that were deleted long enough ago, that no unfinished job starts from, that no other node holds,
-- and whose job's folder was cleaned once.
UPDATE deleted_models
SET claim = :claim, claimed_by = :node, claimed_until = now() + make_interval(secs => :claim_s)
WHERE job_id IN (
    SELECT job_id
    FROM deleted_models
    WHERE
        delete_time < now() - make_interval(secs => :retention_s)
        AND (claimed_until IS NULL OR claimed_until < now())
        AND NOT EXISTS (
            SELECT FROM jobs WHERE jobs.start_model_job_id = deleted_models.job_id AND jobs.end_time IS NULL
        )
        AND NOT EXISTS (
            SELECT FROM job_folders WHERE job_folders.job_id = deleted_models.job_id AND job_folders.stage = 0
        )
    ORDER BY delete_time
    LIMIT :page_size
    FOR UPDATE SKIP LOCKED
)
RETURNING project_id, job_id;

-- name: forget_deleted_model(project_id, job_id, node, claim)!
-- The files of a deleted model are gone; no row when the claim was taken over, or is another node's.
DELETE FROM deleted_models
WHERE project_id = :project_id AND job_id = :job_id AND claim = :claim AND claimed_by = :node;

-- name: advance_folder(project_id, job_id, node, claim)!
-- Ends the first stage of a folder; no row when the claim was taken over, or is another node's.
UPDATE job_folders
SET stage = 1, claim = NULL, claimed_by = NULL, claimed_until = NULL
WHERE project_id = :project_id AND job_id = :job_id AND claim = :claim AND claimed_by = :node AND stage = 0;

-- name: forget_folder(project_id, job_id, node, claim)!
-- Ends the last stage of a folder; no row when the claim was taken over, or is another node's.
DELETE FROM job_folders
WHERE project_id = :project_id AND job_id = :job_id AND claim = :claim AND claimed_by = :node AND stage = 1;
