-- What the integrations of a job are opened with, sealed; deleted in the transaction that ends the job.

CREATE TABLE job_secrets (
    job_id text PRIMARY KEY REFERENCES jobs (job_id),
    project_id text NOT NULL,
    -- AES-256-GCM of an encoded finemesh.tuning.v1.TuningSecrets, bound to the job's resource name.
    sealed bytea NOT NULL,
    create_time timestamptz NOT NULL
);
