"""What serves a base model or a tuned model: the engine's weights and the adapter on them. Not pure: database.

It starts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from chassis.db.pool import Pool
from services.inference.engines.answer_form import NO_PARSERS, AnswerParsers
from services.inference.models.domain import ModelKind, TunedModel, Weights, unknown_model
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
    # What reads the answers: a tuned model has what its base has.
    parsers: AnswerParsers = NO_PARSERS
    gpu_indices: tuple[int, ...] = ()

    @property
    def revision(self) -> str:
        """Revision of the weights that answer."""
        return self.adapter.revision if self.adapter else self.engine_weights.revision


class Targets:
    """Finds what serves a model that is known already."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def of_tuned(self, model: TunedModel) -> Target:
        """What serves a tuned model; NotFound when its base is not there."""
        async with self._pool.acquire() as connection:
            base = await ModelStore(connection).find_base(model.base_model, model.base_revision)
        return tuned_target(
            kind=model.kind,
            weights=model.weights,
            adapter_rank=model.adapter_rank,
            base_model=model.base_model,
            base_weights=base.weights if base is not None else None,
            parsers=base.parsers if base is not None else AnswerParsers(),
        )


def base_target(model_id: str, weights: Weights, parsers: AnswerParsers = NO_PARSERS) -> Target:
    """A base model serves itself."""
    return Target(
        engine=EngineKey(revision=weights.revision),
        engine_weights=weights,
        adapter=None,
        adapter_rank=0,
        base_model=model_id,
        takes_adapters=True,
        parsers=parsers,
    )


def tuned_target(
    *,
    kind: ModelKind,
    weights: Weights,
    adapter_rank: int,
    base_model: str,
    base_weights: Weights | None,
    parsers: AnswerParsers,
) -> Target:
    """A tuned model is an adapter on its base, or a whole model with an engine of its own."""
    if kind == ModelKind.FULL:
        return Target(
            engine=EngineKey(revision=weights.revision),
            engine_weights=weights,
            adapter=None,
            adapter_rank=0,
            base_model=base_model,
            takes_adapters=False,
            parsers=parsers,
        )
    if base_weights is None:
        raise unknown_model(base_model)
    return Target(
        engine=EngineKey(revision=base_weights.revision),
        engine_weights=base_weights,
        adapter=weights,
        adapter_rank=adapter_rank,
        base_model=base_model,
        takes_adapters=True,
        parsers=parsers,
    )
