-- name: get_job(project_id, job_id)^
-- One job of the project.
SELECT
    project_id, job_id, organization_id, namespace, state, spec, base_model, base_revision, output_name, gpu_count,
    memory_bytes_min, counts, outlook, quoted_nanos_usd, price_book_version, hold_id, progress, error, output_revision,
    attempt_count, failure_count, waiting_message, create_time, queue_time, start_time, end_time, update_time,
    model_delete_time, last_sequence, xmin::text::bigint AS row_version
FROM jobs
WHERE job_id = :job_id AND project_id = :project_id;

-- name: get_job_by_request(project_id, request_id)^
-- The job that a request made, with the digest of that request.
SELECT job_id, request_sha256 FROM jobs WHERE project_id = :project_id AND request_id = :request_id;

-- name: list_jobs(project_id, before_job_id, page_size)
-- The project's jobs, newest first, below the last one of the page before; an id carries its time of birth.
SELECT
    project_id, job_id, organization_id, namespace, state, spec, base_model, base_revision, output_name, gpu_count,
    memory_bytes_min, counts, outlook, quoted_nanos_usd, price_book_version, hold_id, progress, error, output_revision,
    attempt_count, failure_count, waiting_message, create_time, queue_time, start_time, end_time, update_time,
    model_delete_time
FROM jobs
WHERE project_id = :project_id AND (:before_job_id::text = '' OR job_id < :before_job_id::text)
ORDER BY job_id DESC
LIMIT :page_size;

-- name: list_job_events(project_id, job_id, after_sequence, page_size)
-- A job's history after a number, oldest first.
SELECT sequence, event_time, kind, message, state, progress
FROM job_events
WHERE job_id = :job_id AND project_id = :project_id AND sequence > :after_sequence
ORDER BY sequence
LIMIT :page_size;

-- name: list_checkpoints(project_id, job_id, after_step, page_size)
-- A job's checkpoints whose files are kept, oldest first.
SELECT step, attempt, manifest_sha256, size_bytes, artifact, create_time, asked
FROM checkpoints
WHERE job_id = :job_id AND project_id = :project_id AND obsolete_at IS NULL AND step > :after_step
ORDER BY step
LIMIT :page_size;

-- name: list_files_in_use(keys)
-- Those of some artifact keys that a job which has not ended reads. A key stands in the encoded artifact as it is.
SELECT key
FROM unnest(:keys::text[]) AS key
WHERE EXISTS (
    SELECT FROM jobs
    WHERE
        jobs.project_id = split_part(key, '/', 2)
        AND jobs.end_time IS NULL
        AND (
            position(convert_to(key, 'UTF8') IN training_artifact) > 0
            OR position(convert_to(key, 'UTF8') IN validation_artifact) > 0
        )
);

-- name: list_queue_times()$
-- When each job of the one queue that all projects share came, in its order, as seconds since the epoch.
SELECT coalesce(array_agg(date_part('epoch', queue_time) ORDER BY queue_time), '{}') FROM jobs WHERE state = 'QUEUED';

-- name: list_row_versions(job_ids)
-- What tells whether rows have changed: the transaction that wrote each.
SELECT project_id, job_id, xmin::text::bigint AS row_version FROM jobs WHERE job_id = ANY(:job_ids::text[]);

-- name: list_failed_nodes(job_ids)
-- The nodes on which attempts at these jobs failed.
SELECT DISTINCT job_id, node FROM attempts WHERE job_id = ANY(:job_ids::text[]) AND blames_node;

-- name: list_queued(after_time, after_job_id, page_size)
-- The queue as the policy sees it: jobs that may start now, in order of arrival, after the last one of the page before.
SELECT
    project_id, job_id, gpu_count, memory_bytes_min, queue_time,
    array(SELECT DISTINCT node FROM attempts WHERE attempts.job_id = jobs.job_id AND blames_node) AS failed_nodes
