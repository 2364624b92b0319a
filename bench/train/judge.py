"""Held-out losses by a model's own forward, full logits, row by row: the same judge for every side."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from bench.train.bench_rows import IGNORED, Pair, Row, held_out_pairs, held_out_rows
from bench.train.shapes import DPO_BETA, Method, Shape


def held_out_loss(module: Any, shape: Shape, method: Method) -> float:
    """Nats per labelled token, or per pair of answers."""
    module.eval()
    with torch.no_grad():
        if method == "dpo":
            return preference_loss(module, held_out_pairs(shape))
        rows = held_out_rows(shape)
        sums = [_log_prob(module, row) for row in rows]
        return -sum(sums) / sum(label != IGNORED for row in rows for label in row.labels[1:])


def preference_loss(module: Any, pairs: list[Pair]) -> float:
    """The mean of -log sigmoid(beta * margin); the reference is the model under the adapter."""
    losses = []
    for pair in pairs:
        policy = _log_prob(module, pair.preferred) - _log_prob(module, pair.other)
        with module.disable_adapter():
            reference = _log_prob(module, pair.preferred) - _log_prob(module, pair.other)
        losses.append(-functional.logsigmoid(torch.tensor(DPO_BETA * (policy - reference))).item())
    return sum(losses) / len(losses)


def _log_prob(module: Any, row: Row) -> float:
    """Of the labelled tokens together."""
    logits = module(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, :-1]
    return -float(functional.cross_entropy(logits, torch.tensor(row.labels[1:]), reduction="sum").item())
