"""Finds what serves the name that a caller gives as `model`: base, tuned or endpoint. Not pure: database.

One query resolves a name. It starts nothing.
"""

from __future__ import annotations

from dataclasses import replace

from chassis.db.pool import Pool
from chassis.errors import Unavailable
from services.inference.endpoints.convert import lease_key
from services.inference.endpoints.domain import Endpoint
from services.inference.endpoints.lifecycle import EndpointState
from services.inference.endpoints.store import EndpointStore
from services.inference.models.domain import unknown_model
from services.inference.serving.engine_pool import EngineKey
from services.inference.serving.target import Target


class Router:
    """A name means an endpoint of the caller's project, a base model, or a tuned model of the project."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def target(self, project_id: str, model: str) -> Target:
        """What serves this name for this project; NotFound, or Unavailable for an endpoint that is not READY."""
        endpoint, shared = await self._resolve(project_id, model)
        if endpoint is not None and endpoint.state != EndpointState.READY:
            message = f"endpoint {model} is {endpoint.state}: {endpoint.status_message or 'start it first'}"
            raise Unavailable("CAPACITY_EXHAUSTED", message)
        if shared is None:
            raise unknown_model(model)
        return shared if endpoint is None else _dedicated(endpoint, shared)

    async def endpoint_target(self, endpoint: Endpoint) -> Target:
        """What serves an endpoint: the weights of its model on an engine of its own."""
        _, shared = await self._resolve(endpoint.project_id, endpoint.endpoint_id)
        if shared is None:
            raise unknown_model(endpoint.model)
        return _dedicated(endpoint, shared)

    async def _resolve(self, project_id: str, name: str) -> tuple[Endpoint | None, Target | None]:
        async with self._pool.acquire() as connection:
            return await EndpointStore(connection).resolve(project_id, name)


def _dedicated(endpoint: Endpoint, shared: Target) -> Target:
    engine = EngineKey(revision=shared.engine.revision, owner=lease_key(endpoint))
    return replace(shared, engine=engine, gpu_indices=endpoint.device_indices)
