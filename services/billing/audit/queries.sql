-- name: allow_long_statements(timeout_ms)$
-- Lets the statements of this transaction, and the reader between them, take as long as a large ledger needs.
-- Its own time is without a limit: a new one would not move the end that was set when it began.
SELECT
    set_config('transaction_timeout', '0', true)
    || set_config('statement_timeout', :timeout_ms::text, true)
    || set_config('idle_in_transaction_session_timeout', :timeout_ms::text, true);

-- name: list_heads(organization_id)
-- Lists where the chain of one organization stands, or of all when the id is empty.
SELECT organization_id, position, hash, posted_position
FROM chains
WHERE :organization_id::text = '' OR organization_id = :organization_id::text;

-- name: list_accounts(organization_id)
-- Lists the balances of one organization or of all.
SELECT organization_id, account, balance_nanos_usd
FROM accounts
WHERE :organization_id::text = '' OR organization_id = :organization_id::text;

-- name: list_months_closed(organization_id)
-- Lists the months of one organization or of all whose invoices are closed.
SELECT organization_id, billing_month
FROM invoices
WHERE :organization_id::text = '' OR organization_id = :organization_id::text;

-- name: stream_entries(organization_id)
-- Lists entries with their postings in the order of the chains; postings without an entry have none of its columns.
SELECT
    organization_id, position, t.id, t.kind, t.resource, t.price_book_version, t.transaction_time, t.hash, p.accounts,
    p.amounts
FROM (
    SELECT organization_id, position, id, kind, resource, price_book_version, transaction_time, hash
    FROM transactions
    WHERE :organization_id::text = '' OR organization_id = :organization_id::text
) AS t
FULL JOIN (
    SELECT
        organization_id, position,
        array_agg(account ORDER BY account) AS accounts, array_agg(amount_nanos_usd ORDER BY account) AS amounts
    FROM postings
    WHERE :organization_id::text = '' OR organization_id = :organization_id::text
    GROUP BY organization_id, position
) AS p USING (organization_id, position)
ORDER BY organization_id, position;

-- name: stream_holds(organization_id)
-- Lists holds with the endings of their jobs, by job.
SELECT
    h.resource, h.id, h.organization_id, h.project_id, h.state, h.base_model, h.method, h.training_tokens,
    h.validation_tokens, h.epochs, h.evaluations, h.parameter_count, h.price_book_version, h.held_nanos_usd,
    h.charged_nanos_usd, h.minimum_applied, h.billed_tokens, h.adjustment_nanos_usd, h.discrepancy, h.hold_time,
    h.end_time, h.billing_month, h.api_key_id, e.ending, e.usage_record_count, e.end_time AS ending_time,
    e.organization_id AS ending_organization_id, e.project_id AS ending_project_id
FROM holds AS h
LEFT JOIN job_endings AS e ON e.resource = h.resource
WHERE :organization_id::text = '' OR h.organization_id = :organization_id::text
ORDER BY h.resource COLLATE "C";

-- name: stream_job_usage(organization_id)
-- Lists the usage of jobs, by job and in the order of its steps.
SELECT
    project_id, work_key, kind, organization_id, resource, model, quantity, unit_price_nanos_usd, amount_nanos_usd,
    price_book_version, start_step, end_step, usage_time, api_key_id, billing_month, transaction_id
FROM usage_records
WHERE
    kind IN ('training_tokens', 'evaluation_tokens')
    AND (:organization_id::text = '' OR organization_id = :organization_id::text)
ORDER BY resource COLLATE "C", kind, start_step, work_key;

-- name: stream_job_entries(organization_id)
-- Lists the entries of jobs, by job and in the order of the chain.
SELECT
    t.resource, t.organization_id, t.position, t.id, t.kind, t.price_book_version, t.transaction_time,
    array_agg(p.account ORDER BY p.account) AS accounts, array_agg(p.amount_nanos_usd ORDER BY p.account) AS amounts
