"""Finds the weights behind what a caller names as `model`: base, tuned or endpoint. It starts nothing."""

from __future__ import annotations

from dataclasses import dataclass

from chassis.db.pool import Pool
from chassis.errors import NotFound, Unavailable
from services.inference import store
from services.inference.domain import BaseModel, Endpoint, ModelKind, TunedModel, Weights
from services.inference.engine_pool import EngineKey
from services.inference.lifecycle import EndpointState


@dataclass(frozen=True, kw_only=True)
class Target:
    """What serves a call: an engine's weights, the adapter on them if any, and whose price applies."""

    engine: EngineKey
    engine_weights: Weights
    adapter: Weights | None
    adapter_rank: int
    base_model: str
    takes_adapters: bool
    gpu_indices: tuple[int, ...] = ()

    @property
    def revision(self) -> str:
        """Revision of the weights that answer."""
        return self.adapter.revision if self.adapter else self.engine_weights.revision


def unknown(model: str) -> NotFound:
    """The error for a model that is not there for this caller."""
    message = f"no model {model[:200]!r} for this project; `finemesh models list` shows what there is"
    return NotFound("MODEL_UNKNOWN", message, metadata={"model": model[:200]})


class Catalogue:
    """Looks models up in the order base, tuned, endpoint."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def base(self, model_id: str, revision: str = "") -> BaseModel | None:
        """A base model, current or in a named revision."""
        async with self._pool.acquire() as connection:
            return await store.find_base_model(connection, model_id, revision)

    async def target(self, project_id: str, model: str) -> Target:
        """What serves this id for this project; NotFound, or Unavailable for an endpoint that is not READY."""
        async with self._pool.acquire() as connection:
            base = await store.find_base_model(connection, model)
            if base is not None:
                return base_target(base)
            tuned = await store.find_model(connection, project_id, model_id=model)
            if tuned is not None:
                return await self.tuned_target(tuned)
            endpoint = await store.find_endpoint(connection, project_id, endpoint_id=model)
        if endpoint is None:
            raise unknown(model)
        if endpoint.state != EndpointState.READY:
            message = f"endpoint {model} is {endpoint.state}: {endpoint.status_message or 'start it first'}"
            raise Unavailable("CAPACITY_EXHAUSTED", message)
        return await self.endpoint_target(endpoint)

    async def endpoint_target(self, endpoint: Endpoint) -> Target:
        """What serves an endpoint: the same weights on an engine of its own."""
        async with self._pool.acquire() as connection:
            base = await store.find_base_model(connection, endpoint.model)
            tuned = None if base else await store.find_model(connection, endpoint.project_id, model_id=endpoint.model)
        if base is None and tuned is None:
            raise unknown(endpoint.model)
        shared = base_target(base) if base else await self.tuned_target(tuned)  # type: ignore[arg-type]
        owner = f"{endpoint.id}:{endpoint.lease_token}"
        return Target(
            engine=EngineKey(revision=shared.engine.revision, owner=owner),
            engine_weights=shared.engine_weights,
            adapter=shared.adapter,
            adapter_rank=shared.adapter_rank,
            base_model=shared.base_model,
            takes_adapters=shared.takes_adapters,
            gpu_indices=endpoint.device_indices,
        )

    async def tuned_target(self, model: TunedModel) -> Target:
        """What serves a tuned model: an adapter on its base, or an engine of its own."""
        if model.kind == ModelKind.FULL:
            return Target(
                engine=EngineKey(revision=model.weights.revision),
                engine_weights=model.weights,
                adapter=None,
                adapter_rank=0,
                base_model=model.base_model,
                takes_adapters=False,
            )
        base = await self.base(model.base_model, model.base_revision)
        if base is None:
            raise unknown(model.base_model)
        return Target(
            engine=EngineKey(revision=base.weights.revision),
            engine_weights=base.weights,
            adapter=model.weights,
            adapter_rank=model.adapter_rank,
            base_model=model.base_model,
            takes_adapters=True,
        )


def base_target(base: BaseModel) -> Target:
    """A base model serves itself."""
    return Target(
        engine=EngineKey(revision=base.weights.revision),
        engine_weights=base.weights,
        adapter=None,
        adapter_rank=0,
        base_model=base.model_id,
        takes_adapters=True,
    )
