"""Log-probabilities of labelled tokens with a gradient, in chunks: what a loss needs that is no plain sum over tokens.

It takes hidden states and the weight of the vocabulary head; it knows no model, no batch and no loss.
"""

from typing import Any

import torch

from services.trainer.train.loss import add_outer, chunks, score


class _ChunkedLogProbs(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
    """Row by row log softmax(hidden @ weight.T)[label]. A row's log-probability moves nothing but its own hidden state, so that
    the slope d -log p / d hidden can be made while its logits are at hand, and scaled when the gradient arrives. Only a head
    that is trained needs the logits a second time."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, labels: Any, softcap: float | None) -> Any:
        needs_hidden, needs_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        scores = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        slope = torch.empty_like(hidden) if needs_hidden else None
        for rows in chunks(hidden):
            scores[rows], slopes = score(hidden[rows], weight, labels[rows], softcap, slopes=needs_hidden)
            if slope is not None:
                torch.mm(slopes, weight, out=slope[rows])
        ctx.softcap = softcap
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
            total = torch.zeros_like(weight, dtype=torch.float32)
            for rows in chunks(hidden):
                _, slopes = score(hidden[rows], weight, labels[rows], ctx.softcap, slopes=True)
                add_outer(total, slopes, hidden[rows] * grad_losses[rows].to(hidden.dtype))
            grad_weight = total.to(weight.dtype)
        return grad_hidden, grad_weight, None, None


def token_log_probs(hidden: Any, weight: Any, labels: Any, softcap: float | None = None) -> Any:
    """hidden [rows, width], weight [vocabulary, width], labels [rows] -> float32 [rows], in nats."""
    return _ChunkedLogProbs.apply(hidden, weight, labels, softcap)


def line_sums(scores: Any, counts: Any) -> Any:
    """Sums of consecutive runs of `scores` [rows]: run i has `counts[i]` of them. float32 [runs]; a run may be empty."""
    lines = torch.repeat_interleave(torch.arange(len(counts), device=scores.device), counts)
    return scores.new_zeros(len(counts)).index_add(0, lines, scores)
