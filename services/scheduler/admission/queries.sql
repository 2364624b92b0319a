-- name: get_origin(project_id, job_id, output_name, namespace)^
-- The job that a run continues from, by its id or by the model that it made or makes.
SELECT job_id, state, spec, base_model, base_revision, output_revision, output_artifact, model_delete_time
FROM jobs
WHERE
    project_id = :project_id
    AND (:job_id::text = '' OR job_id = :job_id::text)
    AND (:output_name::text = '' OR (output_name = :output_name::text AND state NOT IN ('FAILED', 'CANCELLED')))
    AND (:namespace::text = '' OR namespace = :namespace::text)
ORDER BY job_id DESC
LIMIT 1;

-- name: get_kept_checkpoint(project_id, job_id, step)^
-- A checkpoint whose files are kept; step -1 stands for the newest one.
SELECT step, manifest_sha256, artifact
FROM checkpoints
WHERE
    project_id = :project_id
    AND job_id = :job_id
    AND obsolete_at IS NULL
    AND (:step::bigint = -1 OR step = :step::bigint)
ORDER BY step DESC
LIMIT 1;

-- name: keep_checkpoint(project_id, job_id, step)!
-- Keeps a checkpoint from now on; it finds nothing when the checkpoint was given up already.
UPDATE checkpoints
SET asked = true
WHERE project_id = :project_id AND job_id = :job_id AND step = :step AND obsolete_at IS NULL;

-- name: keep_model(project_id, job_id)^
-- Holds off the deletion of a job's model until this transaction has written who starts from it;
-- no row when it was deleted already.
SELECT job_id
FROM jobs
WHERE project_id = :project_id AND job_id = :job_id AND model_delete_time IS NULL
FOR SHARE;

-- name: get_analysis(file_sha256, base_revision, sequence_tokens_max, train_on_inputs, preparation_version)^
-- The counts of a file under these settings, if it was analysed before by the same code.
SELECT
    example_count, token_count, labelled_token_count, truncated_count, longest_tokens, plan_sha256, format,
    preparation_version, rows_per_second, row_count, packed_sequence_count
FROM dataset_analyses
WHERE
    file_sha256 = :file_sha256
    AND base_revision = :base_revision
    AND sequence_tokens_max = :sequence_tokens_max
    AND train_on_inputs = :train_on_inputs
    AND preparation_version = :preparation_version;

-- name: prune_analyses(retention_s, batch_max)!
-- Deletes a bounded batch of old counts.
DELETE FROM dataset_analyses
WHERE (file_sha256, base_revision, sequence_tokens_max, train_on_inputs, preparation_version) IN (
    SELECT file_sha256, base_revision, sequence_tokens_max, train_on_inputs, preparation_version
    FROM dataset_analyses
    WHERE create_time < now() - make_interval(secs => :retention_s)
    ORDER BY create_time
    LIMIT :batch_max
    FOR UPDATE SKIP LOCKED
);

-- name: insert_analysis(file_sha256, base_revision, sequence_tokens_max, train_on_inputs, example_count, token_count, labelled_token_count, truncated_count, longest_tokens, plan_sha256, format, preparation_version, rows_per_second, row_count, packed_sequence_count, now)!
-- Keeps the counts of a file; the first ones stay, so that a quote and the run cannot disagree.
INSERT INTO dataset_analyses (
    file_sha256, base_revision, sequence_tokens_max, train_on_inputs, example_count, token_count,
    labelled_token_count, truncated_count, longest_tokens, plan_sha256, format,
    preparation_version, rows_per_second, row_count, packed_sequence_count, create_time
) VALUES (
    :file_sha256, :base_revision, :sequence_tokens_max, :train_on_inputs, :example_count, :token_count,
    :labelled_token_count, :truncated_count, :longest_tokens, :plan_sha256, :format,
    :preparation_version, :rows_per_second, :row_count, :packed_sequence_count, :now
)
ON CONFLICT (file_sha256, base_revision, sequence_tokens_max, train_on_inputs, preparation_version) DO NOTHING;

-- name: lock_quotes_of_key(account, subject)!
-- Lets the quotes of one API key take places one after the other, in all replicas.
SELECT pg_advisory_xact_lock(hashtextextended('quotes of ' || :account::text || ' ' || :subject::text, 0));

-- name: take_quote_place(place_id, account, subject, per_key_max, duration_s)!
-- Takes a place unless the key has as many as it gets.
INSERT INTO quote_places (place_id, account, subject, expire_time)
SELECT :place_id, :account::text, :subject::text, now() + make_interval(secs => :duration_s)
WHERE (
    SELECT count(*) FROM quote_places
    WHERE account = :account::text AND subject = :subject::text AND expire_time > now()
) < :per_key_max::bigint;

-- name: renew_quote_places(place_ids, duration_s)!
-- Puts off the end of places whose calls go on.
UPDATE quote_places SET expire_time = now() + make_interval(secs => :duration_s) WHERE place_id = ANY(:place_ids::uuid[]);

-- name: release_quote_place(place_id)!
-- Gives a place back.
DELETE FROM quote_places WHERE place_id = :place_id;

-- name: prune_quote_places(batch_max)!
-- Deletes a bounded batch of places whose process died.
DELETE FROM quote_places
WHERE place_id IN (
    SELECT place_id FROM quote_places WHERE expire_time < now() LIMIT :batch_max FOR UPDATE SKIP LOCKED
);
