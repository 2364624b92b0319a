-- Runs that start from the weights of an earlier job, and the checkpoints that have to stay for them.

ALTER TABLE jobs
    -- Encoded finemesh.nodes.v1.StartWeights; nothing for a run that starts afresh.
    ADD COLUMN start_weights bytea,
    -- Encoded finemesh.artifacts.v1.Artifact of the model that the job made.
    ADD COLUMN output_artifact bytea;
-- True for a checkpoint that the user asked for, or that another job starts from: it is not given up for newer ones.
ALTER TABLE checkpoints ADD COLUMN asked boolean NOT NULL DEFAULT false;
