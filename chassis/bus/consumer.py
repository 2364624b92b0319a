"""A durable reader of events whose effect happens once, however often and in whatever order they are delivered.

The id of an event and its effect are written in one transaction. It knows no event by name and never drops one: what
cannot be handled ends in `dead_letters` with its reason, and in the stream of dead letters.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from google.protobuf.message import DecodeError, Message
from nats.aio.msg import Msg
from opentelemetry import metrics
from opentelemetry.trace import SpanKind

from chassis.bus.connection import BUS_FAILURES, Bus
from chassis.bus.dead_letters import SET_ASIDE, bury, error_text
from chassis.bus.durable_reader import DurableReader
from chassis.bus.envelope import EventInfo, read_envelope
from chassis.bus.outbox import QUERIES, Outbox
from chassis.bus.subjects import stream_of, subject_of
from chassis.bus.verdict import Verdict, judge
from chassis.clock import Clock
from chassis.db.pool import Connection, Pool, database_is_away, transaction
from chassis.db.queries import affected
from chassis.errors import InvalidArgument, is_away
from chassis.telemetry.trace import TRACEPARENT_KEY, span

Handler = Callable[[Connection, Any, EventInfo], Awaitable[None]]

_log = structlog.get_logger(__name__)
_handled = metrics.get_meter(__name__).create_counter("consumer.handled", unit="{event}")


@dataclass(frozen=True, kw_only=True)
class _Delivery:
    """One event in hand: the raw message, what its headers say, and the handler's name for it."""

    message: Msg
    event: EventInfo


