-- What each report and heartbeat changes is in no index, and pages keep room: such an update writes one row and no index.

-- By what a running job still needs, which each of its reports changes.
DROP INDEX jobs_running;
CREATE INDEX jobs_running ON jobs (job_id) WHERE state IN ('STARTING', 'RUNNING', 'CANCELLING');
-- By the end of a lease, which each heartbeat moves. The live ones are as many as devices are taken: the sweep reads all.
DROP INDEX allocations_live;
CREATE INDEX allocations_live ON allocations (lease_token) WHERE released_at IS NULL;

ALTER TABLE jobs SET (fillfactor = 70);
ALTER TABLE allocations SET (fillfactor = 70);
ALTER TABLE nodes SET (fillfactor = 50);
