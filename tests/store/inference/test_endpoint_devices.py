"""Engines live on devices that are the endpoint's own, and trouble of one endpoint is nobody else's."""

from __future__ import annotations

import pytest

from chassis.errors import DomainError
from services.inference.endpoints.lifecycle import EndpointState
from services.inference.models.store import ModelStore
from tests.store.inference.endpoint_world import PROJECT, EndpointWorld, add_base, add_tuned


async def test_every_endpoint_is_looked_after_however_many_there_are(endpoint_world: EndpointWorld) -> None:
    world = endpoint_world
    count = world.settings.endpoints_batch_max + 1
    ids = [await world.create() for _ in range(count)]
    last = await world.reaches(ids[-1], EndpointState.READY)
    assert last.lease_token is not None
    before = world.scheduler.renewals.copy()
    await world.look()
    assert all(world.scheduler.renewals[id] == before[id] + 1 for id in ids)


async def test_renewals_do_not_wait_for_a_slow_stop(endpoint_world: EndpointWorld) -> None:
    world = endpoint_world
    slow, other = await world.create(), await world.create()
    for id in (slow, other):
        await world.reaches(id, EndpointState.READY)
    world.workshop.may_stop.clear()
    await world.stop(slow)
    before = world.scheduler.renewals[other]
    while world.scheduler.renewals[other] < before + 3:
        await world.reconciler.look()
        await world.breathe()
    assert (await world.get(slow)).state == EndpointState.STOPPING
    assert world.scheduler.holds(slow)
    world.workshop.may_stop.set()
    await world.reaches(slow, EndpointState.STOPPED)


async def test_the_engine_of_a_deleted_model_is_stopped_before_its_devices_go(endpoint_world: EndpointWorld) -> None:
    world = endpoint_world
    model = await add_tuned(world.pool)
    id = await world.create("demo/tuned")
    await world.reaches(id, EndpointState.READY)
    async with world.pool.acquire() as connection:
        assert await ModelStore(connection).delete(PROJECT, model, world.clock.now())
    world.scheduler.away = True
    for _ in range(3):
        await world.look()
    # The scheduler cannot be told; nothing ends of that, and it is tried again.
    assert not world.workshop.alive
    world.scheduler.away = False
    assert "demo/tuned" in (await world.reaches(id, EndpointState.FAILED)).status_message
    assert not world.scheduler.holds(id)


async def test_an_engine_is_found_again_after_its_base_was_imported_anew(endpoint_world: EndpointWorld) -> None:
    world = endpoint_world
    id = await world.create()
    await world.reaches(id, EndpointState.READY)
    await add_base(world.pool, "rv_other")
    for _ in range(3):
        await world.look()
    assert (await world.get(id)).state == EndpointState.READY
    # It answers with what it was started with, and says so.
    assert (await world.router.target(PROJECT, f"demo/{id}")).revision == "rv_base"
    assert len(world.workshop.alive) == 1
    await world.stop(id)
    await world.reaches(id, EndpointState.STOPPED)
    assert not world.workshop.alive
    assert not world.scheduler.holds(id)


async def test_a_call_that_was_resolved_before_a_stop_starts_nothing(endpoint_world: EndpointWorld) -> None:
    world = endpoint_world
    id = await world.create()
    await world.reaches(id, EndpointState.READY)
    target = await world.router.target(PROJECT, f"demo/{id}")
    await world.stop(id)
    await world.reaches(id, EndpointState.STOPPED)
    with pytest.raises(DomainError):
        async with world.serving.engine(target):
            pass
    assert not world.workshop.alive


async def test_a_start_ends_with_the_lease_that_it_was_for(endpoint_world: EndpointWorld) -> None:
    world = endpoint_world
    id = await world.create()
    world.workshop.may_start.clear()
    first = await world.reaches(id, EndpointState.STARTING)
    while not world.workshop.alive:
        await world.look()
    (engine,) = world.workshop.alive
    world.scheduler.lose_all()
    await world.reaches(id, EndpointState.PENDING)
    assert engine not in world.workshop.alive
    again = await world.reaches(id, EndpointState.STARTING)
    assert again.lease_token != first.lease_token
    world.workshop.may_start.set()
    await world.reaches(id, EndpointState.READY)
    assert len(world.workshop.alive) == 1


async def test_devices_that_come_after_a_stop_are_given_back(endpoint_world: EndpointWorld) -> None:
    world = endpoint_world
    id = await world.create()

    async def stop() -> None:
        world.scheduler.before_answer = None
        await world.stop(id)

    world.scheduler.before_answer = stop
    await world.reaches(id, EndpointState.STOPPED)
    assert not world.scheduler.holds(id)
