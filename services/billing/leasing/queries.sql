-- name: renew_holder(holder, lifetime_s)!
-- Puts off the end of a holder's leases, unless it is over: then others may have what they held.
UPDATE lease_holders SET expire_time = now() + make_interval(secs => :lifetime_s)
WHERE holder = :holder AND expire_time > now();

-- name: insert_holder(holder, lifetime_s)!
-- Remembers a holder that has no leases yet.
INSERT INTO lease_holders (holder, expire_time) VALUES (:holder, now() + make_interval(secs => :lifetime_s))
ON CONFLICT (holder) DO NOTHING;

-- name: renew_all_holders(lifetime_s, quiet_s)!
-- Gives every holder a whole lifetime from now, if none renewed lately: then billing was away, and nobody could.
UPDATE lease_holders
SET expire_time = greatest(lease_holders.expire_time, now() + make_interval(secs => :lifetime_s::float8))
FROM (
    SELECT holder
    FROM lease_holders
    WHERE NOT EXISTS (
        SELECT FROM lease_holders AS renewed
        WHERE renewed.expire_time > now() + make_interval(secs => :lifetime_s::float8 - :quiet_s::float8)
    )
    ORDER BY holder
    FOR NO KEY UPDATE
) AS found
WHERE lease_holders.holder = found.holder;

-- name: delete_holder(holder)!
-- Forgets a holder that stops.
DELETE FROM lease_holders WHERE holder = :holder;

-- name: delete_expired_holders()
-- Forgets holders that did not renew in time; their leases take nothing away any more.
DELETE FROM lease_holders WHERE expire_time <= now() RETURNING holder;

-- name: is_alive(holder)$
-- Says whether a holder's leases count, and keeps it from being forgotten until the end of the transaction.
SELECT true FROM lease_holders WHERE holder = :holder AND expire_time > now() FOR KEY SHARE;

-- name: delete_orphans(late_s)!
-- Forgets leases of holders that are gone, and closed ones whose last usage did not come in time.
DELETE FROM credit_leases
USING (
    SELECT lease_id
    FROM credit_leases AS over
    WHERE
        over.closed_time <= now() - make_interval(secs => :late_s)
        OR (
            over.closed_time IS NULL
            AND NOT EXISTS (SELECT FROM lease_holders WHERE lease_holders.holder = over.holder)
        )
    ORDER BY lease_id
    FOR UPDATE SKIP LOCKED
) AS orphans
WHERE credit_leases.lease_id = orphans.lease_id;

-- name: lock_lease(lease_id)^
-- Reads a lease and keeps its holder's other requests waiting.
SELECT
    lease_id, holder, organization_id, project_id, api_key_id, granted_nanos_usd, used_nanos_usd, revision, closed_time
FROM credit_leases
WHERE lease_id = :lease_id
FOR NO KEY UPDATE;

-- name: save_lease(lease_id, holder, organization_id, project_id, api_key_id, granted_nanos_usd, revision)!
-- Writes a lease that was granted or enlarged.
INSERT INTO credit_leases (
    lease_id, holder, organization_id, project_id, api_key_id, granted_nanos_usd, revision
) VALUES (
    :lease_id, :holder, :organization_id, :project_id, :api_key_id, :granted_nanos_usd, :revision
)
ON CONFLICT (lease_id) DO UPDATE SET granted_nanos_usd = excluded.granted_nanos_usd, revision = excluded.revision;

-- name: get_leased(organization_id, project_id, api_key_id, late_s)^
-- Sums what the leases of an organization, of a project and of one of its keys take away from others.
SELECT
    coalesce(sum(taken.nanos_usd), 0)::bigint AS organization_nanos_usd,
    coalesce(sum(taken.nanos_usd) FILTER (WHERE taken.project_id = :project_id), 0)::bigint AS project_nanos_usd,
    coalesce(
        sum(taken.nanos_usd) FILTER (WHERE taken.project_id = :project_id AND taken.api_key_id = :api_key_id), 0
    )::bigint AS api_key_nanos_usd
FROM (
    SELECT project_id, api_key_id, greatest(granted_nanos_usd - used_nanos_usd, 0) AS nanos_usd
    FROM credit_leases
    WHERE
        organization_id = :organization_id
        AND (
            closed_time > now() - make_interval(secs => :late_s)
            OR (
                closed_time IS NULL
                AND EXISTS (
                    SELECT FROM lease_holders
                    WHERE lease_holders.holder = credit_leases.holder AND lease_holders.expire_time > now()
                )
            )
        )
) AS taken;

