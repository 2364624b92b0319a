"""Workers' claims on jobs: one at a time, taken over when they run out, and a late answer changes nothing."""

import asyncio
from types import SimpleNamespace
from typing import Any

from chassis.errors import Internal, InvalidArgument, Unavailable
from finemesh.billing.v1 import billing_service_pb2
from finemesh.events.v1 import tuning_events_pb2
from finemesh.holds.v1 import hold_service_pb2
from finemesh.tuning.v1 import tuning_job_pb2
from services.scheduler.jobs.job import EventKind, JobRef
from services.scheduler.jobs.lifecycle import JobState, JobTransition
from services.scheduler.pipelines.hold_releaser import Releaser
from services.scheduler.pipelines.validator import Validator
from services.scheduler.watching.hub import Hub
from tests.store.scheduler.world import World


class Holds:
    """Billing's part: waits at `gate` while it holds, when a test wants to act meanwhile."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = asyncio.Event()
        self.error: Exception | None = None
        self.released: list[str] = []

    async def CreateHold(
        self, request: hold_service_pb2.CreateHoldRequest, *, timeout: float
    ) -> hold_service_pb2.CreateHoldResponse:
        self.asked.set()
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        quote = billing_service_pb2.EstimatePriceResponse(total_nanos_usd=5, price_book_version="b")
        return hold_service_pb2.CreateHoldResponse(hold_id="hold_1", quote=quote)

    async def ReleaseHold(
        self, request: hold_service_pb2.ReleaseHoldRequest, *, timeout: float
    ) -> hold_service_pb2.ReleaseHoldResponse:
        self.released.append(request.resource)
        return hold_service_pb2.ReleaseHoldResponse()


class Counter:
    async def counts(self, spec: object, inputs: object) -> tuning_job_pb2.DatasetCounts:
        return tuning_job_pb2.DatasetCounts(training_tokens=10)


def validator(world: World, holds: Holds) -> Validator:
    """It renews its claim when a test moves the clock on, and not before."""
    peers: Any = SimpleNamespace(holds=holds)
    counter: Any = Counter()
    settings = world.settings.model_copy(update={"claim_duration_s": 0.3})
    return Validator(world.database, world.jobs, counter, peers, Hub(), world.clock, world.ids, settings)


def releaser(world: World, holds: Holds) -> Releaser:
    peers: Any = SimpleNamespace(holds=holds)
    return Releaser(world.database, peers, world.clock, world.ids, world.settings)


async def cancel(world: World, ref: JobRef) -> None:
    async with world.database.writing() as connection:
        assert await world.jobs.transition(connection, JobTransition.CANCEL_WAITING, ref, "cancelled") is not None


async def test_one_worker_takes_a_job_to_the_queue(world: World) -> None:
    ref = await world.new_job()
    holds = Holds()
    outcomes = await asyncio.gather(*(validator(world, holds).validate_one() for _ in range(4)))
    assert sum(outcomes) == 1
    job = await world.job(ref)
    assert (job.state, job.hold_id, job.quoted_nanos_usd) == (JobState.QUEUED, "hold_1", 5)


async def test_a_claim_that_ran_out_is_taken_over_and_the_late_answer_is_dropped(world: World) -> None:
    ref = await world.new_job()
    slow, quick = Holds(), Holds()
    slow.gate.clear()
    first = asyncio.create_task(validator(world, slow).validate_one())
    await slow.asked.wait()
    await world.pool.execute("UPDATE jobs SET claimed_until = $1", world.clock.now())
    assert await validator(world, quick).validate_one()
    before = await world.job(ref)
    assert before.state is JobState.QUEUED
    slow.gate.set()
    assert await first
    assert await world.job(ref) == before


async def test_a_cancelled_job_is_dropped_and_its_hold_is_released_once_nobody_asks_for_it(world: World) -> None:
    ref = await world.new_job()
    holds = Holds()
    holds.gate.clear()
    first = asyncio.create_task(validator(world, holds).validate_one())
    await holds.asked.wait()
    await cancel(world, ref)
    assert not await releaser(world, holds).release_one()
    await world.clock.wait_for_sleepers()
    await world.clock.advance(0.1)
    assert await first
    assert (await world.job(ref)).state is JobState.CANCELLED
    assert await releaser(world, holds).release_one()
    assert not await releaser(world, holds).release_one()
    assert holds.released == [f"projects/{ref.project_id}/tuningJobs/{ref.job_id}"]


async def test_a_job_that_was_cancelled_before_billing_was_asked_releases_nothing(world: World) -> None:
    ref = await world.new_job()
    await cancel(world, ref)
    assert not await releaser(world, Holds()).release_one()


async def test_a_service_that_is_away_postpones_the_job(world: World) -> None:
    ref = await world.new_job()
    holds = Holds()
    holds.error = Unavailable("DEPENDENCY_UNAVAILABLE", "away")
    for _ in range(world.settings.attempts_max + 5):
        assert await validator(world, holds).validate_one()
        assert not await validator(world, holds).validate_one()
        world.clock.jump(60.0)
    job = await world.job(ref)
    assert job.state is JobState.VALIDATING
    assert job.waiting_message == "waits for billing: away (attempt 15)"
    holds.error = None
    await validator(world, holds).validate_one()
    job = await world.job(ref)
    assert (job.state, job.waiting_message) == (JobState.QUEUED, "")


async def test_a_job_that_is_cancelled_meanwhile_waits_for_nobody(world: World) -> None:
    ref = await world.new_job()
    holds = Holds()
    holds.error = Unavailable("DEPENDENCY_UNAVAILABLE", "away")
    holds.gate.clear()
    validating = asyncio.create_task(validator(world, holds).validate_one())
    await holds.asked.wait()
    async with world.database.writing() as connection:
        await world.jobs.transition(connection, JobTransition.CANCEL_WAITING, ref, "cancelled")
    holds.gate.set()
    await validating
    job = await world.job(ref)
    assert (job.state, job.waiting_message) == (JobState.CANCELLED, "")
    assert await world.pool.fetchval("SELECT claim_token FROM jobs") is None


async def test_a_service_with_a_defect_is_given_up_in_the_end(world: World) -> None:
    ref = await world.new_job()
    holds = Holds()
    holds.error = Internal("INTERNAL", "a defect")
    while await validator(world, holds).validate_one():
        world.clock.jump(60.0)
    job = await world.job(ref)
    assert job.state is JobState.FAILED
    assert tuning_job_pb2.JobError.FromString(job.error or b"").platform_fault
    (ended,) = await world.events("tuning.job.ended", ref)
    assert ended.usage_record_count == 0


async def test_a_refusal_that_cannot_be_stored_as_it_is_refuses_the_job(world: World) -> None:
    ref, holds = await world.new_job(), Holds()
    holds.error = InvalidArgument("DATASET_INVALID", "line 3: unexpected 'a\0b'")
    await validator(world, holds).validate_one()
    assert (await world.job(ref)).state is JobState.FAILED
    lines = await world.pool.fetch("SELECT message FROM job_events WHERE job_id = $1 ORDER BY sequence", ref.job_id)
    assert lines[-1]["message"] == "refused: line 3: unexpected 'a\ufffdb'"
    async with world.database.writing() as connection:
        line = (EventKind.STATE_CHANGED, "template says 'a\0b'", None)
        await world.jobs.add_lines(connection, ref, JobState.FAILED, [line])
    assert await world.pool.fetchval("SELECT message FROM job_events ORDER BY sequence DESC") == (
        "template says 'a\ufffdb'"
    )


async def test_a_job_that_always_fails_is_set_aside_and_the_others_go_on(world: World) -> None:
    poison, holds = await world.new_job(), Holds()
    other = await world.new_job()
    worker = validator(world, holds)

    class Poisoned(Counter):
        async def counts(self, spec: object, inputs: object) -> tuning_job_pb2.DatasetCounts:
            if (await world.pool.fetchval("SELECT claim_token FROM jobs WHERE job_id = $1", poison.job_id)) is not None:
                raise ZeroDivisionError
            return await super().counts(spec, inputs)

    counter: Any = Poisoned()
    worker._analyzer = counter
    for number in range(world.settings.validation_defects_max):
        assert (await world.job(poison)).state is JobState.VALIDATING, number
        while await worker.validate_one():
            pass
        world.clock.jump(60)
    assert (await world.job(other)).state is JobState.QUEUED
    failed = await world.job(poison)
    assert failed.state is JobState.FAILED
    (event,) = await world.events("tuning.job.ended", poison)
    assert event.ending == tuning_events_pb2.TUNING_JOB_ENDING_PLATFORM_FAILURE


async def test_a_release_that_fails_by_a_defect_is_asked_again(world: World) -> None:
    ref, holds = await world.new_job(), Holds()
    await validator(world, holds).validate_one()
    await world.pool.execute("UPDATE jobs SET release_pending = true WHERE job_id = $1", ref.job_id)
    worker = releaser(world, holds)

    async def fail(request: object, *, timeout: float) -> None:
        raise ZeroDivisionError

    answer, holds.ReleaseHold = holds.ReleaseHold, fail  # type: ignore[method-assign,assignment]
    assert await worker.release_one()
    holds.ReleaseHold = answer  # type: ignore[method-assign]
    world.clock.jump(60)
    assert await worker.release_one()
    assert len(holds.released) == 1
