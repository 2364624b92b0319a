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
    lease_token, device_indices, ready_at, stopped_at, created_at, billed_minutes, paid_until,
    owner, owner_address, claim_until, lease_after
FROM endpoints WHERE project_id = :project_id AND id = :id AND deleted_at IS NULL;

-- name: get_endpoint_by_id(project_id, endpoint_id)^
-- A live endpoint of a project by the id that chat calls use.
SELECT id, project_id, organization_id, endpoint_id, model, hardware_type, gpu_count, state, status_message,
    lease_token, device_indices, ready_at, stopped_at, created_at, billed_minutes, paid_until,
    owner, owner_address, claim_until, lease_after
FROM endpoints WHERE project_id = :project_id AND endpoint_id = :endpoint_id AND deleted_at IS NULL;

-- name: resolve_name(project_id, name)^
-- What a project means by a name: its endpoint if any, and the base or tuned model with its base; always one row.
SELECT endpoint.id, endpoint.project_id, endpoint.organization_id,
    endpoint.endpoint_id, endpoint.model, endpoint.hardware_type, endpoint.gpu_count, endpoint.state,
    endpoint.status_message, endpoint.lease_token, endpoint.device_indices, endpoint.ready_at, endpoint.stopped_at,
    endpoint.created_at, endpoint.billed_minutes, endpoint.paid_until, endpoint.owner, endpoint.owner_address,
    endpoint.claim_until, endpoint.lease_after, coalesce(endpoint.claim_until > now(), false) AS claimed,
    base.model_id AS base_model, base.revision AS base_revision, base.artifact_key AS base_artifact_key,
    base.files AS base_files, base.tool_parser, base.reasoning_parser,
    tuned.kind AS tuned_kind, tuned.base_model AS tuned_base_model, tuned.revision AS tuned_revision,
    tuned.artifact_key AS tuned_artifact_key, tuned.files AS tuned_files, tuned.adapter_rank AS tuned_adapter_rank
FROM (SELECT :project_id::text AS project_id, :name::text AS name) AS asked
LEFT JOIN endpoints AS endpoint ON endpoint.project_id = asked.project_id AND endpoint.endpoint_id = asked.name
    AND endpoint.deleted_at IS NULL
LEFT JOIN base_models AS own ON own.model_id = coalesce(endpoint.model, asked.name) AND own.current
LEFT JOIN models AS tuned ON own.model_id IS NULL AND tuned.project_id = asked.project_id
    AND tuned.model_id = coalesce(endpoint.model, asked.name) AND tuned.deleted_at IS NULL
LEFT JOIN base_models AS base ON base.model_id = coalesce(own.model_id, tuned.base_model)
    AND base.revision = coalesce(own.revision, tuned.base_revision);

-- name: list_endpoints(project_id, before_time, before_id, page_size)
-- Live endpoints of a project, newest first, before a given one.
SELECT id, project_id, organization_id, endpoint_id, model, hardware_type, gpu_count, state, status_message,
    lease_token, device_indices, ready_at, stopped_at, created_at, billed_minutes, paid_until,
    owner, owner_address, claim_until, lease_after
FROM endpoints
WHERE project_id = :project_id AND deleted_at IS NULL
    AND (created_at, id) < (:before_time::timestamptz, :before_id::text)
ORDER BY created_at DESC, id DESC LIMIT :page_size;

-- name: list_moving_endpoints(owner, over_by, after_time, after_id, page_size)
-- Endpoints that this owner has to look after, oldest first, after a given one: its own, those that nobody holds, and
-- those whose claim was over by a time of the database, where one is given.
SELECT id, project_id, organization_id, endpoint_id, model, hardware_type, gpu_count, state, status_message,
    lease_token, device_indices, ready_at, stopped_at, created_at, billed_minutes, paid_until,
    owner, owner_address, claim_until, lease_after
FROM endpoints
WHERE state IN ('PENDING', 'STARTING', 'READY', 'STOPPING')
    AND (owner IN ('', :owner) OR claim_until <= :over_by::timestamptz)
    AND (created_at, id) > (:after_time::timestamptz, :after_id::text)
ORDER BY created_at, id LIMIT :page_size;

-- name: list_resumable_endpoints(now, after_time, after_id, page_size)
-- Parked endpoints whose organization has credit and whose project is not at its cap, oldest first, after a given one.
SELECT id, project_id, organization_id, endpoint_id, model, hardware_type, gpu_count, state, status_message,
    lease_token, device_indices, ready_at, stopped_at, created_at, billed_minutes, paid_until,
    owner, owner_address, claim_until, lease_after
FROM endpoints
WHERE state = 'PARKED' AND deleted_at IS NULL
    AND (created_at, id) > (:after_time::timestamptz, :after_id::text)
    AND NOT EXISTS (
        SELECT FROM credit_states
        WHERE credit_states.organization_id = endpoints.organization_id AND credit_states.state = 'EXHAUSTED'
    )
    AND NOT EXISTS (
        SELECT FROM spend_caps
        WHERE spend_caps.project_id = endpoints.project_id AND spend_caps.api_key_id = '' AND spend_caps.capped
            AND spend_caps.until_time > :now::timestamptz
    )
