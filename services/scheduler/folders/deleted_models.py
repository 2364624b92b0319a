"""Hears from the bus of models that their owners deleted. Not pure: database, events."""

import structlog

from chassis.bus.envelope import EventInfo, claimed_time
from chassis.db.pool import Connection
from finemesh.events.v1 import model_events_pb2
from services.scheduler.folders.job_folders import JobFolders
from services.scheduler.jobs.convert import job_ref

log = structlog.get_logger()


class DeletedModels:
    def __init__(self, folders: JobFolders) -> None:
        self._folders = folders

    async def model_deleted(
        self, connection: Connection, event: model_events_pb2.ModelDeleted, info: EventInfo
    ) -> None:
        """In the transaction of the inbox row; the second time nothing happens."""
        if not event.tuning_job:
            # An imported adapter: no folder of a job holds it.
            return
        delete_time = claimed_time("event_time", event.event_time)
        if await self._folders.delete_model(connection, job_ref(event.tuning_job), delete_time):
            log.info("model_deleted", model=event.model, job=event.tuning_job)
