"""Writes the audit log: who asked for which change, and what came of it. Not pure: database.

A call's entry is there before its handler begins and has no outcome until it ends: what a killed process was asked for
is known, and that nobody knows what came of it. A call whose entry cannot be written is refused.
"""

import asyncio
from collections.abc import Callable, Coroutine
from datetime import datetime
from typing import Any

import structlog
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import MethodDescriptor

from chassis.clock import Clock
from chassis.db.pool import Connection, Pool
from chassis.identity import Caller, current_caller
from chassis.rpc.witness import OK, Witness
from chassis.telemetry import trace as telemetry
from services.gateway.requests.audited_methods import asks_for_change, resource_of_request, resource_of_response
from services.gateway.requests.store import RequestStore

log = structlog.get_logger()


async def record(connection: Connection, caller: Caller, now: datetime, action: str, resource: str) -> None:
    """What was done without a call, in the transaction of the deed itself; `resource` is a resource name."""
    await RequestStore(connection).add_audit_entry(
        caller, now=now, action=action, resource=resource, trace_id=telemetry.current_trace_id(), outcome=OK
    )


class AuditLog:
    """Witness of all calls that may change something."""

    def __init__(self, pool: Pool, clock: Clock) -> None:
        self._pool = pool
        self._clock = clock
        # Held here: the event loop alone would let them be collected.
        self._endings: set[asyncio.Task[None]] = set()

    def witnessing(self, method: str) -> Callable[[], Witness] | None:
        """For a server; `method` as on the wire, which is how logs and traces name it, too."""
        if not asks_for_change(method):
            return None
        descriptor = descriptor_pool.Default().FindMethodByName(method.removeprefix("/").replace("/", "."))
        return lambda: _AuditedCall(self, method, descriptor)

    async def begin(self, action: str, resource: str) -> int:
        async with self._pool.acquire() as connection:
            return await RequestStore(connection).add_audit_entry(
                current_caller(),
                now=self._clock.now(),
                action=action,
                resource=resource,
                trace_id=telemetry.current_trace_id(),
                outcome="",
            )

    async def end(self, entry_id: int, resource: str, outcome: str) -> None:
        """Goes on when the call that waits for it is cancelled, which is when outcomes are wanted most."""
        await self.whatever_happens(self._end(entry_id, resource, outcome))

    async def whatever_happens(self, work: Coroutine[Any, Any, None]) -> None:
        """Waits for work that goes on when whoever waits is cancelled."""
        task = asyncio.create_task(work)
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)
        await asyncio.shield(task)

    async def _end(self, entry_id: int, resource: str, outcome: str) -> None:
        try:
            async with self._pool.acquire() as connection:
                await RequestStore(connection).end_audit_entry(entry_id, resource=resource, outcome=outcome)
        except Exception as error:
            # The deed is done, and no failure here undoes it: its entry stays without an outcome.
            log.error("audit_outcome_lost", entry_id=entry_id, outcome=outcome, error=repr(error))


class _AuditedCall:
    def __init__(self, audit_log: AuditLog, action: str, method: MethodDescriptor) -> None:
        self._log = audit_log
        self._action = action
        self._method = method
        self._resource = ""
        self._entry_id: int | None = None
        self._outcome: str | None = None

    async def asked(self, content: bytes) -> None:
        self._resource = resource_of_request(self._method, content)
        await self._log.whatever_happens(self._begin())

    async def _begin(self) -> None:
        entry_id = await self._log.begin(self._action, self._resource)
        if self._outcome is None:
            self._entry_id = entry_id
        else:
            # A stream can be refused while its first message is still written down.
            await self._log.end(entry_id, self._resource, self._outcome)

    async def ended(self, outcome: str, response: Any = None) -> None:
        if self._outcome is None:
            self._outcome = outcome
        if self._entry_id is None:
            return
        entry_id, self._entry_id = self._entry_id, None
        resource = self._resource if response is None else resource_of_response(self._method, response, self._resource)
        await self._log.end(entry_id, resource, outcome)
