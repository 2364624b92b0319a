"""`finemesh models limits`: what a base model allows a job to ask for. The server checks by the same numbers."""

from __future__ import annotations

from typing import Annotated

import typer

from finemesh.tuning.v1 import tuning_limits_pb2
from finemesh_client.cli.output import fields, print_json
from finemesh_client.cli.runtime import AsJson, with_client
from finemesh_client.client import Client
from finemesh_client.training_kinds import METHOD_FIELDS


def limits(
    model: Annotated[str, typer.Argument(help="Base model id, or a job to continue: ft-...[:step].")],
    as_json: AsJson = False,
) -> None:
    """Show the bounds of a model's settings."""

    async def work(mesh: Client) -> None:
        found = await mesh.jobs.limits(model)
        print_json(found) if as_json else show(found)

    with_client(work, as_json)


def show(found: tuning_limits_pb2.TuningLimits) -> None:
    """Limits for people; what is not offered says so."""
    dpo, lora = found.supports_dpo, found.lora
    rates = f"above {found.learning_rate_min:g} to {found.learning_rate_max:g}"
    accumulation = f"1 to {found.gradient_accumulation_steps_max}"
    fields(
        [
            ("base model", found.base_model),
            ("methods", ", ".join(METHOD_FIELDS) if dpo else "sft"),
            ("tools", _supported(found, "supports_tools")),
            ("reasoning", _supported(found, "supports_reasoning")),
            ("epochs", f"1 to {found.epochs_max}"),
            ("evaluations", f"0 to {found.evaluations_max} per epoch"),
            ("checkpoints", f"1 to {found.checkpoints_max}"),
            ("learning rate", rates),
            ("accumulation", f"{accumulation} (default {found.gradient_accumulation_steps_default})"),
            ("tokens, sft", f"{found.sequence_tokens_min:,} to {found.sequence_tokens_max_supervised:,}"),
            (
                f"tokens, {', '.join(word for word in METHOD_FIELDS if word != 'sft')}",
                f"{found.sequence_tokens_min:,} to {found.sequence_tokens_max_dpo:,}" if dpo else "",
            ),
            ("adapter", _adapter(lora) if found.HasField("lora") else "not offered"),
            ("adapter, batch", _batch(lora.batch, dpo) if found.HasField("lora") else ""),
            ("all weights", _batch(found.full.batch, dpo) if found.HasField("full") else "not offered"),
        ]
    )


def _supported(found: tuning_limits_pb2.TuningLimits, what: str) -> str:
    if not found.HasField(what):  # type: ignore[arg-type]
        return "not known: no node could be asked"
    return (
        "rendered by the chat template"
        if getattr(found, what)
        else "not rendered by the chat template; such rows are refused"
    )


def _adapter(lora: tuning_limits_pb2.LoraLimits) -> str:
    ranks = f"rank 1 to {lora.rank_max} (default {lora.rank_default})"
    return f"{ranks}, alpha 1 to {lora.alpha_max}, dropout 0 to {lora.dropout_max:g}"


def _batch(batch: tuning_limits_pb2.BatchLimits, dpo: bool) -> str:
    pairs = f", {batch.min} to {batch.max_dpo} pairs" if dpo and batch.max_dpo else ""
    return f"{batch.min} to {batch.max_supervised} sequences{pairs}"
