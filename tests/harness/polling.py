"""Waiting for what tells nobody: rows of a service's tables, other processes, resources that have no watch.

Where there is a signal (an event, a stream, a future, a line of output), a test waits for that instead.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def eventually(
    look: Callable[[], Awaitable[T]],
    is_it: Callable[[T], bool] = bool,
    *,
    within_s: float = 60.0,
    pause_s: float = 0.05,
) -> T:
    """What `look` finds, once it is it; TimeoutError tells what was found last."""
    seen: list[T] = []
    try:
        async with asyncio.timeout(within_s):
            while not is_it(found := await look()):
                seen[:] = [found]
                await asyncio.sleep(pause_s)
            return found
    except TimeoutError:
        raise TimeoutError(f"not within {within_s} s; found last: {seen}") from None
