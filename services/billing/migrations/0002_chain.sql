-- Each organization's ledger becomes a chain of hashes, usage is summed as it is booked, and the checks of the ledger
-- run once per statement instead of once per row.

-- The head of each organization's chain. Whoever decides about its money locks this row first.
CREATE TABLE chains (
    organization_id text PRIMARY KEY,
    position bigint NOT NULL DEFAULT 0 CHECK (position >= 0),
    hash bytea NOT NULL DEFAULT decode(repeat('00', 32), 'hex') CHECK (length(hash) = 32),
    -- The last entry whose postings came; at commit the same as `position`.
    posted_position bigint NOT NULL DEFAULT 0 CHECK (posted_position BETWEEN 0 AND position)
);

DROP TRIGGER transactions_balanced ON transactions;
DROP TRIGGER postings_balanced ON postings;
DROP TRIGGER postings_balance ON postings;
DROP TRIGGER transactions_immutable ON transactions;
DROP TRIGGER postings_immutable ON postings;
DROP TRIGGER usage_records_immutable ON usage_records;
DROP FUNCTION add_to_balances();
DROP FUNCTION refuse_unbalanced();

-- A key into a table whose owner may not UPDATE it cannot be checked by the owner, and cost a lookup per row: the
-- triggers below check whole statements instead, and `verify` the versions of price books.
ALTER TABLE postings DROP CONSTRAINT postings_transaction_id_organization_id_fkey;
ALTER TABLE postings DROP CONSTRAINT postings_organization_id_account_fkey;
ALTER TABLE holds DROP CONSTRAINT holds_price_book_version_fkey;
ALTER TABLE usage_records DROP CONSTRAINT usage_records_price_book_version_fkey;

-- Transactions: their place in the chain.
ALTER TABLE transactions ADD COLUMN position bigint, ADD COLUMN hash bytea;
UPDATE transactions SET position = numbered.position
FROM (
    SELECT id, row_number() OVER (PARTITION BY organization_id ORDER BY transaction_time, id) AS position
    FROM transactions
) AS numbered
WHERE transactions.id = numbered.id;

-- Postings: beside their transaction in the order of the chain, so that an insert touches the same pages again.
ALTER TABLE postings ADD COLUMN position bigint;
UPDATE postings SET position = transactions.position FROM transactions WHERE transactions.id = postings.transaction_id;
ALTER TABLE postings DROP CONSTRAINT postings_pkey;
ALTER TABLE postings DROP COLUMN transaction_id;
ALTER TABLE postings ALTER COLUMN position SET NOT NULL;
ALTER TABLE postings ADD PRIMARY KEY (organization_id, position, account);

-- The hash of an entry, over the one before it; docs/ledger.md says the same in words.
CREATE FUNCTION entry_hash(previous bytea, entry transactions) RETURNS bytea LANGUAGE sql STABLE AS $$
    SELECT sha256(previous || convert_to(
        concat_ws(
            E'\n', entry.id, entry.kind, entry.organization_id, entry.resource, entry.price_book_version,
            (extract(epoch FROM entry.transaction_time) * 1000000)::bigint,
            string_agg(postings.account || ' ' || postings.amount_nanos_usd, E'\n' ORDER BY postings.account COLLATE "C")
        ),
        'UTF8'
    ))
    FROM postings
    WHERE postings.organization_id = entry.organization_id AND postings.position = entry.position
$$;

DO $$
DECLARE
    entry transactions;
    chain text := '';
    last bytea;
BEGIN
    FOR entry IN SELECT * FROM transactions ORDER BY organization_id, position LOOP
        IF entry.organization_id <> chain THEN
            chain := entry.organization_id;
            last := decode(repeat('00', 32), 'hex');
        END IF;
        last := entry_hash(last, entry);
        UPDATE transactions SET hash = last WHERE id = entry.id;
        INSERT INTO chains (organization_id, position, hash, posted_position)
        VALUES (chain, entry.position, last, entry.position)
        ON CONFLICT (organization_id) DO UPDATE
        SET position = excluded.position, hash = excluded.hash, posted_position = excluded.posted_position;
    END LOOP;
END
$$;

