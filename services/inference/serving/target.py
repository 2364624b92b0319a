"""Finds the weights behind a base model or a tuned model, and what serves them. Not pure: database.

It starts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from chassis.db.pool import Connection, Pool
from services.inference.models.domain import BaseModel, ModelKind, TunedModel, Weights, unknown_model
from services.inference.models.store import ModelStore
from services.inference.serving.engine_pool import EngineKey


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


class Targets:
    """Looks models up in the order base, tuned."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def find(self, project_id: str, model: str) -> Target | None:
        """What serves a model of this id for this project, on a shared engine; None where there is no such model."""
        async with self._pool.acquire() as connection:
            base = await ModelStore(connection).find_base(model)
            if base is not None:
                return base_target(base)
            tuned = await ModelStore(connection).find(project_id, model_id=model)
            return await tuned_target(connection, tuned) if tuned is not None else None

    async def of_tuned(self, model: TunedModel) -> Target:
        """What serves a tuned model."""
        async with self._pool.acquire() as connection:
            return await tuned_target(connection, model)


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


async def tuned_target(connection: Connection, model: TunedModel) -> Target:
    """A tuned model is an adapter on its base, or a whole model with an engine of its own."""
    if model.kind == ModelKind.FULL:
        return Target(
            engine=EngineKey(revision=model.weights.revision),
            engine_weights=model.weights,
            adapter=None,
            adapter_rank=0,
            base_model=model.base_model,
            takes_adapters=False,
        )
    base = await ModelStore(connection).find_base(model.base_model, model.base_revision)
    if base is None:
        raise unknown_model(model.base_model)
    return Target(
        engine=EngineKey(revision=base.weights.revision),
        engine_weights=base.weights,
        adapter=model.weights,
        adapter_rank=model.adapter_rank,
        base_model=model.base_model,
        takes_adapters=True,
    )
