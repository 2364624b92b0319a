"""A linear layer with its LoRA adapter as one operation, and its gradient written out.

y = x W^T + b + scaling * (x A^T) B^T. The modules stay peft's own, with their parameters, names and files; only the
pass of this plain case is replaced. No tensor of the output's size is made beside the output, and none is kept for the
backward pass. It knows no model.
"""

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch.nn import functional


class _LoraLinear(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
    """With g the gradient of y: x gets g W + l A, A gets l^T x and B gets scaling * g^T (x A^T), where l = scaling * g
    B.

    Under a base of 16 bits the adapter is multiplied in 16 bits, too, as autocast does; its gradients are float32
    again."""

    @staticmethod
    def forward(ctx: Any, inputs: Any, weight: Any, bias: Any, down: Any, up: Any, scaling: float) -> Any:
        rows = inputs.flatten(0, -2)
        output = functional.linear(rows, weight, bias)
        low = rows @ down.to(rows.dtype).T
        output.addmm_(low, up.to(rows.dtype).T, alpha=scaling)
        ctx.save_for_backward(rows, low, weight, down, up)
        ctx.scaling, ctx.shape = scaling, inputs.shape
        return output.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad_output: Any) -> Any:
        rows, low, weight, down, up = ctx.saved_tensors
        grad = grad_output.flatten(0, -2)
        grad_low = (grad @ up.to(grad.dtype)).mul_(ctx.scaling)
        grad_inputs = None
        if ctx.needs_input_grad[0]:
            grad_inputs = (grad @ weight).addmm_(grad_low, down.to(grad.dtype)).view(ctx.shape)
        grad_down = (grad_low.T @ rows).to(down.dtype)
        grad_up = (grad.T @ low).mul_(ctx.scaling).to(up.dtype)
        return grad_inputs, None, None, grad_down, grad_up, None


def join_adapters(module: Any, adapter: str = "default") -> None:
    """Every layer below `module` that is no more than a linear layer with a plain adapter takes the one operation."""
    for layer in module.modules():
        if _is_plain(layer, adapter):
            layer.forward = MethodType(_forward, layer)


def _is_plain(layer: Any, adapter: str) -> bool:
    return (
        type(layer) is Linear
        and type(layer.base_layer) is torch.nn.Linear
        and adapter in layer.lora_A
        and not layer.lora_variant
        and not layer.lora_bias[adapter]
        and not layer.fan_in_fan_out
        and isinstance(layer.lora_dropout[adapter], torch.nn.Identity)
    )


def _forward(self: Any, inputs: Any, *more: Any, **named: Any) -> Any:
    """Adapters that are off or merged, several of them, and layers whose base is trained, too, go peft's own way."""
    base = self.base_layer
    (adapter, *others) = self.active_adapters or [None]
    if self.disable_adapters or self.merged or adapter is None or others or more or named or base.weight.requires_grad:
        return Linear.forward(self, inputs, *more, **named)
    down, up = self.lora_A[adapter].weight, self.lora_B[adapter].weight
    return _LoraLinear.apply(inputs, base.weight, base.bias, down, up, self.scaling[adapter])
