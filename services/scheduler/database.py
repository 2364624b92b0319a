"""Not pure: database. The pool, the outbox and the time, and the one way to write: a transaction that wakes the relay.

It knows no table; each room's store is given a connection.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path

from chassis.bus.outbox import Outbox
from chassis.clock import Clock
from chassis.db.pool import Connection, Pool, transaction

MIGRATIONS = Path(__file__).parent / "migrations"


class Database:
    def __init__(self, pool: Pool, outbox: Outbox, clock: Clock) -> None:
        self.pool = pool
        self.outbox = outbox
        self._clock = clock

    def now(self) -> datetime:
        return self._clock.now()

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[Connection]:
        """One transaction; the relay looks for new events as soon as it is committed."""
        async with transaction(self.pool) as connection:
            yield connection
        self.outbox.wake()
