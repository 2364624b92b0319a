-- Jobs: reading.

-- name: get_job(project_id, job_id)^
-- One job of the project.
SELECT
    project_id, job_id, organization_id, namespace, state, spec, base_model, base_revision, output_name, gpu_count,
    memory_bytes_min, counts, quoted_nanos_usd, price_book_version, hold_id, progress, error, output_revision,
    attempt_count, failure_count, waiting_message, create_time, queue_time, start_time, end_time, update_time
FROM jobs
WHERE job_id = :job_id AND project_id = :project_id;

-- name: get_job_by_request(project_id, request_id)^
-- The job that a request made, with the digest of that request.
SELECT job_id, request_sha256 FROM jobs WHERE project_id = :project_id AND request_id = :request_id;

-- name: get_origin(project_id, job_id, output_name, namespace)^
-- The job that a run continues from, by its id or by the model that it made or makes.
SELECT job_id, state, spec, base_model, base_revision, output_revision, output_artifact
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

-- name: list_jobs(project_id, before_job_id, page_size)
-- The project's jobs, newest first, below the last one of the page before; an id carries its time of birth.
SELECT
    project_id, job_id, organization_id, namespace, state, spec, base_model, base_revision, output_name, gpu_count,
    memory_bytes_min, counts, quoted_nanos_usd, price_book_version, hold_id, progress, error, output_revision,
    attempt_count, failure_count, waiting_message, create_time, queue_time, start_time, end_time, update_time
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

-- name: queue_positions(job_ids)
-- The places of these jobs in the one queue that all projects share.
SELECT job_id, position
FROM (
    SELECT job_id, row_number() OVER (ORDER BY queue_time, job_id) AS position
    FROM jobs
    WHERE state = 'QUEUED'
) AS queue
WHERE job_id = ANY(:job_ids::text[]);

-- name: list_remaining(page_size)
-- How long the running jobs said that they still need, and when they said it.
SELECT remaining_s, progress_time
FROM jobs
WHERE state IN ('STARTING', 'RUNNING', 'CANCELLING') AND remaining_s IS NOT NULL
ORDER BY remaining_s
LIMIT :page_size;

-- Jobs: writing.

-- name: insert_job(job_id, project_id, organization_id, api_key_id, namespace, request_id, request_sha256, state, spec, base_model, base_revision, parameter_count, output_name, gpu_count, memory_bytes_min, base_artifact, training_artifact, validation_artifact, start_weights, now)!
-- Stores an acknowledged job.
INSERT INTO jobs (
    job_id, project_id, organization_id, api_key_id, namespace, request_id, request_sha256, state, spec, base_model,
    base_revision, parameter_count, output_name, gpu_count, memory_bytes_min, base_artifact, training_artifact,
    validation_artifact, start_weights, wake_at, create_time, update_time
) VALUES (
    :job_id, :project_id, :organization_id, :api_key_id, :namespace, :request_id, :request_sha256, :state, :spec,
    :base_model, :base_revision, :parameter_count, :output_name, :gpu_count, :memory_bytes_min, :base_artifact,
    :training_artifact, :validation_artifact, :start_weights, :now, :now, :now
);

-- name: hold_job(project_id, job_id, sources, destination, now, claim, counts, quoted_nanos_usd, price_book_version, hold_id)^
-- Puts an analysed job whose price is held into the queue.
UPDATE jobs
SET
    state = :destination,
    counts = :counts,
    quoted_nanos_usd = :quoted_nanos_usd,
    price_book_version = :price_book_version,
    hold_id = :hold_id,
    queue_time = :now,
    wake_at = :now,
    claim_token = NULL,
    claimed_until = NULL,
    service_failures = 0,
    waiting_message = '',
    update_time = :now,
    last_sequence = last_sequence + 1
WHERE
    project_id = :project_id
    AND job_id = :job_id
    AND state = ANY(:sources::text[])
    AND claim_token = :claim
RETURNING
    project_id, job_id, organization_id, old.state AS from_state, new.state AS to_state, new.last_sequence AS sequence,
    new.start_time AS start_time, new.attempt_count AS attempt_count;

-- name: refuse_job(project_id, job_id, sources, destination, now, claim, error)^
-- Ends a job that never runs; a hold that may exist is released.
UPDATE jobs
SET
    state = :destination,
    error = :error,
    end_time = :now,
    wake_at = :now,
    release_pending = hold_requested,
    claim_token = NULL,
    claimed_until = NULL,
    waiting_message = '',
    update_time = :now,
    last_sequence = last_sequence + 1
