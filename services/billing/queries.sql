-- name: list_price_books()
-- Lists every price book that has been in force.
SELECT version, book, source FROM price_books ORDER BY version;

-- name: insert_price_book(version, book, source)!
-- Puts a new version of a price book into force.
INSERT INTO price_books (version, book, source) VALUES (:version, :book, :source) ON CONFLICT (version) DO NOTHING;

-- name: lock_job(resource)!
-- Makes everything that decides about one job's money take turns until the end of the transaction.
SELECT pg_advisory_xact_lock(hashtextextended(:resource, 0));

-- name: ensure_accounts(organization_ids)!
-- Opens the accounts of organizations that have none yet.
INSERT INTO accounts (organization_id, account)
SELECT o.organization_id, a.account
FROM unnest(:organization_ids::text[]) AS o (organization_id)
CROSS JOIN unnest(ARRAY['funding', 'held', 'prepaid', 'receivable', 'revenue']) AS a (account)
ORDER BY o.organization_id, a.account
ON CONFLICT (organization_id, account) DO NOTHING;

-- name: lock_accounts(organization_ids)
-- Locks the accounts in sorted order, so that two transactions over the same organizations cannot block each other.
SELECT organization_id, account, balance_nanos_usd
FROM accounts
WHERE organization_id = ANY(:organization_ids::text[])
ORDER BY organization_id, account
FOR NO KEY UPDATE;

-- name: get_balances(organization_id)
-- Reads an organization's balances without a lock.
SELECT account, balance_nanos_usd FROM accounts WHERE organization_id = :organization_id;

-- name: insert_transactions(ids, kinds, organization_ids, resources, price_book_versions, transaction_times)!
-- Writes the heads of ledger transactions.
INSERT INTO transactions (id, kind, organization_id, resource, price_book_version, transaction_time)
SELECT t.id, t.kind, t.organization_id, t.resource, t.price_book_version, t.transaction_time
FROM unnest(
    :ids::uuid[], :kinds::text[], :organization_ids::text[], :resources::text[], :price_book_versions::text[],
    :transaction_times::timestamptz[]
) AS t (id, kind, organization_id, resource, price_book_version, transaction_time);

-- name: insert_postings(transaction_ids, organization_ids, accounts, amounts)!
-- Writes postings; a trigger adds them to the balances.
INSERT INTO postings (transaction_id, organization_id, account, amount_nanos_usd)
SELECT p.transaction_id, p.organization_id, p.account, p.amount_nanos_usd
FROM unnest(
    :transaction_ids::uuid[], :organization_ids::text[], :accounts::text[], :amounts::bigint[]
) AS p (transaction_id, organization_id, account, amount_nanos_usd);

-- name: get_posted_amount(transaction_id, account)$
-- Reads what a transaction moved on an account; nothing when it was never written.
SELECT amount_nanos_usd FROM postings WHERE transaction_id = :transaction_id AND account = :account;

-- name: list_transaction_ids(resource)
-- Lists the ledger transactions of a job, its hold before what ended it.
SELECT id FROM transactions WHERE resource = :resource ORDER BY kind = 'hold' DESC, transaction_time, id;

-- name: insert_hold(resource, id, organization_id, project_id, base_model, method, training_tokens, validation_tokens, epochs, evaluations, parameter_count, price_book_version, held_nanos_usd, hold_time)!
-- Remembers a job's quote and hold.
INSERT INTO holds (
    resource, id, organization_id, project_id, state, base_model, method, training_tokens, validation_tokens, epochs,
    evaluations, parameter_count, price_book_version, held_nanos_usd, hold_time
) VALUES (
    :resource, :id, :organization_id, :project_id, 'held', :base_model, :method, :training_tokens, :validation_tokens,
    :epochs, :evaluations, :parameter_count, :price_book_version, :held_nanos_usd, :hold_time
);

-- name: get_hold(resource)^
-- Reads a job's hold.
SELECT
    resource, id, organization_id, project_id, state, base_model, method, training_tokens, validation_tokens, epochs,
    evaluations, parameter_count, price_book_version, held_nanos_usd, charged_nanos_usd, discrepancy, hold_time, end_time
FROM holds
WHERE resource = :resource;

-- name: end_hold(resource, sources, state, charged_nanos_usd, minimum_applied, billed_tokens, discrepancy, end_time)!
-- Ends a hold that is in one of the source states.
UPDATE holds
SET state = :state, charged_nanos_usd = :charged_nanos_usd, minimum_applied = :minimum_applied,
    billed_tokens = :billed_tokens, discrepancy = :discrepancy, end_time = :end_time
WHERE resource = :resource AND state = ANY(:sources::text[]);

-- name: insert_job_ending(resource, organization_id, project_id, ending, usage_record_count, end_time)!
-- Remembers how a job ended.
INSERT INTO job_endings (resource, organization_id, project_id, ending, usage_record_count, end_time)
VALUES (:resource, :organization_id, :project_id, :ending, :usage_record_count, :end_time);

-- name: get_job_ending(resource)^
-- Reads how a job ended.
SELECT resource, organization_id, project_id, ending, usage_record_count, end_time
FROM job_endings
WHERE resource = :resource;

-- name: insert_usage_records(ids, work_keys, kinds, organization_ids, project_ids, resources, models, quantities, unit_prices, amounts, price_book_versions, start_steps, end_steps, usage_times)
-- Books usage once per piece of work and answers which are new.
INSERT INTO usage_records (
    id, work_key, kind, organization_id, project_id, resource, model, quantity, unit_price_nanos_usd, amount_nanos_usd,
    price_book_version, start_step, end_step, usage_time
)
SELECT
    u.id, u.work_key, u.kind, u.organization_id, u.project_id, u.resource, u.model, u.quantity, u.unit_price, u.amount,
    u.price_book_version, u.start_step, u.end_step, u.usage_time
