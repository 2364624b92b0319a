"""A gRPC server with everything around the implementations: health, reflection, identity, deadlines, errors, traces.

A service supplies implementations and says who may call them; this file knows neither.
"""

import dataclasses
import socket
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from chassis import pki
from chassis.process import DrainStage, Process
from chassis.rpc.call_limits import CallLimits
from chassis.rpc.contracts import pool_of
from chassis.rpc.guard import Authenticate, EndlessCalls, Guard, Handler
from chassis.rpc.open_calls import OpenCalls
from chassis.rpc.witness import Witnessing
from chassis.settings import ChassisSettings

log = structlog.get_logger()

# What is left of a drain stage for cancelling the calls that did not finish.
_GRACE_SHARE = 0.8
_GENERIC_METHODS_MAX = 1000
_EVERY_INTERFACE = ("", "0.0.0.0", "[::]")  # noqa: S104  # recognized, not bound


class ServerBuilder:
    """Collects services, then starts one server that drains with its process.

    `public=True` opens a server for callers without a certificate (with TLS where settings give a public certificate);
    `authenticate` then finds out who they are, and `witnessing` looks at what they ask for. `serving=False` starts
    NOT_SERVING until `set_serving(True)`.
    """

    def __init__(
        self,
        process: Process,
        settings: ChassisSettings,
        *,
        trusted_forwarders: Collection[str] = (),
        public: bool = False,
        authenticate: Authenticate | None = None,
        witnessing: Witnessing | None = None,
        listen_address: str | None = None,
        port_file: Path | None = None,
        serving: bool = True,
    ) -> None:
        self._process = process
        self._settings = settings
        self._trusted_forwarders = frozenset(trusted_forwarders)
        self._public = public
        self._authenticate = authenticate
        self._witnessing = witnessing
        self._listen_address = listen_address or settings.listen_address
        # The settings' port file belongs to the settings' address.
        self._port_file = port_file or (settings.port_file if listen_address is None else None)
        self._serving = serving
        self._endless_calls = EndlessCalls()
        self._limits = CallLimits(settings)
        self._service_names: list[str] = []
        self._components: list[str] = []
        self._declared = _Declared()
        self._generic: list[grpc.GenericRpcHandler] = []
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self.port = 0

    def add(
        self,
        register: Callable[[Any, Any], None],
        implementation: object,
        service_full_name: str,
        allow: Collection[str],
        *,
        endless: Collection[str] = (),
    ) -> None:
        """`register` is the generated add_XServicer_to_server; `allow` names the calling services (a public server has
        none and ignores it); `endless` names the streams that only end when told, such as `WatchThing`."""
        self._service_names.append(service_full_name)
        guard = self._guard(frozenset(allow), frozenset(endless))
        self._declared.add(register, implementation, service_full_name, guard)

    def add_generic(
        self, handler: grpc.GenericRpcHandler, *, allow: Collection[str] = (), endless: Collection[str] = ()
    ) -> None:
        """A handler that answers for methods it does not declare, such as a proxy; asked after the declared ones."""
        guard = self._guard(frozenset(allow), frozenset(endless))
        self._generic.append(_GuardedGeneric(handler, guard))

    def announce(self, *service_full_names: str) -> None:
        """Lists services that a generic handler serves in reflection and health."""
        self._service_names.extend(service_full_names)

    async def start(self) -> int:
        """Binds, serves, and registers the drain; gives the bound port, which is also written to the port file."""
        self._add_open_services()
        await self.set_serving(self._serving)
        for name in self._components:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._server = grpc.aio.server(
            handlers=[self._declared, *self._generic],
            # No limit of calls here: gRPC's own would count those of strangers, and the guard's do not.
            options=_options(self._settings) + (_public_options(self._settings) if self._public else []),
        )
        self.port = self._bind(self._server)
        await self._server.start()
        self._process.on_drain(DrainStage.NOT_SERVING, self._health.enter_graceful_shutdown)
        self._process.on_drain(DrainStage.FINISH_CALLS, self._finish_calls)
        if self._port_file is not None:
            _write_port(self._port_file, self.port)
        log.info("serving", port=self.port, public=self._public, services=self._service_names)
        return self.port

    @property
    def address(self) -> str:
        """host:port by which others reach the started server, as the settings say, or as it is bound. One that listens
        on every interface is reached by the name of its machine."""
        if self._settings.advertised_address:
            return self._settings.advertised_address
        host = self._listen_address.rpartition(":")[0]
        return f"{socket.gethostname() if host in _EVERY_INTERFACE else host}:{self.port}"

    async def set_serving(self, serving: bool) -> None:
        """What health answers, for the server and for each of its services; a drain has the last word."""
        answer = health_pb2.HealthCheckResponse
        status = answer.SERVING if serving else answer.NOT_SERVING
        for name in ("", *self._service_names):
            await self._health.set(name, status)

    def component(self, name: str) -> Callable[[bool], Awaitable[None]]:
        """A part that health can be asked for by this name, and the way to tell whether it is well.

        The server's own answer stays as it is, because a restart would not cure the part.
        """
        self._components.append(name)

        async def tell(well: bool) -> None:
            answer = health_pb2.HealthCheckResponse
            await self._health.set(name, answer.SERVING if well else answer.NOT_SERVING)

        return tell

    def _guard(self, allow: frozenset[str], endless: frozenset[str]) -> Guard:
        return Guard(
            settings=self._settings,
            limits=self._limits,
            allow=allow,
            trusted_forwarders=self._trusted_forwarders,
            public=self._public,
            authenticate=self._authenticate,
            witnessing=self._witnessing,
            endless=endless,
            endless_calls=self._endless_calls,
        )

    def _add_open_services(self) -> None:
        """Health and reflection, for any peer: they say nothing about anybody's data.

        Neither is refused: who asks would take a server that is busy for one that is ill, and end it.
        """
        settings = self._settings
        guard = dataclasses.replace(
            self._guard(frozenset(), frozenset({"Watch", "ServerReflectionInfo"})),
            allow=None,
            authenticate=None,
            witnessing=None,
            open_calls=OpenCalls(
                calls_max=settings.open_calls_max, per_connection_max=settings.open_calls_per_connection_max
            ),
            endless_s_max=settings.open_call_s_max,
        )
        self._declared.add(health_pb2_grpc.add_HealthServicer_to_server, self._health, health.SERVICE_NAME, guard)
        names = [*self._service_names, health.SERVICE_NAME, reflection.SERVICE_NAME]
        self._declared.add(
            reflection_pb2_grpc.add_ServerReflectionServicer_to_server,
            reflection.aio.ReflectionServicer(names, pool=pool_of(names)),
            reflection.SERVICE_NAME,
            guard,
        )

    def _bind(self, server: grpc.aio.Server) -> int:
        settings, address = self._settings, self._listen_address
        if not self._public:
            return server.add_secure_port(address, pki.load(settings.tls_dir, settings.service_name).for_server())
        if settings.public_certificate_file is None or settings.public_key_file is None:
            return server.add_insecure_port(address)
        pair = (settings.public_key_file.read_bytes(), settings.public_certificate_file.read_bytes())
        return server.add_secure_port(address, grpc.ssl_server_credentials([pair]))

    async def _finish_calls(self) -> None:
        if self._server is not None:
            self._endless_calls.end()
            await self._server.stop(self._settings.drain_grace_s * _GRACE_SHARE)


