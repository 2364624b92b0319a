"""The learning rate of every step of a run, and the peak that is taken where none is given.

Pure. The scheduler tells by these rules what a run will do, and the trainer trains by them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

# Peaks for training all weights: what TRL's trainers take for the same methods (SFTConfig, DPOConfig, KTOConfig of trl
# 1.16). Preferences move a model that can answer already, so their steps are small.
_FULL: Mapping[str, float] = MappingProxyType({"sft": 2e-5, "dpo": 1e-6, "kto": 1e-6})
# An adapter's best rate is about ten times that of all weights, whatever its rank: "LoRA Without Regret" (Schulman and
# Thinking Machines Lab, 2025), and the LoRA commands of TRL's scripts.
_LORA_FACTOR = 10


@dataclass(frozen=True, kw_only=True)
class LearningRateSchedule:
    """The way from the peak to `min_lr_ratio` of it; `num_cycles` are the waves of a cosine."""

    type: Literal["linear", "cosine"]
    min_lr_ratio: float
    num_cycles: float


def default_learning_rate(method: str, *, lora: bool) -> float:
    """The peak for `sft`, `dpo` or `kto` where none is given."""
    return _FULL[method] * (_LORA_FACTOR if lora else 1)


def warmup_steps(total_steps: int, warmup_ratio: float) -> int:
    """A step that has begun to warm up counts whole, but the last step of a run never warms up: the warm-up begins at
    zero, so a run of one step would learn nothing."""
    return min(math.ceil(total_steps * warmup_ratio), max(0, total_steps - 1))


def learning_rate_at(
    step: int, total_steps: int, base: float, warmup_ratio: float, schedule: LearningRateSchedule
) -> float:
    """The rate of step `step` (0-based): a linear rise over the warm-up, which starts at zero, then the schedule down
    to `min_lr_ratio` of the base. Same values as the schedules of transformers."""
    warming = warmup_steps(total_steps, warmup_ratio)
    if step < warming:
        return base * step / warming
    progress = (step - warming) / max(1, total_steps - warming)
    if schedule.type == "linear":
        shape = max(0.0, 1.0 - progress)
    else:
        shape = max(0.0, 0.5 * (1.0 + math.cos(math.pi * 2.0 * schedule.num_cycles * progress)))
    return base * (schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * shape)
