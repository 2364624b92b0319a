"""Bills the minutes of endpoints in the transaction that counts them. Not pure: database, events.

Which minutes are due is decided in `minutes.py`. It knows neither the scheduler nor engines.
"""

from __future__ import annotations

from datetime import datetime

from chassis.bus.outbox import Outbox
from chassis.db.pool import Connection
from services.inference.config import InferenceSettings
from services.inference.endpoints import convert
from services.inference.endpoints.domain import Endpoint
from services.inference.endpoints.minutes import DueMinutes, ServedTime
from services.inference.endpoints.store import EndpointStore


class MinuteMeter:
    """The served time of the leases that this process has, each by itself."""

    def __init__(self, outbox: Outbox, *, settings: InferenceSettings) -> None:
        self._outbox = outbox
        self._settings = settings
        self._served: dict[str, ServedTime] = {}

    def due(self, endpoint: Endpoint, now: datetime, confirmed_s: float) -> DueMinutes | None:
        """The minutes that were begun up to this confirmation and are not billed."""
        served = self._served.setdefault(
            convert.lease_key(endpoint),
            ServedTime(minute_s=self._settings.endpoint_minute_s, silence_s_max=self._settings.endpoint_silence_s_max),
        )
        return served.confirm(now, confirmed_s, endpoint.paid_until)

    async def bill(self, connection: Connection, endpoint: Endpoint, due: DueMinutes | None) -> None:
        """Emits every due minute in the transaction that counts it; none when somebody else counted."""
        if due is None or not await EndpointStore(connection).bill_minutes(endpoint, due):
            return
        for number in range(due.count):
            begun = due.begin + number * due.minute
            event = convert.endpoint_minute_to_proto(endpoint, endpoint.billed_minutes + number, begun)
            await self._outbox.add(connection, event, subject_name=event.endpoint, key=event.work_key)

    def wake(self) -> None:
        """After the commit: the minutes may go out."""
        self._outbox.wake()

    def forget(self, endpoint: Endpoint) -> None:
        """Its lease ends; the next one counts by itself."""
        self._served.pop(convert.lease_key(endpoint), None)
