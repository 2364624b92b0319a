-- name: list_credit(organization_ids)
-- Reads balances beside what was announced last, of organizations that have entries.
SELECT
    chains.organization_id,
    coalesce(sum(accounts.balance_nanos_usd) FILTER (WHERE accounts.account = 'prepaid'), 0)::bigint
        AS prepaid_nanos_usd,
    coalesce(sum(accounts.balance_nanos_usd) FILTER (WHERE accounts.account = 'held'), 0)::bigint AS held_nanos_usd,
    coalesce(sum(accounts.balance_nanos_usd) FILTER (WHERE accounts.account = 'receivable'), 0)::bigint
        AS receivable_nanos_usd,
    coalesce(credit_states.low_balance_nanos_usd, 0) AS low_balance_nanos_usd,
    coalesce(credit_states.state, '') AS state,
    coalesce(credit_states.revision, 0) AS revision,
    EXISTS (SELECT FROM budgets WHERE budgets.organization_id = chains.organization_id) AS has_budgets
FROM chains
JOIN accounts ON accounts.organization_id = chains.organization_id
LEFT JOIN credit_states ON credit_states.organization_id = chains.organization_id
WHERE chains.organization_id = ANY(:organization_ids::text[]) AND chains.position > 0
GROUP BY
    chains.organization_id, credit_states.low_balance_nanos_usd, credit_states.state, credit_states.revision
ORDER BY chains.organization_id;

-- name: save_credit_states(organization_ids, states, revisions)!
-- Remembers what was announced of the credit of organizations.
INSERT INTO credit_states (organization_id, state, revision)
SELECT c.organization_id, c.state, c.revision
FROM unnest(:organization_ids::text[], :states::text[], :revisions::bigint[]) AS c (organization_id, state, revision)
ON CONFLICT (organization_id) DO UPDATE SET state = excluded.state, revision = excluded.revision;

-- name: set_low_balance(organization_id, low_balance_nanos_usd)!
-- Sets below which available amount credit counts as low.
INSERT INTO credit_states (organization_id, low_balance_nanos_usd) VALUES (:organization_id, :low_balance_nanos_usd)
ON CONFLICT (organization_id) DO UPDATE SET low_balance_nanos_usd = excluded.low_balance_nanos_usd;

-- name: get_low_balance(organization_id)$
-- Reads below which available amount credit counts as low; nothing when it was never set.
SELECT low_balance_nanos_usd FROM credit_states WHERE organization_id = :organization_id;

-- name: list_budget_keys(organization_id, project_id)
-- Lists whose budgets a project has, its own as an empty key, without those that were removed.
SELECT api_key_id
FROM budgets
WHERE organization_id = :organization_id AND project_id = :project_id AND monthly_cap_nanos_usd > 0
ORDER BY api_key_id;

-- name: list_budgets(organization_ids, project_ids, api_key_ids, month)
-- Reads these budgets with what is spent and held in the month: a key's budget reads that key's usage and no other.
WITH wanted AS MATERIALIZED (
    SELECT
        budgets.organization_id, budgets.project_id, budgets.api_key_id, budgets.monthly_cap_nanos_usd,
        budgets.alert_percents, budgets.capped_month, budgets.capped_at_nanos_usd, budgets.revision, budgets.update_time
    FROM unnest(:project_ids::text[], :api_key_ids::text[]) AS named (project_id, api_key_id)
    JOIN budgets ON budgets.project_id = named.project_id AND budgets.api_key_id = named.api_key_id
    WHERE
        budgets.organization_id = ANY(:organization_ids::text[])
        AND (budgets.monthly_cap_nanos_usd > 0 OR budgets.capped_month = :month::date)
),
-- Of each key that asked for jobs, and of the project as an empty key.
jobs AS MATERIALIZED (
    SELECT
        moved.project_id, coalesce(moved.api_key_id, '') AS api_key_id,
        sum(moved.amount_nanos_usd) AS amount_nanos_usd
    FROM (
        SELECT projects.project_id, ended.api_key_id, ended.charged_nanos_usd AS amount_nanos_usd
        FROM (SELECT DISTINCT organization_id, project_id FROM wanted) AS projects
        JOIN holds AS ended ON
            ended.organization_id = projects.organization_id
            AND ended.billing_month = :month::date
            AND ended.project_id = projects.project_id
            AND ended.state = 'settled'
        UNION ALL
        SELECT projects.project_id, running.api_key_id, running.held_nanos_usd
        FROM (SELECT DISTINCT project_id FROM wanted) AS projects
        JOIN holds AS running ON running.project_id = projects.project_id AND running.state = 'held'
    ) AS moved
    GROUP BY GROUPING SETS ((moved.project_id, moved.api_key_id), (moved.project_id))
    HAVING grouping(moved.api_key_id) = 1 OR moved.api_key_id <> ''
)
SELECT
    wanted.organization_id, wanted.project_id, wanted.api_key_id, wanted.monthly_cap_nanos_usd, wanted.alert_percents,
    wanted.capped_month, wanted.capped_at_nanos_usd, wanted.revision, wanted.update_time,
    (coalesce(used.amount_nanos_usd, 0) + coalesce(jobs.amount_nanos_usd, 0))::bigint AS spent_nanos_usd
