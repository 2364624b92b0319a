"""Every query against the migrated schema, and the schema's promises that no code may break."""

import re
from pathlib import Path

import pytest

from chassis.db.migrations import migrate
from chassis.db.queries import statements
from services.scheduler.database import MIGRATIONS
from tests.store.scheduler.world import World

ROOMS = sorted((Path(__file__).parents[3] / "services" / "scheduler").glob("*/queries.sql"))


async def test_every_query_prepares(world: World) -> None:
    found = {f"{path.parent.name}.{name}": sql for path in ROOMS for name, sql in statements(path).items()}
    assert len(found) > 60
    async with world.pool.acquire() as connection:
        for name, sql in found.items():
            try:
                await connection.prepare(sql)
            except Exception as error:
                raise AssertionError(f"{name}: {error}") from error


async def test_migrating_again_changes_nothing(world: World) -> None:
    assert await migrate(world.pool, [MIGRATIONS]) == []


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.parent.name)
async def test_every_query_is_named_and_explained_by_a_sentence(path: Path) -> None:
    blocks = re.split(r"^-- name: ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert blocks
    for block in blocks:
        lines = block.splitlines()
        assert re.fullmatch(r"[a-z_]+\(.*\)[\^$!]?", lines[0]), lines[0]
        assert lines[1].startswith("-- ")
        assert lines[1].endswith((".", ",", ";")), lines[1]
        assert "SELECT *" not in block


async def test_the_documented_guarantees_are_in_the_schema(world: World) -> None:
    indexes = {
        row["indexname"]: row["indexdef"]
        for row in await world.pool.fetch(
            "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = current_schema()"
        )
    }
    for name in (
        "allocation_devices_one_owner",
        "allocations_one_per_owner",
        "jobs_one_per_request",
        "jobs_one_per_output_name",
    ):
        assert "UNIQUE" in indexes[name]
    assert "released_at IS NULL" in indexes["allocation_devices_one_owner"]
    documented = (Path(__file__).parents[3] / "docs" / "leases.md").read_text(encoding="utf-8")
    for name in re.findall(r"`(allocation[a-z_]*|checkpoints|job_usage)`", documented):
        assert name in indexes or await world.pool.fetchval("SELECT to_regclass($1)", name) is not None
