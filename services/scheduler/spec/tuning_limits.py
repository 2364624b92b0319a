"""What may be asked for a base model: bounds as data (tuning_limits.json), cut down to what the model itself allows.

Batches are bounded by the number of weights: past these sizes a step costs much and teaches little more. `models` in
the file says for single models what differs, by the same names.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.scheduler.spec.tuning_spec import (
    CHECKPOINTS_MAX,
    EPOCHS_MAX,
    EVALUATIONS_MAX,
    GRADIENT_ACCUMULATION_STEPS_MAX,
    LORA_RANK_MAX,
    SEQUENCE_TOKENS_MAX,
    SEQUENCE_TOKENS_MIN,
)

LIMITS_FILE = Path(__file__).with_name("tuning_limits.json")
LORA_RANK_DEFAULT = 16


@dataclass(frozen=True, kw_only=True)
class BaseFacts:
    """What the catalogue says of a base model; zero means that it sets no limit."""

    context_tokens_max: int
    adapter_rank_max: int
    parameter_count: int = 0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Inclusive bounds for one base model. `lora_rank_max` 0 takes no adapter, `batch_full` 0 no training of all
    weights, `batch_dpo` 0 no preferences."""

    sequence_tokens_max: int
    sequence_tokens_max_dpo: int
    lora_rank_default: int
    lora_rank_max: int
    batch_lora: int
    batch_full: int
    batch_dpo: int
    sequence_tokens_min: int = SEQUENCE_TOKENS_MIN
    epochs_max: int = EPOCHS_MAX
    evaluations_max: int = EVALUATIONS_MAX
    checkpoints_max: int = CHECKPOINTS_MAX
    gradient_accumulation_steps_max: int = GRADIENT_ACCUMULATION_STEPS_MAX

    def batch_max(self, *, lora: bool, dpo: bool) -> int:
        """The largest batch of this kind of run; pairs of answers count as one."""
        by_weights = self.batch_lora if lora else self.batch_full
        return min(by_weights, self.batch_dpo) if dpo else by_weights


class LimitsTable:
    """The file. A number out of place stops the scheduler when it starts, not a job later."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._tiers: list[Mapping[str, Any]] = list(document["by_parameters"])
        self._models: Mapping[str, Mapping[str, Any]] = document["models"]
        if not self._tiers or self._tiers[-1]["parameters_max"] is not None:
            raise ValueError("limits: the last entry of by_parameters must be for any number of them (null)")
        known = {
            "batch_lora",
            "batch_full",
            "batch_dpo",
            "sequence_tokens_max",
            "sequence_tokens_max_dpo",
            "lora_rank_max",
        }
        for model, values in self._models.items():
            wrong = [
                name for name, value in values.items() if name not in known or not isinstance(value, int) or value < 0
            ]
            if wrong:
                raise ValueError(f"limits: {model} has unknown or wrong entries: {', '.join(sorted(wrong))}")

    def of(self, model_id: str, base: BaseFacts) -> Limits:
        tier = next(
            tier
            for tier in self._tiers
            if tier["parameters_max"] is None or base.parameter_count <= tier["parameters_max"]
        )
        own = self._models.get(model_id, {})
        context = min(base.context_tokens_max or SEQUENCE_TOKENS_MAX, SEQUENCE_TOKENS_MAX)
        rank_max = min(base.adapter_rank_max or LORA_RANK_MAX, LORA_RANK_MAX, own.get("lora_rank_max", LORA_RANK_MAX))
        return Limits(
            sequence_tokens_max=min(context, own.get("sequence_tokens_max", context)),
            sequence_tokens_max_dpo=min(context, own.get("sequence_tokens_max_dpo", context)),
            lora_rank_default=min(LORA_RANK_DEFAULT, rank_max),
            lora_rank_max=rank_max,
            batch_lora=own.get("batch_lora", tier["batch_lora"]),
            batch_full=own.get("batch_full", tier["batch_full"]),
            batch_dpo=own.get("batch_dpo", tier["batch_dpo"]),
        )


def load_limits(path: Path = LIMITS_FILE) -> LimitsTable:
    """Raises ValueError or KeyError for a file that is no table of limits."""
    return LimitsTable(json.loads(path.read_text(encoding="utf-8")))
