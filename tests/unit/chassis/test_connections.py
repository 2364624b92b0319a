"""What a connection may do that never comes to a call, or to the request of one: each has its time and its number."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from chassis.errors import Unauthenticated
from chassis.identity import Caller
from chassis.rpc.server import ServerBuilder
from tests.harness import http2
from tests.harness.living import living

from .echo import SERVICE, Echo, add_echo_to_server, settings_of

WAIT_S_MAX = 30
SHORT_S = 0.3


@contextlib.asynccontextmanager
async def public(tls_dir: Path, **values: Any) -> AsyncIterator[int]:
    """The port of a server whose only key is `right`."""

    async def authenticate(metadata: Mapping[str, str], method: str) -> Caller:
        if metadata.get("authorization") != "Bearer right":
            raise Unauthenticated("API_KEY_INVALID", "no such key")
        return Caller(service="", tenant="p1", subject="key_1")

    settings = settings_of("back", tls_dir, **values)
    async with living(settings) as process, asyncio.timeout(WAIT_S_MAX):
        builder = ServerBuilder(process, settings, public=True, authenticate=authenticate)
        builder.add(add_echo_to_server, Echo(), SERVICE, ())
        yield await builder.start()


@pytest.mark.parametrize("method", ["Say", "Count"])
async def test_the_request_of_a_call_has_its_time(tls_dir: Path, method: str) -> None:
    async with public(tls_dir, request_s_max=SHORT_S) as port, http2.connected(port) as caller:
        stream = caller.open(f"/{SERVICE}/{method}", key="right")
        assert await caller.ended(1) == {stream}


async def test_calls_with_a_key_are_counted_before_their_requests_are_here(tls_dir: Path) -> None:
    async with public(tls_dir, calls_per_caller_max=1) as port, http2.connected(port) as caller:
        first = caller.open(f"/{SERVICE}/Say", key="right")
        second = caller.open(f"/{SERVICE}/Say", key="right")
        assert (await caller.ended(1)) < {first, second}


async def test_one_connection_opens_so_many_calls(tls_dir: Path) -> None:
    async with public(tls_dir, connection_calls_max=2) as port, http2.connected(port) as caller:
        await caller.greeted()
        for _ in range(3):
            caller.open(f"/{SERVICE}/Say", key="right")
        frame = await caller.frame()
        assert frame.kind == http2.RST_STREAM


async def test_a_connection_that_says_nothing_is_closed(tls_dir: Path) -> None:
    async with public(tls_dir, handshake_s_max=SHORT_S) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await reader.read()
        writer.close()


async def test_a_connection_without_calls_is_closed(tls_dir: Path) -> None:
    async with public(tls_dir, connection_idle_s_max=SHORT_S) as port, http2.connected(port) as idle:
        await idle.hung_up()


async def test_connections_are_counted(tls_dir: Path) -> None:
    async with public(tls_dir, connections_max=2) as port, contextlib.AsyncExitStack() as held:
        for _ in range(2):
            await (await held.enter_async_context(http2.connected(port))).greeted()
        third = await held.enter_async_context(http2.connected(port))
        await third.hung_up()


async def test_in_the_mesh_a_handshake_has_its_time(tls_dir: Path) -> None:
    settings = settings_of("back", tls_dir, handshake_s_max=SHORT_S)
    async with living(settings) as process, asyncio.timeout(WAIT_S_MAX):
        builder = ServerBuilder(process, settings)
        builder.add(add_echo_to_server, Echo(), SERVICE, {"front"})
        reader, writer = await asyncio.open_connection("127.0.0.1", await builder.start())
        # The first bytes of a TLS handshake.
        writer.write(b"\x16\x03\x01\x02\x00\x01")
        await reader.read()
        writer.close()
