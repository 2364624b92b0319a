"""The process's connection to NATS JetStream and the streams it needs. It knows no subject and no message.

The connection comes back for ever: a bus that is away delays events, it never stops a service.
"""

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Mapping

import nats
import nats.errors
import structlog
from nats.aio.client import Client
from nats.js import JetStreamContext, api
from nats.js.errors import APIError, BadRequestError, NotFoundError

from chassis.bus import PUBLISHING_HEALTH, STREAMS_HEALTH
from chassis.bus.durables import DURABLES, Durable
from chassis.bus.part_health import PartHealth, Tell
from chassis.settings import ChassisSettings

# Raised when the bus is away, restarting or overloaded: the same call, tried again, can succeed.
BUS_FAILURES: tuple[type[Exception], ...] = (nats.errors.Error, OSError, TimeoutError)

# JetStream drops a second publish with the same event id within this time: a convenience, the inbox is the guarantee.
DUPLICATE_WINDOW_S = 120.0

# What the server answers when a stream exists with other settings, and when it cannot store an event.
_STREAM_DIFFERS = 10058
_NOT_STORED = 10077
# What a process gives a stream that exists.
_SETTINGS = ("subjects", "retention", "discard", "max_age", "max_bytes", "duplicate_window", "num_replicas")
_PING_INTERVAL_S = 10
_log = structlog.get_logger(__name__)


def is_stream_full(error: Exception) -> bool:
    """The server is well and keeps to the stream's limits."""
    return isinstance(error, APIError) and error.err_code == _NOT_STORED and "maximum" in (error.description or "")


class Bus:
    """One connection, shared by every relay and consumer of the process."""

    def __init__(
        self,
        settings: ChassisSettings,
        client: Client,
        *,
        durables: Mapping[str, tuple[Durable, ...]] = DURABLES,
    ) -> None:
        self.settings = settings
        self.durables = durables
        self.client = client
        self._known_streams: set[str] = set()
        self._reopening = asyncio.Lock()
        self._closing = False
        # Do the streams have room? Does the server take events?
        self.room, self.publishing = PartHealth(), PartHealth()
        self._farewells: list[Callable[[], Awaitable[None]]] = []

    @property
    def jetstream(self) -> JetStreamContext:
        return self.client.jetstream(timeout=self.settings.publish_timeout_s)

    async def ensure_stream(self, name: str) -> None:
        """Creates the stream and its declared readers unless they exist.

        Publisher and consumer both call it, so start order does not matter.
        """
        if name in self._known_streams:
            return
        config = api.StreamConfig(
            name=name,
            subjects=[f"{name.lower()}.>"],
            storage=api.StorageType.FILE,
            retention=api.RetentionPolicy.LIMITS,
            # A full stream refuses new events, which then wait in the outbox: dropping old ones would lose facts. One
            # that no service reads is a feed for whoever looks, and its oldest events make room.
            discard=api.DiscardPolicy.NEW if self.durables.get(name) else api.DiscardPolicy.OLD,
            max_age=self.settings.stream_age_s_max,
            max_bytes=self.settings.stream_size_bytes_max,
            duplicate_window=DUPLICATE_WINDOW_S,
            num_replicas=self.settings.stream_replicas,
        )
        try:
            found = (await self.jetstream.stream_info(name)).config
        except NotFoundError:
            await self._add(config)
        else:
            # Asked and not just added: a cluster leaves the second making of a stream with other replicas unanswered.
            if any(getattr(found, setting) != getattr(config, setting) for setting in _SETTINGS):
                await self._reconcile(config)
        await self._ensure_readers(name)
        self._known_streams.add(name)

    async def ensure_durable(self, stream: str, durable: Durable) -> None:
        """Makes the reader, or gives the one that exists the settings of this process."""
        wait_s = self.settings.consumer_ack_wait_s if durable.ack_wait_s is None else durable.ack_wait_s
        config = api.ConsumerConfig(
            durable_name=durable.name,
            filter_subjects=list(durable.subjects),
            ack_policy=api.AckPolicy.EXPLICIT,
            ack_wait=wait_s,
            max_ack_pending=durable.pending_max,
            # The bus never gives up an event: it cannot tell a broken event from a database that is away.
            max_deliver=-1,
        )
        await self.jetstream.add_consumer(stream, config)

    async def _ensure_readers(self, stream: str) -> None:
        """Makes the declared readers that are missing. The settings of one that exists are its own process's matter."""
        for durable in self.durables.get(stream, ()):
            try:
                await self.jetstream.consumer_info(stream, durable.name)
            except NotFoundError:
                await self.ensure_durable(stream, durable)

    async def _add(self, config: api.StreamConfig) -> None:
        try:
            await self.jetstream.add_stream(config)
        except BadRequestError as error:
            # Another process, with other settings, was faster.
            if error.err_code != _STREAM_DIFFERS:
                raise
            await self._reconcile(config)

    async def _reconcile(self, config: api.StreamConfig) -> None:
        """Gives a stream that exists the settings of this process. One that refuses them is used as it is."""
        try:
            await self.jetstream.update_stream(config)
        except APIError as error:
            _log.error("stream_settings_refused", stream=config.name, error=str(error))
        else:
            _log.warning("stream_settings_changed", stream=config.name, size_bytes_max=config.max_bytes)

    async def recover(self) -> None:
        """Called after a failure: forgets what the server was known to have, and reopens a connection that gave up.

        The server may return with an empty disk, and nats-py closes itself for good on some protocol errors.
        """
        self._known_streams.clear()
        async with self._reopening:
            if self.client.is_closed and not self._closing:
                _log.warning("bus_reopening")
                self.client = await _open_client(self.settings)

    def report_to(self, component: Callable[[str], Tell]) -> None:
        """Tells a server's health how the bus is, part by part."""
        self.room.report_to(component(STREAMS_HEALTH))
        self.publishing.report_to(component(PUBLISHING_HEALTH))

    def before_close(self, farewell: Callable[[], Awaitable[None]]) -> None:
        """Registers what still has to use the connection when the process stops."""
        self._farewells.append(farewell)

    async def close(self) -> None:
        self._closing = True
        for farewell in self._farewells:
            await farewell()
        if not self.client.is_closed:
            await self.client.close()


