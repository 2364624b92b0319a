"""Moves an endpoint along its lifecycle and tells the other services. Not pure: database, events."""

from __future__ import annotations

from datetime import datetime

from chassis.bus.outbox import Outbox
from chassis.clock import Clock
from chassis.db.pool import Connection
from services.inference.endpoints import convert
from services.inference.endpoints.domain import Endpoint
from services.inference.endpoints.lifecycle import TRANSITIONS, EndpointEvent
from services.inference.endpoints.store import EndpointStore


class Transitions:
    """The one way in which the state of an endpoint changes."""

    def __init__(self, outbox: Outbox, clock: Clock) -> None:
        self._outbox = outbox
        self._clock = clock

    async def move(
        self,
        connection: Connection,
        endpoint: Endpoint,
        event: EndpointEvent,
        status_message: str = "",
        *,
        over_by: datetime | None = None,
    ) -> Endpoint | None:
        """One transition with its event, inside the caller's transaction; None when the state does not allow it, or
        when it was decided under another lease. A stop is the owner's word and holds under any. With a time of the
        database, only a claim that was over by then."""
        transition = TRANSITIONS[event]
        moved = await EndpointStore(connection).move(
            endpoint.id,
            sources=transition.sources,
            destination=transition.destination,
            status_message=status_message,
            lease_token=endpoint.lease_token,
            any_lease=event is EndpointEvent.STOP,
            over_by=over_by,
            now=self._clock.now(),
        )
        if moved is not None:
            await self.announce(connection, moved, from_state=endpoint.state)
        return moved

    async def announce(self, connection: Connection, endpoint: Endpoint, *, from_state: str) -> None:
        """Tells the mesh of an endpoint's new state."""
        event = convert.endpoint_state_to_proto(endpoint, from_state, self._clock.now())
        await self._outbox.add(connection, event, subject_name=event.endpoint)
