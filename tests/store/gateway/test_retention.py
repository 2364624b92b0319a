"""Records of the gateway that are past keeping are deleted until none is left, and no others."""

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest_asyncio

from chassis.clock import SystemClock
from chassis.db.migrations import migrate
from chassis.db.pool import Pool, open_pool
from chassis.retention import RetentionKeeper
from services.gateway.config import MIGRATIONS, GatewaySettings
from services.gateway.retention_rules import retention_rules

YEARS = timedelta(days=3 * 365)
DAY = timedelta(days=1)


@pytest_asyncio.fixture(loop_scope="session")
async def pool(database_url: str) -> AsyncIterator[Pool]:
    pool = await open_pool(GatewaySettings(database_url=database_url))
    await migrate(pool, [MIGRATIONS])
    await pool.execute("TRUNCATE organizations, projects, api_keys, files, removals, idempotency, audit_log")
    await pool.execute("INSERT INTO organizations VALUES ('o', 'O', now())")
    await pool.execute("INSERT INTO projects VALUES ('p', 'o', 'acme', 'P', now())")
    yield pool
    await pool.close()


async def prune_all(pool: Pool) -> int:
    """How many rounds it took."""
    settings = GatewaySettings(prune_batch_max=100)
    keeper = RetentionKeeper(pool, retention_rules(settings), settings, clock=SystemClock())
    rounds = 1
    while await keeper.prune():
        rounds += 1
    return rounds


async def test_request_ids_are_forgotten_until_none_is_past_keeping(pool: Pool) -> None:
    await pool.execute(
        "INSERT INTO idempotency (project_id, method, request_id, fingerprint, resource_id, create_time)"
        " SELECT 'p', 'm', 'r' || number, decode(repeat('00', 32), 'hex'), 'x',"
        " now() - CASE WHEN number <= 250 THEN $1::interval ELSE $2::interval END"
        " FROM generate_series(1, 260) AS number",
        YEARS,
        DAY,
    )
    assert await prune_all(pool) == 3
    assert await pool.fetchval("SELECT count(*) FROM idempotency") == 10


async def test_old_entries_of_the_audit_log_are_deleted(pool: Pool) -> None:
    for actor, age in (("old", YEARS), ("young", 700 * DAY)):
        await pool.execute(
            "INSERT INTO audit_log (create_time, organization_id, project_id, actor, action, resource, trace_id)"
            " VALUES (now() - $2::interval, 'o', 'p', $1, 'key.create', 'r', '')",
            actor,
            age,
        )
    await prune_all(pool)
    assert await pool.fetchval("SELECT array_agg(actor) FROM audit_log") == ["young"]


async def test_a_file_is_forgotten_long_after_its_deletion_and_when_its_bytes_are_gone(pool: Pool) -> None:
    for file_id, deleted in (("gone", YEARS), ("stuck", YEARS), ("young", DAY), ("kept", None)):
        await pool.execute(
            "INSERT INTO files (file_id, project_id, display_name, purpose, state, size_bytes, sha256, format,"
            " line_count, error_count, errors, create_time, delete_time) VALUES ($1, 'p', '', 'fine-tune', 'ready', 1,"
            " repeat('0', 64), 'text', 1, 0, '[]', now() - $2::interval, now() - $3::interval)",
            file_id,
            YEARS,
            deleted,
        )
    await pool.execute("INSERT INTO removals (artifact_key, due_time) VALUES ('files/p/stuck', now())")
    await prune_all(pool)
    left = await pool.fetch("SELECT file_id FROM files ORDER BY file_id")
    assert [row["file_id"] for row in left] == ["kept", "stuck", "young"]