-- name: return_credit(holder, lease_ids, revisions, granted, closed)!
-- Lowers a holder's leases to what they come to now, in sorted order so that no two transactions wait for each other.
WITH returned AS (
    SELECT
        credit_leases.lease_id, given.revision, given.granted_nanos_usd,
        CASE WHEN given.closed THEN now() END AS closed_time
    FROM unnest(:lease_ids::text[], :revisions::bigint[], :granted::bigint[], :closed::boolean[]) AS given (
        lease_id, revision, granted_nanos_usd, closed
    )
    JOIN credit_leases ON
        credit_leases.lease_id = given.lease_id
        AND credit_leases.holder = :holder
        AND credit_leases.revision < given.revision
        AND credit_leases.closed_time IS NULL
    ORDER BY credit_leases.lease_id
    FOR NO KEY UPDATE OF credit_leases
)
UPDATE credit_leases
SET
    granted_nanos_usd = least(credit_leases.granted_nanos_usd, returned.granted_nanos_usd),
    revision = returned.revision,
    recalled = false,
    closed_time = returned.closed_time
FROM returned
WHERE credit_leases.lease_id = returned.lease_id;

-- name: draw_credit(lease_ids, organization_ids, amounts)
-- Lowers leases by usage that is booked; lists those for which nothing more is expected.
WITH drawn AS (
    SELECT credit_leases.lease_id, booked.amount_nanos_usd
    FROM unnest(:lease_ids::text[], :organization_ids::text[], :amounts::bigint[]) AS booked (
        lease_id, organization_id, amount_nanos_usd
    )
    JOIN credit_leases ON
        credit_leases.lease_id = booked.lease_id AND credit_leases.organization_id = booked.organization_id
    ORDER BY credit_leases.lease_id
    FOR NO KEY UPDATE OF credit_leases
),

lowered AS (
    UPDATE credit_leases
    SET used_nanos_usd = credit_leases.used_nanos_usd + drawn.amount_nanos_usd
    FROM drawn
    WHERE credit_leases.lease_id = drawn.lease_id
    RETURNING
        credit_leases.lease_id, credit_leases.closed_time, credit_leases.granted_nanos_usd, credit_leases.used_nanos_usd
)

SELECT lease_id FROM lowered WHERE closed_time IS NOT NULL AND used_nanos_usd >= granted_nanos_usd;

-- name: delete_drained(lease_ids)!
-- Forgets closed leases of which everything is booked.
DELETE FROM credit_leases
USING (
    SELECT lease_id
    FROM credit_leases AS closed
    WHERE
        closed.lease_id = ANY(:lease_ids::text[])
        AND closed.closed_time IS NOT NULL
        AND closed.used_nanos_usd >= closed.granted_nanos_usd
    ORDER BY lease_id
    FOR UPDATE
) AS drained
WHERE credit_leases.lease_id = drained.lease_id;

-- name: recall(organization_id, project_id, lease_id)!
-- Asks the holders of the other leases of an organization, or of one project, to give back what they do not use.
UPDATE credit_leases
SET recalled = true
FROM (
    SELECT lease_id
    FROM credit_leases AS open
    WHERE
        open.organization_id = :organization_id
        AND (:project_id = '' OR open.project_id = :project_id)
        AND open.lease_id <> :lease_id
        AND open.closed_time IS NULL
        AND open.granted_nanos_usd > open.used_nanos_usd
    ORDER BY lease_id
    FOR NO KEY UPDATE
) AS found
WHERE credit_leases.lease_id = found.lease_id;

-- name: get_recallable(organization_id, project_id, lease_id)$
-- Sums what open leases of an organization, or of one project, but this one take away.
SELECT coalesce(sum(granted_nanos_usd - used_nanos_usd), 0)::bigint
FROM credit_leases
JOIN lease_holders ON lease_holders.holder = credit_leases.holder AND lease_holders.expire_time > now()
WHERE
    credit_leases.organization_id = :organization_id
    AND (:project_id = '' OR credit_leases.project_id = :project_id)
    AND credit_leases.lease_id <> :lease_id
    AND credit_leases.closed_time IS NULL
    AND credit_leases.granted_nanos_usd > credit_leases.used_nanos_usd;

-- name: has_recalled(organization_id, lease_id)$
-- Says whether a living holder has not answered a recall.
SELECT EXISTS (
    SELECT FROM credit_leases
    JOIN lease_holders ON lease_holders.holder = credit_leases.holder AND lease_holders.expire_time > now()
    WHERE
        credit_leases.organization_id = :organization_id
        AND credit_leases.lease_id <> :lease_id
        AND credit_leases.recalled
);

-- name: list_recalled(holder, row_max)
-- Lists leases of a holder that somebody else needs.
SELECT lease_id FROM credit_leases WHERE holder = :holder AND recalled ORDER BY lease_id LIMIT :row_max;
