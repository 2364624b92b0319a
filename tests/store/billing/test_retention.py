"""What billing forgets: that a warning went out, long after its month."""

from datetime import timedelta

from chassis.clock import SystemClock
from chassis.retention import RetentionKeeper
from services.billing.config import BillingSettings
from services.billing.retention_rules import retention_rules
from tests.store.billing.world import World


async def test_warnings_of_long_ago_are_forgotten(world: World) -> None:
    for project, days in (("old", 401), ("young", 399)):
        await world.pool.execute(
            "INSERT INTO budget_alerts (project_id, api_key_id, month, percent, alert_time)"
            " VALUES ($1, '', '2026-01-01', 80, now() - $2::interval)",
            project,
            timedelta(days=days),
        )
    settings = BillingSettings()
    await RetentionKeeper(world.pool, retention_rules(settings), settings, clock=SystemClock()).prune()
    assert await world.pool.fetchval("SELECT array_agg(project_id) FROM budget_alerts") == ["young"]