class _Declared(grpc.GenericRpcHandler):
    """All methods of the added services in one table.

    Not gRPC's own registered methods: its asyncio server waits on one future for each of those with every call.
    """

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}

    def add(
        self, register: Callable[[Any, Any], None], implementation: object, service_full_name: str, guard: Guard
    ) -> None:
        registration = _Registration()
        register(implementation, registration)
        if registration.service != service_full_name:
            raise ValueError(f"{service_full_name} is announced but {registration.service} is registered")
        for name, handler in registration.handlers.items():
            method = f"/{service_full_name}/{name}"
            self._handlers[method] = guard.wrap(method, handler)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        return self._handlers.get(handler_call_details.method)


class _Registration:
    """Stands in for the server in generated registration code, to see the handlers before gRPC does."""

    def __init__(self) -> None:
        self.service = ""
        self.handlers: Mapping[str, Handler] = {}

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """The same handlers again, in the form that cannot be looked into."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Handler]) -> None:
        self.service, self.handlers = service, handlers


class _GuardedGeneric(grpc.GenericRpcHandler):
    def __init__(self, inner: grpc.GenericRpcHandler, guard: Guard) -> None:
        self._inner = inner
        self._guard = guard
        self._wrapped: dict[str, Handler] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Handler | None:
        method = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            handler = self._inner.service(handler_call_details)
            if handler is None:
                return None
            wrapped = self._guard.wrap(method, handler)
            # Bounded: a handler that answers for any name must not let callers fill the memory with names.
            if len(self._wrapped) < _GENERIC_METHODS_MAX:
                self._wrapped[method] = wrapped
        return wrapped


def _options(settings: ChassisSettings) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", settings.message_size_bytes_max),
        ("grpc.max_send_message_length", settings.message_size_bytes_max),
        ("grpc.max_metadata_size", settings.metadata_size_bytes_max),
        # Two servers on one port would each get half of the calls; a taken port has to be an error.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", int(settings.keepalive_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.server_handshake_timeout_ms", int(settings.handshake_s_max * 1000)),
        ("grpc.max_allowed_incoming_connections", settings.connections_max),
        ("grpc.http2.min_ping_interval_without_data_ms", int(settings.keepalive_s * 500)),
        ("grpc.http2.max_ping_strikes", 0),
        # From the first limit on gRPC ends calls by lot, those with a key, too: a thousand by default, which one
        # connection can send at once. Two equal limits leave nothing to chance.
        ("grpc.server.max_pending_requests", settings.waiting_calls_max),
        ("grpc.server.max_pending_requests_hard_limit", settings.waiting_calls_max),
    ]


def _public_options(settings: ChassisSettings) -> list[tuple[str, int]]:
    return [
        ("grpc.max_concurrent_streams", settings.connection_calls_max),
        ("grpc.max_connection_idle_ms", int(settings.connection_idle_s_max * 1000)),
    ]


def _write_port(path: Path, port: int) -> None:
    # Renamed into place: the launcher that waits for the file must never read half a number.
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(f"{port}\n")
    partial.replace(path)
