"""Nodes, their devices and their assignments in the database."""

from datetime import datetime
from pathlib import Path
from uuid import UUID

from chassis.db.pool import Connection, Pool
from chassis.db.queries import affected, load_queries
from services.scheduler.nodes.node import AssignmentRecord, NodeRegistration

_QUERIES = load_queries(Path(__file__).with_name("queries.sql"))


class NodeStore:
    def __init__(self, connection: "Connection | Pool") -> None:
        self._connection = connection

    async def lock(self, node: str) -> str | None:
        """The incarnation that is registered, locked until the transaction ends."""
        row = await _QUERIES.lock_node(self._connection, node=node)
        return None if row is None else row["incarnation"]

    async def count_others(self, node: str) -> int:
        count: int = await _QUERIES.count_other_nodes(self._connection, node=node)
        return count

    async def register(self, registration: NodeRegistration) -> None:
        """The node, or its new incarnation, with the devices that it has now."""
        await _QUERIES.upsert_node(
            self._connection,
            node=registration.node,
            incarnation=registration.incarnation,
            address=registration.address,
            agent_version=registration.agent_version,
            preparation_version=registration.preparation_version,
        )
        await _QUERIES.forget_devices(self._connection, node=registration.node)
        devices = registration.devices
        await _QUERIES.upsert_devices(
            self._connection,
            node=registration.node,
            indices=[device.index for device in devices],
            hardware_types=[device.hardware_type for device in devices],
            memory_bytes=[device.memory_bytes for device in devices],
            uuids=[device.uuid for device in devices],
            set_aside_reasons=[device.set_aside_reason for device in devices],
        )

    async def see(self, node: str, incarnation: str, stream: UUID) -> str | None:
        """The state that the node had before this sign of life on that stream; None when the incarnation is not
        registered."""
        row = await _QUERIES.see_node(self._connection, node=node, incarnation=incarnation, stream=stream)
        return None if row is None else row["from_state"]

    async def open_heartbeat(self, node: str, incarnation: str, stream: UUID) -> None:
        await _QUERIES.open_heartbeat(self._connection, node=node, incarnation=incarnation, stream=stream)

    async def close_heartbeat(self, node: str, stream: UUID) -> None:
        """Nothing when a newer stream was opened meanwhile."""
        await _QUERIES.close_heartbeat(self._connection, node=node, stream=stream)

    async def lose_silent(self, at: datetime, silence_s_max: float) -> list[str]:
        """The nodes that are lost from now on."""
        rows = _QUERIES.lose_nodes(self._connection, at=at, silence_s_max=silence_s_max)
        return [row["node"] async for row in rows]

    async def quarantine(
        self, *, window_s: float, jobs_min: int, share_min: float, duration_s: float
    ) -> dict[str, str]:
        """The nodes that get no job from now on, each with the reason."""
        rows = _QUERIES.quarantine_nodes(
            self._connection, window_s=window_s, jobs_min=jobs_min, share_min=share_min, duration_s=duration_s
        )
        return {row["node"]: row["quarantine_reason"] async for row in rows}

    async def prune(self, retention_s: float, batch_max: int) -> int:
        """Forgets nodes that are lost for long, at most so many; returns how many."""
        return affected(await _QUERIES.prune_nodes(self._connection, retention_s=retention_s, batch_max=batch_max))

    async def list_analyzers(self, page_size: int) -> list[str]:
        """Addresses of trainers that can be asked, the most recently seen first."""
        rows = _QUERIES.list_analyzers(self._connection, page_size=page_size)
        return [row["address"] async for row in rows]

    async def preparation_version(self) -> str:
        """Of the code that would count a dataset now; empty while no node was ever registered."""
        version: str | None = await _QUERIES.get_preparation_version(self._connection)
        return version or ""

    async def list_assignments(self, node: str, incarnation: str) -> list[AssignmentRecord]:
        rows = _QUERIES.list_assignments(self._connection, node=node, incarnation=incarnation)
        return [AssignmentRecord(**{**row, "device_indices": tuple(row["device_indices"])}) async for row in rows]