WHERE
    project_id = :project_id
    AND job_id = :job_id
    AND state = ANY(:sources::text[])
    AND claim_token = :claim
RETURNING
    project_id, job_id, organization_id, old.state AS from_state, new.state AS to_state, new.last_sequence AS sequence,
    new.start_time AS start_time, new.attempt_count AS attempt_count;

-- name: place_job(project_id, job_id, sources, destination, now, lease_token)^
-- Gives a queued job its lease and starts the next attempt.
UPDATE jobs
SET
    state = :destination,
    lease_token = :lease_token,
    attempt_count = attempt_count + 1,
    waiting_message = '',
    update_time = :now,
    last_sequence = last_sequence + 1
WHERE
    project_id = :project_id
    AND job_id = :job_id
    AND state = ANY(:sources::text[])
RETURNING
    project_id, job_id, organization_id, old.state AS from_state, new.state AS to_state, new.last_sequence AS sequence,
    new.start_time AS start_time, new.attempt_count AS attempt_count;

-- name: start_job(project_id, job_id, sources, destination, now, lease_token)^
-- Records that the attempt's process started.
UPDATE jobs
SET
    state = :destination,
    start_time = coalesce(start_time, :now),
    update_time = :now,
    last_sequence = last_sequence + 1
WHERE
    project_id = :project_id
    AND job_id = :job_id
    AND state = ANY(:sources::text[])
    AND lease_token = :lease_token
RETURNING
    project_id, job_id, organization_id, old.state AS from_state, new.state AS to_state, new.last_sequence AS sequence,
    new.start_time AS start_time, new.attempt_count AS attempt_count;

-- name: succeed_job(project_id, job_id, sources, destination, now, lease_token, output_revision, output_artifact)^
-- Ends a job with its model.
UPDATE jobs
SET
    state = :destination,
    output_revision = :output_revision,
    output_artifact = :output_artifact,
    end_time = :now,
    lease_token = NULL,
    update_time = :now,
    last_sequence = last_sequence + 1
WHERE
    project_id = :project_id
    AND job_id = :job_id
    AND state = ANY(:sources::text[])
    AND lease_token = :lease_token
RETURNING
    project_id, job_id, organization_id, old.state AS from_state, new.state AS to_state, new.last_sequence AS sequence,
    new.start_time AS start_time, new.attempt_count AS attempt_count;

-- name: fail_job(project_id, job_id, sources, destination, now, lease_token, error)^
-- Ends a job with an error.
UPDATE jobs
SET
    state = :destination,
    error = :error,
    end_time = :now,
    failure_count = failure_count + 1,
    lease_token = NULL,
    update_time = :now,
    last_sequence = last_sequence + 1
WHERE
    project_id = :project_id
    AND job_id = :job_id
    AND state = ANY(:sources::text[])
    AND lease_token = :lease_token
RETURNING
    project_id, job_id, organization_id, old.state AS from_state, new.state AS to_state, new.last_sequence AS sequence,
    new.start_time AS start_time, new.attempt_count AS attempt_count;

-- name: requeue_job(project_id, job_id, sources, destination, now, lease_token, wake_at, failure_count)^
-- Puts a job whose attempt is over back into the queue, in its old place.
UPDATE jobs
SET
    state = :destination,
    failure_count = :failure_count,
    wake_at = :wake_at,
    lease_token = NULL,
    update_time = :now,
    last_sequence = last_sequence + 1
WHERE
    project_id = :project_id
    AND job_id = :job_id
    AND state = ANY(:sources::text[])
    AND lease_token = :lease_token
RETURNING
    project_id, job_id, organization_id, old.state AS from_state, new.state AS to_state, new.last_sequence AS sequence,
    new.start_time AS start_time, new.attempt_count AS attempt_count;

-- name: expire_job(project_id, job_id, sources, destination, now, error)^
-- Ends a job that no node has and whose hold is over.
UPDATE jobs
SET
    state = :destination,
    error = :error,
    end_time = :now,
    waiting_message = '',
    update_time = :now,
    last_sequence = last_sequence + 1
WHERE
    project_id = :project_id
    AND job_id = :job_id
    AND state = ANY(:sources::text[])
RETURNING
    project_id, job_id, organization_id, old.state AS from_state, new.state AS to_state, new.last_sequence AS sequence,
    new.start_time AS start_time, new.attempt_count AS attempt_count;

