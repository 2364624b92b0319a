-- Events are kept as they are: compressing a large one cost more than writing it.
ALTER TABLE outbox ALTER COLUMN payload SET STORAGE EXTERNAL;
