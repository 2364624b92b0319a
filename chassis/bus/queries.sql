-- name: add_event(id, subject, payload, headers)!
-- Adds an event to the outbox, unless this very event is there already.
INSERT INTO outbox (id, subject, payload, headers)
VALUES (:id, :subject, :payload, :headers)
ON CONFLICT (id) DO NOTHING;

-- name: claim_events(lease_s, batch_max, blocked, since)
-- Takes the oldest events of each stream, but of blocked ones, that wait since then and that no other relay holds.
WITH RECURSIVE families AS (
    -- One step through the index for each stream, however many events wait for it.
    (
        SELECT family
        FROM outbox
        WHERE published_at IS NULL AND created_at >= :since::timestamptz
        ORDER BY family
        LIMIT 1
    )
    UNION ALL
    SELECT (
        SELECT waiting.family
        FROM outbox AS waiting
        WHERE
            waiting.published_at IS NULL
            AND waiting.family > families.family
            AND waiting.created_at >= :since::timestamptz
        ORDER BY waiting.family
        LIMIT 1
    )
    FROM families
    WHERE families.family IS NOT NULL
),

oldest AS MATERIALIZED (
    SELECT claimable.id
    FROM families
    CROSS JOIN LATERAL (
        SELECT id
        FROM outbox
        WHERE
            published_at IS NULL
            AND outbox.family = families.family
            AND outbox.created_at >= :since::timestamptz
            AND (claimed_until IS NULL OR claimed_until < now())
        ORDER BY created_at, id
        LIMIT :batch_max
        FOR UPDATE SKIP LOCKED
    ) AS claimable
    WHERE families.family <> ALL(:blocked::text[])
)

UPDATE outbox
SET claimed_until = now() + make_interval(secs => :lease_s)
FROM oldest
WHERE outbox.id = oldest.id
RETURNING
    outbox.id, outbox.subject, outbox.payload, outbox.headers, outbox.created_at,
    (SELECT streams.epoch FROM streams WHERE streams.family = outbox.family) AS epoch;

-- name: get_time()$
-- The time of the database.
SELECT now();

-- name: lock_epochs(families)
-- Says how often each stream was lost, and keeps that from changing until the end of the transaction.
SELECT family, epoch FROM streams WHERE family = ANY(:families::text[]) ORDER BY family FOR SHARE;

-- name: list_streams()
-- Lists the streams that events were published to.
SELECT family FROM streams ORDER BY family;

-- name: get_stream(family)^
-- Says what is known of a stream, and what time it is; nothing but the time of one that is not known.
SELECT
    clock_timestamp() AS look_time,
    streams.incarnation,
    coalesce(streams.epoch, 1) AS epoch,
    coalesce(streams.last_sequence, 0) AS last_sequence,
    streams.again_until IS NOT NULL AS is_lost
FROM (VALUES (:family::text)) AS asked (family)
LEFT JOIN streams ON streams.family = asked.family;

-- name: add_stream(family, incarnation, last_sequence, look_time)!
-- Remembers a stream that is seen for the first time.
INSERT INTO streams (family, incarnation, last_sequence, seen_sequence, seen_time)
VALUES (:family, :incarnation, :last_sequence, :last_sequence, :look_time)
ON CONFLICT (family) DO NOTHING;

-- name: see_stream(family, incarnation, epoch, last_sequence, handled_sequence, look_time)!
-- Remembers how far the stream and its readers are, unless it was lost meanwhile.
UPDATE streams
SET
    last_sequence = greatest(last_sequence, :last_sequence),
    handled_time = CASE WHEN seen_sequence <= :handled_sequence THEN greatest(handled_time, seen_time) ELSE handled_time END,
    seen_sequence = CASE WHEN seen_sequence <= :handled_sequence THEN :last_sequence ELSE seen_sequence END,
    seen_time = CASE WHEN seen_sequence <= :handled_sequence THEN :look_time ELSE seen_time END
WHERE family = :family AND incarnation = :incarnation AND epoch = :epoch;

-- name: lose_stream(family, incarnation, epoch, last_sequence, look_time)!
-- Remembers that the stream was lost, unless somebody did before.
UPDATE streams
SET
    incarnation = :incarnation, epoch = epoch + 1, last_sequence = :last_sequence,
    seen_sequence = :last_sequence, seen_time = :look_time,
    again_from = least(again_from, handled_time), again_until = now()
WHERE family = :family AND epoch = :epoch;

-- name: publish_again(family, batch_max)!
-- Lets a bounded batch of a lost stream's events wait again: kept ones that not every reader is known to have handled.
UPDATE outbox
SET published_at = NULL, claimed_until = NULL
WHERE id IN (
    SELECT lost.id
    FROM outbox AS lost
    JOIN streams ON streams.family = lost.family
    WHERE lost.family = :family AND lost.published_at >= streams.again_from AND lost.published_at <= streams.again_until
    ORDER BY lost.published_at
    LIMIT :batch_max
    FOR UPDATE OF lost
);

-- name: end_publishing_again(family, epoch)!
-- Notes that all events of a lost stream that were kept wait again.
UPDATE streams SET again_from = NULL, again_until = NULL WHERE family = :family AND epoch = :epoch;

-- name: mark_published(ids)!
-- Records that the bus acknowledged these events.
UPDATE outbox SET published_at = now(), claimed_until = NULL WHERE id = ANY(:ids::uuid[]);

