"""What stands still: a device whose process does not die gets no job, an attempt without progress loses its lease."""

from dataclasses import replace

from services.scheduler.jobs.lifecycle import JobState
from services.scheduler.nodes.node import DeviceFacts, NodeRegistration
from services.scheduler.nodes.store import NodeStore
from services.scheduler.placement.store import AllocationStore
from tests.store.scheduler.world import LIMITS, World, metric


async def renewed(world: World, lease_token: int) -> bool:
    async with world.database.writing() as connection:
        return bool(await AllocationStore(connection).renew_leases("n1", "i1", [lease_token], **LIMITS))


async def test_a_device_that_was_set_aside_is_given_to_nobody_and_says_why(world: World) -> None:
    devices = [DeviceFacts(index=index, hardware_type="cpu", memory_bytes=0, uuid="") for index in range(2)]
    devices[0] = replace(devices[0], set_aside_reason="process 7 does not die")
    registration = NodeRegistration(
        node="n1", incarnation="i1", address="127.0.0.1:1", agent_version="1", devices=tuple(devices)
    )
    await world.nodes.register(registration)
    await NodeStore(world.pool).open_heartbeat("n1", "i1", world.ids.uuid())
    first, second = await world.queued_job(), await world.queued_job()
    await world.placer.place_round()
    assert [(await world.job(ref)).state for ref in (first, second)] == [JobState.STARTING, JobState.QUEUED]
    assert await world.pool.fetchval("SELECT device_index FROM allocation_devices") == 1
    reasons = await world.pool.fetch("SELECT set_aside_reason FROM devices ORDER BY device_index")
    assert [row[0] for row in reasons] == ["process 7 does not die", ""]
    # The agent starts anew without the stuck process.
    await world.nodes.register(replace(registration, incarnation="i2", devices=(replace(devices[1], index=0),)))
    assert await world.pool.fetchval("SELECT set_aside_reason FROM devices WHERE device_index = 0") == ""


async def test_an_attempt_without_progress_is_not_renewed_without_end(world: World) -> None:
    await world.add_node()
    lease = await world.running_job()
    assert await renewed(world, lease.lease_token)
    await world.pool.execute("UPDATE attempts SET create_time = now() - interval '2 hours'")
    assert not await renewed(world, lease.lease_token)
    await world.reports.report(lease, [metric(3)], [], [])
    assert await renewed(world, lease.lease_token)
    await world.pool.execute("UPDATE jobs SET progress_time = now() - interval '2 hours'")
    assert not await renewed(world, lease.lease_token)
