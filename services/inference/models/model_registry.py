"""Not pure: database, events. Which tuned models there are: jobs that ended add theirs, owners import and delete them.

It refuses to know how a model is warmed up; whoever wires it says so.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import datetime

import structlog

from chassis.bus.envelope import EventInfo
from chassis.bus.outbox import Outbox
from chassis.db.pool import Connection
from chassis.errors import DomainError, InvalidArgument
from chassis.ids import Ids
from finemesh.events.v1 import tuning_events_pb2
from services.inference.models import convert
from services.inference.models.domain import NameKind, TunedModel, name_taken
from services.inference.models.store import ModelStore, UploadStore

log = structlog.get_logger()

NAMES_TRIED_MAX = 1000
ENDINGS_WITH_MODEL = frozenset(
    {
        tuning_events_pb2.TUNING_JOB_ENDING_COMPLETED,
        tuning_events_pb2.TUNING_JOB_ENDING_STOPPED_EARLY,
    }
)


class Registry:
    """Adds each model once and warms it up in the background; `warm_up` is None where nobody wants that."""

    def __init__(self, outbox: Outbox, *, warm_up: Callable[[TunedModel], Awaitable[None]] | None, ids: Ids) -> None:
        self._outbox = outbox
        self._warm_up = warm_up
        self._ids = ids
        self._warming: set[asyncio.Task[None]] = set()

    async def job_ended(self, connection: Connection, event: tuning_events_pb2.TuningJobEnded, info: EventInfo) -> None:
        """Adds the model in the transaction of the inbox row."""
        if event.ending not in ENDINGS_WITH_MODEL:
            return
        if not event.HasField("model") or not event.model.artifact.files:
            raise InvalidArgument("EVENT_INVALID", f"{event.tuning_job} completed without a model")
        model = await self._named(connection, convert.ended_job_from_proto(event, self._ids.new("ml_")))
        if await ModelStore(connection).add(model):
            await self._announce(connection, model)

    async def import_adapter(self, connection: Connection, model: TunedModel) -> None:
        """Adds an adapter that its owner brought, in the transaction that ends its upload. AlreadyExists for a name
        that means something else: nobody paid for it yet."""
        if not await ModelStore(connection).claim_name(model.model_id, NameKind.TUNED, owner=model.owner):
            raise name_taken(model.model_id, "output_name")
        await ModelStore(connection).add(model)
        await self._announce(connection, model)

    async def _announce(self, connection: Connection, model: TunedModel) -> None:
        registered = convert.model_registered_to_proto(model)
        await self._outbox.add(connection, registered, subject_name=registered.model, key=model.owner)
        if self._warm_up is not None:
            # Beside the transaction: an engine's start must not hold it open, and its failure must not undo the model.
            # It outlives the event, so it takes neither its connection nor its trace along.
            task = asyncio.create_task(self._warm(self._warm_up, model), context=contextvars.Context())
            self._warming.add(task)
            task.add_done_callback(self._warming.discard)

    async def delete(self, connection: Connection, project_id: str, id: str, now: datetime) -> bool:
        """Takes a model out, and tells it whoever keeps the files; False when there is none."""
        model = await ModelStore(connection).delete(project_id, id, now)
        if model is None:
            return False
        if model.is_imported:
            # A job's model is deleted with the job's folder; nobody else knows of this one.
            await UploadStore(connection).begin(self._ids.new("upload"), model.weights.key)
        deleted = convert.model_deleted_to_proto(model, now)
        await self._outbox.add(connection, deleted, subject_name=deleted.model, key=model.owner)
        return True

    @staticmethod
    async def _named(connection: Connection, model: TunedModel) -> TunedModel:
        """The model under its own id, or with a number behind it when an endpoint or another model has that id.

        The work is done and paid for, so it is not refused for its name.
        """
        names = (model.model_id, *(f"{model.model_id}-{number}" for number in range(2, NAMES_TRIED_MAX + 1)))
        for name in names:
            if await ModelStore(connection).claim_name(name, NameKind.TUNED, owner=model.owner):
                if name != model.model_id:
                    log.warning("model_renamed", model=model.model_id, name=name, tuning_job=model.tuning_job)
                return replace(model, model_id=name)
        raise name_taken(model.model_id, "output name")

    @staticmethod
    async def _warm(warm_up: Callable[[TunedModel], Awaitable[None]], model: TunedModel) -> None:
        await asyncio.sleep(0)
        try:
            await warm_up(model)
        except DomainError as error:
            # The first call meets the same error and reports it to somebody who can act.
            log.warning("warm_up_failed", model=model.model_id, error=str(error))
