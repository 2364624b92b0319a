"""HTTP bodies both ways: a bounded read, and server-sent events that end when their reader is gone. Not pure: HTTP."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chassis.errors import Cancelled, DeadlineExceeded, ResourceExhausted

_T = TypeVar("_T")

DONE = b"data: [DONE]\n\n"


async def read_body(request: Request, *, bytes_max: int, seconds_max: float) -> bytes:
    """The whole body; ResourceExhausted as soon as it is known to be too large."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > bytes_max:
        raise _too_large(bytes_max)
    body = bytearray()
    try:
        async with asyncio.timeout(seconds_max):
            async for chunk in request.stream():
                body += chunk
                if len(body) > bytes_max:
                    raise _too_large(bytes_max)
    except TimeoutError as error:
        raise DeadlineExceeded("DEADLINE_TOO_SHORT", f"the body took longer than {seconds_max:g} seconds") from error
    return bytes(body)


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of `work`, which is cancelled when the client goes away first; its body must have been read."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Cancelled("CANCELLED", "the client went away before the answer was there")
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


def event(data: dict[str, Any]) -> bytes:
    """Without an `event:` line: clients drop events that have a name."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """Sends `events` as they come; closes their source when the client is gone. `on_end` is called once after it."""

    def __init__(self, events: AsyncIterator[bytes], headers: dict[str, str]) -> None:
        super().__init__(headers={**headers, "cache-control": "no-cache"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._events = events
        self.on_end: Callable[[], None] = lambda: None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._send_all(send))
        finally:
            self.on_end()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self._events:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


def _too_large(bytes_max: int) -> ResourceExhausted:
    return ResourceExhausted(
        "SIZE_LIMIT",
        f"the body is larger than http_body_bytes_max, {bytes_max} bytes; send less",
        metadata={"limit": "http_body_bytes_max", "limit_bytes": str(bytes_max)},
    )
