"""One connection of the HTTP edge: uvicorn's, with bounds on what its parser keeps. Not pure: sockets.

The parser is httptools', which joins a header for as long as it goes on, and uvicorn waits for one as long. What does
not come to a request within the bounds is answered in OpenAI's shape and closed. It knows no route.
"""

import asyncio
import json
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from chassis.errors import DeadlineExceeded, DomainError, InvalidArgument, ResourceExhausted, Unavailable
from services.gateway.config import GatewaySettings
from services.gateway.http.openai_errors import error_body
from services.gateway.http.sockets import Sockets


class BoundedConnection(HttpToolsProtocol):
    """Bytes that carry no body, of a header or of a trailer, are counted as they come, because the parser tells of a
    field only when it is whole. So a connection keeps at most `http_header_bytes_max` and one read of the socket."""

    def __init__(self, *, sockets: Sockets, settings: GatewaySettings, **of_uvicorn: Any) -> None:
        super().__init__(**of_uvicorn)
        self._sockets = sockets
        self._bytes_max = settings.http_header_bytes_max
        self._fields_max = settings.http_header_fields_max
        self._header_s_max = settings.http_header_s_max
        self._barren_bytes = 0
        self._field_bytes = 0
        self._field_count = 0
        self._in_header = False
        self._refusal: tuple[HTTPStatus, DomainError] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        try:
            self._sockets.open(self, self.client[0] if self.client else "")
        except Unavailable as error:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._sockets.close(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._barren_bytes += len(data)
        super().data_received(data)
        if self._barren_bytes > self._bytes_max:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, self._too_many_bytes())

    def on_message_begin(self) -> None:
        self._barren_bytes = self._field_bytes = self._field_count = 0
        self._in_header = True
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._field_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._field_count += 1
        self._field_bytes += len(name) + len(value)
        # A header that is whole at once is no longer told apart from its body by the count of bytes.
        if self._field_bytes > self._bytes_max:
            self._stop_parser(self._too_many_bytes())
        if self._field_count > self._fields_max:
            self._stop_parser(self._too_many_fields())
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_header = False
        self._sockets.begin(self)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._barren_bytes = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        # Also where its request is not whole, as of a body that nobody reads: the rest of it has as long. The next one
        # of a pipeline has its header already.
        if not self.pipeline:
            self._sockets.wait(self)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """The parser gave up; `_refusal` says why where that was our doing."""
        self._refuse(*(self._refusal or (HTTPStatus.BAD_REQUEST, _malformed())))

    def give_up(self) -> None:
        """Silently where nothing was asked: a connection that was only kept."""
        if self._in_header:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, self._too_slow())
        else:
            self.transport.close()

    def _stop_parser(self, error: DomainError) -> None:
        self._refusal = (HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, error)
        raise ValueError("the parser stops at what a callback raises")

    def _refuse(self, status: HTTPStatus, error: DomainError) -> None:
        if self.transport.is_closing():
            return
        # An answer that has begun cannot be followed by another one.
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(_response(status, error))
        self.transport.close()

    def _too_many_bytes(self) -> ResourceExhausted:
        return ResourceExhausted(
            "SIZE_LIMIT",
            f"the header is larger than {self._bytes_max} bytes (http_header_bytes_max); send less",
            metadata={"limit": "http_header_bytes_max", "limit_bytes": str(self._bytes_max)},
        )

    def _too_many_fields(self) -> ResourceExhausted:
        return ResourceExhausted(
            "SIZE_LIMIT",
            f"the header has more than {self._fields_max} fields (http_header_fields_max); send fewer",
            metadata={"limit": "http_header_fields_max", "limit_count": str(self._fields_max)},
        )

    def _too_slow(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            "DEADLINE_TOO_SHORT", f"the header took longer than {self._header_s_max:g} seconds (http_header_s_max)"
        )


def _malformed() -> InvalidArgument:
    return InvalidArgument("INVALID_FIELD", "what came is no HTTP request; send HTTP/1.1 in plain text")


def _response(status: HTTPStatus, error: DomainError) -> bytes:
    body = json.dumps(error_body(error)).encode()
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode("ascii") + body
