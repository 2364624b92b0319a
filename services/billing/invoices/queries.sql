-- name: get_invoice(organization_id, billing_month)^
-- Reads a closed invoice.
SELECT billing_month, number, content, sha256, total_nanos_usd, close_time
FROM invoices
WHERE organization_id = :organization_id AND billing_month = :billing_month;

-- name: list_invoices(organization_id, before_month, row_max)
-- Lists closed invoices without their content, newest month first.
SELECT billing_month, number, sha256, total_nanos_usd, close_time
FROM invoices
WHERE
    organization_id = :organization_id
    AND (:before_month::date IS NULL OR billing_month < :before_month::date)
ORDER BY billing_month DESC
LIMIT :row_max;

-- name: take_number(kind)$
-- Takes the next number of a kind of document; others wait until this transaction ends.
UPDATE document_numbers SET last_number = last_number + 1 WHERE kind = :kind RETURNING last_number;

-- name: insert_invoice(organization_id, billing_month, number, content, sha256, total_nanos_usd, close_time)!
-- Keeps a closed invoice for ever.
INSERT INTO invoices (organization_id, billing_month, number, content, sha256, total_nanos_usd, close_time)
VALUES (:organization_id, :billing_month, :number, :content, :sha256, :total_nanos_usd, :close_time);

-- name: list_open_months(organization_id, before_month, row_max)
-- Lists an organization's months that have charges and no closed invoice, newest first, a probe of an index for each.
WITH RECURSIVE used AS (
    (
        SELECT billing_month FROM usage_sums
        WHERE organization_id = :organization_id
        ORDER BY billing_month DESC LIMIT 1
    )
    UNION ALL
    (
        SELECT before.billing_month
        FROM used
        CROSS JOIN LATERAL (
            SELECT billing_month FROM usage_sums
            WHERE organization_id = :organization_id AND billing_month < used.billing_month
            ORDER BY billing_month DESC LIMIT 1
        ) AS before
    )
),

settled AS (
    (
        SELECT billing_month FROM holds
        WHERE organization_id = :organization_id AND state = 'settled'
        ORDER BY billing_month DESC LIMIT 1
    )
    UNION ALL
    (
        SELECT before.billing_month
        FROM settled
        CROSS JOIN LATERAL (
            SELECT billing_month FROM holds
            WHERE organization_id = :organization_id AND state = 'settled' AND billing_month < settled.billing_month
            ORDER BY billing_month DESC LIMIT 1
        ) AS before
    )
),

charged AS (
    SELECT billing_month FROM used
    WHERE EXISTS (
        SELECT FROM usage_sums
        WHERE
            organization_id = :organization_id AND usage_sums.billing_month = used.billing_month
            AND kind NOT IN ('training_tokens', 'evaluation_tokens')
    )
    UNION
    SELECT billing_month FROM settled
    WHERE EXISTS (
        SELECT FROM holds
        WHERE
            organization_id = :organization_id AND state = 'settled' AND holds.billing_month = settled.billing_month
            AND charged_nanos_usd > 0
    )
    UNION
    SELECT billing_month FROM credit_notes WHERE organization_id = :organization_id
)

SELECT billing_month FROM charged
WHERE
    (:before_month::date IS NULL OR billing_month < :before_month::date)
    AND NOT EXISTS (
        SELECT FROM invoices
        WHERE organization_id = :organization_id AND invoices.billing_month = charged.billing_month
    )
ORDER BY billing_month DESC
LIMIT :row_max;

-- name: list_due(before_month, after_organization, after_month, row_max)
-- Lists months before this one that have charges and no closed invoice, of all organizations, after the last one seen.
WITH RECURSIVE used AS (
    (
        SELECT organization_id, billing_month FROM usage_sums
        WHERE (organization_id, billing_month) > (:after_organization::text, :after_month::date)
        ORDER BY organization_id, billing_month LIMIT 1
    )
    UNION ALL
    (
        SELECT later.organization_id, later.billing_month
        FROM used
        CROSS JOIN LATERAL (
            SELECT organization_id, billing_month FROM usage_sums
            WHERE (organization_id, billing_month) > (used.organization_id, used.billing_month)
            ORDER BY organization_id, billing_month LIMIT 1
        ) AS later
    )
),

settled AS (
    (
        SELECT organization_id, billing_month FROM holds
        WHERE state = 'settled' AND (organization_id, billing_month) > (:after_organization::text, :after_month::date)
        ORDER BY organization_id, billing_month LIMIT 1
    )
    UNION ALL
    (
        SELECT later.organization_id, later.billing_month
        FROM settled
        CROSS JOIN LATERAL (
            SELECT organization_id, billing_month FROM holds
            WHERE
                state = 'settled'
                AND (organization_id, billing_month) > (settled.organization_id, settled.billing_month)
            ORDER BY organization_id, billing_month LIMIT 1
        ) AS later
    )
),