FROM unnest(
    :ids::uuid[], :work_keys::text[], :kinds::text[], :organization_ids::text[], :project_ids::text[],
    :resources::text[], :models::text[], :quantities::bigint[], :unit_prices::bigint[], :amounts::bigint[],
    :price_book_versions::text[], :start_steps::bigint[], :end_steps::bigint[], :usage_times::timestamptz[]
) AS u (
    id, work_key, kind, organization_id, project_id, resource, model, quantity, unit_price, amount, price_book_version,
    start_step, end_step, usage_time
)
ORDER BY u.id
ON CONFLICT (id) DO NOTHING
RETURNING id;

-- name: list_usage_by_id(ids)
-- Reads what is booked for these pieces of work.
SELECT
    id, work_key, kind, organization_id, project_id, resource, model, quantity, unit_price_nanos_usd, amount_nanos_usd,
    price_book_version, start_step, end_step, usage_time
FROM usage_records
WHERE id = ANY(:ids::uuid[]);

-- name: get_overlapping_work_key(resource, start_step, end_step)$
-- Finds a booked range of training steps that shares a step with this one.
SELECT work_key
FROM usage_records
WHERE resource = :resource AND kind = 'training_tokens' AND start_step < :end_step AND end_step > :start_step
ORDER BY start_step
LIMIT 1;

-- name: get_job_totals(resource)^
-- Sums what is booked for a job.
SELECT
    count(*) AS record_count,
    coalesce(sum(quantity) FILTER (WHERE kind = 'training_tokens'), 0)::bigint AS training_tokens,
    coalesce(sum(quantity) FILTER (WHERE kind = 'evaluation_tokens'), 0)::bigint AS evaluation_tokens
FROM usage_records
WHERE resource = :resource AND kind IN ('training_tokens', 'evaluation_tokens');

-- name: list_usage(project_id, resource, before_time, before_id, row_max)
-- Lists a page of a project's usage, newest first, of one resource or of all.
SELECT
    id, work_key, kind, organization_id, project_id, resource, model, quantity, unit_price_nanos_usd, amount_nanos_usd,
    price_book_version, start_step, end_step, usage_time
FROM usage_records
WHERE
    project_id = :project_id
    AND (:resource::text = '' OR resource = :resource::text)
    AND (:before_time::timestamptz IS NULL OR (usage_time, id) < (:before_time::timestamptz, :before_id::uuid))
ORDER BY usage_time DESC, id DESC
LIMIT :row_max;

-- name: list_served_charges(organization_id, month_start, month_end, name_max, row_max)
-- Sums a month's served tokens and device minutes by resource and price book.
SELECT
    CASE kind WHEN 'endpoint_minutes' THEN 'endpoint' ELSE 'inference' END AS kind,
    resource,
    model,
    price_book_version,
    sum(quantity)::bigint AS quantity,
    CASE WHEN min(unit_price_nanos_usd) = max(unit_price_nanos_usd) THEN min(unit_price_nanos_usd) ELSE 0 END
        AS unit_price_nanos_usd,
    sum(amount_nanos_usd)::bigint AS amount_nanos_usd,
    count(*) AS record_count,
    (array_agg('projects/' || project_id || '/usageRecords/' || id ORDER BY usage_time, work_key))[1 : :name_max::int]
        AS record_names
FROM usage_records
WHERE
    organization_id = :organization_id
    AND usage_time >= :month_start AND usage_time < :month_end
    AND kind IN ('input_tokens', 'output_tokens', 'endpoint_minutes')
GROUP BY 1, resource, model, price_book_version
LIMIT :row_max;

-- name: list_tuning_charges(organization_id, month_start, month_end, name_max, row_max)
-- Lists the jobs that were charged in a month, with the usage behind each.
SELECT
    holds.resource,
    holds.base_model AS model,
    holds.price_book_version,
    holds.billed_tokens AS quantity,
    holds.charged_nanos_usd AS amount_nanos_usd,
    holds.minimum_applied,
    coalesce(booked.unit_price_nanos_usd, 0) AS unit_price_nanos_usd,
    booked.record_count,
    coalesce(booked.record_names, '{}') AS record_names
FROM holds
CROSS JOIN LATERAL (
    SELECT
        max(usage_records.unit_price_nanos_usd) AS unit_price_nanos_usd,
        count(*) AS record_count,
        (
            array_agg(
                'projects/' || usage_records.project_id || '/usageRecords/' || usage_records.id
                ORDER BY usage_records.usage_time, usage_records.work_key
            )
        )[1 : :name_max::int] AS record_names
    FROM usage_records
    WHERE usage_records.resource = holds.resource
) AS booked
WHERE
    holds.organization_id = :organization_id
    AND holds.state = 'settled'
    AND holds.charged_nanos_usd > 0
    AND holds.end_time >= :month_start AND holds.end_time < :month_end
ORDER BY holds.end_time, holds.resource
LIMIT :row_max;

-- name: dump_ledger()
-- Lists the whole ledger in an order that depends on nothing but its content.
SELECT
    t.id, t.kind, t.organization_id, t.resource, t.price_book_version, t.transaction_time, p.account, p.amount_nanos_usd
FROM transactions AS t
JOIN postings AS p ON p.transaction_id = t.id
ORDER BY t.organization_id, t.transaction_time, t.id, p.account;
