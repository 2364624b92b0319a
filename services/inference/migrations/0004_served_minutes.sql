-- Minutes count from confirmation to confirmation; a new period begins where the last billed minute ended.

ALTER TABLE endpoints ADD COLUMN paid_until timestamptz;
ALTER TABLE endpoints DROP COLUMN period_minutes;
