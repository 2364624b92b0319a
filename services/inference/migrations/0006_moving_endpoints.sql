-- Endpoints that must move are read page by page, oldest first.

DROP INDEX endpoints_moving;
CREATE INDEX endpoints_moving ON endpoints (created_at, id)
WHERE state IN ('PENDING', 'STARTING', 'READY', 'STOPPING');
