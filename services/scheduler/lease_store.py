"""Leases and allocations in the database: who has which devices, for how long. It decides neither who gets them nor why.

Locks are always taken in the order node, job, allocation, so that no two transactions wait for each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from chassis.db.pool import Connection, Pool
from chassis.db.queries import affected
from services.scheduler.domain import (
    AllocationKind,
    AllocationRecord,
    AssignmentRecord,
    AttemptOutcome,
    JobRef,
    LeasedJob,
    LeaseRef,
)
from services.scheduler.lifecycle import JobState
from services.scheduler.policy import Placement
from services.scheduler.store import QUERIES


@dataclass(frozen=True, kw_only=True)
class ExpiredLease:
    """An allocation whose time is over; `ref` is the lease of its attempt, which another node of a gang may hold, and None for
    one that serves."""

    lease_token: int
    owner: str
    ref: LeaseRef | None


async def guard_node(connection: Connection, node: str, incarnation: str) -> bool:
    """Whether this incarnation is there and listens; it stays so until the transaction ends."""
    return await QUERIES.guard_node(connection, node=node, incarnation=incarnation) is not None


async def next_lease_token(connection: Connection) -> int:
    token: int = await QUERIES.next_lease_token(connection)
    return token


async def insert_allocation(
    connection: Connection,
    lease_token: int,
    kind: AllocationKind,
    placement: Placement,
    incarnation: str,
    now: datetime,
    expires_at: datetime,
    leader_token: int | None = None,
) -> None:
    """asyncpg.UniqueViolationError when a device has an owner, or the owner has an allocation. A node that follows another one
    has a token of its own, which is in force as long as that of its leader is."""
    await QUERIES.insert_allocation(
        connection,
        lease_token=lease_token,
        owner=placement.owner,
        kind=kind.value,
        node=placement.node,
        incarnation=incarnation,
        hardware_type=placement.hardware_type,
        now=now,
        expires_at=expires_at,
        leader_token=leader_token,
    )
    await QUERIES.insert_allocation_devices(
        connection, lease_token=lease_token, node=placement.node, indices=list(placement.device_indices)
    )


async def insert_attempt(
    connection: Connection, ref: LeaseRef, attempt: int, node: str, incarnation: str, now: datetime
) -> None:
    await QUERIES.insert_attempt(
        connection,
        lease_token=ref.lease_token,
        project_id=ref.project_id,
        job_id=ref.job_id,
        attempt=attempt,
        node=node,
        incarnation=incarnation,
        now=now,
    )


async def lock_leased_job(connection: Connection, ref: LeaseRef) -> LeasedJob | None:
    """The job if `ref` holds its lease, locked until the end of the transaction; an old token finds nothing."""
    row = await QUERIES.lock_leased_job(
        connection, project_id=ref.project_id, job_id=ref.job_id, lease_token=ref.lease_token
    )
    if row is None:
        return None
    values = dict(row)
    values["state"] = JobState(values["state"])
    return LeasedJob(**values)


async def attempt_outcome(connection: Connection, ref: LeaseRef) -> AttemptOutcome | None:
    outcome = await QUERIES.get_attempt_outcome(
        connection, project_id=ref.project_id, job_id=ref.job_id, lease_token=ref.lease_token
    )
    return None if outcome is None else AttemptOutcome(outcome)


async def end_attempt(
    connection: Connection, ref: LeaseRef, owner: str, outcome: AttemptOutcome, message: str, now: datetime
) -> list[str]:
    """Ends the attempt and gives its devices back; returns the other nodes of its gang."""
    await release(connection, ref.lease_token, owner, now)
    followers = [row async for row in QUERIES.release_followers(connection, leader_token=ref.lease_token, now=now)]
    for row in followers:
        await QUERIES.release_devices(connection, lease_token=row["lease_token"], now=now)
    await QUERIES.end_attempt(
        connection, lease_token=ref.lease_token, now=now, outcome=outcome.value, message=message[:1000]
    )
    return [row["node"] for row in followers]


async def leading(connection: Connection, ref: LeaseRef) -> LeaseRef:
    """The lease of the attempt that a node of a gang works on; any other lease as it is."""
    token: int | None = await QUERIES.get_leader_token(
        connection, project_id=ref.project_id, job_id=ref.job_id, lease_token=ref.lease_token
    )
    return ref if token is None else replace(ref, lease_token=token)


async def release(connection: Connection, lease_token: int, owner: str, now: datetime) -> bool:
    released = await QUERIES.release_allocation(connection, lease_token=lease_token, owner=owner, now=now)
    await QUERIES.release_devices(connection, lease_token=lease_token, now=now)
    return affected(released) > 0


async def release_expired(connection: Connection, lease_token: int, now: datetime) -> bool:
    """False when the lease was renewed or released meanwhile."""
    if affected(await QUERIES.release_expired(connection, lease_token=lease_token, now=now)) == 0:
        return False
    await QUERIES.release_devices(connection, lease_token=lease_token, now=now)
    return True


async def renew_leases(
    connection: Connection, node: str, incarnation: str, tokens: Sequence[int], expires_at: datetime
) -> set[int]:
    """The tokens that are still in force."""
    rows = QUERIES.renew_leases(
        connection, node=node, incarnation=incarnation, lease_tokens=list(tokens), expires_at=expires_at
    )
    return {row["lease_token"] async for row in rows}


async def renew_allocation(connection: Connection, owner: str, lease_token: int, expires_at: datetime) -> bool:
    status = await QUERIES.renew_allocation(connection, owner=owner, lease_token=lease_token, expires_at=expires_at)
    return affected(status) > 0


async def get_allocation(connection: "Connection | Pool", owner: str) -> AllocationRecord | None:
    row = await QUERIES.get_allocation(connection, owner=owner)
    if row is None:
        return None
    return AllocationRecord(
        lease_token=row["lease_token"],
        owner=row["owner"],
        kind=AllocationKind(row["kind"]),
        node=row["node"],
        hardware_type=row["hardware_type"],
        device_indices=tuple(row["device_indices"]),
        expires_at=row["expires_at"],
    )


async def list_expired(pool: Pool, now: datetime, page_size: int) -> list[ExpiredLease]:
    return [
        ExpiredLease(
            lease_token=row["lease_token"],
            owner=row["owner"],
            ref=None
            if row["job_id"] is None
            else LeaseRef(project_id=row["project_id"], job_id=row["job_id"], lease_token=row["attempt_token"]),
        )
        async for row in QUERIES.list_expired(pool, now=now, page_size=page_size)
    ]


async def list_node_leases(connection: Connection, node: str) -> list[ExpiredLease]:
    """Those of training, whether their time is over or not."""
    return [
        ExpiredLease(
            lease_token=row["lease_token"],
            owner=row["owner"],
            ref=LeaseRef(project_id=row["project_id"], job_id=row["job_id"], lease_token=row["attempt_token"]),
        )
        async for row in QUERIES.list_node_leases(connection, node=node)
    ]


async def expire_node_leases(connection: Connection, node: str, now: datetime) -> None:
    await QUERIES.expire_node_leases(connection, node=node, now=now)


async def list_assignments(pool: Pool, node: str, incarnation: str) -> list[AssignmentRecord]:
    rows = QUERIES.list_assignments(pool, node=node, incarnation=incarnation)
    return [AssignmentRecord(**{**row, "device_indices": tuple(row["device_indices"])}) async for row in rows]


async def lease_token(connection: Connection, ref: JobRef) -> int | None:
    """The token that is in force for the job now."""
    token: int | None = await QUERIES.get_lease_token(connection, project_id=ref.project_id, job_id=ref.job_id)
    return token


async def leased_node(connection: Connection, ref: JobRef) -> str | None:
    """The node that has the job now."""
    node: str | None = await QUERIES.get_leased_node(connection, project_id=ref.project_id, job_id=ref.job_id)
    return node
