"""Not pure: database. Deletes rows that are past keeping, batch after batch, by the rules of a service.

It knows no table. Which table has which rule is in docs/retention.md.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog

from chassis.clock import Clock
from chassis.db.pool import Connection, Pool, transaction
from chassis.rounds import FailingItems, run_rounds
from chassis.settings import ChassisSettings

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class RetentionRule:
    """`delete` takes at most so many rows in the caller's transaction, and returns how many went."""

    name: str
    delete: Callable[[Connection, int], Awaitable[int]]


class RetentionKeeper:
    """Any number may run on one database: a batch leaves alone what another one has locked."""

    def __init__(self, pool: Pool, rules: Sequence[RetentionRule], settings: ChassisSettings, *, clock: Clock) -> None:
        self._pool = pool
        self._rules = rules
        self._settings = settings
        self._clock = clock
        self._failing = FailingItems("retention_keeper", clock)

    async def run(self) -> None:
        await run_rounds(
            "retention_keeper",
            self.prune,
            wait=lambda: self._clock.sleep(self._settings.prune_interval_s),
            clock=self._clock,
        )

    async def prune(self) -> bool:
        """One batch by each rule, in a transaction of its own; True when there may be more."""
        more = False
        for rule in self._rules:
            if self._failing.leaves_alone(rule.name):
                continue
            with self._failing.trying(rule.name):
                async with transaction(self._pool) as connection:
                    deleted = await rule.delete(connection, self._settings.prune_batch_max)
                if deleted:
                    log.info("rows_pruned", rule=rule.name, rows=deleted)
                more = more or deleted >= self._settings.prune_batch_max
        return more
