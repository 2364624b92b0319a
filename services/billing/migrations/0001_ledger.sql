-- The price books that have been in force. A version never changes once it is here.
CREATE TABLE price_books (
    version text PRIMARY KEY,
    book text NOT NULL,
    source text NOT NULL
);

-- One row per organization and account. The balance is the sum of the account's postings; a trigger keeps it.
CREATE TABLE accounts (
    organization_id text NOT NULL,
    account text NOT NULL CHECK (account IN ('funding', 'prepaid', 'held', 'receivable', 'revenue')),
    balance_nanos_usd bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (organization_id, account),
    CONSTRAINT balance_on_its_side CHECK (
        CASE WHEN account IN ('funding', 'receivable') THEN balance_nanos_usd <= 0 ELSE balance_nanos_usd >= 0 END
    )
);

-- The id follows from the work and the time from its event: no column here depends on when a row was written.
CREATE TABLE transactions (
    id uuid PRIMARY KEY,
    kind text NOT NULL CHECK (kind IN ('top_up', 'hold', 'release', 'settlement', 'inference', 'endpoint')),
    organization_id text NOT NULL,
    resource text NOT NULL,
    price_book_version text NOT NULL,
    transaction_time timestamptz NOT NULL,
    UNIQUE (id, organization_id)
);
CREATE INDEX transactions_resource ON transactions (resource);
CREATE INDEX transactions_organization ON transactions (organization_id, transaction_time);

CREATE TABLE postings (
    transaction_id uuid NOT NULL,
    organization_id text NOT NULL,
    account text NOT NULL,
    amount_nanos_usd bigint NOT NULL CHECK (amount_nanos_usd <> 0),
    PRIMARY KEY (transaction_id, account),
    FOREIGN KEY (transaction_id, organization_id) REFERENCES transactions (id, organization_id),
    FOREIGN KEY (organization_id, account) REFERENCES accounts (organization_id, account)
);

-- The quote of a job and the money held for it: the numbers that were priced, and the book that priced them.
CREATE TABLE holds (
    resource text PRIMARY KEY,
    id text NOT NULL UNIQUE,
    organization_id text NOT NULL,
    project_id text NOT NULL,
    state text NOT NULL CHECK (state IN ('held', 'settled', 'released')),
    base_model text NOT NULL,
    method text NOT NULL,
    training_tokens bigint NOT NULL CHECK (training_tokens > 0),
    validation_tokens bigint NOT NULL CHECK (validation_tokens >= 0),
    epochs integer NOT NULL CHECK (epochs > 0),
    evaluations integer NOT NULL CHECK (evaluations >= 0),
    parameter_count bigint NOT NULL CHECK (parameter_count >= 0),
    price_book_version text NOT NULL REFERENCES price_books (version),
    held_nanos_usd bigint NOT NULL CHECK (held_nanos_usd >= 0),
    charged_nanos_usd bigint NOT NULL DEFAULT 0,
    minimum_applied boolean NOT NULL DEFAULT false,
    billed_tokens bigint NOT NULL DEFAULT 0,
    -- What contradicts the quote, in words; empty when nothing does.
    discrepancy text NOT NULL DEFAULT '',
    hold_time timestamptz NOT NULL,
    -- When the job ended; set when the hold is settled or released.
    end_time timestamptz,
    CHECK (charged_nanos_usd BETWEEN 0 AND held_nanos_usd),
    CHECK ((state = 'held') = (end_time IS NULL))
);
CREATE INDEX holds_ended ON holds (organization_id, end_time) WHERE state = 'settled';

-- How jobs ended. A row whose hold is still held is a pending settlement: it waits for the rest of its usage.
CREATE TABLE job_endings (
    resource text PRIMARY KEY,
    organization_id text NOT NULL,
    project_id text NOT NULL,
    ending text NOT NULL,
    usage_record_count bigint NOT NULL CHECK (usage_record_count >= 0),
    end_time timestamptz NOT NULL
);

