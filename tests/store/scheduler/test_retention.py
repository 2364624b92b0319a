"""Rows of what is long gone are deleted in batches, and nothing that lives is."""

from datetime import timedelta

from chassis.retention import RetentionKeeper
from services.scheduler.jobs.job import EventKind
from services.scheduler.jobs.lifecycle import JobState
from services.scheduler.pipelines.history_keeper import HistoryKeeper
from services.scheduler.placement.policy import Need
from services.scheduler.placement.serving import ServingAllocations
from services.scheduler.retention_rules import retention_rules
from tests.store.scheduler.world import World, checkpoint, metric, model, train

DAY_S = 86_400.0
AGE = timedelta(days=31)


def keeper(world: World, batch_max: int = 5000) -> RetentionKeeper:
    settings = world.settings.model_copy(update={"prune_batch_max": batch_max})
    return RetentionKeeper(world.pool, retention_rules(settings), settings, clock=world.clock)


async def test_a_node_that_is_long_gone_is_forgotten_with_its_devices(world: World) -> None:
    for node in ("gone", "holding", "quiet", "here"):
        await world.add_node(node)
    await world.pool.execute("UPDATE nodes SET state = 'LOST' WHERE node <> 'here'")
    await world.pool.execute("UPDATE nodes SET seen_at = now() - $1::interval WHERE node <> 'quiet'", AGE)
    await world.pool.execute(
        "INSERT INTO allocations (lease_token, owner, kind, node, incarnation, hardware_type, created_at, expires_at)"
        " VALUES (1, 'o', 'SERVING', 'holding', 'i1', 'cpu', now(), now())"
    )
    assert not await keeper(world).prune()
    rows = await world.pool.fetch("SELECT node FROM nodes JOIN devices USING (node) ORDER BY node")
    assert [row["node"] for row in rows] == ["here", "holding", "quiet"]
    # It may come back.
    await world.add_node("gone", incarnation="i2")
    assert await world.pool.fetchval("SELECT count(*) FROM devices WHERE node = 'gone'") == 1


async def test_leases_of_endpoints_go_after_their_end_in_batches(world: World) -> None:
    await world.add_node(devices=3)
    serving = ServingAllocations(world.database, world.settings)
    for number in range(3):
        got = await serving.create(Need(owner=f"endpoint-{number}", count=1, hardware_type="cpu", memory_bytes_min=0))
        assert not isinstance(got, str)
        if number < 2:
            await serving.release(f"endpoint-{number}", got.lease_token)
    assert not await keeper(world).prune()
    assert await world.pool.fetchval("SELECT count(*) FROM allocations") == 3
    await world.pool.execute(
        "UPDATE allocations SET released_at = now() - $1::interval WHERE released_at IS NOT NULL", AGE
    )
    assert [await keeper(world, 1).prune() for _ in range(3)] == [True, True, False]
    assert await world.pool.fetchval("SELECT array_agg(owner) FROM allocations") == ["endpoint-2"]
    assert await world.pool.fetchval("SELECT count(*) FROM allocation_devices") == 1


async def test_old_counts_are_forgotten(world: World) -> None:
    for number, days in enumerate((1, 181)):
        await world.pool.execute(
            "INSERT INTO dataset_analyses (file_sha256, base_revision, sequence_tokens_max, train_on_inputs,"
            " example_count, token_count, labelled_token_count, truncated_count, longest_tokens, plan_sha256, format,"
            " create_time) VALUES ($1, 'r', 1, 'auto', 1, 1, 1, 0, 1, 'p', 'f', now() - $2::interval)",
            str(number),
            timedelta(days=days),
        )
    await keeper(world).prune()
    assert await world.pool.fetchval("SELECT array_agg(file_sha256) FROM dataset_analyses") == ["0"]


async def test_of_a_job_that_ended_long_ago_its_row_and_transitions_stay(world: World) -> None:
    await world.add_node(devices=2)
    lease, other = await world.running_job(), await world.running_job()
    for running in (lease, other):
        await world.reports.report(running, [metric(1), metric(1, validation_loss=1.0)], [train(0, 1)], ["careful"])
        await world.reports.commit(running, checkpoint(1, running.lease_token))
    await world.pool.execute("UPDATE checkpoints SET obsolete_at = now()")
    await world.attempts.succeed(lease, model())
    settings = world.settings.model_copy(update={"history_batch_max": 1})
    history = HistoryKeeper(world.database, world.clock, settings)
    world.clock.jump(settings.job_detail_retention_s + DAY_S)
    rounds = 0
    while await history.prune_one():
        rounds += 1
    assert rounds > 3
    kinds = "SELECT array_agg(DISTINCT kind ORDER BY kind) FROM job_events WHERE job_id = $1"
    assert await world.pool.fetchval(kinds, lease.job_id) == [EventKind.STATE_CHANGED]
    assert len(await world.pool.fetchval(kinds, other.job_id)) == 5
    for table in ("job_usage", "checkpoints", "attempts"):
        left = await world.pool.fetch(f"SELECT job_id FROM {table}")  # noqa: S608 - the names stand above
        assert [row["job_id"] for row in left] == [other.job_id], table
    tokens = "SELECT array_agg(DISTINCT lease_token) FROM "
    assert await world.pool.fetchval(tokens + "allocations") == [other.lease_token]
    assert await world.pool.fetchval(tokens + "allocation_devices") == [other.lease_token]
    assert (await world.job(lease)).state is JobState.SUCCEEDED


async def test_leases_of_a_gang_go_with_their_leader(world: World) -> None:
    for node in ("n1", "n2"):
        await world.add_node(node)
    lease = await world.running_job(gpu_count=2)
    assert await world.pool.fetchval("SELECT count(*) FROM allocations WHERE leader_token IS NOT NULL") == 1
    await world.attempts.succeed(lease, model())
    world.clock.jump(world.settings.job_detail_retention_s + DAY_S)
    history = HistoryKeeper(world.database, world.clock, world.settings)
    while await history.prune_one():
        pass
    assert await world.pool.fetchval("SELECT count(*) FROM allocations") == 0
