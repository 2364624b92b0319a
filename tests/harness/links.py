"""A link on the loopback between a process and a peer, which a test cuts off or lets fall silent.

Whoever connects to `address` is passed on to one of the targets, in turn; a target that refuses is passed by.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress

CHUNK_BYTES = 64 * 1024
CONNECT_S_MAX = 5.0

Address = tuple[str, int]


class LinkState(enum.Enum):
    """What becomes of bytes and of new connections."""

    OPEN = enum.auto()
    # Connections are reset, and so is every new one.
    CUT = enum.auto()
    # Connections stay and take bytes, which arrive when the link is open again, as on a network that repeats packets.
    SILENT = enum.auto()


class Link:
    """`targets` is asked at each new connection, so that the peers may start later than the link."""

    def __init__(self, targets: Callable[[], Sequence[Address]]) -> None:
        self._targets = targets
        self._turn = itertools.count()
        self._state = LinkState.OPEN
        self._open = asyncio.Event()
        self._open.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)

    @property
    def address(self) -> str:
        assert self._server is not None
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def become(self, state: LinkState) -> None:
        self._state = state
        if state is LinkState.SILENT:
            self._open.clear()
        else:
            self._open.set()
        if state is LinkState.CUT:
            self.reset()

    def reset(self) -> None:
        """Ends all connections at once; new ones are as before."""
        for writer in self._writers:
            writer.transport.abort()

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self.become(LinkState.CUT)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await self._open.wait()
            if self._state is LinkState.CUT:
                return
            peer_reader, peer_writer = await self._connect()
        except OSError:
            return
        else:
            self._writers.add(peer_writer)
            try:
                await asyncio.gather(self._pump(reader, peer_writer), self._pump(peer_reader, writer))
            finally:
                self._writers.discard(peer_writer)
                peer_writer.transport.abort()
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        targets = self._targets()
        turn = next(self._turn)
        for place in range(len(targets)):
            host, port = targets[(turn + place) % len(targets)]
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(CONNECT_S_MAX):
                    return await asyncio.open_connection(host, port)
        raise ConnectionRefusedError(f"none of {targets} answers")

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until one side ends; then the other one is ended, too, as far as it can still hear. A side that was reset
        resets the other one: it must not wait for what never comes."""
        try:
            while chunk := await reader.read(CHUNK_BYTES):
                await self._open.wait()
                writer.write(chunk)
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()
        except (OSError, RuntimeError):  # RuntimeError: of the loop, for a transport that was aborted meanwhile
            writer.transport.abort()