charged AS (
    SELECT organization_id, billing_month FROM used
    WHERE EXISTS (
        SELECT FROM usage_sums AS sums
        WHERE
            sums.organization_id = used.organization_id AND sums.billing_month = used.billing_month
            AND sums.kind NOT IN ('training_tokens', 'evaluation_tokens')
    )
    UNION
    SELECT organization_id, billing_month FROM settled
    WHERE EXISTS (
        SELECT FROM holds
        WHERE
            holds.organization_id = settled.organization_id AND holds.billing_month = settled.billing_month
            AND holds.state = 'settled' AND holds.charged_nanos_usd > 0
    )
    UNION
    SELECT organization_id, billing_month FROM credit_notes
)

SELECT organization_id, billing_month FROM charged
WHERE
    billing_month < :before_month
    AND (organization_id, billing_month) > (:after_organization::text, :after_month::date)
    AND NOT EXISTS (
        SELECT FROM invoices
        WHERE
            invoices.organization_id = charged.organization_id AND invoices.billing_month = charged.billing_month
    )
ORDER BY organization_id, billing_month
LIMIT :row_max;

-- name: list_served_charges(organization_id, billing_month, row_max)
-- Sums a month's served tokens, device minutes and node hours by everything that makes a line.
SELECT
    project_id, resource, kind AS usage_kind, model, price_book_version, unit_price_nanos_usd,
    sum(quantity)::bigint AS quantity,
    sum(amount_nanos_usd)::bigint AS amount_nanos_usd,
    sum(record_count)::bigint AS usage_record_count
FROM usage_sums
WHERE
    organization_id = :organization_id
    AND billing_month = :billing_month
    AND kind NOT IN ('training_tokens', 'evaluation_tokens')
GROUP BY project_id, resource, kind, model, price_book_version, unit_price_nanos_usd
LIMIT :row_max;

-- name: list_sums(organization_id, billing_months)
-- Sums the charges of months less their credit notes, exactly.
WITH amounts AS (
    SELECT billing_month, amount_nanos_usd
    FROM usage_sums
    WHERE
        organization_id = :organization_id
        AND billing_month = ANY(:billing_months::date[])
        AND kind NOT IN ('training_tokens', 'evaluation_tokens')
    UNION ALL
    SELECT billing_month, charged_nanos_usd
    FROM holds
    WHERE
        organization_id = :organization_id
        AND billing_month = ANY(:billing_months::date[])
        AND state = 'settled'
        AND charged_nanos_usd > 0
    UNION ALL
    SELECT billing_month, -amount_nanos_usd
    FROM credit_notes
    WHERE organization_id = :organization_id AND billing_month = ANY(:billing_months::date[])
)

SELECT billing_month, sum(amount_nanos_usd)::bigint AS sum_nanos_usd
FROM amounts
GROUP BY billing_month;

-- name: list_tuning_charges(organization_id, billing_month, row_max)
-- Lists the jobs that were charged in a month; a job's price is that of any of its records, and their number that of
-- its ending, unless the settlement says that something is amiss.
-- Where the minimum applied, what the settlement added to the worth of the records is what lifts them to it.
SELECT
    holds.project_id,
    holds.resource,
    holds.base_model AS model,
    holds.price_book_version,
    holds.billed_tokens AS quantity,
    holds.charged_nanos_usd AS amount_nanos_usd,
    holds.minimum_applied,
    CASE WHEN holds.minimum_applied THEN greatest(0, holds.adjustment_nanos_usd) ELSE 0 END AS minimum_nanos_usd,
    coalesce(booked.unit_price_nanos_usd, 0) AS unit_price_nanos_usd,
    CASE holds.discrepancy
        WHEN '' THEN job_endings.usage_record_count
        ELSE (
            SELECT count(*) FROM usage_records
            WHERE
                usage_records.resource = holds.resource
                AND usage_records.kind IN ('training_tokens', 'evaluation_tokens')
        )
    END AS usage_record_count
FROM holds
JOIN job_endings ON job_endings.resource = holds.resource
LEFT JOIN LATERAL (
    SELECT usage_records.unit_price_nanos_usd
    FROM usage_records
    WHERE usage_records.resource = holds.resource AND usage_records.kind IN ('training_tokens', 'evaluation_tokens')
    LIMIT 1
) AS booked ON true
WHERE
    holds.organization_id = :organization_id
    AND holds.billing_month = :billing_month
    AND holds.state = 'settled'
    AND holds.charged_nanos_usd > 0
LIMIT :row_max;

-- name: list_tuning_names(organization_id, billing_month, name_max)
-- Lists the first usage records of each job that was charged in a month.
SELECT holds.project_id, holds.resource, named.work_key
FROM holds
CROSS JOIN LATERAL (
    SELECT usage_records.kind, usage_records.start_step, usage_records.work_key
    FROM usage_records
    WHERE usage_records.resource = holds.resource AND usage_records.kind IN ('training_tokens', 'evaluation_tokens')
    ORDER BY usage_records.kind, usage_records.start_step, usage_records.work_key
    LIMIT :name_max
) AS named
WHERE
    holds.organization_id = :organization_id
    AND holds.billing_month = :billing_month
    AND holds.state = 'settled'
    AND holds.charged_nanos_usd > 0
