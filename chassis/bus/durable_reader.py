"""A durable reader: its place in each stream is kept by the bus, and several processes may share it. Not pure: bus.

It fetches and hands on what came, and makes itself again where the bus lost it. It knows no event, and whoever is given
the messages answers them.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TypedDict, Unpack

import nats.errors
import structlog
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from chassis.backoff import Backoff
from chassis.bus.connection import BUS_FAILURES, Bus
from chassis.bus.durables import find_durable
from chassis.clock import Clock

# Takes what one fetch of a stream brought; nothing where none came in time.
OnMessages = Callable[[str, Sequence[Msg]], Awaitable[None]]

# Between looks at how far the reader of a busy stream has come.
_DRAIN_POLL_S = 0.05
_log = structlog.get_logger(__name__)


class ReaderSettings(TypedDict, total=False):
    """What a service may set of its own reader; see Durable."""

    ack_wait_s: float
    pending_max: int


class DurableReader:
    """`subjects` are those of each stream. `on_messages` raises one of BUS_FAILURES to begin anew after a pause."""

    def __init__(
        self,
        bus: Bus,
        durable: str,
        subjects: Mapping[str, Collection[str]],
        on_messages: OnMessages,
        *,
        clock: Clock,
        batch_max: int | None = None,
        **settings: Unpack[ReaderSettings],
    ) -> None:
        """`settings` take the place of what is declared."""
        self._bus = bus
        self._durable = durable
        declared = {stream: find_durable(bus.durables, stream, durable, subjects[stream]) for stream in subjects}
        self._durables = {stream: replace(each, **settings) for stream, each in declared.items()}
        self._on_messages = on_messages
        self._clock = clock
        self._settings = bus.settings
        self._batch_max = batch_max or self._settings.consumer_batch_max
        self._running = False
        self._stopping = False
        self._stopped = asyncio.Event()
        self._fetches: set[asyncio.Task[list[Msg]]] = set()

    @property
    def is_stopping(self) -> bool:
        return self._stopping

    async def run(self) -> None:
        """Runs until stopped or cancelled. A bus that is away is waited for."""
        self._running = True
        self._stopped.clear()
        try:
            async with asyncio.TaskGroup() as readers:
                for stream in self._durables:
                    readers.create_task(self._read(stream), name=f"{self._durable}-{stream}")
        finally:
            self._stopped.set()

    async def stop(self) -> None:
        """Fetches no more and lets what is in hand finish."""
        self._stopping = True
        for fetch in self._fetches:
            fetch.cancel()
        if self._running:
            await self._stopped.wait()

    async def is_drained(self) -> bool:
        """True when everything that the streams held when this was called is answered.

        Waits up to `consumer_drain_wait_s` for it. False as well while a reader is missing or the bus cannot say.
        """
        deadline_s = self._clock.monotonic() + self._settings.consumer_drain_wait_s
        try:
            last = {stream: (await self._bus.jetstream.stream_info(stream)).state.last_seq for stream in self._durables}
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

    async def _read(self, stream: str) -> None:
        backoff = Backoff(first_s=self._settings.reconnect_backoff_s_min, last_s=self._settings.reconnect_backoff_s_max)
        while not self._stopping:
            subscription = None
            try:
                subscription = await self._subscribe(stream)
                backoff.reset()
                await self._read_until_failure(stream, subscription)
            except BUS_FAILURES as error:
                _log.warning("consumer_waits", durable=self._durable, stream=stream, error=repr(error))
                await self._clock.sleep(backoff.next_s())
                await self._bus.recover()
            finally:
                if subscription is not None:
                    await _unsubscribe(subscription)

    async def _subscribe(self, stream: str) -> JetStreamContext.PullSubscription:
        await self._bus.ensure_stream(stream)
        await self._bus.ensure_durable(stream, self._durables[stream])
        return await self._bus.jetstream.pull_subscribe_bind(durable=self._durable, stream=stream)

    async def _read_until_failure(self, stream: str, subscription: JetStreamContext.PullSubscription) -> None:
        while not self._stopping:
            messages = await self._fetch(subscription)
            if not messages and not self._stopping:
                # No events for a while, or nobody to send them: a reader that the bus lost has to be made again.
                await subscription.consumer_info()
            await self._on_messages(stream, messages)

    async def _fetch(self, subscription: JetStreamContext.PullSubscription) -> list[Msg]:
        fetch = asyncio.create_task(subscription.fetch(self._batch_max, timeout=self._settings.consumer_fetch_wait_s))
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


async def _unsubscribe(subscription: JetStreamContext.PullSubscription) -> None:
    try:
        await subscription.unsubscribe()
    except nats.errors.Error as error:
        # The connection is gone, and the subscription with it.
        _log.debug("unsubscribe_failed", error=repr(error))
