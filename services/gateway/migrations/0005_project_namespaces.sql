-- Whether inference was told that the slug is the namespace of a project's models.
ALTER TABLE projects ADD COLUMN namespace_told boolean NOT NULL DEFAULT false;
CREATE INDEX projects_untold ON projects (project_id) WHERE NOT namespace_told;