ORDER BY holds.resource, named.kind, named.start_step, named.work_key;

-- name: list_served_names(organization_id, billing_month, name_max, scan_max)
-- Lists the first usage records of each line, as far as a bounded look at each project and day finds them.
WITH days AS (
    SELECT DISTINCT project_id, usage_day
    FROM usage_sums
    WHERE
        organization_id = :organization_id
        AND billing_month = :billing_month
        AND kind NOT IN ('training_tokens', 'evaluation_tokens')
),

seen AS (
    SELECT
        days.project_id, booked.resource, booked.kind, booked.model, booked.price_book_version,
        booked.unit_price_nanos_usd, booked.work_key, booked.usage_time,
        row_number() OVER (
            PARTITION BY
                days.project_id, booked.resource, booked.kind, booked.model, booked.price_book_version,
                booked.unit_price_nanos_usd
            ORDER BY booked.usage_time, booked.work_key
        ) AS place
    FROM days
    CROSS JOIN LATERAL (
        SELECT
            usage_records.resource, usage_records.kind, usage_records.model, usage_records.price_book_version,
            usage_records.unit_price_nanos_usd, usage_records.work_key, usage_records.usage_time,
            usage_records.billing_month
        FROM usage_records
        WHERE
            usage_records.project_id = days.project_id
            AND usage_records.usage_time >= days.usage_day::timestamp AT TIME ZONE 'UTC'
            AND usage_records.usage_time < (days.usage_day + 1)::timestamp AT TIME ZONE 'UTC'
        ORDER BY usage_records.usage_time, usage_records.work_key
        LIMIT (SELECT greatest(1, :scan_max::bigint / count(*)) FROM days)
    ) AS booked
    WHERE
        booked.billing_month = :billing_month
        AND booked.kind NOT IN ('training_tokens', 'evaluation_tokens')
)

SELECT project_id, resource, kind AS usage_kind, model, price_book_version, unit_price_nanos_usd, work_key
FROM seen
WHERE place <= :name_max
ORDER BY project_id, resource, kind, model, price_book_version, unit_price_nanos_usd, place;

-- name: get_given_back(organization_id, invoice)$
-- Sums the credit notes that correct an invoice.
SELECT coalesce(sum(amount_nanos_usd), 0)::bigint
FROM credit_notes
WHERE organization_id = :organization_id AND invoice = :invoice;

-- name: get_credit_note(organization_id, request_id)^
-- Reads the credit note of a request.
SELECT
    organization_id, request_id, number, amount_nanos_usd, reason, resource, invoice, transaction_id, billing_month,
    create_time
FROM credit_notes
WHERE organization_id = :organization_id AND request_id = :request_id;

-- name: insert_credit_note(organization_id, request_id, number, amount_nanos_usd, reason, resource, invoice, transaction_id, billing_month, create_time)!
-- Keeps a credit note for ever.
INSERT INTO credit_notes (
    organization_id, request_id, number, amount_nanos_usd, reason, resource, invoice, transaction_id, billing_month,
    create_time
) VALUES (
    :organization_id, :request_id, :number, :amount_nanos_usd, :reason, :resource, :invoice, :transaction_id,
    :billing_month, :create_time
);

-- name: list_credit_notes(organization_id, before_number, row_max)
-- Lists an organization's credit notes, newest first.
SELECT
    organization_id, request_id, number, amount_nanos_usd, reason, resource, invoice, transaction_id, billing_month,
    create_time
FROM credit_notes
WHERE organization_id = :organization_id AND (:before_number::bigint IS NULL OR number < :before_number::bigint)
ORDER BY number DESC
LIMIT :row_max;

-- name: list_month_notes(organization_id, billing_month, row_max)
-- Lists the credit notes of a month in the order of their numbers.
SELECT
    organization_id, request_id, number, amount_nanos_usd, reason, resource, invoice, transaction_id, billing_month,
    create_time
FROM credit_notes
WHERE organization_id = :organization_id AND billing_month = :billing_month
ORDER BY number
LIMIT :row_max;

-- name: get_profile(organization_id)^
-- Reads name and address of an organization.
SELECT legal_name, address_lines, tax_id, email FROM billing_profiles WHERE organization_id = :organization_id;

-- name: save_profile(organization_id, legal_name, address_lines, tax_id, email, update_time)!
-- Sets name and address of an organization for invoices that are not closed yet.
INSERT INTO billing_profiles (organization_id, legal_name, address_lines, tax_id, email, update_time)
VALUES (:organization_id, :legal_name, :address_lines, :tax_id, :email, :update_time)
ON CONFLICT (organization_id) DO UPDATE SET
    legal_name = excluded.legal_name, address_lines = excluded.address_lines, tax_id = excluded.tax_id,
    email = excluded.email, update_time = excluded.update_time;
