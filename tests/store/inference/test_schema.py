"""The schema is what docs/serving.md says, and every query fits it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from chassis.db.pool import Pool
from chassis.db.queries import statements
from services.inference.endpoints.domain import new_endpoint
from services.inference.endpoints.lifecycle import TRANSITIONS, EndpointEvent, EndpointState
from services.inference.endpoints.store import EndpointStore
from tests.harness.schemas import documented_tables, stored_tables

ROOT = Path(__file__).parents[3]


async def test_migrations_produce_the_documented_schema(pool: Pool) -> None:
    assert await stored_tables(pool) == documented_tables(ROOT / "docs/serving.md")


async def test_every_query_fits_the_schema(pool: Pool) -> None:
    files = sorted((ROOT / "services/inference").rglob("queries.sql"))
    assert {file.parent.name for file in files} == {"endpoints", "models", "spending"}
    async with pool.acquire() as connection:
        for file in files:
            for name, sql in statements(file).items():
                assert await connection.prepare(sql), f"{file.parent.name}: {name}"


async def test_an_endpoint_moves_only_from_the_states_that_its_table_names(pool: Pool) -> None:
    now = datetime(2026, 11, 1, tzinfo=UTC)
    async with pool.acquire() as connection:
        for event, transition in TRANSITIONS.items():
            for state in EndpointState:
                endpoint = new_endpoint(
                    id=f"ep_{event}_{state}",
                    project_id="p",
                    organization_id="o",
                    endpoint_id=f"demo/{event}-{state}",
                    model="m",
                    created_at=now,
                )
                await EndpointStore(connection).add(endpoint, request_id=None, request_sha256="")
                await connection.execute("UPDATE endpoints SET state = $2 WHERE id = $1", endpoint.id, str(state))
                moved = await EndpointStore(connection).move(
                    endpoint.id,
                    sources=transition.sources,
                    destination=transition.destination,
                    status_message="",
                    now=now,
                )
                assert (moved is not None) == (state in transition.sources), (event, state)
                if event is EndpointEvent.SERVE and moved is not None:
                    assert moved.ready_at == now
