"""Endpoints that were deleted long ago are forgotten."""

from __future__ import annotations

from datetime import timedelta

from chassis.clock import SystemClock
from chassis.db.pool import Pool
from chassis.retention import RetentionKeeper
from services.inference.config import InferenceSettings
from services.inference.retention_rules import retention_rules


async def test_endpoints_are_forgotten_a_year_after_they_were_deleted(pool: Pool) -> None:
    await pool.execute("TRUNCATE endpoints")
    for id, deleted in (("old", timedelta(days=700)), ("young", timedelta(days=1)), ("live", None)):
        await pool.execute(
            "INSERT INTO endpoints (id, project_id, organization_id, endpoint_id, model, hardware_type, gpu_count,"
            " state, created_at, deleted_at) VALUES ($1, 'p', 'o', $1, 'm', 'cpu', 1, 'STOPPED',"
            " now(), now() - $2::interval)",
            id,
            deleted,
        )
    settings = InferenceSettings(engine="stub")
    await RetentionKeeper(pool, retention_rules(settings), settings, clock=SystemClock()).prune()
    assert await pool.fetchval("SELECT array_agg(id ORDER BY id) FROM endpoints") == ["live", "young"]
