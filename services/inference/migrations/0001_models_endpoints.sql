-- The base catalogue: one row per imported revision; a re-import of other contents makes a new current one.
CREATE TABLE base_models (
    model_id text NOT NULL,
    revision text NOT NULL,
    artifact_key text NOT NULL,
    files jsonb NOT NULL,
    architecture text NOT NULL,
    parameter_count bigint NOT NULL CHECK (parameter_count > 0),
    context_tokens_max integer NOT NULL CHECK (context_tokens_max > 0),
    size_bytes bigint NOT NULL CHECK (size_bytes > 0),
    current boolean NOT NULL,
    created_at timestamptz NOT NULL,
    PRIMARY KEY (model_id, revision)
);
CREATE UNIQUE INDEX base_models_current ON base_models (model_id) WHERE current;

-- Tuned models. A model id belongs to one live model; a job makes one model.
CREATE TABLE models (
    id text PRIMARY KEY,
    project_id text NOT NULL,
    model_id text NOT NULL,
    kind text NOT NULL CHECK (kind IN ('adapter', 'full')),
    base_model text NOT NULL,
    base_revision text NOT NULL,
    revision text NOT NULL,
    artifact_key text NOT NULL,
    files jsonb NOT NULL,
    adapter_rank integer NOT NULL CHECK (adapter_rank >= 0),
    tuning_job text NOT NULL UNIQUE,
    lineage jsonb NOT NULL,
    created_at timestamptz NOT NULL,
    deleted_at timestamptz
);
CREATE UNIQUE INDEX models_live_id ON models (model_id) WHERE deleted_at IS NULL;
CREATE INDEX models_of_project ON models (project_id, created_at DESC, id DESC) WHERE deleted_at IS NULL;

CREATE TABLE endpoints (
    id text PRIMARY KEY,
    project_id text NOT NULL,
    organization_id text NOT NULL,
    endpoint_id text NOT NULL,
    model text NOT NULL,
    hardware_type text NOT NULL,
    gpu_count integer NOT NULL CHECK (gpu_count BETWEEN 1 AND 64),
    state text NOT NULL CHECK (state IN ('PENDING', 'STARTING', 'READY', 'STOPPING', 'STOPPED', 'FAILED')),
    status_message text NOT NULL DEFAULT '',
    lease_token bigint,
    device_indices integer[] NOT NULL DEFAULT '{}',
    ready_at timestamptz,
    stopped_at timestamptz,
    created_at timestamptz NOT NULL,
    billed_minutes bigint NOT NULL DEFAULT 0,
    period_minutes bigint NOT NULL DEFAULT 0,
    request_id text,
    request_sha256 text,
    deleted_at timestamptz
);
CREATE UNIQUE INDEX endpoints_live_id ON endpoints (endpoint_id) WHERE deleted_at IS NULL;
CREATE UNIQUE INDEX endpoints_request ON endpoints (project_id, request_id) WHERE request_id IS NOT NULL;
CREATE INDEX endpoints_of_project ON endpoints (project_id, created_at DESC, id DESC) WHERE deleted_at IS NULL;
CREATE INDEX endpoints_moving ON endpoints (state) WHERE state IN ('PENDING', 'STARTING', 'READY', 'STOPPING');
