-- name: insert_usage(work_keys, numbers, quantities, amounts, usage_times, kinds, organization_ids, project_ids, resources, models, unit_prices, price_book_versions, billing_months, api_key_ids, transaction_ids, start_steps, end_steps)!
-- Books usage records; a unique violation says that one of them is booked already.
INSERT INTO usage_records (
    work_key, kind, organization_id, project_id, resource, model, quantity, unit_price_nanos_usd, amount_nanos_usd,
    price_book_version, start_step, end_step, usage_time, api_key_id, billing_month, transaction_id
)
SELECT
    u.work_key, t.kind, t.organization_id, t.project_id, t.resource, t.model, u.quantity, t.unit_price, u.amount,
    t.price_book_version, t.start_step, t.end_step, u.usage_time, t.api_key_id, t.billing_month, t.transaction_id
FROM unnest(
    :work_keys::text[], :numbers::int[], :quantities::bigint[], :amounts::bigint[], :usage_times::timestamptz[]
) AS u (work_key, number, quantity, amount, usage_time)
JOIN unnest(
    :kinds::text[], :organization_ids::text[], :project_ids::text[], :resources::text[], :models::text[],
    :unit_prices::bigint[], :price_book_versions::text[], :billing_months::date[], :api_key_ids::text[],
    :transaction_ids::uuid[], :start_steps::bigint[], :end_steps::bigint[]
) WITH ORDINALITY AS t (
    kind, organization_id, project_id, resource, model, unit_price, price_book_version, billing_month, api_key_id,
    transaction_id, start_step, end_step, number
) ON t.number = u.number;

-- name: list_usage_by_key(project_ids, work_keys)
-- Reads what is booked for these pieces of work.
SELECT
    u.work_key, u.kind, u.organization_id, u.project_id, u.resource, u.model, u.quantity, u.unit_price_nanos_usd,
    u.amount_nanos_usd, u.price_book_version, u.start_step, u.end_step, u.usage_time, u.billing_month, u.api_key_id,
    u.transaction_id
FROM unnest(:project_ids::text[], :work_keys::text[]) AS wanted (project_id, work_key)
JOIN usage_records AS u ON u.project_id = wanted.project_id AND u.work_key = wanted.work_key;

-- name: get_overlapping_work_key(resource, start_step, end_step)$
-- Finds a booked range of training steps that shares a step with this one. Booked ranges share none, so the last one
-- that begins before the end of this one also ends last.
SELECT before.work_key
FROM (
    SELECT work_key, end_step
    FROM usage_records
    WHERE resource = :resource AND kind = 'training_tokens' AND start_step < :end_step
    ORDER BY start_step DESC
    LIMIT 1
) AS before
WHERE before.end_step > :start_step;

-- name: get_job_totals(resource)^
-- Sums what is booked for a job.
SELECT
    coalesce(sum(record_count), 0)::bigint AS record_count,
    coalesce(sum(quantity) FILTER (WHERE kind = 'training_tokens'), 0)::bigint AS training_tokens,
    coalesce(sum(quantity) FILTER (WHERE kind = 'evaluation_tokens'), 0)::bigint AS evaluation_tokens,
    coalesce(sum(amount_nanos_usd), 0)::bigint AS amount_nanos_usd
FROM usage_sums
WHERE resource = :resource AND kind IN ('training_tokens', 'evaluation_tokens');