-- name: cancel_waiting_job(project_id, job_id, sources, destination, now)^
-- Cancels a job that no node has; a hold that may exist without our knowledge is released.
UPDATE jobs
SET
    state = :destination,
    end_time = :now,
    wake_at = :now,
    release_pending = hold_requested AND hold_id = '',
    waiting_message = '',
    update_time = :now,
    last_sequence = last_sequence + 1
WHERE
    project_id = :project_id
    AND job_id = :job_id
    AND state = ANY(:sources::text[])
RETURNING
    project_id, job_id, organization_id, old.state AS from_state, new.state AS to_state, new.last_sequence AS sequence,
    new.start_time AS start_time, new.attempt_count AS attempt_count;

-- name: cancel_running_job(project_id, job_id, sources, destination, now)^
-- Asks the node that has the job to stop.
UPDATE jobs
SET
    state = :destination,
    update_time = :now,
    last_sequence = last_sequence + 1
WHERE
    project_id = :project_id
    AND job_id = :job_id
    AND state = ANY(:sources::text[])
RETURNING
    project_id, job_id, organization_id, old.state AS from_state, new.state AS to_state, new.last_sequence AS sequence,
    new.start_time AS start_time, new.attempt_count AS attempt_count;

-- name: stop_job(project_id, job_id, sources, destination, now, lease_token)^
-- Ends a cancelled job whose attempt is over.
UPDATE jobs
SET
    state = :destination,
    end_time = :now,
    lease_token = NULL,
    update_time = :now,
    last_sequence = last_sequence + 1
WHERE
    project_id = :project_id
    AND job_id = :job_id
    AND state = ANY(:sources::text[])
    AND lease_token = :lease_token
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
SELECT :project_id::text, :job_id::text, line.sequence, :now::timestamptz, line.kind, line.message, :state::text, line.progress
FROM unnest(:sequences::bigint[], :kinds::text[], :messages::text[], :progresses::bytea[])
    AS line (sequence, kind, message, progress);

-- name: list_known_warnings(project_id, job_id, messages)
-- Which of these warnings the job's history holds already.
SELECT DISTINCT message
FROM job_events
WHERE job_id = :job_id AND project_id = :project_id AND kind = 'WARNING' AND message = ANY(:messages::text[]);

-- name: insert_job_secrets(project_id, job_id, sealed, now)!
-- Keeps what a job's integrations are opened with, sealed.
INSERT INTO job_secrets (job_id, project_id, sealed, create_time) VALUES (:job_id, :project_id, :sealed, :now);

-- name: get_job_secrets(project_id, job_id, lease_token)^
-- The sealed secrets of a job for the node that holds its lease, or follows it in a gang; no row for others, nothing in it without.
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

-- name: take_sequences(project_id, job_id, count, now)$
-- Takes the next numbers of a job's history and returns the last of them; the row lock keeps them without gaps.
UPDATE jobs
SET last_sequence = last_sequence + :count, update_time = :now
WHERE project_id = :project_id AND job_id = :job_id
RETURNING last_sequence;

-- name: ping()$
-- Finds out whether the connection still lives.
SELECT 1;

-- name: notify(payload)$
-- Tells every scheduler process, once the transaction commits, what changed.
SELECT pg_notify('scheduler', :payload);

-- Workers' claims on jobs.

-- name: claim_validating(claim, until, now)^
-- Takes one job to analyse that no other worker holds.
UPDATE jobs
SET claim_token = :claim, claimed_until = :until
WHERE job_id = (
    SELECT job_id
    FROM jobs
    WHERE state = 'VALIDATING' AND wake_at <= :now AND (claimed_until IS NULL OR claimed_until <= :now)
    ORDER BY wake_at, job_id
    LIMIT 1
    FOR UPDATE SKIP LOCKED
)
RETURNING
    project_id, job_id, organization_id, api_key_id, spec, base_model, base_revision, parameter_count, base_artifact,
    training_artifact, validation_artifact, service_failures;

-- name: claim_release(claim, until, now)^
-- Takes one job whose hold has to be released, once no worker can still be asking for that hold.
UPDATE jobs
SET claim_token = :claim, claimed_until = :until
WHERE job_id = (
    SELECT job_id
    FROM jobs
    WHERE release_pending AND wake_at <= :now AND (claimed_until IS NULL OR claimed_until <= :now)
    ORDER BY wake_at, job_id
    LIMIT 1
    FOR UPDATE SKIP LOCKED
)
RETURNING project_id, job_id, service_failures;

