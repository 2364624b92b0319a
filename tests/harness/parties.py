"""Lets one test play several parties: what a party does in its own context holds nothing that the test holds."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg

from chassis.db.pool import Connection, Pool

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

T = TypeVar("T")


async def as_another(work: Coroutine[Any, Any, T]) -> T:
    """Does the work as somebody else: without this test's database connection, caller or trace."""
    return await asyncio.create_task(work, context=contextvars.Context())


@asynccontextmanager
async def others_transaction(pool: Pool) -> AsyncIterator[Connection]:
    """A transaction that somebody else keeps open while the test goes on as itself."""
    connection = await as_another(_taken(pool))
    try:
        async with connection.transaction():
            yield connection
    finally:
        await pool.release(connection)


async def _taken(pool: Pool) -> PoolConnectionProxy[asyncpg.Record]:
    return await pool.acquire()
