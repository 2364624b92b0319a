-- The lines of metrics, one for each step, are deleted some time after a job's end; this job has none left.
ALTER TABLE jobs ADD COLUMN history_pruned boolean NOT NULL DEFAULT false;
CREATE INDEX jobs_with_old_history ON jobs (end_time) WHERE end_time IS NOT NULL AND NOT history_pruned;
