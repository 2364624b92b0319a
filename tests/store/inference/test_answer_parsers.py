"""A name resolves to what serves it, with the parsers that read its answers: a tuned model has those of its base."""

from __future__ import annotations

from datetime import UTC, datetime

from chassis.db.pool import Pool, transaction
from services.inference.endpoints.store import EndpointStore
from services.inference.engines.answer_form import AnswerParsers
from services.inference.models.domain import BaseModel, ModelKind, TunedModel, Weights
from services.inference.models.store import ModelStore
from services.inference.serving.target import Targets

PARSERS = AnswerParsers(tool="hermes", reasoning="qwen3")
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def weights(revision: str) -> Weights:
    return Weights(revision=revision, key=f"{revision}/", files=())


async def test_tuned_models_have_the_parsers_of_their_base(pool: Pool) -> None:
    base = BaseModel(
        model_id="acme/reads", weights=weights("rv_reads"), architecture="LlamaForCausalLM", parameter_count=1,
        context_tokens_max=8, size_bytes=1, created_at=NOW, parsers=PARSERS,
    )  # fmt: skip
    tuned = [
        TunedModel(
            id=f"mdl_{kind}", project_id="proj_reads", model_id=f"reads/{kind}", kind=kind, base_model=base.model_id,
            base_revision="rv_reads", weights=weights(f"rv_{kind}"), adapter_rank=4, tuning_job=f"job_{kind}",
            lineage={}, created_at=NOW,
        )
        for kind in ModelKind
    ]  # fmt: skip
    async with transaction(pool) as connection:
        models = ModelStore(connection)
        await models.save_base(base)
        for model in tuned:
            assert await models.add(model)
        names = [base.model_id, *[model.model_id for model in tuned]]
        found = [(await EndpointStore(connection).resolve("proj_reads", name)).target for name in names]
    targets = Targets(pool)
    found += [await targets.of_tuned(model) for model in tuned]
    assert [target.parsers for target in found if target is not None] == [PARSERS] * 5
