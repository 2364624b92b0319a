-- Fencing tokens of training leases and serving allocations alike: a later one is always larger.
CREATE SEQUENCE lease_tokens;

CREATE TABLE nodes (
    node text PRIMARY KEY,
    -- Random id of the agent's start; a new one means that nothing of the old start runs any more.
    incarnation text NOT NULL,
    address text NOT NULL,
    agent_version text NOT NULL,
    state text NOT NULL CHECK (state IN ('READY', 'LOST')),
    registered_at timestamptz NOT NULL,
    seen_at timestamptz NOT NULL,
    -- The heartbeat stream that is open now; a node without one gets nothing new.
    heartbeat_stream uuid
);

CREATE TABLE devices (
    node text NOT NULL REFERENCES nodes (node),
    device_index integer NOT NULL CHECK (device_index >= 0),
    hardware_type text NOT NULL,
    memory_bytes bigint NOT NULL,
    uuid text NOT NULL,
    -- False for a device that the node's newest incarnation no longer has.
    present boolean NOT NULL,
    PRIMARY KEY (node, device_index)
);

-- The right of one owner to devices of one node. A training allocation is the lease of an attempt.
CREATE TABLE allocations (
    lease_token bigint PRIMARY KEY,
    owner text NOT NULL,
    kind text NOT NULL CHECK (kind IN ('TRAINING', 'SERVING')),
    node text NOT NULL REFERENCES nodes (node),
    incarnation text NOT NULL,
    hardware_type text NOT NULL,
    created_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    released_at timestamptz
);
CREATE UNIQUE INDEX allocations_one_per_owner ON allocations (owner) WHERE released_at IS NULL;
CREATE INDEX allocations_live ON allocations (expires_at) WHERE released_at IS NULL;
CREATE INDEX allocations_live_by_node ON allocations (node) WHERE released_at IS NULL;

CREATE TABLE allocation_devices (
    lease_token bigint NOT NULL REFERENCES allocations (lease_token),
    node text NOT NULL,
    device_index integer NOT NULL,
    released_at timestamptz,
    PRIMARY KEY (lease_token, device_index),
    FOREIGN KEY (node, device_index) REFERENCES devices (node, device_index)
);
-- A device has one owner: whatever the code does, a second live row for it cannot exist.
CREATE UNIQUE INDEX allocation_devices_one_owner ON allocation_devices (node, device_index) WHERE released_at IS NULL;

CREATE TABLE jobs (
    job_id text PRIMARY KEY,
    project_id text NOT NULL,
    organization_id text NOT NULL,
    -- First part of the model's full name; the project's slug at the time of the request.
    namespace text NOT NULL,
    request_id text,
    -- Digest of the request, to tell a repeated request from a reused id.
    request_sha256 text NOT NULL,
    state text NOT NULL CHECK (
        state IN ('VALIDATING', 'QUEUED', 'STARTING', 'RUNNING', 'CANCELLING', 'SUCCEEDED', 'FAILED', 'CANCELLED')
    ),
    -- Encoded finemesh.tuning.v1.TuningSpec with every default filled in; the columns below repeat what queries need.
    spec bytea NOT NULL,
    base_model text NOT NULL,
    base_revision text NOT NULL,
    parameter_count bigint NOT NULL,
    output_name text NOT NULL,
    gpu_count integer NOT NULL CHECK (gpu_count > 0),
    memory_bytes_min bigint NOT NULL,
    -- Encoded finemesh.artifacts.v1.Artifact each.
    base_artifact bytea NOT NULL,
    training_artifact bytea NOT NULL,
    validation_artifact bytea,
    -- Encoded finemesh.tuning.v1.DatasetCounts, set with the hold.
    counts bytea,
    quoted_nanos_usd bigint NOT NULL DEFAULT 0,
    price_book_version text NOT NULL DEFAULT '',
    hold_id text NOT NULL DEFAULT '',
    -- True from just before billing is asked to hold: from then on a hold may exist, whatever became of the answer.
    hold_requested boolean NOT NULL DEFAULT false,
    -- A hold that may exist has to be released.
    release_pending boolean NOT NULL DEFAULT false,
    -- The token of the attempt that may report; null while no node has the job.
    lease_token bigint UNIQUE,
    attempt_count integer NOT NULL DEFAULT 0,
    -- Failures since the last new checkpoint.
    failure_count integer NOT NULL DEFAULT 0,
    -- Encoded finemesh.tuning.v1.TuningProgress of the last report, with what queries need beside it.
    progress bytea,
    progress_step bigint,
    progress_token bigint,
    progress_time timestamptz,
    remaining_s double precision,
    output_revision text NOT NULL DEFAULT '',
    -- Encoded finemesh.tuning.v1.JobError.
    error bytea,
    -- Number of the last line of the job's event log.
    last_sequence bigint NOT NULL DEFAULT 1,
    -- No worker takes the job before.
    wake_at timestamptz NOT NULL,
    -- A worker's own lease on the row: an answer that comes after it was lost is dropped.
    claim_token uuid,
    claimed_until timestamptz,
    -- Failures in a row of services that the analysis and the hold need.
    service_failures integer NOT NULL DEFAULT 0,
    waiting_message text NOT NULL DEFAULT '',
    create_time timestamptz NOT NULL,
    queue_time timestamptz,
    start_time timestamptz,
    end_time timestamptz,
    update_time timestamptz NOT NULL
);
CREATE UNIQUE INDEX jobs_one_per_request ON jobs (project_id, request_id) WHERE request_id IS NOT NULL;
-- A failed or cancelled job gives its name back.
CREATE UNIQUE INDEX jobs_one_per_output_name ON jobs (project_id, output_name) WHERE state NOT IN ('FAILED', 'CANCELLED');
CREATE INDEX jobs_by_project ON jobs (project_id, job_id DESC);
CREATE INDEX jobs_validating ON jobs (wake_at) WHERE state = 'VALIDATING';
CREATE INDEX jobs_queued ON jobs (queue_time, job_id) WHERE state = 'QUEUED';
CREATE INDEX jobs_running ON jobs (remaining_s) WHERE state IN ('STARTING', 'RUNNING', 'CANCELLING');
CREATE INDEX jobs_release_pending ON jobs (wake_at) WHERE release_pending;

