-- Deleted endpoints are found by their age; docs/retention.md has the rules.
CREATE INDEX endpoints_deleted ON endpoints (deleted_at) WHERE deleted_at IS NOT NULL;
