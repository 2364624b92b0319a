"""AdamW and the learning-rate schedule as a pure function of the step. It knows no loop and no data."""

import math
from typing import Any

import torch

from services.trainer.train.spec import Schedule

BETAS = (0.9, 0.999)
EPSILON = 1e-8


def learning_rate_at(step: int, total_steps: int, base: float, warmup_ratio: float, schedule: Schedule) -> float:
    """The rate of step `step` (0-based): a linear rise over the warm-up, which starts at zero, then the schedule down to
    `min_lr_ratio` of the base. Same values as the schedules of transformers."""
    warmup_steps = math.ceil(total_steps * warmup_ratio)
    if step < warmup_steps:
        return base * step / max(1, warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule.type == "linear":
        shape = max(0.0, 1.0 - progress)
    else:
        shape = max(0.0, 0.5 * (1.0 + math.cos(math.pi * 2.0 * schedule.num_cycles * progress)))
    return base * (schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * shape)


def make_optimizer(trainable: dict[str, Any], weight_decay: float) -> Any:
    """Decay applies to matrices only: shrinking norms and biases helps nobody."""
    matrices = [parameter for parameter in trainable.values() if parameter.ndim >= 2]
    vectors = [parameter for parameter in trainable.values() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=0.0, betas=BETAS, eps=EPSILON, fused=True
    )


def optimizer_tensors(optimizer: Any, trainable: dict[str, Any]) -> dict[str, Any]:
    """The whole state by name: `<kind>.<parameter>`."""
    return {
        f"{kind}.{name}": tensor.detach().cpu().contiguous()
        for name, parameter in trainable.items()
        for kind, tensor in optimizer.state[parameter].items()
    }


def restore_optimizer(optimizer: Any, trainable: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Raises ValueError when the names are not those of `trainable`."""
    found = {key.split(".", 1)[1] for key in tensors}
    if tensors and found != set(trainable):
        raise ValueError("the optimizer state belongs to other parameters")
    for key, tensor in tensors.items():
        kind, name = key.split(".", 1)
        parameter = trainable[name]
        optimizer.state[parameter][kind] = tensor.to(parameter.device)


def set_learning_rate(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
