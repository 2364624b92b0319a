"""Log-probabilities of labelled tokens with a gradient, in chunks: for losses that are no plain sum over tokens.

It takes hidden states and the weight of the vocabulary head; it knows no model, no batch and no loss.
"""

from typing import Any

import torch

from services.trainer.train.losses.cross_entropy import add_outer, chunks, score
from services.trainer.train.modeling.in_place_gradients import add_to_gradient


class _ChunkedLogProbs(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
    """Row by row log softmax(hidden @ weight.T)[label]. A row's log-probability moves nothing but its own hidden state,
    so that the slope d -log p / d hidden can be made while its logits are at hand, and scaled when the gradient
    arrives. Only a head that is trained needs the logits a second time."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, labels: Any, softcap: float | None, in_place: bool) -> Any:
        needs_hidden, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        scores = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        slope = torch.empty_like(hidden) if needs_hidden else None
        for rows in chunks(hidden):
            scores[rows], slopes = score(hidden[rows], weight, labels[rows], softcap, slopes=needs_hidden)
            if slope is not None:
                torch.mm(slopes, weight, out=slope[rows])
        ctx.softcap, ctx.in_place = softcap, in_place
        ctx.save_for_backward(slope, *((hidden, weight, labels) if needs_weight else ()))
        return scores

    @staticmethod
    def backward(ctx: Any, grad_scores: Any) -> Any:
        slope, *kept = ctx.saved_tensors
        grad_losses = grad_scores.neg()[:, None]
        grad_hidden = None if slope is None else slope.mul_(grad_losses)
        grad_weight = None
        if kept:
            hidden, weight, labels = kept
            total = None if ctx.in_place else torch.zeros_like(weight, dtype=torch.float32)
            for rows in chunks(hidden):
                _, slopes = score(hidden[rows], weight, labels[rows], ctx.softcap, slopes=True)
                weighted = hidden[rows] * grad_losses[rows].to(hidden.dtype)
                if total is None:
                    add_to_gradient(weight, slopes, weighted)
                else:
                    add_outer(total, slopes, weighted)
            grad_weight = None if total is None else total.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None


def token_log_probs(
    hidden: Any, weight: Any, labels: Any, softcap: float | None = None, *, in_place: bool = False
) -> Any:
    """hidden [rows, width], weight [vocabulary, width], labels [rows] -> float32 [rows], in nats. `in_place`: the
    gradient of `weight`, a float32 leaf, is added to weight.grad and goes nowhere else."""
    return _ChunkedLogProbs.apply(hidden, weight, labels, softcap, in_place)


def row_sums(scores: Any, rows: Any, count: int) -> Any:
    """Sums of `scores` [n] by row: score i belongs to row `rows[i]` (int64) of `count`. A row may have none."""
    return scores.new_zeros(count).index_add(0, rows, scores)
