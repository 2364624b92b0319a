"""What it costs to book a usage record when ten thousand are booked, and when five million are.

The handler of served usage runs as the consumer runs it, message by message, on a real PostgreSQL with its defaults;
the records in between are booked the same way. The ratio is the growth of the cost: 1 is flat.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from google.protobuf.message import Message

from bench.billing.usage_source import served
from bench.report import last_line, machine
from chassis.bus.envelope import EventInfo
from chassis.bus.outbox import Outbox
from chassis.clock import SystemClock
from chassis.db.migrations import migrate
from chassis.db.pool import Pool, open_pool, transaction
from chassis.ids import SystemIds
from finemesh.events.v1 import usage_events_pb2
from services.billing.config import MIGRATIONS, BillingSettings
from services.billing.events import Events
from services.billing.prices.catalogue import open_catalogue
from services.inference.config import InferenceSettings
from tests.harness.servers import running_postgres

CALLS = InferenceSettings().usage_batch_max
RECORDS = CALLS * 2
MARKS = (10_000, 100_000, 1_000_000, 5_000_000)
# Messages timed at each mark, and booked at once on the way to the next one.
TIMED = 20
WRITERS = 3


class Books:
    """Billing's handler on a pool."""

    def __init__(self, pool: Pool, events: Events) -> None:
        self._pool = pool
        self._handler = events.handlers[usage_events_pb2.InferenceUsageRecorded]
        self.booked = 0

    async def book(self, message: Message) -> float:
        """Seconds from the first statement to the commit."""
        now = datetime.now(UTC)
        info = EventInfo(id=uuid.uuid4(), type="", source="bench", subject="", time=now, deliveries=1)
        began = time.perf_counter()
        async with transaction(self._pool) as connection:
            await self._handler(connection, message, info)
        self.booked += RECORDS
        return time.perf_counter() - began

    async def fill(self, records: int) -> None:
        """Books until so many records are there."""

        async def writer() -> None:
            while self.booked < records:
                for message in served(1, CALLS):
                    await self.book(message)

        await asyncio.gather(*(writer() for _ in range(WRITERS)))


async def timed(books: Books) -> Sequence[float]:
    """Microseconds per record of messages that are booked one after the other."""
    messages = list(served(TIMED, CALLS))
    return [await books.book(message) * 1e6 / RECORDS for message in messages]


async def main() -> None:
    clock = SystemClock()
    with tempfile.TemporaryDirectory() as name:
        async with running_postgres(Path(name) / "postgres") as postgres, postgres.scratch() as url:
            settings = BillingSettings(database_url=url)
            pool = await open_pool(settings)
            await migrate(pool, [MIGRATIONS])
            async with transaction(pool) as connection:
                catalogue = await open_catalogue(connection, settings.price_books_dir, current=settings.price_book)
            outbox = Outbox(settings, clock=clock, ids=SystemIds(clock))
            books = Books(pool, Events(catalogue, settings.fact_limits, outbox, clock=clock))
            costs: list[float] = []
            for mark in MARKS:
                await books.fill(mark)
                before = books.booked
                costs.append(median(await timed(books)))
                print(f"{before:>9} records booked: {costs[-1]:.1f} us for one more", flush=True)
            stored = await pool.fetchval("SELECT sum(record_count) FROM usage_sums")
            assert stored == books.booked, f"{stored} of {books.booked} records are in the sums"
            await pool.close()
    print(f"on {machine()}; {CALLS} calls of two records in a message, one message at a time")
    print(last_line("billing.flat", costs[-1], costs[0], "us/record", f"at {MARKS[0]} records"))


if __name__ == "__main__":
    asyncio.run(main())
