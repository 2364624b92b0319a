"""The CloudEvents attributes of a delivery, read from its NATS headers, and moments that an event claims."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp
from nats.aio.msg import Msg

from chassis.errors import InvalidArgument
from chassis.timestamps import time_from_proto

# Headers that we cannot read must not make two events one, nor one event two: the place in the stream is unique.
_POSITION_NAMESPACE = uuid.UUID("0b6a9a3e-4a7c-4f2e-8f5d-6c8a2f0f7d11")


@dataclass(frozen=True, kw_only=True)
class EventInfo:
    """`source` is the service that wrote the event, `subject` the resource it is about, `time` when it was written."""

    id: uuid.UUID
    type: str
    source: str
    subject: str
    time: datetime
    deliveries: int
    malformed: str = ""  # what is wrong with the headers, empty when nothing is


def read_envelope(message: Msg) -> EventInfo:
    """Never raises for bad headers: they come from outside, and the event has to be set aside with a reason."""
    place = message.metadata
    fallback_id = uuid.uuid5(_POSITION_NAMESPACE, f"{place.stream}\0{place.sequence.stream}")
    return _read(dict(message.headers or {}), fallback_id, place.timestamp, deliveries=place.num_delivered)


def stored_envelope(event_id: uuid.UUID, headers: Mapping[str, str], stored_time: datetime) -> EventInfo:
    """The same for an event that was kept under `event_id`; `stored_time` stands in for a time that is not readable."""
    return _read(headers, event_id, stored_time, deliveries=1)


def claimed_time(name: str, stamp: Timestamp) -> datetime:
    """The moment in an event's field `name`; InvalidArgument for what is no moment, which no later try can mend."""
    try:
        return time_from_proto(stamp)
    except ValueError as error:
        raise InvalidArgument("EVENT_INVALID", f"{name}: {error}") from None


def _read(headers: Mapping[str, str], fallback_id: uuid.UUID, fallback_time: datetime, *, deliveries: int) -> EventInfo:
    malformed = ""
    try:
        event_id = uuid.UUID(headers.get("ce-id", ""))
        time = datetime.fromisoformat(headers.get("ce-time", "")).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        malformed = f"the event's headers are not usable: {error}"
        event_id, time = fallback_id, fallback_time
    return EventInfo(
        id=event_id,
        type=headers.get("ce-type", ""),
        source=headers.get("ce-source", ""),
        subject=headers.get("ce-subject", ""),
        time=time,
        deliveries=deliveries,
        malformed=malformed,
    )
