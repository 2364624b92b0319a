"""AdamW: made, fed, kept and restored. It knows no loop and no data."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from services.trainer.train.modeling.fsdp import copy_whole

BETAS = (0.9, 0.999)
EPSILON = 1e-8


def make_optimizer(trainable: dict[str, Any], weight_decay: float) -> Any:
    """Decay applies to matrices only: norms and biases are not shrunk."""
    matrices = [parameter for parameter in trainable.values() if parameter.ndim >= 2]
    vectors = [parameter for parameter in trainable.values() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=0.0, betas=BETAS, eps=EPSILON, fused=True
    )


def optimizer_tensors(optimizer: Any, trainable: dict[str, Any]) -> dict[str, Any]:
    """The whole state by name, `<kind>.<parameter>`, each tensor on its device."""
    return {
        f"{kind}.{name}": tensor
        for name, parameter in trainable.items()
        for kind, tensor in optimizer.state[parameter].items()
    }


def empty_optimizer_tensors(optimizer: Any, trainable: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimizer that has moved nothing yet, to be filled."""
    for parameter in trainable.values():
        moments = {kind: torch.zeros_like(parameter).detach() for kind in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter].update(step=torch.zeros((), dtype=torch.float32, device=parameter.device), **moments)
    return optimizer_tensors(optimizer, trainable)


def restore_optimizer(optimizer: Any, trainable: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Raises ValueError when the names are not those of `trainable`."""
    found = {key.split(".", 1)[1] for key in tensors}
    if tensors and found != set(trainable):
        raise ValueError("the optimizer state belongs to other parameters")
    for key, tensor in tensors.items():
        kind, name = key.split(".", 1)
        parameter = trainable[name]
        if tensor.shape == parameter.shape and isinstance(parameter, DTensor):
            optimizer.state[parameter][kind] = torch.zeros_like(parameter)
            copy_whole(optimizer.state[parameter][kind], tensor)
        else:
            optimizer.state[parameter][kind] = tensor.to(parameter.device)


def clip_gradients(parameters: Iterable[Any], norm_max: float) -> Any:
    """Scales all gradients down to a common norm of `norm_max` (0: leaves them). Returns the norm before, on its
    device."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, norm_max or math.inf)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def update(optimizer: Any, rate: float, *, skipped: Any) -> None:
    """The optimizer's step at this rate. `skipped` is a flag on the device, bool []: where it is set nothing moves,
    neither a weight nor a moment nor the count of steps, and the host need not know."""
    set_learning_rate(optimizer, rate)
    # Fused kernels leave their work undone where this is 1; it is how torch's own loss scaling skips a step.
    optimizer.found_inf = skipped.float()
    optimizer.step()


def set_learning_rate(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
