"""One bad item stops no loop: it is left alone for a growing pause, and everybody else's work goes on."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest

from finemesh.events.v1 import tuning_events_pb2
from finemesh.holds.v1 import hold_service_pb2
from finemesh.tuning.v1 import tuning_job_pb2
from services.scheduler.jobs.convert import job_name
from services.scheduler.jobs.job import EventKind, JobRef
from services.scheduler.jobs.lifecycle import JobState, JobTransition
from services.scheduler.pipelines.history_keeper import HistoryKeeper
from services.scheduler.pipelines.hold_renewer import Renewer
from services.scheduler.pipelines.store import HistoryStore
from tests.store.scheduler.test_resume import sweep_for
from tests.store.scheduler.world import World


class Poison:
    """Makes one method of an object fail by a defect for one job, until it is cured."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, target: Any, method: str, is_meant: Callable[..., bool]
    ) -> None:
        honest, self.tries, self.cured = getattr(target, method), 0, False

        async def poisoned(*args: Any, **options: Any) -> Any:
            if not self.cured and is_meant(*args, **options):
                self.tries += 1
                raise ZeroDivisionError
            return await honest(*args, **options)

        monkeypatch.setattr(target, method, poisoned)


async def test_a_lease_that_cannot_be_ended_stops_no_sweep(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.add_node(devices=2)
    bad, good = await world.running_job(), await world.running_job()
    poison = Poison(monkeypatch, world.attempts, "lose", lambda connection, ref, *_, **__: ref.job_id == bad.job_id)
    await sweep_for(world, 12, silent=False)
    await sweep_for(world, 13, silent=True)
    assert (await world.job(good)).state is JobState.QUEUED
    assert (await world.job(bad)).state is JobState.RUNNING
    assert 0 < poison.tries < 8, "with pauses that grow"
    poison.cured = True
    await sweep_for(world, 20, silent=True)
    assert (await world.job(bad)).state is JobState.QUEUED


async def test_a_job_that_cannot_be_placed_holds_up_no_other(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.add_node()
    bad, good = await world.queued_job(), await world.queued_job()
    poison = Poison(monkeypatch, world.placer, "apply", lambda ref, *_: ref.job_id == bad.job_id)
    for _ in range(3):
        await world.placer.place_round()
    # It gets no devices while it is left alone, or nobody behind it would.
    assert ((await world.job(good)).state, (await world.job(bad)).state) == (JobState.STARTING, JobState.QUEUED)
    assert poison.tries == 1
    poison.cured = True
    await world.add_node("n2")
    world.clock.jump(2.0)
    assert await world.placer.place_round()
    assert (await world.job(bad)).state is JobState.STARTING


async def test_a_job_that_can_never_be_placed_fails_and_owes_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose validation always fails: with its reason, and after a number of tries."""
    await world.add_node()
    bad = await world.queued_job()
    poison = Poison(monkeypatch, world.placer, "apply", lambda ref, *_: ref.job_id == bad.job_id)
    for _ in range(world.settings.placement_defects_max + 3):
        assert not await world.placer.place_round()
        world.clock.jump(300.0)
    job = await world.job(bad)
    assert (job.state, poison.tries) == (JobState.FAILED, world.settings.placement_defects_max)
    assert job.error is not None
    error = tuning_job_pb2.JobError.FromString(job.error)
    assert (error.reason, error.platform_fault) == ("INTERNAL", True)
    assert error.message == "placement failed 10 times (ZeroDivisionError); nothing is charged"
    (ended,) = await world.events("tuning.job.ended", bad)
    assert ended.ending == tuning_events_pb2.TUNING_JOB_ENDING_PLATFORM_FAILURE
    good = await world.queued_job()
    assert await world.placer.place_round()
    assert (await world.job(good)).state is JobState.STARTING


async def test_a_job_whose_placement_collides_without_end_fails(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once or twice means that another replica was faster; without end, that rows contradict each other."""
    await world.add_node()
    bad = await world.queued_job()
    settings = world.settings.model_copy(update={"placement_defects_max": 3})
    monkeypatch.setattr(world.placer, "_settings", settings)
    collisions = 0

    async def apply(*_: Any) -> int:
        nonlocal collisions
        collisions += 1
        raise asyncpg.UniqueViolationError("a device has an owner already")

    monkeypatch.setattr(world.placer, "apply", apply)
    for _ in range(3):
        assert not await world.placer.place_round()
    assert ((await world.job(bad)).state, collisions) == (JobState.QUEUED, 3)
    for _ in range(4):
        await world.placer.place_round()
        world.clock.jump(300.0)
    job = await world.job(bad)
    assert (job.state, collisions) == (JobState.FAILED, 6)
    assert job.error is not None
    error = tuning_job_pb2.JobError.FromString(job.error)
    assert error.message == "placement failed 3 times (UniqueViolationError); nothing is charged"


async def test_a_history_that_cannot_be_thinned_holds_up_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, young = await world.new_job(), await world.new_job()
    for ref in (old, young):
        async with world.database.writing() as connection:
            await world.jobs.add_lines(connection, ref, JobState.QUEUED, [(EventKind.METRICS, "step 1", None)])
        async with world.database.writing() as connection:
            assert await world.jobs.transition(connection, JobTransition.CANCEL_WAITING, ref, "cancelled") is not None
        world.clock.jump(1.0)
    world.clock.jump(world.settings.metric_retention_s)
    poison = Poison(monkeypatch, HistoryStore, "prune_lines", lambda store, job_id, *_: job_id == old.job_id)
    keeper = HistoryKeeper(world.database, world.clock, world.settings)
    while await keeper.prune_one():
        pass
    kept = "SELECT job_id FROM job_events WHERE kind = 'METRICS'"
    assert ([row["job_id"] for row in await world.pool.fetch(kept)], poison.tries) == ([old.job_id], 1)
    poison.cured = True
    world.clock.jump(2.0)
    while await keeper.prune_one():
        pass
    assert await world.pool.fetch(kept) == []


async def test_a_job_that_is_cancelled_before_its_placement_is_given_up_stays_cancelled(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a database that is away counts as no defect of the job."""
    monkeypatch.setattr(world.placer, "_settings", world.settings.model_copy(update={"placement_defects_max": 1}))
    await world.add_node()
    ref = await world.queued_job()
    failures: list[Exception] = [ConnectionResetError("away"), ZeroDivisionError()]

    async def apply(*_: Any) -> int:
        if len(failures) == 1:
            async with world.database.writing() as connection:
                await world.jobs.transition(connection, JobTransition.CANCEL_WAITING, ref, "cancelled")
        raise failures.pop(0)

    monkeypatch.setattr(world.placer, "apply", apply)
    with pytest.raises(ConnectionResetError):
        await world.placer.place_round()
    assert (await world.job(ref)).state is JobState.QUEUED
    assert not await world.placer.place_round()
    assert ((await world.job(ref)).state, failures) == (JobState.CANCELLED, [])
    assert await world.events("tuning.job.ended", ref) == []


class Holds:
    """Billing, where all holds are over, and one overdue hold has a name that nobody can read."""

    def __init__(self, overdue: list[str]) -> None:
        self.overdue = overdue
        self.told: list[str] = []

    async def RenewHolds(
        self, request: hold_service_pb2.RenewHoldsRequest, *, timeout: float
    ) -> hold_service_pb2.RenewHoldsResponse:
        return hold_service_pb2.RenewHoldsResponse(ended_resources=request.resources)

    async def ListOverdueHolds(
        self, request: hold_service_pb2.ListOverdueHoldsRequest, *, timeout: float
    ) -> hold_service_pb2.ListOverdueHoldsResponse:
        return hold_service_pb2.ListOverdueHoldsResponse(resources=self.overdue)

    async def EndHolds(
        self, request: hold_service_pb2.EndHoldsRequest, *, timeout: float
    ) -> hold_service_pb2.EndHoldsResponse:
        self.told += [*request.ended_resources, *request.unknown_resources]
        return hold_service_pb2.EndHoldsResponse()


async def test_a_job_that_cannot_be_ended_with_its_hold_stops_no_renewal(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = await world.queued_job(), await world.queued_job()
    Poison(monkeypatch, world.attempts, "expire", lambda ref, *_: ref.job_id == bad.job_id)
    unknown = job_name(JobRef(project_id="proj_x", job_id="ft-unknown"))
    holds = Holds(["nonsense", unknown])
    peers: Any = SimpleNamespace(holds=holds)
    await Renewer(world.database, world.attempts, peers, world.clock, world.settings).renew_all()
    assert ((await world.job(good)).state, (await world.job(bad)).state) == (JobState.FAILED, JobState.QUEUED)
    assert holds.told == [unknown]


async def test_the_queue_is_seen_beyond_one_page_while_a_device_is_free(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many jobs wait for something else before it."""
    monkeypatch.setattr(world.placer, "_settings", world.settings.model_copy(update={"placements_batch_max": 2}))
    await world.add_node("large", devices=2)
    await world.running_job()
    await world.add_node("small")
    before = [await world.queued_job(gpu_count=2) for _ in range(5)]
    last = await world.queued_job()
    assert await world.placer.place_round()
    assert (await world.job(last)).state is JobState.STARTING
    assert {(await world.job(ref)).state for ref in before} == {JobState.QUEUED}
