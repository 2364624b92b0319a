-- name: find_key_by_secret(secret_sha256)^
-- The key with this secret's hash together with whom it speaks for, also when it is revoked.
SELECT k.key_id, k.secret_sha256, k.roles, k.revoke_time, p.project_id, p.organization_id, p.slug
FROM api_keys AS k
JOIN projects AS p ON p.project_id = k.project_id
WHERE k.secret_sha256 = :secret_sha256;

-- name: get_organization(organization_id)^
-- One organization.
SELECT organization_id, display_name, create_time
FROM organizations
WHERE organization_id = :organization_id;

-- name: count_organizations()$
-- How many organizations there are.
SELECT count(*) FROM organizations;

-- name: lock_bootstrap()!
-- Makes bootstraps queue until the transaction ends.
SELECT pg_advisory_xact_lock(hashtext('bootstrap'));

-- name: add_organization(organization_id, display_name, create_time)!
-- Stores a new organization.
INSERT INTO organizations (organization_id, display_name, create_time)
VALUES (:organization_id, :display_name, :create_time);

-- name: get_project(project_id, organization_id)^
-- One project of the organization.
SELECT project_id, organization_id, slug, display_name, create_time
FROM projects
WHERE project_id = :project_id AND organization_id = :organization_id;

-- name: lock_project(project_id, organization_id)^
-- One project of the organization, locked so that what is counted under it stays counted.
SELECT project_id, organization_id, slug, display_name, create_time
FROM projects
WHERE project_id = :project_id AND organization_id = :organization_id
FOR UPDATE;

-- name: lock_organization(organization_id)^
-- One organization, locked so that its number of projects stays counted.
SELECT organization_id, display_name, create_time
FROM organizations
WHERE organization_id = :organization_id
FOR UPDATE;

-- name: find_project_by_slug(slug)^
-- The project with this slug, of whatever organization; only for the operator at the machine.
SELECT project_id, organization_id, slug, display_name, create_time
FROM projects
WHERE slug = :slug;

-- name: count_projects(organization_id)$
-- How many projects the organization has.
SELECT count(*) FROM projects WHERE organization_id = :organization_id;

-- name: add_project(project_id, organization_id, slug, display_name, create_time)!
-- Stores a new project unless its slug is taken.
INSERT INTO projects (project_id, organization_id, slug, display_name, create_time)
VALUES (:project_id, :organization_id, :slug, :display_name, :create_time)
ON CONFLICT (slug) DO NOTHING;

-- name: list_projects(organization_id, after_id, limit)
-- Projects of the organization after one id, oldest first.
SELECT project_id, organization_id, slug, display_name, create_time
FROM projects
WHERE organization_id = :organization_id AND project_id > :after_id
ORDER BY project_id
LIMIT :limit;

-- name: count_live_keys(project_id)$
-- How many keys of the project are valid.
SELECT count(*) FROM api_keys WHERE project_id = :project_id AND revoke_time IS NULL;

-- name: add_key(key_id, project_id, display_name, secret_sha256, secret_prefix, roles, create_time)!
-- Stores a new key by the hash of its secret.
INSERT INTO api_keys (key_id, project_id, display_name, secret_sha256, secret_prefix, roles, create_time)
VALUES (:key_id, :project_id, :display_name, :secret_sha256, :secret_prefix, :roles, :create_time);

-- name: get_key(project_id, key_id)^
-- One key of the project.
SELECT key_id, project_id, display_name, secret_prefix, roles, create_time, revoke_time
FROM api_keys
WHERE project_id = :project_id AND key_id = :key_id;

-- name: list_keys(project_id, before_id, limit)
-- Keys of the project before one id, newest first; an empty id starts at the newest.
SELECT key_id, project_id, display_name, secret_prefix, roles, create_time, revoke_time
FROM api_keys
WHERE project_id = :project_id AND (:before_id::text = '' OR key_id < :before_id)
ORDER BY key_id DESC
LIMIT :limit;

-- name: revoke_key(project_id, key_id, revoke_time)!
-- Ends a valid key; a key that is revoked already keeps its first time.
UPDATE api_keys
SET revoke_time = :revoke_time
WHERE project_id = :project_id AND key_id = :key_id AND revoke_time IS NULL;

