-- name: get_time()$
-- The time of the database, by which leases are written and judged; the same within one transaction.
SELECT now();

-- name: list_device_groups(memory_s, nodes_max)
-- The devices by node and type with those that may be given out; nodes that are away for long do not count.
SELECT
    devices.node,
    devices.hardware_type,
    min(devices.memory_bytes) AS memory_bytes,
    array_agg(devices.device_index ORDER BY devices.device_index) AS indices,
    coalesce(
        array_agg(devices.device_index ORDER BY devices.device_index) FILTER (
            WHERE owned.lease_token IS NULL AND devices.set_aside_reason = ''
        ),
        '{}'
    ) AS free,
    nodes.state = 'READY' AND nodes.heartbeat_stream IS NOT NULL AND NOT quarantine.lasts AS ready,
    CASE WHEN quarantine.lasts THEN nodes.quarantine_reason ELSE '' END AS quarantine_reason,
    nodes.incarnation,
    nodes.node_count
FROM devices
JOIN (
    SELECT
        node, incarnation, state, heartbeat_stream, quarantined_until, quarantine_reason,
        count(*) OVER () AS node_count
    FROM nodes
    WHERE seen_at >= now() - make_interval(secs => :memory_s)
    ORDER BY state = 'READY' DESC, node
    LIMIT :nodes_max
) AS nodes ON nodes.node = devices.node
CROSS JOIN LATERAL (SELECT coalesce(nodes.quarantined_until > now(), false) AS lasts) AS quarantine
LEFT JOIN allocation_devices AS owned
    ON owned.node = devices.node AND owned.device_index = devices.device_index AND owned.released_at IS NULL
WHERE devices.present
GROUP BY
    devices.node, devices.hardware_type, nodes.state, nodes.heartbeat_stream, nodes.incarnation,
    nodes.quarantine_reason, nodes.node_count, quarantine.lasts
ORDER BY devices.node, devices.hardware_type;

-- name: guard_node(node, incarnation)$
-- Keeps a ready incarnation as it is until the end of the transaction; nothing when it is another one by now.
SELECT node
FROM nodes
WHERE node = :node AND incarnation = :incarnation AND state = 'READY' AND heartbeat_stream IS NOT NULL
FOR SHARE;

-- name: next_lease_token()$
-- A token that is larger than all before it.
SELECT nextval('lease_tokens');

-- name: get_lease_node(lease_token)$
-- The node that a lease was given to, ended or not.
SELECT node FROM allocations WHERE lease_token = :lease_token;

-- name: insert_allocation(lease_token, owner, kind, node, incarnation, hardware_type, now, duration_s, leader_token)!
-- Records whose the devices are.
INSERT INTO allocations (
    lease_token, owner, kind, node, incarnation, hardware_type, created_at, expires_at, leader_token
)
VALUES (
    :lease_token, :owner, :kind, :node, :incarnation, :hardware_type, :now,
    now() + make_interval(secs => :duration_s), :leader_token
);

-- name: insert_allocation_devices(lease_token, node, indices)!
-- Takes the devices; the unique index refuses one that has an owner.
INSERT INTO allocation_devices (lease_token, node, device_index)
SELECT :lease_token::bigint, :node::text, device.device_index
FROM unnest(:indices::integer[]) AS device (device_index)
ORDER BY device.device_index;

-- name: get_allocation(owner)^
-- The live allocation of an owner.
SELECT
    allocations.lease_token, allocations.owner, allocations.kind, allocations.node, allocations.hardware_type,
    allocations.expires_at,
    array(
        SELECT device_index
        FROM allocation_devices
        WHERE allocation_devices.lease_token = allocations.lease_token
        ORDER BY device_index
    ) AS device_indices
FROM allocations
WHERE allocations.owner = :owner AND allocations.released_at IS NULL;

-- name: renew_allocation(owner, lease_token, duration_s)!
-- Renews a serving allocation that is still its owner's.
UPDATE allocations
SET expires_at = now() + make_interval(secs => :duration_s)
WHERE lease_token = :lease_token AND owner = :owner AND kind = 'SERVING' AND released_at IS NULL;

-- name: renew_leases(node, incarnation, lease_tokens, duration_s, progress_s_max)
-- Renews in one statement every training lease that this incarnation works on, unless its attempt stands still.
UPDATE allocations
SET expires_at = now() + make_interval(secs => :duration_s)
WHERE
    node = :node
    AND incarnation = :incarnation
    AND kind = 'TRAINING'
    AND released_at IS NULL
    AND lease_token = ANY(:lease_tokens::bigint[])
    AND NOT EXISTS (
        SELECT
        FROM jobs
        JOIN attempts ON attempts.lease_token = jobs.lease_token
        WHERE
            jobs.lease_token = coalesce(allocations.leader_token, allocations.lease_token)
            AND greatest(
                attempts.create_time, CASE WHEN jobs.progress_token = jobs.lease_token THEN jobs.progress_time END
            ) < now() - make_interval(secs => :progress_s_max)
    )
RETURNING lease_token;

-- name: expire_node_leases(node, at)!
-- Ends the time of every training lease of a node; the sweep then ends the leases themselves.
UPDATE allocations
SET expires_at = least(:at::timestamptz, clock_timestamp())
WHERE
    node = :node AND kind = 'TRAINING' AND released_at IS NULL AND expires_at > least(:at, clock_timestamp());

-- name: expire_lease(lease_token, at)!
-- Ends the time of one lease; whoever locked its job then ends the lease itself.
UPDATE allocations
SET expires_at = least(:at::timestamptz, clock_timestamp())
WHERE lease_token = :lease_token AND released_at IS NULL AND expires_at > least(:at, clock_timestamp());

-- name: release_allocation(lease_token, owner, kind, now)!
-- Ends an allocation of this owner and kind.
UPDATE allocations
SET released_at = :now
WHERE lease_token = :lease_token AND owner = :owner AND kind = :kind AND released_at IS NULL;

-- name: release_expired(lease_token, at, now)!
-- Ends an allocation whose time was over at this time of the database, and still is; one that was renewed stays.
UPDATE allocations
SET released_at = :now
WHERE lease_token = :lease_token AND released_at IS NULL AND expires_at <= least(:at::timestamptz, clock_timestamp());

-- name: release_followers(leader_token, now)
-- Ends the allocations of all nodes that follow this lease.
UPDATE allocations
SET released_at = :now
WHERE leader_token = :leader_token AND released_at IS NULL
RETURNING lease_token, node;

-- name: release_devices(lease_token, now)!
-- Gives the devices of an ended allocation back.
UPDATE allocation_devices SET released_at = :now WHERE lease_token = :lease_token AND released_at IS NULL;

-- name: prune_served(retention_s, batch_max)!
-- Deletes a bounded batch of the allocations of endpoints that ended long ago.
WITH gone AS (
    SELECT lease_token
    FROM allocations
    WHERE kind = 'SERVING' AND released_at < now() - make_interval(secs => :retention_s)
    ORDER BY released_at
    LIMIT :batch_max
    FOR UPDATE SKIP LOCKED
),

freed AS (
    DELETE FROM allocation_devices USING gone WHERE allocation_devices.lease_token = gone.lease_token
)

DELETE FROM allocations USING gone WHERE allocations.lease_token = gone.lease_token;
