-- A quote never changes once it is held, the end of a hold is the last word, and no hold is taken away. Triggers hold for
-- the owner of the table as well, who could grant itself the rights that were revoked.

CREATE FUNCTION refuse_other_quote() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (
        NEW.resource, NEW.id, NEW.organization_id, NEW.project_id, NEW.base_model, NEW.method, NEW.training_tokens,
        NEW.validation_tokens, NEW.epochs, NEW.evaluations, NEW.parameter_count, NEW.price_book_version,
        NEW.held_nanos_usd, NEW.hold_time, NEW.api_key_id
    ) IS DISTINCT FROM (
        OLD.resource, OLD.id, OLD.organization_id, OLD.project_id, OLD.base_model, OLD.method, OLD.training_tokens,
        OLD.validation_tokens, OLD.epochs, OLD.evaluations, OLD.parameter_count, OLD.price_book_version,
        OLD.held_nanos_usd, OLD.hold_time, OLD.api_key_id
    ) THEN
        RAISE EXCEPTION 'the quote of a hold is immutable' USING ERRCODE = 'restrict_violation';
    END IF;
    -- Usage of a job that owes nothing can still come: then only the difference to its records moves.
    IF OLD.state <> 'held' AND (
        NEW.state, NEW.charged_nanos_usd, NEW.minimum_applied, NEW.billed_tokens, NEW.discrepancy, NEW.end_time,
        NEW.expire_time, NEW.billing_month
    ) IS DISTINCT FROM (
        OLD.state, OLD.charged_nanos_usd, OLD.minimum_applied, OLD.billed_tokens, OLD.discrepancy, OLD.end_time,
        OLD.expire_time, OLD.billing_month
    ) THEN
        RAISE EXCEPTION 'the end of a hold is immutable' USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER holds_quoted BEFORE UPDATE ON holds FOR EACH ROW EXECUTE FUNCTION refuse_other_quote();
CREATE TRIGGER holds_kept BEFORE DELETE OR TRUNCATE ON holds FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