FROM transactions AS t
JOIN postings AS p ON p.organization_id = t.organization_id AND p.position = t.position
WHERE
    t.kind IN ('hold', 'release', 'settlement')
    AND (:organization_id::text = '' OR t.organization_id = :organization_id::text)
GROUP BY t.id
ORDER BY t.resource COLLATE "C", t.position;

-- name: stream_served_usage(organization_id)
-- Lists what was served, by the entry that posted it; first what names no entry.
SELECT
    project_id, work_key, kind, organization_id, resource, model, quantity, unit_price_nanos_usd, amount_nanos_usd,
    price_book_version, start_step, end_step, usage_time, api_key_id, billing_month, transaction_id
FROM usage_records
WHERE
    kind NOT IN ('training_tokens', 'evaluation_tokens')
    AND (:organization_id::text = '' OR organization_id = :organization_id::text)
ORDER BY transaction_id NULLS FIRST;

-- name: stream_served_entries(organization_id)
-- Lists the entries of what was served, by id, with what they earned.
SELECT
    t.id, t.organization_id, t.position, t.kind, t.resource, t.price_book_version, t.transaction_time,
    p.amount_nanos_usd AS revenue_nanos_usd
FROM transactions AS t
LEFT JOIN postings AS p
    ON p.organization_id = t.organization_id AND p.position = t.position AND p.account = 'revenue'
WHERE
    t.kind IN ('inference', 'endpoint', 'cluster')
    AND (:organization_id::text = '' OR t.organization_id = :organization_id::text)
ORDER BY t.id;

-- name: get_wrong_sum(organization_id)^
-- Sums all usage anew and answers the first sum that is stored otherwise, is missing or has no records.
SELECT
    organization_id, billing_month, project_id, api_key_id, usage_day, kind, resource, model, price_book_version,
    unit_price_nanos_usd,
    summed.quantity, summed.amount_nanos_usd, summed.record_count,
    stored.quantity AS stored_quantity, stored.amount_nanos_usd AS stored_amount_nanos_usd,
    stored.record_count AS stored_record_count
FROM (
    SELECT
        organization_id, billing_month, project_id, api_key_id, (usage_time AT TIME ZONE 'UTC')::date AS usage_day,
        kind, resource, model, price_book_version, unit_price_nanos_usd,
        sum(quantity) AS quantity, sum(amount_nanos_usd) AS amount_nanos_usd, count(*) AS record_count
    FROM usage_records
    WHERE :organization_id::text = '' OR organization_id = :organization_id::text
    GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10
) AS summed
FULL JOIN (
    SELECT
        organization_id, billing_month, project_id, api_key_id, usage_day, kind, resource, model, price_book_version,
        unit_price_nanos_usd, quantity, amount_nanos_usd, record_count
    FROM usage_sums
    WHERE :organization_id::text = '' OR organization_id = :organization_id::text
) AS stored USING (
    organization_id, billing_month, project_id, api_key_id, usage_day, kind, resource, model, price_book_version,
    unit_price_nanos_usd
)
WHERE
    (summed.quantity, summed.amount_nanos_usd, summed.record_count)
    IS DISTINCT FROM (stored.quantity, stored.amount_nanos_usd, stored.record_count)
ORDER BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10
LIMIT 1;

-- name: stream_invoices(organization_id)
-- Lists closed invoices with their content.
SELECT organization_id, billing_month, number, content, sha256, total_nanos_usd, close_time
FROM invoices
WHERE :organization_id::text = '' OR organization_id = :organization_id::text
ORDER BY organization_id, billing_month;

-- name: stream_line_records(organization_id, billing_month, project_id, resource, usage_kind)
-- Lists the work of one line of an invoice; of a job, which has no kind, whatever its month is.
SELECT work_key
FROM usage_records
WHERE
    organization_id = :organization_id
    AND project_id = :project_id
    AND resource = :resource
    AND (:usage_kind::text = '' OR (kind = :usage_kind::text AND billing_month = :billing_month));

