-- What is past keeping, and the indexes by which it is found; docs/retention.md has the rules.

-- What is left of the history of a job that ended: 0 all, 1 all but metric lines, 2 its transitions alone.
ALTER TABLE jobs ADD COLUMN history_stage smallint NOT NULL DEFAULT 0;
UPDATE jobs SET history_stage = 1 WHERE history_pruned;
DROP INDEX jobs_with_old_history;
ALTER TABLE jobs DROP COLUMN history_pruned;
CREATE INDEX jobs_with_old_history ON jobs (history_stage, end_time) WHERE end_time IS NOT NULL AND history_stage < 2;

-- Leases outlive the row of a node that is long gone. That a node is there is checked when it gets one.
ALTER TABLE allocations DROP CONSTRAINT allocations_node_fkey;
ALTER TABLE allocation_devices DROP CONSTRAINT allocation_devices_node_device_index_fkey;
-- Of ended ones as well: a leader is deleted only when nothing follows it.
DROP INDEX allocations_followers;
CREATE INDEX allocations_followers ON allocations (leader_token) WHERE leader_token IS NOT NULL;
CREATE INDEX allocations_served ON allocations (released_at) WHERE released_at IS NOT NULL AND kind = 'SERVING';
CREATE INDEX dataset_analyses_age ON dataset_analyses (create_time);
