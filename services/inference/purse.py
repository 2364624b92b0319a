"""Keeps what billing says of credit and caps: heard from the bus, stored by revision, answered from memory.

Several processes share one reader of the bus; what another one heard is read from the table every `spending_poll_s`.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import structlog

from chassis.bus.envelope import EventInfo
from chassis.clock import Clock
from chassis.db.pool import Connection, Pool, database_is_away
from chassis.errors import FailedPrecondition
from chassis.identity import Caller
from finemesh.events.v1 import billing_events_pb2
from services.inference import convert, store
from services.inference.domain import Endpoint
from services.inference.spending import Capped, CapWord, CreditWord, NoCredit, Spending

# What another process stores may become visible late, and its clock may be behind ours.
OVERLAP = timedelta(minutes=2)
log = structlog.get_logger()


class Purse:
    """Refuses who may not spend, without a look into the database."""

    def __init__(self, pool: Pool, *, poll_s: float, clock: Clock) -> None:
        self._pool = pool
        self._poll_s = poll_s
        self._clock = clock
        self._spending = Spending()
        self._since = datetime(1970, 1, 1, tzinfo=UTC)

    async def load(self) -> None:
        """Hears what was stored since the last time, and everything the first time."""
        began = self._clock.now()
        async with self._pool.acquire() as connection:
            self._spending.hear(await store.list_words(connection, self._since))
        self._since = began - OVERLAP

    async def run(self) -> None:
        """Listens to what other processes stored, until cancelled."""
        while True:
            await self._clock.sleep(self._poll_s)
            try:
                await self.load()
            except Exception as error:
                if not database_is_away(error):
                    raise
                log.warning("credit and caps wait for the database", error=repr(error))

    async def credit_changed(
        self, connection: Connection, event: billing_events_pb2.CreditStateChanged, info: EventInfo
    ) -> None:
        """Stores a later word, in the transaction of the inbox row."""
        word = convert.from_credit_event(event)
        if await store.save_credit_word(connection, word, self._clock.now()):
            # Before the commit: what was said is true in any case, and a word that is heard twice is one.
            self._hear(word)

    async def cap_changed(
        self, connection: Connection, event: billing_events_pb2.SpendCapStateChanged, info: EventInfo
    ) -> None:
        """Stores a later word, in the transaction of the inbox row."""
        word = convert.from_cap_event(event)
        if await store.save_cap_word(connection, word, self._clock.now()):
            self._hear(word)

    def check(self, caller: Caller) -> None:
        """FailedPrecondition says why the caller may not spend now, and what to do."""
        problem = self._spending.problem(
            organization_id=caller.account,
            project_id=caller.tenant,
            api_key_id=caller.subject,
            now=self._clock.now(),
        )
        if problem is not None:
            raise refusal(problem)

    def why_parked(self, endpoint: Endpoint) -> str:
        """Why an endpoint may cost nothing more, in words; empty when it may. It belongs to a project, to no key."""
        problem = self._spending.problem(
            organization_id=endpoint.organization_id,
            project_id=endpoint.project_id,
            api_key_id="",
            now=self._clock.now(),
        )
        return refusal(problem).message if problem is not None else ""

    def _hear(self, word: CreditWord | CapWord) -> None:
        self._spending.hear([word])
        log.info("credit or cap changed", word=word)


def refusal(problem: NoCredit | Capped) -> FailedPrecondition:
    """The typed error for a call that would spend."""
    if isinstance(problem, NoCredit):
        return FailedPrecondition(
            "BALANCE_INSUFFICIENT",
            "the organization's prepaid credit is used up: add credit (`finemesh billing top-up`), and calls and parked"
            " endpoints go on; `finemesh billing balance` shows what is owed",
        )
    cap = problem.cap
    whose = f"API key {cap.api_key_id}" if cap.api_key_id else "the project"
    return FailedPrecondition(
        "SPEND_CAP_EXCEEDED",
        f"{whose} reached its monthly spend cap of {cap.cap_nanos_usd / 1e9:.2f} USD: raise the cap"
        f" (`finemesh billing budget set`), or wait until {cap.until_time:%Y-%m-%d %H:%M} UTC",
        metadata={
            "cap_nanos_usd": str(cap.cap_nanos_usd),
            "api_key_id": cap.api_key_id,
            "until_time": cap.until_time.isoformat(),
        },
    )
