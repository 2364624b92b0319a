"""Not pure: database. The pool, the outbox and the time, and the one way to write: a transaction that wakes the relay.

It knows no table; each room's store is given a connection.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path

from chassis.bus.outbox import Outbox
from chassis.clock import Clock
from chassis.db.pool import Connection, Pool, transaction

MIGRATIONS = Path(__file__).parent / "migrations"

# The topics of the transaction that this work has under way.
_told: ContextVar[set[str]] = ContextVar("told_topics")


class Database:
    def __init__(self, pool: Pool, outbox: Outbox, clock: Clock, wake: Callable[[str], None]) -> None:
        """`wake` is called with each topic that was told of, once its transaction is committed."""
        self.pool = pool
        self.outbox = outbox
        self._clock = clock
        self._wake = wake

    def now(self) -> datetime:
        return self._clock.now()

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[Connection]:
        """One transaction; the relay looks for new events as soon as it is committed, and so does who waits for what
        was told."""
        told: set[str] = set()
        token = _told.set(told)
        try:
            async with transaction(self.pool) as connection:
                yield connection
        finally:
            _told.reset(token)
        self.outbox.wake()
        for topic in told:
            self._wake(topic)

    def tell(self, topic: str) -> None:
        """Wakes who waits for it in this process once the transaction under way is committed. It costs no NOTIFY, which
        makes all commits of the database take turns; other processes see the change when they look next."""
        _told.get().add(topic)