-- name: release_claims(ids)!
-- Gives events back that could not be published.
UPDATE outbox SET claimed_until = NULL WHERE id = ANY(:ids::uuid[]) AND published_at IS NULL;

-- name: prune_outbox(retention_s, batch_max)!
-- Deletes a bounded batch of events that were published long enough ago.
DELETE FROM outbox
WHERE id IN (
    SELECT id
    FROM outbox
    WHERE published_at < now() - make_interval(secs => :retention_s)
    LIMIT :batch_max
    FOR UPDATE SKIP LOCKED
);

-- name: prune_inbox(retention_s, batch_max)!
-- Deletes a bounded batch of event ids that were handled long enough ago.
DELETE FROM inbox
WHERE (consumer, event_id) IN (
    SELECT consumer, event_id
    FROM inbox
    WHERE handled_at < now() - make_interval(secs => :retention_s)
    LIMIT :batch_max
    FOR UPDATE SKIP LOCKED
);

-- name: prune_failures(retention_s, batch_max)!
-- Deletes a bounded batch of counts of events that never came again.
DELETE FROM handler_failures
WHERE (consumer, event_id) IN (
    SELECT consumer, event_id
    FROM handler_failures
    WHERE failed_at < now() - make_interval(secs => :retention_s)
    LIMIT :batch_max
    FOR UPDATE SKIP LOCKED
);

-- name: record_handled(consumer, event_id)!
-- Claims the event for this transaction; no row inserted means that its effect is in the database already.
INSERT INTO inbox (consumer, event_id)
VALUES (:consumer, :event_id)
ON CONFLICT (consumer, event_id) DO NOTHING;

-- name: count_failure(consumer, event_id, error)$
-- Adds one failure of the handler on this event and answers how many there are.
INSERT INTO handler_failures (consumer, event_id, failures, error)
VALUES (:consumer, :event_id, 1, :error)
ON CONFLICT (consumer, event_id) DO UPDATE
SET failures = handler_failures.failures + 1, error = excluded.error, failed_at = now()
RETURNING failures;

-- name: forget_failures(consumer, event_id)!
-- Ends the count of an event that was handled or given up.
DELETE FROM handler_failures WHERE consumer = :consumer AND event_id = :event_id;

-- name: add_dead_letter(consumer, event_id, subject, payload, headers, reason, error, failures)$
-- Keeps an event that was given up; answers when, or nothing where it is kept already.
INSERT INTO dead_letters (consumer, event_id, subject, payload, headers, reason, error, failures)
VALUES (:consumer, :event_id, :subject, :payload, :headers, :reason, :error, :failures)
ON CONFLICT (consumer, event_id) DO NOTHING
RETURNING created_at;

-- name: list_dead_letters(consumer, discarded, after_time, after_id, row_max)
-- Lists a page of a consumer's dead letters, those that wait or those that were discarded, oldest first.
SELECT
    event_id, subject, payload, headers, reason, error, failures, created_at, discarded_at, discarded_by,
    discard_reason
FROM dead_letters
WHERE
    consumer = :consumer
    AND (discarded_at IS NOT NULL) = :discarded::boolean
    AND (
        :after_time::timestamptz IS NULL
        OR (created_at, event_id) > (:after_time::timestamptz, :after_id::uuid)
    )
ORDER BY created_at, event_id
LIMIT :row_max;

-- name: list_names_set_aside(consumer, names)
-- Lists those of the resources of which this consumer keeps a dead letter that nobody discarded.
SELECT DISTINCT headers ->> 'ce-subject' AS name
FROM dead_letters
WHERE consumer = :consumer AND headers ->> 'ce-subject' = ANY(:names::text[]) AND discarded_at IS NULL;

-- name: is_discarded(consumer, name, subject)$
-- Whether a person gave up an event of this subject about this resource.
SELECT EXISTS (
    SELECT
    FROM dead_letters
    WHERE
        consumer = :consumer
        AND headers ->> 'ce-subject' = :name::text
        AND subject = :subject::text
        AND discarded_at IS NOT NULL
);

-- name: discard_dead_letter(consumer, event_id, discarded_by, discard_reason)$
-- Records who gave up a dead letter and why; nothing where none waits.
UPDATE dead_letters
SET discarded_at = now(), discarded_by = :discarded_by, discard_reason = :discard_reason
WHERE consumer = :consumer AND event_id = :event_id AND discarded_at IS NULL
RETURNING coalesce(headers ->> 'ce-subject', '');

-- name: lock_dead_letter(consumer, event_id)^
-- Reads a dead letter that nobody discarded, and makes everybody else who would run it wait.
SELECT subject, headers, payload, created_at
FROM dead_letters
WHERE consumer = :consumer AND event_id = :event_id AND discarded_at IS NULL
FOR UPDATE;

-- name: keep_dead_letter(consumer, event_id, error)!
-- Counts one more failure of a dead letter.
UPDATE dead_letters
SET error = :error, failures = failures + 1
WHERE consumer = :consumer AND event_id = :event_id;

-- name: delete_dead_letter(consumer, event_id)!
-- Forgets a dead letter whose effect is in this transaction.
DELETE FROM dead_letters WHERE consumer = :consumer AND event_id = :event_id;

-- name: get_error_of_part(consumer, part_of)$
-- Says why this transaction set a part of an event aside; nothing when it did not.
SELECT error
FROM dead_letters
WHERE consumer = :consumer AND headers ->> 'ce-partof' = :part_of AND created_at = now()
LIMIT 1;
