-- Which jobs may still read a file is asked before its bytes are removed.
CREATE INDEX jobs_under_way_by_project ON jobs (project_id) WHERE end_time IS NULL;