async def connect(settings: ChassisSettings) -> Bus:
    """Waits up to `startup_wait_s` for the bus, then raises TimeoutError.

    Credentials travel in `nats_url` (`nats://user:password@host`); `tls://` turns TLS on.
    """
    async with asyncio.timeout(settings.startup_wait_s):
        return Bus(settings, await _open_client(settings))


async def _open_client(settings: ChassisSettings) -> Client:
    last_error = ""

    async def on_error(error: Exception) -> None:
        nonlocal last_error
        # The client reports every attempt to reconnect; the log hears of each kind of trouble once.
        if repr(error) != last_error:
            last_error = repr(error)
            _log.warning("bus_error", error=last_error)

    async def on_disconnected() -> None:
        _log.warning("bus_disconnected")

    async def on_reconnected() -> None:
        nonlocal last_error
        last_error = ""
        _log.info("bus_reconnected")

    return await nats.connect(
        settings.nats_url,
        name=settings.service_name,
        # Answers come under the service's own name, which is all that its user may listen to.
        inbox_prefix=f"_INBOX.{settings.service_name}",
        tls=_tls_context(settings) if settings.nats_url.startswith("tls://") else None,
        connect_timeout=max(1, round(settings.connect_timeout_s)),
        # nats-py annotates whole seconds but only sleeps for it and compares times with it.
        reconnect_time_wait=settings.reconnect_backoff_s_min,
        max_reconnect_attempts=-1,
        ping_interval=_PING_INTERVAL_S,
        error_cb=on_error,
        disconnected_cb=on_disconnected,
        reconnected_cb=on_reconnected,
    )


def _tls_context(settings: ChassisSettings) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(settings.tls_dir / "ca.pem"))
    own = settings.tls_dir / settings.service_name
    context.load_cert_chain(own.with_suffix(".pem"), own.with_suffix(".key"))
    return context
