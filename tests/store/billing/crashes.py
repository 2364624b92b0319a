"""A pool whose connections die at any statement, before the commit, in the middle of it, or after it, when nobody hears
the answer. The server kills them, as it does when it is restarted; the code under test does not know."""

import asyncio
import enum
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import asyncpg

from chassis.db.pool import Pool, database_is_away
from tests.harness.parties import as_another

STATEMENTS = frozenset({"execute", "executemany", "fetch", "fetchrow", "fetchval", "prepare"})
ATTEMPTS_MAX = 60
T = TypeVar("T")


class Doom(enum.Enum):
    AT_STATEMENT = enum.auto()
    BEFORE_COMMIT = enum.auto()
    DURING_COMMIT = enum.auto()
    AFTER_COMMIT = enum.auto()


class FragilePool:
    """Hands out connections of `pool` of which a share of `crash_share` die once, where `chance` says."""

    def __init__(self, pool: Pool, chance: random.Random, *, crash_share: float) -> None:
        self._pool = pool
        self._chance = chance
        self._crash_share = crash_share
        self.crashes: dict[Doom, int] = dict.fromkeys(Doom, 0)

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator["FragileConnection"]:
        doomed = self._chance.random() < self._crash_share
        doom = self._chance.choice([*Doom, Doom.AT_STATEMENT]) if doomed else None
        statement = self._chance.randint(1, 9)
        async with self._pool.acquire() as connection:
            yield FragileConnection(connection, self, doom, statement)

    async def kill(self, process_id: int, doom: Doom) -> None:
        self.crashes[doom] += 1
        # The killer is somebody else than the work that holds the connection.
        await as_another(self._pool.execute("SELECT pg_terminate_backend($1)", process_id))


class FragileConnection:
    """What the code under test takes for its connection."""

    def __init__(self, connection: Any, pool: FragilePool, doom: Doom | None, statement: int) -> None:
        self._connection = connection
        self._pool = pool
        self._doom = doom
        self._statement = statement
        self._transactions = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._connection, name)
        return self._counted(found) if name in STATEMENTS else found

    def transaction(self, **options: Any) -> Any:
        inner = self._connection.transaction(**options)
        self._transactions += 1
        # Only the first one commits; those within it are savepoints.
        return _FragileTransaction(inner, self) if self._transactions == 1 else inner

    async def at_commit(self, commit: Callable[[], Awaitable[None]]) -> None:
        doom, process_id = self._doom, self._connection.get_server_pid()
        if doom is Doom.BEFORE_COMMIT:
            await self._pool.kill(process_id, doom)
            await commit()
        elif doom is Doom.DURING_COMMIT:
            killing = asyncio.create_task(self._pool.kill(process_id, doom))
            try:
                await commit()
            finally:
                await killing
            self._lose()
        elif doom is Doom.AFTER_COMMIT:
            await commit()
            await self._pool.kill(process_id, doom)
            self._lose()
        else:
            await commit()

    def _lose(self) -> None:
        """The work is done, and whoever asked for it cannot know."""
        with suppress(asyncpg.InterfaceError):
            # Unless the pool has noticed already, nobody must get this connection again.
            self._connection.terminate()
        raise ConnectionResetError("the answer to the commit was lost")

    def _counted(self, statement: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def run(*arguments: Any, **options: Any) -> Any:
            self._statement -= 1
            if self._doom is Doom.AT_STATEMENT and self._statement == 0:
                await self._pool.kill(self._connection.get_server_pid(), Doom.AT_STATEMENT)
            return await statement(*arguments, **options)

        return run


class _FragileTransaction:
    def __init__(self, inner: Any, connection: FragileConnection) -> None:
        self._inner = inner
        self._connection = connection

    async def __aenter__(self) -> None:
        await self._inner.__aenter__()

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is not None:
            await self._inner.__aexit__(kind, error, trace)
            return
        await self._connection.at_commit(lambda: self._inner.__aexit__(None, None, None))


async def insisting(work: Callable[[], Awaitable[T]]) -> T:
    """Repeats `work` until the database answers it, as every caller of billing does."""
    for _ in range(ATTEMPTS_MAX):
        try:
            return await work()
        except asyncpg.DeadlockDetectedError:
            # Locks are taken in one order everywhere, so nobody waits in a circle.
            raise
        except Exception as error:
            if not database_is_away(error):
                raise
    raise AssertionError(f"the database was away {ATTEMPTS_MAX} times in a row")
