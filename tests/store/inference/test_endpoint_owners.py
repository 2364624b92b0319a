"""Two processes of inference on one database: an endpoint is one's at a time, and none is lost with its process."""

from __future__ import annotations

import pytest

from chassis.errors import Unavailable
from services.inference.endpoints.lifecycle import EndpointState
from tests.store.inference.endpoint_world import PROJECT, EndpointWorld


@pytest.fixture
def other_world(endpoint_world: EndpointWorld) -> EndpointWorld:
    """A second process beside the first."""
    return EndpointWorld(endpoint_world.pool, endpoint_world.settings, beside=endpoint_world)


async def both_look(*worlds: EndpointWorld, seconds: float, step_s: float = 1.0) -> None:
    for _ in range(round(seconds / step_s)):
        await worlds[0].clock.advance(step_s)
        for world in worlds:
            await world.look()


async def test_two_processes_start_one_engine_and_bill_one_minute(
    endpoint_world: EndpointWorld, other_world: EndpointWorld
) -> None:
    id = await endpoint_world.create()
    await both_look(endpoint_world, other_world, seconds=20)
    endpoint = await endpoint_world.get(id)
    assert endpoint.state == EndpointState.READY
    engines = [len(world.workshop.alive) for world in (endpoint_world, other_world)]
    assert sorted(engines) == [0, 1]
    owner = (endpoint_world, other_world)[engines.index(1)]
    assert (endpoint.owner, endpoint.owner_address) == (owner.claims.owner, owner.claims.address)
    assert list(endpoint_world.scheduler.leases.values()) == [endpoint.lease_token]
    assert len(await endpoint_world.minutes(id)) == endpoint.billed_minutes == 1
    # A longer life of both changes nothing, whatever the one thinks of the silence of the other.
    await both_look(endpoint_world, other_world, seconds=30)
    assert (await endpoint_world.get(id)).lease_token == endpoint.lease_token
    await other_world.stop(id)
    await both_look(endpoint_world, other_world, seconds=2)
    assert (await endpoint_world.get(id)).state == EndpointState.STOPPED
    assert not owner.workshop.alive
    assert not endpoint_world.scheduler.leases


async def test_a_survivor_takes_over_once_claim_and_lease_are_over(
    endpoint_world: EndpointWorld, other_world: EndpointWorld
) -> None:
    id = await endpoint_world.create()
    first = await endpoint_world.reaches(id, EndpointState.READY)
    await both_look(endpoint_world, other_world, seconds=5)
    # From here on the first process does nothing any more. Its claim looks old, but the second one was away, too.
    await endpoint_world.pool.execute("UPDATE endpoints SET claim_until = now() - interval '1 second'")
    other_world.clock.jump(3600)
    await other_world.look()
    assert (await other_world.get(id)).owner == first.owner
    await both_look(other_world, seconds=other_world.settings.claim_duration_s + 1)
    waiting = await other_world.get(id)
    # Nobody renews the devices, but until the scheduler says so an engine may be on them.
    assert (waiting.state, waiting.owner, waiting.lease_token) == (EndpointState.PENDING, "", None)
    assert "process that served it before" in waiting.status_message
    assert not other_world.workshop.alive
    with pytest.raises(Unavailable):
        await other_world.router.target(PROJECT, waiting.endpoint_id)
    other_world.scheduler.expire()
    other_world.scheduler.expire()
    again = await other_world.reaches(id, EndpointState.READY)
    assert (again.owner, again.lease_token) != (first.owner, first.lease_token)
    assert list(other_world.scheduler.leases.values()) == [again.lease_token]
    # The hour in between served nobody.
    assert len(await other_world.minutes(id)) == 2


async def test_a_process_that_wakes_up_ends_its_engine_and_nothing_else(
    endpoint_world: EndpointWorld, other_world: EndpointWorld
) -> None:
    id = await endpoint_world.create()
    await endpoint_world.reaches(id, EndpointState.READY)
    await other_world.outlast_claims_of_others()
    other_world.scheduler.lose_all()
    again = await other_world.reaches(id, EndpointState.READY)
    assert len(endpoint_world.workshop.alive) == 1
    await endpoint_world.look()
    await endpoint_world.look()
    assert not endpoint_world.workshop.alive
    assert await other_world.get(id) == again
    assert list(other_world.scheduler.leases.values()) == [again.lease_token]
    await both_look(endpoint_world, other_world, seconds=3)
    assert (await other_world.get(id)).owner == other_world.claims.owner


