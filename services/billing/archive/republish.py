"""Publishes the archive again, so that a billing with an empty database books the same ledger. Not pure: bus, objects.

    python -m services.billing.archive.republish [--since 2026-11-01T00:00:00Z]

It needs the object store and a bus, and no database. Holds and credit come by calls and have to be there before:
docs/archive.md says how. Events that a database knows already change nothing.
"""

import argparse
import asyncio
import sys
from datetime import UTC, datetime

import structlog
from nats.js import api

from chassis.backoff import Backoff
from chassis.bus.connection import BUS_FAILURES, Bus, connect
from chassis.clock import Clock, SystemClock
from chassis.objects.object_store import PART_BYTES_MIN, ObjectStore
from services.billing.archive.archive_format import ArchivedEvent
from services.billing.archive.archive_reader import ArchiveDamaged, read_all
from services.billing.config import BillingSettings

_log = structlog.get_logger(__name__)


async def republish(bus: Bus, objects: ObjectStore, settings: BillingSettings, *, since: datetime, clock: Clock) -> int:
    """Publishes every archived event that the bus took at `since` or later; returns how many. A bus that is away or
    full is waited for."""
    count = 0
    backoff = Backoff(first_s=settings.reconnect_backoff_s_min, last_s=settings.reconnect_backoff_s_max)
    async for event in read_all(objects, unpacked_bytes_max=settings.archive_unpacked_bytes_max):
        if event.time < since:
            continue
        while True:
            try:
                await _publish(bus, event)
            except BUS_FAILURES as error:
                _log.warning("republish_waits", error=repr(error))
                await clock.sleep(backoff.next_s())
                await bus.recover()
                continue
            break
        backoff.reset()
        count += 1
    return count


async def _publish(bus: Bus, event: ArchivedEvent) -> None:
    await bus.ensure_stream(event.stream)
    headers = dict(event.headers)
    if event.id is not None:
        headers[api.Header.MSG_ID.value] = str(event.id)
    await bus.jetstream.publish(event.subject, event.payload, stream=event.stream, headers=headers)


async def main(since: datetime) -> int:
    settings = BillingSettings()
    objects = ObjectStore(settings.artifacts_url, part_bytes=PART_BYTES_MIN, parts_in_flight_max=1)
    bus = await connect(settings)
    try:
        count = await republish(bus, objects, settings, since=since, clock=SystemClock())
    except ArchiveDamaged as damage:
        print(f"the archive is damaged: {damage}", file=sys.stderr)
        return 1
    finally:
        await bus.close()
    print(f"{count:,} events published again")
    return 0


def start() -> int:
    arguments = argparse.ArgumentParser(prog="python -m services.billing.archive.republish", description=__doc__)
    arguments.add_argument("--since", type=datetime.fromisoformat, default=datetime.min.replace(tzinfo=UTC))
    since: datetime = arguments.parse_args().since
    return asyncio.run(main(since if since.tzinfo else since.replace(tzinfo=UTC)))


if __name__ == "__main__":
    sys.exit(start())
