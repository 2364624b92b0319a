"""Just enough of HTTP/2 to be rude: frames by hand over a plain socket, for what no gRPC client does.

It knows no service. Header fields are literals that enter no table, so nothing of HPACK but its shape is needed.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 0x1, 0x1, 0x4
INITIAL_WINDOW_SIZE = 4
# The length and the type of a frame, its flags and its stream.
_HEAD = struct.Struct(">HBBBL")


@dataclass(frozen=True)
class Frame:
    kind: int
    flags: int
    stream: int
    payload: bytes


class Connection:
    """A client that opens calls and does nothing more unless it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._next_stream = 1

    def greet(self, **settings: int) -> None:
        """`window=0`: nothing of any answer may be sent to us."""
        window = settings.get("window")
        payload = b"" if window is None else struct.pack(">HL", INITIAL_WINDOW_SIZE, window)
        self._writer.write(PREFACE + _frame(SETTINGS, 0, 0, payload))

    async def greeted(self) -> None:
        """Returns when the server has said what it allows."""
        while (await self._any_frame()).kind != SETTINGS:
            continue

    def open(self, method: str, *, key: str = "", message: bytes | None = None) -> int:
        """Sends the headers of a call, and its request where there is one; gives its stream."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        fields = [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", method.encode()),
            (b":authority", b"gateway"),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
        ]
        if key:
            fields.append((b"authorization", f"Bearer {key}".encode()))
        self._writer.write(_frame(HEADERS, END_HEADERS, stream, b"".join(_literal(*field) for field in fields)))
        if message is not None:
            content = struct.pack(">BL", 0, len(message)) + message
            self._writer.write(_frame(DATA, END_STREAM, stream, content))
        return stream

    def let(self, stream: int, window_bytes: int = 1 << 20) -> None:
        """The answer of this call may be sent now."""
        self._writer.write(_frame(WINDOW_UPDATE, 0, stream, struct.pack(">L", window_bytes)))

    async def frame(self) -> Frame:
        """The next frame that says something of a call; raises IncompleteReadError when the server hangs up."""
        while True:
            frame = await self._any_frame()
            if frame.kind in (DATA, HEADERS, RST_STREAM):
                return frame

    async def ended(self, count: int) -> set[int]:
        """Returns once the server has ended so many calls: their streams."""
        streams: set[int] = set()
        while len(streams) < count:
            frame = await self.frame()
            if frame.kind == RST_STREAM or (frame.kind in (HEADERS, DATA) and frame.flags & END_STREAM):
                streams.add(frame.stream)
        return streams

    async def hung_up(self) -> None:
        """Returns once the server has closed the connection."""
        try:
            while True:
                await self.frame()
        except (asyncio.IncompleteReadError, ConnectionError):
            return

    async def _any_frame(self) -> Frame:
        """It is answered where a client has to."""
        high, low, kind, flags, stream = _HEAD.unpack(await self._reader.readexactly(_HEAD.size))
        frame = Frame(kind, flags, stream, await self._reader.readexactly(high << 8 | low))
        if kind in (SETTINGS, PING) and not flags & ACK:
            self._writer.write(_frame(kind, ACK, 0, frame.payload if kind == PING else b""))
        return frame


@asynccontextmanager
async def connected(port: int, **settings: int) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    connection = Connection(reader, writer)
    connection.greet(**settings)
    try:
        yield connection
    finally:
        writer.close()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return _HEAD.pack(len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream) + payload


def _literal(name: bytes, value: bytes) -> bytes:
    return b"\x00" + _text(name) + _text(value)


def _text(text: bytes) -> bytes:
    assert len(text) < 127
    return bytes([len(text)]) + text
