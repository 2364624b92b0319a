-- Models that their owners deleted: what no run can start from any more, and whose files are to be removed.

ALTER TABLE jobs
    -- The job whose model this one starts from; nothing for a checkpoint, which stays, and for a run that starts afresh.
    ADD COLUMN start_model_job_id text,
    -- When the owner deleted the model that this job made.
    ADD COLUMN model_delete_time timestamptz;
CREATE INDEX jobs_by_start_model ON jobs (start_model_job_id) WHERE start_model_job_id IS NOT NULL;

-- Jobs under way start from what `start_weights` names: its field 1 is the name of a job, and field 3, the revision of a
-- model, comes next, unless a checkpoint's step is in between.
UPDATE jobs
SET start_model_job_id = split_part(convert_from(substr(start_weights, 3, get_byte(start_weights, 1)), 'UTF8'), '/', 4)
WHERE
    end_time IS NULL
    AND CASE
        WHEN length(start_weights) > 2 AND get_byte(start_weights, 0) = 10 AND get_byte(start_weights, 1) < 128
            THEN length(start_weights) > get_byte(start_weights, 1) + 2
            AND get_byte(start_weights, get_byte(start_weights, 1) + 2) = 26
        ELSE false
    END;

-- Deleted models whose files are still there. Nodes remove them from the folder of the job, and then the row goes.
CREATE TABLE deleted_models (
    job_id text PRIMARY KEY REFERENCES jobs (job_id),
    project_id text NOT NULL,
    -- When the scheduler heard of it, by the database's clock.
    delete_time timestamptz NOT NULL DEFAULT now(),
    -- A node's claim, as on `job_folders`.
    claim uuid,
    claimed_by text,
    claimed_until timestamptz
);
CREATE INDEX deleted_models_due ON deleted_models (delete_time);