-- name: renew_claim(project_id, job_id, claim, until)!
-- Keeps a worker's claim while the job still waits for its work.
UPDATE jobs
SET claimed_until = :until
WHERE project_id = :project_id AND job_id = :job_id AND claim_token = :claim AND state = 'VALIDATING';

-- name: free_claim(project_id, job_id, claim)!
-- Gives a claim back without any other change.
UPDATE jobs
SET claim_token = NULL, claimed_until = NULL
WHERE project_id = :project_id AND job_id = :job_id AND claim_token = :claim;

-- name: postpone_job(project_id, job_id, claim, wake_at, waiting_message, now)!
-- Leaves a claimed job for later and says what it waits for.
UPDATE jobs
SET
    claim_token = NULL,
    claimed_until = NULL,
    service_failures = service_failures + 1,
    wake_at = :wake_at,
    waiting_message = :waiting_message,
    update_time = :now
WHERE project_id = :project_id AND job_id = :job_id AND claim_token = :claim;

-- name: request_hold(project_id, job_id, claim)!
-- Records, before billing is asked, that a hold may exist from now on.
UPDATE jobs
SET hold_requested = true
WHERE project_id = :project_id AND job_id = :job_id AND claim_token = :claim AND state = 'VALIDATING';

-- name: finish_release(project_id, job_id, claim)!
-- Records that billing holds nothing for the job any more.
UPDATE jobs
SET release_pending = false, claim_token = NULL, claimed_until = NULL
WHERE project_id = :project_id AND job_id = :job_id AND claim_token = :claim;

-- name: list_holding(after_job_id, page_size)
-- Jobs whose hold has to be kept alive, by id.
SELECT project_id, job_id
FROM jobs
WHERE state IN ('QUEUED', 'STARTING', 'RUNNING', 'CANCELLING') AND job_id > :after_job_id
ORDER BY job_id
LIMIT :page_size;

-- Attempts and what they report.

-- name: lock_leased_job(project_id, job_id, lease_token)^
-- The job, locked, if this token is the one that may report; an old token finds nothing.
SELECT
    jobs.organization_id, jobs.namespace, jobs.state, jobs.base_model, jobs.base_revision, jobs.output_name,
    jobs.attempt_count, jobs.failure_count, jobs.start_time, jobs.progress, jobs.progress_step, jobs.progress_token,
    attempts.node
FROM jobs
JOIN attempts ON attempts.lease_token = jobs.lease_token
WHERE jobs.project_id = :project_id AND jobs.job_id = :job_id AND jobs.lease_token = :lease_token
FOR UPDATE OF jobs;

-- name: get_lease_token(project_id, job_id)$
-- The token that is in force; nothing while no node has the job.
SELECT lease_token FROM jobs WHERE project_id = :project_id AND job_id = :job_id;

-- name: get_leased_node(project_id, job_id)$
-- The node that has the job now.
SELECT attempts.node
FROM jobs
JOIN attempts ON attempts.lease_token = jobs.lease_token
WHERE jobs.project_id = :project_id AND jobs.job_id = :job_id;

-- name: insert_attempt(lease_token, project_id, job_id, attempt, node, incarnation, now)!
-- Records an attempt with its lease.
INSERT INTO attempts (lease_token, project_id, job_id, attempt, node, incarnation, create_time)
VALUES (:lease_token, :project_id, :job_id, :attempt, :node, :incarnation, :now);

-- name: end_attempt(lease_token, now, outcome, message)!
-- Records how an attempt ended.
UPDATE attempts
SET end_time = :now, outcome = :outcome, message = :message
WHERE lease_token = :lease_token AND outcome IS NULL;

-- name: get_attempt_outcome(project_id, job_id, lease_token)$
-- How the attempt of this token ended; nothing while it runs or when it never was.
SELECT outcome FROM attempts WHERE lease_token = :lease_token AND project_id = :project_id AND job_id = :job_id;

-- name: touch_start(project_id, job_id, lease_token, now)!
-- Records that the process of an attempt started although a cancellation came first.
UPDATE jobs
SET start_time = coalesce(start_time, :now), update_time = :now
WHERE project_id = :project_id AND job_id = :job_id AND lease_token = :lease_token AND state = 'CANCELLING';

-- name: get_start_weights(project_id, job_id, lease_token)$
-- What the attempt that holds the lease starts from.
SELECT start_weights FROM jobs WHERE project_id = :project_id AND job_id = :job_id AND lease_token = :lease_token;

