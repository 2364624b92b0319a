"""Passing trouble ends neither the process nor its engines: the keepers come back, and calls go on meanwhile."""

from __future__ import annotations

from pathlib import Path

import asyncpg
import pytest

from finemesh.endpoints.v1 import endpoint_service_pb2 as endpoints
from finemesh.endpoints.v1.endpoint_service_pb2_grpc import EndpointServiceStub
from finemesh.inference.v1 import inference_service_pb2 as inference
from finemesh.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from tests.contract.inference.conftest import BASE, running_world
from tests.contract.inference.test_chat import GREEDY, HELLO, metered
from tests.contract.inference.test_endpoints import create, reaches
from tests.harness.fixtures import SettingsFactory
from tests.harness.polling import eventually

WAITING = "SELECT query_start FROM pg_stat_activity WHERE application_name = 'inference' AND wait_event_type = 'Lock'"


@pytest.mark.parametrize("table", ["outbox", "endpoints", "credit_states"])
async def test_statements_that_run_into_their_time_limit_end_nobody(
    make_settings: SettingsFactory, base_folder: Path, tmp_path: Path, table: str
) -> None:
    world_of = running_world(make_settings, base_folder, tmp_path, statement_timeout_s=0.2, spending_poll_s=0.05)
    async with world_of as world:
        with world.caller():
            made = await create(world)
            await reaches(world, made.name, "READY")
            other = await asyncpg.connect(world.settings.database_url)
            # Activity is read once per transaction: whoever holds the lock sees only who waited at its first look.
            onlooker = await asyncpg.connect(world.settings.database_url)
            async with other.transaction():
                await other.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
                tried: set[object] = set()

                async def three_tries() -> bool:
                    tried.update(row["query_start"] for row in await onlooker.fetch(WAITING))
                    return len(tried) >= 3 or world.process.stopping.is_set()

                await eventually(three_tries, pause_s=0.02)
            await onlooker.close()
            assert not world.process.stopping.is_set(), world.process.failure
            answer = await InferenceServiceStub(world.channel).Chat(
                inference.ChatRequest(model=BASE, messages=HELLO, sampling=GREEDY)
            )
            assert answer.generation_id in await metered(world)
            left = "SELECT count(*) FROM outbox WHERE published_at IS NULL"
            await eventually(lambda: other.fetchval(left), lambda count: count == 0)
            await reaches(world, made.name, "READY")
            await EndpointServiceStub(world.channel).StopEndpoint(endpoints.StopEndpointRequest(name=made.name))
            await reaches(world, made.name, "STOPPED")
            await other.close()