-- name: add_file(file_id, project_id, display_name, purpose, state, size_bytes, sha256, format, line_count, error_count, errors, features, create_time)!
-- Stores the description of an uploaded file.
INSERT INTO files (
    file_id, project_id, display_name, purpose, state, size_bytes, sha256, format, line_count, error_count, errors, features,
    create_time
)
VALUES (
    :file_id, :project_id, :display_name, :purpose, :state, :size_bytes, :sha256, :format, :line_count, :error_count,
    :errors, :features, :create_time
);

-- name: get_file(project_id, file_id)^
-- One file of the project that is not deleted.
SELECT
    file_id, project_id, display_name, purpose, state, size_bytes, sha256, format, line_count, error_count, errors, features,
    create_time
FROM files
WHERE project_id = :project_id AND file_id = :file_id AND delete_time IS NULL;

-- name: list_files(project_id, before_id, limit)
-- Files of the project before one id, newest first; an empty id starts at the newest.
SELECT
    file_id, project_id, display_name, purpose, state, size_bytes, sha256, format, line_count, error_count, errors, features,
    create_time
FROM files
WHERE project_id = :project_id AND delete_time IS NULL AND (:before_id::text = '' OR file_id < :before_id)
ORDER BY file_id DESC
LIMIT :limit;

-- name: delete_file(project_id, file_id, delete_time)!
-- Marks a file as deleted; its row stays as the record that it was here.
UPDATE files
SET delete_time = :delete_time
WHERE project_id = :project_id AND file_id = :file_id AND delete_time IS NULL;

-- name: add_removal(artifact_key, due_time)!
-- Notes bytes that are to go after the due time.
INSERT INTO removals (artifact_key, due_time)
VALUES (:artifact_key, :due_time)
ON CONFLICT (artifact_key) DO UPDATE SET due_time = excluded.due_time;

-- name: take_back_removal(artifact_key)!
-- Keeps the bytes after all; no row deleted means that a sweep has claimed them and they may be gone.
DELETE FROM removals WHERE artifact_key = :artifact_key AND claim_time IS NULL;

-- name: claim_removal(artifact_key, now)!
-- Claims one removal before its time; no row updated means that it was taken back or claimed elsewhere.
UPDATE removals
SET due_time = :now, claim_time = :now
WHERE artifact_key = :artifact_key AND claim_time IS NULL;

-- name: finish_removal(artifact_key)!
-- Forgets a removal whose bytes are gone.
DELETE FROM removals WHERE artifact_key = :artifact_key;

-- name: claim_removals(now, claimed_before, limit)
-- Claims removals whose time has come; a claim that was not finished for long may be taken over.
UPDATE removals
SET claim_time = :now
WHERE artifact_key IN (
    SELECT artifact_key
    FROM removals
    WHERE due_time <= :now AND (claim_time IS NULL OR claim_time < :claimed_before)
    ORDER BY due_time
    LIMIT :limit
    FOR UPDATE SKIP LOCKED
)
RETURNING artifact_key;

-- name: add_idempotency(project_id, method, request_id, fingerprint, resource_id, create_time)!
-- Claims a request_id for what this transaction creates; no row inserted means that somebody claimed it before.
INSERT INTO idempotency (project_id, method, request_id, fingerprint, resource_id, create_time)
VALUES (:project_id, :method, :request_id, :fingerprint, :resource_id, :create_time)
ON CONFLICT (project_id, method, request_id) DO NOTHING;

-- name: get_idempotency(project_id, method, request_id)^
-- What a request_id created.
SELECT fingerprint, resource_id
FROM idempotency
WHERE project_id = :project_id AND method = :method AND request_id = :request_id;

-- name: prune_idempotency(before, limit)!
-- Deletes a bounded batch of records that are too old for anybody to repeat their request.
DELETE FROM idempotency
WHERE (project_id, method, request_id) IN (
    SELECT project_id, method, request_id
    FROM idempotency
    WHERE create_time < :before
    LIMIT :limit
);

-- name: add_audit_entry(create_time, organization_id, project_id, actor, action, resource, trace_id)!
-- Records who did what.
INSERT INTO audit_log (create_time, organization_id, project_id, actor, action, resource, trace_id)
VALUES (:create_time, :organization_id, :project_id, :actor, :action, :resource, :trace_id);