-- name: set_start_weights(project_id, job_id, lease_token, start_weights)!
-- Pins what this attempt started from for all later ones.
UPDATE jobs
SET start_weights = :start_weights
WHERE project_id = :project_id AND job_id = :job_id AND lease_token = :lease_token;

-- name: record_progress(project_id, job_id, lease_token, states, progress, step, remaining_s, now)!
-- Records the last metric of the attempt that holds the lease.
UPDATE jobs
SET
    progress = :progress,
    progress_step = :step,
    progress_token = :lease_token,
    progress_time = :now,
    remaining_s = :remaining_s,
    update_time = :now
WHERE
    project_id = :project_id
    AND job_id = :job_id
    AND lease_token = :lease_token
    AND state = ANY(:states::text[]);

-- name: record_usage(work_key, project_id, job_id, kind, start_step, end_step, tokens, lease_token, now)$
-- Records work that was not recorded before: neither under this key nor as part of another range of training steps.
INSERT INTO job_usage (work_key, project_id, job_id, kind, start_step, end_step, tokens, lease_token, recorded_at)
SELECT
    :work_key::text, :project_id::text, jobs.job_id, :kind::text, :start_step::bigint, :end_step::bigint,
    :tokens::bigint, jobs.lease_token, :now::timestamptz
FROM jobs
WHERE
    jobs.project_id = :project_id
    AND jobs.job_id = :job_id
    AND jobs.lease_token = :lease_token
    AND NOT EXISTS (
        SELECT FROM job_usage AS other
        WHERE
            other.job_id = jobs.job_id
            AND other.kind = 'train'
            AND :kind::text = 'train'
            AND other.work_key <> :work_key::text
            AND other.start_step < :end_step::bigint
            AND other.end_step > :start_step::bigint
    )
ON CONFLICT (work_key) DO NOTHING
RETURNING work_key;

-- name: get_usage_tokens(project_id, job_id, work_key)$
-- The tokens that were recorded first under this key.
SELECT tokens FROM job_usage WHERE work_key = :work_key AND project_id = :project_id AND job_id = :job_id;

-- name: count_usage(project_id, job_id)$
-- How many usage records a job has.
SELECT count(*) FROM job_usage WHERE project_id = :project_id AND job_id = :job_id;

-- name: insert_checkpoint(project_id, job_id, step, lease_token, manifest_sha256, size_bytes, artifact, asked, now)$
-- Commits a checkpoint under the lease that is in force; a step that has one keeps it.
INSERT INTO checkpoints (
    project_id, job_id, step, attempt, lease_token, manifest_sha256, size_bytes, artifact, asked, create_time
)
SELECT
    jobs.project_id, jobs.job_id, :step::bigint, jobs.attempt_count, jobs.lease_token, :manifest_sha256::text,
    :size_bytes::bigint, :artifact::bytea, :asked::boolean, :now::timestamptz
FROM jobs
WHERE jobs.project_id = :project_id AND jobs.job_id = :job_id AND jobs.lease_token = :lease_token
ON CONFLICT (job_id, step) DO NOTHING
RETURNING step;

-- name: get_checkpoint_artifact(project_id, job_id, step)$
-- The files of the checkpoint that was committed first for this step.
SELECT artifact FROM checkpoints WHERE project_id = :project_id AND job_id = :job_id AND step = :step;

-- name: forget_failures(project_id, job_id, lease_token, now)!
-- Begins the count of failures anew: a new checkpoint is progress.
UPDATE jobs
SET failure_count = 0, update_time = :now
WHERE project_id = :project_id AND job_id = :job_id AND lease_token = :lease_token;

-- name: retire_checkpoints(project_id, job_id, kept, now)!
-- Marks all but the newest checkpoints, and those that were asked for, as no longer needed.
UPDATE checkpoints
SET obsolete_at = :now
WHERE
    project_id = :project_id
    AND job_id = :job_id
    AND obsolete_at IS NULL
    AND NOT asked
    AND step < (
        SELECT min(step)
        FROM (
            SELECT step
            FROM checkpoints
            WHERE project_id = :project_id AND job_id = :job_id AND obsolete_at IS NULL
            ORDER BY step DESC
            LIMIT :kept
        ) AS newest
    );

-- name: list_obsolete(project_id, job_id, page_size)
-- The checkpoints that were given up last; told again at each commit, because an agent may die before it deletes them.
SELECT artifact
FROM checkpoints
WHERE project_id = :project_id AND job_id = :job_id AND obsolete_at IS NOT NULL
ORDER BY step DESC
LIMIT :page_size;

