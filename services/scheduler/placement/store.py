"""Allocations in the database: the fleet, and who has which devices for how long.

Locks are always taken in the order node, job, allocation, so that no two transactions wait for each other.
"""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from chassis.db.pool import Connection, Pool
from chassis.db.queries import affected, load_queries
from services.scheduler.placement.allocation import AllocationKind, AllocationRecord
from services.scheduler.placement.policy import DeviceGroup, Fleet, Placement

_QUERIES = load_queries(Path(__file__).with_name("queries.sql"))


class AllocationStore:
    def __init__(self, connection: "Connection | Pool") -> None:
        self._connection = connection

    async def time(self) -> datetime:
        """The database's: leases are written and judged by no other clock."""
        found: datetime = await _QUERIES.get_time(self._connection)
        return found

    async def load_fleet(self, memory_s: float, nodes_max: int) -> Fleet:
        """All devices but those of nodes that have been away for longer than `memory_s`; of at most `nodes_max` nodes,
        those that are ready first."""
        groups = []
        incarnations = {}
        node_count = 0
        async for row in _QUERIES.list_device_groups(self._connection, memory_s=memory_s, nodes_max=nodes_max):
            incarnations[row["node"]] = row["incarnation"]
            node_count = row["node_count"]
            groups.append(
                DeviceGroup(
                    node=row["node"],
                    hardware_type=row["hardware_type"],
                    memory_bytes=row["memory_bytes"],
                    indices=frozenset(row["indices"]),
                    free=frozenset(row["free"]),
                    ready=row["ready"],
                    quarantine_reason=row["quarantine_reason"],
                )
            )
        left_out = max(0, node_count - nodes_max)
        return Fleet(groups=tuple(groups), incarnations=incarnations, nodes_left_out=left_out)

    async def guard_node(self, node: str, incarnation: str) -> bool:
        """Whether this incarnation is there and listens; it stays so until the transaction ends."""
        return await _QUERIES.guard_node(self._connection, node=node, incarnation=incarnation) is not None

    async def insert(
        self,
        kind: AllocationKind,
        placement: Placement,
        incarnation: str,
        *,
        now: datetime,
        duration_s: float,
        lease_token: int,
        leader_token: int | None = None,
    ) -> None:
        """asyncpg.UniqueViolationError when a device has an owner, or the owner has an allocation.

        A node that follows another one (`leader_token`) has a token of its own, which is in force as long as that of
        its leader is.
        """
        await _QUERIES.insert_allocation(
            self._connection,
            lease_token=lease_token,
            owner=placement.owner,
            kind=kind.value,
            node=placement.node,
            incarnation=incarnation,
            hardware_type=placement.hardware_type,
            now=now,
            duration_s=duration_s,
            leader_token=leader_token,
        )
        await _QUERIES.insert_allocation_devices(
            self._connection, lease_token=lease_token, node=placement.node, indices=list(placement.device_indices)
        )

    async def next_lease_token(self) -> int:
        token: int = await _QUERIES.next_lease_token(self._connection)
        return token

    async def node_of(self, lease_token: int) -> str | None:
        """The node that a lease was given to, ended or not."""
        node: str | None = await _QUERIES.get_lease_node(self._connection, lease_token=lease_token)
        return node

    async def get(self, owner: str) -> AllocationRecord | None:
        row = await _QUERIES.get_allocation(self._connection, owner=owner)
        if row is None:
            return None
        return AllocationRecord(
            **{**row, "kind": AllocationKind(row["kind"]), "device_indices": tuple(row["device_indices"])}
        )

    async def renew(self, owner: str, lease_token: int, duration_s: float) -> bool:
        """For an allocation that serves; False when it is not its owner's any more."""
        status = await _QUERIES.renew_allocation(
            self._connection, owner=owner, lease_token=lease_token, duration_s=duration_s
        )
        return affected(status) > 0

    async def renew_leases(
        self, node: str, incarnation: str, tokens: Sequence[int], *, duration_s: float, progress_s_max: float
    ) -> set[int]:
        """For all training of a node at once; the tokens that were renewed. Those of attempts that finished no step for
        longer than `progress_s_max` are not."""
        rows = _QUERIES.renew_leases(
            self._connection,
            node=node,
            incarnation=incarnation,
            lease_tokens=list(tokens),
            duration_s=duration_s,
            progress_s_max=progress_s_max,
        )
        return {row["lease_token"] async for row in rows}

    async def expire_node_leases(self, node: str, at: datetime) -> None:
        """Ends the time of every training lease of a node, at a time of the database."""
        await _QUERIES.expire_node_leases(self._connection, node=node, at=at)

    async def release(self, kind: AllocationKind, lease_token: int, owner: str, now: datetime) -> bool:
        """False for one that is not this owner's, is of another kind, or is over already: then nothing has changed."""
        released = await _QUERIES.release_allocation(
            self._connection, lease_token=lease_token, owner=owner, kind=kind.value, now=now
        )
        if affected(released) == 0:
            return False
        await self._release_devices(lease_token, now)
        return True

    async def expire_lease(self, lease_token: int, at: datetime) -> None:
        """Ends the time of a lease, at a time of the database."""
        await _QUERIES.expire_lease(self._connection, lease_token=lease_token, at=at)

    async def release_expired(self, lease_token: int, *, at: datetime, now: datetime) -> bool:
        """`at` is the time of the database by which the lease was judged. False when it was renewed or released."""
        released = await _QUERIES.release_expired(self._connection, lease_token=lease_token, at=at, now=now)
        if affected(released) == 0:
            return False
        await self._release_devices(lease_token, now)
        return True

    async def release_followers(self, leader_token: int, now: datetime) -> list[str]:
        """The nodes that followed this lease."""
        rows = [row async for row in _QUERIES.release_followers(self._connection, leader_token=leader_token, now=now)]
        for row in rows:
            await self._release_devices(row["lease_token"], now)
        return [row["node"] for row in rows]

    async def prune_served(self, retention_s: float, batch_max: int) -> int:
        """Deletes allocations of endpoints that ended long ago, at most so many; returns how many."""
        return affected(await _QUERIES.prune_served(self._connection, retention_s=retention_s, batch_max=batch_max))

    async def _release_devices(self, lease_token: int, now: datetime) -> None:
        await _QUERIES.release_devices(self._connection, lease_token=lease_token, now=now)
