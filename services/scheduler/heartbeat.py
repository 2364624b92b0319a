"""The conversation with one agent: each sign of life renews its leases, each change sends it all that it shall do.

It refuses an incarnation that is not the registered one; it decides nothing about jobs.
"""

import asyncio
from collections.abc import AsyncIterator
from uuid import UUID

import structlog

from chassis.db.pool import database_is_away
from chassis.errors import Aborted, InvalidArgument
from finemesh.nodes.v1 import node_service_pb2
from services.scheduler import lease_store, leases, node_store
from services.scheduler.config import SchedulerSettings
from services.scheduler.convert import assignment_to
from services.scheduler.node_store import NodeStore
from services.scheduler.store import Store, node_topic
from services.scheduler.watch import Bell, Hub

log = structlog.get_logger(__name__)
Requests = AsyncIterator[node_service_pb2.HeartbeatRequest]


class Heartbeats:
    def __init__(self, store: Store, nodes: NodeStore, hub: Hub, settings: SchedulerSettings) -> None:
        self._store = store
        self._nodes = nodes
        self._hub = hub
        self._settings = settings

    async def converse(self, requests: Requests, stream: UUID) -> AsyncIterator[node_service_pb2.HeartbeatResponse]:
        first = await anext(requests, None)
        if first is None:
            return
        await self._begin(first, stream)
        with self._hub.listening(node_topic(first.node)) as bell:
            reader = asyncio.create_task(self._read(requests, first, bell))
            try:
                while True:
                    yield await self._all_assignments(first)
                    await bell.wait()
                    if reader.done():
                        # Raises what ended the reading; a stream that the agent closed just ends.
                        reader.result()
                        return
            finally:
                reader.cancel()
                await self._close(first.node, stream)

    async def _begin(self, first: node_service_pb2.HeartbeatRequest, stream: UUID) -> None:
        if not first.node or not first.incarnation:
            raise InvalidArgument("INVALID_FIELD", "a heartbeat needs node and incarnation")
        await self._beat(first)
        async with self._store.writing() as connection:
            await self._nodes.open_heartbeat(connection, first.node, first.incarnation, stream)
        log.info("node listens", node=first.node)

    async def _close(self, node: str, stream: UUID) -> None:
        try:
            await node_store.close_heartbeat(self._store.pool, node, stream)
        except Exception as error:
            if not database_is_away(error):
                raise
            # Until it is back the node counts as listening; its silence will tell.
            log.warning("heartbeat not closed", node=node, error=repr(error))

    async def _read(self, requests: Requests, first: node_service_pb2.HeartbeatRequest, bell: Bell) -> None:
        try:
            async for request in requests:
                if (request.node, request.incarnation) != (first.node, first.incarnation):
                    raise InvalidArgument("INVALID_FIELD", "one heartbeat stream is for one incarnation of one node")
                await self._beat(request)
                bell.ring()
        finally:
            bell.ring()

    async def _beat(self, request: node_service_pb2.HeartbeatRequest) -> None:
        expires_at = leases.expiry(self._store.now(), self._settings.lease_duration_s)
        async with self._store.writing() as connection:
            if not await self._nodes.see(connection, request.node, request.incarnation):
                raise Aborted(
                    "LEASE_STALE",
                    f"another incarnation is registered as {request.node}, or none is; this one holds no lease",
                )
            if request.lease_tokens:
                await lease_store.renew_leases(
                    connection, request.node, request.incarnation, request.lease_tokens, expires_at
                )

    async def _all_assignments(self, request: node_service_pb2.HeartbeatRequest) -> node_service_pb2.HeartbeatResponse:
        records = await lease_store.list_assignments(self._store.pool, request.node, request.incarnation)
        return node_service_pb2.HeartbeatResponse(assignments=[assignment_to(record) for record in records])