-- Nodes and devices.

-- name: lock_node(node)^
-- A node, locked against placements and other registrations.
SELECT incarnation, state FROM nodes WHERE node = :node FOR UPDATE;

-- name: upsert_node(node, incarnation, address, agent_version, preparation_version, now)!
-- Registers a node, or its new incarnation.
INSERT INTO nodes (node, incarnation, address, agent_version, preparation_version, state, registered_at, seen_at)
VALUES (:node, :incarnation, :address, :agent_version, :preparation_version, 'READY', :now, :now)
ON CONFLICT (node) DO UPDATE
SET
    incarnation = excluded.incarnation,
    address = excluded.address,
    agent_version = excluded.agent_version,
    preparation_version = excluded.preparation_version,
    state = excluded.state,
    registered_at = excluded.registered_at,
    seen_at = excluded.seen_at,
    heartbeat_stream = NULL;

-- name: forget_devices(node)!
-- Marks all devices of a node as absent; the registration then names those that are there.
UPDATE devices SET present = false WHERE node = :node;

-- name: upsert_devices(node, indices, hardware_types, memory_bytes, uuids)!
-- Records the devices that a node has.
INSERT INTO devices (node, device_index, hardware_type, memory_bytes, uuid, present)
SELECT :node::text, device.device_index, device.hardware_type, device.memory_bytes, device.uuid, true
FROM unnest(:indices::integer[], :hardware_types::text[], :memory_bytes::bigint[], :uuids::text[])
    AS device (device_index, hardware_type, memory_bytes, uuid)
ON CONFLICT (node, device_index) DO UPDATE
SET
    hardware_type = excluded.hardware_type,
    memory_bytes = excluded.memory_bytes,
    uuid = excluded.uuid,
    present = true;

-- name: see_node(node, incarnation, now)^
-- Records a sign of life of a registered incarnation and says whether the node counted as lost.
UPDATE nodes
SET seen_at = :now, state = 'READY'
WHERE node = :node AND incarnation = :incarnation
RETURNING old.state AS from_state;

-- name: open_heartbeat(node, incarnation, stream)!
-- Records that an incarnation listens, on its newest stream.
UPDATE nodes SET heartbeat_stream = :stream WHERE node = :node AND incarnation = :incarnation;

-- name: close_heartbeat(node, stream)!
-- Records that nobody listens, unless a newer stream was opened.
UPDATE nodes SET heartbeat_stream = NULL WHERE node = :node AND heartbeat_stream = :stream;

-- name: lose_nodes(silent_since)
-- Declares the nodes lost that were silent for too long.
UPDATE nodes
SET state = 'LOST', heartbeat_stream = NULL
WHERE state = 'READY' AND seen_at < :silent_since
RETURNING node, incarnation;

-- name: list_analyzers(page_size)
-- Addresses of the nodes that are there, the most recently seen first.
SELECT address FROM nodes WHERE state = 'READY' ORDER BY seen_at DESC, node LIMIT :page_size;

-- name: get_preparation_version()$
-- The code that would count a dataset now: that of the node to be asked first, or of the one seen last when none is there.
SELECT preparation_version FROM nodes ORDER BY state = 'READY' DESC, seen_at DESC, node LIMIT 1;

-- name: list_device_groups(seen_since, page_size)
-- The devices by node and type with those that have no owner; nodes that are away for long do not count.
SELECT
    devices.node,
    devices.hardware_type,
    min(devices.memory_bytes) AS memory_bytes,
    array_agg(devices.device_index ORDER BY devices.device_index) AS indices,
    coalesce(
        array_agg(devices.device_index ORDER BY devices.device_index) FILTER (WHERE owned.lease_token IS NULL), '{}'
    ) AS free,
    nodes.state = 'READY' AND nodes.heartbeat_stream IS NOT NULL AS ready,
    nodes.incarnation
FROM devices
JOIN nodes ON nodes.node = devices.node
LEFT JOIN allocation_devices AS owned
    ON owned.node = devices.node AND owned.device_index = devices.device_index AND owned.released_at IS NULL
WHERE devices.present AND nodes.seen_at >= :seen_since
GROUP BY devices.node, devices.hardware_type, nodes.state, nodes.heartbeat_stream, nodes.incarnation
ORDER BY devices.node, devices.hardware_type
LIMIT :page_size;

-- Leases and allocations.

