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
