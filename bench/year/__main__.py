"""`python -m bench.year --minutes 15`: 365 virtual days of events through the real outbox, relay, bus, ledger and
archive.

All retentions are those of an installation; the clock of the services and of their database is set forward by a day
when the day's events are booked. Prints all sizes at each quarter and what they come to at 100 events a second; exit
status 1, naming the table, when something that docs/retention.md bounds grew between the second and the fourth quarter.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import asyncpg
import structlog
import uvloop

from bench.report import machine
from bench.year.business import Business
from bench.year.measures import Sample, measure_archive, measure_memory, measure_streams, measure_tables
from bench.year.offices import Billing, Meter, open_billing, open_meter
from bench.year.virtual_time import DAY_S, SteppedClock, install, set_forward
from bench.year.year_verdict import describe, extrapolate, read_rules, verdict
from tests.harness.polling import eventually
from tests.harness.servers import PostgresServer, running_nats, running_postgres

PAGE = Path(__file__).parents[2] / "docs/retention.md"
SAMPLE_DAYS = 7
TRIAL_EVENTS = 2000
# What samples and the end of a quarter take of the time.
DAYS_SHARE = 0.85
DAY_S_MAX, QUARTER_S_MAX = 300.0, 600.0
WAITING = "SELECT count(*) FROM outbox WHERE published_at IS NULL"
# Autovacuum looks every second instead of every minute, since a day lasts seconds.
NAPTIME = "ALTER SYSTEM SET autovacuum_naptime = '1s'"


@dataclass(kw_only=True)
class Year:
    """The parts of one run."""

    clock: SteppedClock
    billing: Billing
    meter: Meter
    business: Business
    superusers: dict[str, asyncpg.Connection]
    roles: dict[str, str]
    archive: Path
    settle_s: list[float] = field(default_factory=list)

    async def day(self, number: int) -> None:
        """Emits the day's events, waits until they are booked, and sets the clock forward."""
        await self.business.day(number)
        began = time.monotonic()
        await eventually(self._is_booked, within_s=DAY_S_MAX, pause_s=0.02)
        self.settle_s.append(time.monotonic() - began)
        await self.step(DAY_S)

    async def step(self, seconds: float) -> None:
        for superuser in self.superusers.values():
            await set_forward(superuser, self.clock.shift + timedelta(seconds=seconds))
        self.clock.step(seconds)

    async def sample(self, day: int) -> Sample:
        streams, unread = await measure_streams(self.billing.bus.jetstream)
        settle_s, self.settle_s = tuple(self.settle_s), []
        return Sample(
            day=day,
            events=self.business.events,
            records=self.business.records,
            settle_s=settle_s,
            tables=await measure_tables(self.superusers, self.roles),
            streams=streams,
            unread=unread,
            archive=await measure_archive(self.archive),
            memory_bytes=await measure_memory(),
        )

    async def rest(self) -> None:
        """Until nothing is under way: everything is booked, filed and out of the streams, and what is past keeping
        is gone."""
        await eventually(self._is_quiet, within_s=QUARTER_S_MAX, pause_s=0.2)

    async def _is_booked(self) -> bool:
        if await self.meter.pool.fetchval(WAITING) or await self.billing.pool.fetchval(WAITING):
            return False
        _, unread = await measure_streams(self.billing.bus.jetstream)
        return not any(count for name, count in unread.items() if "archive" not in name)

    async def _is_quiet(self) -> bool:
        # Pauses of workers are over at once; hours in all, so that no day passes.
        await self.step(60.0)
        streams, unread = await measure_streams(self.billing.bus.jetstream)
        if any(unread.values()) or any(size.rows for name, size in streams.items() if _is_read(unread, name)):
            return False
        late = "SELECT count(*) FROM outbox WHERE published_at < now() - make_interval(secs => $1)"
        kept_s = self.billing.settings.outbox_retention_s + 3600.0
        return not await self.meter.pool.fetchval(late, kept_s)


