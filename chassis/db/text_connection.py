"""A database connection that also makes the texts in arrays storable. It knows no query.

A codec does that for single texts (`text.py`), but asyncpg has none for arrays: it sends their elements itself.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import asyncpg

from chassis.db.text import storable_argument

if TYPE_CHECKING:
    _AsyncpgConnection = asyncpg.Connection[asyncpg.Record]
else:
    _AsyncpgConnection = asyncpg.Connection


class TextConnection(_AsyncpgConnection):
    """asyncpg's connection, whose arguments pass by `storable_argument` first."""

    async def execute(self, query: str, *args: Any, **options: Any) -> str:
        return await super().execute(query, *map(storable_argument, args), **options)

    async def executemany(self, command: str, args: Iterable[Any], **options: Any) -> None:
        rows = [[storable_argument(value) for value in row] for row in args]
        await super().executemany(command, rows, **options)

    async def fetch(self, query: str, *args: Any, **options: Any) -> list[Any]:
        rows: list[Any] = await super().fetch(query, *map(storable_argument, args), **options)
        return rows

    async def fetchval(self, query: str, *args: Any, **options: Any) -> Any:
        return await super().fetchval(query, *map(storable_argument, args), **options)

    async def fetchrow(self, query: str, *args: Any, **options: Any) -> Any:
        return await super().fetchrow(query, *map(storable_argument, args), **options)

    def cursor(self, query: str, *args: Any, **options: Any) -> Any:
        return super().cursor(query, *map(storable_argument, args), **options)