FROM wanted
CROSS JOIN LATERAL (
    SELECT sum(amount_nanos_usd) AS amount_nanos_usd
    FROM (
        SELECT amount_nanos_usd
        FROM usage_sums
        WHERE
            wanted.api_key_id <> ''
            AND organization_id = wanted.organization_id
            AND billing_month = :month::date
            AND project_id = wanted.project_id
            AND api_key_id = wanted.api_key_id
            AND kind IN ('input_tokens', 'output_tokens', 'endpoint_minutes', 'cluster_hours')
        UNION ALL
        SELECT amount_nanos_usd
        FROM usage_sums
        WHERE
            wanted.api_key_id = ''
            AND organization_id = wanted.organization_id
            AND billing_month = :month::date
            AND project_id = wanted.project_id
            AND kind IN ('input_tokens', 'output_tokens', 'endpoint_minutes', 'cluster_hours')
    ) AS sums
) AS used
LEFT JOIN jobs ON jobs.project_id = wanted.project_id AND jobs.api_key_id = wanted.api_key_id
ORDER BY wanted.project_id, wanted.api_key_id;

-- name: set_budget(project_id, api_key_id, organization_id, monthly_cap_nanos_usd, alert_percents, now)!
-- Sets the budget of a project or of a key. Another cap forgets the warnings about shares of the cap before it.
WITH forgotten AS (
    DELETE FROM budget_alerts
    USING budgets
    WHERE
        budget_alerts.project_id = :project_id
        AND budget_alerts.api_key_id = :api_key_id
        AND budgets.project_id = budget_alerts.project_id
        AND budgets.api_key_id = budget_alerts.api_key_id
        AND budgets.monthly_cap_nanos_usd <> :monthly_cap_nanos_usd
)

INSERT INTO budgets (project_id, api_key_id, organization_id, monthly_cap_nanos_usd, alert_percents, update_time)
VALUES (:project_id, :api_key_id, :organization_id, :monthly_cap_nanos_usd, :alert_percents, :now)
ON CONFLICT (project_id, api_key_id) DO UPDATE SET
    monthly_cap_nanos_usd = excluded.monthly_cap_nanos_usd,
    alert_percents = excluded.alert_percents,
    update_time = excluded.update_time;

-- name: remove_budget(project_id, api_key_id, now)!
-- Takes the cap away and forgets its warnings; the row stays if a cap was announced, so that its revisions go on.
WITH forgotten AS (
    DELETE FROM budget_alerts WHERE project_id = :project_id AND api_key_id = :api_key_id
),
unannounced AS (
    DELETE FROM budgets WHERE project_id = :project_id AND api_key_id = :api_key_id AND revision = 0
)
UPDATE budgets
SET monthly_cap_nanos_usd = 0, update_time = :now
WHERE project_id = :project_id AND api_key_id = :api_key_id AND monthly_cap_nanos_usd > 0 AND revision > 0;

-- name: save_cap_states(project_ids, api_key_ids, capped_months, capped_at, revisions)!
-- Remembers what was announced of budgets.
UPDATE budgets
SET
    capped_month = c.capped_month,
    capped_at_nanos_usd = c.capped_at,
    revision = c.revision
FROM unnest(
    :project_ids::text[], :api_key_ids::text[], :capped_months::date[], :capped_at::bigint[], :revisions::bigint[]
) AS c (project_id, api_key_id, capped_month, capped_at, revision)
WHERE budgets.project_id = c.project_id AND budgets.api_key_id = c.api_key_id;

-- name: add_alerts(project_ids, api_key_ids, percents, month, now)
-- Remembers warnings and answers which are new.
INSERT INTO budget_alerts (project_id, api_key_id, month, percent, alert_time)
SELECT a.project_id, a.api_key_id, :month::date, a.percent, :now::timestamptz
FROM unnest(:project_ids::text[], :api_key_ids::text[], :percents::int[]) AS a (project_id, api_key_id, percent)
ON CONFLICT (project_id, api_key_id, month, percent) DO NOTHING
RETURNING project_id, api_key_id, percent;

-- name: prune_alerts(retention_s, batch_max)!
-- Deletes a bounded batch of warnings of months that are long over.
DELETE FROM budget_alerts
WHERE (project_id, api_key_id, month, percent) IN (
    SELECT project_id, api_key_id, month, percent
    FROM budget_alerts
    WHERE alert_time < now() - make_interval(secs => :retention_s)
    LIMIT :batch_max
    FOR UPDATE SKIP LOCKED
);
