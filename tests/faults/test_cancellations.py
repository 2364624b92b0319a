"""Cancellations in the middle of work: what was done is paid for, once, and nothing is kept back or left running."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

from finemesh.billing.v1 import usage_record_pb2
from finemesh.tuning.v1 import tuning_job_pb2 as pb
from finemesh_client.chat import sampling, user
from tests.faults.conftest import Undisturbed, create_and_wait_for_its_middle, tokens_by_work, usage_of
from tests.harness.mesh import BASE, Mesh
from tests.harness.polling import eventually

GREEDY = {"temperature": 0.0, "output_tokens_max": 64}


async def test_a_cancelled_job_pays_for_its_finished_steps_and_gets_the_rest_back(
    mesh: Mesh, undisturbed: Undisturbed
) -> None:
    before = await mesh.client.billing.balance()
    job = await create_and_wait_for_its_middle(mesh, "cancelled-running")
    await mesh.client.jobs.cancel(job.name)
    ended = await mesh.ended(job.name)
    assert ended.state == pb.TUNING_JOB_STATE_CANCELLED
    assert job.progress.step <= ended.progress.step < ended.progress.step_count
    charge = await mesh.settled(job.name)
    usage = await usage_of(mesh, job.name)
    work = tokens_by_work(usage)
    assert work.items() <= undisturbed.usage.items()
    assert trained_steps(usage) == list(range(ended.progress.step))
    assert len(work) < len(undisturbed.usage)
    # Each record is rounded by itself, the charge once.
    assert abs(charge.charged_nanos_usd - sum(r.amount_nanos_usd for r in usage)) <= len(usage)  # type: ignore[attr-defined]
    assert 0 < charge.charged_nanos_usd < charge.held_nanos_usd == charge.quoted_nanos_usd  # type: ignore[attr-defined]
    assert charge.released_nanos_usd == charge.held_nanos_usd - charge.charged_nanos_usd  # type: ignore[attr-defined]
    after = await mesh.client.billing.balance()
    assert after.available_nanos_usd == before.available_nanos_usd - charge.charged_nanos_usd  # type: ignore[attr-defined]
    assert after.held_nanos_usd == before.held_nanos_usd
    await mesh.until_nobody_trains()


def trained_steps(usage: list[usage_record_pb2.UsageRecord]) -> list[int]:
    trained = [record for record in usage if record.kind == usage_record_pb2.USAGE_KIND_TRAINING_TOKENS]
    return sorted(step for record in trained for step in range(record.start_step, record.end_step))


async def test_a_cancelled_stream_frees_its_slot_and_is_metered_once(mesh: Mesh) -> None:
    whole = await mesh.client.chat.answer(BASE, [user("tell a long story")], sampling(**GREEDY))
    assert whole.usage.output_tokens > 20
    stream: Any = mesh.client.chat.stream(BASE, [user("tell a long story")], sampling(**GREEDY))
    async with aclosing(stream) as parts:
        heard = [await anext(parts) for _ in range(2)]
    # The engine has one slot: this one can be answered only when the stream has left it.
    await mesh.client.chat.answer(BASE, [user("next")], sampling(temperature=0.0, output_tokens_max=1))
    records = await metered(mesh, heard[0].generation_id)
    assert {r.kind: r.quantity for r in records}[usage_record_pb2.USAGE_KIND_INPUT_TOKENS] == whole.usage.input_tokens
    written = {r.kind: r.quantity for r in records}[usage_record_pb2.USAGE_KIND_OUTPUT_TOKENS]
    assert len(records) == 2
    assert 2 <= written < whole.usage.output_tokens
    # Long enough for a second record, which must not come.
    await asyncio.sleep(2)
    assert await metered(mesh, heard[0].generation_id) == records


async def metered(mesh: Mesh, generation_id: str) -> list[usage_record_pb2.UsageRecord]:
    """The call's usage records once there are any; they arrive with the bus."""

    async def booked() -> list[usage_record_pb2.UsageRecord]:
        return [r async for r in mesh.client.billing.usage(limit=50) if generation_id in r.work_key]

    return await eventually(booked, within_s=30)
