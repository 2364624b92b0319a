"""Not pure: database. The conversation with one agent: each sign of life renews its leases, each change sends it all
that it shall do.

It refuses an incarnation that is not the registered one; it decides nothing about jobs.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from functools import partial
from uuid import UUID

import structlog

from chassis.db.pool import database_is_away
from chassis.errors import Aborted, DomainError, InvalidArgument
from chassis.rounds import Signal
from services.scheduler.config import SchedulerSettings
from services.scheduler.database import Database
from services.scheduler.nodes.node import AssignmentRecord, Beat
from services.scheduler.nodes.registry import NodeRegistry
from services.scheduler.nodes.store import NodeStore
from services.scheduler.placement.store import AllocationStore
from services.scheduler.watching.hub import QUEUE_TOPIC, Hub, node_topic

log = structlog.get_logger(__name__)


class Heartbeats:
    def __init__(self, database: Database, nodes: NodeRegistry, hub: Hub, settings: SchedulerSettings) -> None:
        self._database = database
        self._nodes = nodes
        self._hub = hub
        self._settings = settings
        self._closing: set[asyncio.Task[None]] = set()

    async def converse(self, beats: AsyncIterator[Beat], stream: UUID) -> AsyncIterator[list[AssignmentRecord]]:
        """All assignments of the node, at once and after each change, until the agent closes the stream."""
        first = await anext(beats, None)
        if first is None:
            return
        await self._begin(first, stream)
        with self._hub.listening(node_topic(first.node)) as signal:
            reader, raised = asyncio.create_task(self._read(beats, first, stream, signal)), False
            try:
                while True:
                    yield await NodeStore(self._database.pool).list_assignments(first.node, first.incarnation)
                    await signal.wait()
                    if reader.done():
                        # Raises what ended the reading; a stream that the agent closed just ends.
                        raised = True
                        reader.result()
                        return
            finally:
                reader.cancel()
                if not raised:
                    # The stream broke at the same time: nobody but the log hears what ended the reading.
                    reader.add_done_callback(partial(_log_unheard, first.node))
                # In a task of its own: the server cancels this one when it sees that the connection is gone, and may do
                # so in the midst of this.
                await asyncio.shield(self._in_background(self._close(first.node, stream)))

    async def _begin(self, first: Beat, stream: UUID) -> None:
        if not first.node or not first.incarnation:
            raise InvalidArgument("INVALID_FIELD", "a heartbeat needs node and incarnation")
        await self._renew(first, stream)
        async with self._database.writing() as connection:
            await NodeStore(connection).open_heartbeat(first.node, first.incarnation, stream)
            self._database.ring(QUEUE_TOPIC)
        log.info("heartbeat_opened", node=first.node)

    async def _close(self, node: str, stream: UUID) -> None:
        try:
            await NodeStore(self._database.pool).close_heartbeat(node, stream)
        except Exception as error:
            # The node counts as listening; its silence will tell.
            _log_trouble("heartbeat_not_closed", node, error)

    def _in_background(self, work: Coroutine[None, None, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        return task

    async def _read(self, beats: AsyncIterator[Beat], first: Beat, stream: UUID, signal: Signal) -> None:
        try:
            async for beat in beats:
                if (beat.node, beat.incarnation) != (first.node, first.incarnation):
                    raise InvalidArgument("INVALID_FIELD", "one heartbeat stream is for one incarnation of one node")
                await self._renew(beat, stream)
                signal.send()
        finally:
            signal.send()

    async def _renew(self, beat: Beat, stream: UUID) -> None:
        async with self._database.writing() as connection:
            if not await self._nodes.see(connection, beat.node, beat.incarnation, stream):
                raise Aborted(
                    "LEASE_STALE",
                    f"another incarnation is registered as {beat.node}, or none is; this one holds no lease",
                )
            if beat.lease_tokens:
                await AllocationStore(connection).renew_leases(
                    beat.node,
                    beat.incarnation,
                    beat.lease_tokens,
                    duration_s=self._settings.lease_duration_s,
                    progress_s_max=self._settings.attempt_progress_s_max,
                )


def _log_unheard(node: str, reader: "asyncio.Task[None]") -> None:
    error = None if reader.cancelled() else reader.exception()
    if error is not None:
        _log_trouble("heartbeat_broken", node, error)


def _log_trouble(event: str, node: str, error: BaseException) -> None:
    if isinstance(error, DomainError) or (isinstance(error, Exception) and database_is_away(error)):
        log.warning(event, node=node, error=repr(error))
    else:
        log.error(event, node=node, exc_info=error)
