"""What goes on all the time during a soak: chats in flight, usage by the second, reads, heartbeats of a node that only
listens. Each keeps its own figures. Not pure: the API, a database, gRPC."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, field

from bench.soak.crowd import Member
from chassis.bus.outbox import Outbox
from chassis.clock import SystemClock
from chassis.db.pool import open_pool, transaction
from chassis.ids import SystemIds
from chassis.rpc.channel import NO_DEADLINE, open_channel
from chassis.settings import ChassisSettings
from chassis.timestamps import time_to_proto
from deploy.local.stack import Stack
from finemesh.events.v1 import usage_events_pb2
from finemesh.nodes.v1 import node_pb2, node_service_pb2, node_service_pb2_grpc
from finemesh_client.chat import sampling, user
from finemesh_client.errors import FinemeshError
from services.inference.config import InferenceSettings
from tests.harness.fixtures import node_tls_dir
from tests.harness.mesh import BASE

STREAM_SHARE = 5
READS_PER_S = 20.0
BEAT_S = 0.5
PAUSE_S = 1.0


@dataclass(kw_only=True)
class Figures:
    """Seconds of single calls, and how often what happened."""

    read_s: list[float] = field(default_factory=list)
    beat_s: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    usage_behind_s: float = 0.0


async def chat_for_ever(member: Member, number: int, figures: Figures) -> None:
    """One chat after the other; every fifth of a crowd's chats streams."""
    parameters = sampling(temperature=0.0, output_tokens_max=20)
    for turn in itertools.count():
        asked = [user(f"chat {number} turn {turn} of {member.tenant.slug}")]
        try:
            if number % STREAM_SHARE:
                await member.client.chat.answer(BASE, asked, parameters)
            else:
                async for _ in member.client.chat.stream(BASE, asked, parameters):
                    figures.counts["stream parts"] += 1
            figures.counts["chats"] += 1
        except FinemeshError as error:
            figures.failures[f"chat: {error.reason}"] += 1
            await asyncio.sleep(PAUSE_S)


async def read_for_ever(crowd: Sequence[Member], figures: Figures) -> None:
    """Reads of jobs and balances at an even pace, whatever the last ones took."""
    chance, pending = random.Random(5), set()
    for number in itertools.count():
        member = crowd[number % len(crowd)]
        call = chance.choice((_first_job, _balance))
        task = asyncio.create_task(_timed(call(member), figures))
        pending.add(task)
        task.add_done_callback(pending.discard)
        await asyncio.sleep(1 / READS_PER_S)


async def _timed(call: Awaitable[object], figures: Figures) -> None:
    began = time.perf_counter()
    try:
        await call
    except FinemeshError as error:
        figures.failures[f"read: {error.reason}"] += 1
    figures.read_s.append(time.perf_counter() - began)


async def _first_job(member: Member) -> None:
    async for job in member.client.jobs.list(1):
        await member.client.jobs.get(job.name)


async def _balance(member: Member) -> None:
    await member.client.billing.balance()


async def use_for_ever(stack: Stack, crowd: Sequence[Member], rate: float, figures: Figures) -> None:
    """`rate` calls a second are handed over as the meter of inference does: all that came within its pause in one event
    of its outbox, which the relay of inference publishes."""
    environment = stack.environment("inference")
    settings = ChassisSettings(service_name="inference", database_url=environment["FINEMESH_INFERENCE_DATABASE_URL"])
    ids, clock, given = SystemIds(), SystemClock(), InferenceSettings()
    outbox, pool = Outbox(settings, clock=clock, ids=ids), await open_pool(settings)
    began, sent = time.monotonic(), 0
    try:
        while True:
            await asyncio.sleep(given.usage_batch_s)
            due = min(int((time.monotonic() - began) * rate) - sent, given.usage_batch_max)
            if due <= 0:
                continue
            records = [_usage(crowd[(sent + place) % len(crowd)], ids, clock) for place in range(due)]
            async with transaction(pool) as connection:
                event = usage_events_pb2.InferenceUsageRecorded(records=records)
                await outbox.add(connection, event, subject_name=f"projects/{records[0].project_id}")
            sent += due
            figures.counts["usage events"] = sent
            figures.usage_behind_s = time.monotonic() - began - sent / rate
    finally:
        await pool.close()


def _usage(member: Member, ids: SystemIds, clock: SystemClock) -> usage_events_pb2.InferenceUsage:
    return usage_events_pb2.InferenceUsage(
        work_key=ids.new("gen"),
        project_id=member.tenant.project_id,
        organization_id=member.tenant.organization_id,
        model_id=BASE,
        base_model=BASE,
        input_tokens=200,
        output_tokens=50,
        usage_time=time_to_proto(clock.now()),
        api_key_id=member.tenant.key_id,
    )


async def beat_for_ever(stack: Stack, node: str, figures: Figures) -> None:
    """A node whose only device is set aside: from each sign of life to its answer."""
    settings = ChassisSettings(service_name="trainer", tls_dir=node_tls_dir(stack.folder.tls, node))
    channel = open_channel(settings, stack.addresses["scheduler.AGENTS"], "scheduler")
    service = node_service_pb2_grpc.NodeServiceStub(channel)
    incarnation, beats = uuid.uuid4().hex, asyncio.Queue[None]()

    async def requests() -> AsyncIterator[node_service_pb2.HeartbeatRequest]:
        while True:
            await beats.get()
            yield node_service_pb2.HeartbeatRequest(node=node, incarnation=incarnation)

    await service.RegisterNode(
        node_service_pb2.RegisterNodeRequest(
            node=node,
            incarnation=incarnation,
            # Whoever asks this node to count a dataset is answered by another.
            address=stack.addresses["trainer-0"],
            devices=[node_pb2.Device(hardware_type="cpu", set_aside_reason="it only listens")],
        )
    )
    call = service.Heartbeat(requests(), timeout=NO_DEADLINE)
    answers = aiter(call)
    while True:
        began = time.perf_counter()
        beats.put_nowait(None)
        await anext(answers)
        figures.beat_s.append(time.perf_counter() - began)
        await asyncio.sleep(BEAT_S)
