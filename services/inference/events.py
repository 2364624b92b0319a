"""What inference hears from the bus: jobs that ended with a model. It registers the model and warms it up."""

from __future__ import annotations

import asyncio

import structlog

from chassis.bus.envelope import EventInfo
from chassis.bus.outbox import Outbox
from chassis.clock import Clock
from chassis.db.pool import Connection
from chassis.errors import DomainError, InvalidArgument
from chassis.ids import Ids
from finemesh.events.v1 import tuning_events_pb2
from services.inference import convert, store
from services.inference.catalogue import Catalogue
from services.inference.domain import TunedModel
from services.inference.serving import Serving

log = structlog.get_logger()

WITH_MODEL = frozenset(
    {
        tuning_events_pb2.TUNING_JOB_ENDING_COMPLETED,
        tuning_events_pb2.TUNING_JOB_ENDING_STOPPED_EARLY,
    }
)


class Registry:
    """Registers the models that jobs made, once each."""

    def __init__(
        self, *, outbox: Outbox, catalogue: Catalogue, serving: Serving, warm_up: bool, clock: Clock, ids: Ids
    ) -> None:
        self._outbox = outbox
        self._catalogue = catalogue
        self._serving = serving
        self._warm_up = warm_up
        self._clock = clock
        self._ids = ids
        self._warming: set[asyncio.Task[None]] = set()

    async def job_ended(self, connection: Connection, event: tuning_events_pb2.TuningJobEnded, info: EventInfo) -> None:
        """Adds the model in the transaction of the inbox row."""
        if event.ending not in WITH_MODEL:
            return
        if not event.HasField("model") or not event.model.artifact.files:
            raise InvalidArgument("EVENT_INVALID", f"{event.tuning_job} completed without a model")
        model = convert.from_ended(event, self._ids.new("ml_"))
        if not await store.add_model(connection, model):
            return
        registered = convert.to_registered_event(model)
        await self._outbox.add(connection, registered, subject_name=registered.model, key=model.tuning_job)
        if self._warm_up:
            # Beside the transaction: an engine's start must not hold it open, and its failure must not undo the model.
            task = asyncio.create_task(self._warm(model))
            self._warming.add(task)
            task.add_done_callback(self._warming.discard)

    async def _warm(self, model: TunedModel) -> None:
        await asyncio.sleep(0)
        try:
            await self._serving.warm_up(await self._catalogue.tuned_target(model))
        except DomainError as error:
            # The first call meets the same error and reports it to somebody who can act.
            log.warning("warm-up failed", model=model.model_id, error=str(error))
