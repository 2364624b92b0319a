"""One authenticated channel with deadlines, safe retries and typed errors. It knows no resource."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc

from finemesh_client.config import ClientConfig
from finemesh_client.errors import RateLimited, TimedOut, Unavailable, from_rpc_error
from finemesh_client.paging import pages

Response = TypeVar("Response")

# What gRPC says instead of a server's refusal that comes while it sends.
_ANSWER_LOST = "Internal error from Core"
# A server that refuses a stream by its first message has done so by then.
REFUSAL_S_MAX = 1.0
BACKOFF_BASE_S = 0.2
BACKOFF_CAP_S = 5.0


class Transport:
    """Carries calls to one mesh. Retries only calls that the caller declares safe to repeat."""

    def __init__(self, config: ClientConfig) -> None:
        self.config = config
        options = [
            ("grpc.max_receive_message_length", config.message_size_bytes_max),
            ("grpc.max_send_message_length", config.message_size_bytes_max),
            ("grpc.enable_retries", 0),
            ("grpc.max_reconnect_backoff_ms", 2000),
        ]
        if config.address.startswith("https://"):
            self.channel = grpc.aio.secure_channel(
                config.address.removeprefix("https://"), grpc.ssl_channel_credentials(), options
            )
        else:
            self.channel = grpc.aio.insecure_channel(config.address.removeprefix("http://"), options)
        self._metadata = (("authorization", f"Bearer {config.api_key}"),)

    async def close(self) -> None:
        """Closes the channel; running calls end as Cancelled."""
        await self.channel.close()

    async def unary(
        self, method: Callable[..., Any], request: Any, *, safe: bool, timeout_s: float | None = None
    ) -> Any:
        """One answer to one request. `safe` means that repeating it changes nothing (reads, or creates with a request
        id)."""

        async def call() -> Any:
            try:
                return await method(request, metadata=self._metadata, timeout=timeout_s or self.config.timeout_s)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from None

        return await self._retry(call) if safe else await call()

    def pages(
        self, method: Callable[..., Any], request: Any, field: str, limit: int | None = None
    ) -> AsyncIterator[Any]:
        """The items in `field` of every page of a list call, in order, at most `limit`."""

        async def fetch(token: str) -> Any:
            asked = type(request)()
            asked.CopyFrom(request)
            asked.page_token = token
            return await self.unary(method, asked, safe=True)

        return pages(fetch, field, limit)

    async def upload(
        self, method: Callable[..., Any], requests: Callable[[], AsyncIterator[Any]], *, safe: bool = False
    ) -> Any:
        """One answer to a stream of requests, without a deadline of its own: its length is the file's.

        When gRPC loses the answer because it was sending, a `safe` stream is sent once more.
        """
        try:
            return await method(requests(), metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            if not safe or error.details() != _ANSWER_LOST:
                raise from_rpc_error(error) from None
        try:
            return await method(_with_a_pause(requests()), metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None

    async def stream(
        self, method: Callable[..., Any], request: Any, *, timeout_s: float | None = None
    ) -> AsyncIterator[Any]:
        """The messages of a server stream. Leaving the loop early cancels the call."""
        call = method(request, metadata=self._metadata, timeout=timeout_s)
        try:
            async for message in call:
                yield message
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        finally:
            call.cancel()

    async def _retry(self, call: Callable[[], Awaitable[Response]]) -> Response:
        """Repeats a safe call with jittered exponential backoff while the mesh cannot be reached."""
        for attempt in range(1, self.config.attempts + 1):
            try:
                return await call()
            except (Unavailable, TimedOut, RateLimited) as error:
                if attempt == self.config.attempts or (isinstance(error, RateLimited) and error.retry_after_s is None):
                    raise
                backoff_s = min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2**attempt) * random.uniform(0.5, 1.0)  # noqa: S311
                await asyncio.sleep(error.retry_after_s or backoff_s)
        raise AssertionError("attempts is at least 1")


async def _with_a_pause(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The requests, with nothing under way when the answer to the first one comes."""
    yield await anext(requests)
    await asyncio.sleep(REFUSAL_S_MAX)
    async for request in requests:
        yield request
