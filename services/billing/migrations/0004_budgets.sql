-- Whether credit is enough, what may be spent in a month, and what was announced of both.

-- One row per organization of which something was announced or set. `revision` counts the announcements.
CREATE TABLE credit_states (
    organization_id text PRIMARY KEY,
    -- Empty until an entry of the organization was posted: nothing is known before.
    state text NOT NULL DEFAULT '' CHECK (state IN ('', 'SUFFICIENT', 'LOW', 'EXHAUSTED')),
    low_balance_nanos_usd bigint NOT NULL DEFAULT 0 CHECK (low_balance_nanos_usd >= 0),
    revision bigint NOT NULL DEFAULT 0 CHECK (revision >= 0)
);

-- The budget of a project (`api_key_id` is empty) or of one of its keys. A budget that was removed stays with a cap of 0,
-- so that its revisions go on.
CREATE TABLE budgets (
    project_id text NOT NULL,
    api_key_id text NOT NULL,
    organization_id text NOT NULL,
    monthly_cap_nanos_usd bigint NOT NULL CHECK (monthly_cap_nanos_usd >= 0),
    alert_percents integer[] NOT NULL,
    -- The month and the cap for which it was announced that nothing more may be spent.
    capped_month date CHECK (extract(day FROM capped_month) = 1),
    capped_at_nanos_usd bigint NOT NULL DEFAULT 0,
    revision bigint NOT NULL DEFAULT 0 CHECK (revision >= 0),
    update_time timestamptz NOT NULL,
    PRIMARY KEY (project_id, api_key_id),
    CHECK ((capped_month IS NULL) = (capped_at_nanos_usd = 0))
);
CREATE INDEX budgets_organization ON budgets (organization_id);

-- Warnings that went out: one per budget, month and share of the cap.
CREATE TABLE budget_alerts (
    project_id text NOT NULL,
    api_key_id text NOT NULL,
    month date NOT NULL CHECK (extract(day FROM month) = 1),
    percent integer NOT NULL CHECK (percent BETWEEN 1 AND 100),
    alert_time timestamptz NOT NULL,
    PRIMARY KEY (project_id, api_key_id, month, percent)
);
