-- Jobs over several nodes: each node has a lease of its own that follows the leading node's, whose token the job names.

ALTER TABLE allocations
    -- The lease of the leading node; nothing for the leading node itself and for whoever works alone.
    ADD COLUMN leader_token bigint REFERENCES allocations (lease_token);
DROP INDEX allocations_one_per_owner;
CREATE UNIQUE INDEX allocations_one_per_owner ON allocations (owner) WHERE released_at IS NULL AND leader_token IS NULL;
CREATE INDEX allocations_followers ON allocations (leader_token) WHERE released_at IS NULL AND leader_token IS NOT NULL;
