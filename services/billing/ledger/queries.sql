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

-- name: list_closed_months(organization_ids)
-- Lists the months whose invoices are closed.
SELECT organization_id, billing_month FROM invoices WHERE organization_id = ANY(:organization_ids::text[]);

-- name: get_revenue(organization_id)$
-- Reads what was earned from an organization.
SELECT balance_nanos_usd FROM accounts WHERE organization_id = :organization_id AND account = 'revenue';

-- name: list_journal(organization_id, after_position, row_max)
-- Lists a page of an organization's journal in the order of the chain.
SELECT
    t.organization_id, t.position, t.id, t.kind, t.resource, t.price_book_version, t.transaction_time, t.hash,
    p.accounts, p.amounts
FROM (
    SELECT organization_id, position, id, kind, resource, price_book_version, transaction_time, hash
    FROM transactions
    WHERE organization_id = :organization_id AND position > :after_position
    ORDER BY position
    LIMIT :row_max
) AS t
CROSS JOIN LATERAL (
    SELECT array_agg(account ORDER BY account) AS accounts, array_agg(amount_nanos_usd ORDER BY account) AS amounts
    FROM postings
    WHERE organization_id = t.organization_id AND position = t.position
) AS p
ORDER BY t.position;

-- name: dump_ledger()
-- Lists the whole ledger, without its chain, in an order that depends on nothing but its content.
SELECT
    t.id, t.kind, t.organization_id, t.resource, t.price_book_version, t.transaction_time, p.account, p.amount_nanos_usd
FROM transactions AS t
JOIN postings AS p ON p.organization_id = t.organization_id AND p.position = t.position
ORDER BY t.organization_id, t.transaction_time, t.id, p.account;