ALTER TABLE transactions ALTER COLUMN position SET NOT NULL;
ALTER TABLE transactions ALTER COLUMN hash SET NOT NULL;
ALTER TABLE transactions ADD CHECK (length(hash) = 32);
ALTER TABLE transactions DROP CONSTRAINT transactions_id_organization_id_key;
ALTER TABLE transactions ADD CONSTRAINT transactions_chain UNIQUE (organization_id, position);
ALTER TABLE transactions DROP CONSTRAINT transactions_kind_check;
ALTER TABLE transactions ADD CONSTRAINT transactions_kind_check CHECK (
    kind IN ('top_up', 'hold', 'release', 'settlement', 'inference', 'endpoint', 'cluster', 'credit_note')
);
DROP INDEX transactions_organization;
DROP INDEX transactions_resource;
CREATE INDEX transactions_job ON transactions (resource) WHERE kind IN ('hold', 'release', 'settlement');

-- Holds: when they end by themselves, whose cap they count for, and which invoice has the charge.
ALTER TABLE holds ADD COLUMN api_key_id text NOT NULL DEFAULT '';
ALTER TABLE holds ADD COLUMN expire_time timestamptz;
UPDATE holds SET expire_time = hold_time + interval '1 day';
ALTER TABLE holds ALTER COLUMN expire_time SET NOT NULL;
ALTER TABLE holds ADD COLUMN billing_month date CHECK (extract(day FROM billing_month) = 1);
-- The charge less what the job's usage records are worth: minimum, base fee, what was not owed.
ALTER TABLE holds ADD COLUMN adjustment_nanos_usd bigint NOT NULL DEFAULT 0;
UPDATE holds SET billing_month = date_trunc('month', end_time AT TIME ZONE 'UTC') WHERE state = 'settled';
UPDATE holds SET adjustment_nanos_usd = charged_nanos_usd - coalesce(
    (SELECT sum(amount_nanos_usd)::bigint FROM usage_records WHERE usage_records.resource = holds.resource), 0
) WHERE state = 'settled';
ALTER TABLE holds DROP CONSTRAINT holds_state_check;
ALTER TABLE holds ADD CONSTRAINT holds_state_check CHECK (state IN ('held', 'settled', 'released', 'expired'));
ALTER TABLE holds ADD CHECK ((state = 'settled') = (billing_month IS NOT NULL));
DROP INDEX holds_ended;
CREATE INDEX holds_billed ON holds (organization_id, billing_month) WHERE state = 'settled';
CREATE INDEX holds_open ON holds (expire_time) WHERE state = 'held';
CREATE INDEX holds_project ON holds (project_id) WHERE state = 'held';

-- Usage: found by its work key alone, whose order is nearly that of time, so that an insert stays cheap however many
-- records there are. The public id follows from project and work key.
ALTER TABLE usage_records ADD COLUMN api_key_id text NOT NULL DEFAULT '';
ALTER TABLE usage_records ADD COLUMN billing_month date;
UPDATE usage_records SET billing_month = date_trunc('month', usage_time AT TIME ZONE 'UTC');
ALTER TABLE usage_records ALTER COLUMN billing_month SET NOT NULL;
ALTER TABLE usage_records ADD CHECK (extract(day FROM billing_month) = 1);
-- The ledger transaction that posted it; empty for a job's records, which its settlement posts.
ALTER TABLE usage_records ADD COLUMN transaction_id uuid;
UPDATE usage_records SET transaction_id = transactions.id
FROM transactions
WHERE usage_records.kind IN ('input_tokens', 'output_tokens', 'endpoint_minutes')
    AND transactions.kind IN ('inference', 'endpoint')
    AND transactions.organization_id = usage_records.organization_id
    AND transactions.resource = usage_records.resource
    AND transactions.transaction_time = usage_records.usage_time;
DROP INDEX usage_records_project;
DROP INDEX usage_records_resource;
DROP INDEX usage_records_month;
ALTER TABLE usage_records DROP CONSTRAINT usage_records_pkey;
ALTER TABLE usage_records DROP CONSTRAINT usage_records_project_id_work_key_key;
ALTER TABLE usage_records DROP COLUMN id;
ALTER TABLE usage_records ADD PRIMARY KEY (project_id, work_key);
CREATE INDEX usage_records_time ON usage_records (project_id, usage_time);
CREATE INDEX usage_records_job ON usage_records (resource, kind, start_step)
WHERE kind IN ('training_tokens', 'evaluation_tokens');
ALTER TABLE usage_records DROP CONSTRAINT usage_records_kind_check;
ALTER TABLE usage_records ADD CONSTRAINT usage_records_kind_check CHECK (
    kind IN (
        'training_tokens', 'evaluation_tokens', 'input_tokens', 'output_tokens', 'endpoint_minutes', 'cluster_hours'
    )
);

