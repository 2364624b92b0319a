"""Runs the HTTP edge inside the process's own TaskGroup. Not pure: sockets.

Uvicorn gets a bound socket, connections with bounds, and no signals.
"""

import asyncio
import functools
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import structlog
import uvicorn
from starlette.types import ASGIApp

from chassis.clock import Clock
from chassis.process import DrainStage, Process
from services.gateway.config import GatewaySettings
from services.gateway.http.bounded_connection import BoundedConnection
from services.gateway.http.sockets import Sockets

log = structlog.get_logger()

# What is left of a drain stage for closing connections that did not finish.
_GRACE_SHARE = 0.8


class _Server(uvicorn.Server):
    """Signals are the process's; `ready` is set once connections are taken."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()
        self.ended = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


async def start_http(process: Process, app: ASGIApp, clock: Clock, settings: GatewaySettings) -> int:
    """Serves until the drain; gives the bound port."""
    listener = _bind(settings.http_address, settings.stalled_reader_s_max)
    port: int = listener.getsockname()[1]
    connection: Any = functools.partial(BoundedConnection, sockets=Sockets(settings, clock), settings=settings)
    config = uvicorn.Config(
        app,
        http=connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        # The traces carry who called; headers of a proxy in between must not pass for that.
        proxy_headers=False,
        timeout_graceful_shutdown=max(1, int(settings.drain_grace_s * _GRACE_SHARE)),
    )
    server = _Server(config)

    async def serve() -> None:
        try:
            await server.serve(sockets=[listener])
        finally:
            server.ended.set()

    async def finish() -> None:
        server.should_exit = True
        await server.ended.wait()

    process.on_drain(DrainStage.FINISH_CALLS, finish)
    process.spawn("http_edge", serve, until=DrainStage.FINISH_CALLS)
    await server.ready.wait()
    if (port_file := settings.http_port_file) is not None:
        # Renamed into place: the launcher that waits for the file must never read half a number.
        partial = port_file.with_name(f".{port_file.name}.partial")
        partial.write_text(f"{port}\n")
        partial.replace(port_file)
    log.info("http_serving", port=port)
    return port


def _bind(address: str, stalled_reader_s_max: float) -> socket.socket:
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # Inherited by each connection: a client that takes nothing of what was sent to it, or is not there any more,
        # loses it. Nothing above the kernel sees the difference between slow and stalled.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(stalled_reader_s_max * 1000))
    listener.bind((host.strip("[]"), int(port)))
    listener.setblocking(False)
    return listener
