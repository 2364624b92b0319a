"""Finds what serves the name that a caller gives as `model`: base, tuned or endpoint. Not pure: database.

It starts nothing.
"""

from __future__ import annotations

from dataclasses import replace

from chassis.db.pool import Pool
from chassis.errors import Unavailable
from services.inference.endpoints.domain import Endpoint
from services.inference.endpoints.lifecycle import EndpointState
from services.inference.endpoints.store import EndpointStore
from services.inference.models.domain import unknown_model
from services.inference.serving.engine_pool import EngineKey
from services.inference.serving.target import Target, Targets


class Router:
    """Looks a name up in the order base model, tuned model, endpoint."""

    def __init__(self, pool: Pool, targets: Targets) -> None:
        self._pool = pool
        self._targets = targets

    async def target(self, project_id: str, model: str) -> Target:
        """What serves this name for this project; NotFound, or Unavailable for an endpoint that is not READY."""
        shared = await self._targets.find(project_id, model)
        if shared is not None:
            return shared
        async with self._pool.acquire() as connection:
            endpoint = await EndpointStore(connection).find(project_id, endpoint_id=model)
        if endpoint is None:
            raise unknown_model(model)
        if endpoint.state != EndpointState.READY:
            message = f"endpoint {model} is {endpoint.state}: {endpoint.status_message or 'start it first'}"
            raise Unavailable("CAPACITY_EXHAUSTED", message)
        return await self.endpoint_target(endpoint)

    async def endpoint_target(self, endpoint: Endpoint) -> Target:
        """What serves an endpoint: the weights of its model on an engine of its own."""
        shared = await self._targets.find(endpoint.project_id, endpoint.model)
        if shared is None:
            raise unknown_model(endpoint.model)
        owner = f"{endpoint.id}:{endpoint.lease_token}"
        return replace(
            shared,
            engine=EngineKey(revision=shared.engine.revision, owner=owner),
            gpu_indices=endpoint.device_indices,
        )
