"""The other side of the benchmark `events`: a service that emits usage as inference does, in a process of its own.

`python -m bench.billing.usage_source PLAN` reads a JSON plan and prints JSON with the moment at which each event was
committed to the outbox. Messages are built beforehand, as inference has them in hand when it commits.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import uvloop
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from chassis.bus.connection import connect
from chassis.bus.outbox import Outbox
from chassis.bus.relay import Relay
from chassis.clock import SystemClock
from chassis.db.migrations import migrate
from chassis.db.pool import open_pool, transaction
from chassis.ids import SystemIds
from chassis.settings import ChassisSettings
from finemesh.events.v1 import tuning_events_pb2, usage_events_pb2

# Calls of one model server: a few organizations with a few models each.
ORGANIZATIONS = 4
MODELS = 4
COMMITS_AT_ONCE = 4
STEP_TOKENS = 1000
USAGES_PER_JOB = 10


def organization(number: int) -> str:
    return f"org_{number}"


def project(number: int) -> str:
    return f"proj_{number}"


def job(number: int, round_number: int) -> str:
    return f"projects/{project(number % ORGANIZATIONS)}/tuningJobs/ft-{round_number}-{number}"


def served(events: int, calls: int) -> Iterator[Message]:
    """Messages of served calls; a call makes two usage records, one for each direction."""
    ids, chance = SystemIds(), random.Random(7)
    moment = datetime.now(UTC) - timedelta(minutes=1)
    for _ in range(events):
        records = []
        for _ in range(calls):
            owner = chance.randrange(ORGANIZATIONS)
            records.append(
                usage_events_pb2.InferenceUsage(
                    work_key=ids.new("gen"),
                    project_id=project(owner),
                    organization_id=organization(owner),
                    model_id=f"acme/assistant-{chance.randrange(MODELS)}",
                    base_model="meta-llama/Llama-3.1-8B",
                    input_tokens=chance.randint(20, 4000),
                    output_tokens=chance.randint(1, 800),
                    usage_time=_timestamp(moment),
                    api_key_id=f"key_{owner}",
                )
            )
        moment += timedelta(milliseconds=1)
        yield usage_events_pb2.InferenceUsageRecorded(records=records)


def jobs(count: int, round_number: int) -> Iterator[Message]:
    """All usage of jobs, and how they ended, shuffled: settlements have to wait for what is late."""
    moment = datetime.now(UTC) - timedelta(minutes=1)
    messages: list[Message] = []
    for number in range(count):
        owner = number % ORGANIZATIONS
        messages += [
            usage_events_pb2.TrainingUsageRecorded(
                work_key=f"ft-{round_number}-{number}:train:{start}-{start + 1}",
                tuning_job=job(number, round_number),
                project_id=project(owner),
                organization_id=organization(owner),
                kind="train",
                start_step=start,
                end_step=start + 1,
                tokens=STEP_TOKENS,
                usage_time=_timestamp(moment),
            )
            for start in range(USAGES_PER_JOB)
        ]
        messages.append(
            tuning_events_pb2.TuningJobEnded(
                tuning_job=job(number, round_number),
                project_id=project(owner),
                organization_id=organization(owner),
                ending=tuning_events_pb2.TUNING_JOB_ENDING_COMPLETED,
                usage_record_count=USAGES_PER_JOB,
                end_time=_timestamp(moment),
            )
        )
    random.Random(7).shuffle(messages)
    return iter(messages)


async def emit(plan: dict[str, float], settings: ChassisSettings) -> dict[str, object]:
    """Commits every message to the outbox, as fast as it goes or at `events_per_s`,
    and waits until all are published."""
    messages = list(served(int(plan["events"]), int(plan["calls"])))
    few = list(jobs(int(plan["jobs"]), int(plan["round"])))
    chance = random.Random(3)
    for message in few:
        messages.insert(chance.randrange(len(messages) + 1), message)
    clock = SystemClock()
    outbox = Outbox(settings, clock=clock, ids=SystemIds())
    pool = await open_pool(settings)
    await migrate(pool, [])
    bus = await connect(settings)
    relay = Relay(pool, bus, outbox, clock=clock)
    relaying = asyncio.create_task(relay.run())
    committed: dict[str, float] = {}
    waiting = iter(enumerate(messages))
    began = time.time()
    period_s = 1 / plan["events_per_s"] if plan["events_per_s"] else 0.0

    async def commit() -> None:
        for index, message in waiting:
            await asyncio.sleep(max(0.0, began + index * period_s - time.time()))
            async with transaction(pool) as connection:
                event_id = await outbox.add(connection, message, subject_name="projects/proj_0")
            committed[str(event_id)] = time.time()
            outbox.wake()

    await asyncio.gather(*(commit() for _ in range(COMMITS_AT_ONCE)))
    while (await relay.publish_batch())[0]:
        pass
    await relay.stop()
    await relaying
    await bus.close()
    await pool.close()
    return {"began": began, "committed": committed}


def _timestamp(moment: datetime) -> Timestamp:
    value = Timestamp()
    value.FromDatetime(moment)
    return value


if __name__ == "__main__":
    PLAN = json.loads(sys.argv[1])
    SETTINGS = ChassisSettings(
        service_name="inference",
        database_url=PLAN.pop("database_url"),
        nats_url=PLAN.pop("nats_url"),
        tls_dir=Path(PLAN.pop("tls_dir")),
    )
    print(json.dumps(uvloop.run(emit(PLAN, SETTINGS))))
