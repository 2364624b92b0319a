"""Holds of unfinished jobs are renewed in pages, and a job whose hold is over ends once, wherever it stands."""

from types import SimpleNamespace
from typing import Any

import pytest

from chassis.errors import Unavailable
from finemesh.events.v1 import tuning_events_pb2
from finemesh.holds.v1 import hold_service_pb2
from services.scheduler.jobs.convert import job_name
from services.scheduler.jobs.job import JobRef
from services.scheduler.jobs.lifecycle import JobState, JobTransition
from services.scheduler.pipelines.hold_renewer import Renewer
from tests.store.scheduler.world import World


class Holds:
    """Billing's part: remembers each call, and says that the holds in `ended` are over."""

    def __init__(self, *ended: str) -> None:
        self.calls: list[list[str]] = []
        self.ended = ended
        self.away = False
        self.overdue: list[str] = []
        self.told: list[hold_service_pb2.EndHoldsRequest] = []

    async def RenewHolds(
        self, request: hold_service_pb2.RenewHoldsRequest, *, timeout: float
    ) -> hold_service_pb2.RenewHoldsResponse:
        if self.away:
            raise Unavailable("DEPENDENCY_UNAVAILABLE", "away")
        self.calls.append(list(request.resources))
        return hold_service_pb2.RenewHoldsResponse(
            ended_resources=[resource for resource in request.resources if resource in self.ended]
        )

    async def ListOverdueHolds(
        self, request: hold_service_pb2.ListOverdueHoldsRequest, *, timeout: float
    ) -> hold_service_pb2.ListOverdueHoldsResponse:
        start = int(request.page_token or 0)
        end = start + request.page_size
        return hold_service_pb2.ListOverdueHoldsResponse(
            resources=self.overdue[start:end], next_page_token=str(end) if end < len(self.overdue) else ""
        )

    async def EndHolds(
        self, request: hold_service_pb2.EndHoldsRequest, *, timeout: float
    ) -> hold_service_pb2.EndHoldsResponse:
        self.told.append(request)
        return hold_service_pb2.EndHoldsResponse()


def renewer(world: World, holds: Holds, batch_max: int = 2) -> Renewer:
    settings = world.settings.model_copy(update={"hold_renewal_batch_max": batch_max})
    peers: Any = SimpleNamespace(holds=holds)
    return Renewer(world.database, world.attempts, peers, world.clock, settings)


async def cancel(world: World, ref: JobRef, transition: JobTransition) -> None:
    async with world.database.writing() as connection:
        assert await world.jobs.transition(connection, transition, ref, "cancelled") is not None


async def test_every_unfinished_job_with_a_hold_is_renewed_in_pages(world: World) -> None:
    refs = [await world.queued_job() for _ in range(5)]
    await world.new_job()
    await cancel(world, refs[4], JobTransition.CANCEL_WAITING)
    holds = Holds()
    await renewer(world, holds).renew_all()
    assert holds.calls == [[job_name(ref) for ref in refs[:2]], [job_name(ref) for ref in refs[2:4]]]


@pytest.mark.parametrize("stands", ["queued", "placed", "running"])
async def test_a_job_whose_hold_is_over_fails_once_and_gives_its_devices_back(world: World, stands: str) -> None:
    await world.add_node()
    ref = await getattr(world, f"{stands}_job")()
    holds = Holds(job_name(ref))
    for _ in range(2):
        await renewer(world, holds).renew_all()
    job = await world.job(ref)
    assert job.state is JobState.FAILED
    (event,) = await world.events("tuning.job.ended", ref)
    assert event.ending == tuning_events_pb2.TUNING_JOB_ENDING_PLATFORM_FAILURE
    assert await world.pool.fetchval("SELECT count(*) FROM allocation_devices WHERE released_at IS NULL") == 0
    assert len(holds.calls) == 1


async def test_a_job_that_is_being_cancelled_ends_as_cancelled(world: World) -> None:
    await world.add_node()
    lease = await world.running_job()
    await cancel(world, lease, JobTransition.CANCEL_RUNNING)
    await renewer(world, Holds(job_name(lease))).renew_all()
    assert (await world.job(lease)).state is JobState.CANCELLING
    await world.attempts.stop(lease, 3)
    assert (await world.job(lease)).state is JobState.CANCELLED


async def test_while_billing_is_away_nobody_ends_and_it_is_asked_again_soon(world: World) -> None:
    ref = await world.queued_job()
    holds = Holds(job_name(ref))
    holds.away = True
    worker = renewer(world, holds)
    await worker.renew_all()
    assert (await world.job(ref)).state is JobState.QUEUED
    assert worker.pause_s < 60 < world.settings.hold_renewal_interval_s
    holds.away = False
    await worker.renew_all()
    assert worker.pause_s == world.settings.hold_renewal_interval_s
    assert (await world.job(ref)).state is JobState.FAILED


async def test_of_an_overdue_hold_billing_hears_only_what_is_certain(world: World) -> None:
    """A job that goes on, or whose end the bus has not got yet, may still be worth money."""
    unfinished, told, untold = [await world.queued_job() for _ in range(3)]
    unknown = JobRef(project_id="proj_a", job_id="ft_never")
    for ref in (told, untold):
        await cancel(world, ref, JobTransition.CANCEL_WAITING)
    await world.pool.execute(
        "UPDATE outbox SET published_at = now() WHERE headers ->> 'ce-subject' <> $1", job_name(untold)
    )
    holds = Holds()
    holds.overdue = [job_name(ref) for ref in (unfinished, told, untold, unknown)]
    await renewer(world, holds, batch_max=3).renew_all()
    assert [list(each.ended_resources) for each in holds.told] == [[job_name(told)], []]
    assert [list(each.unknown_resources) for each in holds.told] == [[], [job_name(unknown)]]
    # The bus came back.
    await world.pool.execute("UPDATE outbox SET published_at = now()")
    await renewer(world, holds, batch_max=4).renew_all()
    assert list(holds.told[-1].ended_resources) == [job_name(told), job_name(untold)]


async def test_a_scheduler_that_was_away_for_days_ends_no_hold_of_an_unfinished_job(world: World) -> None:
    ref = await world.queued_job()
    world.clock.jump(2 * 86_400.0)
    holds = Holds()
    holds.overdue = [job_name(ref)]
    await renewer(world, holds).renew_all()
    assert holds.calls == [[job_name(ref)]]
    assert holds.told == []
