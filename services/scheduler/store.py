"""The scheduler's named queries and the one way to write: a transaction whose events leave right after the commit.

It knows no rule; the stores beside it turn rows into domain values.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path

from chassis.bus.outbox import Outbox
from chassis.clock import Clock
from chassis.db.pool import Connection, Pool, transaction
from chassis.db.queries import load_queries

HERE = Path(__file__).parent
MIGRATIONS = HERE / "migrations"
QUERIES_FILE = HERE / "queries.sql"
QUERIES = load_queries(QUERIES_FILE)

# Everything that a process may want to hear of goes through this one channel.
CHANNEL = "scheduler"
QUEUE_TOPIC = "queue"


def job_topic(job_id: str) -> str:
    return f"job:{job_id}"


def node_topic(node: str) -> str:
    return f"node:{node}"


class Store:
    """What every store and worker shares: the pool, the outbox and the time."""

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


async def notify(connection: Connection, *topics: str) -> None:
    """Rings these topics in every scheduler process once the transaction commits."""
    for topic in topics:
        await QUERIES.notify(connection, payload=topic)
