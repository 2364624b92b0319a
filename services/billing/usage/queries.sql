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

-- name: list_newest_usage(project_id, start_time, before_time, before_key, resource, kinds, model, api_key_id, scan_max, row_max)
-- Looks at a bounded number of records backwards from a position; lists those that match, and the last one seen.
WITH seen AS (
    SELECT
        work_key, kind, organization_id, project_id, resource, model, quantity, unit_price_nanos_usd, amount_nanos_usd,
        price_book_version, start_step, end_step, usage_time, billing_month, api_key_id, transaction_id,
        (
            (:resource::text = '' OR resource = :resource::text)
            AND (:kinds::text[] = '{}' OR kind = ANY(:kinds::text[]))
            AND (:model::text = '' OR model = :model::text)
            AND (:api_key_id::text = '' OR api_key_id = :api_key_id::text)
        ) AS matches
    FROM usage_records
    WHERE
        project_id = :project_id
        AND usage_time >= :start_time
        AND (usage_time, work_key) < (:before_time::timestamptz, :before_key::text)
    ORDER BY usage_time DESC, work_key DESC
    LIMIT :scan_max
),

numbered AS (
    SELECT
        seen.*,
        count(*) FILTER (WHERE matches) OVER newest AS found,
        row_number() OVER newest AS place,
        count(*) OVER () AS seen_count
    FROM seen
    WINDOW newest AS (ORDER BY usage_time DESC, work_key DESC ROWS UNBOUNDED PRECEDING)
)

SELECT
    numbered.work_key, numbered.kind, numbered.organization_id, numbered.project_id, numbered.resource, numbered.model,
    numbered.quantity, numbered.unit_price_nanos_usd, numbered.amount_nanos_usd, numbered.price_book_version,
    numbered.start_step, numbered.end_step, numbered.usage_time,
    -- A job is billed whole, in the month of its settlement.
    coalesce(holds.billing_month, numbered.billing_month) AS billing_month,
    numbered.api_key_id, numbered.transaction_id, numbered.matches, numbered.seen_count
FROM numbered
LEFT JOIN holds
    ON
        numbered.kind IN ('training_tokens', 'evaluation_tokens')
        AND holds.resource = numbered.resource
        AND holds.charged_nanos_usd > 0
WHERE (numbered.matches AND numbered.found <= :row_max) OR numbered.place = numbered.seen_count
ORDER BY numbered.usage_time DESC, numbered.work_key DESC;

-- name: list_oldest_usage(project_id, end_time, after_time, after_key, resource, kinds, billing_month, scan_max)
-- Looks at a bounded number of records forwards from a position; lists those that match, and the last one seen.
WITH seen AS (
    SELECT
        work_key, kind, organization_id, project_id, resource, model, quantity, unit_price_nanos_usd, amount_nanos_usd,
        price_book_version, start_step, end_step, usage_time, billing_month, api_key_id, transaction_id,
        kind IN ('training_tokens', 'evaluation_tokens') AS of_job
    FROM usage_records
    WHERE
        project_id = :project_id
        AND usage_time < :end_time
        AND (usage_time, work_key) > (:after_time::timestamptz, :after_key::text)
    ORDER BY usage_time, work_key
    LIMIT :scan_max
),

numbered AS (
    SELECT
        seen.*,
        -- A job is billed whole, in the month of its settlement; until then it is on no invoice.
        holds.billing_month AS settled_month,
        (
            (:resource::text = '' OR seen.resource = :resource::text)
            AND (:kinds::text[] = '{}' OR seen.kind = ANY(:kinds::text[]))
            AND (
                :billing_month::date IS NULL
                OR coalesce(
                    CASE WHEN seen.of_job THEN holds.billing_month ELSE seen.billing_month END = :billing_month::date,
                    false
                )
            )
        ) AS matches,
        row_number() OVER (ORDER BY seen.usage_time, seen.work_key) AS place,
        count(*) OVER () AS seen_count
    FROM seen
    LEFT JOIN holds ON seen.of_job AND holds.resource = seen.resource AND holds.charged_nanos_usd > 0
)

