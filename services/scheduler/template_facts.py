"""What the chat templates of base models can render, as trainers tell it. It keeps the answers by revision and reads no template."""

from collections import OrderedDict

import structlog

from chassis.errors import DomainError
from finemesh.artifacts.v1 import model_artifact_service_pb2
from finemesh.datasets.v1 import dataset_service_pb2
from services.scheduler.config import SchedulerSettings
from services.scheduler.node_store import preparation_version
from services.scheduler.peers import Peers
from services.scheduler.store import Store
from services.scheduler.trainers import first_answer

REMEMBERED_MAX = 1024
log = structlog.get_logger(__name__)

Facts = dataset_service_pb2.DescribeModelResponse


class TemplateFacts:
    """Limits are told with or without them: a mesh whose nodes are away still has limits."""

    def __init__(self, store: Store, peers: Peers, settings: SchedulerSettings) -> None:
        self._store = store
        self._peers = peers
        self._settings = settings
        self._known: OrderedDict[tuple[str, str], Facts] = OrderedDict()

    async def of(self, base: model_artifact_service_pb2.ResolveBaseModelResponse) -> Facts | None:
        """None while no trainer can tell."""
        # Another version of the code may refuse other rows.
        key = (base.revision, await preparation_version(self._store.pool))
        known = self._known.get(key)
        if known is not None:
            return known
        request = dataset_service_pb2.DescribeModelRequest(base_model=base.artifact)
        timeout_s = self._settings.description_deadline_s
        try:
            found = await first_answer(
                self._store, self._peers, lambda trainer: trainer.DescribeModel(request, timeout=timeout_s)
            )
        except DomainError as error:
            log.warning("a chat template was not described", revision=base.revision, error=str(error))
            return None
        self._known[key] = found
        if len(self._known) > REMEMBERED_MAX:
            self._known.popitem(last=False)
        return found
