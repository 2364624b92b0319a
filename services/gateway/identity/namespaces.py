"""Claims the slugs of projects as namespaces of their models. Not pure: database, gRPC.

Inference owns the names of models, so it decides: a namespace is that of base models or of one project. It refuses to
know models.
"""

from typing import TYPE_CHECKING

import structlog

from chassis.clock import Clock
from chassis.db.pool import Pool, database_is_away
from chassis.errors import AlreadyExists, Unavailable
from chassis.rounds import run_rounds
from finemesh.artifacts.v1 import model_artifact_service_pb2
from services.gateway.config import GatewaySettings
from services.gateway.identity.store import IdentityStore

if TYPE_CHECKING:
    from finemesh.artifacts.v1.model_artifact_service_pb2_grpc import ModelArtifactServiceAsyncStub

log = structlog.get_logger()


class Namespaces:
    """`claim` before a project is made. `run` claims for those that were made without: by a bootstrap, or before there
    were claims."""

    def __init__(
        self, pool: Pool, models: "ModelArtifactServiceAsyncStub", clock: Clock, settings: GatewaySettings
    ) -> None:
        self._pool = pool
        self._models = models
        self._clock = clock
        self._settings = settings

    async def claim(self, slug: str) -> None:
        """Any number of times; AlreadyExists when base models have the namespace."""
        await self._models.ClaimProjectNamespace(model_artifact_service_pb2.ClaimProjectNamespaceRequest(slug=slug))

    async def run(self) -> None:
        await run_rounds(
            "namespaces",
            self._round,
            wait=lambda: self._clock.sleep(self._settings.namespace_poll_s),
            clock=self._clock,
            is_passing=lambda error: isinstance(error, Unavailable) or database_is_away(error),
        )

    async def _round(self) -> bool:
        batch_max = self._settings.namespace_batch_max
        async with self._pool.acquire() as connection:
            slugs = await IdentityStore(connection).untold_slugs(batch_max)
        for slug in slugs:
            try:
                await self.claim(slug)
            except AlreadyExists as error:
                # Both are there: neither can be taken back, and an operator has to know.
                log.warning("slug_is_a_namespace_of_base_models", slug=slug, error=error.message)
            async with self._pool.acquire() as connection:
                await IdentityStore(connection).mark_told(slug)
        return len(slugs) == batch_max