SELECT
    work_key, kind, organization_id, project_id, resource, model, quantity, unit_price_nanos_usd, amount_nanos_usd,
    price_book_version, start_step, end_step, usage_time, coalesce(settled_month, billing_month) AS billing_month,
    api_key_id, transaction_id, matches, seen_count
FROM numbered
WHERE matches OR place = seen_count
ORDER BY usage_time, work_key;

-- name: get_billed_days(organization_id, billing_month, project_id)^
-- Reads the days of use of a project's records that are billed in a month: its own, and those of jobs settled in it.
SELECT min(days.first_day) AS first_day, max(days.last_day) AS last_day
FROM (
    SELECT min(usage_day) AS first_day, max(usage_day) AS last_day
    FROM usage_sums
    WHERE
        organization_id = :organization_id
        AND billing_month = :billing_month
        AND project_id = :project_id
        AND kind NOT IN ('training_tokens', 'evaluation_tokens')
    UNION ALL
    SELECT
        (min(usage_records.usage_time) AT TIME ZONE 'UTC')::date,
        (max(usage_records.usage_time) AT TIME ZONE 'UTC')::date
    FROM holds
    JOIN usage_records
        ON
            usage_records.resource = holds.resource
            AND usage_records.kind IN ('training_tokens', 'evaluation_tokens')
    WHERE
        holds.organization_id = :organization_id
        AND holds.billing_month = :billing_month
        AND holds.project_id = :project_id
        AND holds.state = 'settled'
        AND holds.charged_nanos_usd > 0
) AS days;

-- name: list_costs(organization_id, project_id, start_day, end_day, first_month, dimensions, row_max)
-- Sums usage, and what settlements added to or took from it, by the dimensions that are asked for.
WITH parts AS (
    SELECT
        project_id, model, usage_day AS day, resource, api_key_id, kind, quantity, amount_nanos_usd, record_count,
        CASE kind WHEN 'endpoint_minutes' THEN 'minutes' WHEN 'cluster_hours' THEN 'hours' ELSE 'tokens' END AS unit
    FROM usage_sums
    WHERE
        organization_id = :organization_id
        AND usage_day BETWEEN :start_day AND :end_day
        AND (:project_id::text = '' OR project_id = :project_id::text)
    UNION ALL
    SELECT
        project_id, base_model, (end_time AT TIME ZONE 'UTC')::date, resource, api_key_id, 'job_settlement', 0,
        adjustment_nanos_usd, 0, NULL
    FROM holds
    WHERE
        organization_id = :organization_id
        AND (state = 'settled' AND billing_month >= :first_month OR state = 'expired')
        AND end_time >= :start_day::date::timestamp AT TIME ZONE 'UTC'
        AND end_time < (:end_day::date + 1)::timestamp AT TIME ZONE 'UTC'
        AND adjustment_nanos_usd <> 0
        AND (:project_id::text = '' OR project_id = :project_id::text)
)

SELECT
    CASE WHEN 'project' = ANY(:dimensions::text[]) THEN project_id ELSE '' END AS project,
    CASE WHEN 'model' = ANY(:dimensions::text[]) THEN model ELSE '' END AS model,
    CASE WHEN 'day' = ANY(:dimensions::text[]) THEN day::text ELSE '' END AS day,
    CASE WHEN 'resource' = ANY(:dimensions::text[]) THEN resource ELSE '' END AS resource,
    CASE WHEN 'api_key' = ANY(:dimensions::text[]) THEN api_key_id ELSE '' END AS api_key,
    CASE WHEN 'kind' = ANY(:dimensions::text[]) THEN kind ELSE '' END AS kind,
    CASE WHEN min(unit) = max(unit) THEN sum(quantity) ELSE 0 END::bigint AS quantity,
    sum(amount_nanos_usd)::bigint AS amount_nanos_usd,
    sum(record_count)::bigint AS usage_record_count
FROM parts
GROUP BY 1, 2, 3, 4, 5, 6
LIMIT :row_max;
