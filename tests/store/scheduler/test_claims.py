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
    async def counts(self, *args: Any, for_job: bool) -> tuning_job_pb2.DatasetCounts:
        return tuning_job_pb2.DatasetCounts(training_tokens=10)


def validator(world: World, holds: Holds, **limits: int) -> Validator:
    """It renews its claim when a test moves the clock on, and not before."""
    peers: Any = SimpleNamespace(holds=holds)
    counter: Any = Counter()
    settings = world.settings.model_copy(update={"claim_duration_s": 60.0, **limits})
    return Validator(world.database, world.jobs, counter, peers, Hub(), world.clock, world.ids, settings)


async def validate_one(worker: Validator) -> bool:
    """Claims a job and takes it through; False when none waits."""
    job = await worker.claim()
    if job is not None:
        await worker.validate(job)
    return job is not None


async def wake(world: World) -> None:
    """What waits for later may be taken now."""
    await world.pool.execute("UPDATE jobs SET wake_at = now()")


def releaser(world: World, holds: Holds) -> Releaser:
    peers: Any = SimpleNamespace(holds=holds)
    return Releaser(world.database, peers, world.clock, world.ids, world.settings)


async def cancel(world: World, ref: JobRef) -> None:
    async with world.database.writing() as connection:
        assert await world.jobs.transition(connection, JobTransition.CANCEL_WAITING, ref, "cancelled") is not None


async def test_one_worker_takes_a_job_to_the_queue(world: World) -> None:
    ref = await world.new_job()
    holds = Holds()
    outcomes = await asyncio.gather(*(validate_one(validator(world, holds)) for _ in range(4)))
    assert sum(outcomes) == 1
    job = await world.job(ref)
    assert (job.state, job.hold_id, job.quoted_nanos_usd) == (JobState.QUEUED, "hold_1", 5)


async def test_a_claim_that_ran_out_is_taken_over_and_the_late_answer_is_dropped(world: World) -> None:
    ref = await world.new_job()
    slow, quick = Holds(), Holds()
    slow.gate.clear()
    first = asyncio.create_task(validate_one(validator(world, slow)))
    await slow.asked.wait()
    await world.pool.execute("UPDATE jobs SET claimed_until = now()")
    assert await validate_one(validator(world, quick))
    before = await world.job(ref)
    assert before.state is JobState.QUEUED
    slow.gate.set()
    assert await first
    assert await world.job(ref) == before


async def test_a_cancelled_job_is_dropped_and_its_hold_is_released_once_nobody_asks_for_it(world: World) -> None:
    ref = await world.new_job()
    holds = Holds()
    holds.gate.clear()
    first = asyncio.create_task(validate_one(validator(world, holds)))
    await holds.asked.wait()
    await cancel(world, ref)
    assert not await releaser(world, holds).release_one()
    await world.clock.wait_for_sleepers()
    await world.clock.advance(20.0)
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
        assert await validate_one(validator(world, holds))
        assert not await validate_one(validator(world, holds))
        await wake(world)
    job = await world.job(ref)
    assert job.state is JobState.VALIDATING
    assert job.waiting_message == "waits for billing: away (attempt 15)"
    holds.error = None
    await validate_one(validator(world, holds))
    job = await world.job(ref)
    assert (job.state, job.waiting_message) == (JobState.QUEUED, "")


async def test_a_job_that_is_cancelled_meanwhile_waits_for_nobody(world: World) -> None:
    ref = await world.new_job()
    holds = Holds()
    holds.error = Unavailable("DEPENDENCY_UNAVAILABLE", "away")
    holds.gate.clear()
    validating = asyncio.create_task(validate_one(validator(world, holds)))
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
    while await validate_one(validator(world, holds)):
        await wake(world)
    job = await world.job(ref)
    assert job.state is JobState.FAILED
    assert tuning_job_pb2.JobError.FromString(job.error or b"").platform_fault
    (ended,) = await world.events("tuning.job.ended", ref)
    assert ended.usage_record_count == 0