-- name: list_queued(now, page_size)
-- The queue as the policy sees it: jobs that may start now, in order of arrival.
SELECT project_id, job_id, gpu_count, memory_bytes_min
FROM jobs
WHERE state = 'QUEUED' AND wake_at <= :now
ORDER BY queue_time, job_id
LIMIT :page_size;

-- name: guard_node(node, incarnation)$
-- Keeps a ready incarnation as it is until the end of the transaction; nothing when it is another one by now.
SELECT node FROM nodes WHERE node = :node AND incarnation = :incarnation AND state = 'READY' AND heartbeat_stream IS NOT NULL FOR SHARE;

-- name: next_lease_token()$
-- A token that is larger than all before it.
SELECT nextval('lease_tokens');

-- name: insert_allocation(lease_token, owner, kind, node, incarnation, hardware_type, now, expires_at, leader_token)!
-- Records whose the devices are.
INSERT INTO allocations (
    lease_token, owner, kind, node, incarnation, hardware_type, created_at, expires_at, leader_token
)
VALUES (:lease_token, :owner, :kind, :node, :incarnation, :hardware_type, :now, :expires_at, :leader_token);

-- name: insert_allocation_devices(lease_token, node, indices)!
-- Takes the devices; the unique index refuses one that has an owner.
INSERT INTO allocation_devices (lease_token, node, device_index)
SELECT :lease_token::bigint, :node::text, device.device_index
FROM unnest(:indices::integer[]) AS device (device_index)
ORDER BY device.device_index;

-- name: renew_leases(node, incarnation, lease_tokens, expires_at)
-- Renews in one statement every training lease that this incarnation works on.
UPDATE allocations
SET expires_at = :expires_at
WHERE
    node = :node
    AND incarnation = :incarnation
    AND kind = 'TRAINING'
    AND released_at IS NULL
    AND lease_token = ANY(:lease_tokens::bigint[])
RETURNING lease_token;

-- name: renew_allocation(owner, lease_token, expires_at)!
-- Renews a serving allocation that is still its owner's.
UPDATE allocations
SET expires_at = :expires_at
WHERE lease_token = :lease_token AND owner = :owner AND kind = 'SERVING' AND released_at IS NULL;

-- name: get_allocation(owner)^
-- The live allocation of an owner.
SELECT
    allocations.lease_token, allocations.owner, allocations.kind, allocations.node, allocations.hardware_type,
    allocations.expires_at,
    array(
        SELECT device_index
        FROM allocation_devices
        WHERE allocation_devices.lease_token = allocations.lease_token
        ORDER BY device_index
    ) AS device_indices
FROM allocations
WHERE allocations.owner = :owner AND allocations.released_at IS NULL;

-- name: expire_node_leases(node, now)!
-- Ends the time of every training lease of a node; the sweep then ends the leases themselves.
UPDATE allocations
SET expires_at = :now
WHERE node = :node AND kind = 'TRAINING' AND released_at IS NULL AND expires_at > :now;

-- name: list_node_leases(node)
-- The training leases of a node with their jobs.
SELECT
    allocations.lease_token, allocations.owner, attempts.project_id, attempts.job_id,
    attempts.lease_token AS attempt_token
FROM allocations
JOIN attempts ON attempts.lease_token = coalesce(allocations.leader_token, allocations.lease_token)
WHERE allocations.node = :node AND allocations.kind = 'TRAINING' AND allocations.released_at IS NULL
ORDER BY attempts.job_id;

-- name: list_expired(now, page_size)
-- Allocations whose time is over, with the job of each training lease.
SELECT
    allocations.lease_token, allocations.owner, allocations.kind, attempts.project_id, attempts.job_id,
    attempts.lease_token AS attempt_token
FROM allocations
LEFT JOIN attempts ON attempts.lease_token = coalesce(allocations.leader_token, allocations.lease_token)
WHERE allocations.released_at IS NULL AND allocations.expires_at <= :now
ORDER BY allocations.expires_at
LIMIT :page_size;

-- name: release_allocation(lease_token, owner, now)!
-- Ends an allocation of this owner.
UPDATE allocations
SET released_at = :now
WHERE lease_token = :lease_token AND owner = :owner AND released_at IS NULL;

-- name: release_expired(lease_token, now)!
-- Ends an allocation whose time is still over; one that was renewed meanwhile stays.
UPDATE allocations
SET released_at = :now
WHERE lease_token = :lease_token AND released_at IS NULL AND expires_at <= :now;

