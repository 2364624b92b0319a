"""Not pure: database, outbox. Which nodes are there: they register, show that they live, and are lost when silent.

Whatever changes a node's state ends or keeps its leases in the same transaction.
"""

from datetime import datetime
from uuid import UUID

import structlog

from chassis.db.pool import Connection
from chassis.errors import ResourceExhausted
from services.scheduler.attempts.attempts import Attempts
from services.scheduler.attempts.store import AttemptStore
from services.scheduler.database import Database
from services.scheduler.nodes.convert import node_state_to_proto
from services.scheduler.nodes.node import NodeRegistration
from services.scheduler.nodes.store import NodeStore
from services.scheduler.placement.store import AllocationStore
from services.scheduler.watching.hub import QUEUE_TOPIC, node_topic

log = structlog.get_logger(__name__)

READY = "READY"
LOST = "LOST"


class NodeRegistry:
    def __init__(self, database: Database, attempts: Attempts, *, nodes_max: int) -> None:
        self._database = database
        self._nodes_max = nodes_max
        self._attempts = attempts

    async def register(self, registration: NodeRegistration) -> None:
        """A new incarnation ends the leases of the old one at once: nothing of the old start runs any more.

        ResourceExhausted for a new node beyond `nodes_max`: it would get no jobs.
        """
        node = registration.node
        async with self._database.writing() as connection:
            known = await NodeStore(connection).lock(node)
            if known is None:
                await self._require_room(connection, node)
            await NodeStore(connection).register(registration)
            for device in registration.devices:
                if device.set_aside_reason:
                    log.warning("device_set_aside", node=node, device=device.index, reason=device.set_aside_reason)
            await self._tell(connection, node, READY)
            if known is not None and known != registration.incarnation:
                at = await AllocationStore(connection).time()
                # Each job is locked before its lease, as by a report that ends the attempt at the same moment.
                for lease in await AttemptStore(connection).list_of_node(node):
                    if lease.ref is not None:
                        why = f"node {node} started anew"
                        await self._attempts.lose(connection, lease.ref, why, lease.lease_token, at=at, is_over=True)

    async def see(self, connection: Connection, node: str, incarnation: str, stream: UUID) -> bool:
        """A sign of life on this stream; False when another incarnation holds the name, or nobody does."""
        before = await NodeStore(connection).see(node, incarnation, stream)
        if before == LOST:
            await self._tell(connection, node, READY)
        return before is not None

    async def lose_silent(self, connection: Connection, *, at: datetime, silence_s_max: float) -> list[str]:
        """Declares nodes lost that were silent at a time of the database, and ends the time of their leases; the sweep
        then ends the leases."""
        lost = await NodeStore(connection).lose_silent(at, silence_s_max)
        for node in lost:
            await AllocationStore(connection).expire_node_leases(node, at)
            await self._tell(connection, node, LOST)
        return lost

    async def _require_room(self, connection: Connection, node: str) -> None:
        if await NodeStore(connection).count_others(node) >= self._nodes_max:
            raise ResourceExhausted(
                "SIZE_LIMIT",
                f"{self._nodes_max} nodes are there already, as many as nodes_max of the scheduler allows; raise it, or"
                " stop another node",
                metadata={"limit": "nodes_max", "limit_count": str(self._nodes_max)},
            )

    async def _tell(self, connection: Connection, node: str, state: str) -> None:
        event = node_state_to_proto(node, state, self._database.now())
        await self._database.outbox.add(connection, event, subject_name=f"nodes/{node}")
        self._database.ring(node_topic(node), QUEUE_TOPIC)
