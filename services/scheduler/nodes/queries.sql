-- name: lock_node(node)^
-- A node, locked against placements and other registrations.
SELECT incarnation, state FROM nodes WHERE node = :node FOR UPDATE;

-- name: count_other_nodes(node)$
-- How many nodes are there beside this one.
SELECT count(*) FROM nodes WHERE state = 'READY' AND node <> :node;

-- name: upsert_node(node, incarnation, address, agent_version, preparation_version)!
-- Registers a node, or its new incarnation.
INSERT INTO nodes (node, incarnation, address, agent_version, preparation_version, state, registered_at, seen_at)
VALUES (:node, :incarnation, :address, :agent_version, :preparation_version, 'READY', now(), now())
ON CONFLICT (node) DO UPDATE
SET
    incarnation = excluded.incarnation,
    address = excluded.address,
    agent_version = excluded.agent_version,
    preparation_version = excluded.preparation_version,
    state = excluded.state,
    registered_at = excluded.registered_at,
    seen_at = excluded.seen_at,
    heartbeat_stream = NULL;

-- name: forget_devices(node)!
-- Marks all devices of a node as absent; the registration then names those that are there.
UPDATE devices SET present = false WHERE node = :node;

-- name: upsert_devices(node, indices, hardware_types, memory_bytes, uuids, set_aside_reasons)!
-- Records the devices that a node has.
INSERT INTO devices (node, device_index, hardware_type, memory_bytes, uuid, present, set_aside_reason)
SELECT
    :node::text, device.device_index, device.hardware_type, device.memory_bytes, device.uuid, true,
    device.set_aside_reason
FROM unnest(
    :indices::integer[], :hardware_types::text[], :memory_bytes::bigint[], :uuids::text[], :set_aside_reasons::text[]
) AS device (device_index, hardware_type, memory_bytes, uuid, set_aside_reason)
ON CONFLICT (node, device_index) DO UPDATE
SET
    hardware_type = excluded.hardware_type,
    memory_bytes = excluded.memory_bytes,
    uuid = excluded.uuid,
    set_aside_reason = excluded.set_aside_reason,
    present = true;

-- name: see_node(node, incarnation, stream)^
-- Records a sign of life of a registered incarnation and says whether the node counted as lost, and then listens again.
UPDATE nodes
SET
    seen_at = now(), state = 'READY',
    heartbeat_stream = CASE WHEN state = 'LOST' THEN :stream::uuid ELSE heartbeat_stream END
WHERE node = :node AND incarnation = :incarnation
RETURNING old.state AS from_state;

-- name: open_heartbeat(node, incarnation, stream)!
-- Records that an incarnation listens, on its newest stream.
UPDATE nodes SET heartbeat_stream = :stream WHERE node = :node AND incarnation = :incarnation;

-- name: close_heartbeat(node, stream)!
-- Records that nobody listens, unless a newer stream was opened.
UPDATE nodes SET heartbeat_stream = NULL WHERE node = :node AND heartbeat_stream = :stream;

-- name: lose_nodes(at, silence_s_max)
-- Declares the nodes lost that were silent for too long: at this time of the database, and by the clock as it is now.
UPDATE nodes
SET state = 'LOST', heartbeat_stream = NULL
WHERE
    state = 'READY'
    AND seen_at < least(:at::timestamptz, clock_timestamp()) - make_interval(secs => :silence_s_max)
RETURNING node, incarnation;

-- name: quarantine_nodes(window_s, jobs_min, share_min, duration_s)
-- Puts nodes into quarantine on which attempts at several jobs failed, and most that ended, while others do well.
WITH failing AS (
    SELECT
        attempts.node, count(*) AS ended, count(*) FILTER (WHERE attempts.blames_node) AS failed,
        count(DISTINCT attempts.job_id) FILTER (WHERE attempts.blames_node) AS jobs
    FROM attempts
    JOIN nodes AS own ON own.node = attempts.node
    WHERE
        attempts.end_time > now() - make_interval(secs => :window_s)
        AND attempts.end_time > coalesce(own.quarantined_until, '-infinity')
    GROUP BY attempts.node
    HAVING
        count(DISTINCT attempts.job_id) FILTER (WHERE attempts.blames_node) >= :jobs_min
        AND count(*) FILTER (WHERE attempts.blames_node) >= :share_min::double precision * count(*)
)
UPDATE nodes
SET
    quarantined_until = now() + make_interval(secs => :duration_s),
    quarantine_reason = failing.failed || ' of ' || failing.ended || ' attempts failed on it, of ' || failing.jobs
        || ' jobs, within ' || round(:window_s) || ' s'
