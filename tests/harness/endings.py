"""Ends tasks for good, however busy they are."""

import asyncio
from collections.abc import Collection
from typing import Any

_AGAIN_S = 0.5


async def end_all(tasks: Collection["asyncio.Task[Any]"]) -> None:
    """Cancels until each has ended: `asyncio.wait_for` of Python 3.11 swallows a cancellation that comes together with
    what it waited for, and whoever asks the bus all the time meets that."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_AGAIN_S)
    await asyncio.gather(*tasks, return_exceptions=True)
