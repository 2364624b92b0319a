"""Cross-entropy on labelled tokens only, in chunks, so that the logits of a whole batch never exist at once.

It takes hidden states and the weight of the vocabulary head; it knows no model and no batch.
"""

from typing import Any

import torch
from torch.nn import functional

CHUNK_ROWS = 512


class _ChunkedCrossEntropy(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
    """Sum over rows of -log softmax(hidden @ weight.T)[label]. The gradient is made in the forward pass, chunk by chunk, while
    the chunk's logits are at hand: d loss / d logits = softmax - onehot."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, labels: Any, softcap: float | None) -> Any:
        needs_hidden, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        for start in range(0, hidden.shape[0], CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            chunk, chunk_labels = hidden[rows], labels[rows, None]
            logits = logits_of(chunk, weight, softcap)
            log_total = torch.logsumexp(logits, dim=-1, keepdim=True)
            total += (log_total - logits.gather(1, chunk_labels)).sum()
            if not (needs_hidden or needs_weight):
                continue
            slope = None if softcap is None else 1.0 - (logits / softcap) ** 2
            grad_logits = logits.sub_(log_total).exp_()
            grad_logits.scatter_add_(1, chunk_labels, grad_logits.new_full(chunk_labels.shape, -1.0))
            if slope is not None:
                grad_logits.mul_(slope)
            grad_logits = grad_logits.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += (grad_logits.T @ chunk).float()
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Any) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_total.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad_total).to(ctx.weight_dtype),
            None,
            None,
        )


def cross_entropy_sum(hidden: Any, weight: Any, labels: Any, softcap: float | None = None) -> Any:
    """hidden [rows, width], weight [vocabulary, width], labels [rows] -> float32 scalar, the sum over rows (nats)."""
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, softcap)


def log_probs(hidden: Any, weight: Any, labels: Any, softcap: float | None = None) -> Any:
    """Log-probability of each label, float32 [rows]; for scoring, not for training."""
    parts = [
        torch.log_softmax(logits_of(hidden[start : start + CHUNK_ROWS], weight, softcap), dim=-1)
        .gather(1, labels[start : start + CHUNK_ROWS, None])
        .squeeze(1)
        for start in range(0, hidden.shape[0], CHUNK_ROWS)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, device=hidden.device)


def logits_of(hidden: Any, weight: Any, softcap: float | None) -> Any:
    logits = functional.linear(hidden, weight).float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
