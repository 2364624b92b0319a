-- name: ping()$
-- Finds out whether the connection still lives.
SELECT 1;

-- name: notify(payload)$
-- Tells every scheduler process, once the transaction commits, what changed.
SELECT pg_notify('scheduler', :payload);
