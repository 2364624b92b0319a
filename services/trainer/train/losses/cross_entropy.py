"""Cross-entropy on labelled tokens only, in chunks, so that the logits of a whole batch never exist at once.

It takes hidden states and the weight of the vocabulary head; it knows no model and no batch.
"""

from math import prod
from typing import Any

import torch
from torch.nn import functional

from services.trainer.train.modeling.in_place_gradients import add_to_gradient

# Rows of logits at a time. On a processor a chunk should stay near its caches, on a GPU it should fill it.
CHUNK_ROWS = 256
CHUNK_ROWS_CUDA = 2048
_buffers: dict[Any, Any] = {}


class _ChunkedCrossEntropy(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
    """Sum over rows of factor * -log softmax(hidden @ weight.T)[label]. The gradient is made in the forward pass, chunk
    by chunk, while the chunk's logits are at hand: d loss / d logits = factor * (softmax - onehot). Factors touch rows
    of hidden states, never rows of logits, which are the wide ones. With `in_place` the gradient of the head is made
    only where it is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Any,
        weight: Any,
        labels: Any,
        softcap: float | None,
        factors: Any,
        scale: float,
        in_place: bool,
    ) -> Any:
        needs_hidden, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight and not in_place else None
        for rows in chunks(hidden):
            chunk = hidden[rows]
            scores, slopes = score(chunk, weight, labels[rows], softcap, slopes=needs_hidden or needs_weight)
            total -= (scores if factors is None else scores * factors[rows]).sum()
            if grad_hidden is not None:
                torch.mm(slopes, weight, out=grad_hidden[rows])
                if factors is not None:
                    grad_hidden[rows] *= factors[rows, None]
            if needs_weight:
                weighted = chunk if factors is None else chunk * factors[rows, None]
                if grad_weight is None:
                    add_to_gradient(weight, slopes, weighted, scale)
                else:
                    add_outer(grad_weight, slopes, weighted)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype, ctx.scale = weight.dtype, scale
        return total.mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad_total: Any) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_sum = grad_total * ctx.scale
        return (
            None if grad_hidden is None else grad_hidden.mul_(grad_sum),
            None if grad_weight is None else grad_weight.mul_(grad_sum).to(ctx.weight_dtype),
            None,
            None,
            None,
            None,
            None,
        )


def cross_entropy_sum(
    hidden: Any,
    weight: Any,
    labels: Any,
    softcap: float | None = None,
    factors: Any = None,
    *,
    scale: float = 1.0,
    in_place: bool = False,
) -> Any:
    """hidden [rows, width], weight [vocabulary, width], labels [rows] -> float32 scalar, `scale` times the sum over
    rows (nats). `factors` [rows] multiply the loss of each row; None is 1 for all. `in_place`: the gradient of
    `weight`, a float32 leaf, is added to weight.grad at once, for a loss that is nothing but this scalar."""
    if not torch.is_grad_enabled():
        scores = log_probs(hidden, weight, labels, softcap)
        return -scale * (scores if factors is None else scores * factors).sum()
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, softcap, factors, scale, in_place)


@torch.no_grad()  # type: ignore[untyped-decorator]
def log_probs(hidden: Any, weight: Any, labels: Any, softcap: float | None = None) -> Any:
    """Log-probability of each label, float32 [rows]; for scoring, not for training."""
    parts = [score(hidden[rows], weight, labels[rows], softcap, slopes=False)[0] for rows in chunks(hidden)]
    return torch.cat(parts) if parts else torch.zeros(0, device=hidden.device)


def chunks(hidden: Any) -> list[slice]:
    rows = CHUNK_ROWS_CUDA if hidden.is_cuda else CHUNK_ROWS
    return [slice(start, start + rows) for start in range(0, hidden.shape[0], rows)]


def score(hidden: Any, weight: Any, labels: Any, softcap: float | None, *, slopes: bool) -> tuple[Any, Any]:
    """Log-probabilities of the labels, float32 [rows], and, when asked for, d -log p / d logits [rows, vocabulary] in
    the weight's type. The latter lie in a buffer that the next call overwrites.

    One softmax in place is all that is done with the logits: its largest value is 1 / sum(exp(logits - largest logit)),
    from which the logarithm of the sum follows.
    """
    logits = _logits_in_scratch(hidden, weight)
    if softcap is not None:
        logits.div_(softcap).tanh_()
        cap_slope = 1.0 - logits**2 if slopes else None
        logits.mul_(softcap)
    largest = logits.amax(dim=-1)
    own = logits.gather(1, labels[:, None]).squeeze(1)
    shares = torch.softmax(logits, dim=-1, out=logits)
    scores = own - largest + shares.amax(dim=-1).log()
    if not slopes:
        return scores, None
    shares.scatter_add_(1, labels[:, None], shares.new_full((len(labels), 1), -1.0))
    if softcap is not None:
        shares.mul_(cap_slope)
    return scores, shares.to(weight.dtype)


def add_outer(total: Any, left: Any, right: Any) -> None:
    """total += left.T @ right, without a copy of `total` where the types allow."""
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
    else:
        total += (left.T @ right).to(total.dtype)


def _logits_in_scratch(hidden: Any, weight: Any) -> Any:
    """Float32, uncapped."""
    if hidden.dtype != torch.float32:
        return functional.linear(hidden, weight).float()
    return torch.mm(hidden, weight.T, out=scratch((hidden.shape[0], weight.shape[0]), hidden.device))


def scratch(shape: tuple[int, ...], device: Any) -> Any:
    """A float32 tensor of this shape with any content, without a gradient. There is one buffer for each device, used
    again and again, because a fresh one of tens of megabytes would cost its page faults each time. Its content is good
    until the next call."""
    size = prod(shape)
    buffer = _buffers.get(device)
    if buffer is None or buffer.numel() < size:
        # First the old one goes.
        _buffers.pop(device, None)
        del buffer
        buffer = _buffers[device] = torch.empty(size, dtype=torch.float32, device=device)
    return buffer[:size].view(shape)
