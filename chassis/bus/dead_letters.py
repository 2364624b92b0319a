"""Events that could not be handled: kept whole with their reason, announced, listed and run again. It knows no event by
name but the announcement, and deletes none that was not handled in the same transaction. One that a person discards
stays.
"""

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import structlog
from google.protobuf.message import DecodeError, Message
from opentelemetry import metrics

from chassis.bus.envelope import EventInfo, stored_envelope
from chassis.bus.outbox import QUERIES, Outbox
from chassis.bus.subjects import subject_of
from chassis.db.pool import Connection, Pool, database_is_away, transaction
from chassis.errors import NotFound, is_away
from chassis.timestamps import time_to_proto
from finemesh.events.v1 import dead_letter_events_pb2

_ERROR_CHARS_MAX = 2000
SET_ASIDE = metrics.get_meter(__name__).create_counter("consumer.dead_letters", unit="{event}")
_log = structlog.get_logger(__name__)
# Subject and type of the announcement are shortened to it, and the error where nothing else helps: they come from
# outside, and the smallest limit on an event must hold them.
_NAME_CHARS_MAX = 64
# Of a part: the id of the event that it was taken from.
_PART_OF_KEY = "ce-partof"


@dataclass(frozen=True, kw_only=True)
class DeadLetter:
    """An event as it came, why it was set aside, and how often its handler failed."""

    event_id: uuid.UUID
    subject: str
    payload: bytes
    headers: Mapping[str, str]
    reason: str
    error: str
    failures: int
    create_time: datetime
    # Of one that was given up: when, by whom, and why.
    discard_time: datetime | None = None
    discarded_by: str = ""
    discard_reason: str = ""

    @property
    def event_type(self) -> str:
        """Full name of the message's type, as the headers say; empty when they do not."""
        return self.headers.get("ce-type", "")


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """`done`: all of the event has its effect now. Otherwise `error` says what is still wrong, and that part is
    kept."""

    done: bool
    error: str = ""


class Applier(Protocol):
    """What a replay needs of a consumer."""

    @property
    def durable(self) -> str: ...

    async def apply(self, connection: Connection, event: EventInfo, payload: bytes, *, subject: str) -> None: ...


async def bury(
    connection: Connection,
    outbox: Outbox | None,
    *,
    consumer: str,
    event_id: uuid.UUID,
    subject: str,
    payload: bytes,
    headers: Mapping[str, str],
    reason: str,
    error: str,
    failures: int,
) -> None:
    """Keeps an event, once, and announces it in the same transaction when there is an outbox."""
    kept = {_text(key): _text(value) for key, value in headers.items()}
    # The inbox row ends redeliveries that are already under way, and a replay keeps it.
    await QUERIES.record_handled(connection, consumer=consumer, event_id=event_id)
    create_time: datetime | None = await QUERIES.add_dead_letter(
        connection,
        consumer=consumer,
        event_id=event_id,
        subject=_text(subject),
        payload=payload,
        headers=kept,
        reason=reason,
        error=_text(error)[:_ERROR_CHARS_MAX],
        failures=failures,
    )
    if create_time is None or outbox is None:
        return
    announcement = dead_letter_events_pb2.EventSetAside(
        consumer=consumer,
        event_id=str(event_id),
        event_subject=_text(subject)[:_NAME_CHARS_MAX],
        event_type=kept.get("ce-type", "")[:_NAME_CHARS_MAX],
        reason=reason,
        error=_text(error)[:_ERROR_CHARS_MAX],
        payload=payload,
    )
    announcement.event_time.CopyFrom(time_to_proto(create_time))
    if announcement.ByteSize() > outbox.size_bytes_max:
        announcement.ClearField("payload")
    if announcement.ByteSize() > outbox.size_bytes_max:
        announcement.error = announcement.error[:_NAME_CHARS_MAX]
    await outbox.add(connection, announcement, subject_name=f"events/{event_id}")


async def set_aside(
    connection: Connection,
    *,
    consumer: str,
    event: EventInfo,
    message: Message,
    reason: str,
    error: str,
    outbox: Outbox | None = None,
) -> None:
    """Keeps a part of an event whose rest is handled in this transaction; `message` holds the part.

    For handlers, which get the consumer's durable name and their service's outbox in their constructor. The part is
    an event of its own whose id follows from the event's and from its content: handled again it is kept once, and
    another part is another dead letter. A replay runs the handler of the message's class on the part alone.
    """
    payload = message.SerializeToString(deterministic=True)
    part_id = uuid.uuid5(event.id, hashlib.sha256(payload).hexdigest())
    headers = {
        "ce-specversion": "1.0",
        "ce-id": str(part_id),
        "ce-source": event.source,
        "ce-type": message.DESCRIPTOR.full_name,
        "ce-subject": event.subject,
        "ce-time": event.time.isoformat(),
        _PART_OF_KEY: str(event.id),
    }
    await bury(
        connection,
        outbox,
        consumer=consumer,
        event_id=part_id,
        subject=subject_of(message),
        payload=payload,
        headers=headers,
        reason=reason,
        error=error,
        failures=1,
    )
    SET_ASIDE.add(1, {"durable": consumer, "reason": reason})
    _log.error("part_set_aside", durable=consumer, part_id=str(part_id), reason=reason, error=error)


