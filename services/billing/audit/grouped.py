"""Sorted streams of rows, read group by group beside each other. It knows no table."""

from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, TypeVar

_R = TypeVar("_R")


class Grouped(Generic[_R]):
    """A sorted stream, read group by group beside other streams with the same order of keys."""

    def __init__(self, rows: AsyncIterator[_R], key: Callable[[_R], Any]) -> None:
        self._rows = rows
        self._key = key
        self._next: _R | None = None

    async def before(self, key: Any) -> _R | None:
        """The next row when its key comes before `key`: no group of another stream has it."""
        row = await self._peek()
        return row if row is not None and self._key(row) < key else None

    async def take(self, key: Any) -> list[_R]:
        """All rows with this key, which are next."""
        taken: list[_R] = []
        while (row := await self._peek()) is not None and self._key(row) == key:
            taken.append(row)
            self._next = None
        return taken

    def drop(self) -> None:
        """Forgets the next row, which was looked at."""
        self._next = None

    async def rest(self) -> _R | None:
        """The next row, if any is left."""
        return await self._peek()

    async def _peek(self) -> _R | None:
        if self._next is None:
            self._next = await anext(self._rows, None)
        return self._next
