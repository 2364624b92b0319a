-- Documents: invoices that are closed, credit notes, the names and addresses on them, and their numbers.

-- Numbers count up without gaps: a row that is locked until the commit, because a sequence loses what is rolled back.
CREATE TABLE document_numbers (
    kind text PRIMARY KEY CHECK (kind IN ('invoice', 'credit_note')),
    last_number bigint NOT NULL DEFAULT 0 CHECK (last_number >= 0)
);
INSERT INTO document_numbers (kind) VALUES ('invoice'), ('credit_note');

-- Closed invoices as they were sent: the serialized message without its digest. An open invoice has no row.
CREATE TABLE invoices (
    organization_id text NOT NULL,
    billing_month date NOT NULL CHECK (extract(day FROM billing_month) = 1),
    number bigint NOT NULL UNIQUE CHECK (number > 0),
    content bytea NOT NULL,
    sha256 bytea NOT NULL,
    total_nanos_usd bigint NOT NULL,
    close_time timestamptz NOT NULL,
    PRIMARY KEY (organization_id, billing_month),
    CONSTRAINT content_matches_digest CHECK (sha256 = sha256(content))
);

-- Money given back. The ledger transaction has the amount too; this is the paper.
CREATE TABLE credit_notes (
    organization_id text NOT NULL,
    request_id text NOT NULL,
    number bigint NOT NULL UNIQUE CHECK (number > 0),
    amount_nanos_usd bigint NOT NULL CHECK (amount_nanos_usd > 0),
    reason text NOT NULL,
    resource text NOT NULL,
    invoice text NOT NULL,
    transaction_id uuid NOT NULL UNIQUE,
    billing_month date NOT NULL CHECK (extract(day FROM billing_month) = 1),
    create_time timestamptz NOT NULL,
    PRIMARY KEY (organization_id, request_id)
);
CREATE INDEX credit_notes_billed ON credit_notes (organization_id, billing_month);
CREATE INDEX credit_notes_listed ON credit_notes (organization_id, number);

-- Name and address of an organization on invoices that are not closed yet.
CREATE TABLE billing_profiles (
    organization_id text PRIMARY KEY,
    legal_name text NOT NULL,
    address_lines text [] NOT NULL,
    tax_id text NOT NULL,
    email text NOT NULL,
    update_time timestamptz NOT NULL
);

-- A document gets the number that was just taken.
CREATE FUNCTION refuse_other_number() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM document_numbers WHERE kind = TG_ARGV[0] AND last_number = NEW.number
    ) THEN
        RAISE EXCEPTION 'a document gets the number that was taken for it, not %', NEW.number
            USING ERRCODE = 'check_violation', CONSTRAINT = 'numbers_without_gaps';
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER invoices_numbered AFTER INSERT ON invoices
FOR EACH ROW EXECUTE FUNCTION refuse_other_number('invoice');
CREATE TRIGGER credit_notes_numbered AFTER INSERT ON credit_notes
FOR EACH ROW EXECUTE FUNCTION refuse_other_number('credit_note');

-- A number is the one after the last, and cannot be committed without its document.
CREATE FUNCTION refuse_gap() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.kind <> OLD.kind OR NEW.last_number <> OLD.last_number + 1 THEN
        RAISE EXCEPTION 'numbers of documents count up by one'
            USING ERRCODE = 'check_violation', CONSTRAINT = 'numbers_without_gaps';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER document_numbers_counted BEFORE UPDATE ON document_numbers
FOR EACH ROW EXECUTE FUNCTION refuse_gap();

CREATE FUNCTION refuse_unused_number() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM invoices WHERE NEW.kind = 'invoice' AND number = NEW.last_number)
        AND NOT EXISTS (SELECT FROM credit_notes WHERE NEW.kind = 'credit_note' AND number = NEW.last_number)
    THEN
        RAISE EXCEPTION 'number % was taken and no % has it', NEW.last_number, NEW.kind
            USING ERRCODE = 'check_violation', CONSTRAINT = 'numbers_without_gaps';
    END IF;
    RETURN NULL;
END
$$;
CREATE CONSTRAINT TRIGGER document_numbers_used AFTER UPDATE ON document_numbers
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse_unused_number();

CREATE TRIGGER document_numbers_kept BEFORE DELETE OR TRUNCATE ON document_numbers
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER invoices_immutable BEFORE UPDATE OR DELETE OR TRUNCATE ON invoices
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER credit_notes_immutable BEFORE UPDATE OR DELETE OR TRUNCATE ON credit_notes
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

REVOKE UPDATE, DELETE, TRUNCATE ON invoices, credit_notes FROM CURRENT_USER;
REVOKE DELETE, TRUNCATE ON document_numbers, billing_profiles FROM CURRENT_USER;
