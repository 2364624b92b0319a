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

-- name: prune_idempotency(retention_s, batch_max)!
-- Deletes a bounded batch of records that are too old for anybody to repeat their request.
DELETE FROM idempotency
WHERE (project_id, method, request_id) IN (
    SELECT project_id, method, request_id
    FROM idempotency
    WHERE create_time < now() - make_interval(secs => :retention_s)
    ORDER BY create_time
    LIMIT :batch_max
    FOR UPDATE SKIP LOCKED
);

-- name: prune_audit_log(retention_s, batch_max)!
-- Deletes a bounded batch of old entries.
DELETE FROM audit_log
WHERE entry_id IN (
    SELECT entry_id
    FROM audit_log
    WHERE create_time < now() - make_interval(secs => :retention_s)
    ORDER BY create_time
    LIMIT :batch_max
    FOR UPDATE SKIP LOCKED
);

-- name: add_audit_entry(create_time, organization_id, project_id, actor, roles, action, resource, trace_id, outcome)$
-- Records who does what, and what came of it if that is known.
INSERT INTO audit_log (create_time, organization_id, project_id, actor, roles, action, resource, trace_id, outcome)
VALUES (:create_time, :organization_id, :project_id, :actor, :roles, :action, :resource, :trace_id, :outcome)
RETURNING entry_id;

-- name: end_audit_entry(entry_id, resource, outcome)!
-- Notes what came of it, once.
UPDATE audit_log SET resource = :resource, outcome = :outcome
WHERE entry_id = :entry_id AND outcome = '';
