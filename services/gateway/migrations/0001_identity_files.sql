-- A customer of the platform.
CREATE TABLE organizations (
    organization_id text PRIMARY KEY,
    display_name text NOT NULL,
    create_time timestamptz NOT NULL
);

-- The wall between tenants; the slug is the namespace of tuned models.
CREATE TABLE projects (
    project_id text PRIMARY KEY,
    organization_id text NOT NULL REFERENCES organizations (organization_id),
    slug text NOT NULL UNIQUE CHECK (slug ~ '^[a-z0-9]([a-z0-9-]*[a-z0-9])?$' AND length(slug) BETWEEN 3 AND 40),
    display_name text NOT NULL,
    create_time timestamptz NOT NULL
);
CREATE INDEX projects_of_organization ON projects (organization_id, project_id);

-- Credentials. The secret itself is nowhere: only its SHA-256, and its first characters to recognise it.
CREATE TABLE api_keys (
    key_id text PRIMARY KEY,
    project_id text NOT NULL REFERENCES projects (project_id),
    display_name text NOT NULL,
    secret_sha256 bytea NOT NULL UNIQUE CHECK (length(secret_sha256) = 32),
    secret_prefix text NOT NULL,
    roles text[] NOT NULL CHECK (roles <@ ARRAY['member', 'admin', 'operator'] AND cardinality(roles) > 0),
    create_time timestamptz NOT NULL,
    revoke_time timestamptz
);
CREATE INDEX api_keys_of_project ON api_keys (project_id, key_id DESC);

-- Uploaded datasets; the bytes lie in the artifact store under files/{project_id}/{file_id}.
CREATE TABLE files (
    file_id text PRIMARY KEY,
    project_id text NOT NULL REFERENCES projects (project_id),
    display_name text NOT NULL,
    purpose text NOT NULL CHECK (purpose IN ('fine-tune')),
    state text NOT NULL CHECK (state IN ('ready', 'invalid')),
    size_bytes bigint NOT NULL CHECK (size_bytes >= 0),
    sha256 text NOT NULL CHECK (sha256 ~ '^[0-9a-f]{64}$'),
    format text CHECK (format IN ('conversation', 'instruction')),
    line_count bigint NOT NULL CHECK (line_count >= 0),
    error_count bigint NOT NULL CHECK (error_count >= 0),
    -- The first errors: a list of {line, path, expectation, found}.
    errors jsonb NOT NULL,
    create_time timestamptz NOT NULL,
    delete_time timestamptz,
    CHECK ((state = 'ready') = (error_count = 0)),
    CHECK (state <> 'ready' OR format IS NOT NULL)
);
CREATE INDEX files_of_project ON files (project_id, file_id DESC) WHERE delete_time IS NULL;

-- Keys of the artifact store that no file needs once the due time has passed: bytes of deleted files, and of uploads
-- that began. An upload takes its row back in the transaction that stores its file, unless a sweep claimed it before.
CREATE TABLE removals (
    artifact_key text PRIMARY KEY,
    due_time timestamptz NOT NULL,
    claim_time timestamptz
);
CREATE INDEX removals_due ON removals (due_time);

-- What each request_id created, so that a repeated create answers instead of creating again.
CREATE TABLE idempotency (
    project_id text NOT NULL REFERENCES projects (project_id),
    method text NOT NULL,
    request_id text NOT NULL CHECK (length(request_id) BETWEEN 1 AND 128),
    -- SHA-256 of the request without its request_id.
    fingerprint bytea NOT NULL CHECK (length(fingerprint) = 32),
    -- Id of the created resource.
    resource_id text NOT NULL,
    create_time timestamptz NOT NULL,
    PRIMARY KEY (project_id, method, request_id)
);
CREATE INDEX idempotency_age ON idempotency (create_time);

-- Who did what to identities and files; rows are only ever added.
CREATE TABLE audit_log (
    entry_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    create_time timestamptz NOT NULL,
    organization_id text NOT NULL,
    project_id text NOT NULL,
    -- Key id of the caller, or `bootstrap`.
    actor text NOT NULL,
    -- For example `key.create`.
    action text NOT NULL,
    -- Resource name, for example `projects/p/keys/k`.
    resource text NOT NULL,
    trace_id text NOT NULL
);
CREATE INDEX audit_log_of_organization ON audit_log (organization_id, entry_id DESC);
