"""Walks list calls page by page. It knows only `page_token` and `next_page_token`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any


async def pages(fetch: Callable[[str], Awaitable[Any]], field: str, limit: int | None = None) -> AsyncIterator[Any]:
    """Yields the items of every page in order, at most `limit`, until the server sends no further token."""
    token, sent = "", 0
    while limit is None or sent < limit:
        page = await fetch(token)
        for item in getattr(page, field):
            yield item
            sent += 1
            if sent == limit:
                return
        token = page.next_page_token
        if not token:
            return