FROM jobs
WHERE
    state = 'QUEUED'
    AND wake_at <= now()
    AND (:after_time::timestamptz IS NULL OR (queue_time, job_id) > (:after_time::timestamptz, :after_job_id::text))
ORDER BY queue_time, job_id
LIMIT :page_size;

-- name: end_pauses(claim_s)!
-- Ends all pauses, and claims that last for too long: those from a clock that was ahead would last longer by as much.
UPDATE jobs
SET
    wake_at = least(wake_at, now()),
    claimed_until = least(claimed_until, now() + make_interval(secs => :claim_s))
WHERE
    (end_time IS NULL OR release_pending)
    AND (wake_at > now() OR claimed_until > now() + make_interval(secs => :claim_s));

-- name: list_remaining()
-- What running jobs, of which there are at most as many as devices, still need: what they said, less the time since.
SELECT greatest(0, remaining_s - date_part('epoch', now() - progress_time)) AS remaining_s
FROM jobs
WHERE state IN ('STARTING', 'RUNNING', 'CANCELLING') AND remaining_s IS NOT NULL
ORDER BY 1;

-- name: insert_job(job_id, project_id, organization_id, api_key_id, namespace, request_id, request_sha256, state, spec, base_model, base_revision, parameter_count, output_name, gpu_count, memory_bytes_min, base_artifact, training_artifact, validation_artifact, dataset_bytes, start_weights, start_model_job_id, now)!
-- Stores an acknowledged job.
INSERT INTO jobs (
    job_id, project_id, organization_id, api_key_id, namespace, request_id, request_sha256, state, spec, base_model,
    base_revision, parameter_count, output_name, gpu_count, memory_bytes_min, base_artifact, training_artifact,
    validation_artifact, dataset_bytes, start_weights, start_model_job_id, wake_at, create_time, update_time
) VALUES (
    :job_id, :project_id, :organization_id, :api_key_id, :namespace, :request_id, :request_sha256, :state, :spec,
    :base_model, :base_revision, :parameter_count, :output_name, :gpu_count, :memory_bytes_min, :base_artifact,
    :training_artifact, :validation_artifact, :dataset_bytes, :start_weights, :start_model_job_id, now(), :now, :now
);

-- name: transition_job(project_id, job_id, sources, destination, now, leased, final, claim, lease_token, placed_token, counts, outlook, quoted_nanos_usd, price_book_version, hold_id, error, output_revision, output_artifact, wake_delay_s, failure_count, start_weights, lines_before)^
-- Moves a job if its state allows it and the named claim or lease is in force; what is not given stays.
UPDATE jobs
SET
    state = :destination::text,
    counts = coalesce(:counts::bytea, counts),
    outlook = coalesce(:outlook::bytea, outlook),
    quoted_nanos_usd = coalesce(:quoted_nanos_usd::bigint, quoted_nanos_usd),
    price_book_version = coalesce(:price_book_version::text, price_book_version),
    hold_id = coalesce(:hold_id::text, hold_id),
    -- A hold that may exist without our knowledge has to be released.
    release_pending = :final::boolean AND hold_requested AND hold_id = '',
    -- Only a job that a node has, or is about to have, names a lease.
    lease_token = CASE WHEN :leased::boolean THEN coalesce(:placed_token::bigint, lease_token) END,
    attempt_count = attempt_count + CASE WHEN :placed_token::bigint IS NULL THEN 0 ELSE 1 END,
    failure_count = coalesce(:failure_count::integer, failure_count),
    start_weights = coalesce(:start_weights::bytea, start_weights),
    error = coalesce(:error::bytea, error),
    output_revision = coalesce(:output_revision::text, output_revision),
    output_artifact = coalesce(:output_artifact::bytea, output_artifact),
    wake_at = now() + make_interval(secs => coalesce(:wake_delay_s::double precision, 0)),
    -- An answer under a claim gives the claim back; a cancellation leaves it to the worker that has it.
    claim_token = CASE WHEN :claim::uuid IS NULL THEN claim_token END,
    claimed_until = CASE WHEN :claim::uuid IS NULL THEN claimed_until END,
    service_failures = CASE WHEN :destination::text = 'QUEUED' THEN 0 ELSE service_failures END,
    waiting_message = '',
    -- The order of the queue follows the database's time, whichever replica writes; a job that is requeued keeps its
    -- place.
    queue_time = CASE WHEN :destination::text = 'QUEUED' THEN coalesce(queue_time, now()) ELSE queue_time END,
    start_time = CASE WHEN :destination::text = 'RUNNING' THEN coalesce(start_time, :now::timestamptz)
        ELSE start_time END,
    end_time = CASE WHEN :final::boolean THEN :now::timestamptz END,
    update_time = :now::timestamptz,
    last_sequence = last_sequence + 1 + coalesce(:lines_before::integer, 0)
