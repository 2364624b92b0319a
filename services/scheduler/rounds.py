"""Not pure: database. How a background worker lives: round after round, with a pause when there is nothing to do.

It is patient while the database is away, and knows nothing of what a round does. Any other failure is a defect and ends
the process.
"""

from collections.abc import Awaitable, Callable

import structlog

from chassis.backoff import Backoff
from chassis.clock import Clock
from chassis.db.pool import database_is_away

BACKOFF_S_FIRST = 0.05
BACKOFF_S_LAST = 1.0
log = structlog.get_logger(__name__)


async def run_rounds(
    name: str, work: Callable[[], Awaitable[bool]], wait: Callable[[], Awaitable[None]], clock: Clock
) -> None:
    """`work` answers whether there may be more to do at once; otherwise `wait` says when to look again."""
    backoff = Backoff(first_s=BACKOFF_S_FIRST, last_s=BACKOFF_S_LAST)
    while True:
        try:
            more = await work()
        except Exception as error:
            if not database_is_away(error):
                raise
            log.warning("worker_waits_for_database", worker=name, error=repr(error))
            await clock.sleep(backoff.next_s())
            continue
        backoff.reset()
        if not more:
            await wait()
