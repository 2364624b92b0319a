-- An endpoint that holds devices belongs to one process, until the time of its claim is over by the database's clock.
-- The claim's token is the lease token of the devices. Devices under `lease_after` or an older token are never taken
-- up again: an engine of a process that is away may still be on them.

ALTER TABLE endpoints
    ADD COLUMN owner text NOT NULL DEFAULT '',
    ADD COLUMN owner_address text NOT NULL DEFAULT '',
    ADD COLUMN claim_until timestamptz,
    ADD COLUMN lease_after bigint NOT NULL DEFAULT 0;
-- Nobody is known to look after what is held now.
UPDATE endpoints SET owner = 'before-claims', claim_until = now() WHERE lease_token IS NOT NULL;
ALTER TABLE endpoints ADD CONSTRAINT endpoints_claimed_with_devices CHECK (
    (lease_token IS NULL) = (owner = '') AND (owner = '') = (claim_until IS NULL)
);
CREATE INDEX endpoints_owned ON endpoints (owner) WHERE owner <> '';
