"""Not pure: database. Deletes the metric lines of jobs that ended long ago; all other lines of their history stay."""

from datetime import timedelta

import structlog

from chassis.clock import Clock
from chassis.rounds import run_rounds
from services.scheduler.config import SchedulerSettings
from services.scheduler.database import Database
from services.scheduler.pipelines.store import HistoryStore

log = structlog.get_logger(__name__)


class HistoryKeeper:
    def __init__(self, database: Database, clock: Clock, settings: SchedulerSettings) -> None:
        self._database = database
        self._clock = clock
        self._settings = settings

    async def run(self) -> None:
        await run_rounds(
            "history_keeper",
            self.prune_one,
            wait=lambda: self._clock.sleep(self._settings.history_interval_s),
            clock=self._clock,
        )

    async def prune_one(self) -> bool:
        """One batch of one job; False when no job has lines that are past keeping."""
        before = self._database.now() - timedelta(seconds=self._settings.metric_retention_s)
        batch_max = self._settings.history_batch_max
        async with self._database.writing() as connection:
            history = HistoryStore(connection)
            job_id = await history.lock_oldest(before)
            if job_id is None:
                return False
            deleted = await history.prune(job_id, batch_max)
            if deleted < batch_max:
                await history.finish(job_id)
        log.info("history_pruned", job=job_id, lines=deleted)
        return True
