-- What is known of the streams that this service publishes to. A server that lost its disk has another incarnation of a
-- stream, or an earlier end of it: then the events that were not handled everywhere are published again.
CREATE TABLE streams (
    family text PRIMARY KEY,
    -- When the server made the stream, in the server's words.
    incarnation text NOT NULL,
    -- Counts the losses; a relay that claimed an event before one cannot say that it is published.
    epoch integer NOT NULL DEFAULT 1,
    -- The last place in the stream that the server was seen to have.
    last_sequence bigint NOT NULL,
    -- What the bus took before this time, every reader has handled.
    handled_time timestamptz NOT NULL DEFAULT '-infinity',
    -- A place in the stream and when it was seen: once it is handled, that time is the one above.
    seen_sequence bigint NOT NULL,
    seen_time timestamptz NOT NULL,
    -- Events published in between wait to be published again.
    again_from timestamptz,
    again_until timestamptz
);
