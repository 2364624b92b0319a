"""Every event once more and in shuffled order, on the running mesh: the tables of all services stay as they were.

The copies keep their event ids and get fresh ids for the bus, so that only the consumers can tell them from new events.
"""

from __future__ import annotations

import asyncio
import json
import random
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import nats
from nats.js import JetStreamContext, api

from finemesh.tuning.v1 import tuning_job_pb2 as pb
from finemesh_client.chat import sampling, user
from tests.faults.conftest import Undisturbed, create_and_wait_for_its_middle
from tests.harness.mesh import BASE, Mesh

SERVICES = ["gateway", "scheduler", "billing", "inference"]
EMITTERS = ["scheduler", "billing", "inference"]
# Signs of life: nodes and holders of credit change with every heartbeat, and leases come and go with calls. Streams and
# the archive say what the bus was given.
VOLATILE = {("scheduler", "nodes"), ("billing", "lease_holders"), ("billing", "credit_leases")}
VOLATILE |= {("billing", "archive_files"), ("billing", "archive_writes"), *((each, "streams") for each in SERVICES)}
SEED = 20_261
QUIET_TIMEOUT_S = 120

Snapshot = dict[tuple[str, str], list[str]]


async def test_every_event_twice_and_shuffled_changes_nothing(mesh: Mesh, undisturbed: Undisturbed) -> None:
    cancelled = await create_and_wait_for_its_middle(mesh, "cancelled-for-events")
    await mesh.client.jobs.cancel(cancelled.name)
    assert (await mesh.ended(cancelled.name)).state == pb.TUNING_JOB_STATE_CANCELLED
    await mesh.settled(cancelled.name)
    await mesh.client.chat.answer(BASE, [user("hello")], sampling(temperature=0.0, output_tokens_max=4))
    async with jetstream(mesh) as js:
        await until_quiet(mesh, js)
        before = await snapshot(mesh)
        assert before["billing", "usage_records"]
        assert before["inference", "models"]
        counts = await message_counts(js)
        events = await all_events(mesh)
        assert len(events) == sum(counts.values())
        random.Random(SEED).shuffle(events)
        for subject, payload, headers in events:
            answer = await js.publish(subject, payload, headers={**headers, api.Header.MSG_ID.value: uuid.uuid4().hex})
            assert not answer.duplicate
        await until_quiet(mesh, js)
        assert await message_counts(js) == {stream: 2 * count for stream, count in counts.items()}
    after = await snapshot(mesh)
    assert before.keys() == after.keys()
    assert [table for table in before if before[table] != after[table]] == []


@asynccontextmanager
async def jetstream(mesh: Mesh) -> AsyncIterator[JetStreamContext]:
    client = await nats.connect(mesh.stack.bus_url)
    try:
        yield client.jetstream(timeout=30)
    finally:
        await client.close()


async def message_counts(js: JetStreamContext) -> dict[str, int]:
    """How many each stream was given: what every reader has handled has left it."""
    return {str(info.config.name): info.state.last_seq for info in await js.streams_info()}


async def all_events(mesh: Mesh) -> list[tuple[str, bytes, dict[str, str]]]:
    """Subject, payload and headers of everything that was published, as the outboxes keep it."""
    statement = "SELECT subject, encode(payload, 'hex') AS payload, headers::text AS headers FROM outbox"
    rows = [row for service in EMITTERS for row in await mesh.rows(service, statement)]
    return [(row["subject"], bytes.fromhex(row["payload"]), json.loads(row["headers"])) for row in rows]


async def until_quiet(mesh: Mesh, js: JetStreamContext) -> None:
    """All outboxes are published, all consumers have handled all that is there. Handling an event may make another one,
    so the looks at both count only when no message came between them."""
    async with asyncio.timeout(QUIET_TIMEOUT_S):
        while True:
            before = await message_counts(js)
            waiting = await unhandled(js) or await unpublished(mesh) or await untold(mesh)
            if not waiting and before == await message_counts(js):
                return
            # Neither a bus nor an outbox tells that it is empty.
            await asyncio.sleep(0.2)


async def unpublished(mesh: Mesh) -> int:
    statement = "SELECT count(*) AS waiting FROM outbox WHERE published_at IS NULL"
    return sum([(await mesh.rows(service, statement))[0]["waiting"] for service in SERVICES])


async def untold(mesh: Mesh) -> int:
    """The projects whose slug the gateway has still to tell inference, which is no event."""
    return (await mesh.rows("gateway", "SELECT count(*) AS waiting FROM projects WHERE NOT namespace_told"))[0][
        "waiting"
    ]


async def unhandled(js: JetStreamContext) -> int:
    readers = [reader for stream in await message_counts(js) for reader in await js.consumers_info(stream)]
    # The consumers of this mesh are durable; the test's own ordered reader is not.
    durable = [reader for reader in readers if reader.config.durable_name]
    assert durable
    return sum((reader.num_pending or 0) + (reader.num_ack_pending or 0) for reader in durable)


async def snapshot(mesh: Mesh) -> Snapshot:
    """Every row of every table of every service as text."""
    found: Snapshot = {}
    for service in SERVICES:
        names = await mesh.rows(service, "SELECT tablename FROM pg_tables WHERE schemaname = $1", service)
        for name in sorted(row["tablename"] for row in names):
            if (service, name) not in VOLATILE:
                rows = await mesh.rows(service, f'SELECT to_jsonb(t) AS row FROM "{name}" AS t')  # noqa: S608
                found[service, name] = sorted(json.dumps(json.loads(row["row"]), sort_keys=True) for row in rows)
    return found
