-- name: lock_validations()$
-- Lets one worker at a time choose, so that each counts what the others took.
SELECT pg_advisory_xact_lock(hashtext('validations'), hashtext(current_schema()))::text;

-- name: claim_validating(claim, claim_s, organization_max, large_bytes_min, organization_large_max, takes_large)^
-- Takes one job to analyse that no other worker holds, of the organization that has the fewest such workers.
WITH claimed AS (
    SELECT
        organization_id, count(*) AS jobs, count(*) FILTER (WHERE dataset_bytes >= :large_bytes_min) AS large_jobs
    FROM jobs
    WHERE state = 'VALIDATING' AND claimed_until > now()
    GROUP BY organization_id
)
UPDATE jobs
SET claim_token = :claim, claimed_until = now() + make_interval(secs => :claim_s)
WHERE job_id = (
    SELECT job_id
    FROM jobs AS waiting
    LEFT JOIN claimed ON claimed.organization_id = waiting.organization_id
    WHERE
        waiting.state = 'VALIDATING'
        AND waiting.wake_at <= now()
        AND (waiting.claimed_until IS NULL OR waiting.claimed_until <= now())
        AND coalesce(claimed.jobs, 0) < :organization_max
        AND (
            waiting.dataset_bytes < :large_bytes_min
            OR (:takes_large::boolean AND coalesce(claimed.large_jobs, 0) < :organization_large_max)
        )
    ORDER BY coalesce(claimed.jobs, 0), waiting.wake_at, waiting.job_id
    LIMIT 1
    FOR UPDATE OF waiting SKIP LOCKED
)
RETURNING
    project_id, job_id, organization_id, api_key_id, spec, base_model, base_revision, parameter_count, base_artifact,
    training_artifact, validation_artifact, dataset_bytes, service_failures;

-- name: claim_release(claim, claim_s)^
-- Takes one job whose hold has to be released, once no worker can still be asking for that hold.
UPDATE jobs
SET claim_token = :claim, claimed_until = now() + make_interval(secs => :claim_s)
WHERE job_id = (
    SELECT job_id
    FROM jobs
    WHERE release_pending AND wake_at <= now() AND (claimed_until IS NULL OR claimed_until <= now())
    ORDER BY wake_at, job_id
    LIMIT 1
    FOR UPDATE SKIP LOCKED
)
RETURNING project_id, job_id, service_failures;

-- name: renew_claim(project_id, job_id, claim, claim_s)!
-- Keeps a worker's claim while the job still waits for its work.
UPDATE jobs
SET claimed_until = now() + make_interval(secs => :claim_s)
WHERE project_id = :project_id AND job_id = :job_id AND claim_token = :claim AND state = 'VALIDATING';

-- name: free_claim(project_id, job_id, claim)!
-- Gives a claim back without any other change.
UPDATE jobs
SET claim_token = NULL, claimed_until = NULL
WHERE project_id = :project_id AND job_id = :job_id AND claim_token = :claim;

-- name: postpone_job(project_id, job_id, claim, delay_s, waiting_message, now)!
-- Leaves a claimed job for later; only one that is still to be validated says what it waits for.
UPDATE jobs
SET
    claim_token = NULL,
    claimed_until = NULL,
    service_failures = service_failures + 1,
    wake_at = now() + make_interval(secs => :delay_s),
    waiting_message = :waiting_message,
    update_time = :now
WHERE
    project_id = :project_id
    AND job_id = :job_id
    AND claim_token = :claim
    AND (state = 'VALIDATING' OR :waiting_message::text = '');

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

-- name: list_fates(project_ids, job_ids)
-- Says of each of these jobs that exists whether it ended and the bus has acknowledged all events about it.
SELECT
    jobs.project_id,
    jobs.job_id,
    jobs.state IN ('SUCCEEDED', 'FAILED', 'CANCELLED') AND NOT EXISTS (
        SELECT
        FROM outbox
        WHERE
            published_at IS NULL
            AND headers ->> 'ce-subject' = 'projects/' || jobs.project_id || '/tuningJobs/' || jobs.job_id
    ) AS is_told
FROM unnest(:project_ids::text[], :job_ids::text[]) AS asked (project_id, job_id)
INNER JOIN jobs ON jobs.project_id = asked.project_id AND jobs.job_id = asked.job_id;

-- name: list_holding(after_job_id, page_size)
-- Jobs whose hold has to be kept alive, by id.
SELECT project_id, job_id
FROM jobs
WHERE state IN ('QUEUED', 'STARTING', 'RUNNING', 'CANCELLING') AND job_id > :after_job_id
ORDER BY job_id
LIMIT :page_size;

-- name: lock_old_history(stage, before, left_alone)$
-- Takes the job that ended first at this stage, if what the next one leaves out is past keeping, but those left alone.
SELECT job_id
FROM jobs
WHERE end_time < :before AND history_stage = :stage AND history_stage < 2 AND job_id <> ALL(:left_alone::text[])
ORDER BY end_time
LIMIT 1
FOR NO KEY UPDATE SKIP LOCKED;

-- name: prune_history(job_id, kinds, batch_max)!
-- Deletes a bounded batch of a job's lines of these kinds.
DELETE FROM job_events
WHERE
    job_id = :job_id
    AND sequence IN (
        SELECT sequence
        FROM job_events
        WHERE job_id = :job_id AND kind = ANY(:kinds::text[])
        ORDER BY sequence
        LIMIT :batch_max
    );

-- name: prune_job_usage(job_id, batch_max)!
-- Deletes a bounded batch of what an ended job metered; billing has booked it.
DELETE FROM job_usage
WHERE work_key IN (SELECT work_key FROM job_usage WHERE job_id = :job_id LIMIT :batch_max);

-- name: prune_checkpoints(job_id, batch_max)!
-- Deletes a bounded batch of a job's checkpoints that were given up.
DELETE FROM checkpoints
WHERE
    job_id = :job_id
    AND step IN (
        SELECT step FROM checkpoints WHERE job_id = :job_id AND obsolete_at IS NOT NULL LIMIT :batch_max
    );

-- name: prune_attempts(job_id, batch_max)!
-- Deletes a bounded batch of an ended job's attempts with their leases, those of following nodes included.
WITH gone AS (
    SELECT lease_token FROM attempts WHERE job_id = :job_id AND end_time IS NOT NULL LIMIT :batch_max
),

leases AS (
    SELECT lease_token FROM gone
    UNION
    SELECT allocations.lease_token FROM allocations JOIN gone ON allocations.leader_token = gone.lease_token
),

freed AS (
    DELETE FROM allocation_devices USING leases WHERE allocation_devices.lease_token = leases.lease_token
),

ended AS (
    DELETE FROM allocations USING leases WHERE allocations.lease_token = leases.lease_token
)

DELETE FROM attempts USING gone WHERE attempts.lease_token = gone.lease_token;

-- name: finish_history(job_id, stage)!
-- Records what is left of a job's history.
UPDATE jobs SET history_stage = :stage WHERE job_id = :job_id;
