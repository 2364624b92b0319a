"""A device has one owner: the database says so, whoever tries at the same time."""

import asyncio

import asyncpg
import pytest

from services.scheduler.jobs.convert import job_name
from services.scheduler.jobs.lifecycle import JobState
from services.scheduler.pipelines.placer import Overtaken
from services.scheduler.placement.allocation import AllocationKind
from services.scheduler.placement.policy import Need, Placement
from services.scheduler.placement.serving import ServingAllocations
from services.scheduler.placement.store import AllocationStore
from tests.store.scheduler.world import World, placement


async def live_rows(world: World) -> list[tuple[str, int]]:
    rows = await world.pool.fetch("SELECT node, device_index FROM allocation_devices WHERE released_at IS NULL")
    return [(row["node"], row["device_index"]) for row in rows]


async def test_many_placements_at_once_give_a_device_to_one(world: World) -> None:
    await world.add_node()
    refs = [await world.queued_job() for _ in range(8)]
    outcomes = await asyncio.gather(
        *(world.placer.apply(ref, placement(ref), {"n1": "i1"}) for ref in refs), return_exceptions=True
    )
    won = [outcome for outcome in outcomes if isinstance(outcome, int)]
    assert len(won) == 1
    assert all(isinstance(each, asyncpg.UniqueViolationError) for each in outcomes if not isinstance(each, int))
    assert await live_rows(world) == [("n1", 0)]
    states = [(await world.job(ref)).state for ref in refs]
    assert states.count(JobState.STARTING) == 1
    assert states.count(JobState.QUEUED) == 7


async def test_serving_and_training_compete_for_the_same_device(world: World) -> None:
    await world.add_node()
    ref = await world.queued_job()

    async def serve(owner: str) -> int:
        async with world.database.writing() as connection:
            allocations = AllocationStore(connection)
            token = await allocations.next_lease_token()
            spot = Placement(owner=owner, node="n1", hardware_type="cpu", device_indices=(0,))
            await allocations.insert(
                AllocationKind.SERVING, spot, "i1", now=world.database.now(), duration_s=10, lease_token=token
            )
        return token

    outcomes = await asyncio.gather(
        world.placer.apply(ref, placement(ref), {"n1": "i1"}),
        serve("projects/p/endpoints/a"),
        serve("projects/p/endpoints/b"),
        return_exceptions=True,
    )
    assert sum(isinstance(each, int) for each in outcomes) == 1
    assert len(await live_rows(world)) == 1


async def test_a_release_takes_no_device_from_another(world: World) -> None:
    """Tokens come from a sequence, so they are easily guessed: neither another's devices go free, nor a job's."""
    await world.add_node(devices=2)
    lease = await world.running_job()
    serving = ServingAllocations(world.database, world.settings)
    given = await serving.create(Need(owner="projects/p/endpoints/a", count=1, hardware_type="cpu"))
    assert not isinstance(given, str)
    before = await world.everything()
    for owner, token in (
        ("projects/p/endpoints/b", given.lease_token),
        ("projects/p/endpoints/a", lease.lease_token),
        (job_name(lease), lease.lease_token),
    ):
        await serving.release(owner, token)
        assert await world.everything() == before
    await serving.release(given.owner, given.lease_token)
    assert await live_rows(world) == [("n1", 0)]


async def test_a_gang_is_taken_whole_or_not_at_all(world: World) -> None:
    await world.add_node(devices=3)
    pair, triple = await world.queued_job(2), await world.queued_job(3)
    await world.placer.apply(pair, placement(pair, devices=(0, 1)), {"n1": "i1"})
    with pytest.raises(asyncpg.UniqueViolationError):
        await world.placer.apply(triple, placement(triple, devices=(0, 1, 2)), {"n1": "i1"})
    assert await live_rows(world) == [("n1", 0), ("n1", 1)]
    assert (await world.job(triple)).state is JobState.QUEUED


async def test_one_job_is_never_placed_twice(world: World) -> None:
    await world.add_node(devices=2)
    ref = await world.queued_job()
    outcomes = await asyncio.gather(
        world.placer.apply(ref, placement(ref, devices=(0,)), {"n1": "i1"}),
        world.placer.apply(ref, placement(ref, devices=(1,)), {"n1": "i1"}),
        return_exceptions=True,
    )
    assert sum(isinstance(each, int) for each in outcomes) == 1
    assert len(await live_rows(world)) == 1


async def test_tokens_grow(world: World) -> None:
    await world.add_node(devices=3)
    tokens = [(await world.placed_job()).lease_token for _ in range(3)]
    assert tokens == sorted(set(tokens))


async def test_released_devices_can_be_taken_again(world: World) -> None:
    await world.add_node()
    lease = await world.running_job()
    assert await world.lose(lease)
    assert await live_rows(world) == []
    await world.place_again(lease)
    assert await live_rows(world) == [("n1", 0)]


async def test_a_node_that_does_not_listen_gets_nothing(world: World) -> None:
    await world.add_node(listens=False)
    ref = await world.queued_job()
    assert not await world.placer.place_round()
    assert (await world.job(ref)).state is JobState.QUEUED


async def test_a_placement_for_an_old_incarnation_is_dropped(world: World) -> None:
    await world.add_node()
    ref = await world.queued_job()
    await world.add_node(incarnation="i2")
    with pytest.raises(Overtaken):
        await world.placer.apply(ref, placement(ref), {"n1": "i1"})
    assert await live_rows(world) == []
