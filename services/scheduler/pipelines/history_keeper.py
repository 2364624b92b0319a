"""Not pure: database. Thins what is kept of ended jobs: first metric lines go, later all but the transitions.

A job's row and its transitions stay. Each step is one bounded batch of one job; one that fails by a defect is left
alone for a growing pause.
"""

from datetime import timedelta

import structlog

from chassis.clock import Clock
from chassis.rounds import FailingItems, run_rounds
from services.scheduler.config import SchedulerSettings
from services.scheduler.database import Database
from services.scheduler.jobs.job import EventKind
from services.scheduler.pipelines.store import HistoryStore

# `jobs.history_stage`: what is left.
WHOLE, WITHOUT_METRICS, TRANSITIONS = 0, 1, 2
DETAILS = tuple(kind for kind in EventKind if kind not in (EventKind.STATE_CHANGED, EventKind.REQUEUED))
log = structlog.get_logger(__name__)


class HistoryKeeper:
    def __init__(self, database: Database, clock: Clock, settings: SchedulerSettings) -> None:
        self._database = database
        self._clock = clock
        self._settings = settings
        self._failing = FailingItems("history_keeper", clock)

    async def run(self) -> None:
        await run_rounds(
            "history_keeper",
            self.prune_one,
            wait=lambda: self._clock.sleep(self._settings.history_interval_s),
            clock=self._clock,
        )

    async def prune_one(self) -> bool:
        """One batch of one job for each stage; False when no job has anything that is past keeping."""
        metrics = await self._prune(WHOLE, self._settings.metric_retention_s)
        details = await self._prune(WITHOUT_METRICS, self._settings.job_detail_retention_s)
        return metrics or details

    async def _prune(self, stage: int, retention_s: float) -> bool:
        before = self._database.now() - timedelta(seconds=retention_s)
        async with self._database.writing() as connection:
            history = HistoryStore(connection)
            job_id = await history.lock_oldest(stage, before, self._failing.left_alone())
            if job_id is None:
                return False
            # A failure takes back what was done for this job, and no more.
            with self._failing.trying(job_id):
                async with connection.transaction():
                    rows = await self._thin(history, job_id, stage)
                log.info("history_pruned", job=job_id, stage=stage + 1, rows=rows)
        return True

    async def _thin(self, history: HistoryStore, job_id: str, stage: int) -> int:
        batch_max = self._settings.history_batch_max
        if stage == WHOLE:
            deleted = [await history.prune_lines(job_id, [EventKind.METRICS], batch_max)]
        else:
            deleted = [
                await history.prune_lines(job_id, DETAILS, batch_max),
                await history.prune_usage(job_id, batch_max),
                await history.prune_checkpoints(job_id, batch_max),
                await history.prune_attempts(job_id, batch_max),
            ]
        if max(deleted) < batch_max:
            await history.finish(job_id, stage + 1)
        return sum(deleted)
