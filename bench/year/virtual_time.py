"""A clock that is set forward a day at a time, for this process and for the database alike.

Roles look for `now()` in a schema of the year before the server's own. It must be there before the migrations run, so
that the defaults of columns follow it too. The bus keeps the machine's time.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import asyncpg

DAY_S = 86_400.0
_INSTALL = """
    CREATE SCHEMA year;
    CREATE TABLE year.clock (shift interval NOT NULL);
    INSERT INTO year.clock VALUES ('0');
    CREATE FUNCTION year.now() RETURNS timestamptz LANGUAGE sql STABLE
    AS 'SELECT pg_catalog.now() + (SELECT shift FROM year.clock)';
    CREATE FUNCTION year.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE
    AS 'SELECT pg_catalog.clock_timestamp() + (SELECT shift FROM year.clock)';
"""


class SteppedClock:
    """The machine's clock and what it was set forward; who sleeps on it wakes when his time has come by either."""

    def __init__(self) -> None:
        self._shift_s = 0.0
        self._stepped = asyncio.Event()

    def now(self) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=self._shift_s)

    def monotonic(self) -> float:
        return time.monotonic() + self._shift_s

    async def sleep(self, seconds: float) -> None:
        due_s = self.monotonic() + seconds
        while (left_s := due_s - self.monotonic()) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._stepped.wait()

    @property
    def shift(self) -> timedelta:
        return timedelta(seconds=self._shift_s)

    def step(self, seconds: float) -> None:
        self._shift_s += seconds
        stepped, self._stepped = self._stepped, asyncio.Event()
        stepped.set()


async def install(superuser: asyncpg.Connection, role: str) -> None:
    """In the database of that role, before it holds a table."""
    await superuser.execute(_INSTALL)
    await superuser.execute(f"GRANT USAGE ON SCHEMA year TO {role}")
    await superuser.execute(f"GRANT SELECT ON year.clock TO {role}")
    await superuser.execute(f"ALTER ROLE {role} SET search_path = {role}, year, pg_catalog")


async def set_forward(superuser: asyncpg.Connection, shift: timedelta) -> None:
    await superuser.execute("UPDATE year.clock SET shift = $1", shift)