-- Priced facts, one row for each piece of work: the id follows from project and work key.
CREATE TABLE usage_records (
    id uuid PRIMARY KEY,
    work_key text NOT NULL,
    kind text NOT NULL CHECK (
        kind IN ('training_tokens', 'evaluation_tokens', 'input_tokens', 'output_tokens', 'endpoint_minutes')
    ),
    organization_id text NOT NULL,
    project_id text NOT NULL,
    resource text NOT NULL,
    -- The base model whose price applies; of a dedicated endpoint, the type of its devices.
    model text NOT NULL,
    quantity bigint NOT NULL CHECK (quantity >= 0),
    -- Price of a million tokens, or of one device minute.
    unit_price_nanos_usd bigint NOT NULL CHECK (unit_price_nanos_usd >= 0),
    amount_nanos_usd bigint NOT NULL CHECK (amount_nanos_usd >= 0),
    price_book_version text NOT NULL REFERENCES price_books (version),
    start_step bigint NOT NULL DEFAULT 0,
    end_step bigint NOT NULL DEFAULT 0,
    usage_time timestamptz NOT NULL,
    UNIQUE (project_id, work_key)
);
CREATE INDEX usage_records_project ON usage_records (project_id, usage_time DESC, id DESC);
CREATE INDEX usage_records_resource ON usage_records (resource, kind, start_step);
CREATE INDEX usage_records_month ON usage_records (organization_id, usage_time);

CREATE FUNCTION add_to_balances() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE accounts
    SET balance_nanos_usd = accounts.balance_nanos_usd + added.amount_nanos_usd
    FROM (
        SELECT organization_id, account, sum(amount_nanos_usd)::bigint AS amount_nanos_usd
        FROM new_postings
        GROUP BY organization_id, account
    ) AS added
    WHERE accounts.organization_id = added.organization_id AND accounts.account = added.account;
    RETURN NULL;
END
$$;
CREATE TRIGGER postings_balance AFTER INSERT ON postings
REFERENCING NEW TABLE AS new_postings
FOR EACH STATEMENT EXECUTE FUNCTION add_to_balances();

CREATE FUNCTION refuse_unbalanced() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    checked uuid := CASE TG_TABLE_NAME WHEN 'transactions' THEN (to_jsonb(NEW) ->> 'id')::uuid
                                       ELSE (to_jsonb(NEW) ->> 'transaction_id')::uuid END;
    total numeric;
    entries bigint;
BEGIN
    SELECT coalesce(sum(amount_nanos_usd), 0), count(*) INTO total, entries FROM postings WHERE transaction_id = checked;
    IF total <> 0 OR entries < 2 THEN
        RAISE EXCEPTION 'transaction % has % postings that sum to %', checked, entries, total
            USING ERRCODE = 'check_violation', CONSTRAINT = 'postings_sum_to_zero';
    END IF;
    RETURN NULL;
END
$$;
CREATE CONSTRAINT TRIGGER transactions_balanced AFTER INSERT ON transactions
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse_unbalanced();
CREATE CONSTRAINT TRIGGER postings_balanced AFTER INSERT ON postings
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse_unbalanced();

CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is immutable: a correction is a new entry', TG_TABLE_NAME
        USING ERRCODE = 'restrict_violation';
END
$$;
CREATE TRIGGER price_books_immutable BEFORE UPDATE OR DELETE OR TRUNCATE ON price_books
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER transactions_immutable BEFORE UPDATE OR DELETE OR TRUNCATE ON transactions
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER postings_immutable BEFORE UPDATE OR DELETE OR TRUNCATE ON postings
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER job_endings_immutable BEFORE UPDATE OR DELETE OR TRUNCATE ON job_endings
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER usage_records_immutable BEFORE UPDATE OR DELETE OR TRUNCATE ON usage_records
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER accounts_kept BEFORE DELETE OR TRUNCATE ON accounts
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
