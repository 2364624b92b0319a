"""What is left of a storm's work once all of it should be over: jobs, leases, holds, claims, files, processes.

Nothing is, in the end: whoever waits for that asks again until the answer is empty. Not pure: databases, bus, files.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import nats
import psutil

from chassis.bus.durables import ARCHIVE
from tests.storm.artifact_files import unknown_files
from tests.storm.database_clock import old_transactions
from tests.storm.storm_mesh import DATABASES, StormMesh

# What must not exist, by service: a name, and a query for the ones that do.
ROWS = {
    "scheduler": {
        "job that has not ended": "SELECT job_id, state, waiting_message FROM jobs"
        " WHERE state NOT IN ('SUCCEEDED', 'FAILED', 'CANCELLED')",
        "job whose hold is not released": "SELECT job_id, state FROM jobs WHERE release_pending",
        "job with a lease after its end": "SELECT job_id, state, lease_token FROM jobs"
        " WHERE lease_token IS NOT NULL AND state IN ('SUCCEEDED', 'FAILED', 'CANCELLED')",
        "claim on a job": "SELECT job_id, claimed_until FROM jobs WHERE claimed_until > now()",
        "lease": "SELECT owner, node, lease_token FROM allocations WHERE released_at IS NULL",
        "device that is owned": "SELECT node, lease_token FROM allocation_devices WHERE released_at IS NULL",
        "attempt without an end": "SELECT job_id, attempt, node FROM attempts WHERE end_time IS NULL",
        "node that is lost": "SELECT node, state FROM nodes WHERE state <> 'READY'",
    },
    "billing": {
        "hold": "SELECT resource, state FROM holds WHERE state = 'held'",
        "lease of credit": "SELECT holder, organization_id, granted_nanos_usd, closed_time FROM credit_leases",
        "archive file that is half written": "SELECT object_key, write_time FROM archive_writes",
    },
    "inference": {
        "endpoint": "SELECT endpoint_id, state FROM endpoints WHERE state NOT IN ('STOPPED', 'FAILED')",
    },
    "gateway": {"removal": "SELECT artifact_key, due_time FROM removals"},
}
EVERYWHERE = {
    "event that is not published": "SELECT id, subject FROM outbox WHERE published_at IS NULL",
    "dead letter": "SELECT consumer, subject, reason, error FROM dead_letters",
}
SHOWN_MAX = 5
CHILDREN = ("tests.storm.storm_child", "tests.storm.storm_analysis")


async def leftovers(mesh: StormMesh) -> list[str]:
    """One line for each kind of thing that is left; empty when nothing is."""
    found = [line async for line in _rows(mesh)]
    found += [line async for line in _unread(mesh)]
    found += [
        f"transaction of {row['usename']} open for {row['age']}: {dict(row)}" for row in await old_transactions(mesh)
    ]
    found += [f"process left: {name}" for name in _processes(mesh)]
    found += [f"folder left: {name}" for name in _folders(mesh)]
    found += [line async for line in unknown_files(mesh)]
    return found


async def _rows(mesh: StormMesh) -> AsyncIterator[str]:
    for service in DATABASES:
        for name, query in {**ROWS[service], **EVERYWHERE}.items():
            rows = await mesh.rows(service, query)
            if rows:
                shown = "; ".join(str(dict(row)) for row in rows[:SHOWN_MAX])
                yield f"{service}: {len(rows)} x {name}: {shown}"


async def _unread(mesh: StormMesh) -> AsyncIterator[str]:
    """Events that a durable reader has not handled."""
    client = await nats.connect(mesh.stack.bus_url)
    try:
        js = client.jetstream()
        for stream in await js.streams_info():
            for reader in await js.consumers_info(str(stream.config.name)):
                # The archive files many events at a time: what a killed archiver had in hand it is given again later.
                in_hand = 0 if reader.name == ARCHIVE else reader.num_ack_pending or 0
                waiting = (reader.num_pending or 0) + in_hand
                if reader.config.durable_name and waiting:
                    yield f"{waiting} events of {stream.config.name} that {reader.name} has not handled"
    finally:
        await client.close()


def _processes(mesh: StormMesh) -> Iterator[str]:
    """Children and analyses that run, whoever they belong to now."""
    for process in psutil.process_iter(["cmdline", "cwd"]):
        command = " ".join(process.info["cmdline"] or ())
        if any(name in command for name in CHILDREN) and process.info["cwd"] == str(mesh.stack.folder.root):
            yield f"{process.pid} {command[-120:]}"


def _folders(mesh: StormMesh) -> Iterator[str]:
    """Work folders of attempts and analyses, and weights that are half fetched."""
    root = mesh.stack.folder.root
    for folder in (*(root / "work").glob("*/*/work/*"), *(root / "weights").glob(".rv_*")):
        yield str(folder.relative_to(root))
