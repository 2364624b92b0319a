-- Rows of both tables come and go at the rate of events. By default a fifth of a table has to be dead before VACUUM comes,
-- which for a week of events is a day of them.
ALTER TABLE outbox SET (autovacuum_vacuum_scale_factor = 0.02);
ALTER TABLE inbox SET (autovacuum_vacuum_scale_factor = 0.02);
