-- name: add_base_model(model_id, revision, artifact_key, files, architecture, parameter_count, context_tokens_max, size_bytes, source, created_at)!
-- Adds a revision to the catalogue as the current one, or makes an old one current again.
INSERT INTO base_models (model_id, revision, artifact_key, files, architecture, parameter_count, context_tokens_max,
    size_bytes, source, current, created_at)
VALUES (:model_id, :revision, :artifact_key, :files, :architecture, :parameter_count, :context_tokens_max,
    :size_bytes, :source, true, :created_at)
ON CONFLICT (model_id, revision) DO UPDATE
SET current = true, source = coalesce(nullif(excluded.source, ''), base_models.source);

-- name: retire_base_models(model_id, revision)!
-- Makes every other revision of a model an old one.
UPDATE base_models SET current = false WHERE model_id = :model_id AND revision <> :revision AND current;

-- name: lock_catalogue(model_id)$
-- Lets one import of a model at a time change which revision is current.
SELECT pg_advisory_xact_lock(hashtext('base_models'), hashtext(:model_id))::text;

-- name: get_base_model(model_id)^
-- The current revision of a base model.
SELECT model_id, revision, artifact_key, files, architecture, parameter_count, context_tokens_max, size_bytes, source, created_at
FROM base_models WHERE model_id = :model_id AND current;

-- name: get_base_revision(model_id, revision)^
-- One revision of a base model, current or old: adapters stay with the one that they were trained on.
SELECT model_id, revision, artifact_key, files, architecture, parameter_count, context_tokens_max, size_bytes, source, created_at
FROM base_models WHERE model_id = :model_id AND revision = :revision;

-- name: list_base_models(after, page_size)
-- Current base models by id, after a given one.
SELECT model_id, revision, artifact_key, files, architecture, parameter_count, context_tokens_max, size_bytes, source, created_at
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

-- name: delete_model(project_id, id, now)!
-- Takes a tuned model out of the registry.
UPDATE models SET deleted_at = :now WHERE project_id = :project_id AND id = :id AND deleted_at IS NULL;

-- name: count_endpoints(project_id)$
-- Live endpoints of a project.
SELECT count(*) FROM endpoints WHERE project_id = :project_id AND deleted_at IS NULL;

-- name: add_endpoint(id, project_id, organization_id, endpoint_id, model, hardware_type, gpu_count, created_at, request_id, request_sha256)!
-- Creates an endpoint that waits for devices; no row when its request or its id exists already.
INSERT INTO endpoints (id, project_id, organization_id, endpoint_id, model, hardware_type, gpu_count, state, created_at,
    request_id, request_sha256)
VALUES (:id, :project_id, :organization_id, :endpoint_id, :model, :hardware_type, :gpu_count, 'PENDING', :created_at,
    :request_id, :request_sha256)
ON CONFLICT DO NOTHING;

-- name: get_endpoint_request(project_id, request_id)^
-- The endpoint that an earlier call with the same request id made.
SELECT id, request_sha256 FROM endpoints WHERE project_id = :project_id AND request_id = :request_id;

-- name: get_endpoint(project_id, id)^
-- A live endpoint of a project.
SELECT id, project_id, organization_id, endpoint_id, model, hardware_type, gpu_count, state, status_message,
    lease_token, device_indices, ready_at, stopped_at, created_at, billed_minutes, period_minutes
FROM endpoints WHERE project_id = :project_id AND id = :id AND deleted_at IS NULL;

-- name: get_endpoint_by_id(project_id, endpoint_id)^
-- A live endpoint of a project by the id that chat calls use.
SELECT id, project_id, organization_id, endpoint_id, model, hardware_type, gpu_count, state, status_message,
    lease_token, device_indices, ready_at, stopped_at, created_at, billed_minutes, period_minutes
FROM endpoints WHERE project_id = :project_id AND endpoint_id = :endpoint_id AND deleted_at IS NULL;

-- name: list_endpoints(project_id, before_time, before_id, page_size)
-- Live endpoints of a project, newest first, before a given one.
SELECT id, project_id, organization_id, endpoint_id, model, hardware_type, gpu_count, state, status_message,
    lease_token, device_indices, ready_at, stopped_at, created_at, billed_minutes, period_minutes
FROM endpoints
WHERE project_id = :project_id AND deleted_at IS NULL
    AND (created_at, id) < (:before_time::timestamptz, :before_id::text)
ORDER BY created_at DESC, id DESC LIMIT :page_size;

-- name: list_moving_endpoints(batch_max)
-- Endpoints that somebody has to look after.
SELECT id, project_id, organization_id, endpoint_id, model, hardware_type, gpu_count, state, status_message,
    lease_token, device_indices, ready_at, stopped_at, created_at, billed_minutes, period_minutes