@pytest.mark.parametrize("scheduler_away", [False, True])
async def test_a_process_that_stops_hands_its_endpoints_over(
    endpoint_world: EndpointWorld, other_world: EndpointWorld, scheduler_away: bool
) -> None:
    id, stopping = await endpoint_world.create(), await endpoint_world.create()
    for each in (id, stopping):
        await endpoint_world.reaches(each, EndpointState.READY)
    await both_look(endpoint_world, other_world, seconds=70)
    await endpoint_world.stop(stopping)
    await endpoint_world.reconciler.stop_taking()
    endpoint_world.scheduler.away = scheduler_away
    await endpoint_world.reconciler.hand_over()
    assert not endpoint_world.workshop.alive
    assert not (await endpoint_world.get(id)).owner
    endpoint_world.scheduler.away = False
    assert endpoint_world.scheduler.holds(id) == scheduler_away
    if scheduler_away:
        # Nobody could be told: what was held ends by itself.
        endpoint_world.scheduler.lose_all()
    again = await other_world.reaches(id, EndpointState.READY)
    assert again.owner == other_world.claims.owner
    await both_look(other_world, seconds=20)
    # The second minute was begun before the stop, and goes on.
    assert len(await other_world.minutes(id)) == 2
    if not scheduler_away:
        assert (await other_world.get(stopping)).state == EndpointState.STOPPED
        assert list(other_world.scheduler.leases.values()) == [again.lease_token]


async def test_a_process_that_leaves_takes_on_nothing(endpoint_world: EndpointWorld) -> None:
    await endpoint_world.reconciler.stop_taking()
    id = await endpoint_world.create()
    for _ in range(3):
        await endpoint_world.look()
    assert (await endpoint_world.get(id)).state == EndpointState.PENDING
    assert not endpoint_world.scheduler.leases


async def test_an_endpoint_waits_while_its_process_has_the_certificate_of_another_node(
    endpoint_world: EndpointWorld,
) -> None:
    """It is the operator's to mend, so no endpoint of a user fails of it."""
    world = endpoint_world
    world.scheduler.foreign_nodes.add(world.settings.node_name)
    id = await world.create()
    await world.look()
    waiting = await world.get(id)
    assert waiting.state == EndpointState.PENDING
    assert "certificate of its own node" in waiting.status_message
    world.scheduler.foreign_nodes.clear()
    await world.reaches(id, EndpointState.READY)


async def test_an_endpoint_is_served_where_its_process_has_devices(endpoint_world: EndpointWorld) -> None:
    settings = endpoint_world.settings
    here, there = (
        EndpointWorld(endpoint_world.pool, settings.model_copy(update={"node_name": node}), beside=endpoint_world)
        for node in ("node-a", "node-b")
    )
    here.scheduler.unknown_nodes.add("node-a")
    id = await here.create()
    await here.look()
    assert "node-a is not registered" in (await here.get(id)).status_message

    async def look_here() -> None:
        there.scheduler.before_answer = None
        await here.look()

    # The devices that the other process is just being given are of no use to the first one.
    there.scheduler.before_answer = look_here
    await there.look()
    ready = await there.reaches(id, EndpointState.READY)
    assert ready.owner == there.claims.owner
    assert not here.workshop.alive


async def test_a_process_that_is_cut_off_from_the_scheduler_gives_its_endpoint_up(
    endpoint_world: EndpointWorld, other_world: EndpointWorld
) -> None:
    scheduler, margin_s = endpoint_world.scheduler, endpoint_world.settings.device_margin_s
    scheduler.lease_s = 10.0
    id = await endpoint_world.create()
    first = await endpoint_world.reaches(id, EndpointState.READY)
    await both_look(endpoint_world, other_world, seconds=3)
    (engine,) = endpoint_world.workshop.alive
    # From the last renewal that was sent, a margin before the scheduler may give the devices to another.
    renewed_s = endpoint_world.clock.monotonic()
    assert engine.until_s == renewed_s + scheduler.lease_s - margin_s
    endpoint_world.line.cut = True
    await both_look(endpoint_world, other_world, seconds=scheduler.lease_s - margin_s)
    assert (await endpoint_world.get(id)).state == EndpointState.READY
    assert engine.until_s == renewed_s + scheduler.lease_s - margin_s
    await both_look(endpoint_world, other_world, seconds=1)
    assert not endpoint_world.workshop.alive
    waiting = await endpoint_world.get(id)
    assert (waiting.state, waiting.owner) == (EndpointState.PENDING, "")
    # The scheduler has not given up the lease; until then the devices are nobody's.
    await both_look(endpoint_world, other_world, seconds=1)
    assert not other_world.workshop.alive
    scheduler.expire()
    scheduler.expire()
    again = await other_world.reaches(id, EndpointState.READY)
    assert again.owner == other_world.claims.owner != first.owner
    endpoint_world.line.cut = False
    await both_look(endpoint_world, other_world, seconds=3)
    assert (await endpoint_world.get(id)).lease_token == again.lease_token
    assert list(scheduler.leases.values()) == [again.lease_token]


async def test_leases_that_are_shorter_than_the_margin_serve_nobody(endpoint_world: EndpointWorld) -> None:
    endpoint_world.scheduler.lease_s = endpoint_world.settings.device_margin_s
    id = await endpoint_world.create()
    failed = await endpoint_world.reaches(id, EndpointState.FAILED)
    assert "device_margin_s" in failed.status_message
    assert not endpoint_world.scheduler.leases
