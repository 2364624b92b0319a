-- What an operator allows a project to store; none is what the settings say.
ALTER TABLE projects
    ADD COLUMN stored_bytes_max bigint CHECK (stored_bytes_max >= 0),
    ADD COLUMN stored_files_max bigint CHECK (stored_files_max >= 0);

-- An upload under way has reserved so much for its project until its removal is due, or gone.
ALTER TABLE removals
    ADD COLUMN project_id text REFERENCES projects (project_id),
    ADD COLUMN reserved_bytes bigint NOT NULL DEFAULT 0 CHECK (reserved_bytes >= 0);
CREATE INDEX removals_of_project ON removals (project_id) WHERE project_id IS NOT NULL;

-- What a project stores is summed from here.
CREATE INDEX files_stored ON files (project_id) INCLUDE (size_bytes) WHERE delete_time IS NULL;
