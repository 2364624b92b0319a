-- Whose spend cap a job counts for, and the jobs whose hold has to be kept alive.

-- Id of the API key that asked for the job; empty where it is not known.
ALTER TABLE jobs ADD COLUMN api_key_id text NOT NULL DEFAULT '';
CREATE INDEX jobs_holding ON jobs (job_id) WHERE state IN ('QUEUED', 'STARTING', 'RUNNING', 'CANCELLING');
