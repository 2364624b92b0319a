"""A report and a heartbeat write each row once, and touch no index by it: PostgreSQL's own counts say so."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest_asyncio

from chassis.db.pool import Pool, open_pool
from finemesh.nodes.v1 import node_pb2
from finemesh.tuning.v1 import tuning_job_pb2
from services.scheduler.attempts.attempt import BadCheckpoint
from services.scheduler.config import SchedulerSettings
from services.scheduler.jobs.job import EventKind, JobEvent, LeaseRef
from services.scheduler.jobs.lifecycle import JobState
from services.scheduler.jobs.store import JobStore
from services.scheduler.nodes.heartbeats import Heartbeats
from services.scheduler.nodes.node import Beat
from tests.store.scheduler.test_fencing import FAILURE
from tests.store.scheduler.world import World, checkpoint, fresh_world, metric, model, train

REPORTS = 40


@dataclass
class Written:
    """Updates of rows by table, and how many of them left every index as it was (heap-only tuples)."""

    updates: dict[str, int] = field(default_factory=dict)
    heap_only: dict[str, int] = field(default_factory=dict)


@pytest_asyncio.fixture(loop_scope="session")
async def lone_world(scheduler_pool: tuple[Pool, SchedulerSettings]) -> AsyncIterator[World]:
    """One connection for all, so that the counts of everything that was done can be asked for."""
    settings = scheduler_pool[1].model_copy(update={"pool_size_max": 1})
    pool = await open_pool(settings)
    yield await fresh_world(pool, settings)
    await pool.close()


async def counts(world: World) -> dict[str, tuple[int, int]]:
    await world.pool.execute("SELECT pg_stat_force_next_flush()")
    rows = await world.pool.fetch("SELECT relname, n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables")
    return {row["relname"]: (row["n_tup_upd"], row["n_tup_hot_upd"]) for row in rows}


@asynccontextmanager
async def written(world: World) -> AsyncIterator[Written]:
    before, found = await counts(world), Written()
    yield found
    after = await counts(world)
    for table, (updates, heap_only) in after.items():
        known = before.get(table, (0, 0))
        if updates > known[0]:
            found.updates[table] = updates - known[0]
            found.heap_only[table] = heap_only - known[1]


async def test_a_report_writes_the_job_once_and_no_index(lone_world: World) -> None:
    await lone_world.add_node()
    lease = await lone_world.running_job()
    async with written(lone_world) as found:
        for step in range(1, REPORTS + 1):
            told = replace(metric(step), remaining_s=float(REPORTS - step))
            await lone_world.reports.report(lease, [told], [train(step - 1, step)], [])
    assert found.updates == {"jobs": REPORTS}
    assert found.heap_only["jobs"] >= 0.9 * REPORTS


async def test_a_commit_writes_the_job_and_its_checkpoint_once(lone_world: World) -> None:
    await lone_world.add_node()
    lease = await lone_world.running_job()
    async with written(lone_world) as found:
        await lone_world.reports.commit(lease, checkpoint(1))
    assert found.updates == {"jobs": 1}


async def test_the_start_from_a_hub_writes_the_job_once(lone_world: World) -> None:
    await lone_world.add_node()
    hub = node_pb2.StartWeights(hub=tuning_job_pb2.HubStart(repository="acme/start", revision="main"))
    lease = await lone_world.placed_job(start_weights=hub.SerializeToString())
    async with written(lone_world) as found:
        await lone_world.reports.start(lease, "c" * 40)
    assert found.updates == {"jobs": 1}
    assert await start_commit(lone_world, lease) == "c" * 40
    # Told again by an agent that found another commit, or while it is being cancelled.
    for state, commit in (("RUNNING", "d" * 40), ("CANCELLING", "e" * 40)):
        await lone_world.pool.execute("UPDATE jobs SET state = $1", state)
        async with written(lone_world) as found:
            await lone_world.reports.start(lease, commit)
        assert found.updates == {"jobs": 1}
        assert await start_commit(lone_world, lease) == commit


async def start_commit(world: World, lease: LeaseRef) -> str:
    stored = await world.pool.fetchval("SELECT start_weights FROM jobs WHERE job_id = $1", lease.job_id)
    return node_pb2.StartWeights.FromString(stored).hub.revision


async def test_an_early_stop_writes_the_job_once(lone_world: World) -> None:
    await lone_world.add_node()
    lease = await lone_world.running_job()
    async with written(lone_world) as found:
        await lone_world.attempts.succeed(lease, replace(model(), stopped_early=True, step=7))
    assert found.updates["jobs"] == 1
    *_, early, ready = await history(lone_world, lease)
    assert (early.kind, early.state, ready.state) == (EventKind.STOPPED_EARLY, JobState.RUNNING, JobState.SUCCEEDED)


async def test_a_bad_checkpoint_writes_the_job_once(lone_world: World) -> None:
    await lone_world.add_node()
    lease = await lone_world.running_job()
    await lone_world.reports.commit(lease, checkpoint(1, lease.lease_token))
    bad = BadCheckpoint(step=1, manifest_sha256="sha-1")
    async with written(lone_world) as found:
        await lone_world.attempts.fail(lease, FAILURE, retryable=True, bad_checkpoint=bad)
    assert found.updates["jobs"] == 1
    *_, warning, again = await history(lone_world, lease)
    assert (warning.kind, warning.state, again.kind) == (EventKind.WARNING, JobState.RUNNING, EventKind.REQUEUED)
    assert "starts anew" in warning.message


async def history(world: World, lease: LeaseRef) -> list[JobEvent]:
    """Without gaps."""
    lines = await JobStore(world.pool).list_events(lease, 0, 100)
    assert [line.sequence for line in lines] == [*range(1, len(lines) + 1)]
    assert (await world.job(lease)).last_sequence == len(lines)
    return lines


async def test_a_heartbeat_writes_its_node_and_its_leases_once_and_no_index(lone_world: World) -> None:
    await lone_world.add_node()
    lease = await lone_world.running_job()
    heartbeats = Heartbeats(lone_world.database, lone_world.nodes, lone_world.hub, lone_world.settings)
    beat = Beat(node="n1", incarnation="i1", lease_tokens=(lease.lease_token,))
    async with written(lone_world) as found:
        for _ in range(REPORTS):
            await heartbeats._renew(beat, lone_world.ids.uuid())
    assert found.updates == {"nodes": REPORTS, "allocations": REPORTS}
    assert min(found.heap_only.values()) >= 0.9 * REPORTS
