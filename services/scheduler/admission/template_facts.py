"""Not pure: database, gRPC. What the chat templates of base models can render, as trainers tell it.

It keeps the answers by revision and reads no template.
"""

from collections import OrderedDict
from dataclasses import dataclass
from math import inf

import structlog

from chassis.clock import Clock
from chassis.errors import DomainError
from chassis.rpc import deadline
from finemesh.artifacts.v1 import model_artifact_service_pb2
from finemesh.datasets.v1 import dataset_service_pb2
from services.scheduler.config import SchedulerSettings
from services.scheduler.database import Database
from services.scheduler.nodes.store import NodeStore
from services.scheduler.nodes.trainers import first_answer
from services.scheduler.peers import Peers

REMEMBERED_MAX = 1024
log = structlog.get_logger(__name__)

Facts = dataset_service_pb2.DescribeModelResponse


@dataclass(frozen=True)
class _Known:
    """`facts` None: nobody could tell. Both hold until `until_s` of the clock."""

    facts: Facts | None
    until_s: float


class TemplateFacts:
    """Limits are told with or without them: a mesh whose nodes are away, or busy, still has limits."""

    def __init__(self, database: Database, peers: Peers, clock: Clock, settings: SchedulerSettings) -> None:
        self._database = database
        self._peers = peers
        self._clock = clock
        self._settings = settings
        self._known: OrderedDict[tuple[str, str], _Known] = OrderedDict()

    async def of(self, base: model_artifact_service_pb2.ResolveBaseModelResponse) -> Facts | None:
        """None while no trainer can tell."""
        # Another version of the code may refuse other rows.
        key = (base.revision, await NodeStore(self._database.pool).preparation_version())
        known = self._known.get(key)
        if known is None or known.until_s <= self._clock.monotonic():
            self._known[key] = known = await self._asked(base)
            if len(self._known) > REMEMBERED_MAX:
                self._known.popitem(last=False)
        return known.facts

    async def _asked(self, base: model_artifact_service_pb2.ResolveBaseModelResponse) -> _Known:
        request = dataset_service_pb2.DescribeModelRequest(base_model=base.artifact)
        # Whoever asks for limits is told them within their deadline, however many trainers stay silent.
        left_s = deadline.remaining_s()
        limit_s = self._settings.description_deadline_s
        try:
            with deadline.limit(limit_s if left_s is None else min(limit_s, left_s / 2)):
                facts = await first_answer(self._database, self._peers, lambda trainer: trainer.DescribeModel(request))
        except DomainError as error:
            log.warning("chat_template_not_described", revision=base.revision, error=str(error))
            return _Known(None, self._clock.monotonic() + self._settings.description_retry_s)
        return _Known(facts, inf)
