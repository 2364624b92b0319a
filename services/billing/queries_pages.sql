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
    work_key, kind, organization_id, project_id, resource, model, quantity, unit_price_nanos_usd, amount_nanos_usd,
    price_book_version, start_step, end_step, usage_time, billing_month, api_key_id, transaction_id, matches, seen_count
FROM numbered
WHERE (matches AND found <= :row_max) OR place = seen_count
ORDER BY usage_time DESC, work_key DESC;

-- name: list_oldest_usage(project_id, end_time, after_time, after_key, resource, kinds, billing_month, scan_max)
-- Looks at a bounded number of records forwards from a position; lists those that match, and the last one seen.
WITH seen AS (
    SELECT
        work_key, kind, organization_id, project_id, resource, model, quantity, unit_price_nanos_usd, amount_nanos_usd,
        price_book_version, start_step, end_step, usage_time, billing_month, api_key_id, transaction_id,
        (
            (:resource::text = '' OR resource = :resource::text)
            AND (:kinds::text[] = '{}' OR kind = ANY(:kinds::text[]))
            AND (:billing_month::date IS NULL OR billing_month = :billing_month::date)
        ) AS matches
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
        row_number() OVER (ORDER BY usage_time, work_key) AS place,
        count(*) OVER () AS seen_count
    FROM seen
)

SELECT
    work_key, kind, organization_id, project_id, resource, model, quantity, unit_price_nanos_usd, amount_nanos_usd,
    price_book_version, start_step, end_step, usage_time, billing_month, api_key_id, transaction_id, matches, seen_count
FROM numbered
WHERE matches OR place = seen_count
ORDER BY usage_time, work_key;

-- name: get_billed_days(organization_id, billing_month, project_id)^
-- Reads on which days the records of a project were used that are billed in a month.
SELECT min(usage_day) AS first_day, max(usage_day) AS last_day
FROM usage_sums
WHERE organization_id = :organization_id AND billing_month = :billing_month AND project_id = :project_id;