-- name: stream_credit_notes(organization_id)
-- Lists credit notes beside their entries; one without the other has none of its columns.
SELECT
    coalesce(c.organization_id, t.organization_id) AS organization_id,
    c.number, c.request_id, c.amount_nanos_usd, c.resource, c.invoice, c.transaction_id, c.billing_month, c.create_time,
    t.id, t.position, t.resource AS entry_resource, t.transaction_time, t.revenue_nanos_usd
FROM (
    SELECT
        organization_id, number, request_id, amount_nanos_usd, resource, invoice, transaction_id, billing_month,
        create_time
    FROM credit_notes
    WHERE :organization_id::text = '' OR organization_id = :organization_id::text
) AS c
FULL JOIN (
    SELECT t.organization_id, t.id, t.position, t.resource, t.transaction_time, p.amount_nanos_usd AS revenue_nanos_usd
    FROM transactions AS t
    LEFT JOIN postings AS p
        ON p.organization_id = t.organization_id AND p.position = t.position AND p.account = 'revenue'
    WHERE
        t.kind = 'credit_note'
        AND (:organization_id::text = '' OR t.organization_id = :organization_id::text)
) AS t ON t.id = c.transaction_id AND t.organization_id = c.organization_id
ORDER BY 1, c.number, t.position;

-- name: get_wrong_number()^
-- Answers the first document whose number does not follow on the one before it.
SELECT kind, number, place
FROM (
    SELECT kind, number, row_number() OVER (PARTITION BY kind ORDER BY number) AS place
    FROM (
        SELECT 'invoice' AS kind, number FROM invoices
        UNION ALL
        SELECT 'credit_note' AS kind, number FROM credit_notes
    ) AS numbered
) AS placed
WHERE number <> place
ORDER BY kind, number
LIMIT 1;

-- name: get_wrong_last_number()^
-- Answers the first kind of document whose last number is not the highest that a document has.
SELECT document_numbers.kind, document_numbers.last_number, coalesce(max(numbered.number), 0) AS highest
FROM document_numbers
LEFT JOIN (
    SELECT 'invoice' AS kind, number FROM invoices
    UNION ALL
    SELECT 'credit_note' AS kind, number FROM credit_notes
) AS numbered ON numbered.kind = document_numbers.kind
GROUP BY document_numbers.kind, document_numbers.last_number
HAVING document_numbers.last_number <> coalesce(max(numbered.number), 0)
ORDER BY document_numbers.kind
LIMIT 1;

-- name: create_archived_claims()#
-- Makes the table of this session in which the claims of the archive lie beside what is booked.
CREATE TEMP TABLE archived_claims (
    event_id uuid,
    event_time timestamptz NOT NULL,
    -- It is among the dead letters: nothing of it need be booked.
    set_aside boolean NOT NULL,
    organization_id text NOT NULL,
    project_id text NOT NULL,
    work_key text NOT NULL,
    kind text NOT NULL,
    resource text NOT NULL,
    model text NOT NULL,
    quantity bigint NOT NULL
);

-- name: create_unarchived_work()#
-- Makes the table of this session in which booked work lies that no claim was found for.
CREATE TEMP TABLE unarchived_work (
    organization_id text NOT NULL,
    project_id text NOT NULL,
    work_key text NOT NULL,
    kind text NOT NULL,
    resource text NOT NULL,
    model text NOT NULL,
    quantity bigint NOT NULL,
    work_time timestamptz NOT NULL
);

-- name: drop_archived_claims()#
-- Ends the tables of this session.
DROP TABLE IF EXISTS archived_claims, unarchived_work;

-- name: analyze_archived_claims()#
-- Tells the planner how many claims there are.
ANALYZE archived_claims;

