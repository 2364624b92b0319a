-- name: renew_holds(resources, until)
-- Puts off the end of holds that are held, in the order of their names so that no two renewals wait for each other.
WITH alive AS (
    SELECT resource
    FROM holds
    WHERE resource = ANY(:resources::text[]) AND state = 'held'
    ORDER BY resource
    FOR NO KEY UPDATE
)
UPDATE holds
SET expire_time = greatest(holds.expire_time, :until::timestamptz)
FROM alive
WHERE holds.resource = alive.resource
RETURNING holds.resource;

-- name: list_expired_holds(now, row_max)
-- Lists jobs whose hold nobody renewed in time.
SELECT resource
FROM holds
WHERE state = 'held' AND expire_time <= :now
ORDER BY expire_time, resource
LIMIT :row_max;

-- name: lock_expired_hold(resource, now)$
-- Keeps a renewal away from a hold that is over; nothing when one came before.
SELECT resource
FROM holds
WHERE resource = :resource AND state = 'held' AND expire_time <= :now
FOR NO KEY UPDATE;
