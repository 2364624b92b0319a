-- What is past keeping is found by its age; docs/retention.md has the rules.
CREATE INDEX files_deleted ON files (delete_time) WHERE delete_time IS NOT NULL;
CREATE INDEX audit_log_age ON audit_log (create_time);
