"""Lets an engine go on at its own pace, whether or not the caller reads what it says. Not pure: tasks.

So an answer that is abandoned or read slowly is counted for what the engine computed, and no reader holds an engine. It
knows no engine, no meter and no message of the wire.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing

from chassis.clock import Clock
from chassis.errors import DeadlineExceeded
from services.inference.engines.answer_chunks import Chunk


async def read_ahead(
    chunks: AsyncGenerator[Chunk, None], *, stalled_s_max: float, clock: Clock
) -> AsyncGenerator[Chunk, None]:
    """The same chunks, and what `chunks` raised behind them. When this is closed, `chunks` is closed first.

    Unread chunks are kept, which the limit of an answer's tokens bounds. DeadlineExceeded when the reader takes none of
    them for longer than `stalled_s_max` while `chunks` goes on.
    """
    unread: deque[tuple[Chunk, float]] = deque()
    took_at = clock.monotonic()
    news = asyncio.Event()

    async def read() -> None:
        async with aclosing(chunks):
            async for chunk in chunks:
                now = clock.monotonic()
                if unread and now - max(took_at, unread[0][1]) > stalled_s_max:
                    raise DeadlineExceeded(
                        "READER_STALLED",
                        f"nothing of the answer was read for {stalled_s_max:g} s (stalled_reader_s_max), so the engine"
                        " was freed; what it had computed is metered",
                    )
                unread.append((chunk, now))
                news.set()

    reading = asyncio.create_task(read())
    reading.add_done_callback(lambda _: news.set())
    try:
        while unread or not reading.done():
            if not unread:
                news.clear()
                await news.wait()
                continue
            chunk, _ = unread.popleft()
            took_at = clock.monotonic()
            yield chunk
        reading.result()
    finally:
        reading.cancel()
        await asyncio.wait([reading])
