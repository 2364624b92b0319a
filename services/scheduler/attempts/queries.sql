-- name: insert_attempt(lease_token, project_id, job_id, attempt, node, incarnation)!
-- Records an attempt with its lease.
INSERT INTO attempts (lease_token, project_id, job_id, attempt, node, incarnation, create_time)
VALUES (:lease_token, :project_id, :job_id, :attempt, :node, :incarnation, now());

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

-- name: get_attempt_outcome(project_id, job_id, lease_token)$
-- How the attempt of this token ended; nothing while it runs or when it never was.
SELECT outcome FROM attempts WHERE lease_token = :lease_token AND project_id = :project_id AND job_id = :job_id;

-- name: end_attempt(lease_token, outcome, message, blames_node)!
-- Records how an attempt ended.
UPDATE attempts
SET end_time = now(), outcome = :outcome, message = :message, blames_node = :blames_node
WHERE lease_token = :lease_token AND outcome IS NULL;

-- name: list_expired(at, page_size)
-- Allocations whose time was over at this time of the database, and still is, with the job of each training lease.
SELECT
    allocations.lease_token, allocations.owner, allocations.kind, attempts.project_id, attempts.job_id,
    attempts.lease_token AS attempt_token
FROM allocations
LEFT JOIN attempts ON attempts.lease_token = coalesce(allocations.leader_token, allocations.lease_token)
WHERE allocations.released_at IS NULL AND allocations.expires_at <= least(:at::timestamptz, clock_timestamp())
ORDER BY allocations.expires_at
LIMIT :page_size;

-- name: list_node_leases(node)
-- The training leases of a node with their jobs.
SELECT
    allocations.lease_token, allocations.owner, attempts.project_id, attempts.job_id,
    attempts.lease_token AS attempt_token
FROM allocations
JOIN attempts ON attempts.lease_token = coalesce(allocations.leader_token, allocations.lease_token)
WHERE allocations.node = :node AND allocations.kind = 'TRAINING' AND allocations.released_at IS NULL
ORDER BY attempts.job_id;

-- name: touch_start(project_id, job_id, lease_token, start_weights, now)!
-- Records that the process of an attempt started although a cancellation came first, and what it started from.
UPDATE jobs
SET
    start_time = coalesce(start_time, :now::timestamptz),
    start_weights = coalesce(:start_weights::bytea, start_weights),
    update_time = :now::timestamptz
WHERE
    project_id = :project_id
    AND job_id = :job_id
    AND lease_token = :lease_token
    AND state IN ('RUNNING', 'CANCELLING');

-- name: get_start_weights(project_id, job_id, lease_token)$
-- What the attempt that holds the lease starts from.
SELECT start_weights FROM jobs WHERE project_id = :project_id AND job_id = :job_id AND lease_token = :lease_token;

-- name: record_progress(project_id, job_id, lease_token, states, progress, step, remaining_s, lines, now)$
-- Records the last metric of the attempt that holds the lease, and takes the numbers of the lines that tell of the report.
UPDATE jobs
SET
    last_sequence = last_sequence + :lines,
    progress = :progress,
    progress_step = :step,
    progress_token = :lease_token,
    progress_time = now(),
    remaining_s = :remaining_s,
    update_time = :now
WHERE
    project_id = :project_id
    AND job_id = :job_id
    AND lease_token = :lease_token
    AND state = ANY(:states::text[])
RETURNING last_sequence;

-- name: list_known_warnings(project_id, job_id, messages)
-- Which of these warnings the job's history holds already.
SELECT DISTINCT message
FROM job_events
WHERE job_id = :job_id AND project_id = :project_id AND kind = 'WARNING' AND message = ANY(:messages::text[]);

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

-- name: insert_checkpoint(project_id, job_id, step, lease_token, manifest_sha256, size_bytes, artifact, asked, now)^
-- Commits a checkpoint under the lease that is in force; a step that has one keeps it, unless that one was given up before.
INSERT INTO checkpoints (
    project_id, job_id, step, attempt, lease_token, manifest_sha256, size_bytes, artifact, asked, create_time
)
SELECT
    jobs.project_id, jobs.job_id, :step::bigint, jobs.attempt_count, jobs.lease_token, :manifest_sha256::text,
    :size_bytes::bigint, :artifact::bytea, :asked::boolean, :now::timestamptz
FROM jobs
WHERE jobs.project_id = :project_id AND jobs.job_id = :job_id AND jobs.lease_token = :lease_token
ON CONFLICT (job_id, step) DO UPDATE
SET
    attempt = excluded.attempt,
    lease_token = excluded.lease_token,
    manifest_sha256 = excluded.manifest_sha256,
    size_bytes = excluded.size_bytes,
    artifact = excluded.artifact,
    asked = checkpoints.asked OR excluded.asked,
    create_time = excluded.create_time,
    obsolete_at = NULL,
    bad_reason = NULL
WHERE checkpoints.obsolete_at IS NOT NULL AND checkpoints.lease_token < excluded.lease_token
RETURNING old.artifact AS given_up;

-- name: mark_checkpoint_bad(project_id, job_id, step, manifest_sha256, reason, now)^
-- Gives up the newest checkpoint because its files cannot be used; it finds nothing when it is not the newest, or another.
UPDATE checkpoints
SET bad_reason = :reason, bad_count = bad_count + 1, obsolete_at = :now
WHERE
    project_id = :project_id
    AND job_id = :job_id
    AND step = :step
    AND manifest_sha256 = :manifest_sha256
    AND obsolete_at IS NULL
    AND NOT EXISTS (
        SELECT FROM checkpoints AS newer
        WHERE newer.job_id = :job_id AND newer.step > :step AND newer.obsolete_at IS NULL
    )
RETURNING
    bad_count,
    (
        SELECT max(earlier.step)
        FROM checkpoints AS earlier
        WHERE earlier.job_id = :job_id AND earlier.step < :step AND earlier.obsolete_at IS NULL
    ) AS step_before;

-- name: get_checkpoint_artifact(project_id, job_id, step)$
-- The files of the checkpoint that was committed first for this step.
SELECT artifact FROM checkpoints WHERE project_id = :project_id AND job_id = :job_id AND step = :step;

-- name: forget_failures(project_id, job_id, lease_token, lines, now)$
-- Begins the count of failures anew, since a new checkpoint is progress, and takes the numbers of the lines that tell of it.
UPDATE jobs
SET failure_count = 0, last_sequence = last_sequence + :lines, update_time = :now
WHERE project_id = :project_id AND job_id = :job_id AND lease_token = :lease_token
RETURNING last_sequence;

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
