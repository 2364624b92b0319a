-- name: list_price_books()
-- Lists every price book that has been in force.
SELECT version, book, source FROM price_books ORDER BY version;

-- name: insert_price_book(version, book, source)!
-- Puts a new version of a price book into force.
INSERT INTO price_books (version, book, source) VALUES (:version, :book, :source) ON CONFLICT (version) DO NOTHING;

-- name: get_last_priced_day(version)$
-- Reads the last day on which something was used that a price book priced by its moment; a job keeps its version.
SELECT max(usage_day)
FROM usage_sums
WHERE price_book_version = :version AND kind NOT IN ('training_tokens', 'evaluation_tokens');

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

-- name: ensure_chains(organization_ids)!
-- Begins the chains of organizations that have none yet.
INSERT INTO chains (organization_id)
SELECT o.organization_id
FROM unnest(:organization_ids::text[]) AS o (organization_id)
ORDER BY o.organization_id
ON CONFLICT (organization_id) DO NOTHING;

-- name: lock_chains(organization_ids)
-- Locks the organizations' money in sorted order, so that two transactions cannot wait for each other.
SELECT organization_id, position, hash
FROM chains
WHERE organization_id = ANY(:organization_ids::text[])
ORDER BY organization_id
FOR NO KEY UPDATE;

-- name: list_balances(organization_ids)
-- Reads the balances of organizations.
SELECT organization_id, account, balance_nanos_usd
FROM accounts
WHERE organization_id = ANY(:organization_ids::text[]);

-- name: insert_transactions(ids, kinds, organization_ids, resources, price_book_versions, transaction_times, positions, hashes)!
-- Writes the heads of ledger transactions; a trigger sees that they continue their chains.
INSERT INTO transactions (
    id, kind, organization_id, resource, price_book_version, transaction_time, position, hash
)
SELECT t.id, t.kind, t.organization_id, t.resource, t.price_book_version, t.transaction_time, t.position, t.hash
FROM unnest(
    :ids::uuid[], :kinds::text[], :organization_ids::text[], :resources::text[], :price_book_versions::text[],
    :transaction_times::timestamptz[], :positions::bigint[], :hashes::bytea[]
) AS t (id, kind, organization_id, resource, price_book_version, transaction_time, position, hash);

-- name: insert_postings(organization_ids, positions, accounts, amounts)!
-- Writes the postings of whole transactions; a trigger checks them and adds them to the balances.
INSERT INTO postings (organization_id, position, account, amount_nanos_usd)
SELECT p.organization_id, p.position, p.account, p.amount_nanos_usd
FROM unnest(
    :organization_ids::text[], :positions::bigint[], :accounts::text[], :amounts::bigint[]
) AS p (organization_id, position, account, amount_nanos_usd);

-- name: get_posted_amount(transaction_id, account)$
-- Reads what a transaction moved on an account; nothing when it was never written.
SELECT postings.amount_nanos_usd
FROM transactions
JOIN postings USING (organization_id, position)
WHERE transactions.id = :transaction_id AND postings.account = :account;

-- name: list_transaction_ids(resource)
-- Lists the ledger transactions of a job, its hold before what ended it.
SELECT id
FROM transactions
WHERE resource = :resource AND kind IN ('hold', 'release', 'settlement')
ORDER BY position;

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

-- name: dump_ledger()
-- Lists the whole ledger, without its chain, in an order that depends on nothing but its content.
SELECT
    t.id, t.kind, t.organization_id, t.resource, t.price_book_version, t.transaction_time, p.account, p.amount_nanos_usd
FROM transactions AS t
JOIN postings AS p ON p.organization_id = t.organization_id AND p.position = t.position
ORDER BY t.organization_id, t.transaction_time, t.id, p.account;