ORDER BY created_at, id LIMIT :page_size;

-- name: move_endpoint(id, sources, destination, status_message, lease_token, any_lease, over_by, now)^
-- The one guarded transition of an endpoint; no row when it is in none of the sources, not under this lease, or when its
-- claim was not over by the given time of the database.
UPDATE endpoints SET state = :destination, status_message = :status_message,
    lease_token = CASE WHEN leaves.devices THEN NULL ELSE lease_token END,
    lease_after = CASE WHEN leaves.devices THEN greatest(lease_after, lease_token) ELSE lease_after END,
    owner = CASE WHEN leaves.devices THEN '' ELSE owner END,
    owner_address = CASE WHEN leaves.devices THEN '' ELSE owner_address END,
    claim_until = CASE WHEN leaves.devices THEN NULL ELSE claim_until END,
    ready_at = CASE WHEN :destination = 'READY' THEN :now WHEN :destination = 'STARTING' THEN NULL ELSE ready_at END,
    stopped_at = CASE WHEN :destination IN ('STOPPED', 'FAILED') THEN :now ELSE stopped_at END
FROM (SELECT :destination::text IN ('PENDING', 'STOPPED', 'FAILED', 'PARKED') AS devices) AS leaves
WHERE id = :id AND deleted_at IS NULL AND state = ANY(:sources::text[])
    AND (:any_lease::boolean OR lease_token IS NOT DISTINCT FROM :lease_token::bigint)
    AND (:over_by::timestamptz IS NULL OR claim_until <= :over_by::timestamptz)
RETURNING id, project_id, organization_id, endpoint_id, model, hardware_type, gpu_count, state, status_message,
    lease_token, device_indices, ready_at, stopped_at, created_at, billed_minutes, paid_until,
    owner, owner_address, claim_until, lease_after;

-- name: claim_endpoint(id, lease_token, device_indices, hardware_type, owner, owner_address, duration_s)^
-- Makes an endpoint that waits the owner's, with the devices that the scheduler gave; no row when somebody else was
-- first, when it does not wait any more, or when the devices are those of a process that may still use them.
UPDATE endpoints SET lease_token = :lease_token, device_indices = :device_indices, hardware_type = :hardware_type,
    owner = :owner, owner_address = :owner_address, claim_until = now() + make_interval(secs => :duration_s)
WHERE id = :id AND deleted_at IS NULL AND state = 'PENDING' AND owner = '' AND lease_after < :lease_token
RETURNING id, project_id, organization_id, endpoint_id, model, hardware_type, gpu_count, state, status_message,
    lease_token, device_indices, ready_at, stopped_at, created_at, billed_minutes, paid_until,
    owner, owner_address, claim_until, lease_after;

-- name: renew_claims(owner, duration_s)$
-- Renews everything that an owner holds; the time of the database, by which claims are written and judged.
WITH renewed AS (
    UPDATE endpoints SET claim_until = now() + make_interval(secs => :duration_s) WHERE owner = :owner RETURNING id
)
SELECT now() FROM (SELECT count(*) FROM renewed) AS counted;

-- name: get_time()$
-- The time of the database.
SELECT now();

-- name: list_live_leases(ids)
-- The lease tokens of those of these endpoints whose claims last.
SELECT lease_token FROM endpoints WHERE id = ANY(:ids::text[]) AND claim_until > now();

-- name: list_owned_endpoints(owner)
-- What an owner holds.
SELECT id, project_id, organization_id, endpoint_id, model, hardware_type, gpu_count, state, status_message,
    lease_token, device_indices, ready_at, stopped_at, created_at, billed_minutes, paid_until,
    owner, owner_address, claim_until, lease_after
FROM endpoints WHERE owner = :owner AND owner <> '' ORDER BY created_at, id;

-- name: set_endpoint_status(id, status_message)!
-- Says in words why an endpoint waits for devices.
UPDATE endpoints SET status_message = :status_message
WHERE id = :id AND state = 'PENDING' AND owner = '' AND status_message <> :status_message;

-- name: bill_minutes(id, lease_token, seen_minutes, minutes, paid_until)!
-- Counts begun minutes, guarded by the lease and by what was counted before.
UPDATE endpoints SET billed_minutes = billed_minutes + :minutes, paid_until = :paid_until
WHERE id = :id AND lease_token = :lease_token AND billed_minutes = :seen_minutes AND state IN ('READY', 'STOPPING');

-- name: delete_endpoint(project_id, id, now)!
-- Deletes an endpoint that holds no devices.
UPDATE endpoints SET deleted_at = :now
WHERE project_id = :project_id AND id = :id AND deleted_at IS NULL AND state IN ('STOPPED', 'FAILED', 'PARKED');

-- name: prune_endpoints(retention_s, batch_max)!
-- Forgets a bounded batch of endpoints that were deleted long ago.
DELETE FROM endpoints WHERE id IN (
    SELECT id FROM endpoints WHERE deleted_at < now() - make_interval(secs => :retention_s)
    ORDER BY deleted_at LIMIT :batch_max FOR UPDATE SKIP LOCKED
);
