"""What an attempt reports, in the database: progress, usage, checkpoints. Every write is guarded by the lease's token."""

from collections.abc import Sequence
from datetime import datetime

from chassis.db.pool import Connection
from chassis.db.queries import affected
from finemesh.nodes.v1 import node_pb2
from services.scheduler.domain import LeaseRef, Usage
from services.scheduler.lifecycle import REPORTING
from services.scheduler.progress import Metric
from services.scheduler.store import QUERIES

_REPORTING = [state.value for state in REPORTING]


async def touch_start(connection: Connection, ref: LeaseRef, now: datetime) -> None:
    """An attempt that started although it was cancelled has run."""
    await QUERIES.touch_start(connection, **vars(ref), now=now)


async def pin_start(connection: Connection, ref: LeaseRef, commit: str) -> None:
    """The hub's repository that a run starts from stays at the commit that its first attempt found. The job is locked."""
    known = await QUERIES.get_start_weights(connection, **vars(ref))
    weights = node_pb2.StartWeights() if known is None else node_pb2.StartWeights.FromString(known)
    if weights.HasField("hub") and weights.hub.revision != commit:
        weights.hub.revision = commit
        encoded = weights.SerializeToString(deterministic=True)
        await QUERIES.set_start_weights(connection, **vars(ref), start_weights=encoded)


async def record_progress(connection: Connection, ref: LeaseRef, metric: Metric, now: datetime) -> bool:
    status = await QUERIES.record_progress(
        connection,
        **vars(ref),
        states=_REPORTING,
        progress=metric.encoded,
        step=metric.step,
        remaining_s=metric.remaining_s,
        now=now,
    )
    return affected(status) > 0


async def record_usage(connection: Connection, ref: LeaseRef, usage: Usage, now: datetime) -> bool:
    """False when this work, or a part of it, was recorded before."""
    recorded = await QUERIES.record_usage(
        connection,
        **vars(ref),
        work_key=usage.work_key(ref.job_id),
        kind=usage.kind,
        start_step=usage.start_step,
        end_step=usage.end_step,
        tokens=usage.tokens,
        now=now,
    )
    return recorded is not None


async def recorded_tokens(connection: Connection, ref: LeaseRef, work_key: str) -> int | None:
    tokens: int | None = await QUERIES.get_usage_tokens(
        connection, project_id=ref.project_id, job_id=ref.job_id, work_key=work_key
    )
    return tokens


async def known_warnings(connection: Connection, ref: LeaseRef, messages: Sequence[str]) -> set[str]:
    """Those of the messages that the job's history holds already."""
    rows = QUERIES.list_known_warnings(
        connection, project_id=ref.project_id, job_id=ref.job_id, messages=list(messages)
    )
    return {row["message"] async for row in rows}


async def insert_checkpoint(
    connection: Connection,
    ref: LeaseRef,
    *,
    step: int,
    manifest_sha256: str,
    size_bytes: int,
    artifact: bytes,
    asked: bool,
    now: datetime,
) -> bool:
    """False when the step has a checkpoint already; that one stays."""
    inserted = await QUERIES.insert_checkpoint(
        connection,
        **vars(ref),
        step=step,
        manifest_sha256=manifest_sha256,
        size_bytes=size_bytes,
        artifact=artifact,
        asked=asked,
        now=now,
    )
    return inserted is not None


async def committed_artifact(connection: Connection, ref: LeaseRef, step: int) -> bytes | None:
    artifact: bytes | None = await QUERIES.get_checkpoint_artifact(
        connection, project_id=ref.project_id, job_id=ref.job_id, step=step
    )
    return artifact


async def forget_failures(connection: Connection, ref: LeaseRef, now: datetime) -> None:
    await QUERIES.forget_failures(connection, **vars(ref), now=now)


async def retire_checkpoints(connection: Connection, ref: LeaseRef, kept: int, now: datetime) -> None:
    await QUERIES.retire_checkpoints(connection, project_id=ref.project_id, job_id=ref.job_id, kept=kept, now=now)


async def list_obsolete(connection: Connection, ref: LeaseRef, page_size: int) -> list[bytes]:
    """Encoded artifacts of checkpoints that are no longer needed, the newest first."""
    rows = QUERIES.list_obsolete(connection, project_id=ref.project_id, job_id=ref.job_id, page_size=page_size)
    return [row["artifact"] async for row in rows]
