-- name: save_credit_state(organization_id, state, revision, now)!
-- Stores what billing said of an organization's credit, unless something later is known.
INSERT INTO credit_states (organization_id, state, revision, heard_at)
VALUES (:organization_id, :state, :revision, :now)
ON CONFLICT (organization_id) DO UPDATE
SET state = excluded.state, revision = excluded.revision, heard_at = excluded.heard_at
WHERE credit_states.revision < excluded.revision;

-- name: save_cap_state(project_id, api_key_id, capped, until_time, cap_nanos_usd, revision, now)!
-- Stores what billing said of a cap, unless something later is known.
INSERT INTO spend_caps (project_id, api_key_id, capped, until_time, cap_nanos_usd, revision, heard_at)
VALUES (:project_id, :api_key_id, :capped, :until_time, :cap_nanos_usd, :revision, :now)
ON CONFLICT (project_id, api_key_id) DO UPDATE
SET capped = excluded.capped, until_time = excluded.until_time, cap_nanos_usd = excluded.cap_nanos_usd,
    revision = excluded.revision, heard_at = excluded.heard_at
WHERE spend_caps.revision < excluded.revision;

-- name: list_credit_states(since)
-- Credit states that were stored since a moment.
SELECT organization_id, state, revision FROM credit_states WHERE heard_at >= :since;

-- name: list_cap_states(since)
-- Spend caps that were stored since a moment.
SELECT project_id, api_key_id, capped, until_time, cap_nanos_usd, revision FROM spend_caps WHERE heard_at >= :since;
