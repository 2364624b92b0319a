"""Which process of inference has which endpoints. Not pure: database.

A claim is written and compared in the database's time. Whoever finds one that is over takes the endpoint away, but only
after it has watched without a gap for as long as a claim lasts: a process that was away itself knows nothing of others.
"""

from __future__ import annotations

import math
from datetime import datetime

import structlog

from chassis.clock import Clock
from chassis.db.pool import Connection, Pool
from chassis.rounds import AbsenceGuard, ClockWatch
from services.inference.config import InferenceSettings
from services.inference.endpoints.domain import Endpoint
from services.inference.endpoints.store import EndpointStore
from services.inference.serving.device_leases import Devices

# Claims are renewed that many times while they last.
RENEWALS_PER_CLAIM = 4
log = structlog.get_logger()


class Claims:
    """The claims of one process. `owner` is the id of this start of it; `address` is known once its server is bound."""

    def __init__(self, pool: Pool, *, owner: str, settings: InferenceSettings, clock: Clock) -> None:
        self.owner = owner
        self.address = ""
        self._pool = pool
        self._clock = clock
        self._duration_s = settings.claim_duration_s
        self._renewed_s = -math.inf
        self._absence = AbsenceGuard(clock, gap_s_max=self._duration_s / 2, watch_s_min=self._duration_s)
        self._clock_watch = ClockWatch(settings.clock_jump_s_max)

    async def look(self) -> datetime | None:
        """Renews what this process holds. The time of the database by which a claim of another is over; None as long as
        this process may not judge."""
        now_s = self._clock.monotonic()
        is_due = now_s - self._renewed_s >= self._duration_s / RENEWALS_PER_CLAIM
        async with self._pool.acquire() as connection:
            store = EndpointStore(connection)
            at = await (store.renew_claims(self.owner, self._duration_s) if is_due else store.time())
        if is_due:
            self._renewed_s = now_s
        self._absence.look()
        if self._clock_watch.has_jumped(at, self._clock.monotonic()):
            log.warning("database_clock_jumped", detail="claims are judged again after one whole claim")
            self._absence.begin_anew()
        return at if self._absence.may_judge else None

    async def take(self, connection: Connection, endpoint: Endpoint, devices: Devices) -> Endpoint | None:
        """Makes an endpoint that waits this process's, with these devices; None when that is not to be."""
        return await EndpointStore(connection).claim(
            endpoint.id, devices, owner=self.owner, owner_address=self.address, duration_s=self._duration_s
        )
