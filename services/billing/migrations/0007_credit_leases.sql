-- Credit that replicas of inference reserve calls from. Leases are no entries of the ledger: they move no money and only
-- bound what may be spent, and when they come and go depends on timing, which a replay does not repeat.

-- A replica that holds leases. All of its leases live for as long as this row; time is the database's.
CREATE TABLE lease_holders (
    holder text PRIMARY KEY,
    expire_time timestamptz NOT NULL
);

-- What a lease takes away from others is `granted` less `used`: usage that is booked has left the balance itself.
CREATE TABLE credit_leases (
    lease_id text PRIMARY KEY,
    holder text NOT NULL,
    organization_id text NOT NULL,
    project_id text NOT NULL,
    api_key_id text NOT NULL,
    granted_nanos_usd bigint NOT NULL CHECK (granted_nanos_usd >= 0),
    used_nanos_usd bigint NOT NULL DEFAULT 0 CHECK (used_nanos_usd >= 0),
    -- Counts the changes of the holder, so that a late request changes nothing.
    revision bigint NOT NULL,
    -- Somebody else needs what the holder does not use.
    recalled boolean NOT NULL DEFAULT false,
    -- Set when nothing more will be reserved. The lease then waits for the usage of its last calls, without its holder.
    closed_time timestamptz
);
CREATE INDEX credit_leases_organization ON credit_leases (organization_id, project_id);
CREATE INDEX credit_leases_recalled ON credit_leases (holder) WHERE recalled;
CREATE INDEX credit_leases_closed ON credit_leases (closed_time) WHERE closed_time IS NOT NULL;
