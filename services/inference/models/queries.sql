-- name: add_base_model(model_id, revision, artifact_key, files, architecture, parameter_count, context_tokens_max, size_bytes, source, tool_parser, reasoning_parser, chat_template_given, created_at)!
-- Adds a revision to the catalogue as the current one, or makes an old one current again.
INSERT INTO base_models (model_id, revision, artifact_key, files, architecture, parameter_count, context_tokens_max,
    size_bytes, source, tool_parser, reasoning_parser, chat_template_given, current, created_at)
VALUES (:model_id, :revision, :artifact_key, :files, :architecture, :parameter_count, :context_tokens_max,
    :size_bytes, :source, :tool_parser, :reasoning_parser, :chat_template_given, true, :created_at)
ON CONFLICT (model_id, revision) DO UPDATE
SET current = true, source = coalesce(nullif(excluded.source, ''), base_models.source),
    tool_parser = excluded.tool_parser, reasoning_parser = excluded.reasoning_parser,
    chat_template_given = excluded.chat_template_given;

-- name: retire_base_models(model_id, revision)!
-- Makes every other revision of a model an old one.
UPDATE base_models SET current = false WHERE model_id = :model_id AND revision <> :revision AND current;

-- name: lock_catalogue(model_id)$
-- Lets one import of a model at a time change which revision is current.
SELECT pg_advisory_xact_lock(hashtext('base_models'), hashtext(:model_id))::text;

-- name: get_base_model(model_id)^
-- The current revision of a base model.
SELECT model_id, revision, artifact_key, files, architecture, parameter_count, context_tokens_max, size_bytes, source,
    tool_parser, reasoning_parser, chat_template_given, created_at
FROM base_models WHERE model_id = :model_id AND current;

-- name: get_base_revision(model_id, revision)^
-- One revision of a base model, current or old: adapters stay with the one that they were trained on.
SELECT model_id, revision, artifact_key, files, architecture, parameter_count, context_tokens_max, size_bytes, source,
    tool_parser, reasoning_parser, chat_template_given, created_at
FROM base_models WHERE model_id = :model_id AND revision = :revision;

-- name: list_base_models(after, page_size)
-- Current base models by id, after a given one.
SELECT model_id, revision, artifact_key, files, architecture, parameter_count, context_tokens_max, size_bytes, source,
    tool_parser, reasoning_parser, chat_template_given, created_at
FROM base_models WHERE current AND model_id > :after ORDER BY model_id LIMIT :page_size;

-- name: add_model(id, project_id, model_id, kind, base_model, base_revision, revision, artifact_key, files, adapter_rank, tuning_job, lineage, created_at)!
-- Registers what a job made, once.
INSERT INTO models (id, project_id, model_id, kind, base_model, base_revision, revision, artifact_key, files,
    adapter_rank, tuning_job, lineage, created_at)
VALUES (:id, :project_id, :model_id, :kind, :base_model, :base_revision, :revision, :artifact_key, :files,
    :adapter_rank, :tuning_job, :lineage, :created_at)
ON CONFLICT (tuning_job) DO NOTHING;

-- name: get_model(project_id, id)^
-- A live tuned model of a project.
SELECT id, project_id, model_id, kind, base_model, base_revision, revision, artifact_key, files, adapter_rank,
    tuning_job, lineage, created_at
FROM models WHERE project_id = :project_id AND id = :id AND deleted_at IS NULL;

-- name: get_model_by_id(project_id, model_id)^
-- A live tuned model of a project by the id that chat calls use.
SELECT id, project_id, model_id, kind, base_model, base_revision, revision, artifact_key, files, adapter_rank,
    tuning_job, lineage, created_at
FROM models WHERE project_id = :project_id AND model_id = :model_id AND deleted_at IS NULL;

-- name: list_models(project_id, before_time, before_id, page_size)
-- Live tuned models of a project, newest first, before a given one.
SELECT id, project_id, model_id, kind, base_model, base_revision, revision, artifact_key, files, adapter_rank,
    tuning_job, lineage, created_at
FROM models
WHERE project_id = :project_id AND deleted_at IS NULL
    AND (created_at, id) < (:before_time::timestamptz, :before_id::text)
ORDER BY created_at DESC, id DESC LIMIT :page_size;

-- name: count_imported(project_id, pattern)$
-- Live models of a project whose owner is an import.
SELECT count(*) FROM models WHERE project_id = :project_id AND deleted_at IS NULL AND tuning_job LIKE :pattern;

