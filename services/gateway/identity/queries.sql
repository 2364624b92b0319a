-- name: find_key_by_secret(secret_sha256)^
-- The key with this secret's hash together with whom it speaks for, also when it is revoked.
SELECT k.key_id, k.secret_sha256, k.roles, k.revoke_time, p.project_id, p.organization_id, p.slug
FROM api_keys AS k
JOIN projects AS p ON p.project_id = k.project_id
WHERE k.secret_sha256 = :secret_sha256;

-- name: list_revoked(key_ids)
-- Of these keys, those that are revoked.
SELECT key_id FROM api_keys WHERE key_id = ANY(:key_ids::text[]) AND revoke_time IS NOT NULL;

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

-- name: add_project(project_id, organization_id, slug, display_name, create_time, namespace_told)!
-- Stores a new project unless its slug is taken.
INSERT INTO projects (project_id, organization_id, slug, display_name, create_time, namespace_told)
VALUES (:project_id, :organization_id, :slug, :display_name, :create_time, :namespace_told)
ON CONFLICT (slug) DO NOTHING;

-- name: list_untold_slugs(limit)
-- Slugs of projects that inference was not told yet.
SELECT slug FROM projects WHERE NOT namespace_told ORDER BY project_id LIMIT :limit;

-- name: mark_told(slug)!
-- Notes that inference knows the slug.
UPDATE projects SET namespace_told = true WHERE slug = :slug;

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
