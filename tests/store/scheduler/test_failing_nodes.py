"""A node that fails fast: jobs avoid it, and a node on which most jobs fail gets none for a while."""

from services.scheduler.jobs.job import LeaseRef
from services.scheduler.placement import policy
from services.scheduler.placement.store import AllocationStore
from tests.store.scheduler.test_fencing import FAILURE
from tests.store.scheduler.world import World, model


async def node_of(world: World, lease: LeaseRef) -> str:
    node: str = await world.pool.fetchval("SELECT node FROM allocations WHERE lease_token = $1", lease.lease_token)
    return node


async def fail_job_on(world: World, node: str) -> LeaseRef:
    lease = await world.running_job()
    assert await node_of(world, lease) == node
    await world.attempts.fail(lease, FAILURE, retryable=True)
    await world.pool.execute("UPDATE jobs SET state = 'CANCELLED' WHERE job_id = $1", lease.job_id)
    return lease


async def test_a_job_goes_to_another_node_after_it_failed_on_one(world: World) -> None:
    await world.add_node("bad")
    lease = await world.running_job()
    await world.add_node("good")
    await world.attempts.fail(lease, FAILURE, retryable=True)
    # The tightest choice by name would be "bad" again.
    lease = await world.place_again(lease)
    assert await node_of(world, lease) == "good"
    # It waits for "good" while that works on something else.
    await world.attempts.fail(lease, FAILURE, retryable=True)
    await world.pool.execute("UPDATE attempts SET blames_node = (node = 'bad')")
    await world.pool.execute("UPDATE jobs SET wake_at = now()")
    await world.pool.execute("UPDATE nodes SET heartbeat_stream = NULL WHERE node = 'bad'")
    other = await world.queued_job()
    await world.pool.execute("UPDATE jobs SET queue_time = NULL WHERE job_id = $1", lease.job_id)
    await world.placer.place_round()
    assert await node_of(world, await world.lease_of(other)) == "good"
    await world.pool.execute("UPDATE nodes SET heartbeat_stream = $1 WHERE node = 'bad'", world.ids.uuid())
    assert not await world.placer.place_round()


async def test_it_goes_back_when_no_other_node_could_take_it(world: World) -> None:
    await world.add_node("bad")
    lease = await world.running_job()
    await world.add_node("away", listens=False)
    await world.attempts.fail(lease, FAILURE, retryable=True)
    assert await node_of(world, await world.place_again(lease)) == "bad"


async def test_a_node_on_which_most_jobs_fail_is_quarantined_and_says_why(world: World) -> None:
    await world.add_node("bad")
    for _ in range(world.settings.quarantine_jobs_min):
        await world.sweeper.sweep()
        await fail_job_on(world, "bad")
    # As long as no other node does well, the fault may lie elsewhere.
    await world.sweeper.sweep()
    assert await world.pool.fetchval("SELECT quarantined_until FROM nodes") is None
    await world.add_node("other")
    await world.pool.execute("UPDATE devices SET present = false WHERE node = 'other'")
    await world.sweeper.sweep()
    row = await world.pool.fetchrow(
        "SELECT quarantine_reason, quarantined_until > now() AS lasts FROM nodes WHERE node = 'bad'"
    )
    assert row is not None
    assert row["lasts"]
    assert row["quarantine_reason"] == "3 of 3 attempts failed on it, of 3 jobs, within 600 s"
    waiting = await world.queued_job()
    assert not await world.placer.place_round()
    fleet = await AllocationStore(world.pool).load_fleet(3600, 10)
    assert "bad is in quarantine: 3 of 3" in policy.waiting_for(policy.job_need("a", 1, 0), fleet.groups, 1)
    # When it is over the node is tried again, and what it did before does not count any more.
    await world.pool.execute("UPDATE nodes SET quarantined_until = now()")
    await world.sweeper.sweep()
    assert await world.placer.place_round()
    assert (await world.job(waiting)).attempt_count == 1


async def test_one_bad_job_and_a_few_failures_among_many_quarantine_nobody(world: World) -> None:
    await world.add_node("n1")
    await world.add_node("other")
    await world.pool.execute("UPDATE devices SET present = false WHERE node = 'other'")
    lease = await world.running_job()
    for _ in range(5):
        await world.attempts.fail(lease, FAILURE, retryable=True)
        lease = await world.place_again(lease)
    await world.attempts.succeed(lease, model())
    for _ in range(4):
        await world.attempts.succeed(await world.running_job(), model())
    for _ in range(2):
        await fail_job_on(world, "n1")
    await world.pool.execute("DELETE FROM attempts WHERE message <> '' AND attempt > 1")
    await world.sweeper.sweep()
    assert await world.pool.fetchval("SELECT quarantined_until FROM nodes") is None