FROM endpoints WHERE state IN ('PENDING', 'STARTING', 'READY', 'STOPPING') ORDER BY created_at LIMIT :batch_max;

-- name: list_resumable_endpoints(now, batch_max)
-- Parked endpoints whose organization has credit and whose project is not at its cap.
SELECT id, project_id, organization_id, endpoint_id, model, hardware_type, gpu_count, state, status_message,
    lease_token, device_indices, ready_at, stopped_at, created_at, billed_minutes, period_minutes
FROM endpoints
WHERE state = 'PARKED' AND deleted_at IS NULL
    AND NOT EXISTS (
        SELECT FROM credit_states
        WHERE credit_states.organization_id = endpoints.organization_id AND credit_states.state = 'EXHAUSTED'
    )
    AND NOT EXISTS (
        SELECT FROM spend_caps
        WHERE spend_caps.project_id = endpoints.project_id AND spend_caps.api_key_id = '' AND spend_caps.capped
            AND spend_caps.until_time > :now::timestamptz
    )
ORDER BY created_at LIMIT :batch_max;

-- name: move_endpoint(id, sources, destination, status_message, now)^
-- The one guarded transition of an endpoint; no row when it is in none of the sources.
UPDATE endpoints SET state = :destination, status_message = :status_message,
    lease_token = CASE WHEN :destination IN ('PENDING', 'STOPPED', 'FAILED', 'PARKED') THEN NULL ELSE lease_token END,
    -- Without the time of an earlier lease, from which a stop before READY would count minutes.
    ready_at = CASE WHEN :destination = 'READY' THEN :now WHEN :destination = 'STARTING' THEN NULL ELSE ready_at END,
    period_minutes = CASE WHEN :destination = 'READY' THEN 0 ELSE period_minutes END,
    stopped_at = CASE WHEN :destination IN ('STOPPED', 'FAILED') THEN :now ELSE stopped_at END
WHERE id = :id AND deleted_at IS NULL AND state = ANY(:sources::text[])
RETURNING id, project_id, organization_id, endpoint_id, model, hardware_type, gpu_count, state, status_message,
    lease_token, device_indices, ready_at, stopped_at, created_at, billed_minutes, period_minutes;

-- name: set_allocation(id, lease_token, device_indices, hardware_type)!
-- Notes the devices that the scheduler gave, in the transaction of the transition.
UPDATE endpoints SET lease_token = :lease_token, device_indices = :device_indices, hardware_type = :hardware_type
WHERE id = :id;

-- name: set_endpoint_status(id, status_message)!
-- Says in words why an endpoint waits.
UPDATE endpoints SET status_message = :status_message WHERE id = :id AND status_message <> :status_message;

-- name: bill_minutes(id, lease_token, seen_minutes, minutes)!
-- Counts started minutes, guarded by the lease and by what was counted before.
UPDATE endpoints SET billed_minutes = billed_minutes + :minutes, period_minutes = period_minutes + :minutes
WHERE id = :id AND lease_token = :lease_token AND period_minutes = :seen_minutes AND state IN ('READY', 'STOPPING');

-- name: delete_endpoint(project_id, id, now)!
-- Deletes an endpoint that holds no devices.
UPDATE endpoints SET deleted_at = :now
WHERE project_id = :project_id AND id = :id AND deleted_at IS NULL AND state IN ('STOPPED', 'FAILED', 'PARKED');

-- name: save_credit_word(organization_id, state, revision, now)!
-- Stores what billing said of an organization's credit, unless something later is known.
INSERT INTO credit_states (organization_id, state, revision, heard_at)
VALUES (:organization_id, :state, :revision, :now)
ON CONFLICT (organization_id) DO UPDATE
SET state = excluded.state, revision = excluded.revision, heard_at = excluded.heard_at
WHERE credit_states.revision < excluded.revision;

-- name: save_cap_word(project_id, api_key_id, capped, until_time, cap_nanos_usd, revision, now)!
-- Stores what billing said of a cap, unless something later is known.
INSERT INTO spend_caps (project_id, api_key_id, capped, until_time, cap_nanos_usd, revision, heard_at)
VALUES (:project_id, :api_key_id, :capped, :until_time, :cap_nanos_usd, :revision, :now)
ON CONFLICT (project_id, api_key_id) DO UPDATE
SET capped = excluded.capped, until_time = excluded.until_time, cap_nanos_usd = excluded.cap_nanos_usd,
    revision = excluded.revision, heard_at = excluded.heard_at
WHERE spend_caps.revision < excluded.revision;

-- name: list_credit_words(since)
-- What was heard of credit since a moment.
SELECT organization_id, state, revision FROM credit_states WHERE heard_at >= :since;

-- name: list_cap_words(since)
-- What was heard of caps since a moment.
SELECT project_id, api_key_id, capped, until_time, cap_nanos_usd, revision FROM spend_caps WHERE heard_at >= :since;