-- name: release_followers(leader_token, now)
-- Ends the allocations of all nodes that follow this lease.
UPDATE allocations
SET released_at = :now
WHERE leader_token = :leader_token AND released_at IS NULL
RETURNING lease_token, node;

-- name: get_leader_token(project_id, job_id, lease_token)$
-- The lease that a node of a gang follows; nothing for any other token.
SELECT allocations.leader_token
FROM allocations
JOIN attempts ON attempts.lease_token = allocations.leader_token
WHERE
    allocations.lease_token = :lease_token
    AND allocations.released_at IS NULL
    AND attempts.project_id = :project_id
    AND attempts.job_id = :job_id;

-- name: release_devices(lease_token, now)!
-- Gives the devices of an ended allocation back.
UPDATE allocation_devices SET released_at = :now WHERE lease_token = :lease_token AND released_at IS NULL;

-- name: list_assignments(node, incarnation)
-- All that an incarnation of a node shall do, with the newest checkpoint of each job.
SELECT
    allocations.lease_token, jobs.project_id, jobs.job_id, jobs.attempt_count AS attempt, allocations.expires_at,
    jobs.lease_token AS attempt_token, nodes.address, leading_node.address AS leading_address,
    (
        SELECT count(*) + 1
        FROM allocations AS following
        WHERE following.leader_token = jobs.lease_token AND following.released_at IS NULL
    ) AS node_count,
    jobs.state = 'CANCELLING' AS cancelled, jobs.spec, jobs.base_revision, jobs.base_artifact, jobs.training_artifact,
    jobs.validation_artifact, jobs.counts, jobs.start_weights,
    array(
        SELECT device_index
        FROM allocation_devices
        WHERE allocation_devices.lease_token = allocations.lease_token
        ORDER BY device_index
    ) AS device_indices,
    resume.step AS resume_step, resume.artifact AS resume_artifact, resume.manifest_sha256 AS resume_manifest_sha256
FROM allocations
JOIN jobs ON jobs.lease_token = coalesce(allocations.leader_token, allocations.lease_token)
JOIN nodes ON nodes.node = allocations.node
JOIN allocations AS leader ON leader.lease_token = jobs.lease_token
JOIN nodes AS leading_node ON leading_node.node = leader.node
LEFT JOIN LATERAL (
    SELECT checkpoints.step, checkpoints.artifact, checkpoints.manifest_sha256
    FROM checkpoints
    WHERE checkpoints.job_id = jobs.job_id AND checkpoints.obsolete_at IS NULL
    ORDER BY checkpoints.step DESC
    LIMIT 1
) AS resume ON true
WHERE
    allocations.node = :node
    AND allocations.incarnation = :incarnation
    AND allocations.kind = 'TRAINING'
    AND allocations.released_at IS NULL
ORDER BY allocations.lease_token;

-- Dataset analyses.

-- name: get_analysis(file_sha256, base_revision, sequence_tokens_max, train_on_inputs, preparation_version)^
-- The counts of a file under these settings, if it was analysed before by the same code.
SELECT
    example_count, token_count, labelled_token_count, truncated_count, longest_tokens, plan_sha256, format,
    preparation_version, rows_per_second
FROM dataset_analyses
WHERE
    file_sha256 = :file_sha256
    AND base_revision = :base_revision
    AND sequence_tokens_max = :sequence_tokens_max
    AND train_on_inputs = :train_on_inputs
    AND preparation_version = :preparation_version;

-- name: insert_analysis(file_sha256, base_revision, sequence_tokens_max, train_on_inputs, example_count, token_count, labelled_token_count, truncated_count, longest_tokens, plan_sha256, format, preparation_version, rows_per_second, now)!
-- Keeps the counts of a file; the first ones stay, so that a quote and the run cannot disagree.
INSERT INTO dataset_analyses (
    file_sha256, base_revision, sequence_tokens_max, train_on_inputs, example_count, token_count,
    labelled_token_count, truncated_count, longest_tokens, plan_sha256, format,
    preparation_version, rows_per_second, create_time
) VALUES (
    :file_sha256, :base_revision, :sequence_tokens_max, :train_on_inputs, :example_count, :token_count,
    :labelled_token_count, :truncated_count, :longest_tokens, :plan_sha256, :format,
    :preparation_version, :rows_per_second, :now
)
ON CONFLICT (file_sha256, base_revision, sequence_tokens_max, train_on_inputs, preparation_version) DO NOTHING;
