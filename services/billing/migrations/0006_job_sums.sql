-- What is booked for a job is asked for with each of its records that come after its ending.
CREATE INDEX usage_sums_job ON usage_sums (resource) WHERE kind IN ('training_tokens', 'evaluation_tokens');