class Consumer:
    """`handlers` maps event classes to `async handler(connection, message, event)`, run inside the transaction.

    A handler raises DomainError to refuse an event; see `verdict.py` for what is tried again. Each stream that the
    handled subjects live in gets a durable reader named `durable`; several processes may share it. What is set aside is
    announced through the service's `outbox`, in the transaction that keeps it. Types without a handler are passed over,
    but not in `families` (first parts of subjects): there nothing may be lost, so they are set aside, to be run again
    by a version that knows them.
    """

    def __init__(
        self,
        pool: Pool,
        bus: Bus,
        durable: str,
        handlers: Mapping[type[Message], Handler],
        *,
        clock: Clock,
        outbox: Outbox | None = None,
        families: Collection[str] = (),
    ) -> None:
        assert handlers
        self._families = frozenset(families)
        self._outbox = outbox
        self._pool = pool
        self._durable = durable
        self._settings = bus.settings
        self._classes = {kind.DESCRIPTOR.full_name: kind for kind in handlers}
        self._handlers = {kind.DESCRIPTOR.full_name: handler for kind, handler in handlers.items()}
        subjects: dict[str, list[str]] = {}
        for kind in handlers:
            subject = subject_of(kind)
            subjects.setdefault(stream_of(subject), []).append(subject)
        subjects |= {stream_of(f"{family}.>"): [f"{family}.>"] for family in self._families}
        self._reader = DurableReader(bus, durable, subjects, self._settle_all, clock=clock)
        self._slots = asyncio.Semaphore(self._settings.consumer_concurrency_max)

    @property
    def durable(self) -> str:
        return self._durable

    async def run(self) -> None:
        """Runs until stopped or cancelled. A bus or database that is away is waited for; only a defect ends it."""
        await self._reader.run()

    async def stop(self) -> None:
        """Fetches no more and lets the events in hand finish, so that they need not wait to be delivered again."""
        await self._reader.stop()

    async def is_drained(self) -> bool:
        """True when everything that the streams held when this was called is handled or set aside."""
        return await self._reader.is_drained()

    async def _settle_all(self, stream: str, messages: Sequence[Msg]) -> None:
        async with asyncio.TaskGroup() as batch:
            for message in messages:
                batch.create_task(self._settle(message))

    async def _settle(self, message: Msg) -> None:
        """Handles one delivery and answers it; an answer that gets lost only means another delivery."""
        async with self._slots:
            delivery = _Delivery(message=message, event=read_envelope(message))
            verdict = await self._handle(delivery)
            try:
                if verdict.retry_in_s is not None:
                    await message.nak(delay=verdict.retry_in_s)
                elif verdict.dead:
                    await message.term()
                else:
                    await message.ack()
            except BUS_FAILURES as error:
                _log.warning("answer_lost", durable=self._durable, event_id=str(delivery.event.id), error=repr(error))

    async def _handle(self, delivery: _Delivery) -> Verdict:
        event = delivery.event
        ours = delivery.message.subject.partition(".")[0] in self._families
        if event.type not in self._handlers and not event.malformed and not ours:
            return Verdict.done()
        traceparent = (delivery.message.headers or {}).get(TRACEPARENT_KEY)
        with structlog.contextvars.bound_contextvars(event_id=str(event.id), event_type=event.type):
            try:
                with span(f"{self._durable} {event.type}", traceparent, kind=SpanKind.CONSUMER):
                    await self._apply(delivery)
            except Exception as error:
                if database_is_away(error) or is_away(error):
                    return self._postponed(error)
                return await self._refused(delivery, error)
            _handled.add(1, {"durable": self._durable})
            return Verdict.done()

    async def apply(self, connection: Connection, event: EventInfo, payload: bytes, *, subject: str) -> None:
        """Runs the event's handler in the caller's transaction; InvalidArgument when there is none for its type, or
        when it came on the `subject` of another: a service may publish on its own subjects only, and says the type
        itself."""
        if event.type not in self._handlers:
            raise InvalidArgument("EVENT_INVALID", f"{self._durable} handles no event of type {event.type!r}")
        if subject != subject_of(self._classes[event.type]):
            raise InvalidArgument("EVENT_INVALID", f"an event of type {event.type!r} came on the subject {subject!r}")
        await self._handlers[event.type](connection, self._classes[event.type].FromString(payload), event)

    def read(self, event_type: str, payload: bytes) -> Message | None:
        """The event as a message, for people to look at; None when it has no handler or its bytes are not readable."""
        kind = self._classes.get(event_type)
        try:
            return kind.FromString(payload) if kind is not None else None
        except DecodeError:
            return None

    async def _apply(self, delivery: _Delivery) -> None:
        event = delivery.event
        if event.malformed:
            raise DecodeError(event.malformed)
        async with transaction(self._pool) as connection:
            inserted = await QUERIES.record_handled(connection, consumer=self._durable, event_id=event.id)
            if affected(inserted) == 0:
                return
            await self.apply(connection, event, delivery.message.data, subject=delivery.message.subject)
            if event.deliveries > 1:
                await QUERIES.forget_failures(connection, consumer=self._durable, event_id=event.id)

    def _postponed(self, error: Exception) -> Verdict:
        _log.warning("event_postponed", durable=self._durable, error=repr(error))
        return Verdict.retry(self._settings.reconnect_backoff_s_max)

    async def _refused(self, delivery: _Delivery, error: Exception) -> Verdict:
        """The handler failed: count it, and either try again later or set the event aside."""
        event = delivery.event
        text = error_text(error)
        try:
            async with transaction(self._pool) as connection:
                failures = await QUERIES.count_failure(
                    connection, consumer=self._durable, event_id=event.id, error=text
                )
                verdict = judge(error, failures=failures, settings=self._settings)
                if verdict.dead:
                    await self._bury(connection, delivery, verdict.reason, text, failures)
        except Exception as failure:
            if not database_is_away(failure):
                raise
            return self._postponed(failure)
        if verdict.dead:
            SET_ASIDE.add(1, {"durable": self._durable, "reason": verdict.reason})
            _log.error("event_set_aside", durable=self._durable, reason=verdict.reason, failures=failures, error=text)
            if self._outbox is not None:
                self._outbox.wake()
        else:
            _log.warning("event_failed", durable=self._durable, failures=failures, exc_info=error)
        return verdict

    async def _bury(self, connection: Connection, delivery: _Delivery, reason: str, error: str, failures: int) -> None:
        event = delivery.event
        await QUERIES.forget_failures(connection, consumer=self._durable, event_id=event.id)
        await bury(
            connection,
            self._outbox,
            consumer=self._durable,
            event_id=event.id,
            subject=delivery.message.subject,
            payload=delivery.message.data,
            headers=dict(delivery.message.headers or {}),
            reason=reason,
            error=error,
            failures=failures,
        )
