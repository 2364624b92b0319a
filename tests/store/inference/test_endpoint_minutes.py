"""Minutes are billed for what served: not for a restart, a scheduler that is away, flapping, or a clock that is set."""

from __future__ import annotations

from datetime import timedelta

from services.inference.endpoints.lifecycle import EndpointState
from tests.store.inference.endpoint_world import EndpointWorld

MINUTE = timedelta(minutes=1)


async def test_ten_minutes_of_serving_are_ten_minutes(endpoint_world: EndpointWorld) -> None:
    world = endpoint_world
    id = await world.create()
    ready = await world.reaches(id, EndpointState.READY)
    await world.look()
    await world.pass_time(9.5 * 60)
    recorded = await world.minutes(id)
    assert len(recorded) == (await world.get(id)).billed_minutes == 10
    assert ready.ready_at is not None
    begins = [event.usage_time.ToDatetime(ready.ready_at.tzinfo) for event in recorded]
    assert begins == [ready.ready_at + n * MINUTE for n in range(10)]
    assert [event.minute for event in recorded] == list(range(10))


async def test_a_restart_of_eleven_minutes_costs_none_of_them(endpoint_world: EndpointWorld) -> None:
    world = endpoint_world
    id = await world.create()
    await world.reaches(id, EndpointState.READY)
    await world.pass_time(90)
    assert len(await world.minutes(id)) == 2
    world.clock.jump(11 * 60)
    world.restart()
    await world.outlast_claims_of_others()
    await world.reaches(id, EndpointState.READY)
    await world.pass_time(30)
    assert len(await world.minutes(id)) == 3


async def test_while_the_scheduler_is_away_nothing_is_billed(endpoint_world: EndpointWorld) -> None:
    world = endpoint_world
    id = await world.create()
    await world.reaches(id, EndpointState.READY)
    await world.pass_time(30)
    world.scheduler.away = True
    await world.pass_time(6 * 60, step_s=5)
    assert len(await world.minutes(id)) == 1
    # The devices stayed its own; from here on it is known again that it serves.
    world.scheduler.away = False
    await world.pass_time(30)
    assert len(await world.minutes(id)) == 2


async def test_a_lease_lost_while_the_scheduler_was_away_is_billed_up_to_the_last_renewal(
    endpoint_world: EndpointWorld,
) -> None:
    world = endpoint_world
    id = await world.create()
    await world.reaches(id, EndpointState.READY)
    await world.pass_time(30)
    world.scheduler.away = True
    await world.pass_time(6 * 60, step_s=5)
    world.scheduler.away = False
    world.scheduler.lose_all()
    await world.reaches(id, EndpointState.PENDING)
    assert len(await world.minutes(id)) == 1


async def test_flapping_bills_each_minute_once(endpoint_world: EndpointWorld) -> None:
    world = endpoint_world
    id = await world.create()
    began = world.clock.now()
    for _ in range(36):
        await world.reaches(id, EndpointState.READY)
        await world.pass_time(9)
        world.workshop.alive[0].die()
        await world.clock.advance(1)
        await world.reaches(id, EndpointState.PENDING)
    assert world.clock.now() - began == 6 * MINUTE
    recorded = await world.minutes(id)
    assert len(recorded) == (await world.get(id)).billed_minutes == 6
    assert len({event.work_key for event in recorded}) == 6


async def test_a_clock_that_is_set_by_an_hour_costs_nothing(endpoint_world: EndpointWorld) -> None:
    world = endpoint_world
    id = await world.create()
    for step_s in (3600, -3600, -3600):
        await world.reaches(id, EndpointState.READY)
        before = len(await world.minutes(id))
        await world.pass_time(30)
        world.clock.set_wall(step_s)
        await world.pass_time(60)
        assert 1 <= len(await world.minutes(id)) - before <= 2
        # Also a new lease after a clock that was set back is paid for.
        world.scheduler.lose_all()
        await world.reaches(id, EndpointState.PENDING)
    await world.reaches(id, EndpointState.READY)
    before = len(await world.minutes(id))
    await world.pass_time(150)
    assert 2 <= len(await world.minutes(id)) - before <= 3


async def test_a_stop_bills_no_more_than_was_begun(endpoint_world: EndpointWorld) -> None:
    world = endpoint_world
    id = await world.create()
    await world.reaches(id, EndpointState.READY)
    await world.pass_time(30)
    await world.stop(id)
    world.clock.jump(7 * 60)
    await world.reaches(id, EndpointState.STOPPED)
    assert len(await world.minutes(id)) == 1
