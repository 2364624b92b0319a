"""Nodes and their devices in the database. It decides neither when a node is lost nor what runs on it."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from chassis.db.pool import Connection, Pool
from services.scheduler import events
from services.scheduler.domain import NodeRegistration
from services.scheduler.policy import DeviceGroup
from services.scheduler.store import QUERIES, QUEUE_TOPIC, Store, node_topic, notify

READY = "READY"
LOST = "LOST"


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """A snapshot of all devices for the policy, with the incarnation that each node had then."""

    groups: tuple[DeviceGroup, ...]
    incarnations: dict[str, str]


async def load_fleet(pool: Pool, seen_since: datetime, page_size: int) -> Fleet:
    groups = []
    incarnations = {}
    async for row in QUERIES.list_device_groups(pool, seen_since=seen_since, page_size=page_size):
        incarnations[row["node"]] = row["incarnation"]
        groups.append(
            DeviceGroup(
                node=row["node"],
                hardware_type=row["hardware_type"],
                memory_bytes=row["memory_bytes"],
                indices=frozenset(row["indices"]),
                free=frozenset(row["free"]),
                ready=row["ready"],
            )
        )
    return Fleet(groups=tuple(groups), incarnations=incarnations)


async def list_analyzers(pool: Pool, page_size: int) -> list[str]:
    """Addresses of trainers that can be asked, the most recently seen first."""
    return [row["address"] async for row in QUERIES.list_analyzers(pool, page_size=page_size)]


async def preparation_version(pool: Pool) -> str:
    """Of the code that would count a dataset now; empty while no node was ever registered."""
    version: str | None = await QUERIES.get_preparation_version(pool)
    return version or ""


async def lock_node(connection: Connection, node: str) -> str | None:
    """The incarnation that is registered, locked until the transaction ends."""
    row = await QUERIES.lock_node(connection, node=node)
    return None if row is None else row["incarnation"]


async def close_heartbeat(pool: Pool, node: str, stream: UUID) -> None:
    await QUERIES.close_heartbeat(pool, node=node, stream=stream)


class NodeStore:
    """The writes. All take a connection inside the caller's transaction."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def register(self, connection: Connection, registration: NodeRegistration) -> None:
        await QUERIES.upsert_node(
            connection,
            node=registration.node,
            incarnation=registration.incarnation,
            address=registration.address,
            agent_version=registration.agent_version,
            preparation_version=registration.preparation_version,
            now=self._store.now(),
        )
        await QUERIES.forget_devices(connection, node=registration.node)
        devices = registration.devices
        await QUERIES.upsert_devices(
            connection,
            node=registration.node,
            indices=[device.index for device in devices],
            hardware_types=[device.hardware_type for device in devices],
            memory_bytes=[device.memory_bytes for device in devices],
            uuids=[device.uuid for device in devices],
        )
        await self._changed(connection, registration.node, READY)

    async def see(self, connection: Connection, node: str, incarnation: str) -> bool:
        """A sign of life; False when another incarnation holds the name, or nobody does."""
        row = await QUERIES.see_node(connection, node=node, incarnation=incarnation, now=self._store.now())
        if row is None:
            return False
        if row["from_state"] == LOST:
            await self._changed(connection, node, READY)
        return True

    async def open_heartbeat(self, connection: Connection, node: str, incarnation: str, stream: UUID) -> None:
        await QUERIES.open_heartbeat(connection, node=node, incarnation=incarnation, stream=stream)
        await notify(connection, QUEUE_TOPIC)

    async def lose_silent(self, connection: Connection, silent_since: datetime) -> list[str]:
        """Declares nodes lost and ends the time of their leases; the sweep then ends the leases."""
        lost = [row["node"] async for row in QUERIES.lose_nodes(connection, silent_since=silent_since)]
        for node in lost:
            await QUERIES.expire_node_leases(connection, node=node, now=self._store.now())
            await self._changed(connection, node, LOST)
        return lost

    async def _changed(self, connection: Connection, node: str, state: str) -> None:
        event = events.node_state_changed(node, state, self._store.now())
        await self._store.outbox.add(connection, event, subject_name=f"nodes/{node}")
        await notify(connection, node_topic(node), QUEUE_TOPIC)
