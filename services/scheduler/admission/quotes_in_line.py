"""Not pure: database. How many quotes and previews of one API key wait for their analysis at the same time.

All replicas count the same rows. A place ends with its call; that of a replica that died ends with its lease, by the
database's time. It knows no dataset.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID, uuid4

import structlog

from chassis.clock import Clock
from chassis.db.pool import database_is_away, transaction
from chassis.errors import ResourceExhausted
from chassis.identity import Caller
from chassis.rounds import run_rounds
from services.scheduler.admission.store import AdmissionStore
from services.scheduler.config import SchedulerSettings
from services.scheduler.database import Database

_RETRY_AFTER_S = 1.0
log = structlog.get_logger(__name__)


class QuotesInLine:
    def __init__(self, database: Database, clock: Clock, settings: SchedulerSettings) -> None:
        self._database = database
        self._clock = clock
        self._settings = settings
        self._held: set[UUID] = set()

    async def run(self) -> None:
        """Renews the places of this process until cancelled."""
        await run_rounds(
            "quote_places",
            self.renew,
            wait=lambda: self._clock.sleep(self._settings.quote_place_s / 3),
            clock=self._clock,
        )

    async def renew(self) -> None:
        """Puts off the end of all places of this process."""
        if self._held:
            store = AdmissionStore(self._database.pool)
            await store.renew_quote_places(self._held, self._settings.quote_place_s)

    @asynccontextmanager
    async def place(self, caller: Caller) -> AsyncIterator[None]:
        """One place meanwhile; ResourceExhausted when the key has as many as it gets."""
        place_id = uuid4()
        async with transaction(self._database.pool) as connection:
            taken = await AdmissionStore(connection).take_quote_place(
                place_id,
                account=caller.account,
                subject=caller.subject,
                per_key_max=self._settings.quotes_per_key_max,
                duration_s=self._settings.quote_place_s,
            )
        if not taken:
            raise _too_many(self._settings.quotes_per_key_max)
        self._held.add(place_id)
        try:
            yield
        finally:
            self._held.discard(place_id)
            await self._release(place_id)

    async def _release(self, place_id: UUID) -> None:
        """An answer is worth more than its place, which ends with its lease anyway."""
        try:
            await AdmissionStore(self._database.pool).release_quote_place(place_id)
        except Exception as error:
            if not database_is_away(error):
                raise
            log.warning("quote_place_not_released", error=repr(error))


def _too_many(per_key_max: int) -> ResourceExhausted:
    return ResourceExhausted(
        "RATE_LIMITED",
        f"{per_key_max} quotes and previews of this API key wait for their analysis already (quotes_per_key_max); wait "
        "for one of them or cancel it, then ask again",
        metadata={"limit": "quotes_per_key_max", "limit_value": str(per_key_max)},
        retry_after_s=_RETRY_AFTER_S,
    )