-- Usage summed by everything that an invoice, a report or a cap asks for; a trigger keeps it, nobody else writes it.
CREATE TABLE usage_sums (
    organization_id text NOT NULL,
    billing_month date NOT NULL,
    project_id text NOT NULL,
    api_key_id text NOT NULL,
    usage_day date NOT NULL,
    kind text NOT NULL,
    resource text NOT NULL,
    model text NOT NULL,
    price_book_version text NOT NULL,
    unit_price_nanos_usd bigint NOT NULL,
    quantity bigint NOT NULL,
    amount_nanos_usd bigint NOT NULL,
    record_count bigint NOT NULL,
    PRIMARY KEY (
        organization_id, billing_month, project_id, api_key_id, usage_day, kind, resource, model, price_book_version,
        unit_price_nanos_usd
    )
);
CREATE INDEX usage_sums_day ON usage_sums (organization_id, usage_day);

INSERT INTO usage_sums
SELECT
    organization_id, billing_month, project_id, api_key_id, (usage_time AT TIME ZONE 'UTC')::date, kind, resource, model,
    price_book_version, unit_price_nanos_usd, sum(quantity)::bigint, sum(amount_nanos_usd)::bigint, count(*)
FROM usage_records
GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10;

CREATE FUNCTION add_to_sums() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO usage_sums AS sums
    SELECT
        organization_id, billing_month, project_id, api_key_id, (usage_time AT TIME ZONE 'UTC')::date AS usage_day, kind,
        resource, model, price_book_version, unit_price_nanos_usd,
        sum(quantity)::bigint, sum(amount_nanos_usd)::bigint, count(*)
    FROM new_records
    GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10
    ORDER BY 1, 2, 3, 4, 5, 6, 7, 8, 9, 10
    ON CONFLICT (
        organization_id, billing_month, project_id, api_key_id, usage_day, kind, resource, model, price_book_version,
        unit_price_nanos_usd
    ) DO UPDATE SET
        quantity = sums.quantity + excluded.quantity,
        amount_nanos_usd = sums.amount_nanos_usd + excluded.amount_nanos_usd,
        record_count = sums.record_count + excluded.record_count;
    RETURN NULL;
END
$$;
CREATE TRIGGER usage_records_summed AFTER INSERT ON usage_records
REFERENCING NEW TABLE AS new_records
FOR EACH STATEMENT EXECUTE FUNCTION add_to_sums();

-- New heads of transactions continue their chains without a gap; this is the only writer of `chains`.
CREATE FUNCTION extend_chains() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    extended bigint;
BEGIN
    UPDATE chains SET position = added.last_position, hash = added.last_hash
    FROM (
        SELECT
            organization_id,
            min(position) AS first_position,
            max(position) AS last_position,
            count(*) AS entries,
            (array_agg(hash ORDER BY position DESC))[1] AS last_hash
        FROM new_transactions
        GROUP BY organization_id
    ) AS added
    WHERE chains.organization_id = added.organization_id
        AND added.first_position = chains.position + 1
        AND added.last_position = chains.position + added.entries;
    GET DIAGNOSTICS extended = ROW_COUNT;
    IF extended <> (SELECT count(DISTINCT organization_id) FROM new_transactions) THEN
        RAISE EXCEPTION 'a transaction does not continue the chain of its organization'
            USING ERRCODE = 'check_violation', CONSTRAINT = 'chain_without_gaps';
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER transactions_chained AFTER INSERT ON transactions
REFERENCING NEW TABLE AS new_transactions
FOR EACH STATEMENT EXECUTE FUNCTION extend_chains();

-- Postings come whole, right after their heads and never again: a statement brings those of the entries that wait for
-- theirs, from the first one on. Adds them to the balances.
CREATE FUNCTION enter_postings() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    entered bigint;
    unbalanced bigint;
    moved bigint;
