-- name: lock_job(resource)!
-- Makes everything that decides about one job's money take turns until the end of the transaction.
SELECT pg_advisory_xact_lock(hashtextextended(:resource, 0));

-- name: insert_hold(resource, id, organization_id, project_id, base_model, method, training_tokens, validation_tokens, epochs, evaluations, parameter_count, price_book_version, held_nanos_usd, hold_time, expire_time, api_key_id)!
-- Remembers a job's quote and hold.
INSERT INTO holds (
    resource, id, organization_id, project_id, state, base_model, method, training_tokens, validation_tokens, epochs,
    evaluations, parameter_count, price_book_version, held_nanos_usd, hold_time, expire_time, api_key_id
) VALUES (
    :resource, :id, :organization_id, :project_id, 'held', :base_model, :method, :training_tokens, :validation_tokens,
    :epochs, :evaluations, :parameter_count, :price_book_version, :held_nanos_usd, :hold_time, :expire_time, :api_key_id
);

-- name: get_hold(resource)^
-- Reads a job's hold.
SELECT
    resource, id, organization_id, project_id, state, base_model, method, training_tokens, validation_tokens, epochs,
    evaluations, parameter_count, price_book_version, held_nanos_usd, charged_nanos_usd, discrepancy, hold_time,
    expire_time, end_time, api_key_id
FROM holds
WHERE resource = :resource;

-- name: end_hold(resource, sources, state, charged_nanos_usd, minimum_applied, billed_tokens, adjustment_nanos_usd, billing_month, discrepancy, end_time)!
-- Ends a hold that is in one of the source states.
UPDATE holds
SET state = :state, charged_nanos_usd = :charged_nanos_usd, minimum_applied = :minimum_applied,
    billed_tokens = :billed_tokens, adjustment_nanos_usd = :adjustment_nanos_usd, billing_month = :billing_month,
    discrepancy = :discrepancy, end_time = :end_time
WHERE resource = :resource AND state = ANY(:sources::text[]);

-- name: adjust_hold(resource, amount_nanos_usd)!
-- Moves the difference between a settled job's charge and what its usage records are worth.
UPDATE holds SET adjustment_nanos_usd = adjustment_nanos_usd + :amount_nanos_usd
WHERE resource = :resource AND state = 'settled';

-- name: insert_job_ending(resource, organization_id, project_id, ending, usage_record_count, end_time)!
-- Remembers how a job ended.
INSERT INTO job_endings (resource, organization_id, project_id, ending, usage_record_count, end_time)
VALUES (:resource, :organization_id, :project_id, :ending, :usage_record_count, :end_time);

-- name: get_job_ending(resource)^
-- Reads how a job ended.
SELECT resource, organization_id, project_id, ending, usage_record_count, end_time
FROM job_endings
WHERE resource = :resource;

-- name: get_job_totals(resource)^
-- Sums what is booked for a job.
SELECT
    coalesce(sum(record_count), 0)::bigint AS record_count,
    coalesce(sum(quantity) FILTER (WHERE kind = 'training_tokens'), 0)::bigint AS training_tokens,
    coalesce(sum(quantity) FILTER (WHERE kind = 'evaluation_tokens'), 0)::bigint AS evaluation_tokens,
    coalesce(sum(amount_nanos_usd), 0)::bigint AS amount_nanos_usd
FROM usage_sums
WHERE resource = :resource AND kind IN ('training_tokens', 'evaluation_tokens');

-- name: get_expire_time(ttl_s)$
-- Says until when a hold lasts that is made or renewed in this transaction.
SELECT now() + make_interval(secs => :ttl_s);

-- name: renew_holds(resources, ttl_s)
-- Puts off the end of holds that are held, in the order of their names so that no two renewals wait for each other.
WITH alive AS (
    SELECT resource
    FROM holds
    WHERE resource = ANY(:resources::text[]) AND state = 'held'
    ORDER BY resource
    FOR NO KEY UPDATE
)
UPDATE holds
SET expire_time = greatest(holds.expire_time, now() + make_interval(secs => :ttl_s))
FROM alive
WHERE holds.resource = alive.resource
RETURNING holds.resource;

-- name: list_expired_holds(after, row_max)
-- Lists a page of jobs whose hold nobody renewed in time.
SELECT resource
FROM holds
WHERE state = 'held' AND expire_time <= now() AND resource > :after
ORDER BY resource
LIMIT :row_max;

-- name: count_expired_holds()^
-- Sums the holds that nobody renewed in time.
SELECT count(*) AS hold_count, coalesce(sum(held_nanos_usd), 0)::bigint AS held_nanos_usd
FROM holds
WHERE state = 'held' AND expire_time <= now();

-- name: lock_expired_hold(resource)$
-- Keeps a renewal away from a hold that is over; nothing when one came before.
SELECT resource
FROM holds
WHERE resource = :resource AND state = 'held' AND expire_time <= now()
FOR NO KEY UPDATE;
