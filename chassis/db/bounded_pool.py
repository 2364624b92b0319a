"""A pool that nobody waits for without end, and that refuses a second connection to work that holds one already.

Work that waits for a second connection while it keeps its first one stops everybody as soon as as many do it as the
pool has connections. It knows no settings and no table.
"""

from __future__ import annotations

import contextvars
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import asyncpg
from asyncpg.pool import PoolAcquireContext

from chassis.errors import Unavailable

if TYPE_CHECKING:
    _AsyncpgPool = asyncpg.Pool[asyncpg.Record]
    _AcquireContext = PoolAcquireContext[asyncpg.Record]
    _Connection = asyncpg.pool.PoolConnectionProxy[asyncpg.Record]
else:
    _AsyncpgPool, _AcquireContext = asyncpg.Pool, PoolAcquireContext

RETRY_S = 1.0


class PoolExhausted(Unavailable):
    """No connection of the pool came free in time; nothing was done."""

    def __init__(self, wait_s_max: float) -> None:
        super().__init__(
            "DEPENDENCY_UNAVAILABLE",
            f"no database connection came free within {wait_s_max:g} s (pool_wait_s_max); try again",
            retry_after_s=RETRY_S,
        )


class SecondConnection(Exception):
    """A defect: this work holds a connection of the pool and asked for another."""


@dataclass(kw_only=True, eq=False)
class _Hold:
    """One connection that is out; tasks started meanwhile see the same object, also when it is back."""

    pool: BoundedPool
    is_out: bool = True


_holds: contextvars.ContextVar[tuple[_Hold, ...]] = contextvars.ContextVar("held_connections", default=())


class BoundedPool(_AsyncpgPool):
    """asyncpg's pool with a limit on waiting, and one connection at a time for each piece of work.

    Work is a task with the tasks that it starts: they may be waited for. A task that outlives its starter gets a
    context of its own.
    """

    def __init__(self, *arguments: Any, wait_s_max: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._wait_s_max = wait_s_max
        self._out: dict[int, _Hold] = {}

    def acquire(self, *, timeout: float | None = None) -> _AcquireContext:
        return _Acquisition(self, timeout)

    async def take(self, timeout: float | None) -> _Connection:
        """A connection that this work holds until `release`."""
        holds = [hold for hold in _holds.get() if hold.is_out]
        if any(hold.pool is self for hold in holds):
            raise SecondConnection("this work holds a database connection and asked for a second one")
        try:
            connection = await super().acquire(timeout=min(timeout or self._wait_s_max, self._wait_s_max))
        except TimeoutError as error:
            raise PoolExhausted(self._wait_s_max) from error
        hold = self._out[id(connection)] = _Hold(pool=self)
        _holds.set((*holds, hold))
        return connection

    async def release(self, connection: _Connection, *, timeout: float | None = None) -> None:
        if (hold := self._out.pop(id(connection), None)) is not None:
            hold.is_out = False
        await super().release(connection, timeout=timeout)


class _Acquisition(_AcquireContext):
    """`async with pool.acquire() as connection`, and `await pool.acquire()`, which aiosql uses."""

    async def __aenter__(self) -> _Connection:
        assert isinstance(self.pool, BoundedPool)
        self.connection = await self.pool.take(self.timeout)
        return self.connection

    def __await__(self) -> Generator[Any, None, _Connection]:
        assert isinstance(self.pool, BoundedPool)
        return self.pool.take(self.timeout).__await__()
