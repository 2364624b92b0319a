"""Quotes, previews and validations in line: whoever goes away leaves nothing, and no crowd holds up the others."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chassis.errors import ResourceExhausted
from chassis.identity import Caller, acting_as
from finemesh.tuning.v1 import tuning_job_pb2, tuning_service_pb2
from tests.contract.scheduler.world import OWNER, STRANGER, World
from tests.harness.polling import eventually

_pb = tuning_service_pb2
LARGE_BYTES = 1 << 30


def hanging(world: World, caller: Caller = OWNER, *, size_bytes: int = 10) -> tuning_job_pb2.TuningSpec:
    """A job whose analysis does not end by itself."""
    world.numbers.append(len(world.numbers))
    number = len(world.numbers)
    name = f"projects/{caller.tenant}/files/hanging-{number}"
    world.script.files[name] = f"hanging-{number}-{id(world)}"
    world.script.hanging.add(world.script.files[name])
    world.script.sizes[name] = size_bytes
    return world.spec(training_file=name)


def quote(world: World, spec: tuning_job_pb2.TuningSpec, caller: Caller = OWNER) -> asyncio.Task[Any]:
    async def ask() -> Any:
        with acting_as(caller):
            return await world.tuning.QuoteTuningJob(_pb.QuoteTuningJobRequest(spec=spec), timeout=120)

    return asyncio.create_task(ask())


def key(number: int) -> Caller:
    return replace(OWNER, subject=f"key_{number}")


async def cancelled(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_thousand_cancelled_quotes_leave_nothing_at_the_trainers(world: World) -> None:
    async with world.agent():
        for hundred in range(10):
            tasks = [quote(world, hanging(world), key(number)) for number in range(100)]
            await world.script.until(lambda: len(world.script.at_work) >= 90)
            await cancelled(tasks)
            await world.script.until(lambda: not world.script.at_work)
            assert (await quote(world, world.spec(), key(hundred))).total_nanos_usd > 0


async def test_a_key_has_so_many_quotes_and_previews_in_line_and_no_more(world: World) -> None:
    places = world.settings.quotes_per_key_max
    async with world.agent():
        tasks = [quote(world, hanging(world)) for _ in range(places)]
        await world.script.until(lambda: len(world.script.at_work) == places)
        assert world.script.at_work == [("org_a", "key_a")] * places
        with pytest.raises(ResourceExhausted) as refused:
            await quote(world, hanging(world))
        assert (refused.value.reason, refused.value.metadata["limit"]) == ("RATE_LIMITED", "quotes_per_key_max")
        assert "wait for one of them or cancel it" in refused.value.message
        spec = world.spec()
        with acting_as(OWNER), pytest.raises(ResourceExhausted):
            await world.tuning.PreviewDataset(
                _pb.PreviewDatasetRequest(file=spec.training_file, base_model=spec.base_model)
            )
        # Another key has places of its own, a job needs none, and what was counted before is told at once.
        known = world.spec()
        assert (await quote(world, known, key(7))).total_nanos_usd > 0
        assert (await quote(world, known)).total_nanos_usd > 0
        name = await world.create()
        await world.when(name, lambda job: job.quoted_nanos_usd > 0)
        await cancelled(tasks[:1])

        async def has_a_place() -> bool:
            try:
                return bool((await quote(world, world.spec())).total_nanos_usd > 0)
            except ResourceExhausted:
                return False

        await eventually(has_a_place)
        await cancelled(tasks)


async def test_a_second_replica_gives_a_key_no_further_places(world: World, tmp_path: Path) -> None:
    places = world.settings.quotes_per_key_max
    async with world.agent(), world.second_replica(tmp_path) as second:
        tasks = [quote(world, hanging(world)) for _ in range(places)]
        await world.script.until(lambda: len(world.script.at_work) == places)
        with acting_as(OWNER), pytest.raises(ResourceExhausted) as refused:
            await second.QuoteTuningJob(_pb.QuoteTuningJobRequest(spec=hanging(world)), timeout=10)
        assert refused.value.metadata["limit"] == "quotes_per_key_max"
        with acting_as(key(7)):
            known = await second.QuoteTuningJob(_pb.QuoteTuningJobRequest(spec=world.spec()), timeout=10)
        assert known.total_nanos_usd > 0
        await cancelled(tasks)


async def test_giants_that_are_validated_hold_up_no_small_job(world: World) -> None:
    async with world.agent():
        giants = [await world.create(hanging(world, size_bytes=LARGE_BYTES)) for _ in range(10)]
        await world.script.until(lambda: len(world.script.at_work) >= 4)
        name = await world.create()
        await world.when(name, lambda job: job.quoted_nanos_usd > 0)
        for giant in giants:
            await world.cancel(giant)
        # A job that is cancelled takes its analysis with it.
        await world.script.until(lambda: not world.script.at_work)


async def test_one_organizations_jobs_leave_places_to_the_others(world: World) -> None:
    async with world.agent():
        crowd = [await world.create(hanging(world)) for _ in range(40)]
        await world.script.until(lambda: len(world.script.at_work) >= 4)
        file = "projects/proj_b/files/small"
        world.script.files[file] = f"small-{id(world)}"
        with acting_as(STRANGER):
            request = _pb.CreateTuningJobRequest(spec=world.spec(training_file=file))
            name = (await world.tuning.CreateTuningJob(request)).tuning_job.name
        await world.when(name, lambda job: job.quoted_nanos_usd > 0, STRANGER)
        assert len(world.script.at_work) == world.settings.validations_per_organization_max
        for job in crowd:
            await world.cancel(job)
        await world.script.until(lambda: not world.script.at_work)
