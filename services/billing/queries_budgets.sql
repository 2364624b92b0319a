-- name: list_credit(organization_ids)
-- Reads balances beside what was announced last, of organizations that have entries.
SELECT
    chains.organization_id,
    coalesce(sum(accounts.balance_nanos_usd) FILTER (WHERE accounts.account = 'prepaid'), 0)::bigint AS prepaid_nanos_usd,
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

-- name: list_budgets(organization_ids, project_id, month)
-- Reads budgets, of one project or of all, with what is spent and held in the month; spending is read once per project.
WITH wanted AS (
    SELECT
        organization_id, project_id, api_key_id, monthly_cap_nanos_usd, alert_percents, capped_month,
        capped_at_nanos_usd, revision, update_time
    FROM budgets
    WHERE
        organization_id = ANY(:organization_ids::text[])
        AND (:project_id::text = '' OR project_id = :project_id::text)
),
projects AS (
    SELECT DISTINCT organization_id, project_id FROM wanted
),
spent AS MATERIALIZED (
    SELECT projects.project_id, moved.api_key_id, moved.amount_nanos_usd
    FROM projects
    CROSS JOIN LATERAL (
        SELECT api_key_id, sum(amount_nanos_usd) AS amount_nanos_usd
        FROM usage_sums
        WHERE
            organization_id = projects.organization_id
            AND billing_month = :month::date
            AND project_id = projects.project_id
            AND kind IN ('input_tokens', 'output_tokens', 'endpoint_minutes', 'cluster_hours')
        GROUP BY api_key_id
        UNION ALL
        SELECT api_key_id, sum(charged_nanos_usd)
        FROM holds
        WHERE
            organization_id = projects.organization_id
            AND billing_month = :month::date
            AND project_id = projects.project_id
            AND state = 'settled'
        GROUP BY api_key_id
        UNION ALL
        SELECT api_key_id, sum(held_nanos_usd)
        FROM holds
        WHERE project_id = projects.project_id AND state = 'held'
        GROUP BY api_key_id
    ) AS moved
)
SELECT
    wanted.organization_id, wanted.project_id, wanted.api_key_id, wanted.monthly_cap_nanos_usd, wanted.alert_percents,
    wanted.capped_month, wanted.capped_at_nanos_usd, wanted.revision, wanted.update_time,
    coalesce(
        (
            SELECT sum(spent.amount_nanos_usd)
            FROM spent
            WHERE spent.project_id = wanted.project_id AND wanted.api_key_id IN ('', spent.api_key_id)
        ),
        0
    )::bigint AS spent_nanos_usd
FROM wanted
ORDER BY wanted.project_id, wanted.api_key_id;

-- name: set_budget(project_id, api_key_id, organization_id, monthly_cap_nanos_usd, alert_percents, now)!
-- Sets the budget of a project or of a key. Another cap forgets the warnings of the one before, which said shares of it.
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
-- Takes the cap away and forgets its warnings; the row stays, so that its revisions go on.
WITH forgotten AS (
    DELETE FROM budget_alerts WHERE project_id = :project_id AND api_key_id = :api_key_id
)
UPDATE budgets
SET monthly_cap_nanos_usd = 0, update_time = :now
WHERE project_id = :project_id AND api_key_id = :api_key_id AND monthly_cap_nanos_usd > 0;

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