-- name: lock_project_imports(project_id)$
-- Lets one import of a project at a time be listed.
SELECT pg_advisory_xact_lock(hashtext('adapter_imports'), hashtext(:project_id))::text;

-- name: delete_model(project_id, id, now)^
-- Takes a tuned model out of the registry; no row when there is none.
UPDATE models SET deleted_at = :now WHERE project_id = :project_id AND id = :id AND deleted_at IS NULL
RETURNING id, project_id, model_id, kind, base_model, base_revision, revision, artifact_key, files, adapter_rank,
    tuning_job, lineage, created_at;

-- name: claim_name(name, kind, owner)!
-- Takes a name for its owner; no row when it means something else already.
INSERT INTO model_names (name, kind, owner) VALUES (:name, :kind, :owner)
ON CONFLICT (name) DO UPDATE SET owner = excluded.owner
WHERE model_names.kind = excluded.kind AND model_names.owner = excluded.owner;

-- name: free_name(name, kind, owner)!
-- Lets others take a name that its owner gives up.
DELETE FROM model_names WHERE name = :name AND kind = :kind AND owner = :owner;

-- name: get_name_kind(name)$
-- What a name means now: base, tuned or endpoint.
SELECT kind FROM model_names WHERE name = :name;

-- name: claim_namespace(namespace, kind)!
-- Takes the first part of names for base models or for a project; no row when it is the other's.
INSERT INTO model_namespaces (namespace, kind) VALUES (lower(:namespace), :kind)
ON CONFLICT (namespace) DO UPDATE SET kind = excluded.kind WHERE model_namespaces.kind = excluded.kind;

-- name: get_namespace_kind(namespace)$
-- Whose names begin so: those of base models, or those of a project.
SELECT kind FROM model_namespaces WHERE namespace = lower(:namespace);

-- name: lock_upload_key(artifact_key)$
-- Lets one transaction at a time begin or collect uploads under a key.
SELECT pg_advisory_xact_lock(hashtext('base_uploads'), hashtext(:artifact_key))::text;

-- name: begin_upload(upload_id, artifact_key)!
-- Notes an upload; no row while files under this key are being removed.
INSERT INTO base_uploads (upload_id, artifact_key)
SELECT :upload_id::text, :artifact_key::text
WHERE NOT EXISTS (
    SELECT FROM base_uploads WHERE artifact_key = :artifact_key::text AND claim_time IS NOT NULL
);

-- name: finish_upload(upload_id, artifact_key)!
-- Ends an upload in the transaction that lists its model; no row when files under its key are being removed.
DELETE FROM base_uploads
WHERE upload_id = :upload_id AND NOT EXISTS (
    SELECT FROM base_uploads AS removed WHERE removed.artifact_key = :artifact_key AND removed.claim_time IS NOT NULL
);

-- name: get_upload_key(upload_id)$
-- Where an upload puts its files.
SELECT artifact_key FROM base_uploads WHERE upload_id = :upload_id;

-- name: is_upload_needed(upload_id, artifact_key, upload_s_max)$
-- Says whether a listed model, or an upload under way, has its files under this key, too.
SELECT EXISTS (SELECT FROM base_models WHERE artifact_key = :artifact_key)
OR EXISTS (SELECT FROM models WHERE artifact_key = :artifact_key AND deleted_at IS NULL)
OR EXISTS (
    SELECT FROM base_uploads
    WHERE artifact_key = :artifact_key AND upload_id <> :upload_id AND claim_time IS NULL
        AND begin_time > now() - make_interval(secs => :upload_s_max)
);

-- name: claim_upload(upload_id)!
-- Begins the removal of an upload's files; no row when the upload ended meanwhile.
UPDATE base_uploads SET claim_time = now() WHERE upload_id = :upload_id;

-- name: forget_upload(upload_id)!
-- Ends the removal of an upload's files.
DELETE FROM base_uploads WHERE upload_id = :upload_id;

-- name: list_dead_uploads(upload_s_max, claim_s, batch_max)
-- Uploads that take longer than any may, and removals that were not finished.
SELECT upload_id FROM base_uploads
WHERE begin_time < now() - make_interval(secs => :upload_s_max)
    OR claim_time < now() - make_interval(secs => :claim_s)
ORDER BY begin_time LIMIT :batch_max;
