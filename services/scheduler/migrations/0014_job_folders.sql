-- Folders of ended jobs in the artifact store, which nodes clean in two stages; then the row goes.
CREATE TABLE job_folders (
    job_id text PRIMARY KEY REFERENCES jobs (job_id),
    project_id text NOT NULL,
    -- 0: as the job left it; 1: the own state of the run is gone, and what its attempts left behind.
    stage smallint NOT NULL DEFAULT 0 CHECK (stage IN (0, 1)),
    ended_at timestamptz NOT NULL DEFAULT now(),
    -- A node's claim on the folder: an answer that comes after it was taken over changes nothing.
    claim uuid,
    claimed_until timestamptz
);
CREATE INDEX job_folders_due ON job_folders (stage, ended_at);
INSERT INTO job_folders (job_id, project_id, ended_at)
SELECT job_id, project_id, end_time FROM jobs WHERE end_time IS NOT NULL AND attempt_count > 0;
