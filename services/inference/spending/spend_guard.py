"""Refuses work of those who may not spend, from what billing says of credit and caps. Not pure: database, events.

What billing says is heard from the bus, stored by revision and answered from memory. Several processes share one reader
of the bus; what another process stored is read from the tables every `spending_poll_s`.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import structlog

from chassis.bus.envelope import EventInfo
from chassis.clock import Clock
from chassis.db.pool import Connection, Pool
from chassis.identity import Caller
from chassis.rounds import run_rounds
from finemesh.events.v1 import billing_events_pb2
from services.inference.spending import convert
from services.inference.spending.states import CapState, CreditState, SpendingStates, spending_error
from services.inference.spending.store import SpendingStore

# What another process stores may become visible late, and its clock may be behind ours.
OVERLAP = timedelta(minutes=2)
log = structlog.get_logger()


class SpendGuard:
    """Says who may not spend, without a look into the database."""

    def __init__(self, pool: Pool, *, poll_s: float, clock: Clock) -> None:
        self._pool = pool
        self._poll_s = poll_s
        self._clock = clock
        self._states = SpendingStates()
        self._since = datetime(1970, 1, 1, tzinfo=UTC)

    async def load(self) -> None:
        """Reads what was stored since the last time, and everything the first time."""
        began = self._clock.now()
        async with self._pool.acquire() as connection:
            self._states.update(await SpendingStore(connection).list_since(self._since))
        self._since = began - OVERLAP

    async def run(self) -> None:
        """Reads what other processes stored, until cancelled."""
        await self._pause()
        await run_rounds("spend_guard", self.load, wait=self._pause, clock=self._clock)

    async def _pause(self) -> None:
        await self._clock.sleep(self._poll_s)

    async def credit_changed(
        self, connection: Connection, event: billing_events_pb2.CreditStateChanged, info: EventInfo
    ) -> None:
        """Stores a later state, in the transaction of the inbox row."""
        state = convert.credit_state_from_proto(event)
        if await SpendingStore(connection).save_credit(state, self._clock.now()):
            # Before the commit: what billing said is true in any case, and the same state twice changes nothing.
            self._update(state)

    async def cap_changed(
        self, connection: Connection, event: billing_events_pb2.SpendCapStateChanged, info: EventInfo
    ) -> None:
        """Stores a later state, in the transaction of the inbox row."""
        state = convert.cap_state_from_proto(event)
        if await SpendingStore(connection).save_cap(state, self._clock.now()):
            self._update(state)

    def check(self, caller: Caller) -> None:
        """FailedPrecondition says why the caller may not spend now, and what to do."""
        problem = self._states.problem(
            organization_id=caller.account,
            project_id=caller.tenant,
            api_key_id=caller.subject,
            now=self._clock.now(),
        )
        if problem is not None:
            raise spending_error(problem)

    def why_refused(self, *, organization_id: str, project_id: str) -> str:
        """Why a project may spend nothing more, in words, whichever key asks; empty when it may."""
        problem = self._states.problem(
            organization_id=organization_id, project_id=project_id, api_key_id="", now=self._clock.now()
        )
        return spending_error(problem).message if problem is not None else ""

    def _update(self, state: CreditState | CapState) -> None:
        self._states.update([state])
        log.info("spending_state_changed", state=state)