async def test_a_refusal_that_cannot_be_stored_as_it_is_refuses_the_job(world: World) -> None:
    ref, holds = await world.new_job(), Holds()
    holds.error = InvalidArgument("DATASET_INVALID", "line 3: unexpected 'a\0b'")
    await validate_one(validator(world, holds))
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
        async def counts(self, *args: Any, for_job: bool) -> tuning_job_pb2.DatasetCounts:
            if (await world.pool.fetchval("SELECT claim_token FROM jobs WHERE job_id = $1", poison.job_id)) is not None:
                raise ZeroDivisionError
            return await super().counts(*args, for_job=for_job)

    counter: Any = Poisoned()
    worker._analyzer = counter
    for number in range(world.settings.validation_defects_max):
        assert (await world.job(poison)).state is JobState.VALIDATING, number
        while await validate_one(worker):
            pass
        await wake(world)
    assert (await world.job(other)).state is JobState.QUEUED
    failed = await world.job(poison)
    assert failed.state is JobState.FAILED
    (event,) = await world.events("tuning.job.ended", poison)
    assert event.ending == tuning_events_pb2.TUNING_JOB_ENDING_PLATFORM_FAILURE


async def test_a_release_that_fails_by_a_defect_is_asked_again(world: World) -> None:
    ref, holds = await world.new_job(), Holds()
    await validate_one(validator(world, holds))
    await world.pool.execute("UPDATE jobs SET release_pending = true WHERE job_id = $1", ref.job_id)
    worker = releaser(world, holds)

    async def fail(request: object, *, timeout: float) -> None:
        raise ZeroDivisionError

    answer, holds.ReleaseHold = holds.ReleaseHold, fail  # type: ignore[method-assign,assignment]
    assert await worker.release_one()
    holds.ReleaseHold = answer  # type: ignore[method-assign]
    await wake(world)
    assert await worker.release_one()
    assert len(holds.released) == 1


async def taken(world: World, worker: Validator) -> list[str]:
    """The jobs that a replica claims while it has places and finds any; it goes on with none of them."""
    found = []
    while (job := await worker.claim()) is not None:
        worker._running[job.claim] = job
        found.append(job.job_id)
    return found


async def test_one_organization_never_takes_all_places(world: World) -> None:
    crowd = [await world.new_job() for _ in range(20)]
    settings = {"validations_concurrent_max": 6, "validations_per_organization_max": 4}
    workers = [validator(world, Holds(), **settings) for _ in range(2)]
    found = await asyncio.gather(*(taken(world, worker) for worker in workers))
    assert sorted(job for jobs in found for job in jobs) == sorted(ref.job_id for ref in crowd[:4])
    other = await world.new_job(organization_id="org_b")
    assert await taken(world, workers[0]) == [other.job_id]


async def test_places_are_left_to_small_jobs_of_the_same_and_of_other_organizations(world: World) -> None:
    giant: dict[str, Any] = {"dataset_bytes": 10 * world.settings.large_dataset_bytes_min}
    for number in range(40):
        await world.new_job(organization_id=f"org_{number % 10}", **giant)
    settings = {"validations_concurrent_max": 8, "large_validations_concurrent_max": 5}
    worker = validator(world, Holds(), **settings)
    assert len(await taken(world, worker)) == 5
    small = [await world.new_job(organization_id=f"org_{number}") for number in (0, 11)]
    assert await taken(world, worker) == [small[1].job_id, small[0].job_id]


async def test_an_organizations_giants_leave_places_to_its_small_jobs(world: World) -> None:
    for _ in range(10):
        await world.new_job(dataset_bytes=world.settings.large_dataset_bytes_min)
    small = await world.new_job()
    worker = validator(world, Holds(), validations_per_organization_max=4)
    assert (await taken(world, worker))[2:] == [small.job_id]