-- name: find_unarchived_work(organization_id)!
-- Collects what is booked and claimed by no event.
INSERT INTO unarchived_work
SELECT booked.*
FROM (
    SELECT organization_id, project_id, work_key, kind, resource, model, quantity, usage_time AS work_time
    FROM usage_records
    WHERE :organization_id::text = '' OR organization_id = :organization_id
    UNION ALL
    SELECT organization_id, project_id, resource, 'job_ending', resource, ending, usage_record_count, end_time
    FROM job_endings
    WHERE :organization_id::text = '' OR organization_id = :organization_id
) AS booked
WHERE NOT EXISTS (
    SELECT
    FROM archived_claims AS claimed
    WHERE
        claimed.project_id = booked.project_id
        AND claimed.work_key = booked.work_key
        AND claimed.kind = booked.kind
        AND claimed.organization_id = booked.organization_id
        AND claimed.resource = booked.resource
        AND claimed.model IN ('', booked.model)
        AND claimed.quantity = booked.quantity
);

-- name: count_work_before_archive(ending_begin_time, usage_begin_time)$
-- Counts the work of which the archive has nothing, because it is older.
SELECT count(*)
FROM unarchived_work
WHERE work_time < CASE kind WHEN 'job_ending' THEN :ending_begin_time::timestamptz ELSE :usage_begin_time END;

-- name: get_unarchived_work(ending_begin_time, usage_begin_time)^
-- Answers the first work that is booked since the archive began, and that no event claims.
SELECT organization_id, project_id, work_key, kind, quantity
FROM unarchived_work AS booked
WHERE
    work_time >= CASE kind WHEN 'job_ending' THEN :ending_begin_time::timestamptz ELSE :usage_begin_time END
    AND NOT EXISTS (
        SELECT
        FROM archived_claims AS claimed
        WHERE
            claimed.project_id = booked.project_id
            AND claimed.work_key = booked.work_key
            AND claimed.kind = booked.kind
            AND claimed.organization_id = booked.organization_id
            AND claimed.resource = booked.resource
            AND claimed.model IN ('', booked.model)
            AND claimed.quantity = booked.quantity
    )
ORDER BY organization_id, project_id, work_key
LIMIT 1;

-- name: get_unbooked_claim(handled_within_s, consumer)^
-- Answers the first claim that is not booked as it is, of an event that was handled and not set aside.
SELECT
    claimed.organization_id, claimed.project_id, claimed.work_key, claimed.kind, claimed.quantity,
    coalesce(record.quantity, ending.usage_record_count) AS booked_quantity
FROM archived_claims AS claimed
LEFT JOIN usage_records AS record
    ON record.project_id = claimed.project_id AND record.work_key = claimed.work_key AND record.kind = claimed.kind
LEFT JOIN job_endings AS ending ON claimed.kind = 'job_ending' AND ending.resource = claimed.work_key
WHERE
    NOT claimed.set_aside
    AND (
        coalesce(record.organization_id, ending.organization_id) IS DISTINCT FROM claimed.organization_id
        OR coalesce(record.resource, ending.resource) <> claimed.resource
        OR (claimed.model <> '' AND coalesce(record.model, ending.ending) <> claimed.model)
        OR coalesce(record.quantity, ending.usage_record_count) <> claimed.quantity
    )
    AND NOT EXISTS (
        SELECT
        FROM archived_claims AS kept
        WHERE kept.set_aside AND kept.project_id = claimed.project_id AND kept.work_key = claimed.work_key
    )
    AND (
        claimed.event_time < now() - make_interval(secs => :handled_within_s)
        OR EXISTS (SELECT FROM inbox WHERE consumer = :consumer AND event_id = claimed.event_id)
    )
ORDER BY claimed.organization_id, claimed.project_id, claimed.work_key
LIMIT 1;

-- name: stream_dead_letters(consumer)
-- Reads all dead letters.
SELECT event_id, headers, payload, created_at FROM dead_letters WHERE consumer = :consumer ORDER BY event_id;