FROM failing
WHERE
    nodes.node = failing.node
    AND coalesce(nodes.quarantined_until <= now(), true)
    -- When all fail, the fault lies elsewhere.
    AND EXISTS (
        SELECT
        FROM nodes AS other
        WHERE
            other.state = 'READY'
            AND coalesce(other.quarantined_until <= now(), true)
            AND other.node NOT IN (SELECT failing.node FROM failing)
    )
RETURNING nodes.node, nodes.quarantine_reason;

-- name: prune_nodes(retention_s, batch_max)!
-- Forgets a bounded batch of nodes, with their devices, that are lost for long and hold nothing.
WITH gone AS (
    SELECT node
    FROM nodes
    WHERE
        state = 'LOST'
        AND seen_at < now() - make_interval(secs => :retention_s)
        AND NOT EXISTS (
            SELECT FROM allocations WHERE allocations.node = nodes.node AND allocations.released_at IS NULL
        )
    LIMIT :batch_max
    FOR UPDATE SKIP LOCKED
),

freed AS (
    DELETE FROM devices USING gone WHERE devices.node = gone.node
)

DELETE FROM nodes USING gone WHERE nodes.node = gone.node;

-- name: list_analyzers(page_size)
-- Addresses of the nodes that are there, the most recently seen first.
SELECT address FROM nodes WHERE state = 'READY' ORDER BY seen_at DESC, node LIMIT :page_size;

-- name: get_preparation_version()$
-- The code that would count a dataset now: of the node to be asked first, or of the one seen last when none is there.
SELECT preparation_version FROM nodes ORDER BY state = 'READY' DESC, seen_at DESC, node LIMIT 1;

-- name: list_assignments(node, incarnation)
-- All that an incarnation of a node shall do, with the newest checkpoint of each job.
SELECT
    allocations.lease_token, jobs.project_id, jobs.job_id, jobs.attempt_count AS attempt, allocations.expires_at,
    jobs.lease_token AS attempt_token, nodes.address, leading_node.address AS leading_address,
    (
        SELECT count(*) + 1
        FROM allocations AS following
        WHERE following.leader_token = jobs.lease_token AND following.released_at IS NULL
    ) AS node_count,
    jobs.state = 'CANCELLING' AS cancelled, jobs.spec, jobs.base_revision, jobs.base_artifact, jobs.training_artifact,
    jobs.validation_artifact, jobs.counts, jobs.start_weights,
    array(
        SELECT device_index
        FROM allocation_devices
        WHERE allocation_devices.lease_token = allocations.lease_token
        ORDER BY device_index
    ) AS device_indices,
    resume.step AS resume_step, resume.artifact AS resume_artifact, resume.manifest_sha256 AS resume_manifest_sha256
FROM allocations
JOIN jobs ON jobs.lease_token = coalesce(allocations.leader_token, allocations.lease_token)
JOIN nodes ON nodes.node = allocations.node
JOIN allocations AS leader ON leader.lease_token = jobs.lease_token
JOIN nodes AS leading_node ON leading_node.node = leader.node
LEFT JOIN LATERAL (
    SELECT checkpoints.step, checkpoints.artifact, checkpoints.manifest_sha256
    FROM checkpoints
    WHERE checkpoints.job_id = jobs.job_id AND checkpoints.obsolete_at IS NULL
    ORDER BY checkpoints.step DESC
    LIMIT 1
) AS resume ON true
WHERE
    allocations.node = :node
    AND allocations.incarnation = :incarnation
    AND allocations.kind = 'TRAINING'
    AND allocations.released_at IS NULL
ORDER BY allocations.lease_token;
