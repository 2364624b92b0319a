-- Nodes that fail fast: jobs avoid those that they failed on, and a node on which most fail is left alone for a while.

ALTER TABLE attempts
    -- True for an ending that may be the node's fault: failed or lost, and not because the node went away in good order.
    ADD COLUMN blames_node boolean NOT NULL DEFAULT false;
CREATE INDEX attempts_by_end ON attempts (end_time) WHERE end_time IS NOT NULL;
ALTER TABLE nodes
    -- The node gets no job before.
    ADD COLUMN quarantined_until timestamptz,
    -- Why it got none the last time.
    ADD COLUMN quarantine_reason text NOT NULL DEFAULT '';