async def run(minutes: float, days: int, events_a_day: int, calls: int) -> int:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    began = time.monotonic()
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        year = await opened(stack, folder, calls)
        await year.business.open()
        if not events_a_day:
            events_a_day = await trial(year, minutes * 60 * DAYS_SHARE / days)
        year.business.events_a_day = events_a_day
        print(f"{days} days of {events_a_day} events, {calls} calls in an event of usage; {machine()}", flush=True)
        samples = await passed(year, days)
        services = {"billing": year.billing.settings, "inference": year.meter.settings}
        dead = [name for name, size in samples[-1].tables.items() if name.endswith(".dead_letters") and size.rows]
    rules = read_rules(PAGE.read_text(encoding="utf-8"), services)
    print("\n".join(extrapolate(samples, rules, days)))
    problems = [*verdict(samples, rules, days), *(f"{name} has events that were set aside" for name in dead)]
    took_s = time.monotonic() - began
    print(f"{year.business.events} events and {year.business.records} usage records in {took_s:.0f} s; {machine()}")
    print("\n".join(problems) or f"year: flat over {days} days")
    return 1 if problems else 0


async def trial(year: Year, day_s: float) -> int:
    """How many events a day may have to last so long; what is tried counts as the first days."""
    year.business.events_a_day = TRIAL_EVENTS
    began = time.monotonic()
    await year.day(0)
    return max(100, int(TRIAL_EVENTS / (time.monotonic() - began) * day_s))


async def passed(year: Year, days: int) -> list[Sample]:
    samples: list[Sample] = []
    quarters = {round(days * number / 4) for number in (1, 2, 3, 4)}
    for number in range(1, days + 1):
        await year.day(number)
        if number in quarters:
            await year.rest()
            samples.append(await year.sample(number))
            print("\n".join(describe(samples[-1])), flush=True)
        elif number % SAMPLE_DAYS == 0:
            samples.append(await year.sample(number))
            print(f"day {number}, a day settles in {max(samples[-1].settle_s):.1f} s at most", flush=True)
    return samples


async def opened(stack: AsyncExitStack, folder: Path, calls: int) -> Year:
    for part in ("postgres", "nats", "archive"):
        (folder / part).mkdir()
    postgres = await stack.enter_async_context(running_postgres(folder / "postgres"))
    nats = await stack.enter_async_context(running_nats(folder / "nats"))
    clock, urls, superusers, roles = SteppedClock(), {}, {}, {}
    for service in ("billing", "inference"):
        urls[service] = await stack.enter_async_context(postgres.scratch())
        roles[service] = urls[service].rpartition("/")[2]
        superusers[service] = await superuser_of(stack, postgres, roles[service])
        await install(superusers[service], roles[service])
    archive = folder / "archive"
    billing = await stack.enter_async_context(
        open_billing(clock, database_url=urls["billing"], nats_url=nats.url, folder=archive)
    )
    meter = await stack.enter_async_context(open_meter(clock, database_url=urls["inference"], nats_url=nats.url))
    return Year(
        clock=clock,
        billing=billing,
        meter=meter,
        business=Business(billing, meter, calls=calls),
        superusers=superusers,
        roles=roles,
        archive=archive,
    )


async def superuser_of(stack: AsyncExitStack, postgres: PostgresServer, database: str) -> asyncpg.Connection:
    connection = await asyncpg.connect(postgres.cluster.url(database=database))
    stack.push_async_callback(connection.close)
    await connection.execute(NAPTIME)
    await connection.execute("SELECT pg_reload_conf()")
    return connection


def _is_read(unread: Mapping[str, int], stream: str) -> bool:
    return any(name.startswith(f"{stream} for ") for name in unread)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0, help="about how long the run takes")
    parser.add_argument("--days", type=int, default=365)
    parser.add_argument("--events-a-day", type=int, default=0, help="0: as many as the machine manages in that time")
    parser.add_argument("--calls", type=int, default=2, help="calls of one usage event, of two records each")
    options = parser.parse_args()
    return uvloop.run(run(options.minutes, options.days, options.events_a_day, options.calls))


if __name__ == "__main__":
    sys.exit(main())
