"""Events leave a service through its outbox: written in the transaction of the change, published afterwards.

`Outbox` is what a service's store calls; `relay.py` carries the rows to the bus. It knows no event by name.
"""

import uuid
from pathlib import Path

from google.protobuf.message import Message

from chassis.bus.subjects import subject_of
from chassis.clock import Clock
from chassis.db.pool import Connection
from chassis.db.queries import affected, load_queries
from chassis.errors import ResourceExhausted
from chassis.ids import Ids
from chassis.rounds import Signal
from chassis.settings import ChassisSettings
from chassis.telemetry.trace import TRACEPARENT_KEY, current_traceparent

QUERIES = load_queries(Path(__file__).parent / "queries.sql")

# Any fixed value serves: it only keeps ids made here apart from ids that others derive from the same words.
_EVENT_NAMESPACE = uuid.UUID("6f1f8a54-6d1c-4b0e-9d43-0c1a4f7e2b90")


class Outbox:
    """Writes events beside the change they tell of. `source` on the events is the service's name."""

    def __init__(self, settings: ChassisSettings, *, clock: Clock, ids: Ids) -> None:
        self._source = settings.service_name
        self.size_bytes_max = settings.event_size_bytes_max
        self._clock = clock
        self._ids = ids
        self._added = Signal()

    async def add(
        self, connection: Connection, message: Message, *, subject_name: str, key: str | None = None
    ) -> uuid.UUID:
        """Adds `message` inside the caller's transaction and returns the event's id.

        `subject_name` is the resource that the event is about. With a `key` the id follows from it, so the same piece
        of work, done twice, is one event; the second add changes nothing.
        """
        subject = subject_of(message)
        payload = message.SerializeToString(deterministic=True)
        if len(payload) > self.size_bytes_max:
            raise ResourceExhausted(
                "SIZE_LIMIT", f"the event has {len(payload)} bytes, the limit is {self.size_bytes_max}"
            )
        event_type = message.DESCRIPTOR.full_name
        event_id = self._ids.uuid() if key is None else event_id_of(self._source, event_type, key)
        headers = {
            "ce-specversion": "1.0",
            "ce-id": str(event_id),
            "ce-source": self._source,
            "ce-type": event_type,
            "ce-subject": subject_name,
            "ce-time": self._clock.now().isoformat(),
        }
        traceparent = current_traceparent()
        if traceparent:
            headers[TRACEPARENT_KEY] = traceparent
        await QUERIES.add_event(connection, id=event_id, subject=subject, payload=payload, headers=headers)
        return event_id

    def wake(self) -> None:
        """Tells the relay of this process to look now; call it after the commit. Forgetting it costs one poll."""
        self._added.send()

    async def wait(self, timeout_s: float) -> None:
        """Returns at the next `wake`, at once if it came since the last wait, or after the timeout."""
        await self._added.wait(timeout_s)


def event_id_of(source: str, event_type: str, key: str) -> uuid.UUID:
    """The id of the event of this type that this service derives from `key`."""
    return uuid.uuid5(_EVENT_NAMESPACE, f"{source}\0{event_type}\0{key}")


async def prune(connection: Connection, settings: ChassisSettings) -> int:
    """Deletes one bounded batch of each table of events that is past its retention; returns the rows deleted."""
    batch_max = settings.prune_batch_max
    statuses = [
        await QUERIES.prune_outbox(connection, retention_s=settings.outbox_retention_s, batch_max=batch_max),
        await QUERIES.prune_inbox(connection, retention_s=settings.inbox_retention_s, batch_max=batch_max),
        await QUERIES.prune_failures(connection, retention_s=settings.inbox_retention_s, batch_max=batch_max),
    ]
    return sum(affected(status) for status in statuses)
