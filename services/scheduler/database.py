"""Not pure: database. The pool, the outbox and the time, and the one way to write: a transaction that wakes the relay.

It knows no table; each room's store is given a connection.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from chassis.bus.outbox import Outbox
from chassis.clock import Clock
from chassis.db.pool import Connection, Pool, transaction

MIGRATIONS = Path(__file__).parent / "migrations"

Notify = Callable[[Connection, Collection[str]], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class _Topics:
    """What one transaction tells of: to waiters of this process, and to those of all. Dicts keep the order."""

    told: dict[str, None] = field(default_factory=dict)
    rung: dict[str, None] = field(default_factory=dict)


# Those of the transaction that this work has under way.
_topics: ContextVar[_Topics] = ContextVar("topics")


class Database:
    def __init__(self, pool: Pool, outbox: Outbox, clock: Clock, wake: Callable[[str], None], notify: Notify) -> None:
        """`wake` is called with each topic that was told of, once its transaction is committed; `notify` with all that
        were rung for, at the end of the transaction."""
        self.pool = pool
        self.outbox = outbox
        self._clock = clock
        self._wake = wake
        self._notify = notify

    def now(self) -> datetime:
        return self._clock.now()

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[Connection]:
        """One transaction; the relay looks for new events as soon as it is committed, and so does who waits for what
        was told."""
        topics = _Topics()
        token = _topics.set(topics)
        try:
            async with transaction(self.pool) as connection:
                yield connection
                if topics.rung:
                    await self._notify(connection, topics.rung)
        finally:
            _topics.reset(token)
        self.outbox.wake()
        for topic in topics.told:
            self._wake(topic)

    def tell(self, topic: str) -> None:
        """Wakes who waits for it in this process once the transaction under way is committed. It costs no NOTIFY, which
        makes all commits of the database take turns; other processes see the change when they look next."""
        _topics.get().told[topic] = None

    def ring(self, *topics: str) -> None:
        """Wakes who waits for these topics in every process: one NOTIFY for all that the transaction under way rings
        for, sent as its last statement."""
        _topics.get().rung.update(dict.fromkeys(topics))
