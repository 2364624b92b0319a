-- Quotes and previews that wait for an analysis: one row each, which ends with its call, or by its lease when its
-- process died.
CREATE TABLE quote_places (
    place_id uuid PRIMARY KEY,
    account text NOT NULL,
    subject text NOT NULL,
    expire_time timestamptz NOT NULL
);
CREATE INDEX quote_places_of_key ON quote_places (account, subject);