BEGIN
    SELECT count(*) INTO unbalanced
    FROM (
        SELECT FROM new_postings GROUP BY organization_id, position HAVING sum(amount_nanos_usd) <> 0 OR count(*) < 2
    ) AS wrong;
    IF unbalanced > 0 THEN
        RAISE EXCEPTION 'the postings of a transaction are fewer than two or do not sum to zero'
            USING ERRCODE = 'check_violation', CONSTRAINT = 'postings_sum_to_zero';
    END IF;
    UPDATE chains SET posted_position = added.last_position
    FROM (
        SELECT
            organization_id,
            min(position) AS first_position,
            max(position) AS last_position,
            count(DISTINCT position) AS entries
        FROM new_postings
        GROUP BY organization_id
    ) AS added
    WHERE chains.organization_id = added.organization_id
        AND added.first_position = chains.posted_position + 1
        AND added.last_position = chains.posted_position + added.entries
        AND added.last_position <= chains.position;
    GET DIAGNOSTICS entered = ROW_COUNT;
    IF entered <> (SELECT count(DISTINCT organization_id) FROM new_postings) THEN
        RAISE EXCEPTION 'postings belong to a transaction that waits for them, and come once'
            USING ERRCODE = 'check_violation', CONSTRAINT = 'postings_once';
    END IF;
    UPDATE accounts
    SET balance_nanos_usd = accounts.balance_nanos_usd + added.amount_nanos_usd
    FROM (
        SELECT organization_id, account, sum(amount_nanos_usd)::bigint AS amount_nanos_usd
        FROM new_postings
        GROUP BY organization_id, account
    ) AS added
    WHERE accounts.organization_id = added.organization_id AND accounts.account = added.account;
    GET DIAGNOSTICS moved = ROW_COUNT;
    IF moved <> (SELECT count(*) FROM (SELECT DISTINCT organization_id, account FROM new_postings) AS added) THEN
        RAISE EXCEPTION 'a posting names an account that does not exist'
            USING ERRCODE = 'foreign_key_violation', CONSTRAINT = 'postings_account';
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER postings_entered AFTER INSERT ON postings
REFERENCING NEW TABLE AS new_postings
FOR EACH STATEMENT EXECUTE FUNCTION enter_postings();

-- A head whose postings did not come cannot be committed.
CREATE FUNCTION refuse_unposted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (
        SELECT FROM chains WHERE organization_id = NEW.organization_id AND posted_position <> position
    ) THEN
        RAISE EXCEPTION 'a transaction of % has no postings that sum to zero', NEW.organization_id
            USING ERRCODE = 'check_violation', CONSTRAINT = 'postings_sum_to_zero';
    END IF;
    RETURN NULL;
END
$$;
CREATE CONSTRAINT TRIGGER chains_posted AFTER UPDATE ON chains
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse_unposted();

-- Balances, heads of chains and sums are written by the triggers above and by nobody else.
CREATE FUNCTION refuse_direct_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF pg_trigger_depth() < 2 THEN
        RAISE EXCEPTION '% follows from other rows and cannot be set', TG_TABLE_NAME
            USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER accounts_derived BEFORE UPDATE ON accounts
FOR EACH STATEMENT EXECUTE FUNCTION refuse_direct_change();
CREATE TRIGGER chains_derived BEFORE UPDATE ON chains
FOR EACH STATEMENT EXECUTE FUNCTION refuse_direct_change();
CREATE TRIGGER usage_sums_derived BEFORE INSERT OR UPDATE ON usage_sums
FOR EACH STATEMENT EXECUTE FUNCTION refuse_direct_change();
CREATE TRIGGER chains_kept BEFORE DELETE OR TRUNCATE ON chains
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER usage_sums_kept BEFORE DELETE OR TRUNCATE ON usage_sums
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER transactions_immutable BEFORE UPDATE OR DELETE OR TRUNCATE ON transactions
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER postings_immutable BEFORE UPDATE OR DELETE OR TRUNCATE ON postings
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER usage_records_immutable BEFORE UPDATE OR DELETE OR TRUNCATE ON usage_records
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

-- Twice held: the owner itself lost the right, and a superuser who has it meets the triggers.
REVOKE UPDATE, DELETE, TRUNCATE ON price_books, transactions, postings, job_endings, usage_records FROM CURRENT_USER;
REVOKE DELETE, TRUNCATE ON accounts, chains, holds, usage_sums FROM CURRENT_USER;
