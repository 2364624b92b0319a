-- Events of this service that wait for the bus, or were published and are kept for a while.
CREATE TABLE outbox (
    id uuid PRIMARY KEY,
    subject text NOT NULL,
    payload bytea NOT NULL,
    -- NATS headers: the CloudEvents attributes and the W3C trace context of whoever caused the event.
    headers jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- A relay that took the row has until then to publish it; afterwards any relay may take it again.
    claimed_until timestamptz,
    published_at timestamptz
);
CREATE INDEX outbox_waiting ON outbox (created_at, id) WHERE published_at IS NULL;
CREATE INDEX outbox_published ON outbox (published_at) WHERE published_at IS NOT NULL;

-- Events whose effect is in this database. The row is written in the transaction of the effect.
CREATE TABLE inbox (
    consumer text NOT NULL,
    event_id uuid NOT NULL,
    handled_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer, event_id)
);
CREATE INDEX inbox_handled ON inbox (handled_at);

-- How often the handler itself failed on an event that is still being retried.
CREATE TABLE handler_failures (
    consumer text NOT NULL,
    event_id uuid NOT NULL,
    failures integer NOT NULL,
    error text NOT NULL,
    failed_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer, event_id)
);

-- Events that were given up, kept whole so that a person can look at them and run them again.
CREATE TABLE dead_letters (
    consumer text NOT NULL,
    event_id uuid NOT NULL,
    subject text NOT NULL,
    payload bytea NOT NULL,
    headers jsonb NOT NULL,
    reason text NOT NULL,
    error text NOT NULL,
    failures integer NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer, event_id)
);
