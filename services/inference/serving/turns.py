"""Lets each of many owners do one thing at a time, so that a shared line is fair to all of them. It knows no owner."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(eq=False)
class _Line:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    length: int = 0


class Turns:
    """A line for each owner, in the order in which they came; an owner without anybody in line takes no memory."""

    def __init__(self) -> None:
        self._lines: dict[Hashable, _Line] = {}

    @asynccontextmanager
    async def take(self, owner: Hashable) -> AsyncIterator[None]:
        """The owner's turn, for the length of the block."""
        line = self._lines.setdefault(owner, _Line())
        line.length += 1
        try:
            async with line.lock:
                yield
        finally:
            line.length -= 1
            if not line.length:
                del self._lines[owner]
