-- What billing said last of who may spend, by revision; and endpoints that are parked while nobody may.

CREATE TABLE credit_states (
    organization_id text PRIMARY KEY,
    state text NOT NULL,
    revision bigint NOT NULL CHECK (revision > 0),
    heard_at timestamptz NOT NULL
);
CREATE INDEX credit_states_heard ON credit_states (heard_at);

-- `api_key_id` is empty for the cap of a whole project; a cap that is reached counts until `until_time`.
CREATE TABLE spend_caps (
    project_id text NOT NULL,
    api_key_id text NOT NULL,
    capped boolean NOT NULL,
    until_time timestamptz NOT NULL,
    cap_nanos_usd bigint NOT NULL,
    revision bigint NOT NULL CHECK (revision > 0),
    heard_at timestamptz NOT NULL,
    PRIMARY KEY (project_id, api_key_id)
);
CREATE INDEX spend_caps_heard ON spend_caps (heard_at);

ALTER TABLE endpoints DROP CONSTRAINT endpoints_state_check;
ALTER TABLE endpoints ADD CONSTRAINT endpoints_state_check CHECK (
    state IN ('PENDING', 'STARTING', 'READY', 'STOPPING', 'STOPPED', 'FAILED', 'PARKED')
);
CREATE INDEX endpoints_parked ON endpoints (created_at) WHERE state = 'PARKED' AND deleted_at IS NULL;