WHERE
    project_id = :project_id
    AND job_id = :job_id
    AND state = ANY(:sources::text[])
    AND (:claim::uuid IS NULL OR claim_token = :claim::uuid)
    AND (:lease_token::bigint IS NULL OR lease_token = :lease_token::bigint)
RETURNING
    project_id, job_id, organization_id, old.state AS from_state, new.state AS to_state, new.last_sequence AS sequence,
    new.start_time AS start_time, new.attempt_count AS attempt_count;

-- name: add_job_event(project_id, job_id, sequence, now, kind, message, state, progress)!
-- Writes one line of a job's history.
INSERT INTO job_events (project_id, job_id, sequence, event_time, kind, message, state, progress)
VALUES (:project_id, :job_id, :sequence, :now, :kind, :message, :state, :progress);

-- name: add_job_events(project_id, job_id, sequences, now, kinds, messages, state, progresses)!
-- Writes several lines of a job's history at once.
INSERT INTO job_events (project_id, job_id, sequence, event_time, kind, message, state, progress)
SELECT
    :project_id::text, :job_id::text, line.sequence, :now::timestamptz, line.kind, line.message, :state::text,
    line.progress
FROM unnest(:sequences::bigint[], :kinds::text[], :messages::text[], :progresses::bytea[])
    AS line (sequence, kind, message, progress);

-- name: take_sequences(project_id, job_id, count, now)$
-- Takes the next numbers of a job's history and returns the last of them; the row lock keeps them without gaps.
UPDATE jobs
SET last_sequence = last_sequence + :count, update_time = :now
WHERE project_id = :project_id AND job_id = :job_id
RETURNING last_sequence;

-- name: count_usage(project_id, job_id)$
-- How many usage records a job has.
SELECT count(*) FROM job_usage WHERE project_id = :project_id AND job_id = :job_id;

-- name: insert_folder(project_id, job_id)!
-- Notes that the folder of a job that ended is to be cleaned.
INSERT INTO job_folders (job_id, project_id) VALUES (:job_id, :project_id) ON CONFLICT (job_id) DO NOTHING;

-- name: insert_job_secrets(project_id, job_id, sealed, now)!
-- Keeps what a job's integrations are opened with, sealed.
INSERT INTO job_secrets (job_id, project_id, sealed, create_time) VALUES (:job_id, :project_id, :sealed, :now);

-- name: get_job_secrets(project_id, job_id, lease_token)^
-- The sealed secrets of a job, or none, for the node that holds its lease or follows it in a gang; no row for others.
SELECT job_secrets.sealed
FROM jobs
LEFT JOIN job_secrets ON job_secrets.job_id = jobs.job_id
WHERE
    jobs.project_id = :project_id
    AND jobs.job_id = :job_id
    AND (
        jobs.lease_token = :lease_token
        OR EXISTS (
            SELECT 1
            FROM allocations
            WHERE
                allocations.lease_token = :lease_token
                AND allocations.leader_token = jobs.lease_token
                AND allocations.released_at IS NULL
        )
    );

-- name: delete_job_secrets(project_id, job_id)!
-- Forgets them.
DELETE FROM job_secrets WHERE project_id = :project_id AND job_id = :job_id;