async def list_dead_letters(
    connection: Connection,
    consumer: str,
    *,
    after: tuple[datetime, uuid.UUID] | None,
    row_max: int,
    discarded: bool = False,
) -> list[DeadLetter]:
    """Those that wait, or those that were discarded: oldest first, beginning after the one whose time and event id
    `after` names."""
    after_time, after_id = after or (None, None)
    rows = QUERIES.list_dead_letters(
        connection, consumer=consumer, discarded=discarded, after_time=after_time, after_id=after_id, row_max=row_max
    )
    return [
        DeadLetter(
            event_id=row["event_id"],
            subject=row["subject"],
            payload=row["payload"],
            headers=row["headers"],
            reason=row["reason"],
            error=row["error"],
            failures=row["failures"],
            create_time=row["created_at"],
            discard_time=row["discarded_at"],
            discarded_by=row["discarded_by"],
            discard_reason=row["discard_reason"],
        )
        async for row in rows
    ]


async def names_set_aside(connection: Connection, consumer: str, names: Sequence[str]) -> set[str]:
    """Those of the resources of which an event waits among the dead letters; a discarded one waits for nothing."""
    return {row["name"] async for row in QUERIES.list_names_set_aside(connection, consumer=consumer, names=names)}


async def is_discarded(connection: Connection, consumer: str, *, name: str, subject: str) -> bool:
    """Whether a person gave up an event of this subject about this resource."""
    found: bool = await QUERIES.is_discarded(connection, consumer=consumer, name=name, subject=subject)
    return found


async def discard(connection: Connection, consumer: str, event_id: uuid.UUID, *, by: str, why: str) -> None:
    """Gives a dead letter up for good: it is kept with who did it and why, and nothing waits for it any more. NotFound
    when none waits. A replay under way is waited for."""
    name = await QUERIES.discard_dead_letter(
        connection, consumer=consumer, event_id=event_id, discarded_by=by, discard_reason=why
    )
    if name is None:
        raise _unknown(event_id)
    _log.warning("dead_letter_discarded", durable=consumer, event_id=str(event_id), about=name, by=by, why=why)


async def replay(pool: Pool, consumer: Applier, event_id: uuid.UUID) -> Replayed:
    """Runs the handler on a dead letter in one transaction that also deletes it; NotFound when there is none.

    When the handler fails, the dead letter stays, with the new error and one failure more. Whatever is away (the
    database, a peer) says nothing about the event: its error is raised and everything stays as it was.
    """
    async with transaction(pool) as connection:
        # The lock makes a second replay wait, and then find nothing.
        row = await QUERIES.lock_dead_letter(connection, consumer=consumer.durable, event_id=event_id)
        if row is None:
            raise _unknown(event_id)
        try:
            async with connection.transaction():
                event = stored_envelope(event_id, row["headers"], row["created_at"])
                if event.malformed:
                    raise DecodeError(event.malformed)
                await consumer.apply(connection, event, row["payload"], subject=row["subject"])
        except Exception as error:
            if database_is_away(error) or is_away(error):
                raise
            problem = error_text(error)
            await QUERIES.keep_dead_letter(connection, consumer=consumer.durable, event_id=event_id, error=problem)
            return Replayed(done=False, error=problem)
        await QUERIES.delete_dead_letter(connection, consumer=consumer.durable, event_id=event_id)
        await QUERIES.record_handled(connection, consumer=consumer.durable, event_id=event_id)
        rest: str | None = await QUERIES.get_error_of_part(connection, consumer=consumer.durable, part_of=str(event_id))
    return Replayed(done=rest is None, error=rest or "")


def _unknown(event_id: uuid.UUID) -> NotFound:
    return NotFound("NOT_FOUND", f"there is no dead letter {event_id}", metadata={"event_id": str(event_id)})


def error_text(error: Exception) -> str:
    return _text(f"{type(error).__name__}: {error}")[:_ERROR_CHARS_MAX]


def _text(value: str) -> str:
    """What a text column and a protobuf string can hold of it."""
    return value.replace("\0", "").encode(errors="replace").decode()
