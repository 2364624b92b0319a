"""Gradients of full weights, added where they are kept.

No matrix of a weight's size is made, zeroed or copied for a micro-batch. The modules stay transformers' own; only the
passes of plain linear and embedding layers are replaced. The vocabulary's head is no layer here: the losses add its
gradient by `add_to_gradient`. It knows no loss and no optimizer.
"""

from types import MethodType
from typing import Any

import torch
from torch.nn import functional


def add_to_gradient(weight: Any, left: Any, right: Any, scale: float = 1.0) -> None:
    """weight.grad += scale * left.T @ right. The first call makes the gradient, whatever was in its memory."""
    first = weight.grad is None
    if first:
        weight.grad = torch.empty_like(weight)
    weight.grad.addmm_(left.T, right, beta=0.0 if first else 1.0, alpha=scale)


def keep_gradients_in_place(module: Any, *, linear: bool) -> None:
    """For weights that are float32 and whole on this device, and whose gradients no hook waits for. `linear` says that
    weights of linear layers are kept so, too; they must be multiplied in float32 and by torch's own code."""
    for layer in module.modules():
        if linear and type(layer) is torch.nn.Linear:
            layer.forward = MethodType(_linear, layer)
        elif type(layer) is torch.nn.Embedding and not (layer.max_norm or layer.scale_grad_by_freq or layer.sparse):
            layer.forward = MethodType(_embed, layer)


class _Linear(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
    """y = x W^T + b. With g the gradient of y: x gets g W, W gets g^T x and b the sum of g."""

    @staticmethod
    def forward(ctx: Any, inputs: Any, weight: Any, bias: Any) -> Any:
        ctx.save_for_backward(inputs)
        # Not what a recomputed pass would save of it: the parameter, whose gradient it is.
        ctx.weight = weight
        return functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Any) -> Any:
        (inputs,), weight = ctx.saved_tensors, ctx.weight
        grad = grad_output.flatten(0, -2)
        grad_inputs = (grad @ weight).view(inputs.shape) if ctx.needs_input_grad[0] else None
        add_to_gradient(weight, grad, inputs.flatten(0, -2))
        return grad_inputs, None, grad.sum(dim=0) if ctx.needs_input_grad[2] else None


class _Embedding(torch.autograd.Function):  # type: ignore[misc]
    """Rows of a matrix; each one's gradient goes back to its row."""

    @staticmethod
    def forward(ctx: Any, ids: Any, weight: Any, padding: int | None) -> Any:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding = weight, padding
        return functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Any) -> Any:
        (ids,), weight = ctx.saved_tensors, ctx.weight
        rows, ids = grad_output.flatten(0, -2), ids.flatten()
        if ctx.padding is not None:
            rows = rows * (ids != ctx.padding)[:, None]
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.index_add_(0, ids, rows)
        return None, None, None


def _linear(self: Any, inputs: Any) -> Any:
    if not self.weight.requires_grad:
        return functional.linear(inputs, self.weight, self.bias)
    return _Linear.apply(inputs, self.weight, self.bias)


def _embed(self: Any, ids: Any) -> Any:
    if not self.weight.requires_grad:
        return functional.embedding(ids, self.weight)
    return _Embedding.apply(ids, self.weight, self.padding_idx)
