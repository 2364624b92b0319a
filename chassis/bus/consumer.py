"""A durable reader of events whose effect happens once, however often and in whatever order they are delivered.

The id of an event and its effect are written in one transaction. It knows no event by name and never drops one: what
cannot be handled ends in `dead_letters` with its reason, and in the stream of dead letters.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import nats.errors
import structlog
from google.protobuf.message import DecodeError, Message
from nats.aio.msg import Msg
from nats.js import JetStreamContext, api
from opentelemetry import metrics
from opentelemetry.trace import SpanKind

from chassis.backoff import Backoff
from chassis.bus.connection import BUS_FAILURES, Bus
from chassis.bus.dead_letters import SET_ASIDE, bury, error_text
from chassis.bus.envelope import EventInfo, read_envelope
from chassis.bus.outbox import QUERIES, Outbox
from chassis.bus.subjects import stream_of, subject_of
from chassis.bus.verdict import Verdict, dependency_is_away, judge
from chassis.clock import Clock
from chassis.db.pool import Connection, Pool, database_is_away, transaction
from chassis.db.queries import affected
from chassis.errors import InvalidArgument
from chassis.telemetry.trace import TRACEPARENT_KEY, span

Handler = Callable[[Connection, Any, EventInfo], Awaitable[None]]

# Between looks at how far the reader of a busy stream has come.
_DRAIN_POLL_S = 0.05

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
        self._bus = bus
        self._durable = durable
        self._clock = clock
        self._settings = bus.settings
        self._classes = {kind.DESCRIPTOR.full_name: kind for kind in handlers}
        self._handlers = {kind.DESCRIPTOR.full_name: handler for kind, handler in handlers.items()}
        self._subjects: dict[str, list[str]] = {}
        for kind in handlers:
            subject = subject_of(kind)
            self._subjects.setdefault(stream_of(subject), []).append(subject)
        self._subjects |= {stream_of(f"{family}.>"): [f"{family}.>"] for family in self._families}
        self._running = False
        self._stopping = False
        self._stopped = asyncio.Event()
        self._fetches: set[asyncio.Task[list[Msg]]] = set()
        self._slots = asyncio.Semaphore(self._settings.consumer_concurrency_max)

    @property
    def durable(self) -> str:
        return self._durable

    async def run(self) -> None:
        """Runs until stopped or cancelled. A bus or database that is away is waited for; only a defect ends it."""
        self._running = True
        self._stopped.clear()
        try:
            async with asyncio.TaskGroup() as readers:
                for stream, subjects in self._subjects.items():
                    readers.create_task(self._read(stream, subjects), name=f"{self._durable}-{stream}")
        finally:
            self._stopped.set()

    async def stop(self) -> None:
        """Fetches no more and lets the events in hand finish, so that they need not wait to be delivered again."""
        self._stopping = True
        for fetch in self._fetches:
            fetch.cancel()
        if self._running:
            await self._stopped.wait()

    async def is_drained(self) -> bool:
        """True when everything that the streams held when this was called is handled or set aside.

        Waits up to `consumer_drain_wait_s` for it. False as well while a reader is missing or the bus cannot say.
        """
        deadline_s = self._clock.monotonic() + self._settings.consumer_drain_wait_s
        try:
            last = {stream: (await self._bus.jetstream.stream_info(stream)).state.last_seq for stream in self._subjects}
            while not all([await self._is_past(stream, sequence) for stream, sequence in last.items()]):
                if self._clock.monotonic() >= deadline_s:
                    return False
                await self._clock.sleep(_DRAIN_POLL_S)
        except BUS_FAILURES as error:
            _log.warning("drain_unknown", durable=self._durable, error=repr(error))
            return False
        return True

    async def _is_past(self, stream: str, sequence: int) -> bool:
        info = await self._bus.jetstream.consumer_info(stream, self._durable)
        # A busy stream always has more to come, and an idle one may end in events that are not for this reader.
        handled = info.ack_floor.stream_seq if info.ack_floor is not None else 0
        return handled >= sequence or (info.num_pending == 0 and info.num_ack_pending == 0)

    async def _read(self, stream: str, subjects: list[str]) -> None:
        backoff = Backoff(first_s=self._settings.reconnect_backoff_s_min, last_s=self._settings.reconnect_backoff_s_max)
        while not self._stopping:
            subscription = None
            try:
                subscription = await self._subscribe(stream, subjects)
                backoff.reset()
                await self._read_until_failure(subscription)
            except BUS_FAILURES as error:
                _log.warning("consumer_waits", durable=self._durable, stream=stream, error=repr(error))
                await self._clock.sleep(backoff.next_s())
                await self._bus.recover()
            finally:
                if subscription is not None:
                    await _unsubscribe(subscription)

    async def _subscribe(self, stream: str, subjects: list[str]) -> JetStreamContext.PullSubscription:
        await self._bus.ensure_stream(stream)
        await self._bus.jetstream.add_consumer(
            stream,
            api.ConsumerConfig(
                durable_name=self._durable,
                filter_subjects=sorted(subjects),
                ack_policy=api.AckPolicy.EXPLICIT,
                ack_wait=self._settings.consumer_ack_wait_s,
                # The bus never gives up an event: it cannot tell a broken event from a database that is away.
                max_deliver=-1,
            ),
        )
        return await self._bus.jetstream.pull_subscribe_bind(durable=self._durable, stream=stream)

    async def _read_until_failure(self, subscription: JetStreamContext.PullSubscription) -> None:
        while not self._stopping:
            messages = await self._fetch(subscription)
            if not messages and not self._stopping:
                # No events for a while, or nobody to send them: a reader that the bus lost has to be made again.
                await subscription.consumer_info()
            async with asyncio.TaskGroup() as batch:
                for message in messages:
                    batch.create_task(self._settle(message))

    async def _fetch(self, subscription: JetStreamContext.PullSubscription) -> list[Msg]:
        fetch = asyncio.create_task(
            subscription.fetch(self._settings.consumer_batch_max, timeout=self._settings.consumer_fetch_wait_s)
        )
        self._fetches.add(fetch)
        try:
            await asyncio.wait({fetch})
            if fetch.cancelled():
                return []
            messages: list[Msg] = fetch.result()
            return messages
        except TimeoutError:
            # Python's own as well as nats-py's, which inherits from it: both come when no event did.
            return []
        finally:
            self._fetches.discard(fetch)
            fetch.cancel()

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
                if database_is_away(error) or dependency_is_away(error):
                    return self._postponed(error)
                return await self._refused(delivery, error)
            _handled.add(1, {"durable": self._durable})
            return Verdict.done()

    async def apply(self, connection: Connection, event: EventInfo, payload: bytes) -> None:
        """Runs the event's handler in the caller's transaction; InvalidArgument when there is none for its type."""
        if event.type not in self._handlers:
            raise InvalidArgument("EVENT_INVALID", f"{self._durable} handles no event of type {event.type!r}")
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
            await self.apply(connection, event, delivery.message.data)
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


async def _unsubscribe(subscription: JetStreamContext.PullSubscription) -> None:
    try:
        await subscription.unsubscribe()
    except nats.errors.Error as error:
        # The connection is gone, and the subscription with it.
        _log.debug("unsubscribe_failed", error=repr(error))
