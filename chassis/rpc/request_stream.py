"""The end of a client's stream, told apart from its break. It knows no message."""

from collections.abc import AsyncIterator
from typing import Any

import grpc

from chassis.errors import Cancelled


async def whole(requests: Any, context: Any) -> AsyncIterator[Any]:
    """The messages of a served stream; raises Cancelled where the stream broke instead of ending.

    To grpc.aio a client that vanished and one that is done look alike when reading, and the cancellation of the call
    may come a moment later, when a handler has acted on half a stream already. Only writing tells the two apart, so
    the end is confirmed by sending the initial metadata; a handler that uses this must not send them itself.
    """
    async for request in requests:
        yield request
    try:
        await context.send_initial_metadata(())
    except (grpc.aio.BaseError, grpc.aio.UsageError) as error:
        raise _broken() from error
    if context.cancelled():
        raise _broken()


def _broken() -> Cancelled:
    return Cancelled("CANCELLED", "the stream broke before its end; nothing was kept")
