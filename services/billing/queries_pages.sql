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
-- Reads on which days the records of a project were used that are billed in a month: of its own, and of jobs settled in it.
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
