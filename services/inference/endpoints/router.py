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
from services.inference.endpoints.owners import AGAIN_RETRY_S, ServedElsewhere
from services.inference.endpoints.store import EndpointStore, ResolvedName
from services.inference.models.domain import unknown_model
from services.inference.serving.calls import Serving
from services.inference.serving.engine_pool import EngineKey
from services.inference.serving.target import Target


class Router:
    """A name means an endpoint of the caller's project, a base model, or a tuned model of the project."""

    def __init__(self, pool: Pool, serving: Serving, *, owner: str) -> None:
        """`owner` is this process as its claims name it."""
        self._pool = pool
        self._serving = serving
        self._owner = owner

    async def target(self, project_id: str, model: str) -> Target:
        """What serves this name for this project; NotFound, or Unavailable for an endpoint that does not serve.
        ServedElsewhere for one that another process has."""
        found = await self._resolve(project_id, model)
        if found.endpoint is not None:
            return self._running_target(found.endpoint, claimed=found.claimed)
        if found.target is None:
            raise unknown_model(model)
        return found.target

    async def endpoint_target(self, endpoint: Endpoint) -> Target:
        """What an endpoint is started with: the weights that its model has now, on an engine of its own."""
        found = await self._resolve(endpoint.project_id, endpoint.endpoint_id)
        if found.target is None:
            raise unknown_model(endpoint.model)
        return replace(found.target, engine=EngineKey(owner=lease_key(endpoint)), gpu_indices=endpoint.device_indices)

    def _running_target(self, endpoint: Endpoint, *, claimed: bool) -> Target:
        """What the endpoint was started with, which a later import of its base does not change."""
        name = endpoint.endpoint_id
        if endpoint.state != EndpointState.READY:
            message = f"endpoint {name} is {endpoint.state}: {endpoint.status_message or 'start it first'}"
            raise Unavailable("CAPACITY_EXHAUSTED", message)
        if endpoint.owner != self._owner:
            if claimed:
                raise ServedElsewhere(endpoint)
            message = f"the process that serves endpoint {name} is away; another one takes it over"
            raise Unavailable("CAPACITY_EXHAUSTED", message, retry_after_s=AGAIN_RETRY_S)
        running = self._serving.dedicated(lease_key(endpoint))
        if running is None:
            message = f"the engine of endpoint {name} is not running here; it is started again"
            raise Unavailable("CAPACITY_EXHAUSTED", message, retry_after_s=AGAIN_RETRY_S)
        return running

    async def _resolve(self, project_id: str, name: str) -> ResolvedName:
        async with self._pool.acquire() as connection:
            return await EndpointStore(connection).resolve(project_id, name)