-- The job's history, numbered without gaps: the number is taken from the job's row in the same transaction.
CREATE TABLE job_events (
    job_id text NOT NULL REFERENCES jobs (job_id),
    sequence bigint NOT NULL,
    project_id text NOT NULL,
    event_time timestamptz NOT NULL,
    kind text NOT NULL,
    message text NOT NULL,
    state text NOT NULL,
    progress bytea,
    PRIMARY KEY (job_id, sequence)
);

CREATE TABLE attempts (
    lease_token bigint PRIMARY KEY REFERENCES allocations (lease_token),
    job_id text NOT NULL REFERENCES jobs (job_id),
    project_id text NOT NULL,
    attempt integer NOT NULL,
    node text NOT NULL,
    incarnation text NOT NULL,
    create_time timestamptz NOT NULL,
    end_time timestamptz,
    outcome text CHECK (outcome IN ('SUCCEEDED', 'FAILED', 'STOPPED', 'LOST')),
    message text NOT NULL DEFAULT '',
    UNIQUE (job_id, attempt)
);

CREATE TABLE checkpoints (
    job_id text NOT NULL REFERENCES jobs (job_id),
    step bigint NOT NULL CHECK (step >= 0),
    project_id text NOT NULL,
    attempt integer NOT NULL,
    lease_token bigint NOT NULL,
    manifest_sha256 text NOT NULL,
    size_bytes bigint NOT NULL,
    -- Encoded finemesh.artifacts.v1.Artifact.
    artifact bytea NOT NULL,
    create_time timestamptz NOT NULL,
    -- From then on its files may be gone.
    obsolete_at timestamptz,
    PRIMARY KEY (job_id, step)
);

-- What is billed, once per piece of work: the key says which steps, not who did them.
CREATE TABLE job_usage (
    work_key text PRIMARY KEY,
    job_id text NOT NULL REFERENCES jobs (job_id),
    project_id text NOT NULL,
    kind text NOT NULL CHECK (kind IN ('train', 'evaluate')),
    start_step bigint NOT NULL,
    end_step bigint NOT NULL,
    tokens bigint NOT NULL CHECK (tokens >= 0),
    lease_token bigint NOT NULL,
    recorded_at timestamptz NOT NULL
);
CREATE INDEX job_usage_by_job ON job_usage (job_id, kind, start_step);

-- Token counts of a file under one base model and setting: a quote and the run read the same row.
CREATE TABLE dataset_analyses (
    file_sha256 text NOT NULL,
    base_revision text NOT NULL,
    sequence_tokens_max integer NOT NULL,
    train_on_inputs text NOT NULL,
    example_count bigint NOT NULL,
    token_count bigint NOT NULL,
    labelled_token_count bigint NOT NULL,
    truncated_count bigint NOT NULL,
    longest_tokens bigint NOT NULL,
    plan_sha256 text NOT NULL,
    format text NOT NULL,
    create_time timestamptz NOT NULL,
    PRIMARY KEY (file_sha256, base_revision, sequence_tokens_max, train_on_inputs)
);
